"""Read the files of a checkpoint and check what they hold, before anything of a run is touched."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lerobot.optim import load_optimizer_state_dict
from lerobot.utils.constants import OPTIMIZER_PARAM_GROUPS, OPTIMIZER_STATE, RNG_STATE, SCHEDULER_STATE
from lerobot.utils.random_utils import get_rng_state, load_rng_state, set_rng_state
from safetensors import safe_open
from torch import Tensor

ANOTHER = "resume from another checkpoint"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used or written."""


def line(error: BaseException) -> str:
    """Return an error's type and message on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextmanager
def reading(what: Path | str) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read and checked into a CheckpointError that names it."""
    try:
        yield
    except Exception as error:  # the readers of LeRobot, torch and safetensors share no base class of errors
        raise CheckpointError(f"{what} cannot be used ({line(error)}); {ANOTHER}") from error


def read_json(path: Path, required: dict[str, type]) -> dict[str, Any]:
    """Return the JSON object in a file after a look at that it holds ``required`` values of those types."""
    with reading(path):
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise TypeError(f"it holds a JSON {type(value).__name__} instead of an object")
        for name, expected in required.items():
            if type(value.get(name)) is not expected:
                raise TypeError(
                    f"{name!r} is {value.get(name)!r} instead of a value of type {expected.__name__}"
                )
    return value


def read_tensors(path: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return those tensors of a file that ``like`` names, after a look at their shapes."""
    tensors = {}
    with reading(path), safe_open(path, framework="pt") as file:
        # of parameters that share memory the file holds one, and tells the others' names for it
        names = {name: name for name in file.keys()} | (file.metadata() or {})  # noqa: SIM118
        for name, value in like.items():
            if name not in names:
                raise ValueError(f"it holds no tensor {name!r}")
            tensors[name] = file.get_tensor(names[name])
            _check_shape(name, tensors[name], value)
    return tensors


def _check_shape(name: str, tensor: Tensor, expected: Tensor) -> None:
    if tensor.shape != expected.shape:
        raise ValueError(f"{name!r} has shape {tuple(tensor.shape)}, this run's has {tuple(expected.shape)}")


def _check_schedule(path: Path, step: int) -> None:
    stored = read_json(path, {"last_epoch": int})["last_epoch"]
    if stored != step:
        raise CheckpointError(f"{path} is of step {stored} in a checkpoint of step {step}; {ANOTHER}")


def read_optimizer(state: Path, algorithm: Any, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state dicts of optimiser and scheduler after ``step`` updates.

    The moments are the checkpoint's. The options of the parameter groups follow from this run's config and the step:
    equal to the checkpoint's, but for changes that the user accepted.
    """
    twin, scheduler = algorithm.build_optimizer()
    if scheduler:
        path = state / SCHEDULER_STATE
        # a run that had no schedule may get one, if the user accepts the change
        if path.is_file():
            _check_schedule(path, step)
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            # torch expects an optimiser's step before each; here the rate alone is wanted
            for _ in range(step):
                scheduler.step()
    groups = twin.state_dict()["param_groups"]
    with reading(f"{state / OPTIMIZER_STATE} with {OPTIMIZER_PARAM_GROUPS}"):
        stored = load_optimizer_state_dict(state)
        members = [[group["params"] for group in side] for side in (stored["param_groups"], groups)]
        if members[0] != members[1]:
            raise ValueError("its groups hold other parameters than this run's")
        moments = {int(index): value for index, value in stored["state"].items()}
        twin.load_state_dict({"state": moments, "param_groups": groups})
        for parameter, named in twin.state.items():
            for name, value in named.items():
                if name != "step":
                    _check_shape(name, value, parameter)
    return twin.state_dict(), scheduler.state_dict() if scheduler else {}


def restore_rng(state: Path) -> None:
    """Set the random states of Python, numpy and torch, all or none."""
    before = get_rng_state()
    with reading(state / RNG_STATE):
        try:
            load_rng_state(state)
        except Exception:
            set_rng_state(before)
            raise
