"""Checkpoints in LeRobot's layout: save, and load what LeRobot does not.

``checkpoints/<step>/pretrained_model`` loads in a LeRobot without this package, ``algorithm`` holds the value head
(with ``flow_noise`` the noise head too, with ``kl_coef`` the starting policy), ``training_state`` the optimiser,
scheduler, random states, counters, ``pirl_metadata.json`` and the digests of all files; ``checkpoints/last`` points at the newest
complete one, ``checkpoints/best`` at the best evaluated one.
"""

import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lerobot.common.train_utils import get_step_checkpoint_dir, save_checkpoint
from lerobot.utils.constants import (
    PRETRAINED_MODEL_DIR,
    TRAINING_STATE_DIR,
    TRAINING_STEP,
)
from safetensors import SafetensorError

from lerobot_pirl import folders, restore
from lerobot_pirl.metadata import (
    FORMAT_VERSION,
    NEVER_ACCEPTED,
    Metadata,
    MetadataMismatch,
    accept_changes,
    judge,
)
from lerobot_pirl.restore import CheckpointError
from lerobot_pirl.weights import load_weights, trainable_parameters

logger = logging.getLogger(__name__)

ALGORITHM_DIR = "algorithm"
WEIGHTS_FILE = "model.safetensors"
KL_COEF = "algorithm.kl_coef"


@dataclass
class Progress:
    """How far a run has come, beside the number of its updates.

    Attributes:
        env_steps: environment steps that the policy learned from.
        episodes: episodes that it learned from.
        evaluated_version: the newest policy version that was evaluated; -1 for none.
        best_version: the policy version that did best in an evaluation; -1 for none.
        best_success_rate: its success rate.
    """

    env_steps: int = 0
    episodes: int = 0
    evaluated_version: int = -1
    best_version: int = -1
    best_success_rate: float = 0.0

    @property
    def best(self) -> str:
        """The best policy in words."""
        return (
            "none" if self.best_version < 0 else f"{self.best_success_rate:.1%} by policy {self.best_version}"
        )


def save(cfg: Any, adapter: Any, algorithm: Any, metadata: Metadata, progress: Progress) -> Path:
    """Write a complete checkpoint, point ``last`` at it (and ``best``, if it is), and prune if asked to.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: when it cannot be written; what was there before is as it was.
    """
    step = algorithm.optimization_step
    final = get_step_checkpoint_dir(Path(cfg.output_dir), cfg.steps, step)
    try:
        with folders.new_folder(final) as folder:
            _write(folder, cfg, adapter, algorithm, metadata, progress)
        folders.point(folders.LAST, final)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint {final} cannot be written ({restore.line(error)})") from error
    try:
        _tidy(final, cfg, progress)
    except OSError as error:
        logger.warning("%s is written, but not everything around it (%s)", final, restore.line(error))
    return final


def _tidy(final: Path, cfg: Any, progress: Progress) -> None:
    """Let ``best`` lead to the best checkpoint, also when a killed process did not come to it, and prune."""
    best = get_step_checkpoint_dir(Path(cfg.output_dir), cfg.steps, progress.best_version)
    if folders.link_target(best.parent, folders.BEST) != best.name and best.is_dir():
        folders.point(folders.BEST, best)
    if cfg.keep_last_n is not None:
        folders.prune(final, cfg.keep_last_n)


def _write(
    folder: Path, cfg: Any, adapter: Any, algorithm: Any, metadata: Metadata, progress: Progress
) -> None:
    step = algorithm.optimization_step
    # a resume is asked for on the command line, each time anew
    stored = copy.copy(cfg)
    stored.resume, stored.checkpoint_path, stored.accept_changes = False, None, ""
    save_checkpoint(
        folder,
        step,
        stored,
        adapter.policy,
        algorithm.optimizer,
        algorithm.scheduler,
        preprocessor=adapter.processors.policy_pre,
        postprocessor=adapter.processors.policy_post,
    )
    _name_package_files(folder / PRETRAINED_MODEL_DIR)
    (folder / ALGORITHM_DIR).mkdir()
    algorithm._save_pretrained(folder / ALGORITHM_DIR)
    state = folder / TRAINING_STATE_DIR
    _write_json(folder / folders.METADATA_FILE, metadata.to_dict())
    counters = {"step": step, "policy_version": step, "skipped_steps": algorithm.skipped_steps} | asdict(
        progress
    )
    _write_json(state / TRAINING_STEP, counters)


def _name_package_files(folder: Path) -> None:
    """Name this package's files, such as its tokenizer, as a clone does: where it is installed is nobody's business."""
    package = Path(__file__).parent
    for path in folder.glob("*.json"):
        path.write_text(path.read_text().replace(f'"{package}/', f'"{package.name}/'))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def lead_last_to(cfg: Any, step: int, progress: Progress) -> None:
    """Let ``last`` lead to the checkpoint that a run goes on from, before its log forgets what came after it.

    A best policy that was pruned since, because one that is done again had been better, is forgotten.
    """
    folder = cfg.checkpoint_path
    named = get_step_checkpoint_dir(Path(cfg.output_dir), cfg.steps, step)
    if folder.parent.resolve() != named.parent.resolve():
        return
    if folder.name in (folders.LAST, folders.BEST):
        # a copy that followed the links: the step is here under the link's name
        if not named.exists():
            folder.rename(named)
        folder = named
    if folders.link_target(folder.parent, folders.LAST) != folder.name:
        folders.point(folders.LAST, folder)
    link = folder.parent / folders.BEST
    best = get_step_checkpoint_dir(Path(cfg.output_dir), cfg.steps, progress.best_version)
    if link.is_symlink() and not best.exists():
        progress.best_version, progress.best_success_rate = -1, 0.0
        link.unlink()


def verify(checkpoint_dir: Path, part: str = "") -> None:
    """Compare the files of a checkpoint, or of one of its folders, with the digests written with them.

    Raises:
        CheckpointError: naming the first file that is missing or has changed.
    """
    try:
        folders.verify(checkpoint_dir, part)
    except ValueError as error:
        raise CheckpointError(f"{error}; {restore.ANOTHER}") from error


def load(
    checkpoint_dir: Path, algorithm: Any, metadata: Metadata, accepted: Sequence[str] = ()
) -> tuple[Progress, Metadata]:
    """Restore trained weights, heads, starting policy, optimiser, scheduler, random states and counters.

    LeRobot has built the policy from the checkpoint before, in ``policy.dtype``; the trained weights are restored
    here as they were saved, because rounding them to bfloat16 would undo small updates. Everything is read and
    checked first: a refused checkpoint restores nothing.

    Args:
        checkpoint_dir: the folder of one step.
        algorithm: a :class:`lerobot_pirl.algorithm.PiRLAlgorithm` of this run's config.
        metadata: this run's.
        accepted: metadata fields and options that may differ, by full name.

    Returns:
        How far the run had come, and this run's metadata with the checkpoint's run id and history.

    Raises:
        CheckpointError: when a file is missing or damaged, or the checkpoint is not one of this recipe.
        MetadataMismatch: when the checkpoint was made by a different run config.
    """
    state = checkpoint_dir / TRAINING_STATE_DIR
    stored = _read_metadata(checkpoint_dir / folders.METADATA_FILE)
    verify(checkpoint_dir)
    changes = _judge(metadata, stored, accepted)
    counters = restore.read_json(
        state / TRAINING_STEP,
        {"step": int, "skipped_steps": int} | {each.name: each.type for each in fields(Progress)},
    )
    policy_path, algorithm_path = (
        checkpoint_dir / name / WEIGHTS_FILE for name in (PRETRAINED_MODEL_DIR, ALGORITHM_DIR)
    )
    weights = restore.read_tensors(policy_path, trainable_parameters(algorithm.policy))
    if algorithm.start and not changes.get(KL_COEF, [1])[0]:
        raise CheckpointError(
            f"{KL_COEF}={algorithm.config.kl_coef} needs the starting policy, which {algorithm_path} does not hold; "
            "set it to 0, or start a new run from these weights with --policy.path"
        )
    tensors = restore.read_tensors(algorithm_path, algorithm.state_dict())
    optimizer_state, scheduler_state = restore.read_optimizer(state, algorithm, counters["step"])
    restore.restore_rng(state)
    load_weights(algorithm.policy, weights)
    algorithm.load_state_dict(tensors)
    algorithm.optimizer.load_state_dict(optimizer_state)
    if algorithm.scheduler:
        algorithm.scheduler.load_state_dict(scheduler_state)
    algorithm.optimization_step, algorithm.skipped_steps = counters["step"], counters["skipped_steps"]
    history = stored.get("history", []) + [{"version": counters["step"], "changes": changes}] * bool(changes)
    progress = Progress(**{each.name: counters[each.name] for each in fields(Progress)})
    return progress, replace(metadata, run_id=stored["run_id"], history=history)


def _read_metadata(path: Path) -> dict[str, Any]:
    stored = restore.read_json(path, {"format_version": int, "run_id": str})
    found = stored["format_version"]
    if found != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {found}, written by lerobot-pirl {stored.get('package_version')}, and this "
            f"lerobot-pirl reads format_version {FORMAT_VERSION}; resume with the version that wrote it, or start a "
            "new run from its weights with --policy.path"
        )
    return stored


def _judge(metadata: Metadata, stored: dict[str, Any], accepted: Sequence[str]) -> dict[str, Any]:
    """Compare metadata; return ``{name: [checkpoint's value, this run's]}`` of what the user accepted."""
    mine = metadata.to_dict()
    theirs, changes = accept_changes(mine, stored, accepted)
    try:
        judge(mine, theirs, "this run", "checkpoint")
    except MetadataMismatch as error:
        if not error.names or set(error.names) & set(NEVER_ACCEPTED):
            raise
        names = ",".join(dict.fromkeys([*accepted, *error.names]))
        raise MetadataMismatch(
            f"{error}\nIf the change is meant, name it: --accept_changes={names}; the metadata's history keeps it.",
            error.names,
        ) from error
    return changes
