"""The learner's end of the connection."""

import logging
import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
from lerobot.transport import services_pb2, services_pb2_grpc

from lerobot_pirl.transport.pieces import PIECE_BYTES, from_pieces, to_pieces
from lerobot_pirl.transport.security import OPEN, Security, address
from lerobot_pirl.wire import MAX_BYTES, Message, WireError, decode, encode

logger = logging.getLogger(__name__)

# one per open stream plus what is in flight
SERVER_THREADS = 64
STREAM_POLL_S = 0.5
END_GRACE_S = 10.0
SLOWEST_BYTES_PER_S = 10 * 2**20
KEEPALIVE = [
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
]


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
                        timeout=STREAM_POLL_S,
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

    def _receive(self, pieces, context, *kinds: str):
        try:
            for data in from_pieces(pieces, self.max_bytes):
                message = decode(data, self.max_bytes)
                if message.kind not in kinds:
                    raise WireError(f"a message of kind {message.kind!r} came where {kinds} belong")
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
        """Take a rollout or an evaluation."""
        return self._receive(request_iterator, context, "rollout", "evaluation")

    def SendInteractions(self, request_iterator, context):  # noqa: N802
        """Take a refusal."""
        return self._receive(request_iterator, context, "refusal")

    def Ready(self, request, context):  # noqa: N802
        """Tell that the learner is there."""
        return services_pb2.Empty()


class LearnerServer:
    """The learner's end."""

    def __init__(
        self,
        host: str,
        port: int,
        max_rollouts: int = 8,
        max_bytes: int = MAX_BYTES,
        security: Security = OPEN,
    ) -> None:
        """Bind and serve.

        Raises:
            ValueError: for an address that is not loopback without a token or TLS.
            OSError: when the port is taken.
        """
        security.check_host(host)
        self._service = _Service(max_rollouts, max_bytes)
        options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 2 * PIECE_BYTES), *KEEPALIVE]
        self._server = grpc.server(
            ThreadPoolExecutor(SERVER_THREADS), interceptors=security.interceptors(), options=options
        )
        services_pb2_grpc.add_LearnerServiceServicer_to_server(self._service, self._server)
        self.port = security.bind(self._server, address(host, port))
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
        # an actor behind a slow tunnel may still be fetching the last weights
        grace = END_GRACE_S + len(service.published or b"") / SLOWEST_BYTES_PER_S
        with service.condition:
            service.last_words = encode(Message("end", {"ok": ok, "reason": reason}))
            service.condition.notify_all()
            service.condition.wait_for(lambda: service.streams == 0, timeout=grace)
        self._server.stop(grace=1.0).wait(2.0)

    def close(self) -> None:
        """Stop at once."""
        self._server.stop(grace=None)
