"""Checkpoints in LeRobot's layout: save, and load what LeRobot does not.

``checkpoints/<step>/pretrained_model`` loads in a LeRobot without this package, ``algorithm`` holds the value
head, ``training_state`` the optimiser, random states, counters and ``pirl_metadata.json``; ``checkpoints/last``
points at the newest complete one.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lerobot.common.train_utils import get_step_checkpoint_dir, save_checkpoint
from lerobot.optim import load_optimizer_state
from lerobot.utils.constants import (
    LAST_CHECKPOINT_LINK,
    OPTIMIZER_PARAM_GROUPS,
    OPTIMIZER_STATE,
    PRETRAINED_MODEL_DIR,
    RNG_STATE,
    TRAINING_STATE_DIR,
    TRAINING_STEP,
)
from lerobot.utils.random_utils import get_rng_state, load_rng_state, set_rng_state
from safetensors import safe_open
from torch import Tensor

from lerobot_pirl.metadata import Metadata, MetadataMismatch, make_metadata, validate_metadata

__all__ = [
    "CheckpointError",
    "Metadata",
    "MetadataMismatch",
    "load",
    "make_metadata",
    "save",
    "validate_metadata",
]

METADATA_FILE = "pirl_metadata.json"
ALGORITHM_DIR = "algorithm"
WEIGHTS_FILE = "model.safetensors"
COUNTERS = ("step", "env_steps", "episodes", "skipped_steps")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used."""


def save(
    cfg: Any,
    step: int,
    adapter: Any,
    algorithm: Any,
    metadata: Metadata,
    counters: dict[str, Any],
) -> Path:
    """Write a complete checkpoint and point ``last`` at it.

    Everything is written to a hidden folder that is renamed when complete; a failure removes it and leaves
    ``last`` where it was.

    Returns:
        The checkpoint's folder.
    """
    final = get_step_checkpoint_dir(Path(cfg.output_dir), cfg.steps, step)
    for leftover in final.parent.glob(".*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial = final.with_name(f".{final.name}.partial")
    try:
        partial.mkdir(parents=True)
        _write(partial, cfg, step, adapter, algorithm, metadata, counters)
        _sync(*partial.rglob("*"), partial)
        _move(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _point_last_at(final)
    return final


def _write(
    folder: Path,
    cfg: Any,
    step: int,
    adapter: Any,
    algorithm: Any,
    metadata: Metadata,
    counters: dict[str, Any],
) -> None:
    save_checkpoint(
        folder,
        step,
        cfg,
        adapter.policy,
        algorithm.optimizer,
        preprocessor=adapter.processors.policy_pre,
        postprocessor=adapter.processors.policy_post,
    )
    _name_package_files(folder / PRETRAINED_MODEL_DIR)
    (folder / ALGORITHM_DIR).mkdir()
    algorithm._save_pretrained(folder / ALGORITHM_DIR)
    state = folder / TRAINING_STATE_DIR
    _write_json(state / METADATA_FILE, asdict(metadata))
    training_step = json.loads((state / TRAINING_STEP).read_text())
    _write_json(state / TRAINING_STEP, training_step | counters | {"skipped_steps": algorithm.skipped_steps})


def _name_package_files(folder: Path) -> None:
    """Name this package's files, such as its tokenizer, as a clone does: where it is installed is nobody's business."""
    package = Path(__file__).parent
    for path in folder.glob("*.json"):
        path.write_text(path.read_text().replace(f'"{package}/', f'"{package.name}/'))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _sync(*paths: Path) -> None:
    """Flush files and folders to the disk, so that a rename cannot outrun the data."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _move(partial: Path, final: Path) -> None:
    """Rename a complete folder into place; one of the same step steps aside, so that a whole one is always there."""
    former = final.with_name(f".{final.name}.former")
    shutil.rmtree(former, ignore_errors=True)
    if final.exists():
        final.rename(former)
    partial.rename(final)
    _sync(final.parent)
    shutil.rmtree(former, ignore_errors=True)


def _point_last_at(checkpoint_dir: Path) -> None:
    last = checkpoint_dir.parent / LAST_CHECKPOINT_LINK
    fresh = last.with_name(f".{LAST_CHECKPOINT_LINK}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(checkpoint_dir.name)
    fresh.replace(last)


def load(
    checkpoint_dir: Path,
    algorithm: Any,
    metadata: Metadata,
    validator: Callable[[dict[str, Any], dict[str, Any], str, str], None] = validate_metadata,
) -> dict[str, Any]:
    """Restore trained weights, value head, optimiser, random states and counters.

    LeRobot has built the policy from the checkpoint before, in ``policy.dtype``; the trained weights are restored
    here as they were saved, because rounding them to bfloat16 would undo small updates. Everything is read and
    checked first: a refused checkpoint restores nothing.

    Returns:
        The counters of ``training_step.json`` with the checkpoint's ``run_id``.

    Raises:
        CheckpointError: when a file is missing or damaged, or the checkpoint is not one of this recipe.
        MetadataMismatch: when the checkpoint was made by a different run config.
    """
    state = checkpoint_dir / TRAINING_STATE_DIR
    if not (state / METADATA_FILE).is_file():
        raise CheckpointError(
            f"{state / METADATA_FILE} is missing: this is no checkpoint of recipe '{metadata.recipe}'; "
            "start a new run from its weights with --policy.path instead of --resume=true"
        )
    stored = _read_json(state / METADATA_FILE, {"run_id": str})
    validator(asdict(metadata), stored, "this run", "checkpoint")
    counters = _read_json(state / TRAINING_STEP, dict.fromkeys(COUNTERS, int))
    weights = _read_tensors(checkpoint_dir / PRETRAINED_MODEL_DIR / WEIGHTS_FILE, algorithm.get_weights())
    value_head = _read_tensors(checkpoint_dir / ALGORITHM_DIR / WEIGHTS_FILE, algorithm.state_dict())
    optimizer_state = _read_optimizer(state, algorithm)
    _restore_rng(state)
    algorithm.load_weights(weights)
    algorithm.load_state_dict(value_head)
    algorithm.optimizer.load_state_dict(optimizer_state)
    algorithm.optimization_step, algorithm.skipped_steps = counters["step"], counters["skipped_steps"]
    return counters | {"run_id": stored["run_id"]}


@contextmanager
def _reading(what: Path | str) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read and checked into a CheckpointError that names it."""
    try:
        yield
    except Exception as error:  # the readers of LeRobot, torch and safetensors share no base class of errors
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{what} cannot be used ({type(error).__name__}: {reason}); resume from another checkpoint"
        ) from error


def _read_json(path: Path, required: dict[str, type]) -> dict[str, Any]:
    with _reading(path):
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise TypeError(f"it holds a JSON {type(value).__name__} instead of an object")
        for name, expected in required.items():
            if type(value.get(name)) is not expected:
                raise TypeError(
                    f"{name!r} is {value.get(name)!r} instead of a value of type {expected.__name__}"
                )
    return value


def _read_tensors(path: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return those tensors of a file that ``like`` names, after a look at their shapes."""
    tensors = {}
    with _reading(path), safe_open(path, framework="pt") as file:
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


def _read_optimizer(state: Path, algorithm: Any) -> dict[str, Any]:
    """Return an optimiser's state dict; LeRobot's reader fills a second optimiser, so the real one stays as it is."""
    twin = algorithm.make_optimizers_and_scheduler()[algorithm.name]
    with _reading(f"{state / OPTIMIZER_STATE} with {OPTIMIZER_PARAM_GROUPS}"):
        load_optimizer_state(twin, state)
        for parameter, moments in twin.state.items():
            for name, value in moments.items():
                if name != "step":
                    _check_shape(name, value, parameter)
    return twin.state_dict()


def _restore_rng(state: Path) -> None:
    before = get_rng_state()
    with _reading(state / RNG_STATE):
        try:
            load_rng_state(state)
        except Exception:
            set_rng_state(before)
            raise
