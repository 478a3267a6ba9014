"""The actor: fetch a policy version, evaluate it where asked to, collect the episodes that it is handed, send them."""

import contextlib
import logging
import math
import time
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lerobot_pirl import launch
from lerobot_pirl.build import describe_run, make_adapter
from lerobot_pirl.collector import Collector, episode_specs, next_of
from lerobot_pirl.envs.chunk import make_chunk_envs, num_init_states, task_description, task_ids
from lerobot_pirl.episodes import Episode, EpisodeSpec, assemble
from lerobot_pirl.evaluate import evaluate, evaluation_specs
from lerobot_pirl.ledger import EVALUATION
from lerobot_pirl.metadata import MetadataMismatch, judge, one_line
from lerobot_pirl.policies.base import noise_head
from lerobot_pirl.registry import RegistryError
from lerobot_pirl.transport import LearnerClient, security
from lerobot_pirl.videos import EvaluationVideos
from lerobot_pirl.weights import load_weights
from lerobot_pirl.wire import Message

logger = logging.getLogger(__name__)


class _Useless(Exception):
    """The run, or the iteration that is being collected, is over; nobody will use the rest."""


@dataclass
class _Tally:
    """What has come of the episodes since the environments were last idle."""

    episodes: int = 0
    successes: int = 0
    env_steps: int = 0
    told: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("env_s", "inference_s", "collect_s"), 0.0)
    )
    started: float = field(default_factory=time.perf_counter)


class Actor:
    """One run's actor: policy, environments and the connection to the learner."""

    def __init__(self, cfg: Any) -> None:
        """Connect, build the policy and the environments.

        Raises:
            ConnectionError: when no learner answers within ``algorithm.wire.connect_timeout_s``.
        """
        self.cfg = cfg
        algorithm, wire = cfg.algorithm, cfg.algorithm.wire
        self.adapter = make_adapter(cfg)
        self.metadata = describe_run(cfg, self.adapter, run_id="")
        # learner process and version of the present weights
        self.session, self.version = "", -1
        self.evaluations: list[int] = []
        self.waiting: list[EpisodeSpec] = []
        # numbers that were handed to this actor and are not delivered
        self.held: set[int] = set()
        self.gave_up = False
        logger.info("metadata %s", one_line(self.metadata.to_dict()))
        self.client = LearnerClient(
            wire.host,
            wire.port,
            wire.connect_timeout_s,
            on_wait=self._report_wait,
            peer_timeout_s=wire.peer_timeout_s,
            on_sent=self._note_sent,
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
            algorithm.env_timeout_s,
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

    def _note_sent(self, message: Message) -> None:
        # what went to a former learner process says nothing of what the present one handed out
        if message.header.get("session") == self.session:
            self.held.discard(message.header.get("number"))

    def _report_wait(self, seconds: float) -> None:
        wire = self.cfg.algorithm.wire
        logger.info("waiting for the learner at %s:%d for %.0f s", wire.host, wire.port, seconds)

    def _show_progress(self, finished: int, successes: int) -> None:
        if self.client.ended or self._is_useless():
            self.gave_up = True
            raise _Useless
        self.bar.n = finished
        self.bar.set_postfix(success=f"{successes}/{finished}")

    def _iteration(self, number: int) -> int:
        return number // self.cfg.algorithm.episodes_per_iteration

    def _is_useless(self) -> bool:
        """Whether weights have come with which the learner wants nothing more of what is being collected."""
        news = self.client.news
        if news is None:
            return False
        oldest = news["policy_version"] if news.get("session") == self.session else math.inf
        return all(self._iteration(number) < oldest for number in list(self.held))

    def apply(self, message: Message) -> None:
        """Load pushed weights after checking that they belong to this run; what is over with them is left.

        Raises:
            RunError: when the learner's metadata differ from this actor's; the learner is told why.
        """
        session, version = message.header.get("session"), message.header.get("policy_version")
        theirs = message.header.get("metadata")
        theirs = theirs if isinstance(theirs, dict) else {}
        try:
            judge(self.metadata.to_dict(), theirs, "actor", "learner")
            load_weights(self.adapter.policy, message.tensors, noise_head(self.adapter))
        except (MetadataMismatch, RegistryError, ValueError) as error:
            self.client.send_refusal(str(error))
            raise launch.RunError(str(error)) from error
        # as large as the policy, and nobody reads them again
        message.tensors.clear()
        if not self.session:
            logger.info("metadata of the learner %s", one_line(theirs))
        logger.info("policy version %d applied", version)
        self.evaluations, self.version = [], version
        oldest = version if session == self.session else math.inf
        self.gave_up |= any(self._iteration(spec.number) < oldest for spec in self.waiting)
        self.waiting = [spec for spec in self.waiting if self._iteration(spec.number) >= oldest]
        self.held.difference_update([n for n in list(self.held) if self._iteration(n) < oldest])
        # a learner that waited in vain for what was given up hands out no more until it hears of this actor
        if session != self.session or self.gave_up:
            self.session, self.gave_up = session, False
            self.client.ask(session, self.envs.num_envs)

    def _receive(self, share: Message) -> None:
        """Note what the learner hands out; what belongs to weights of before is over."""
        header, algorithm = share.header, self.cfg.algorithm
        if header.get("session") != self.session:
            return
        self.held.difference_update(header.get("refused", []))
        due = header.get("evaluate") and header.get("policy_version") == self.version
        # after a reconnection the learner hands it out again too
        if due and EVALUATION not in self.held:
            self.held.add(EVALUATION)
            self.evaluations.append(header["evaluate"])
        for number in header.get("numbers", []):
            # after a reconnection the learner hands out again what this actor may still have
            if self._iteration(number) >= self.version and number not in self.held:
                self.held.add(number)
                self.waiting += episode_specs(self.num_init_states, number, 1, algorithm.resolved_group_size)

    def _start_bar(self, what: str, count: int) -> None:
        self.bar.reset(total=count)
        self.bar.set_postfix_str("", refresh=False)
        self.bar.set_description(what)

    def _address(self) -> dict[str, Any]:
        """Return the header by which the learner process that asked knows the answer."""
        return {
            "policy_version": self.version,
            "config_hash": self.metadata.config_hash,
            "session": self.session,
        }

    def evaluate(self, count: int) -> None:
        """Run the run's fixed evaluation episodes without exploration and send what became of them."""
        self._start_bar(f"evaluating policy {self.version}", count)
        specs = evaluation_specs(self.num_init_states, count)
        watch = None
        if self.cfg.env_eval_videos:
            self.videos.begin(self.version)
            watch = self.videos.watch
        evaluation = evaluate(self.collector, specs, watch=watch)
        header, tensors = evaluation.to_tensors()
        self.client.post(Message("evaluation", header | self._address(), tensors))
        logger.info(
            "policy version %d without noise: %d of %d episodes succeeded, in %.1f s",
            self.version,
            int(evaluation.success.sum()),
            count,
            evaluation.seconds,
        )
        if self.videos.first:
            logger.info("%d videos in %s", len(self.videos.first), self.videos.folder)

    def collect(self) -> None:
        """Run the episodes at hand, and those that are handed over meanwhile; each is sent when it has ended."""
        self._start_bar(f"policy {self.version}", len(self.waiting))
        tally = _Tally()
        scale = self._noise_scale()
        self.collector.explore(partial(self._next_episode, scale), scale, partial(self._send, tally))
        logger.info(
            "policy version %d: %d episodes, %d succeeded, %d env steps in %.1f s (env %.1f, inference %.1f)",
            self.version,
            tally.episodes,
            tally.successes,
            tally.env_steps,
            time.perf_counter() - tally.started,
            self.collector.seconds["env_s"],
            self.collector.seconds["inference_s"],
        )

    def _next_iteration(self) -> int:
        return min(self._iteration(spec.number) for spec in self.waiting)

    def _noise_scale(self) -> float:
        """Return the noise of the next episode: that of its iteration, whatever version acts in it."""
        return self.cfg.algorithm.noise_scale(self._next_iteration())

    def _next_episode(self, scale: float, previous: Episode | None) -> Episode | None:
        """Return an episode of the first iteration that is not over, if it wants this noise and the present weights."""
        known = len(self.waiting)
        for share in self.client.pop_shares():
            self._receive(share)
        self.bar.total += len(self.waiting) - known
        # the learner waits for an evaluation before it goes on
        if not self.waiting or self.evaluations or self.client.news or self._noise_scale() != scale:
            return None
        first = self._next_iteration()
        candidates = [spec for spec in self.waiting if self._iteration(spec.number) == first]
        spec = candidates[next_of(candidates, previous)]
        self.waiting.remove(spec)
        return self.collector.episode(spec, self.version)

    def _send(self, tally: _Tally, episode: Episode) -> None:
        """Post an episode that has ended, with the seconds since the one before."""
        rollout = assemble([episode], self.version)
        now = self.collector.seconds | {"collect_s": time.perf_counter() - tally.started}
        rollout.stats |= {name: now[name] - before for name, before in tally.told.items()}
        tally.told = now
        tally.episodes += 1
        tally.successes += episode.success
        tally.env_steps += episode.env_steps
        header, tensors = rollout.to_tensors()
        address = self._address() | {"number": episode.spec.number}
        self.client.post(Message("rollout", header | address, tensors))
        # nobody reads them here any more
        episode.rows, episode.final_features = [], None

    def run(self) -> int:
        """Serve the learner until it ends; returns the exit status it implies."""
        while True:
            message = self.client.next_message()
            if message.kind == "end":
                ok = bool(message.header.get("ok"))
                logger.info("the learner ended: %s", message.header.get("reason", ""))
                return 0 if ok else launch.EXIT_FAILED
            if message.kind == "share":
                self._receive(message)
            else:
                self.apply(message)
            with contextlib.suppress(_Useless):
                while self.evaluations or (self.waiting and not self.client.news):
                    if self.evaluations:
                        self.evaluate(self.evaluations.pop(0))
                    else:
                        self.collect()

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
