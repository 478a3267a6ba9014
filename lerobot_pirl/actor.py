"""The actor: fetch version k, evaluate it where asked to, collect its episodes, send them."""

import contextlib
import logging
from fractions import Fraction
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lerobot_pirl import launch
from lerobot_pirl.build import describe_run, make_adapter
from lerobot_pirl.collector import Collector, episode_specs
from lerobot_pirl.envs.chunk import make_chunk_envs, num_init_states, task_description, task_ids
from lerobot_pirl.evaluate import evaluate, evaluation_specs
from lerobot_pirl.metadata import MetadataMismatch, judge, one_line
from lerobot_pirl.policies.base import noise_head
from lerobot_pirl.registry import RegistryError
from lerobot_pirl.transport import LearnerClient, security
from lerobot_pirl.videos import EvaluationVideos
from lerobot_pirl.weights import load_weights
from lerobot_pirl.wire import Message

logger = logging.getLogger(__name__)


class _RunIsOver(Exception):
    """The learner ended while episodes were being collected; nobody will use them."""


class Actor:
    """One run's actor: policy, environments and the connection to the learner."""

    def __init__(self, cfg: Any) -> None:
        """Connect, build the policy and the environments.

        Raises:
            ConnectionError: when no learner answers within ``algorithm.wire.connect_timeout_s``.
        """
        self.cfg = cfg
        algorithm = cfg.algorithm
        wire = algorithm.wire
        self.adapter = make_adapter(cfg)
        self.metadata = describe_run(cfg, self.adapter, run_id="")
        self.answered: tuple[str, int] | None = None
        logger.info("metadata %s", one_line(self.metadata.to_dict()))
        self.client = LearnerClient(
            wire.host,
            wire.port,
            wire.connect_timeout_s,
            on_wait=self._report_wait,
            security=security.read(wire),
        )
        self.client.connect()
        self.num_init_states = {task: num_init_states(cfg.env, task) for task in task_ids(cfg.env)}
        self.envs = make_chunk_envs(
            cfg.env,
            min(algorithm.n_envs, algorithm.episodes_per_iteration),
            algorithm.n_action_steps,
            algorithm.max_episode_steps,
            algorithm.async_envs,
        )
        descriptions = {task: task_description(cfg.env, task) for task in self.num_init_states}
        logger.info(
            "environment %s %s, %d side by side, %s",
            cfg.env.type,
            cfg.env.task,
            self.envs.num_envs,
            "; ".join(f"task {task}: {sentence}" for task, sentence in descriptions.items()),
        )
        # the policy sees one picture per chunk
        frame_rate = Fraction(cfg.env.fps, algorithm.n_action_steps)
        self.videos = EvaluationVideos(Path(cfg.output_dir) / "videos", descriptions, frame_rate)
        self.bar = tqdm(total=algorithm.episodes_per_iteration, unit="episode", leave=False, disable=None)
        self.collector = Collector(
            self.envs, self.adapter, algorithm.last_step_prob, cfg.seed, on_progress=self._show_progress
        )

    def _report_wait(self, seconds: float) -> None:
        wire = self.cfg.algorithm.wire
        logger.info("waiting for the learner at %s:%d for %.0f s", wire.host, wire.port, seconds)

    def _show_progress(self, finished: int, successes: int) -> None:
        if self.client.ended:
            raise _RunIsOver
        self.bar.n = finished
        self.bar.set_postfix(success=f"{successes}/{finished}")

    def apply(self, message: Message) -> int:
        """Load pushed weights after checking that they belong to this run; returns their version.

        Raises:
            RunError: when the learner's metadata differ from this actor's; the learner is told why.
        """
        theirs = message.header.get("metadata")
        theirs = theirs if isinstance(theirs, dict) else {}
        try:
            judge(self.metadata.to_dict(), theirs, "actor", "learner")
            load_weights(self.adapter.policy, message.tensors, noise_head(self.adapter))
        except (MetadataMismatch, RegistryError, ValueError) as error:
            self.client.send_refusal(str(error))
            raise launch.RunError(str(error)) from error
        version = int(message.header["policy_version"])
        if self.answered is None:
            logger.info("metadata of the learner %s", one_line(theirs))
        logger.info("policy version %d applied", version)
        return version

    def _start_bar(self, what: str, count: int) -> None:
        self.bar.reset(total=count)
        self.bar.set_postfix_str("", refresh=False)
        self.bar.set_description(what)

    def _address(self, version: int, session: str) -> dict[str, Any]:
        """Return the header by which the learner process that asked knows the answer."""
        return {"policy_version": version, "config_hash": self.metadata.config_hash, "session": session}

    def evaluate(self, version: int, session: str, count: int) -> None:
        """Run the run's fixed evaluation episodes without exploration and send what became of them."""
        self._start_bar(f"evaluating policy {version}", count)
        specs = evaluation_specs(self.num_init_states, count)
        watch = None
        if self.cfg.env_eval_videos:
            self.videos.begin(version)
            watch = self.videos.watch
        evaluation = evaluate(self.collector, specs, watch=watch)
        header, tensors = evaluation.to_tensors()
        self.client.send(Message("evaluation", header | self._address(version, session), tensors))
        logger.info(
            "policy version %d without noise: %d of %d episodes succeeded, in %.1f s",
            version,
            int(evaluation.success.sum()),
            count,
            evaluation.seconds,
        )
        if self.videos.first:
            logger.info("%d videos in %s", len(self.videos.first), self.videos.folder)

    def collect(self, version: int, session: str) -> None:
        """Run the episodes of one iteration and send them to the learner process that asked for them."""
        count = self.cfg.algorithm.episodes_per_iteration
        self._start_bar(f"policy {version}", count)
        group_size = self.cfg.algorithm.resolved_group_size
        specs = episode_specs(self.num_init_states, version * count, count, group_size)
        rollout = self.collector.collect(specs, version, self.cfg.algorithm.noise_scale(version))
        header, tensors = rollout.to_tensors()
        self.client.send(Message("rollout", header | self._address(version, session), tensors))
        logger.info(
            "policy version %d: %d episodes, %d succeeded, %d env steps in %.1f s (env %.1f, inference %.1f)",
            version,
            count,
            int(rollout.success.sum()),
            int(rollout.env_steps.sum()),
            rollout.stats["collect_s"],
            rollout.stats["env_s"],
            rollout.stats["inference_s"],
        )

    def run(self) -> int:
        """Serve the learner until it ends; returns the exit status it implies."""
        while True:
            message = self.client.next_weights()
            if message.kind == "end":
                ok = bool(message.header.get("ok"))
                logger.info("the learner ended: %s", message.header.get("reason", ""))
                return 0 if ok else launch.EXIT_FAILED
            request = (message.header.get("session"), message.header.get("policy_version"))
            # after a reconnection the same learner sends again what was answered
            if request != self.answered:
                version = self.apply(message)
                with contextlib.suppress(_RunIsOver):
                    if message.header.get("evaluate"):
                        self.evaluate(version, request[0], message.header["evaluate"])
                    if message.header.get("collect"):
                        self.collect(version, request[0])
                self.answered = request

    def close(self) -> None:
        """Close environments and connection."""
        self.bar.close()
        self.client.close()
        self.envs.close()


def run(cfg: Any) -> int:
    """Validate the config and collect for the learner; returns the exit status."""
    with launch.user_errors():
        cfg.validate(check_output_dir=False)
        if cfg.algorithm.wire.port == 0:
            raise ValueError("algorithm.wire.port=0 names no learner; give the port that the learner logged")
        if cfg.env.type == "libero":
            from lerobot_pirl.envs.libero import prepare_libero

            prepare_libero()
        actor = Actor(cfg)
    try:
        # log lines go above the bar instead of through it
        with logging_redirect_tqdm():
            return actor.run()
    finally:
        actor.close()


def main() -> None:
    """Entry point of ``lerobot-pirl-actor`` and of the redirected ``python -m lerobot.rl.actor``."""
    launch.exit_process(launch.main("actor"))


if __name__ == "__main__":
    main()
