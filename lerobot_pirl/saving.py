"""When a run's checkpoints are written, and what becomes of one that cannot be."""

import logging
import time
from typing import Any

from lerobot_pirl import checkpoint
from lerobot_pirl.launch import Interrupts
from lerobot_pirl.ledger import LedgerFile
from lerobot_pirl.metadata import Metadata
from lerobot_pirl.metrics import MetricsLog

logger = logging.getLogger(__name__)

RETRY_SAVING_S = 10


class Saver:
    """Writes the checkpoints of one run and knows which version of the policy is on the disk.

    Attributes:
        saved_version: the newest version that was saved; None for none.
        unsaved: whether the last attempt failed.
    """

    def __init__(
        self,
        cfg: Any,
        adapter: Any,
        algorithm: Any,
        metadata: Metadata,
        progress: checkpoint.Progress,
        metrics: MetricsLog,
        ledger_file: LedgerFile,
    ) -> None:
        """Keep hold of all that a checkpoint holds; what a run resumes from counts as saved."""
        self.cfg = cfg
        self.adapter = adapter
        self.algorithm = algorithm
        self.metadata = metadata
        self.progress = progress
        self.metrics = metrics
        self.ledger_file = ledger_file
        self.saved_version: int | None = algorithm.optimization_step if cfg.resume else None
        self.unsaved = False
        self.best_saved = progress.best_version, progress.best_success_rate

    def forget_lost_best(self) -> None:
        """Go back to the best policy that was saved: one that could not be, while it was the best, is gone."""
        if self.cfg.save_checkpoint and self.progress.best_version != self.algorithm.optimization_step:
            self.progress.best_version, self.progress.best_success_rate = self.best_saved

    def save(self, again: bool = False) -> bool:
        """Write a checkpoint of the present version, unless none is wanted or it is there and not wanted ``again``.

        Returns:
            False when it could not be written; training can go on, and the next update tries again.
        """
        version = self.algorithm.optimization_step
        saved = self.saved_version == version and not self.unsaved
        if (saved and not again) or not self.cfg.save_checkpoint:
            return True
        self.forget_lost_best()
        try:
            # log and ledger of a checkpoint's iterations are on the disk before the checkpoint is
            self.ledger_file.flush()
            self.metrics.flush()
            path = checkpoint.save(self.cfg, self.adapter, self.algorithm, self.metadata, self.progress)
        except (checkpoint.CheckpointError, OSError) as error:
            self.unsaved = True
            logger.error(
                "%s; version %s is the last one saved; free space or make the folder writable",
                error,
                self.saved_version,
            )
            return False
        self.unsaved = False
        self.saved_version = version
        self.best_saved = self.progress.best_version, self.progress.best_success_rate
        self.metrics.log_checkpoint(path)
        logger.info("checkpoint %s", path)
        return True

    def save_at_last(self, interrupts: Interrupts) -> None:
        """Save, and wait for space if need be, until an interrupt gives the state up."""
        while not self.save():
            # there is no update to finish any more: one interrupt ends the wait
            interrupts.requested = True
            logger.warning("trying again every %d s; interrupt to give the state up", RETRY_SAVING_S)
            time.sleep(RETRY_SAVING_S)
