"""What actors send to the learner: waited for, checked against the version that was asked for, or refused."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lerobot_pirl import launch
from lerobot_pirl.evaluate import Evaluation
from lerobot_pirl.rollout import Rollout, concatenate
from lerobot_pirl.transport import LearnerServer
from lerobot_pirl.wire import Message

logger = logging.getLogger(__name__)

REPORT_EVERY_S = 60


@dataclass
class Inbox:
    """Receives the rollouts and evaluations of one learner process.

    Attributes:
        server: where messages come in.
        timeout_s: seconds without a useful message after which the learner gives up.
        check_interrupts: called twice a second while waiting; raises to end the wait.
        dropped: episodes that came and were not used, since :meth:`pop_dropped` told of them.
    """

    server: LearnerServer
    timeout_s: float
    check_interrupts: Callable[[], None]
    dropped: int = 0
    _rollouts: list[Message] = field(default_factory=list)

    def rollout(self, wanted: dict[str, object], num_episodes: int) -> Rollout:
        """Wait until so many episodes are in.

        Args:
            wanted: fields that a message's header must have: ``config_hash``, ``session`` and ``policy_version``.
            num_episodes: how many.

        Raises:
            RunError: when no actor delivered in time, or one delivered what cannot be used.
        """
        rollouts: list[Rollout] = []
        while sum(len(rollout.episode_lengths) for rollout in rollouts) < num_episodes:
            message = self._rollouts.pop(0) if self._rollouts else self._wait(wanted, "rollout")
            rollouts.append(_decode(Rollout, message))
        return concatenate(rollouts)

    def evaluation(self, wanted: dict[str, object]) -> Evaluation:
        """Wait for the evaluation of a version; rollouts that come before it are kept.

        Raises:
            RunError: as :meth:`rollout`.
        """
        while (message := self._wait(wanted, "rollout", "evaluation")).kind == "rollout":
            self._rollouts.append(message)
        return _decode(Evaluation, message)

    def forget(self) -> None:
        """Drop what was kept: it is of a version that is over."""
        self.dropped += sum(map(_num_episodes, self._rollouts))
        self._rollouts.clear()

    def pop_dropped(self) -> int:
        """Return the number of episodes that were dropped since the last call."""
        dropped, self.dropped = self.dropped, 0
        return dropped

    def _wait(self, wanted: dict[str, object], *kinds: str) -> Message:
        """Return the next message of one of these kinds that is of the wanted version; others are logged."""
        started = report_at = time.monotonic()
        while True:
            self.check_interrupts()
            message = self.server.receive(timeout=0.5)
            now = time.monotonic()
            if message is None:
                if now - started > self.timeout_s:
                    raise launch.RunError(
                        f"no {kinds[-1]} for {self.timeout_s:.0f} s with {self.server.num_actors} actors connected; "
                        "start `python -m lerobot.rl.actor` with the same config or raise "
                        "algorithm.wire.rollout_timeout_s"
                    )
                if now - report_at > REPORT_EVERY_S:
                    report_at = now
                    logger.info(
                        "waiting for the %s of version %s; %d actors connected",
                        kinds[-1],
                        wanted["policy_version"],
                        self.server.num_actors,
                    )
            elif message.kind == "refusal":
                logger.error("an actor refused this learner and left:\n%s", message.header.get("reason", ""))
            elif _fits(message, wanted) and message.kind in kinds:
                return message
            elif message.kind == "rollout":
                self.dropped += _num_episodes(message)


def _num_episodes(message: Message) -> int:
    return len(message.tensors.get("episode_lengths", ()))


def _fits(message: Message, wanted: dict[str, object]) -> bool:
    for name, value in wanted.items():
        if message.header.get(name) != value:
            logger.error(
                "refused one %s: its %s is %s, here %s",
                message.kind,
                name,
                message.header.get(name),
                value,
            )
            return False
    return True


def _decode[T: (Rollout, Evaluation)](kind: type[T], message: Message) -> T:
    """Return what a message holds.

    Raises:
        RunError: when it was made for the wanted weights and cannot be used; the next one would be the same.
    """
    try:
        return kind.from_tensors(message.header, message.tensors)
    except (ValueError, KeyError, TypeError) as error:
        raise launch.RunError(
            f"the {message.kind} of policy version {message.header.get('policy_version')} is refused: {error}"
        ) from error
