"""The learner: publish version k, receive its evaluation and its rollouts, update, log, save."""

import logging
import time
import uuid
from functools import partial
from pathlib import Path
from typing import Any

from lerobot.common.train_utils import should_save_checkpoint
from lerobot.utils.utils import format_big_number

from lerobot_pirl import admission, checkpoint, folders, health, launch, probe
from lerobot_pirl.build import describe_run, log_overrides, make_algorithm
from lerobot_pirl.evaluate import ZERO_BASELINE
from lerobot_pirl.follower import Follower
from lerobot_pirl.inbox import Inbox
from lerobot_pirl.ledger import Ledger, LedgerFile
from lerobot_pirl.metadata import one_line
from lerobot_pirl.metrics import MetricsLog, iteration_line, rollout_record
from lerobot_pirl.parallel import ALONE, World, join_world
from lerobot_pirl.plots import plot_run, read_metrics, summary
from lerobot_pirl.rollout import Rollout
from lerobot_pirl.saving import Saver
from lerobot_pirl.transport import LearnerServer, security
from lerobot_pirl.wire import Message

logger = logging.getLogger(__name__)


class Learner:
    """One run's learner: policy, algorithm, server and counters; the first of the processes that train it."""

    def __init__(self, cfg: Any, world: World = ALONE) -> None:
        """Build everything; resume when asked to.

        Raises:
            ValueError, CheckpointError, MetadataMismatch: with a sentence for the user.
        """
        self.cfg, self.world = cfg, world
        self.algorithm = make_algorithm(cfg, world)
        self.adapter = self.algorithm.adapter
        self.metadata = describe_run(cfg, self.adapter, run_id=uuid.uuid4().hex)
        # tells rollouts made for this process from those for one that was killed at the same version
        self.session = uuid.uuid4().hex
        self.updating = False
        self.progress = checkpoint.Progress()
        self.publish_s = 0.0
        self.news = {"learner/num_processes": world.size} if world.size > 1 else {}
        if cfg.resume:
            self._resume()
        world.align(self.adapter.policy.state_dict(), self.algorithm.state_dict())
        self.interrupts = launch.Interrupts()
        wire = cfg.algorithm.wire
        self.server = LearnerServer(
            wire.host, wire.port, peer_timeout_s=wire.peer_timeout_s, security=security.read(wire)
        )
        self.ledger = Ledger(cfg.algorithm.episodes_per_iteration, cfg.algorithm.max_staleness)
        self.inbox = Inbox(
            self.server,
            self.ledger,
            {"config_hash": self.metadata.config_hash, "session": self.session},
            wire.rollout_timeout_s,
            wire.share_timeout_s,
            self._look_up,
            partial(admission.check, adapter=self.adapter),
            cfg.algorithm.resolved_group_size,
            -(-(cfg.algorithm.max_episode_steps or 0) // cfg.algorithm.n_action_steps),
        )
        # not before now: a learner that cannot start leaves no folder, and a run as it is
        self.lock = folders.lock(Path(cfg.output_dir))
        if cfg.resume:
            checkpoint.lead_last_to(cfg, self.version, self.progress)
        self.metrics = MetricsLog(cfg, self.version, self.progress.evaluated_version)
        self.ledger_file = LedgerFile(Path(cfg.output_dir), self.ledger, self.version)
        self.watch = health.Watch()
        for record in self.metrics.kept:
            self.watch.news(record)
        self.saver = Saver(
            cfg, self.adapter, self.algorithm, self.metadata, self.progress, self.metrics, self.ledger_file
        )
        trainable = sum(p.numel() for p in self.algorithm.trainable_parameters().values())
        total = sum(p.numel() for p in self.adapter.policy.parameters())
        logger.info("metadata %s", one_line(self.metadata.to_dict()))
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
        log_overrides(self.cfg)
        cfg = self.cfg
        self.progress, self.metadata = checkpoint.load(
            cfg.checkpoint_path, self.algorithm, self.metadata, cfg.accepted_changes
        )
        for entry in self.metadata.history:
            logger.info("accepted when resuming at update %d: %s", entry["version"], entry["changes"])
        # the next resume has its own say
        self.cfg.accept_changes = ""
        if self.version > self.cfg.steps:
            raise ValueError(
                f"steps={self.cfg.steps} is less than the {self.version} updates of {self.cfg.checkpoint_path}; raise "
                "--steps"
            )
        logger.info("resumed %s at update %d", self.cfg.checkpoint_path, self.version)

    @property
    def _evaluation_is_due(self) -> bool:
        every = self.cfg.env_eval_freq
        return every > 0 and self.version % every == 0 and self.progress.evaluated_version != self.version

    @property
    def _is_stale(self) -> bool:
        """Whether the best policy is as many evaluations old as the user has patience for."""
        patience, progress = self.cfg.early_stop_patience, self.progress
        if patience is None or progress.best_version < 0:
            return False
        return progress.evaluated_version - progress.best_version >= patience * self.cfg.env_eval_freq

    def publish(self) -> None:
        """Offer the present weights to all actors, and hand out what they shall do with them."""
        header = {"policy_version": self.version, "session": self.session}
        header["metadata"] = self.metadata.to_dict()
        started = time.perf_counter()
        self.server.publish(Message("weights", header, self.algorithm.get_weights()))
        self.publish_s = time.perf_counter() - started
        num_evaluations = self.cfg.eval.n_episodes if self._evaluation_is_due else 0
        self.inbox.open(self.version, self.cfg.steps, num_evaluations)

    def _look_up(self) -> None:
        """Be heard by the other processes while this one waits, and hear whether it is interrupted."""
        self.world.keep_waiting()
        self.interrupts.check()

    def receive(self) -> Rollout:
        """Wait until the episodes of this version are in; raises RunError when they do not come or are unusable."""
        return self.inbox.rollout(self.version)

    def evaluate(self) -> None:
        """Wait for the evaluation of this version where one is due; log it, and save the policy if it is the best."""
        if not self._evaluation_is_due:
            return
        evaluation = self.inbox.evaluation()
        self.saver.forget_lost_best()
        progress = self.progress
        progress.evaluated_version = self.version
        record = {"iteration": self.version, "policy_version": self.version, "eval/episodes": len(evaluation)}
        record |= evaluation.to_log_dict()
        self.metrics.write(record)
        success_rate = record["eval/success_rate"]
        logger.info(
            "evaluation of policy %d without noise: success %.1f %% of %d episodes (best before: %s)",
            self.version,
            100 * success_rate,
            len(evaluation),
            progress.best,
        )
        best = progress.best_version < 0 or success_rate > progress.best_success_rate
        if best:
            progress.best_version, progress.best_success_rate = self.version, success_rate
        # a checkpoint of this version may have been written before its evaluation: by an interrupt, or without any
        if best or self.saver.saved_version == self.version:
            self.saver.save(again=True)
        self._warn(record)

    def _warn(self, record: dict[str, Any]) -> None:
        """Say what is wrong with the run, if anything is, and now and then again."""
        for warning in self.watch.news(record):
            logger.warning("%s", warning)

    def _check_baseline(self) -> None:
        """Raise RunError when the policy that training starts from was evaluated and never succeeded."""
        never = self.progress.evaluated_version == 0 and self.progress.best_success_rate == 0
        if self.version == 0 and never and not self.cfg.allow_zero_baseline:
            raise launch.RunError(ZERO_BASELINE.format(episodes=self.cfg.eval.n_episodes))

    def iterate(self) -> None:
        """Run one iteration: wait, update, publish, log."""
        started = time.perf_counter()
        rollout = self.receive()
        received = time.perf_counter()
        before = probe.positions(self.adapter, rollout, self.cfg.seed)
        self.updating = True
        self.server.withdraw()
        self.world.update(rollout)
        stats = self.algorithm.update(iter([rollout]))
        after = probe.positions(self.adapter, rollout, self.cfg.seed)
        updated = time.perf_counter()
        self.progress.episodes += len(rollout.episode_lengths)
        self.progress.env_steps += int(rollout.env_steps.sum())
        collect_s = rollout.stats.get("collect_s", 0.0)
        record = {
            "iteration": self.version,
            "policy_version": rollout.policy_version,
            "episodes": self.progress.episodes,
            "env_steps": self.progress.env_steps,
            **rollout_record(rollout),
            "rollout/staleness": rollout.stats["staleness"],
            "rollout/episodes_dropped": self.ledger.pop_unused(),
            **{f"train/{name}": value for name, value in stats.to_log_dict().items()},
            **probe.change_mm(before, after),
            **self.news,
            "time/env_s": rollout.stats.get("env_s", 0.0),
            "time/inference_s": rollout.stats.get("inference_s", 0.0),
            "time/update_s": updated - received,
            "time/transfer_s": max(0.0, received - started - collect_s) + self.publish_s,
            "time/iteration_s": updated - started + self.publish_s,
        }
        self.ledger.train(rollout.policy_version)
        self.ledger_file.write()
        self.metrics.write(record)
        self.news = {}
        # until here weights, counters, ledger and log belong to no one version
        self.updating = False
        if self.cfg.log_freq > 0 and (
            self.version % self.cfg.log_freq == 0 or self.version == self.cfg.steps
        ):
            logger.info(iteration_line(record, self.cfg.steps))
        self._warn(record)
        self.publish()

    def run(self) -> None:
        """Train until ``steps`` updates are done; leave a checkpoint however it ends."""
        ok, reason = False, "the learner failed"
        try:
            ending: BaseException | None = None
            try:
                self._train()
                done = f"{self.version} updates are done"
                if self._is_stale:
                    done += f"; policy {self.progress.best_version} is the best for {self.cfg.early_stop_patience} evaluations"
            except KeyboardInterrupt as interrupt:
                ending, done = interrupt, "the learner was interrupted"
            except (launch.RunError, ConnectionError) as error:
                ending, done = error, str(error)
            except Exception as error:
                # between updates the weights are whole all the same
                ending, done = error, reason
            finally:
                # in an update they wait for something else, and end when this process does
                if not self.updating:
                    self.world.end()
            reason = "the learner was interrupted before its last checkpoint could be written"
            self._save_whole()
            reason = done
            if ending:
                raise ending
            ok = True
        finally:
            self.server.end(ok=ok, reason=reason)
            self.ledger.drop(reason.partition("\n")[0])
            self.ledger_file.write()
            self.metrics.close()
            self._draw()
            logger.info("end: %s", reason.partition("\n")[0])

    def _train(self) -> None:
        self.publish()
        self.evaluate()
        self._check_baseline()
        while self.version < self.cfg.steps and not self._is_stale:
            self.iterate()
            self.evaluate()
            due = self.saver.unsaved or should_save_checkpoint(
                self.version, self.cfg.save_freq, self.cfg.steps
            )
            # the last one is written, and waited for, when this is over
            if due and self.version < self.cfg.steps:
                self.saver.save()
            self.interrupts.check()

    def _save_whole(self) -> None:
        """Save what a resume can go on from: weights in the middle of an update belong to no version."""
        if not self.updating:
            self.saver.save_at_last(self.interrupts)
            return
        logger.warning(
            "the unfinished update is lost; the last checkpoint is of version %s", self.saver.saved_version
        )

    def _draw(self) -> None:
        """Show the curves; whatever is wrong with them is no reason to fail a run."""
        try:
            logger.info("%s; curves in %s", summary(self.cfg.output_dir), plot_run(self.cfg.output_dir))
            for warning in health.review(read_metrics(self.cfg.output_dir)):
                logger.warning("%s", warning)
        except Exception as error:
            logger.warning("no curves were drawn: %s", error)


def run(cfg: Any) -> int:
    """Validate the config and train; returns the exit status."""
    with launch.user_errors():
        cfg.validate()
        MetricsLog.check(cfg)
        world = join_world(cfg.policy.device)
        process = Follower(cfg, world) if world.rank else Learner(cfg, world)
    process.run()
    return 0


def main() -> None:
    """Entry point of ``lerobot-pirl-learner`` and of the redirected ``python -m lerobot.rl.learner``."""
    launch.exit_process(launch.main("learner"))


if __name__ == "__main__":
    main()
