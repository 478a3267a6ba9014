"""A message in pieces: what LeRobot's service streams between BEGIN and END."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from lerobot.transport import services_pb2

from lerobot_pirl.wire import MAX_BYTES, Buffer, WireError, announced_bytes, payload_start

# larger ones are slower: their memory comes fresh from the system every time
PIECE_BYTES = 512 * 1024
# where a received message's tensors begin: a cache line
_ALIGNMENT = 64
# sizes of memory; a header is now and then a few bytes longer than the one before
_GRAIN = 2**20
_BEGIN = services_pb2.TransferState.TRANSFER_BEGIN
_MIDDLE = services_pb2.TransferState.TRANSFER_MIDDLE
_END = services_pb2.TransferState.TRANSFER_END


def to_pieces(parts: list[Buffer], make: Callable, lock: AbstractContextManager | None = None) -> Iterator:
    """Yield a message as BEGIN, MIDDLE..., END; the END is empty, so one piece is never taken for a rest.

    Args:
        parts: of the message; one may be replaced by an equal one while ``lock`` is held.
        make: makes a piece of ``transfer_state`` and ``data``.
        lock: held while parts are read; None for parts that stay as they are.
    """
    state = _BEGIN
    for places in _places([len(part) for part in parts]):
        with lock or nullcontext():
            data = b"".join([memoryview(parts[number])[place] for number, place in places])
        yield make(transfer_state=state, data=data)
        state = _MIDDLE
    yield make(transfer_state=_END, data=b"")


def _places(sizes: list[int]) -> Iterator[list[tuple[int, slice]]]:
    """Yield which slices of which parts make the next piece."""
    places, room = [], PIECE_BYTES
    for number, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + room)
            places.append((number, slice(start, stop)))
            room -= stop - start
            start = stop
            if room == 0:
                yield places
                places, room = [], PIECE_BYTES
    if places:
        yield places


class Memory:
    """Memory for messages as they come; with ``keep``, that of a large one serves the next when nothing reads it any more.

    What comes fresh from the system takes several times as long to fill.
    """

    def __init__(self, keep: bool = False) -> None:
        self._keep = keep
        self._kept: np.ndarray | None = None

    def reserve(self, size: int, payload: int) -> memoryview:
        """Return memory for a message whose tensors begin at byte ``payload``, so that these are aligned.

        The system gives the memory when it is written, not now: who announces much and sends little holds little.

        Raises:
            WireError: when the machine has no more.
        """
        room = -(-(size + _ALIGNMENT) // _GRAIN) * _GRAIN if self._keep else size + _ALIGNMENT
        # every view and tensor in it refers to it; two are this object's and the call's
        if self._kept is not None and len(self._kept) == room and sys.getrefcount(self._kept) == 2:
            block = self._kept
        else:
            try:
                block = np.empty(room, np.uint8)
            except MemoryError as error:
                raise WireError(
                    f"the message announces {size} bytes, more than this machine has left"
                ) from error
        if self._keep and room > _GRAIN:
            self._kept = block
        start = -(block.ctypes.data + payload) % _ALIGNMENT
        return memoryview(block)[start : start + size]


def from_pieces(
    pieces: Iterable, max_bytes: int = MAX_BYTES, memory: Memory | None = None
) -> Iterator[memoryview]:
    """Yield whole messages; a BEGIN drops a half message before it.

    What will be refused is refused by its first bytes, and never more is kept than these announce.

    Args:
        pieces: as :func:`to_pieces` makes them.
        max_bytes: largest message accepted.
        memory: where messages are put; without it, each has memory of its own, of which this keeps nothing.

    Raises:
        WireError: for a piece without a BEGIN, an empty one, an unknown state, or a message that is none, without an
            END, larger than it announced, larger than ``max_bytes`` or than this machine's memory.
    """
    memory, message = memory or Memory(), None
    for piece in pieces:
        if piece.transfer_state == _BEGIN:
            message = _Message(max_bytes, memory)
        if message is None or piece.transfer_state not in (_BEGIN, _MIDDLE, _END):
            raise WireError("a piece of a message came without the message's beginning")
        # every look at this field is a copy
        data = piece.data
        if not data and piece.transfer_state != _END:
            raise WireError("a piece of a message is empty")
        message.add(data)
        if piece.transfer_state == _END:
            # no name here holds on to what may be as large as the policy
            done, message = [message.content], None
            yield done.pop()
    if message is not None:
        # whoever sent it must not take it for delivered
        raise WireError(f"the message was left after {len(message.content)} bytes, without its end")


class _Message:
    """The bytes of a message so far."""

    def __init__(self, max_bytes: int, memory: Memory) -> None:
        self._max_bytes, self._memory = max_bytes, memory
        self._start = bytearray()
        self._whole: memoryview | None = None
        self._size = 0

    @property
    def content(self) -> memoryview:
        """What has come."""
        return memoryview(self._start) if self._whole is None else self._whole[: self._size]

    def add(self, data: Buffer) -> None:
        """Add what has come; raises WireError when it is of no message, or too much."""
        if self._whole is None:
            self._start += data
            announced = announced_bytes(self._start, self._max_bytes)
            if announced is None:
                return
            self._whole, data = self._memory.reserve(announced, payload_start(self._start)), self._start
        if self._size + len(data) > len(self._whole):
            raise WireError(
                f"the message has more bytes than the {len(self._whole)} that its header announces"
            )
        self._whole[self._size : self._size + len(data)] = data
        self._size += len(data)
