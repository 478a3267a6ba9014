"""The actor's end of the connection."""

import logging
import threading
import time
from collections.abc import Callable, Iterable

import grpc
from lerobot.transport import services_pb2, services_pb2_grpc

from lerobot_pirl.transport.pieces import from_pieces, to_pieces
from lerobot_pirl.transport.security import OPEN, Security, address
from lerobot_pirl.transport.server import KEEPALIVE
from lerobot_pirl.wire import MAX_BYTES, Message, decode, encode

logger = logging.getLogger(__name__)

RETRY_S = 0.5


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
        security: Security = OPEN,
    ) -> None:
        """Prepare the connection; nothing is sent yet.

        Args:
            host, port: of the learner.
            connect_timeout: seconds without a learner after which calls give up.
            on_wait: called with the seconds waited so far, at first contact problems and then once a minute.
            max_bytes: largest message accepted.
            security: what the learner wants from its actors.
        """
        self.address = address(host, port)
        self.security = security
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
            channel = self._channel = self.security.channel(self.address, KEEPALIVE)
            self._stub = services_pb2_grpc.LearnerServiceStub(channel)
            waited = time.monotonic() - started
            try:
                self._stub.Ready(services_pb2.Empty(), timeout=5.0, metadata=self.security.metadata)
                break
            except grpc.RpcError as error:
                self.security.explain(error, self.address)
                if waited > self.connect_timeout:
                    raise ConnectionError(
                        f"no learner at {self.address} for {waited:.0f} s ({error.code().name}); start "
                        "`python -m lerobot.rl.learner` with the same config, or correct "
                        "algorithm.wire.host and algorithm.wire.port"
                    ) from error
            if waited >= report_at:
                self.on_wait(waited)
                report_at = waited + 60
            time.sleep(RETRY_S)
        self._weights = self._error = None
        stream = self._stub.StreamParameters(services_pb2.Empty(), metadata=self.security.metadata)
        threading.Thread(target=self._listen, args=(stream, channel), name="weights", daemon=True).start()

    def _listen(self, stream: Iterable, channel: grpc.Channel) -> None:
        """Keep the newest weights and the end message of a stream until it closes."""
        error: Exception = ConnectionError("the learner closed the connection")
        try:
            for data in from_pieces(stream, self.max_bytes):
                message = decode(data, self.max_bytes)
                self._tell(channel, "_end" if message.kind == "end" else "_weights", message)
        except grpc.RpcError as lost:
            error = ConnectionError(f"lost the learner ({lost.code().name})")
        except Exception as broken:  # whoever waits must hear of it
            error = broken
        self._tell(channel, "_error", error)

    def _tell(self, channel: grpc.Channel, what: str, value: Message | Exception) -> None:
        with self._condition:
            # a stream that was left for a new one has nothing more to say
            if channel is self._channel:
                setattr(self, what, value)
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
            ConnectionError: when the learner sends what is no message, or went away and none answers within
                ``connect_timeout`` seconds.
        """
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._weights or self._end or self._error)
                if self._weights or self._end:
                    message, self._weights = self._weights or self._end, None
                    return message
                error = self._error
            if not isinstance(error, ConnectionError):
                raise ConnectionError(
                    f"what the learner at {self.address} sends cannot be used: {error}"
                ) from error
            logger.warning("%s; waiting for it", error)
            self.connect()

    def send(self, message: Message) -> None:
        """Deliver a rollout or an evaluation, over a reconnection if need be; not after the learner's end.

        Raises:
            ConnectionError: when the learner refuses it or stays away.
        """
        data = encode(message)
        deadline = 60.0 + len(data) / 2**20
        while not self.ended:
            try:
                pieces = to_pieces(data, services_pb2.Transition)
                self._stub.SendTransitions(pieces, timeout=deadline, metadata=self.security.metadata)
                return
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
                    time.sleep(RETRY_S)
                    continue
                if error.code() == grpc.StatusCode.INVALID_ARGUMENT:
                    raise ConnectionError(
                        f"the learner refused the {message.kind}: {error.details()}"
                    ) from error
                if self.ended:
                    return
                logger.warning("lost the learner (%s); waiting for it", error.code().name)
                self.connect()

    def send_refusal(self, reason: str) -> None:
        """Tell the learner that this actor will not work with it, if it can be told."""
        try:
            message = Message("refusal", {"reason": reason})
            pieces = to_pieces(encode(message), services_pb2.InteractionMessage)
            self._stub.SendInteractions(pieces, timeout=10.0, metadata=self.security.metadata)
        except grpc.RpcError as error:
            logger.warning("the learner could not be told: %s", error.code().name)

    def close(self) -> None:
        """Close the connection."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
