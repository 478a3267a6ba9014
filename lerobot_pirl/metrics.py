"""Where numbers go: ``metrics.jsonl`` in the run's folder and, when enabled, TensorBoard and wandb."""

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lerobot_pirl.rollout import Rollout

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"
_WANDB_MISSING = (
    "wandb.enable=True needs a wandb that this LeRobot knows; install it with pip install 'lerobot[training]', or leave "
    "wandb.enable out ({})"
)
SUCCESS, EVALUATED = "rollout/success_rate", "eval/success_rate"


def read_records(path: Path, lines: list[bytes]) -> list[dict[str, Any]]:
    """Return the records in the lines of a run's metrics.

    Raises:
        ValueError: for a line that is none, with its number and what to do.
    """
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line.decode())
        except ValueError:
            record = None
        if not isinstance(record, dict) or type(record.get("iteration")) is not int:
            raise ValueError(
                f"line {number} of {path} is no JSON object with an iteration; remove the line and try again"
            )
        records.append(record)
    return records


class MetricsLog:
    """Appends one JSON object per iteration and per evaluation.

    Attributes:
        path: of the log.
        kept: the records of a resumed run that stay.
    """

    def __init__(self, cfg: Any, iterations_done: int, evaluated_version: int = -1) -> None:
        """Open the log of a run; records of iterations and evaluations that a resumed run does again are dropped."""
        self.path = Path(cfg.output_dir) / METRICS_FILE
        self._unwritten = ""
        # a refusal comes before anything is changed
        kept, dropped, cut = self._split(iterations_done, evaluated_version)
        self.kept = read_records(self.path, kept)
        board = _board_class() if cfg.tensorboard else None
        self.wandb = self._open_wandb(cfg) if cfg.wandb.enable and cfg.wandb.project else None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"output_dir={cfg.output_dir} cannot be created ({error}); choose another one"
            ) from error
        if dropped:
            self._put_aside(dropped, iterations_done)
        if dropped or cut:
            fresh = self.path.with_suffix(".new")
            fresh.unlink(missing_ok=True)
            append_lines(fresh, b"".join(kept))
            fresh.replace(self.path)
        self.board = self._open_board(board, iterations_done) if board else None

    @staticmethod
    def check(cfg: Any) -> None:
        """Raise ValueError for what would keep the log from being opened, before anything is written."""
        path = Path(cfg.output_dir) / METRICS_FILE
        if path.exists():
            read_records(path, path.read_bytes().split(b"\n")[:-1])
        if cfg.tensorboard:
            _board_class()
        if cfg.wandb.enable and cfg.wandb.project:
            try:
                import wandb  # noqa: F401
            except (ImportError, AttributeError) as error:
                raise ValueError(_WANDB_MISSING.format(error)) from error

    def _open_board(self, board_class: Any, iterations_done: int) -> Any:
        """Go on in the run's TensorBoard folder from a step on, or put all that is known in a new one."""
        folder = self.path.parent / TENSORBOARD_DIR
        # the last iteration's evaluation may be done again, and a step is hidden as a whole
        first = iterations_done if folder.exists() else None
        board = board_class(str(folder), purge_step=first)
        for record in self.kept:
            if record["iteration"] >= (first or 0):
                _draw(board, record)
        logger.info("curves: tensorboard --logdir %s", folder)
        return board

    @staticmethod
    def _open_wandb(cfg: Any) -> Any:
        from lerobot.common.wandb_utils import WandBLogger

        try:
            wandb_logger = WandBLogger(cfg)
            # the x-axis of all curves
            wandb_logger._wandb.define_metric("train/*", step_metric="train/iteration")
            return wandb_logger
        except (ImportError, AttributeError) as error:
            raise ValueError(_WANDB_MISSING.format(error)) from error
        except Exception as error:
            if not isinstance(error, RuntimeError) or not cfg.resume or cfg.wandb.run_id:
                raise ValueError(
                    f"wandb.enable=True, but wandb does not start ({type(error).__name__}: {error}); log in with "
                    "`wandb login`, set WANDB_MODE=offline, or leave wandb.enable out"
                ) from error
            raise ValueError(
                f"wandb.enable=True cannot go on with this run's wandb run ({error}); name one that exists with "
                "--wandb.run_id=..., or leave wandb off with --wandb.enable=false"
            ) from error

    def _split(self, iteration: int, evaluated_version: int) -> tuple[list[bytes], list[bytes], bytes]:
        """Return the lines that stay, those of what is done again, and half a line that a kill left."""
        if not self.path.exists():
            return [], [], b""
        *lines, cut = self.path.read_bytes().split(b"\n")
        kept: list[bytes] = []
        dropped: list[bytes] = []
        for line, record in zip(lines, read_records(self.path, lines), strict=True):
            done = evaluated_version if EVALUATED in record else iteration
            (kept if record["iteration"] <= done else dropped).append(line + b"\n")
        return kept, dropped, cut

    def _put_aside(self, lines: list[bytes], iteration: int) -> None:
        aside = self.path.with_name(f"{self.path.stem}.before-{iteration}{self.path.suffix}")
        append_lines(aside, b"".join(lines))
        logger.info(
            "%d lines of %s, of updates and evaluations after update %d, are done again; they are kept in %s",
            len(lines),
            self.path,
            iteration,
            aside.name,
        )

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; numbers that are not finite become null.

        What a full disk refuses is kept and written with the next record.
        """
        clean = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()}
        self._unwritten += json.dumps(clean) + "\n"
        try:
            self.flush()
        except OSError as error:
            logger.error("%s; its lines are kept until it can", error)
        if self.board:
            self._draw(clean)
        if self.wandb:
            numbers = {k: v for k, v in clean.items() if v is not None}
            # wandb's own step never goes back, as a run that is resumed from an earlier checkpoint does
            self._tell_wandb(lambda: self.wandb.log_dict(numbers, custom_step_key="iteration"))

    def _draw(self, record: dict[str, Any]) -> None:
        try:
            _draw(self.board, record)
        except OSError as error:
            logger.error("TensorBoard's numbers end here (%s); those in %s go on", error, self.path)
            self.board = None

    def _tell_wandb(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            logger.error(
                "wandb ends here (%s: %s); the numbers in %s go on", type(error).__name__, error, self.path
            )
            self.wandb = None

    def flush(self) -> None:
        """Write what a full disk has refused so far; raises OSError, naming the file, when it still does."""
        if self._unwritten:
            append_lines(self.path, self._unwritten.encode())
        self._unwritten = ""

    def log_checkpoint(self, folder: Path) -> None:
        """Upload a checkpoint's policy to wandb, unless ``wandb.disable_artifact``."""
        if self.wandb:
            self._tell_wandb(lambda: self.wandb.log_policy(folder))

    def close(self) -> None:
        """Write what is left, if it can be, and end the wandb run, if there is one."""
        try:
            self.flush()
        except OSError as error:
            logger.error("%s; %d of its lines are lost", error, self._unwritten.count("\n"))
        if self.board:
            with contextlib.suppress(OSError):
                self.board.close()
        if self.wandb:
            self._tell_wandb(self.wandb._wandb.finish)


def append_lines(path: Path, data: bytes) -> None:
    """Append whole lines or nothing, for good: a checkpoint is not on the disk before the lines of its updates."""
    try:
        with path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(data) != len(data):
                    raise OSError("the disk is full")
                os.fsync(file.fileno())
            except OSError:
                os.truncate(path, size)
                raise
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error})") from error


def _board_class() -> Any:
    """Return TensorBoard's writer; raises ValueError when the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "tensorboard=True needs the package tensorboard; install it with pip install "
            f"'lerobot-pirl[tensorboard]', or set tensorboard to false ({error})"
        ) from error
    return SummaryWriter


def _draw(board: Any, record: dict[str, Any]) -> None:
    """Give a record's numbers to TensorBoard, all at the step of its iteration, and see them written."""
    for name, value in record.items():
        if isinstance(value, int | float) and name != "iteration":
            board.add_scalar(name, value, record["iteration"])
    board.flush()


def rollout_record(rollout: Rollout) -> dict[str, float]:
    """Return what a rollout says about the policy that collected it, exploration included."""
    record = {
        SUCCESS: float(rollout.success.float().mean()),
        "rollout/reward_mean": float(rollout.rewards.sum() / len(rollout.episode_lengths)),
        "rollout/episode_length": float(rollout.env_steps.float().mean()),
        "rollout/gripper_flip_rate": rollout.stats.get("gripper_flips", 0.0) / len(rollout),
    }
    for task_id in rollout.task_id.unique().tolist():
        success = rollout.success[rollout.task_id == task_id].float().mean()
        record[f"{SUCCESS}_task{task_id}"] = float(success)
    return record


def iteration_line(record: dict[str, Any], steps: int) -> str:
    """Return the one-line status of an iteration; what an update did not compute is left out."""
    shown = {
        "train/approx_kl": "KL {:.4f} | ",
        "train/clip_fraction": "clip {:.0%} | ",
        "train/explained_variance": "EV {:.2f} | ",
        "train/groups_kept": "groups kept {:.0%} | ",
    }
    return (
        f"update {record['iteration']}/{steps} | policy {record['policy_version']} | "
        f"success {record['rollout/success_rate']:.0%} | reward {record['rollout/reward_mean']:.2f} | "
        + "".join(text.format(record[name]) for name, text in shown.items() if name in record)
        + f"{record['time/iteration_s']:.1f} s (env {record['time/env_s']:.1f}, "
        f"inference {record['time/inference_s']:.1f}, update {record['time/update_s']:.1f}, "
        f"transfer {record['time/transfer_s']:.1f})"
    )
