"""The learner's end of the connection."""

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from lerobot.transport import services_pb2, services_pb2_grpc

from lerobot_pirl.transport.pieces import PIECE_BYTES, from_pieces, to_pieces
from lerobot_pirl.transport.security import OPEN, Security, address
from lerobot_pirl.wire import MAX_BYTES, Message, WireError, decode, encode, encode_parts

logger = logging.getLogger(__name__)

# one per open stream plus what is in flight; they are made when they are needed
SERVER_THREADS = 1024
STREAM_POLL_S = 0.5
END_GRACE_S = 10.0
SLOWEST_BYTES_PER_S = 10 * 2**20
# until a peer that does not answer counts as gone
PEER_TIMEOUT_S = 30.0
# messages of its own that an actor may leave unread
MAX_UNREAD = 1000
# how long a delivery waits for room before its actor is told to come again
FULL_S = 2.0
# metadata of every call: which actor makes it
ACTOR_KEY = "actor"
_ACTOR_CHARACTERS = 64


def keepalive(peer_timeout_s: float) -> list[tuple[str, int]]:
    """Return the gRPC options by which an end notices within so many seconds that the other is gone."""
    return [
        ("grpc.keepalive_time_ms", round(peer_timeout_s * 2000 / 3)),
        ("grpc.keepalive_timeout_ms", round(peer_timeout_s * 1000 / 3)),
        # of any ping, also those that measure the bandwidth; 60 s otherwise
        ("grpc.http2.ping_timeout_ms", round(peer_timeout_s * 1000 / 3)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # the other end may be more impatient than this one
        ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ]


@dataclass(eq=False)
class _Stream:
    """What one actor has not been sent yet.

    Attributes:
        outbox: messages for it alone.
        sent: serial of the published message that it was sent last.
        over: whether it was told of the end.
    """

    outbox: list[bytes] = field(default_factory=list)
    sent: int = 0
    over: bool = False


class Publication:
    """What every actor is offered, read from the tensors' own memory until it is detached from them.

    Attributes:
        parts: its bytes; replaced by copies of them when the tensors are about to change and somebody still reads.
        lock: held by who reads or replaces parts.
        readers: streams that are sending it; guarded by the service's condition.
    """

    def __init__(self, message: Message) -> None:
        self.parts = encode_parts(message)
        self.lock = threading.Lock()
        self.readers = 0

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def detach(self) -> None:
        """Copy the parts, one after the other: readers go on with equal bytes."""
        for number, part in enumerate(self.parts):
            with self.lock:
                self.parts[number] = bytes(part)


class _Service(services_pb2_grpc.LearnerServiceServicer):
    """Answers the actors; all state is guarded by one condition."""

    def __init__(self, max_rollouts: int, max_bytes: int) -> None:
        self.inbox: queue.Queue[Message] = queue.Queue(max_rollouts)
        self.max_bytes = max_bytes
        self.condition = threading.Condition()
        # None also while the tensors of the last one change
        self.published: Publication | None = None
        self.serial = 0
        self.last_words: bytes | None = None
        self.streams: dict[str, _Stream] = {}

    def StreamParameters(self, request, context):  # noqa: N802
        """Stream the published message, in its newest version, and an actor's own, until the end message."""
        actor, stream = _actor(context), _Stream()
        with self.condition:
            # of an actor that connects again the former stream may not be known to be dead
            self.streams[actor] = stream
            self.condition.notify_all()
        context.add_callback(self._wake)

        def is_served() -> bool:
            return context.is_active() and self.streams.get(actor) is stream and not stream.over

        try:
            while is_served():
                published, others = self._news(stream, is_served)
                if published:
                    yield from self._read(published)
                for data in others:
                    yield from to_pieces([data], services_pb2.Parameters)
        finally:
            with self.condition:
                if self.streams.get(actor) is stream:
                    del self.streams[actor]
                self.condition.notify_all()

    def _news(self, stream: _Stream, is_served: Callable[[], bool]) -> tuple[Publication | None, list[bytes]]:
        """Wait a little for what an actor has not been sent: what is published comes before what refers to it."""

        def is_behind() -> bool:
            return self.serial > stream.sent

        with self.condition:
            self.condition.wait_for(
                lambda: (
                    (self.published if is_behind() else stream.outbox) or self.last_words or not is_served()
                ),
                timeout=STREAM_POLL_S,
            )
            published = self.published if is_behind() else None
            if published:
                published.readers += 1
                stream.sent = self.serial
            others = []
            if not is_behind():
                others, stream.outbox = stream.outbox, []
            if not published and not others and self.last_words:
                others, stream.over = [self.last_words], True
            return published, others

    def _read(self, published: Publication) -> Iterator:
        try:
            yield from to_pieces(published.parts, services_pb2.Parameters, published.lock)
        finally:
            with self.condition:
                published.readers -= 1
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
                message.header[ACTOR_KEY] = _actor(context)
                self.inbox.put(message, timeout=FULL_S)
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
        """Take a refusal, or the wish for episodes."""
        return self._receive(request_iterator, context, "refusal", "ask")

    def Ready(self, request, context):  # noqa: N802
        """Tell that the learner is there."""
        return services_pb2.Empty()


def _actor(context: Any) -> str:
    """Return the id that an actor gave itself, or its address."""
    metadata = dict(context.invocation_metadata())
    return str(metadata.get(ACTOR_KEY) or context.peer())[:_ACTOR_CHARACTERS]


class LearnerServer:
    """The learner's end.

    Attributes:
        port: on which it listens.
        closed: whether it serves nobody any more.
    """

    def __init__(
        self,
        host: str,
        port: int,
        max_rollouts: int = 8,
        max_bytes: int = MAX_BYTES,
        peer_timeout_s: float = PEER_TIMEOUT_S,
        security: Security = OPEN,
    ) -> None:
        """Bind and serve.

        Raises:
            ValueError: for an address that is not loopback without a token or TLS.
            OSError: when the port is taken.
        """
        security.check_host(host)
        self.closed = False
        self._service = _Service(max_rollouts, max_bytes)
        options = [
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", 2 * PIECE_BYTES),
            *keepalive(peer_timeout_s),
        ]
        self._server = grpc.server(
            ThreadPoolExecutor(SERVER_THREADS),
            interceptors=security.interceptors(),
            options=options,
            # more would wait without a bound
            maximum_concurrent_rpcs=SERVER_THREADS,
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
    def actors(self) -> list[str]:
        """The ids of the actors with an open stream."""
        with self._service.condition:
            return list(self._service.streams)

    @property
    def num_actors(self) -> int:
        """Number of actors with an open stream."""
        return len(self.actors)

    def tell(self, actor: str, message: Message) -> None:
        """Send a message to one actor, after what is published; it is lost with the actor's stream.

        An actor that leaves more than :data:`MAX_UNREAD` of them unread loses its stream.
        """
        data, service = encode(message), self._service
        with service.condition:
            if actor in service.streams:
                service.streams[actor].outbox.append(data)
                if len(service.streams[actor].outbox) > MAX_UNREAD:
                    del service.streams[actor]
                service.condition.notify_all()

    def publish(self, message: Message) -> None:
        """Offer a message to every actor, in place of the one before.

        It is sent from the memory of its tensors: before these change, call :meth:`withdraw`.
        """
        publication, service = Publication(message), self._service
        with service.condition:
            service.published = publication
            service.serial += 1
            service.condition.notify_all()

    def withdraw(self) -> None:
        """Let the tensors of what is published change: who receives it gets it whole, who comes later waits for the next."""
        service = self._service
        with service.condition:
            published, service.published = service.published, None
            is_read = published is not None and published.readers > 0
        if is_read:
            published.detach()

    def receive(self, timeout: float) -> Message | None:
        """Return the next message of an actor, with its id in the header, or None after ``timeout`` seconds."""
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
            service.condition.wait_for(lambda: not service.streams, timeout=grace)
        self.closed = True
        self._server.stop(grace=1.0).wait(2.0)

    def close(self) -> None:
        """Stop at once."""
        self.closed = True
        self._server.stop(grace=None)
