"""Checkpoints: LeRobot's layout, exact continuation, refusals that restore nothing."""

import dataclasses
import json
import logging
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.optim.schedulers import (
    ConstantWithWarmupSchedulerConfig,
    CosineAnnealingWithWarmupSchedulerConfig,
    LRSchedulerConfig,
)
from lerobot.policies.xvla.modeling_xvla import XVLAPolicy
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file, save_model

from lerobot_pirl import checkpoint, folders, registry, restore
from lerobot_pirl.algorithm import PiRLAlgorithm
from lerobot_pirl.build import log_overrides, make_adapter
from lerobot_pirl.checkpoint import Progress
from lerobot_pirl.config import PiRLTrainConfig
from lerobot_pirl.follower import Follower
from lerobot_pirl.metadata import MetadataMismatch, config_hash, make_metadata
from lerobot_pirl.parallel import ALONE
from lerobot_pirl.policies.xvla import XVLAAdapter
from lerobot_pirl.restore import CheckpointError
from tests.test_algorithm import make_rollout, snapshot
from tests.toy import flow_noise_config, read_json, tiny_config

pytestmark = pytest.mark.filterwarnings("ignore")

OPTIONS = {
    **{"num_denoising_steps": 3, "minibatch_size": 4, "micro_batch_size": 2, "value_hidden_dims": (16,)},
    **{"critic_warmup_iterations": 0, "target_kl": None, "learning_rate": 1e-5, "weight_decay": 0.1},
}
PROGRESS = {
    "env_steps": 36,
    "episodes": 3,
    "evaluated_version": 1,
    "best_version": 0,
    "best_success_rate": 0.25,
}
FILES = {
    *(f"algorithm/{name}" for name in ("config.json", "model.safetensors")),
    *(
        f"pretrained_model/{name}"
        for name in ("config.json", "model.safetensors", "train_config.json")
        + ("policy_preprocessor.json", "policy_postprocessor.json")
    ),
    *(
        f"training_state/{name}"
        for name in ("optimizer_param_groups.json", "optimizer_state.safetensors", "rng_state.safetensors")
        + ("scheduler_state.json", "training_step.json", "pirl_metadata.json", "pirl_digests.json")
    ),
}


class Run:
    """The parts of a learner that a checkpoint is about."""

    def __init__(self, cfg: PiRLTrainConfig, adapter: XVLAAdapter) -> None:
        self.cfg, self.adapter = cfg, adapter
        self.algorithm = PiRLAlgorithm(adapter, cfg.algorithm, cfg.seed, cfg.scheduler, cfg.steps)
        self.metadata = make_metadata(cfg, adapter, "run.json", "a-run-id")

    def update(self, seed: int) -> dict[str, float]:
        return self.algorithm.update(iter([make_rollout(self.adapter, seed=seed)])).to_log_dict()

    def save(self, step: int | None = None, **progress: float) -> Path:
        """Save what there is, under the name of ``step`` updates."""
        algorithm = self.algorithm
        done = algorithm.optimization_step
        algorithm.optimization_step = algorithm.scheduler.last_epoch = done if step is None else step
        try:
            return checkpoint.save(
                self.cfg, self.adapter, algorithm, self.metadata, Progress(**PROGRESS | progress)
            )
        finally:
            algorithm.optimization_step = algorithm.scheduler.last_epoch = done

    def load(self, folder: Path, *accepted: str) -> Progress:
        progress, self.metadata = checkpoint.load(folder, self.algorithm, self.metadata, accepted)
        return progress

    def state(self) -> dict[str, torch.Tensor]:
        """Return everything that an update or a load may change."""
        state = {f"policy.{name}": value for name, value in snapshot(self.algorithm.policy).items()}
        state |= {f"algorithm.{name}": value.clone() for name, value in self.algorithm.state_dict().items()}
        for index, moments in self.algorithm.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{name}": value.clone() for name, value in moments.items()}
        groups = self.algorithm.optimizer.param_groups
        state |= {f"optimizer.lr{i}": torch.tensor(group["lr"]) for i, group in enumerate(groups)}
        scheduler = self.algorithm.scheduler
        state["scheduler"] = torch.tensor(scheduler.last_epoch if scheduler else -1)
        state["step"] = torch.tensor(self.algorithm.optimization_step)
        state["skipped"] = torch.tensor(self.algorithm.skipped_steps)
        return state | {f"rng.{name}": value for name, value in rng_state().items()}


def rng_state() -> dict[str, torch.Tensor]:
    return {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor(np.random.get_state()[1].astype(np.int64)),
        "python": torch.tensor(random.getstate()[1]),
    }


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    common = one.keys() & other.keys()
    return (one.keys() ^ other.keys()) | {name for name in common if not torch.equal(one[name], other[name])}


def new_run(output_dir: Path, dtype: str = "float32", **algorithm) -> Run:
    make = flow_noise_config if algorithm.get("variant") == "flow_noise" else tiny_config
    cfg = make(**OPTIONS | algorithm)
    cfg.output_dir, cfg.policy.dtype = output_dir, dtype
    # as a validated config has it
    cfg.eval.batch_size = 0
    cfg.scheduler = CosineAnnealingWithWarmupSchedulerConfig(num_warmup_steps=0)
    torch.manual_seed(0)
    return Run(cfg, XVLAAdapter(XVLAPolicy(cfg.policy), cfg))


def resumed_run(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Run:
    """Build what a learner builds for ``--resume=true``, up to the point where it loads the checkpoint."""
    config = folder / "pretrained_model" / "train_config.json"
    arguments = ["--resume=true", *overrides]
    monkeypatch.setattr(sys, "argv", ["learner", f"--config_path={config}", *arguments])
    cfg = PiRLTrainConfig.from_pretrained(config, cli_args=arguments)
    cfg.validate()
    return Run(cfg, make_adapter(cfg))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with one update behind it; tests leave it as it is."""
    made = new_run(tmp_path_factory.mktemp("run"))
    made.update(seed=0)
    return made


@pytest.fixture(scope="module")
def saved(run: Run) -> Path:
    """Its checkpoint; tests damage copies."""
    return run.save()


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "checkpoints" / saved.name)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run without an update, for loads that must be refused."""
    return new_run(tmp_path_factory.mktemp("fresh"))


# what a checkpoint holds


def test_the_layout_is_lerobots(saved):
    assert saved.name == "000001"
    assert saved.parent.name == "checkpoints"
    assert {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()} == FILES


def test_the_policys_config_carries_the_grid_and_the_executed_chunk_of_the_run(run, saved):
    config = read_json(saved / "pretrained_model" / "config.json")
    assert config["type"] == "xvla"
    assert config["num_denoising_steps"] == 3
    assert config["n_action_steps"] == 4


def test_counters_and_metadata_are_readable(run, saved):
    state = saved / "training_state"
    counters = {"step": 1, "policy_version": 1, "skipped_steps": 0}
    assert read_json(state / "training_step.json") == PROGRESS | counters
    metadata = read_json(state / "pirl_metadata.json")
    assert metadata["config_hash"] == config_hash(run.cfg)
    assert metadata["run_id"] == "a-run-id"
    assert metadata["config_path"] == "run.json"


def test_the_saved_run_config_parses_again_and_is_the_same_run(run, saved):
    path = saved / "pretrained_model" / "train_config.json"
    assert read_json(path)["recipe"] == "pi-rl"
    cfg = PiRLTrainConfig.from_pretrained(path, cli_args=[])
    assert config_hash(cfg) == config_hash(run.cfg)
    assert cfg.algorithm == run.cfg.algorithm


def test_a_checkpoint_of_a_resumed_run_can_be_resumed(saved, tmp_path, monkeypatch):
    second = resumed_run(saved, monkeypatch)
    second.load(saved)
    second.cfg.output_dir = tmp_path
    again = second.save(step=2)
    third = resumed_run(again, monkeypatch)
    third.load(again)
    assert third.algorithm.optimization_step == 2
    assert third.cfg.checkpoint_path == again


def test_no_file_tells_where_this_package_is_installed(saved):
    package = str(Path(checkpoint.__file__).parent)
    texts = {path.name: path.read_text() for path in saved.rglob("*.json")}
    assert not [name for name, text in texts.items() if package in text]
    assert '"tokenizer_name": "lerobot_pirl/tokenizer"' in texts["policy_preprocessor.json"]


def test_last_is_a_relative_link_to_the_newest_and_survives_a_move(run, tmp_path):
    run.cfg.output_dir, former = tmp_path / "out", run.cfg.output_dir
    try:
        run.save(step=1)
        run.save(step=2)
    finally:
        run.cfg.output_dir = former
    checkpoints = (tmp_path / "out").rename(tmp_path / "moved") / "checkpoints"
    assert os.readlink(checkpoints / "last") == "000002"
    assert read_json(checkpoints / "last" / "training_state" / "training_step.json")["step"] == 2
    assert sorted(path.name for path in checkpoints.iterdir()) == ["000001", "000002", "last"]


STOCK = """
import sys
class Blocker:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "lerobot_pirl":
            raise ModuleNotFoundError(f"{name} is not installed", name=name)
sys.meta_path.insert(0, Blocker)
import torch
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.configs.policies import PreTrainedConfig
torch.set_num_threads(1)
folder, batch_file, actions_file = sys.argv[1:]
config = PreTrainedConfig.from_pretrained(folder)
policy = get_policy_class(config.type).from_pretrained(folder, config=config, strict=True)
batch = torch.load(batch_file, weights_only=True)
make_pre_post_processors(config, pretrained_path=folder)
torch.manual_seed(5)
actions = policy.predict_action_chunk(batch)
torch.save({"actions": actions, "seen": sorted(n for n in sys.modules if "pirl" in n)}, actions_file)
"""


def observation_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = {
        f"observation.images.{name}": torch.rand(2, 3, 64, 64, generator=generator)
        for name in ("image", "image2")
    }
    return images | {
        "observation.state": torch.rand(2, 20, generator=generator),
        "observation.language.tokens": torch.randint(4, 500, (2, 24), generator=generator),
        "domain_id": torch.tensor([3, 3]),
    }


@pytest.mark.slow
def test_a_lerobot_without_this_package_loads_the_policy_and_acts_alike(run, saved, tmp_path):
    batch = observation_batch()
    torch.save(batch, tmp_path / "batch.pt")
    clone = Path(__file__).parent.parent
    done = subprocess.run(
        [
            *(sys.executable, "-c", STOCK, str(saved / "pretrained_model")),
            *(str(tmp_path / "batch.pt"), str(tmp_path / "actions.pt")),
        ],
        # the tiny policy's tokenizer is a folder of a clone
        cwd=clone,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = torch.load(tmp_path / "actions.pt", weights_only=True)
    assert [name for name in result["seen"] if name.startswith("lerobot_pirl")] == []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            expected = run.adapter.policy.predict_action_chunk(batch)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(result["actions"], expected)


# continuing


@pytest.mark.parametrize(
    ("dtype", "algorithm"),
    [
        ("float32", {}),
        ("bfloat16", {}),
        ("float32", {"kl_coef": 1e-3}),
        ("float32", {"variant": "flow_noise", "kl_coef": 1e-3, "gripper": "bernoulli_last"}),
        ("bfloat16", {"variant": "flow_noise"}),
    ],
)
def test_a_resumed_run_continues_bit_for_bit(dtype, algorithm, tmp_path, monkeypatch):
    whole = new_run(tmp_path / "run", dtype, **algorithm)
    whole.update(seed=0)
    folder = whole.save()
    at_save = whole.state()
    resumed = resumed_run(folder, monkeypatch)
    assert resumed.load(folder) == Progress(**PROGRESS)
    assert resumed.metadata.run_id == "a-run-id"
    assert differing(at_save, resumed.state()) == set()
    results = []
    for one in (whole, resumed):
        torch.set_rng_state(at_save["rng.torch"])
        metrics = one.update(seed=1)
        results.append((metrics, one.state()))
    assert results[0][0] == results[1][0]
    assert differing(results[0][1], results[1][1]) == set()
    moved = differing(at_save, results[0][1])
    assert any(name.startswith("policy.") for name in moved)
    assert any(name.startswith("optimizer.") for name in moved)


def test_the_starting_policy_of_a_resumed_run_is_the_runs(tmp_path, monkeypatch):
    whole = new_run(tmp_path / "run", variant="flow_noise", kl_coef=1e-3)
    before = {name: value.clone() for name, value in whole.algorithm.get_weights().items()}
    whole.update(seed=0)
    resumed = resumed_run(whole.save(), monkeypatch)
    resumed.load(resumed.cfg.checkpoint_path)
    assert differing(resumed.algorithm.start, before) == set()
    assert differing(resumed.algorithm.get_weights(), before)


def test_heads_and_starting_policy_are_saved_apart_from_the_policy(tmp_path):
    one = new_run(tmp_path / "run", variant="flow_noise", kl_coef=1e-3)
    folder = one.save(step=1)
    stock = set(load_file(folder / "pretrained_model/model.safetensors"))
    assert not {name for name in stock if "noise_head" in name or "start." in name}
    saved = load_file(folder / "algorithm/model.safetensors")
    assert differing(saved, one.algorithm.state_dict()) == set()
    assert {f"start.{name}" for name in one.algorithm.get_weights()} < set(saved)


def test_a_run_of_the_other_variant_is_refused_with_both_sides(saved, tmp_path):
    other = new_run(tmp_path, variant="flow_noise")
    before = other.state()
    with pytest.raises(MetadataMismatch) as caught:
        other.load(saved)
    assert re.search(r"variant +flow_sde +flow_noise\n", str(caught.value))
    assert re.search(r"algorithm.variant +\"flow_sde\" +\"flow_noise\"\n", str(caught.value))
    assert differing(other.state(), before) == set()


def test_a_penalty_cannot_be_turned_on_without_the_starting_policy(saved, monkeypatch):
    one = resumed_run(saved, monkeypatch, "--algorithm.kl_coef=0.01")
    before = one.state()
    with pytest.raises(
        CheckpointError, match=r"algorithm\.kl_coef=0\.01 needs the starting policy, which .* does not"
    ):
        one.load(saved, "algorithm.kl_coef")
    assert differing(one.state(), before) == set()


def test_a_penalty_can_be_changed_and_turned_off(tmp_path, monkeypatch):
    whole = new_run(tmp_path / "run", kl_coef=1e-3)
    whole.update(seed=0)
    folder = whole.save()
    stronger = resumed_run(folder, monkeypatch, "--algorithm.kl_coef=0.1")
    stronger.load(folder, "algorithm.kl_coef")
    assert differing(stronger.algorithm.start, whole.algorithm.start) == set()
    without = resumed_run(folder, monkeypatch, "--algorithm.kl_coef=0")
    without.load(folder, "algorithm.kl_coef")
    assert without.algorithm.start == {}


def test_overrides_on_the_command_line_win_and_are_logged(saved, monkeypatch, caplog):
    one = resumed_run(saved, monkeypatch, "--log_freq=7", "--steps=101")
    with caplog.at_level(logging.INFO):
        log_overrides(one.cfg)
    assert (one.cfg.log_freq, one.cfg.steps) == (7, 101)
    told = {record.message for record in caplog.records}
    assert told == {
        "override: log_freq is 7 instead of the checkpoint's 1",
        "override: steps is 101 instead of the checkpoint's 100",
    }


def test_without_overrides_nothing_is_logged_and_a_moved_run_goes_on_where_it_lies(
    copy, monkeypatch, caplog, tmp_path
):
    one = resumed_run(copy, monkeypatch)
    with caplog.at_level(logging.INFO):
        log_overrides(one.cfg)
    assert [record.message for record in caplog.records] == [
        f"override: output_dir is {tmp_path} instead of the checkpoint's {stored_config(copy)['output_dir']}"
    ]
    one.load(copy)
    assert one.save(step=2) == tmp_path / "checkpoints" / "000002"


def stored_config(folder: Path) -> dict:
    return read_json(folder / "pretrained_model" / "train_config.json")


def test_random_states_go_on_where_they_were(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run.cfg, "output_dir", tmp_path)
    folder = run.save()
    expected = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    torch.manual_seed(9)
    np.random.seed(9)
    random.seed(9)
    run.load(folder)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == expected


def test_the_count_of_skipped_steps_goes_on(tmp_path):
    one = new_run(tmp_path)
    one.algorithm.skipped_steps = 7
    folder = one.save()
    one.algorithm.skipped_steps = 0
    one.load(folder)
    assert one.algorithm.skipped_steps == 7


def test_weights_that_share_memory_are_found_under_the_name_that_was_kept(tmp_path):
    tied = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(2, 2, bias=False), "b": torch.nn.Linear(2, 2, bias=False)}
    )
    tied["b"].weight = tied["a"].weight
    save_model(tied, str(tmp_path / "model.safetensors"))
    like = {"a.weight": torch.zeros(2, 2), "b.weight": torch.zeros(2, 2)}
    tensors = restore.read_tensors(tmp_path / "model.safetensors", like)
    assert torch.equal(tensors["a.weight"], tied["a"].weight)
    assert torch.equal(tensors["b.weight"], tied["a"].weight)


# writing


def fail(*args, **kwargs):
    raise OSError(28, "No space left on device")


def fail_in_rust(*args, **kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


FAILURES = {
    "policy": lambda one, patch: patch.setattr(one.adapter.policy, "save_pretrained", fail),
    "optimiser": lambda one, patch: patch.setattr(one.algorithm.optimizer, "state_dict", fail),
    "value head": lambda one, patch: patch.setattr(one.algorithm, "_save_pretrained", fail),
    "metadata": lambda one, patch: patch.setattr(checkpoint, "_write_json", fail),
    "disk": lambda one, patch: patch.setattr(os, "fsync", fail),
    "tensors": lambda one, patch: patch.setattr("safetensors.torch.serialize_file", fail_in_rust),
    "digests": lambda one, patch: patch.setattr(folders, "write_digests", fail),
    "rename": lambda one, patch: patch.setattr(folders, "_put", fail),
    "interrupt": lambda one, patch: patch.setattr(one.algorithm, "_save_pretrained", interrupt),
}


@pytest.mark.parametrize("where", FAILURES)
def test_a_failing_write_leaves_the_former_checkpoint_and_no_half_one(where, run, tmp_path, monkeypatch):
    monkeypatch.setattr(run.cfg, "output_dir", tmp_path)
    run.save(step=1)
    with monkeypatch.context() as patch:
        FAILURES[where](run, patch)
        with pytest.raises((CheckpointError, KeyboardInterrupt)) as caught:
            run.save(step=2)
    if caught.type is CheckpointError:
        assert f"{tmp_path}/checkpoints/000002 cannot be written" in str(caught.value)
        assert "No space left on device" in str(caught.value)
    checkpoints = tmp_path / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["000001", "last"]
    assert os.readlink(checkpoints / "last") == "000001"
    new_run(tmp_path).load(checkpoints / "last")


def test_what_a_killed_process_left_is_removed_by_the_next_save(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run.cfg, "output_dir", tmp_path)
    for name in (".000001.partial", ".000007.partial"):
        (tmp_path / "checkpoints" / name / "training_state").mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "junk").write_text("junk")
    folder = run.save(step=1)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["000001", "last"]
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == FILES


def test_a_checkpoint_of_the_same_step_is_replaced_whole(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run.cfg, "output_dir", tmp_path)
    (run.save(step=2, episodes=1) / "of-the-former").touch()
    folder = run.save(step=2, episodes=2)
    assert read_json(folder / "training_state" / "training_step.json")["episodes"] == 2
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == FILES
    assert sorted(path.name for path in folder.parent.iterdir()) == ["000002", "last"]


def test_last_goes_back_with_a_run_that_was_resumed_from_an_older_checkpoint(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run.cfg, "output_dir", tmp_path)
    run.save(step=4)
    run.save(step=2)
    assert os.readlink(tmp_path / "checkpoints" / "last") == "000002"


# refusing


def refused(one: Run, folder: Path) -> str:
    """Return why a checkpoint is refused, after a look at that nothing was restored."""
    torch.manual_seed(77)
    np.random.seed(77)
    random.seed(77)
    before = one.state()
    with pytest.raises(CheckpointError) as caught:
        one.load(folder)
    assert differing(before, one.state()) == set()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_intact_copy_is_not_refused(copy, tmp_path):
    one = new_run(tmp_path)
    torch.manual_seed(77)
    random.seed(77)
    before = one.state()
    one.load(copy)
    assert one.algorithm.optimization_step == 1
    kinds = {name.partition(".")[0] for name in differing(before, one.state())}
    assert kinds == {"policy", "algorithm", "optimizer", "scheduler", "step", "rng"}


READ = sorted(FILES - {"training_state/pirl_digests.json", "training_state/pirl_metadata.json"})
ALL_READ = [*READ, "training_state/pirl_digests.json", "training_state/pirl_metadata.json"]


@pytest.mark.parametrize("name", ALL_READ)
def test_a_missing_file_is_named(name, fresh, copy):
    (copy / name).unlink()
    assert f"{copy}/{name}" in refused(fresh, copy)


@pytest.mark.parametrize("name", ALL_READ)
@pytest.mark.parametrize("damage", ["empty", "cut", "noise"])
def test_a_damaged_file_is_named(name, damage, fresh, copy):
    data = (copy / name).read_bytes()
    damaged = {"empty": b"", "cut": data[: len(data) * 2 // 3], "noise": b"\xff\x00" * 50}[damage]
    (copy / name).write_bytes(damaged)
    text = refused(fresh, copy)
    assert f"{copy}/{name}" in text
    assert "resume from another checkpoint" in text


@pytest.mark.parametrize("name", READ)
def test_a_single_flipped_bit_is_noticed(name, fresh, copy):
    data = bytearray((copy / name).read_bytes())
    data[len(data) * 2 // 3] ^= 1
    (copy / name).write_bytes(data)
    text = refused(fresh, copy)
    assert f"{copy}/{name} is not as it was saved" in text


@pytest.mark.parametrize("step", ["pretrained_model", "algorithm", "training_state"])
def test_a_part_is_checked_alone(step, copy):
    (copy / "algorithm" / "model.safetensors").write_bytes(b"")
    if step == "algorithm":
        with pytest.raises(CheckpointError, match="algorithm/model.safetensors is not as it was saved"):
            checkpoint.verify(copy, f"{step}/")
    else:
        checkpoint.verify(copy, f"{step}/")


@pytest.mark.parametrize("version", [1, 3])
def test_another_format_is_refused_with_both_versions(version, fresh, copy):
    path = copy / "training_state" / "pirl_metadata.json"
    path.write_text(json.dumps(read_json(path) | {"format_version": version, "package_version": "9.9"}))
    text = refused(fresh, copy)
    assert f"{path} has format_version {version}, written by lerobot-pirl 9.9" in text
    assert "reads format_version 2" in text


# what digests cannot tell: a file that was written wrong


@pytest.fixture
def unsealed(copy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy whose digests are made anew before it is loaded."""
    load = checkpoint.load

    def seal_and_load(folder: Path, *args, **kwargs):
        (folder / folders.DIGESTS_FILE).unlink()
        folders.write_digests(folder)
        return load(folder, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "load", seal_and_load)
    return copy


@pytest.mark.parametrize("name", ["pirl_metadata.json", "training_step.json", "scheduler_state.json"])
@pytest.mark.parametrize("value", [[], 3, None, "text"])
def test_json_of_another_shape_is_named(name, value, fresh, unsealed):
    (unsealed / "training_state" / name).write_text(json.dumps(value))
    text = refused(fresh, unsealed)
    assert name in text
    assert "instead of an object" in text


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("pirl_metadata.json", "run_id"),
        ("pirl_metadata.json", "format_version"),
        ("scheduler_state.json", "last_epoch"),
        *(("training_step.json", key) for key in ("step", "skipped_steps", *PROGRESS)),
    ],
)
def test_a_value_that_is_missing_or_of_another_type_is_named(name, key, fresh, unsealed):
    path = unsealed / "training_state" / name
    content = read_json(path)
    for damaged in ({k: v for k, v in content.items() if k != key}, content | {key: [1]}):
        path.write_text(json.dumps(damaged))
        text = refused(fresh, unsealed)
        assert name in text
        assert f"'{key}'" in text


def test_a_schedule_of_another_step_is_refused(fresh, unsealed):
    path = unsealed / "training_state" / "scheduler_state.json"
    path.write_text(json.dumps(read_json(path) | {"last_epoch": 7}))
    text = refused(fresh, unsealed)
    assert f"{path} is of step 7 in a checkpoint of step 1" in text


def rewrite(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def widen_first_matrix(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name, value in sorted(tensors.items()) if value.ndim == 2 and "vlm" not in name)
    tensors[name] = torch.cat([tensors[name], tensors[name]])


SHAPED = [
    "pretrained_model/model.safetensors",
    "algorithm/model.safetensors",
    "training_state/optimizer_state.safetensors",
]


@pytest.mark.parametrize("name", SHAPED)
def test_tensors_of_another_shape_are_named_with_both_shapes(name, fresh, unsealed):
    rewrite(unsealed / name, widen_first_matrix)
    text = refused(fresh, unsealed)
    assert name in text
    assert "has shape (" in text
    assert "this run's has (" in text


@pytest.mark.parametrize("name", ["pretrained_model/model.safetensors", "algorithm/model.safetensors"])
def test_tensors_that_are_not_there_are_named(name, fresh, unsealed):
    trained = next(
        iter(fresh.algorithm.get_weights() if "pretrained" in name else fresh.algorithm.state_dict())
    )
    rewrite(unsealed / name, lambda tensors: tensors.pop(trained))
    text = refused(fresh, unsealed)
    assert name in text
    assert f"holds no tensor '{trained}'" in text


def test_an_optimiser_of_other_groups_is_refused(fresh, unsealed):
    path = unsealed / "training_state" / "optimizer_param_groups.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:2]))
    assert "optimizer_param_groups.json" in refused(fresh, unsealed)


def test_random_states_that_python_refuses_are_not_restored_in_part(fresh, unsealed):
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["np_rng_state_index"][0] = 10_000
        tensors["torch_rng_state"] = tensors["torch_rng_state"][:10].clone()

    rewrite(unsealed / "training_state" / "rng_state.safetensors", damage)
    assert "rng_state.safetensors" in refused(fresh, unsealed)


# what belongs together


def altered(folder: Path, **changes) -> Path:
    path = folder / "training_state" / "pirl_metadata.json"
    path.write_text(json.dumps(read_json(path) | changes))
    return folder


def mismatch(one: Run, folder: Path, *accepted: str) -> str:
    before = one.state()
    with pytest.raises(MetadataMismatch) as caught:
        one.load(folder, *accepted)
    assert differing(before, one.state()) == set()
    return str(caught.value)


def test_a_checkpoint_of_another_config_is_refused_and_restores_nothing(fresh, unsealed):
    text = mismatch(fresh, altered(unsealed, config_hash="0" * 64, n_action_steps=9))
    assert text.startswith("metadata of checkpoint and this run differ in config_hash, n_action_steps:\n")
    assert "--accept_changes=n_action_steps" in text


@pytest.mark.parametrize("name", ["recipe", "policy_type"])
def test_another_recipe_or_policy_cannot_be_accepted(name, fresh, unsealed):
    text = mismatch(fresh, altered(unsealed, **{name: "other"}))
    assert f"differ in {name}" in text
    assert "accept_changes" not in text
    with pytest.raises(ValueError, match=f"accept_changes='{name}' is not allowed"):
        fresh.load(unsealed, name)


def test_a_follower_takes_the_changes_that_were_accepted(saved, monkeypatch):
    options = ("--algorithm.gamma=0.5", "--accept_changes=algorithm.gamma")
    follower = Follower(resumed_run(saved, monkeypatch, *options).cfg, ALONE)
    assert follower.algorithm.config.gamma == 0.5
    assert (
        follower.algorithm.optimization_step
        == read_json(saved / "training_state" / "training_step.json")["step"]
        > 0
    )


def test_changes_that_are_named_are_accepted_take_effect_and_stay_in_the_history(saved, tmp_path):
    changed = new_run(tmp_path)
    changed.cfg.algorithm.learning_rate, changed.cfg.algorithm.gamma = 2e-5, 0.5
    changed = Run(changed.cfg, changed.adapter)
    text = mismatch(changed, saved)
    assert "algorithm.learning_rate" in text
    assert "--accept_changes=algorithm.gamma,algorithm.learning_rate" in text
    text = mismatch(changed, saved, "algorithm.gamma")
    assert "algorithm.gamma  " not in text
    assert "--accept_changes=algorithm.gamma,algorithm.learning_rate" in text
    changed.load(saved, "algorithm.gamma", "algorithm.learning_rate")
    entry = {
        "version": 1,
        "changes": {"algorithm.gamma": [0.99, 0.5], "algorithm.learning_rate": [1e-5, 2e-5]},
    }
    assert changed.metadata.history == [entry]
    # one of a hundred updates is done
    assert changed.algorithm.optimizer.param_groups[0]["lr"] == pytest.approx(
        1e-5 * (1 + math.cos(math.pi / 100))
    )
    again = new_run(tmp_path / "again")
    again.cfg.algorithm = changed.cfg.algorithm
    again = Run(again.cfg, again.adapter)
    again.load(changed.save())
    assert again.metadata.history == [entry]


@pytest.mark.parametrize("name", ["nonsense", "config_hash", "run_id", "config", "algorithm"])
def test_a_name_that_no_table_shows_cannot_be_accepted(name, fresh, saved):
    with pytest.raises(ValueError, match=f"accept_changes='{name}' is not allowed"):
        fresh.load(saved, name)


def scheduled(folder: Path, schedule: LRSchedulerConfig | None) -> Run:
    one = new_run(folder)
    one.cfg.scheduler = schedule
    return Run(one.cfg, one.adapter)


@pytest.mark.parametrize("change", ["added", "removed", "another"])
def test_the_flag_that_a_refusal_names_changes_a_schedule(change, tmp_path):
    cosine = CosineAnnealingWithWarmupSchedulerConfig(num_warmup_steps=0)
    constant = ConstantWithWarmupSchedulerConfig(num_warmup_steps=4)
    before, after = {"added": (None, constant), "removed": (cosine, None), "another": (cosine, constant)}[
        change
    ]
    first = scheduled(tmp_path / "first", before)
    first.update(seed=0)
    folder = checkpoint.save(first.cfg, first.adapter, first.algorithm, first.metadata, Progress())
    second = scheduled(tmp_path / "second", after)
    text = mismatch(second, folder)
    names = re.search(r"--accept_changes=(\S+);", text)[1]
    second.load(folder, *names.split(","))
    share = 0.25 if after else 1.0
    assert second.algorithm.optimizer.param_groups[0]["lr"] == pytest.approx(1e-5 * share)
    assert set(second.metadata.history[0]["changes"]) <= set(names.split(","))
    second.update(seed=1)


def test_a_checkpoint_of_a_resumed_run_does_not_resume_by_itself(saved, tmp_path, monkeypatch):
    second = resumed_run(saved, monkeypatch)
    second.load(saved)
    second.cfg.output_dir = tmp_path
    config = stored_config(second.save(step=2))
    assert (config["resume"], config["checkpoint_path"], config["accept_changes"]) == (False, None, "")
    assert second.cfg.resume


def going_on_from(run: Run, folder: Path) -> None:
    cfg = dataclasses.replace(run.cfg)
    cfg.checkpoint_path = folder.resolve()
    checkpoint.lead_last_to(cfg, 2, checkpoint.Progress())


def test_a_best_policy_that_was_pruned_for_one_that_is_done_again_is_forgotten(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run.cfg, "output_dir", tmp_path)
    older, _ = run.save(step=2), run.save(step=4)
    best = tmp_path / "checkpoints" / "best"
    best.unlink(missing_ok=True)
    best.symlink_to("000004")
    cfg = dataclasses.replace(run.cfg)
    cfg.checkpoint_path = older.resolve()
    kept = checkpoint.Progress(best_version=2, best_success_rate=0.5)
    checkpoint.lead_last_to(cfg, 2, kept)
    assert (kept.best_version, best.is_symlink()) == (2, True)
    pruned = checkpoint.Progress(best_version=1, best_success_rate=0.6)
    checkpoint.lead_last_to(cfg, 2, pruned)
    assert (pruned.best_version, pruned.best_success_rate, best.is_symlink()) == (-1, 0.0, False)


def test_last_leads_to_the_checkpoint_that_a_run_goes_on_from(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run.cfg, "output_dir", tmp_path)
    older, _ = run.save(step=2), run.save(step=4)
    last = tmp_path / "checkpoints" / "last"
    assert os.readlink(last) == "000004"
    going_on_from(run, older)
    assert os.readlink(last) == "000002"
    elsewhere = shutil.copytree(older, tmp_path / "elsewhere" / "000002")
    run.save(step=4)
    going_on_from(run, elsewhere)
    assert os.readlink(last) == "000004"


@pytest.mark.parametrize("keeps_step", [True, False])
def test_a_copy_that_followed_the_links_gets_them_back(run, tmp_path, monkeypatch, keeps_step):
    monkeypatch.setattr(run.cfg, "output_dir", tmp_path / "run")
    run.save(step=2)
    shutil.copytree(tmp_path / "run", tmp_path / "copied", symlinks=False)
    checkpoints = tmp_path / "copied" / "checkpoints"
    assert not (checkpoints / "last").is_symlink()
    if not keeps_step:
        shutil.rmtree(checkpoints / "000002")
    monkeypatch.setattr(run.cfg, "output_dir", tmp_path / "copied")
    going_on_from(run, checkpoints / "last")
    assert os.readlink(checkpoints / "last") == "000002"
    folders.verify(checkpoints / "last")
    run.save(step=3)
    assert os.readlink(checkpoints / "last") == "000003"


def test_what_goes_wrong_around_a_written_checkpoint_does_not_unwrite_it(run, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(run.cfg, "output_dir", tmp_path)
    monkeypatch.setattr(run.cfg, "keep_last_n", 1)
    monkeypatch.setattr(folders, "prune", fail)
    folder = run.save(step=2)
    assert os.readlink(tmp_path / "checkpoints" / "last") == "000002"
    assert f"{folder} is written, but not everything around it" in caplog.text


def test_a_change_that_is_none_is_refused(fresh, saved):
    with pytest.raises(ValueError, match="is the same on both sides"):
        fresh.load(saved, "algorithm.gamma")


def test_every_validator_of_the_recipe_judges(fresh, saved, monkeypatch):
    seen = []

    def refuse(mine: dict, theirs: dict, my_label: str, their_label: str) -> None:
        seen.append((mine["run_id"], theirs["run_id"]))
        raise MetadataMismatch(f"{my_label} and {their_label}")

    validators = {
        "pi-rl": registry.CheckpointValidator(lambda *args: seen.append("own")),
        "pi-rl.lab": registry.CheckpointValidator(refuse),
    }
    monkeypatch.setattr(registry, "checkpoint_validators", lambda recipe: validators)
    assert mismatch(fresh, saved) == "this run and checkpoint"
    assert seen == ["own", ("a-run-id", "a-run-id")]
