"""A message in pieces: what LeRobot's service streams between BEGIN and END."""

from collections.abc import Iterable, Iterator

from lerobot.transport import services_pb2

from lerobot_pirl.wire import MAX_BYTES, WireError, announced_bytes

PIECE_BYTES = 512 * 1024
_BEGIN = services_pb2.TransferState.TRANSFER_BEGIN
_MIDDLE = services_pb2.TransferState.TRANSFER_MIDDLE
_END = services_pb2.TransferState.TRANSFER_END


def to_pieces(data: bytes, piece_class: type) -> Iterator:
    """Yield a message as BEGIN, MIDDLE..., END; the END is empty, so one piece is never taken for a rest."""
    view = memoryview(data)
    for start in range(0, len(data), PIECE_BYTES):
        state = _MIDDLE if start else _BEGIN
        yield piece_class(transfer_state=state, data=bytes(view[start : start + PIECE_BYTES]))
    yield piece_class(transfer_state=_END, data=b"")


def from_pieces(pieces: Iterable, max_bytes: int = MAX_BYTES) -> Iterator[bytearray]:
    """Yield whole messages; a BEGIN drops a half message before it.

    What will be refused is refused by its first bytes, and never more is kept than these announce.

    Raises:
        WireError: for a piece without a BEGIN, an empty one, an unknown state, or a message that is none, larger than
            it announced or larger than ``max_bytes``.
    """
    message: bytearray | None = None
    announced: int | None = None
    for piece in pieces:
        if piece.transfer_state == _BEGIN:
            message, announced = bytearray(), None
        if message is None or piece.transfer_state not in (_BEGIN, _MIDDLE, _END):
            raise WireError("a piece of a message came without the message's beginning")
        if not piece.data and piece.transfer_state != _END:
            raise WireError("a piece of a message is empty")
        # amortised: a sender of tiny pieces costs no more memory than bytes
        message += piece.data
        if announced is None:
            announced = announced_bytes(message, max_bytes)
        if announced is not None and len(message) > announced:
            raise WireError(f"the message has more bytes than the {announced} that its header announces")
        if piece.transfer_state == _END:
            yield message
            message = None
