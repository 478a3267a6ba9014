"""Checkpoints in LeRobot's layout, and the metadata that says which runs belong together.

``checkpoints/<step>/pretrained_model`` loads in a LeRobot without this package, ``algorithm`` holds the value
head, ``training_state`` the optimiser, random states, counters and ``pirl_metadata.json``; ``checkpoints/last``
points at the newest complete one.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import draccus
import importlib_metadata
import torch
from lerobot.common.train_utils import (
    get_step_checkpoint_dir,
    load_training_state,
    save_checkpoint,
)
from lerobot.utils.constants import CHECKPOINTS_DIR, LAST_CHECKPOINT_LINK, TRAINING_STATE_DIR
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

METADATA_FILE = "pirl_metadata.json"
ALGORITHM_DIR = "algorithm"
FORMAT_VERSION = 1
# shown on both sides, never judged: two machines mount a config in different places, a peer has no run id yet
SHOWN_ONLY = ("config_path", "run_id")
# per-process settings, which change where and how fast a run goes but not what it computes
_PROCESS_ALGORITHM = ("wire", "n_envs", "async_envs")
_PROCESS_POLICY = (
    *("device", "push_to_hub", "repo_id", "private", "tags", "license"),
    *("pretrained_path", "pretrained_revision", "tokenizer_name", "use_peft"),
)


class MetadataMismatch(RuntimeError):
    """Two processes, or a run and its checkpoint, do not belong together."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used."""


@dataclass(frozen=True)
class Metadata:
    """What has to agree between learner, actor and checkpoint."""

    format_version: int
    recipe: str
    variant: str
    config_path: str
    config_hash: str
    policy_type: str
    policy_features: str
    action_mode: str
    num_denoising_steps: int
    n_action_steps: int
    encoder_digest: str
    package_version: str
    lerobot_version: str
    run_id: str


def _canonical(value: Any) -> Any:
    """Return a JSON value in which equal configs look alike: 1 and 1.0 are one number."""
    if isinstance(value, dict):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def critical_config(cfg: Any) -> dict[str, Any]:
    """Return the part of a run config that decides what is learned."""
    algorithm = draccus.encode(cfg.algorithm)
    policy = draccus.encode(cfg.policy)
    for name in _PROCESS_ALGORITHM:
        algorithm.pop(name, None)
    for name in _PROCESS_POLICY:
        policy.pop(name, None)
    # the recipe overrules these two fields of the policy's config
    policy.pop("num_denoising_steps", None)
    policy.pop("n_action_steps", None)
    return {
        "recipe": cfg.recipe,
        "seed": cfg.seed,
        "algorithm": algorithm,
        "policy": {"type": cfg.policy.type} | policy,
        "env": {"type": cfg.env.type} | draccus.encode(cfg.env),
    }


def config_hash(cfg: Any) -> str:
    """Return a SHA-256 over the canonical JSON of :func:`critical_config`."""
    text = json.dumps(_canonical(critical_config(cfg)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def frozen_digest(policy: nn.Module) -> str:
    """Return a SHA-256 over the weights that do not train; actors compute features with them."""
    digest = hashlib.sha256()
    for name, parameter in sorted(policy.named_parameters()):
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def make_metadata(cfg: Any, policy: nn.Module, config_path: str | None, run_id: str) -> Metadata:
    """Describe this process's run; call it once the adapter has set up the policy."""
    features = {
        name: [feature.type.value, list(feature.shape)]
        for name, feature in sorted({**cfg.policy.input_features, **cfg.policy.output_features}.items())
    }
    return Metadata(
        format_version=FORMAT_VERSION,
        recipe=cfg.recipe,
        variant=cfg.algorithm.variant,
        config_path=str(config_path or "(command line)"),
        config_hash=config_hash(cfg),
        policy_type=cfg.policy.type,
        policy_features=json.dumps(features),
        action_mode=getattr(cfg.policy, "action_mode", ""),
        num_denoising_steps=cfg.algorithm.num_denoising_steps,
        n_action_steps=cfg.algorithm.n_action_steps,
        encoder_digest=frozen_digest(policy),
        package_version=importlib_metadata.version("lerobot-pirl"),
        lerobot_version=importlib_metadata.version("lerobot"),
        run_id=run_id,
    )


def validate_metadata(mine: dict[str, Any], theirs: dict[str, Any], my_label: str, their_label: str) -> None:
    """Compare two metadata dictionaries strictly, field by field.

    Raises:
        MetadataMismatch: with a table of the fields that differ and what to do.
    """
    names = [*mine, *(name for name in theirs if name not in mine)]
    judged = [name for name in names if name not in SHOWN_ONLY]
    differing = [name for name in judged if mine.get(name) != theirs.get(name)]
    if not differing:
        return
    shown = [*differing, "config_path"]
    rows = [("field", their_label, my_label)]
    rows += [(name, str(theirs.get(name, "-")), str(mine.get(name, "-"))) for name in shown]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    raise MetadataMismatch(
        f"metadata of {their_label} and {my_label} differ in {', '.join(differing)}:\n"
        + "\n".join(line.rstrip() for line in lines)
        + "\nStart both processes with the same config file, overrides and package versions."
    )


def save(
    cfg: Any,
    step: int,
    adapter: Any,
    algorithm: Any,
    metadata: Metadata,
    counters: dict[str, Any],
) -> Path:
    """Write a complete checkpoint and point ``last`` at it.

    Everything is written to a temporary folder that is renamed when complete.

    Returns:
        The checkpoint's folder.
    """
    final = get_step_checkpoint_dir(Path(cfg.output_dir), cfg.steps, step)
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_checkpoint(
        partial,
        step,
        cfg,
        adapter.policy,
        algorithm.optimizer,
        preprocessor=adapter.processors.policy_pre,
        postprocessor=adapter.processors.policy_post,
    )
    (partial / ALGORITHM_DIR).mkdir()
    algorithm._save_pretrained(partial / ALGORITHM_DIR)
    state = partial / TRAINING_STATE_DIR
    _write_json(state / METADATA_FILE, asdict(metadata))
    training_step = json.loads((state / "training_step.json").read_text())
    _write_json(state / "training_step.json", training_step | counters)
    _sync(partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _point_last_at(final)
    return final


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _sync(folder: Path) -> None:
    """Flush every file to the disk, so that the rename cannot outrun the data."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
    """Restore value head, optimiser, random states and counters; the policy is loaded by LeRobot beforehand.

    Returns:
        The counters of ``training_step.json`` with the checkpoint's ``run_id``.

    Raises:
        CheckpointError: when a file is missing or damaged, or the checkpoint is not one of this recipe.
        MetadataMismatch: when the checkpoint was made by a different run config.
    """
    state = checkpoint_dir / TRAINING_STATE_DIR
    metadata_file = state / METADATA_FILE
    if not metadata_file.is_file():
        raise CheckpointError(
            f"{metadata_file} is missing: this is no checkpoint of recipe '{metadata.recipe}'; "
            "start a new run from its weights with --policy.path instead of --resume=true"
        )
    try:
        stored = json.loads(metadata_file.read_text())
        validator(asdict(metadata), stored, "this run", "checkpoint")
        algorithm_file = checkpoint_dir / ALGORITHM_DIR / "model.safetensors"
        algorithm.load_state_dict(load_file(algorithm_file))
        load_training_state(checkpoint_dir, algorithm.optimizer, None)
        counters = json.loads((state / "training_step.json").read_text())
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint {checkpoint_dir} cannot be read: {error}") from error
    algorithm.optimization_step = counters["step"]
    return counters | {"run_id": stored["run_id"]}


def last_checkpoint(output_dir: Path) -> Path:
    """Return where ``last`` points in a run's folder."""
    return Path(output_dir) / CHECKPOINTS_DIR / LAST_CHECKPOINT_LINK
