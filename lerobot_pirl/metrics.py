"""Where numbers go: ``metrics.jsonl`` in the run's folder and, when enabled, wandb."""

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from lerobot_pirl.rollout import Rollout

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
SUCCESS, EVALUATED = "rollout/success_rate", "eval/success_rate"


class MetricsLog:
    """Appends one JSON object per iteration and per evaluation."""

    def __init__(self, cfg: Any, iterations_done: int, evaluated_version: int = -1) -> None:
        """Open the log of a run; records of iterations and evaluations that a resumed run does again are dropped."""
        self.path = Path(cfg.output_dir) / METRICS_FILE
        self.wandb = self._open_wandb(cfg) if cfg.wandb.enable and cfg.wandb.project else None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"output_dir={cfg.output_dir} cannot be created ({error}); choose another one"
            ) from error
        self._drop_after(iterations_done, evaluated_version)
        self._unwritten = ""

    @staticmethod
    def _open_wandb(cfg: Any) -> Any:
        from lerobot.common.wandb_utils import WandBLogger

        try:
            return WandBLogger(cfg)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                "wandb.enable=True needs a wandb that this LeRobot knows; install it with "
                f"pip install 'lerobot[training]', or leave wandb.enable out ({error})"
            ) from error

    def _drop_after(self, iteration: int, evaluated_version: int) -> None:
        if not self.path.exists():
            return

        def is_done(line: str) -> bool:
            record = json.loads(line)
            done = evaluated_version if EVALUATED in record else iteration
            return record["iteration"] <= done

        lines = self.path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and is_done(line)]
        if kept != lines:
            fresh = self.path.with_suffix(".new")
            fresh.write_text("".join(kept))
            fresh.replace(self.path)

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
        if self.wandb:
            self.wandb.log_dict({k: v for k, v in clean.items() if v is not None}, step=record["iteration"])

    def flush(self) -> None:
        """Write what a full disk has refused so far; raises OSError, naming the file, when it still does."""
        try:
            if self._unwritten:
                self._append(self._unwritten)
        except OSError as error:
            raise OSError(f"{self.path} cannot be written ({error})") from error
        self._unwritten = ""

    def _append(self, text: str) -> None:
        """Append whole lines or nothing."""
        with self.path.open("ab", buffering=0) as file:
            size = file.tell()
            data = text.encode()
            try:
                if file.write(data) != len(data):
                    raise OSError("the disk is full")
            except OSError:
                os.truncate(self.path, size)
                raise

    def log_checkpoint(self, folder: Path) -> None:
        """Upload a checkpoint's policy to wandb, unless ``wandb.disable_artifact``."""
        if self.wandb:
            self.wandb.log_policy(folder)

    def close(self) -> None:
        """End the wandb run, if there is one."""
        if self.wandb:
            self.wandb._wandb.finish()


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
