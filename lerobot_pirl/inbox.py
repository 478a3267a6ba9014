"""Hands out episodes to actors and takes what they send: checked, entered in the ledger, or refused."""

import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from lerobot_pirl import launch, memory
from lerobot_pirl.evaluate import Evaluation
from lerobot_pirl.ledger import EVALUATION, Ledger
from lerobot_pirl.rollout import Rollout, concatenate
from lerobot_pirl.rules import integer, shown
from lerobot_pirl.transport import LearnerServer
from lerobot_pirl.wire import Message

logger = logging.getLogger(__name__)

POLL_S = 0.5
REPORT_EVERY_S = 60
# an episode repeats itself exactly, so what makes it useless seldom goes away
MAX_USELESS = 3
# characters of an actor's reason that are shown
MAX_REASON = 10_000
# environments that an actor may have
SLOTS = integer(1, 1024)


@dataclass(eq=False)
class Inbox:
    """The learner's desk: one thread serves the actors, also while the learner updates its policy.

    Attributes:
        server: where messages come in and shares go out.
        ledger: says which episodes count.
        address: ``config_hash`` and ``session``, which the header of a message must have.
        timeout_s: seconds without a useful message after which the learner gives up.
        share_timeout_s: seconds without one after which an actor's episodes are handed to others.
        check_interrupts: called twice a second while waiting; raises to end the wait.
        check_rollout: raises ValueError for a rollout that an update could not read.
        group_size: episodes in a row that must share task and initial state.
        max_rows: that an episode can have; 0 where nothing limits them here.
    """

    server: LearnerServer
    ledger: Ledger
    address: dict[str, str]
    timeout_s: float
    share_timeout_s: float
    check_interrupts: Callable[[], None]
    check_rollout: Callable[[Rollout], None] = lambda rollout: None
    group_size: int = 1
    max_rows: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _rollouts: dict[int, Rollout] = field(default_factory=dict)
    _evaluation: Evaluation | None = None
    _num_evaluations: int = 0
    _useless: Counter = field(default_factory=Counter)
    _useful_at: float = 0.0
    _planned: bool = False
    _failure: Exception | None = None
    # of the features of an episode that counted
    _shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        threading.Thread(target=self._serve, name="inbox", daemon=True).start()

    def open(self, version: int, steps: int, num_evaluations: int) -> None:
        """Let actors collect with a version that was published, after an evaluation of so many episodes, if any."""
        with self._changed:
            if version != self.ledger.version:
                self._evaluation = None
            self._num_evaluations = num_evaluations
            self.ledger.open(version, steps, evaluate=num_evaluations > 0 and not self._evaluation)
            self._hand_out()

    def rollout(self, iteration: int) -> Rollout:
        """Wait until all episodes of an iteration are in; return them in the order of their numbers.

        Its ``stats`` hold the seconds of the actor that collected longest, and the mean ``staleness``.

        Raises:
            RunError: when no actor delivers in time, or one delivers again and again what cannot be used.
        """
        numbers = self.ledger.numbers(iteration)
        self._wait(lambda: not self.ledger.missing(iteration), "rollout")
        with self._changed:
            parts = [self._rollouts.pop(number) for number in numbers]
            actors = [self.ledger.delivered[number][0] for number in numbers]
        # to be put together, they need as much again
        held, free = sum(part.nbytes for part in parts), memory.available_bytes()
        if held > free:
            raise launch.RunError(
                f"the {len(parts)} episodes of an iteration hold {memory.in_words(held)}, and the update needs as much again, "
                f"more than the {memory.in_words(free)} that are free; lower algorithm.episodes_per_iteration or "
                "algorithm.max_episode_steps, or take a machine with more memory"
            )
        stats = _summed(parts, actors)
        stats["staleness"] = sum(iteration - part.policy_version for part in parts) / len(parts)
        return replace(concatenate(parts), policy_version=iteration, stats=stats)

    def evaluation(self) -> Evaluation:
        """Wait for the evaluation of the present version.

        Raises:
            RunError: as :meth:`rollout`.
        """
        self._wait(lambda: self._evaluation is not None, "evaluation")
        return self._evaluation

    def _wait(self, is_there: Callable[[], bool], what: str) -> None:
        started = report_at = time.monotonic()
        while True:
            self.check_interrupts()
            with self._changed:
                found = self._changed.wait_for(lambda: self._failure or is_there(), POLL_S)
                if self._failure:
                    raise self._failure
                if found:
                    return
            now, actors = time.monotonic(), self.server.num_actors
            if now - max(started, self._useful_at) > self.timeout_s:
                raise launch.RunError(
                    f"no {what} for {self.timeout_s:.0f} s with {actors} actors connected; "
                    "start `python -m lerobot.rl.actor` with the same config or raise "
                    "algorithm.wire.rollout_timeout_s"
                )
            if now - report_at > REPORT_EVERY_S:
                report_at = now
                logger.info(
                    "waiting for the %s of version %s; %d actors connected", what, self.ledger.version, actors
                )

    def _serve(self) -> None:
        """Take messages and hand out episodes until the server is closed."""
        try:
            while not self.server.closed:
                message = self.server.receive(POLL_S)
                with self._changed:
                    if message is not None:
                        self._take(message)
                    self._look_around()
                    self._hand_out()
                    self._changed.notify_all()
        except Exception as error:  # the learner must hear of it
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _look_around(self) -> None:
        connected = self.server.actors
        for actor in set(self.ledger.peers) - set(connected):
            logger.info("actor %s left", actor)
            self.ledger.leave(actor, "its actor left")
        self.ledger.return_overdue(time.monotonic(), self.share_timeout_s)

    def _hand_out(self) -> None:
        peers = self.ledger.peers
        strangers = len(set(self.server.actors) - set(peers))
        # who has least to do comes first
        for actor in sorted(peers, key=lambda each: len(peers[each].holds)):
            while numbers := self.ledger.hand(actor, strangers, time.monotonic()):
                evaluate = numbers == [EVALUATION]
                self._tell(actor, {"evaluate": self._num_evaluations} if evaluate else {"numbers": numbers})

    def _tell(self, actor: str, what: dict[str, Any]) -> None:
        header = {"session": self.address["session"], "policy_version": self.ledger.version}
        self.server.tell(actor, Message("share", header | what))

    def _take(self, message: Message) -> None:
        header, actor = message.header, str(message.header.get("actor", ""))
        if message.kind == "refusal":
            reason = str(header.get("reason", ""))[:MAX_REASON]
            logger.error("an actor refused this learner and left:\n%s", reason)
            return
        self.ledger.hear(actor, time.monotonic())
        if message.kind == "ask":
            self._let_join(actor, header)
        elif reason := self._mismatch(message) or self._judge(message):
            self._refuse(message, actor, reason)
        else:
            self._enter(message, actor)

    def _let_join(self, actor: str, header: dict[str, Any]) -> None:
        slots = header.get("slots")
        # one that asked a learner of before will ask again, or leave
        if header.get("session") == self.address["session"] and SLOTS.holds(slots):
            logger.info("actor %s takes part, with %d environments", actor, slots)
            self.ledger.join(actor, slots, time.monotonic())

    def _mismatch(self, message: Message) -> str | None:
        for name, value in self.address.items():
            if (theirs := message.header.get(name)) != value:
                return f"its {name} is {shown(theirs)}, here {value!r}"
        return None

    def _judge(self, message: Message) -> str | None:
        version = message.header.get("policy_version")
        if message.kind == "rollout":
            return self.ledger.judge(message.header.get("number"), version)
        if version != self.ledger.version:
            return f"its policy_version is {shown(version)}, here {self.ledger.version}"
        return (
            None
            if self._num_evaluations and not self._evaluation
            else "it was not asked for, or is there already"
        )

    def _refuse(self, message: Message, actor: str, reason: str) -> None:
        logger.error("refused one %s of actor %s: %s", message.kind, actor, reason)
        if message.kind == "rollout":
            header = message.header
            self.ledger.refuse(actor, header.get("number"), header.get("policy_version"), reason)

    def _enter(self, message: Message, actor: str) -> None:
        number = message.header["number"] if message.kind == "rollout" else EVALUATION
        try:
            content = self._decode(message)
        except (ValueError, KeyError, TypeError) as error:
            self._refuse(message, actor, str(error))
            # what an actor was not asked for says nothing about the episode, and shall not end the run
            if not self.ledger.reject(actor, number):
                return
            # it may not know yet that what it sent has come, and take a share of it for a repetition
            self._tell(actor, {"refused": [number]})
            self._useless[number] += 1
            if self._useless[number] == MAX_USELESS:
                raise launch.RunError(
                    f"the {message.kind} of policy version {self.ledger.version} is refused for the "
                    f"{MAX_USELESS}rd time: {error}"
                ) from error
            return
        self._useless.pop(number, None)
        self._useful_at = time.monotonic()
        if isinstance(content, Evaluation):
            self._evaluation = content
            self.ledger.accept(actor, EVALUATION, self.ledger.version)
        else:
            if not self._planned:
                self._plan_memory(content)
                self._planned = True
            self._rollouts[number] = content
            self.ledger.accept(actor, number, content.policy_version)

    def _decode(self, message: Message) -> Rollout | Evaluation:
        """Return what a message holds; raises ValueError, KeyError or TypeError when it is of no use."""
        if message.kind == "evaluation":
            evaluation = Evaluation.from_tensors(message.header, message.tensors)
            if len(evaluation) != self._num_evaluations:
                raise ValueError(
                    f"an actor evaluated {len(evaluation)} episodes instead of eval.n_episodes={self._num_evaluations}; "
                    "install the same lerobot-pirl on both sides"
                )
            return evaluation
        rollout = Rollout.from_tensors(message.header, message.tensors)
        if len(rollout.episode_lengths) != 1:
            raise ValueError(
                f"the rollout has {len(rollout.episode_lengths)} episodes instead of the one it names"
            )
        self.check_rollout(rollout)
        for features in (rollout.features, rollout.final_features):
            shapes = {name: tuple(value.shape[1:]) for name, value in features.items()}
            self._shapes = self._shapes or shapes
            if shapes != self._shapes:
                raise ValueError(
                    f"rollout: features have rows of shapes {shown(shapes)}, others {shown(self._shapes)}; start all actors "
                    "with the same config"
                )
        self._check_start(message.header["number"], rollout)
        return rollout

    def _plan_memory(self, rollout: Rollout) -> None:
        """Say what the episodes will take if all are as long as they can be, or else as this one."""
        rows = max(len(rollout), self.max_rows)
        needed = rollout.nbytes // len(rollout) * rows * self.ledger.per_iteration
        free = memory.available_bytes()
        logger.log(
            logging.WARNING if 2 * needed > free else logging.INFO,
            "the episodes of an iteration take %s of the learner's memory if all have %d chunks, and as much again for the "
            "update; %s are free",
            memory.in_words(needed),
            rows,
            memory.in_words(free),
        )

    def _check_start(self, number: int, rollout: Rollout) -> None:
        """Raise ValueError when an episode began elsewhere than what has come in of its group."""
        first = number - number % self.group_size
        for other in range(first, first + self.group_size):
            if other not in self._rollouts:
                continue
            for name in ("task_id", "init_state_id"):
                ours, theirs = (int(getattr(each, name)) for each in (self._rollouts[other], rollout))
                if ours != theirs:
                    raise ValueError(
                        f"rollout: {name} of episode {number} is {theirs}, of episode {other}, which is in the same group, "
                        f"{ours}; start all actors with the same config and the same version of the environments"
                    )


def _summed(parts: list[Rollout], actors: list[str]) -> dict[str, float]:
    """Return the seconds of the actor that collected longest, and the other numbers of all."""
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    stats = {"gripper_flips": 0.0}
    for part, actor in zip(parts, actors, strict=True):
        stats["gripper_flips"] += part.stats.get("gripper_flips", 0.0)
        for name in ("collect_s", "env_s", "inference_s"):
            seconds[actor][name] += part.stats.get(name, 0.0)
    return stats | max(seconds.values(), key=lambda each: each["collect_s"])
