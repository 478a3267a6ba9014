"""Several processes that train one policy: what they compute together and tell each other."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lerobot_pirl import parallel
from lerobot_pirl.follower import Follower
from lerobot_pirl.parallel import ALONE, World, join_world, launched
from tests.parallel_updates import CASES, update
from tests.smoke import free_port
from tests.test_algorithm import make_rollout
from tests.toy import tiny_config

pytestmark = pytest.mark.filterwarnings("ignore")
NUM_PROCESSES = 2


# rows and their owners


@pytest.mark.parametrize(("num_rows", "size"), [(9, 2), (5, 3), (4, 4), (1, 1)])
def test_every_row_belongs_to_one_process(num_rows, size):
    rows = torch.randperm(num_rows)
    shares = [World(rank, size).share(rows) for rank in range(size)]
    assert torch.equal(torch.cat([share for share, _ in shares]), rows)
    assert {counts for _, counts in shares} == {1.0}
    assert max(len(share) for share, _ in shares) - min(len(share) for share, _ in shares) <= 1


def test_a_process_without_a_row_repeats_one_that_counts_nothing():
    rows = torch.tensor([7, 3])
    shares = [World(rank, 4).share(rows) for rank in range(4)]
    assert [share.tolist() for share, _ in shares] == [[7], [3], [7], [7]]
    assert [counts for _, counts in shares] == [1, 1, 0, 0]


def test_one_that_is_alone_needs_no_process_group():
    rows, values = torch.arange(3), torch.tensor([1.0, math.nan])
    assert ALONE.share(rows)[0].tolist() == [0, 1, 2]
    assert ALONE.join(values, 2) is values
    assert ALONE.add({"a": 1.5}) == {"a": 1.5}
    for nothing in (ALONE.keep_waiting, ALONE.end, ALONE.align):
        nothing()
    assert not torch.distributed.is_initialized()


# what a launcher says


def test_ranks_are_those_of_the_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == (0, 1)
    # some clusters set the size alone
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launched() == (0, 1)
    monkeypatch.setenv("RANK", "3")
    assert launched() == (3, 4)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched() == (0, 1)
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ValueError, match="RANK='first'"):
        launched()


@pytest.fixture
def two_launched(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")


def test_one_gpu_for_all_processes_is_refused(two_launched):
    with pytest.raises(ValueError, match=r"policy.device='cuda:1' with 2 processes; set it to 'cuda'"):
        join_world("cuda:1")


def test_what_lies_on_the_cpu_goes_over_gloo_and_every_process_takes_its_device(two_launched, monkeypatch):
    asked, groups = [], []
    state = SimpleNamespace(process_index=1, num_processes=2)
    made = SimpleNamespace(PartialState=lambda **options: asked.append(options) or state)
    monkeypatch.setitem(sys.modules, "accelerate", made)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(parallel.dist, "new_group", lambda **options: asked.append(options) or "group")
    for device in ("cuda", "cpu"):
        assert join_world(device) == World(1, 2, "group")
        gloo = {"backend": "gloo", "timeout": parallel.TIMEOUT}
        assert asked[-2:] == [{"cpu": device == "cpu", "timeout": parallel.TIMEOUT}, gloo]
    for name in ("all_reduce", "broadcast"):
        monkeypatch.setattr(parallel.dist, name, lambda tensor, src=0, group=None: groups.append(group))
    world = World(0, 2, "group")
    world.add({"a": 1.0})
    world.join(torch.zeros(1), 2)
    world.keep_waiting()
    assert len(groups) >= 3 and set(groups) == {"group"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_launchers_signal_leaves_the_end_to_the_first_process(number):
    def end(*_) -> None:
        raise RuntimeError("a follower ended by itself")

    before = {each: signal.signal(each, end) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        cfg = tiny_config(critic_warmup_iterations=0, minibatch_size=4, micro_batch_size=4)
        cfg.algorithm.value_hidden_dims = (16,)
        follower = Follower(cfg, ALONE)
        told = iter([make_rollout(follower.algorithm.adapter), None])
        follower.world = SimpleNamespace(hear=lambda: signal.raise_signal(number) or next(told))
        follower.run()
        assert follower.algorithm.optimization_step == 1
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_without_accelerate_the_refusal_says_how_to_get_it(two_launched, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ValueError, match=r"pip install 'lerobot\[accelerate-dep\]'"):
        join_world("cpu")


def test_a_launch_of_several_that_started_one_is_told(monkeypatch, caplog):
    monkeypatch.delenv("RANK", raising=False)
    assert join_world("cpu") is ALONE
    assert not caplog.records
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert join_world("cpu") is ALONE
    assert "--multi_gpu" in caplog.text


# two processes with gloo against one


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """The folder in which two processes have left what they found."""
    folder = tmp_path_factory.mktemp("together")
    environment = os.environ | {
        "WORLD_SIZE": str(NUM_PROCESSES),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    processes = []
    for rank in map(str, range(NUM_PROCESSES)):
        with (folder / f"{rank}.log").open("wb") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.parallel_updates", str(folder)],
                    env=environment | {"RANK": rank, "LOCAL_RANK": rank},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        statuses = [process.wait(900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert statuses == [0] * NUM_PROCESSES, "\n".join(path.read_text() for path in folder.glob("*.log"))
    return folder


def left_by(folder: Path, name: str, rank: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return (
        load_file(folder / f"{name} {rank}.safetensors"),
        json.loads((folder / f"{name} {rank}.json").read_text()),
    )


@pytest.fixture(scope="module", params=CASES)
def case(request, together):
    """What one process finds alone, and what two find together."""
    return request.param, update(request.param), [left_by(together, request.param, rank) for rank in (0, 1)]


def largest_difference(left: dict, right: dict) -> float:
    assert set(left) == set(right)
    return max(float((left[name] - right[name]).abs().max()) for name in left if left[name].numel())


def test_weights_are_those_of_one_process(case):
    _, (alone, _), both = case
    weights = {name: value for name, value in alone.items() if not name.startswith("gradient.")}
    for found, _ in both:
        assert largest_difference(weights, {name: found[name] for name in weights}) < 1e-6


def test_gradients_are_those_of_one_process(case):
    _, (alone, _), both = case
    gradients = [each for each in alone if each.startswith("gradient.")]
    assert gradients
    for found, _ in both:
        size = math.hypot(*(alone[each].norm() for each in gradients))
        difference = math.hypot(*((alone[each] - found[each]).norm() for each in gradients))
        assert difference / size < 1e-6


def test_what_is_logged_is_what_one_process_logs(case):
    _, (_, alone), both = case
    for _, found in both:
        assert found == pytest.approx(alone, rel=1e-4, abs=1e-5, nan_ok=True)


def test_the_processes_stay_alike_bit_by_bit(case):
    _, _, ((first, first_log), (second, second_log)) = case
    assert largest_difference(first, second) == 0
    assert first_log == second_log


def test_the_cases_are_what_they_are_called(together):
    logs = {name: left_by(together, name, 1)[1] for name in CASES}
    assert logs["KL stop"]["kl_stop"] == 1 and logs["KL stop"]["minibatches"] == 2
    assert logs["a number that is not finite"]["skipped_steps"] == 1
    assert logs["filtered groups"]["groups_kept"] == 0.5
    assert logs["a process without a row"]["minibatches"] == 18
    weights, _ = left_by(together, "warm-up of the value head", 1)
    assert not [name for name in weights if name.startswith("gradient.model.")]
    assert logs["learned noise"]["kl_to_start"] > 0


def test_the_others_get_the_rollout_and_the_weights_of_the_first(together):
    (first, header), (second, other) = (left_by(together, "hand over", rank) for rank in (0, 1))
    assert other == header and header["stats"] == {"staleness": 0.5}
    assert set(second) == set(first)
    for name, value in first.items():
        assert value.dtype == second[name].dtype and torch.equal(value, second[name])
    assert {"features.vlm_features", "terminated", "gripper", "value_head.0.weight"} <= set(first)
    # the second one had zeros
    assert first["value_head.0.weight"].any()


def test_one_that_ends_is_missed_at_once(together):
    found = json.loads((together / "lost 0.json").read_text())
    assert "process 0 of the learner's 2 cannot reach another one" in found["message"]
    assert found["seconds"] < parallel.TIMEOUT.total_seconds() / 10
