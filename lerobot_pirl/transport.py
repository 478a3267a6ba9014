"""Learner and actor over LeRobot's own gRPC ``LearnerService``; the only module that speaks gRPC.

The learner publishes weights; every open ``StreamParameters`` stream gets the newest version, so a late or a
second actor is served like the first. Rollouts come through ``SendTransitions``, refusals through
``SendInteractions``. A message travels in pieces of 512 KiB between BEGIN and END.
"""

import ipaddress
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
from lerobot.transport import services_pb2, services_pb2_grpc

from lerobot_pirl.wire import MAX_BYTES, Message, WireError, decode, encode

logger = logging.getLogger(__name__)

PIECE_BYTES = 512 * 1024
# one per open stream plus what is in flight
SERVER_THREADS = 64
POLL_S = 0.5
END_GRACE_S = 10.0
_BEGIN = services_pb2.TransferState.TRANSFER_BEGIN
_MIDDLE = services_pb2.TransferState.TRANSFER_MIDDLE
_END = services_pb2.TransferState.TRANSFER_END
_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
]


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


class _Service(services_pb2_grpc.LearnerServiceServicer):
    """Answers the actors; all state is guarded by one condition."""

    def __init__(self, max_rollouts: int, max_bytes: int) -> None:
        self.inbox: queue.Queue[Message] = queue.Queue(max_rollouts)
        self.max_bytes = max_bytes
        self.condition = threading.Condition()
        self.published: bytes | None = None
        self.serial = 0
        self.last_words: bytes | None = None
        self.streams = 0

    def StreamParameters(self, request, context):  # noqa: N802
        """Stream every published message, newest first, until the end message."""
        with self.condition:
            self.streams += 1
        context.add_callback(self._wake)
        sent = 0
        try:
            while context.is_active():
                with self.condition:
                    self.condition.wait_for(
                        lambda seen=sent: self.serial > seen or self.last_words or not context.is_active(),
                        timeout=POLL_S,
                    )
                    fresh = self.published if self.serial > sent else None
                    sent, last_words = self.serial, self.last_words
                if fresh is not None:
                    yield from to_pieces(fresh, services_pb2.Parameters)
                elif last_words is not None:
                    yield from to_pieces(last_words, services_pb2.Parameters)
                    return
        finally:
            with self.condition:
                self.streams -= 1
                self.condition.notify_all()

    def _wake(self) -> None:
        with self.condition:
            self.condition.notify_all()

    def _receive(self, pieces, context, kind: str):
        try:
            for data in from_pieces(pieces, self.max_bytes):
                message = decode(data, self.max_bytes)
                if message.kind != kind:
                    raise WireError(f"a message of kind {message.kind!r} came where {kind!r} belongs")
                self.inbox.put_nowait(message)
        except WireError as error:
            logger.error("refused a message of %s: %s", context.peer(), error)
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except queue.Full:
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, "the learner has not used the last rollouts yet"
            )
        return services_pb2.Empty()

    def SendTransitions(self, request_iterator, context):  # noqa: N802
        """Take a rollout."""
        return self._receive(request_iterator, context, "rollout")

    def SendInteractions(self, request_iterator, context):  # noqa: N802
        """Take a refusal."""
        return self._receive(request_iterator, context, "refusal")

    def Ready(self, request, context):  # noqa: N802
        """Tell that the learner is there."""
        return services_pb2.Empty()


def _check_loopback(host: str) -> None:
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ValueError(
            f"algorithm.wire.host={host!r} is not a loopback address, and the connection is not encrypted; "
            "use 127.0.0.1 and an SSH tunnel between machines"
        )


class LearnerServer:
    """The learner's end."""

    def __init__(self, host: str, port: int, max_rollouts: int = 8, max_bytes: int = MAX_BYTES) -> None:
        """Bind and serve.

        Raises:
            ValueError: for an address that is not loopback.
            OSError: when the port is taken.
        """
        _check_loopback(host)
        self._service = _Service(max_rollouts, max_bytes)
        options = [("grpc.so_reuseport", 0), *_KEEPALIVE]
        self._server = grpc.server(ThreadPoolExecutor(SERVER_THREADS), options=options)
        services_pb2_grpc.add_LearnerServiceServicer_to_server(self._service, self._server)
        try:
            self.port = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError:
            self.port = 0
        if self.port == 0:
            raise OSError(
                f"port {port} on {host} is taken, perhaps by another learner; stop it or choose another one with "
                "--algorithm.wire.port in both terminals"
            )
        self._server.start()

    @property
    def num_actors(self) -> int:
        """Number of actors with an open stream."""
        return self._service.streams

    def publish(self, message: Message) -> None:
        """Offer a message to every actor, in place of the one before."""
        data = encode(message)
        service = self._service
        with service.condition:
            service.published = data
            service.serial += 1
            service.condition.notify_all()

    def receive(self, timeout: float) -> Message | None:
        """Return the next rollout or refusal, or None after ``timeout`` seconds."""
        try:
            return self._service.inbox.get(timeout=timeout)
        except queue.Empty:
            return None

    def end(self, ok: bool, reason: str = "") -> None:
        """Tell every actor that this is the end, wait until they know, and stop."""
        service = self._service
        with service.condition:
            service.last_words = encode(Message("end", {"ok": ok, "reason": reason}))
            service.condition.notify_all()
            service.condition.wait_for(lambda: service.streams == 0, timeout=END_GRACE_S)
        self._server.stop(grace=1.0).wait(2.0)

    def close(self) -> None:
        """Stop at once."""
        self._server.stop(grace=None)


class LearnerClient:
    """The actor's end; it survives the learner going away and coming back.

    A thread of its own takes what the learner streams, so that the end of a run is seen during a collection.
    """

    def __init__(
        self,
        host: str,
        port: int,
        connect_timeout: float,
        on_wait: Callable[[float], None] | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Prepare the connection; nothing is sent yet.

        Args:
            host, port: of the learner.
            connect_timeout: seconds without a learner after which calls give up.
            on_wait: called with the seconds waited so far, at first contact problems and then once a minute.
            max_bytes: largest message accepted.
        """
        self.address = f"{host}:{port}"
        self.connect_timeout = connect_timeout
        self.on_wait = on_wait or (lambda seconds: None)
        self.max_bytes = max_bytes
        self._channel: grpc.Channel | None = None
        self._condition = threading.Condition()
        self._weights: Message | None = None
        self._end: Message | None = None
        self._error: Exception | None = None

    def connect(self) -> None:
        """Wait for the learner and listen to it.

        Raises:
            ConnectionError: when none answers within ``connect_timeout`` seconds.
        """
        started = time.monotonic()
        report_at = 0.0
        while True:
            self.close()
            channel = self._channel = grpc.insecure_channel(self.address, options=_KEEPALIVE)
            self._stub = services_pb2_grpc.LearnerServiceStub(channel)
            waited = time.monotonic() - started
            try:
                self._stub.Ready(services_pb2.Empty(), timeout=5.0)
                break
            except grpc.RpcError as error:
                if waited > self.connect_timeout:
                    raise ConnectionError(
                        f"no learner at {self.address} for {waited:.0f} s ({error.code().name}); start "
                        "`python -m lerobot.rl.learner` with the same config, or correct "
                        "algorithm.wire.host and algorithm.wire.port"
                    ) from error
            if waited >= report_at:
                self.on_wait(waited)
                report_at = waited + 60
            time.sleep(POLL_S)
        self._weights = self._error = None
        stream = self._stub.StreamParameters(services_pb2.Empty())
        threading.Thread(target=self._listen, args=(stream, channel), name="weights", daemon=True).start()

    def _listen(self, stream: Iterable, channel: grpc.Channel) -> None:
        """Keep the newest weights and the end message of a stream until it closes."""
        error: Exception = ConnectionError("the learner closed the connection")
        try:
            for data in from_pieces(stream, self.max_bytes):
                message = decode(data, self.max_bytes)
                with self._condition:
                    if message.kind == "end":
                        self._end = message
                    else:
                        self._weights = message
                    self._condition.notify_all()
        except grpc.RpcError as lost:
            error = ConnectionError(f"lost the learner ({lost.code().name})")
        except WireError as broken:
            error = broken
        with self._condition:
            # a stream that was left for a new one has nothing more to say
            if channel is self._channel:
                self._error = error
                self._condition.notify_all()

    @property
    def ended(self) -> bool:
        """Whether the learner has said that the run is over."""
        return self._end is not None

    def next_weights(self) -> Message:
        """Wait for weights not returned before, or for the end message that follows the last.

        After a reconnection the learner's present weights count as new, whatever their version: a learner that
        was resumed may be behind.

        Raises:
            WireError: when the learner sends what is no message.
            ConnectionError: when it went away and none answers within ``connect_timeout`` seconds.
        """
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._weights or self._end or self._error)
                if self._weights or self._end:
                    message, self._weights = self._weights or self._end, None
                    return message
                error = self._error
            if isinstance(error, WireError):
                raise error
            logger.warning("%s; waiting for it", error)
            self.connect()

    def send_rollout(self, message: Message) -> None:
        """Deliver a rollout, over a reconnection if need be; not after the learner's end.

        Raises:
            ConnectionError: when the learner refuses it or stays away.
        """
        data = encode(message)
        deadline = 60.0 + len(data) / 2**20
        while not self.ended:
            try:
                pieces = to_pieces(data, services_pb2.Transition)
                self._stub.SendTransitions(pieces, timeout=deadline)
                return
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
                    time.sleep(POLL_S)
                    continue
                if error.code() == grpc.StatusCode.INVALID_ARGUMENT:
                    raise ConnectionError(f"the learner refused the rollout: {error.details()}") from error
                if self.ended:
                    return
                logger.warning("lost the learner (%s); waiting for it", error.code().name)
                self.connect()

    def send_refusal(self, reason: str) -> None:
        """Tell the learner that this actor will not work with it, if it can be told."""
        try:
            message = Message("refusal", {"reason": reason})
            pieces = to_pieces(encode(message), services_pb2.InteractionMessage)
            self._stub.SendInteractions(pieces, timeout=10.0)
        except grpc.RpcError as error:
            logger.warning("the learner could not be told: %s", error.code().name)

    def close(self) -> None:
        """Close the connection."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
