"""The actor's end of the connection."""

import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import grpc
from lerobot.transport import services_pb2, services_pb2_grpc

from lerobot_pirl.transport.pieces import Memory, from_pieces, to_pieces
from lerobot_pirl.transport.security import OPEN, Security, address
from lerobot_pirl.transport.server import ACTOR_KEY, PEER_TIMEOUT_S, keepalive
from lerobot_pirl.wire import MAX_BYTES, Message, decode, encode, encode_parts

logger = logging.getLogger(__name__)

RETRY_S = 0.5
ANSWER_TIMEOUT_S = 10.0
# of a connection by which an actor can still deliver
SLOWEST_BYTES_PER_S = 2**16
# messages that one call delivers
MAX_BATCH = 16
# what a learner that is there and has no time or no room answers
_BUSY = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)


class LearnerClient:
    """The actor's end; it survives the learner going away and coming back.

    One thread takes what the learner streams and connects again when it has to, so that the end of a run is seen
    during a collection; another one sends what is posted, so that no environment waits for it.

    Attributes:
        actor: the id by which the learner tells this actor from others.
    """

    def __init__(
        self,
        host: str,
        port: int,
        connect_timeout: float,
        on_wait: Callable[[float], None] | None = None,
        max_bytes: int = MAX_BYTES,
        peer_timeout_s: float = PEER_TIMEOUT_S,
        on_sent: Callable[[Message], None] | None = None,
        security: Security = OPEN,
    ) -> None:
        """Prepare the connection; nothing is sent yet.

        Args:
            host, port: of the learner.
            connect_timeout: seconds without a learner after which calls give up.
            on_wait: called with the seconds waited so far, at first contact problems and then once a minute.
            max_bytes: largest message accepted.
            peer_timeout_s: seconds after which a learner that does not answer counts as gone.
            on_sent: called with every posted message that the learner has taken.
            security: what the learner wants from its actors.
        """
        self.address = address(host, port)
        self.security = security
        self.connect_timeout = connect_timeout
        self.on_wait = on_wait or (lambda seconds: None)
        self.max_bytes = max_bytes
        self.on_sent = on_sent or (lambda message: None)
        self.actor = uuid.uuid4().hex[:8]
        self._options = keepalive(peer_timeout_s)
        self._channel: grpc.Channel | None = None
        self._closed = False
        self._condition = threading.Condition()
        self._weights: Message | None = None
        self._returned: tuple[str, int] | None = None
        self._shares: list[Message] = []
        self._end: Message | None = None
        self._error: Exception | None = None
        self._wish: Message | None = None
        self._memory = Memory(keep=True)
        self._posted: queue.SimpleQueue[Message | None] = queue.SimpleQueue()

    def connect(self) -> None:
        """Wait for the learner, and listen to it from now on.

        Raises:
            ConnectionError: when none answers within ``connect_timeout`` seconds.
        """
        stream = self._open()
        for name, work in (("listener", lambda: self._listen(stream)), ("sender", self._deliver)):
            threading.Thread(target=work, name=name, daemon=True).start()

    def _open(self) -> Iterable:
        """Return the stream of a new connection."""
        started = time.monotonic()
        report_at = 0.0
        while True:
            self._hang_up()
            self._channel = self.security.channel(self.address, self._options)
            self._stub = services_pb2_grpc.LearnerServiceStub(self._channel)
            waited = time.monotonic() - started
            try:
                self._call("Ready", services_pb2.Empty(), timeout=5.0)
                return self._call("StreamParameters", services_pb2.Empty())
            except grpc.RpcError as error:
                self.security.explain(error, self.address)
                if waited > self.connect_timeout or self._closed:
                    raise ConnectionError(
                        f"no learner at {self.address} for {waited:.0f} s ({error.code().name}); start "
                        "`python -m lerobot.rl.learner` with the same config, or correct "
                        "algorithm.wire.host and algorithm.wire.port"
                    ) from error
            if waited >= report_at:
                self.on_wait(waited)
                report_at = waited + 60
            time.sleep(RETRY_S)

    def _call(self, method: str, request: Any, timeout: float | None = None) -> Any:
        return getattr(self._stub, method)(
            request, timeout=timeout, metadata=[(ACTOR_KEY, self.actor), *self.security.metadata]
        )

    def _listen(self, stream: Iterable) -> None:
        """Keep what the learner streams; connect again when it is lost, until the end."""
        while True:
            error = self._read(stream)
            if self._end or self._closed:
                return
            if isinstance(error, ConnectionError):
                logger.warning("%s; waiting for it", error)
                try:
                    stream = self._open()
                    continue
                except ConnectionError as gone:
                    error = gone
            else:
                error = ConnectionError(f"what the learner at {self.address} sends cannot be used: {error}")
            self._fail(error)
            return

    def _read(self, stream: Iterable) -> Exception:
        """Keep the newest weights, all shares and the end message of a stream; return why it closed."""
        known = False
        try:
            for data in from_pieces(stream, self.max_bytes, self._memory):
                self._keep(decode(data, self.max_bytes))
                # what is waited for now may be as large again
                del data
                # a learner that forgot this actor with its former stream
                if self._wish and not known:
                    self._send_wish()
                known = True
        except grpc.RpcError as lost:
            return ConnectionError(f"lost the learner ({lost.code().name})")
        except Exception as broken:  # whoever waits must hear of it
            return broken
        return ConnectionError("the learner closed the connection")

    def _keep(self, message: Message) -> None:
        with self._condition:
            if message.kind == "end":
                self._end = message
            elif message.kind == "share":
                self._shares.append(message)
            elif _origin(message) is None or _origin(message) != self._returned:
                self._weights = message
            self._condition.notify_all()

    def _fail(self, error: Exception) -> None:
        with self._condition:
            self._error = self._error or error
            self._condition.notify_all()

    @property
    def ended(self) -> bool:
        """Whether the learner has said that the run is over, or is given up."""
        return self._end is not None or self._error is not None

    @property
    def news(self) -> dict[str, Any] | None:
        """The header of weights that were not returned yet, None without any."""
        weights = self._weights
        return weights.header if weights else None

    def next_message(self) -> Message:
        """Wait for weights not returned before, a share that follows them, or the end message that follows the last.

        After a reconnection the learner's present weights count as new, whatever their version, unless they are those
        that the same learner process sent before: one that was resumed may be behind.

        Raises:
            ConnectionError: when the learner sends what is no message, refuses what was posted, or went away and none
                answers within ``connect_timeout`` seconds.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._weights or self._shares or self._end or self._error)
            if self._weights:
                message, self._weights = self._weights, None
                self._returned = _origin(message)
                return message
            if self._shares and not self._end:
                return self._shares.pop(0)
            if self._end:
                return self._end
            raise self._error

    def pop_shares(self) -> list[Message]:
        """Return the shares that are there, without waiting; those that follow new weights come after these."""
        with self._condition:
            if self._weights:
                return []
            shares, self._shares = self._shares, []
            return shares

    def ask(self, session: str, slots: int) -> None:
        """Wish for episodes from now on, also after a reconnection.

        Args:
            session: of the learner process that is asked.
            slots: environments that are stepped side by side.
        """
        self._wish = Message("ask", {"session": session, "slots": slots})
        self._send_wish()

    def _send_wish(self) -> None:
        # one that does not arrive for another reason is sent again when the learner streams again
        while self._interact(self._wish) in _BUSY and not self.ended and not self._closed:
            time.sleep(RETRY_S)

    def post(self, message: Message) -> None:
        """Let a rollout or an evaluation be sent, over a reconnection if need be; not after the learner's end."""
        self._posted.put(message)

    def _deliver(self) -> None:
        while True:
            messages = [self._posted.get()]
            while not self._posted.empty() and len(messages) < MAX_BATCH:
                messages.append(self._posted.get())
            if None in messages:
                return
            try:
                self.send(*messages)
            except Exception as error:  # whoever waits must hear of it
                self._fail(error)
                return
            for message in messages:
                self.on_sent(message)

    def send(self, *messages: Message) -> None:
        """Deliver rollouts or evaluations, over a reconnection if need be; not after the learner's end.

        Raises:
            ConnectionError: when the learner refuses one.
        """
        encoded = [encode_parts(message) for message in messages]
        deadline = 60.0 + sum(len(part) for parts in encoded for part in parts) / SLOWEST_BYTES_PER_S
        while not self.ended and not self._closed:
            try:
                pieces = chain.from_iterable(to_pieces(parts, services_pb2.Transition) for parts in encoded)
                self._call("SendTransitions", pieces, timeout=deadline)
                return
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.INVALID_ARGUMENT:
                    raise ConnectionError(
                        f"the learner refused the {messages[0].kind}: {error.details()}"
                    ) from error
                if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                    logger.warning(
                        "the learner did not get what is there within %.0f s; trying again", deadline
                    )
            except ValueError:
                # the listener has just left this channel for a new one
                logger.debug("the channel was closed", exc_info=True)
            time.sleep(RETRY_S)
            if len(messages) > 1:
                # how many have arrived is unknown: one by one, no later one is lost to the time of all
                for message in messages:
                    self.send(message)
                return

    def send_refusal(self, reason: str) -> None:
        """Tell the learner that this actor will not work with it, if it can be told."""
        self._interact(Message("refusal", {"reason": reason}))

    def _interact(self, message: Message) -> grpc.StatusCode | None:
        """Tell the learner something; returns why it could not be told, if there is a code for it."""
        try:
            pieces = to_pieces([encode(message)], services_pb2.InteractionMessage)
            self._call("SendInteractions", pieces, timeout=ANSWER_TIMEOUT_S)
        except (grpc.RpcError, ValueError) as error:
            code = error.code() if isinstance(error, grpc.RpcError) else None
            logger.warning("the learner could not be told: %s", code.name if code else error)
            return code
        return None

    def _hang_up(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def close(self) -> None:
        """Close the connection."""
        self._closed = True
        self._posted.put(None)
        self._hang_up()


def _origin(weights: Message) -> tuple[str, int] | None:
    """Return which weights of which learner process a message holds, None where it does not say so."""
    session = weights.header.get("session")
    return None if session is None else (session, weights.header.get("policy_version"))
