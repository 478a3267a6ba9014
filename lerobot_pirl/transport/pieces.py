"""A message in pieces: what LeRobot's service streams between BEGIN and END."""

from collections.abc import Iterable, Iterator

from lerobot.transport import services_pb2

from lerobot_pirl.wire import MAX_BYTES, WireError

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


def from_pieces(pieces: Iterable, max_bytes: int = MAX_BYTES) -> Iterator[bytes]:
    """Yield whole messages; a BEGIN drops a half message before it.

    Raises:
        WireError: for a piece without a BEGIN, an unknown state, or a message over ``max_bytes``.
    """
    parts: list[bytes] | None = None
    size = 0
    for piece in pieces:
        if piece.transfer_state == _BEGIN:
            parts, size = [], 0
        if parts is None or piece.transfer_state not in (_BEGIN, _MIDDLE, _END):
            raise WireError("a piece of a message came without the message's beginning")
        size += len(piece.data)
        if size > max_bytes:
            raise WireError(f"a message exceeds the {max_bytes} bytes allowed")
        parts.append(piece.data)
        if piece.transfer_state == _END:
            yield b"".join(parts)
            parts = None
