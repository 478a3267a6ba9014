"""A run that was stopped and resumed ends bit for bit where the same run in one go ends; two real processes each."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lerobot_pirl.envs.check import check_libero
from tests.comparison import checkpoint_differences, metrics_differences
from tests.terminals import CONFIGS, SMALL, Run, end_well, running
from tests.toy import read_json

pytestmark = pytest.mark.e2e

# enough for every test here unless the machine is very busy; then the reference goes on
UPDATES = 8
TENSORS = {
    "policy": "pretrained_model/model.safetensors",
    "value head": "algorithm/model.safetensors",
    "optimiser": "training_state/optimizer_state.safetensors",
    "random states": "training_state/rng_state.safetensors",
}


class InOneGo:
    """A run that was never stopped, and every checkpoint of it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.terminals = run.start_both(f"--steps={UPDATES}", "--save_freq=1")

    def differences(self, other: Run, step: int) -> list[str]:
        """Return in what another run's checkpoint and metrics differ from this run's at the same step."""
        end_well(*self.terminals)
        if step > UPDATES:
            return self._longer(other, step)
        ours = [record for record in self.run.metrics() if record["iteration"] <= step]
        return checkpoint_differences(
            self.run.checkpoint(step), other.checkpoint(step)
        ) + metrics_differences(ours, other.metrics())

    def _longer(self, other: Run, step: int) -> list[str]:
        (self.run.folder / f"to{step}").mkdir()
        with running(Run(self.run.folder / f"to{step}")) as run:
            end_well(*run.start_both(f"--steps={step}"))
            return checkpoint_differences(run.checkpoint(step), other.checkpoint(step)) + metrics_differences(
                run.metrics(), other.metrics()
            )


@pytest.fixture(scope="module")
def in_one_go(tmp_path_factory):
    with running(Run(tmp_path_factory.mktemp("in_one_go"))) as run:
        yield InOneGo(run)


@pytest.fixture
def run(tmp_path):
    with running(Run(tmp_path)) as run:
        yield run


def test_two_updates_and_two_more_are_four(in_one_go, run):
    end_well(*run.start_both("--steps=2"))
    assert run.last_step() == 2
    end_well(*run.resume_both("--steps=4"))
    assert in_one_go.differences(run, 4) == []


def test_ctrl_c_anywhere_loses_nothing(in_one_go, run):
    learner, actor = run.start_both("--steps=100000", "--save_freq=0")
    actor.wait_for("policy version 2 applied")
    learner.interrupt()
    assert (learner.status(), actor.status()) == (130, 1)
    done = run.last_step()
    end_well(*run.resume_both(f"--steps={done + 1}"))
    assert in_one_go.differences(run, done + 1) == []


def test_a_learner_killed_at_once_goes_on_with_the_same_actor_from_its_last_checkpoint(in_one_go, run):
    learner, actor = run.start_both("--steps=100000", "--save_freq=1")
    actor.wait_for("policy version 2 applied")
    learner.kill()
    done = run.last_step()
    end_well(run.resume("learner", f"--steps={done + 2}"), actor)
    assert in_one_go.differences(run, done + 2) == []


def test_another_seed_ends_elsewhere(in_one_go, run):
    end_well(*run.start_both("--steps=2", "--seed=1001"))
    found = in_one_go.differences(run, 2)
    for name in TENSORS.values():
        assert any(line.startswith(f"{name}: ") for line in found), name
    assert any(line.startswith("metrics.jsonl record 1: train/value_loss") for line in found)


def test_the_reference_learns_between_the_checkpoints_that_are_compared(in_one_go):
    end_well(*in_one_go.terminals)
    for what in ("policy", "value head", "optimiser"):
        first, second = (load_file(in_one_go.run.checkpoint(step) / TENSORS[what]) for step in (2, 4))
        assert not torch.equal(_flat(first), _flat(second)), what


def _flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].double().reshape(-1) for name in sorted(tensors)])


def _rounded(value: float) -> float:
    return math.nextafter(value, math.inf)


def _change_tensor(path: Path) -> str:
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    content = tensors[name].reshape(-1).view(torch.uint8)
    content[0] ^= 1
    save_file(tensors, path)
    return name


def _change_json(path: Path, *keys: str | int) -> str:
    content = inner = read_json(path)
    for key in keys[:-1]:
        inner = inner[key]
    value = inner[keys[-1]]
    inner[keys[-1]] = _rounded(value) if isinstance(value, float) else value + 1
    path.write_text(json.dumps(content))
    return ".".join(map(str, keys))


CHANGES = {
    **dict.fromkeys(TENSORS.values(), (_change_tensor,)),
    "training_state/optimizer_param_groups.json": (_change_json, 1, "lr"),
    "training_state/training_step.json": (_change_json, "env_steps"),
    "pretrained_model/train_config.json": (_change_json, "algorithm", "gamma"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_comparison_names_the_one_thing_that_differs(in_one_go, tmp_path, name):
    end_well(*in_one_go.terminals)
    original, copy = in_one_go.run.checkpoint(2), tmp_path / "copy"
    shutil.copytree(original, copy)
    assert checkpoint_differences(original, copy) == []
    change, *arguments = CHANGES[name]
    changed = change(copy / name, *arguments)
    (line,) = [
        line
        for line in checkpoint_differences(original, copy)
        if not line.startswith(f"{name}: (file metadata)")
    ]
    assert line.startswith(f"{name}: {changed}: ")


def test_the_comparison_names_files_and_records_that_one_side_lacks(in_one_go, tmp_path):
    end_well(*in_one_go.terminals)
    original, copy = in_one_go.run.checkpoint(2), tmp_path / "copy"
    shutil.copytree(original, copy)
    (copy / "training_state/training_step.json").unlink()
    (copy / "more.txt").write_text("more")
    found = checkpoint_differences(original, copy)
    assert "more.txt: (content): (absent) / b'more'" in found
    assert "training_state/training_step.json: step: 2 / (absent)" in found
    records = [{"train/value_loss": 0.5, "time/update_s": 1.0}, {"iteration": 2}]
    assert metrics_differences(records, records[:1]) == ["metrics.jsonl record 2: iteration: 2 / (absent)"]
    other = [{"train/value_loss": _rounded(0.5), "time/update_s": 2.0}, {"iteration": 2}]
    (line,) = metrics_differences(records, other)
    assert line.startswith("metrics.jsonl record 1: train/value_loss: 0.5 / 0.500")


@pytest.mark.libero
@pytest.mark.slow
def test_two_updates_and_one_more_are_three_on_the_real_simulator(tmp_path):
    """Nothing of MuJoCo, of its renderer or of robosuite's controllers outlives the reset of an episode."""
    for what, well, detail in check_libero():
        if not well:
            pytest.skip(f"{what}: {detail}")
    options = ("--algorithm.max_episode_steps=20", *(o for o in SMALL if o.startswith("--policy")))
    runs = []
    for name in ("in_one_go", "resumed"):
        (tmp_path / name).mkdir()
        runs.append(Run(tmp_path / name, CONFIGS / "pirl_libero10_smoke.json", options))
    with running(runs[0]) as whole, running(runs[1]) as run:
        together = whole.start_both("--steps=3")
        end_well(*run.start_both("--steps=2"))
        end_well(*run.resume_both("--steps=3"))
        end_well(*together)
        assert checkpoint_differences(whole.checkpoint(3), run.checkpoint(3)) == []
        assert metrics_differences(whole.metrics(), run.metrics()) == []
