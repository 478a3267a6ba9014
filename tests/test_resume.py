"""A run that was stopped and resumed ends bit for bit where the same run in one go ends; two real processes each."""

import json
import math
import re
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

# enough for every test here unless the machine is very busy; then there is a longer reference
UPDATES = 8
EVALUATION = ("--env_eval_freq=2", "--eval.n_episodes=2", "--allow_zero_baseline=true")
# less noise from update to update
ANNEALING = ("--algorithm.noise_anneal_iterations=4", "--algorithm.noise_anneal_to=0.5")
OPTIONS = (*SMALL, *ANNEALING, *EVALUATION)
TENSORS = {
    "policy": "pretrained_model/model.safetensors",
    "value head": "algorithm/model.safetensors",
    "optimiser": "training_state/optimizer_state.safetensors",
    "random states": "training_state/rng_state.safetensors",
}


class InOneGo:
    """A run that is never stopped, with a checkpoint of every update."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs: list[Run] = []
        self._start(UPDATES)

    def _start(self, updates: int) -> None:
        folder = self.folder / str(updates)
        folder.mkdir()
        self.updates, self.run = updates, Run(folder, options=OPTIONS)
        self.runs.append(self.run)
        self.terminals = self.run.start_both(f"--steps={updates}", "--save_freq=1")

    def reaching(self, step: int) -> Run:
        """Return the run once it has ended, or a longer one if that did not reach the step."""
        if step > self.updates:
            self._start(step)
        end_well(*self.terminals)
        return self.run


def differences(left: Run, right: Run, step: int) -> list[str]:
    """Return in what two runs' checkpoints of a step differ, and their metrics up to it."""
    found = checkpoint_differences(left.checkpoint(step), right.checkpoint(step))
    logs = [[record for record in run.metrics() if record["iteration"] <= step] for run in (left, right)]
    return found + metrics_differences(*logs)


@pytest.fixture(scope="module")
def in_one_go(tmp_path_factory):
    reference = InOneGo(tmp_path_factory.mktemp("in_one_go"))
    yield reference
    for run in reference.runs:
        run.kill_all()


@pytest.fixture
def run(tmp_path):
    with running(Run(tmp_path, options=OPTIONS)) as run:
        yield run


def test_two_updates_and_two_more_are_four(in_one_go, run):
    end_well(*run.start_both("--steps=2"))
    assert run.last_step() == 2
    end_well(*run.resume_both("--steps=4"))
    whole = in_one_go.reaching(4)
    assert differences(whole, run, 4) == []
    noise = [record["train/noise_scale"] for record in whole.metrics() if "train/noise_scale" in record]
    assert noise[:5] == [1.0, 0.875, 0.75, 0.625, 0.5]
    evaluated = [record["iteration"] for record in whole.metrics() if "eval/success_rate" in record]
    assert evaluated == list(range(0, UPDATES + 1, 2))


def test_ctrl_c_anywhere_loses_nothing(in_one_go, run):
    learner, actor = run.start_both("--steps=100000", "--save_freq=0")
    actor.wait_for("policy version 2 applied")
    learner.interrupt()
    assert (learner.status(), actor.status()) == (130, 1)
    done = run.last_step()
    end_well(*run.resume_both(f"--steps={done + 1}"))
    assert differences(in_one_go.reaching(done + 1), run, done + 1) == []


def test_a_killed_learner_goes_on_within_its_schedule_and_with_the_same_actor(run, tmp_path):
    """A schedule belongs to a number of updates, so none is reached here: both runs are interrupted in the end."""
    schedule = ("--scheduler.type=cosine_annealing_with_warmup", "--scheduler.num_warmup_steps=50")
    options = ("--steps=100000", "--save_freq=1", *schedule)
    (tmp_path / "whole").mkdir()
    with running(Run(tmp_path / "whole", options=OPTIONS)) as whole:
        first, its_actor = whole.start_both(*options)
        killed, actor = run.start_both(*options)
        actor.wait_for("policy version 2 applied")
        killed.kill()
        end = run.last_step() + 2
        learner = run.resume("learner")
        for which, until in ((learner, actor), (first, its_actor)):
            until.wait_for(f"policy version {end + 1} applied")
            which.interrupt()
            assert (which.status(), until.status()) == (130, 1)
        assert differences(whole, run, end) == []
        rates = [record["train/learning_rate"] for record in run.metrics() if "train/learning_rate" in record]
        assert all(before < after for before, after in zip(rates[:end], rates[1:end], strict=False))


def test_another_seed_ends_elsewhere(in_one_go, run):
    end_well(*run.start_both("--steps=2", "--seed=1001"))
    found = differences(in_one_go.reaching(2), run, 2)
    for name in TENSORS.values():
        assert any(line.startswith(f"{name}: ") for line in found), name
    assert any(re.match(r"metrics.jsonl record \d+: train/value_loss: ", line) for line in found)


def test_the_reference_learns_between_the_checkpoints_that_are_compared(in_one_go):
    whole = in_one_go.reaching(4)
    for what in ("policy", "value head", "optimiser"):
        first, second = (load_file(whole.checkpoint(step) / TENSORS[what]) for step in (2, 4))
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
    "training_state/training_step.json": (_change_json, "best_success_rate"),
    "pretrained_model/train_config.json": (_change_json, "algorithm", "gamma"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_comparison_names_the_one_thing_that_differs(in_one_go, tmp_path, name):
    original, copy = in_one_go.reaching(2).checkpoint(2), tmp_path / "copy"
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
    original, copy = in_one_go.reaching(2).checkpoint(2), tmp_path / "copy"
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
    small_policy = (option for option in SMALL if option.startswith("--policy"))
    options = ("--algorithm.max_episode_steps=20", *small_policy, *EVALUATION)
    runs = []
    for name in ("in_one_go", "resumed"):
        (tmp_path / name).mkdir()
        runs.append(Run(tmp_path / name, CONFIGS / "pirl_libero10_smoke.json", options))
    with running(runs[0]) as whole, running(runs[1]) as run:
        together = whole.start_both("--steps=3")
        end_well(*run.start_both("--steps=2"))
        end_well(*run.resume_both("--steps=3"))
        end_well(*together)
        assert differences(whole, run, 3) == []
