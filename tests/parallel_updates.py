"""Updates that several processes make together, and what each ends with; run as one of them by ``tests/test_parallel.py``.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=... python -m tests.parallel_updates FOLDER
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lerobot_pirl.algorithm import PiRLAlgorithm
from lerobot_pirl.parallel import ALONE, World, join_world
from lerobot_pirl.rollout import Rollout
from tests.test_algorithm import make_algorithm, make_group_algorithm, make_groups, make_rollout

Made = tuple[PiRLAlgorithm, Rollout]
# unclipped gradients, whose size counts
WHOLE = {"grad_clip_norm": 1e9, "n_epochs": 2}
# the same two micro-batches in one process as in two
ALIKE = {"lengths": (3, 3, 4), "minibatch_size": 10, "micro_batch_size": 5}
NOISE = {"variant": "flow_noise", "kl_coef": 0.1, "entropy_coef": 0.01}


def _with_values(lengths: tuple[int, ...] = (3, 2, 4), **options: Any) -> Made:
    algorithm = make_algorithm(**WHOLE | {"minibatch_size": 5} | options)
    return algorithm, make_rollout(algorithm.adapter, lengths)


def _in_float64(made: Made) -> Made:
    """Let the policy compute in float64: in float32 a batch of another size is rounded otherwise, in one process too."""
    algorithm, rollout = made

    def widen(_: torch.nn.Module, __: tuple, inputs: dict[str, torch.Tensor]) -> tuple[tuple, dict]:
        return (), {n: value.double() if value.is_floating_point() else value for n, value in inputs.items()}

    algorithm.policy.double()
    algorithm.adapter.model.transformer.register_forward_pre_hook(widen, with_kwargs=True)
    return algorithm, rollout


def _with_groups() -> Made:
    # three rows are kept, which make a minibatch of two and one of one
    algorithm = make_group_algorithm(
        **WHOLE, group_filter=(0.1, 0.5), minibatch_size=2, micro_batch_size=1, loss_aggregation="episode"
    )
    return algorithm, make_groups(algorithm.adapter, (1, 3))


def _with_a_nan() -> Made:
    algorithm, rollout = _with_values(minibatch_size=3, n_epochs=1)
    rollout.log_prob[-1] = torch.nan
    return algorithm, rollout


CASES: dict[str, Callable[[], Made]] = {
    "odd micro-batches": lambda: _in_float64(_with_values()),
    "AdamW": lambda: _with_values(**ALIKE),
    "a process without a row": lambda: _in_float64(_with_values(minibatch_size=1, micro_batch_size=1)),
    "warm-up of the value head": lambda: _with_values(critic_warmup_iterations=1),
    "KL stop": lambda: _in_float64(_with_values(minibatch_size=3, n_epochs=3, target_kl=1e-4)),
    "a number that is not finite": _with_a_nan,
    "filtered groups": lambda: _in_float64(_with_groups()),
    "learned noise": lambda: _with_values(**ALIKE, **NOISE),
}
# of plain gradient descent: AdamW makes a whole step of what rounding leaves of a gradient, and hides a wrong size
LEARNING_RATES = dict.fromkeys(CASES, 1e-5) | {"learned noise": 1e-9}


def update(name: str, world: World = ALONE) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Return weights and last gradients after an update, and what it logs."""
    algorithm, rollout = CASES[name]()
    algorithm.world = world
    if name != "AdamW":
        groups = [{"params": group["params"]} for group in algorithm.optimizer.param_groups]
        algorithm.optimizer = torch.optim.SGD(groups, lr=LEARNING_RATES[name])
    stats = algorithm.update(iter([rollout])).to_log_dict()
    tensors = {f"policy.{n}": value for n, value in algorithm.policy.state_dict().items()}
    tensors |= {f"algorithm.{n}": value for n, value in algorithm.state_dict().items()}
    heads = dict(algorithm.value_head.named_parameters()) if algorithm.value_head else {}
    parameters = algorithm.trainable_parameters() | heads
    tensors |= {f"gradient.{n}": p.grad for n, p in parameters.items() if p.grad is not None}
    return {n: value.detach().clone().contiguous() for n, value in tensors.items()}, stats


def _hand_over(world: World) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Let the first process hand a rollout to the others, and its weights."""
    algorithm, rollout = _with_values()
    if world.rank == 0:
        rollout.stats = {"staleness": 0.5}
        for _ in range(2):
            world.keep_waiting()
        world.update(rollout)
    else:
        rollout = world.hear()
        torch.nn.init.zeros_(algorithm.value_head.get_parameter("0.weight"))
    world.align(algorithm.policy.state_dict(), algorithm.state_dict())
    if world.rank == 0:
        world.keep_waiting()
        world.end()
    else:
        assert world.hear() is None
    header, tensors = rollout.to_tensors()
    return tensors | algorithm.state_dict(), header


def _lose(world: World) -> dict[str, Any]:
    """Let the last process end without a word, and return what the others hear of it and after how long."""
    if world.rank == world.size - 1:
        os._exit(0)
    started = time.monotonic()
    try:
        while True:
            world.keep_waiting()
            time.sleep(0.1)
    except ConnectionError as error:
        world.end()
        return {"message": str(error), "seconds": time.monotonic() - started}


def main(folder: Path) -> None:
    """Run all cases as one process of several."""
    world = join_world("cpu")
    found = {name: update(name, world) for name in CASES} | {"hand over": _hand_over(world)}
    for name, (tensors, stats) in found.items():
        save_file(tensors, folder / f"{name} {world.rank}.safetensors")
        (folder / f"{name} {world.rank}.json").write_text(json.dumps(stats))
    lost = _lose(world)
    (folder / f"lost {world.rank}.json").write_text(json.dumps(lost))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
