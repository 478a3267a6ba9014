"""The learner's processes besides the first: each takes its share of every update, and does nothing else."""

import signal
from typing import Any

from lerobot_pirl import checkpoint
from lerobot_pirl.build import describe_run, make_algorithm
from lerobot_pirl.parallel import World


class Follower:
    """One process that holds no port and no file; its policy is at all times that of the first."""

    def __init__(self, cfg: Any, world: World) -> None:
        """Build what the first process trains, at the update that it starts from.

        Raises:
            ValueError, CheckpointError, MetadataMismatch: with a sentence for the user.
        """
        self.world = world
        self.algorithm = make_algorithm(cfg, world)
        policy = self.algorithm.policy
        if cfg.resume:
            metadata = describe_run(cfg, self.algorithm.adapter, run_id="")
            checkpoint.load(cfg.checkpoint_path, self.algorithm, metadata, cfg.accepted_changes)
        world.align(policy.state_dict(), self.algorithm.state_dict())

    def run(self) -> None:
        """Update from what the first process hands out, until it says that this is the end.

        Raises:
            ConnectionError: when another process is gone.
        """
        # a launcher gives signals to all its processes, and the first one decides what becomes of the run
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        while (rollout := self.world.hear()) is not None:
            self.algorithm.update(iter([rollout]))
