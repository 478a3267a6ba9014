"""The learner: publish version k, receive the rollouts of version k, update, log, save."""

import logging
import signal
import time
import uuid
from dataclasses import asdict
from typing import Any

from lerobot.common.train_utils import should_save_checkpoint
from lerobot.utils.utils import format_big_number

from lerobot_pirl import checkpoint, launch, registry
from lerobot_pirl.algorithm import PiRLAlgorithm
from lerobot_pirl.build import describe_run, make_adapter
from lerobot_pirl.metadata import one_line
from lerobot_pirl.metrics import MetricsLog, iteration_line
from lerobot_pirl.plots import plot_run, summary
from lerobot_pirl.rollout import Rollout, concatenate
from lerobot_pirl.transport import LearnerServer
from lerobot_pirl.wire import Message

logger = logging.getLogger(__name__)


class _Interrupts:
    """Turns Ctrl-C into a flag, so that an update is finished and a checkpoint holds a whole iteration."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        logger.warning("stopping after the running update; interrupt again to leave it unfinished")

    def check(self) -> None:
        """Raise KeyboardInterrupt when an interrupt has come in."""
        if self.requested:
            raise KeyboardInterrupt


class Learner:
    """One run's learner: policy, algorithm, server and counters."""

    def __init__(self, cfg: Any) -> None:
        """Build everything; resume when asked to.

        Raises:
            ValueError, CheckpointError, MetadataMismatch: with a sentence for the user.
        """
        self.cfg = cfg
        self.adapter = make_adapter(cfg)
        self.algorithm = PiRLAlgorithm(self.adapter, cfg.algorithm, seed=cfg.seed)
        self.metadata = describe_run(cfg, self.adapter, run_id=uuid.uuid4().hex)
        # tells rollouts made for this process from those for one that was killed at the same version
        self.session = uuid.uuid4().hex
        self.updating = False
        self.env_steps = self.episodes = 0
        self.saved_version: int | None = None
        if cfg.resume:
            self._resume()
        self.interrupts = _Interrupts()
        wire = cfg.algorithm.wire
        self.server = LearnerServer(wire.host, wire.port)
        self.metrics = MetricsLog(cfg, self.version)
        trainable = sum(p.numel() for p in self.algorithm.trainable_parameters().values())
        total = sum(p.numel() for p in self.adapter.policy.parameters())
        logger.info("metadata %s", one_line(asdict(self.metadata)))
        logger.info(
            "policy %s: %s parameters, %s train; output folder %s; listening on %s:%d",
            cfg.policy.type,
            format_big_number(total),
            format_big_number(trainable),
            cfg.output_dir,
            wire.host,
            self.server.port,
        )

    @property
    def version(self) -> int:
        """Version of the policy as it is: the number of updates done."""
        return self.algorithm.optimization_step

    def _resume(self) -> None:
        validator = registry.checkpoint_validator(self.cfg.recipe)
        counters = checkpoint.load(self.cfg.checkpoint_path, self.algorithm, self.metadata, validator)
        self.env_steps = counters["env_steps"]
        self.episodes = counters["episodes"]
        self.saved_version = self.version
        self.metadata = describe_run(self.cfg, self.adapter, counters["run_id"])
        logger.info("resumed %s at update %d", self.cfg.checkpoint_path, self.version)

    def publish(self) -> None:
        """Offer the present weights to all actors."""
        header = {
            "policy_version": self.version,
            "session": self.session,
            "collect": self.version < self.cfg.steps,
            "metadata": asdict(self.metadata),
        }
        self.server.publish(Message("weights", header, self.algorithm.get_weights()))
        logger.debug("policy version %d published", self.version)

    def receive(self) -> Rollout:
        """Wait until the episodes of this version are in.

        Raises:
            RunError: when no actor delivered in time, or one delivered what cannot be used.
        """
        wanted = self.cfg.algorithm.episodes_per_iteration
        timeout = self.cfg.algorithm.wire.rollout_timeout_s
        rollouts: list[Rollout] = []
        deadline = time.monotonic() + timeout
        report_at = time.monotonic() + 60
        while sum(len(rollout.episode_lengths) for rollout in rollouts) < wanted:
            self.interrupts.check()
            message = self.server.receive(timeout=0.5)
            now = time.monotonic()
            if message is None:
                if now > deadline:
                    raise launch.RunError(
                        f"no rollout for {timeout:.0f} s with {self.server.num_actors} actors connected; start "
                        "`python -m lerobot.rl.actor` with the same config or raise "
                        "algorithm.wire.rollout_timeout_s"
                    )
                if now > report_at:
                    logger.info(
                        "waiting for rollouts of version %d; %d actors connected",
                        self.version,
                        self.server.num_actors,
                    )
                    report_at = now + 60
                continue
            if message.kind == "refusal":
                logger.error("an actor refused this learner and left:\n%s", message.header.get("reason", ""))
                continue
            rollout = self._accept(message)
            if rollout is not None:
                deadline = now + timeout
                rollouts.append(rollout)
        return concatenate(rollouts)

    def _accept(self, message: Message) -> Rollout | None:
        """Return the rollout of a message, or None for one that was made for other weights.

        Raises:
            RunError: when it was made for these weights and cannot be used; the next one would be the same.
        """
        mine = {
            "config_hash": self.metadata.config_hash,
            "session": self.session,
            "policy_version": self.version,
        }
        for name, value in mine.items():
            if message.header.get(name) != value:
                logger.error(
                    "refused a rollout: its %s is %s, here %s", name, message.header.get(name), value
                )
                return None
        try:
            return Rollout.from_tensors(message.header, message.tensors)
        except (ValueError, KeyError, TypeError) as error:
            raise launch.RunError(
                f"the rollout of policy version {self.version} is refused: {error}"
            ) from error

    def iterate(self) -> None:
        """Run one iteration: wait, update, publish, log."""
        started = time.perf_counter()
        rollout = self.receive()
        received = time.perf_counter()
        self.updating = True
        stats = self.algorithm.update(iter([rollout]))
        self.updating = False
        updated = time.perf_counter()
        self.publish()
        now = time.perf_counter()
        self.episodes += len(rollout.episode_lengths)
        self.env_steps += int(rollout.env_steps.sum())
        collect_s = rollout.stats.get("collect_s", 0.0)
        update_s = updated - received
        record = {
            "iteration": self.version,
            "policy_version": rollout.policy_version,
            "episodes": self.episodes,
            "env_steps": self.env_steps,
            "rollout/success_rate": float(rollout.success.float().mean()),
            "rollout/reward_mean": float(rollout.rewards.sum() / len(rollout.episode_lengths)),
            "rollout/episode_length": float(rollout.env_steps.float().mean()),
            "rollout/gripper_flip_rate": rollout.stats.get("gripper_flips", 0.0) / len(rollout),
            **{f"train/{name}": value for name, value in stats.to_log_dict().items()},
            "time/env_s": rollout.stats.get("env_s", 0.0),
            "time/inference_s": rollout.stats.get("inference_s", 0.0),
            "time/update_s": update_s,
            "time/transfer_s": max(0.0, now - started - collect_s - update_s),
            "time/iteration_s": now - started,
        }
        for task_id in rollout.task_id.unique().tolist():
            success = rollout.success[rollout.task_id == task_id].float().mean()
            record[f"rollout/success_rate_task{task_id}"] = float(success)
        self.metrics.write(record)
        if self.cfg.log_freq > 0 and (
            self.version % self.cfg.log_freq == 0 or self.version == self.cfg.steps
        ):
            logger.info(iteration_line(record, self.cfg.steps))

    def save(self) -> None:
        """Write a checkpoint of the present version unless it is there already or none is wanted."""
        if self.saved_version == self.version or not self.cfg.save_checkpoint:
            return
        counters = {
            "policy_version": self.version,
            "env_steps": self.env_steps,
            "episodes": self.episodes,
        }
        path = checkpoint.save(self.cfg, self.version, self.adapter, self.algorithm, self.metadata, counters)
        self.saved_version = self.version
        self.metrics.log_checkpoint(path)
        logger.info("checkpoint %s", path)

    def run(self) -> None:
        """Train until ``steps`` updates are done; leave a checkpoint however it ends."""
        ok, reason = False, "the learner failed"
        try:
            self.publish()
            while self.version < self.cfg.steps:
                self.iterate()
                if should_save_checkpoint(self.version, self.cfg.save_freq, self.cfg.steps):
                    self.save()
                self.interrupts.check()
            ok, reason = True, f"{self.version} updates are done"
        except KeyboardInterrupt:
            reason = "the learner was interrupted"
            self._save_whole()
            raise
        except launch.RunError as error:
            reason = str(error)
            self._save_whole()
            raise
        finally:
            self.server.end(ok=ok, reason=reason)
            self.metrics.close()
            self._draw()
            logger.info("end: %s", reason)

    def _save_whole(self) -> None:
        """Save what a resume can go on from: weights in the middle of an update belong to no version."""
        if self.updating:
            logger.warning(
                "the unfinished update is lost; the last checkpoint is of version %s", self.saved_version
            )
        else:
            self.save()

    def _draw(self) -> None:
        """Show the curves; whatever is wrong with them is no reason to fail a run."""
        try:
            logger.info("%s; curves in %s", summary(self.cfg.output_dir), plot_run(self.cfg.output_dir))
        except Exception as error:
            logger.warning("no curves were drawn: %s", error)


def run(cfg: Any) -> int:
    """Validate the config and train; returns the exit status."""
    with launch.user_errors():
        cfg.validate()
        learner = Learner(cfg)
    learner.run()
    return 0


def main() -> None:
    """Entry point of ``lerobot-pirl-learner`` and of the redirected ``python -m lerobot.rl.learner``."""
    launch.exit_process(launch.main("learner"))


if __name__ == "__main__":
    main()
