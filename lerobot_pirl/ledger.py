"""The ledger of episodes: which are to be collected, who has which, and what became of each.

The episodes of a run are numbered; ``episodes_per_iteration`` in a row make one iteration, the material of one update.
An episode counts once or not at all: whoever delivers a number first, the same number is refused afterwards. What was
trained, refused, returned and dropped is in ``ledger.jsonl``, a line per actor and policy version.
"""

import contextlib
import json
import logging
import math
import os
from bisect import insort
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lerobot_pirl.metrics import append_lines
from lerobot_pirl.rules import shown

logger = logging.getLogger(__name__)

LEDGER_FILE = "ledger.jsonl"
# stands for the evaluation of the newest policy version, which one actor makes as a whole; before all episodes
EVALUATION = -1
# numbers that one message may hold
MAX_SHARE = 10_000
# lines about refused episodes, and about returned ones, for each update
MAX_REFUSALS = 1_000
# size at which the file becomes `ledger.<n>.jsonl` and a new one is begun
MAX_FILE_BYTES = 64 * 2**20


@dataclass
class Peer:
    """An actor that has asked for episodes.

    Attributes:
        slots: environments that it steps side by side.
        heard: when it last sent something, or got something to do after it had nothing; of a monotonic clock.
        holds: numbers that it was handed and has not delivered.
        overdue: whether it kept others waiting; until it is heard again it gets nothing.
    """

    slots: int
    heard: float
    holds: set[int] = field(default_factory=set)
    overdue: bool = False


@dataclass
class Ledger:
    """Hands out the episodes of a run and keeps account of them.

    Attributes:
        per_iteration: episodes of one iteration.
        max_staleness: iterations that an episode may be ahead of the policy version that acts in it.
        version: the newest policy version.
        trained: iterations that were learned from, also those of which no newer version is open yet.
        opened: the first number that may not be handed out yet.
        waiting: numbers that nobody has, ascending.
        peers: the actors that take part, by id.
        delivered: actor and acting policy version of what came in and was not trained yet, by number.
        unused: episodes that came in and were refused, since :meth:`pop_unused` told of them.
        returned: how often episodes were taken back since then.
        lines: of the file, not written yet.
    """

    per_iteration: int
    max_staleness: int = 0
    version: int = 0
    trained: int = 0
    opened: int = 0
    waiting: list[int] = field(default_factory=list)
    peers: dict[str, Peer] = field(default_factory=dict)
    delivered: dict[int, tuple[str, int]] = field(default_factory=dict)
    unused: int = 0
    returned: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)

    def open(self, version: int, steps: int, evaluate: bool) -> None:
        """Let a new policy version's episodes be handed out, those of the last of ``steps`` iterations at most."""
        self.version = version
        self.opened = max(self.opened, version * self.per_iteration)
        end = max(self.opened, min(version + self.max_staleness + 1, steps) * self.per_iteration)
        self.waiting = [EVALUATION] * evaluate + [
            n for n in self.waiting if n >= version * self.per_iteration
        ]
        self.waiting += range(self.opened, end)
        self.opened = end

    def join(self, actor: str, slots: int, now: float) -> None:
        """Let an actor take part; what it held before it lost the connection is handed out again."""
        self.leave(actor, "its actor connected again")
        self.peers[actor] = Peer(slots, now)

    def leave(self, actor: str, reason: str) -> None:
        """Take an actor out, and what it holds back."""
        if actor in self.peers:
            self._take_back(actor, reason)
            del self.peers[actor]

    def return_overdue(self, now: float, timeout_s: float) -> None:
        """Take back what actors hold that were not heard for so many seconds."""
        for actor, peer in self.peers.items():
            if peer.holds and now - peer.heard > timeout_s:
                self._take_back(actor, f"its actor delivered nothing for {timeout_s:.0f} s")
                peer.overdue = True

    def _take_back(self, actor: str, reason: str) -> None:
        held = sorted(self.peers[actor].holds)
        self.peers[actor].holds.clear()
        for number in held:
            insort(self.waiting, number)
        if held:
            logger.warning("%s of actor %s go to others: %s", _in_words(held), actor, reason)
            self.returned += 1
            if self.returned <= MAX_REFUSALS:
                self.lines.append({"state": "returned", "actor": actor, "numbers": held, "reason": reason})

    def hear(self, actor: str, now: float) -> None:
        """Note that an actor is alive."""
        if peer := self.peers.get(actor):
            peer.heard, peer.overdue = now, False

    def hand(self, actor: str, strangers: int, now: float) -> list[int]:
        """Return what an actor shall do next, ascending: nothing, the evaluation alone, or episodes.

        Args:
            actor: one of :attr:`peers`.
            strangers: actors that are connected and have not asked yet; their share is left for them.
            now: of a monotonic clock.
        """
        peer = self.peers[actor]
        if EVALUATION in peer.holds or not self.waiting:
            return []
        count = 1 if self.waiting[0] == EVALUATION and not peer.overdue else self._share(peer, strangers)
        numbers, self.waiting = self.waiting[:count], self.waiting[count:]
        if numbers and not peer.holds:
            peer.heard = now
        peer.holds.update(numbers)
        return numbers

    def _share(self, peer: Peer, strangers: int) -> int:
        """Return how many episodes an actor gets: all if it is alone, else large shares first and small ones last.

        An actor asks for more while its last free environment is still busy, so that none has to wait.
        """
        held = len(peer.holds)
        if peer.overdue or held > peer.slots:
            return 0
        present = [each for each in self.peers.values() if not each.overdue]
        slots = sum(each.slots for each in present) + strangers * peer.slots
        work = len(self.waiting) + sum(len(each.holds) for each in present)
        level = math.ceil(work * peer.slots / slots) - held
        if slots > peer.slots:
            level = min(level, max(peer.slots + 1 - held, math.ceil(level / 2)))
        return max(0, min(level, MAX_SHARE))

    def judge(self, number: Any, version: Any) -> str | None:
        """Return why an episode that an actor sent cannot count, or None."""
        if type(number) is not int or type(version) is not int or not 0 <= number < self.opened:
            return f"episode {shown(number)} of policy version {shown(version)} was never asked for"
        iteration = number // self.per_iteration
        if iteration < max(self.version, self.trained):
            return f"episode {number} belongs to policy version {iteration}, which is over"
        if number in self.delivered:
            return f"episode {number} was delivered before"
        if not iteration - self.max_staleness <= version <= min(iteration, self.version):
            return (
                f"episode {number} was collected with policy version {shown(version)} instead of {iteration}"
            )
        return None

    def accept(self, actor: str, number: int, version: int) -> None:
        """Take what :meth:`judge` has nothing against, or the evaluation, off the list, whoever was to do it."""
        if number in self.waiting:
            self.waiting.remove(number)
        for peer in self.peers.values():
            peer.holds.discard(number)
        if number != EVALUATION:
            self.delivered[number] = actor, version

    def reject(self, actor: str, number: int) -> bool:
        """Hand out again what an actor delivered in vain; return whether it was asked for it."""
        peer = self.peers.get(actor)
        if peer is None or number not in peer.holds:
            return False
        peer.holds.remove(number)
        insort(self.waiting, number)
        return True

    def refuse(self, actor: str, number: Any, version: Any, reason: str) -> None:
        """Write down that an episode came in and is not used; after many since :meth:`pop_unused`, count it only."""
        self.unused += 1
        if self.unused <= MAX_REFUSALS:
            # they may be anything that JSON can hold, of any size
            numbers, acted = ([each] if _is_plain(each) else [] for each in (number, version))
            line = {"state": "refused", "actor": actor, "policy_version": acted[0] if acted else None}
            self.lines.append(line | {"numbers": numbers, "reason": reason})

    def pop_unused(self) -> int:
        """Return the number of episodes that were refused since the last call."""
        unused, self.unused, self.returned = self.unused, 0, 0
        return unused

    def numbers(self, iteration: int) -> range:
        """Return the numbers of an iteration's episodes."""
        return range(iteration * self.per_iteration, (iteration + 1) * self.per_iteration)

    def missing(self, iteration: int) -> int:
        """Return how many episodes of an iteration have not come in."""
        return sum(number not in self.delivered for number in self.numbers(iteration))

    def train(self, iteration: int) -> None:
        """Write down that an iteration was learned from; nothing of it counts again."""
        # before its numbers leave the list of those that came in: they may come again at any time
        self.trained = iteration + 1
        self._settle(self.numbers(iteration), state="trained", iteration=iteration + 1)

    def drop(self, reason: str) -> None:
        """Write down that nothing of what came in and was not trained will be."""
        self._settle(sorted(self.delivered), state="dropped", reason=reason)

    def _settle(self, numbers: Iterable[int], **what: Any) -> None:
        groups: dict[tuple[str, int], list[int]] = defaultdict(list)
        for number in numbers:
            groups[self.delivered.pop(number)].append(number)
        for (actor, version), settled in groups.items():
            self.lines.append(what | {"actor": actor, "policy_version": version, "numbers": settled})


class LedgerFile:
    """Appends a ledger's lines to ``ledger.jsonl`` in a run's folder; what a full disk refuses is kept.

    A file of :data:`MAX_FILE_BYTES` becomes ``ledger.<n>.jsonl``, numbered from 1, the oldest.
    """

    def __init__(self, folder: Path, ledger: Ledger, iterations_done: int) -> None:
        """Go on with the file of a resumed run: iterations after those that are done count no more."""
        self.path, self.ledger = folder / LEDGER_FILE, ledger
        if self.path.exists():
            text = self.path.read_bytes()
            # half a line that a kill left
            os.truncate(self.path, text.rfind(b"\n") + 1)
        if self.path.exists() or self._last_full_file():
            self.ledger.lines.append({"state": "resumed", "iteration": iterations_done})

    def _last_full_file(self) -> int:
        """Return the number of the last file that was full, 0 if there was none."""
        middles = [path.suffixes[0][1:] for path in self.path.parent.glob("ledger.*.jsonl")]
        return max((int(each) for each in middles if each.isdecimal()), default=0)

    def flush(self) -> None:
        """Write what is new; raises OSError, naming the file, when the disk refuses it."""
        lines = list(self.ledger.lines)
        if lines:
            # what cannot be renamed grows until it can
            with contextlib.suppress(OSError):
                if self.path.stat().st_size >= MAX_FILE_BYTES:
                    self.path.rename(self.path.with_name(f"ledger.{self._last_full_file() + 1}.jsonl"))
            append_lines(self.path, "".join(json.dumps(line) + "\n" for line in lines).encode())
            del self.ledger.lines[: len(lines)]

    def write(self) -> None:
        """Write what is new, or say that it cannot be written yet."""
        try:
            self.flush()
        except OSError as error:
            logger.error("%s; its lines are kept until it can", error)


def _is_plain(value: Any) -> bool:
    """Return whether a value from a message is a number as numbers of episodes and versions are."""
    return type(value) is int and 0 <= value < 2**53


def _in_words(numbers: list[int]) -> str:
    if numbers == [EVALUATION]:
        return "the evaluation"
    return f"{len(numbers)} episodes from number {numbers[0]} on"
