"""Learner and actor ends over real gRPC on loopback, in one process."""

import contextlib
import re
import socket
import struct
import threading
import time
import weakref
from itertools import chain

import grpc
import pytest
import torch
from lerobot.transport import services_pb2, services_pb2_grpc

from lerobot_pirl.transport import LearnerClient, LearnerServer
from lerobot_pirl.transport.pieces import Memory, _Message, from_pieces, to_pieces
from lerobot_pirl.transport.server import ACTOR_KEY, Publication, _Stream
from lerobot_pirl.wire import Message, WireError, decode, encode, payload_start


@pytest.fixture
def server():
    server = LearnerServer("127.0.0.1", 0)
    yield server
    server.close()


@pytest.fixture
def client(server):
    client = connect(server.port)
    yield client
    client.close()


def connect(port: int, connect_timeout: float = 10.0, **options) -> LearnerClient:
    client = LearnerClient("127.0.0.1", port, connect_timeout, **options)
    client.connect()
    return client


def weights(version: int, size: int = 4) -> Message:
    return Message("weights", {"policy_version": version}, {"w": torch.full((size,), float(version))})


def rollout(version: int) -> Message:
    return Message("rollout", {"policy_version": version}, {"rewards": torch.ones(3)})


def stub(port: int) -> services_pb2_grpc.LearnerServiceStub:
    return services_pb2_grpc.LearnerServiceStub(grpc.insecure_channel(f"127.0.0.1:{port}"))


def test_weights_arrive_whole_in_order_and_rollouts_come_back(server, client):
    for version in range(3):
        server.publish(weights(version, size=300_000))  # more than one piece
        message = client.next_message()
        assert message.header["policy_version"] == version
        assert torch.equal(message.tensors["w"], torch.full((300_000,), float(version)))
        client.send(rollout(version))
        assert server.receive(timeout=10).header["policy_version"] == version


def test_every_actor_gets_every_version_and_a_late_one_the_newest(server, client):
    server.publish(weights(0))
    assert client.next_message().header["policy_version"] == 0
    server.publish(weights(1))
    assert client.next_message().header["policy_version"] == 1
    late = connect(server.port)
    assert late.next_message().header["policy_version"] == 1
    server.publish(weights(2))
    assert [c.next_message().header["policy_version"] for c in (client, late)] == [2, 2]
    late.close()


def test_the_end_follows_the_last_weights(server, client):
    assert present(server, client.actor)
    server.publish(weights(7))
    server.end(ok=True, reason="7 updates are done")
    assert client.next_message().header["policy_version"] == 7
    end = client.next_message()
    assert (end.kind, end.header) == ("end", {"ok": True, "reason": "7 updates are done"})


def test_the_end_is_seen_without_asking_and_stops_deliveries(server, client):
    server.publish(weights(0))
    client.next_message()
    assert not client.ended
    server.end(ok=False, reason="interrupted")
    with client._condition:
        client._condition.wait_for(lambda: client.ended, timeout=10)
    assert client.ended
    client.send(rollout(0))  # returns instead of waiting for a learner that will not come back


def test_a_refusal_reaches_the_learner(server, client):
    client.send_refusal("gamma differs")
    message = server.receive(timeout=10)
    assert (message.kind, message.header["reason"]) == ("refusal", "gamma differs")


def test_actors_are_counted_while_they_listen(server, client):
    service = server._service
    with service.condition:
        assert service.condition.wait_for(lambda: server.num_actors == 1, timeout=10)
    client.close()
    with service.condition:
        assert service.condition.wait_for(lambda: server.num_actors == 0, timeout=10)


def test_a_learner_that_comes_back_behind_is_followed():
    first = LearnerServer("127.0.0.1", 0)
    waits = []
    client = connect(first.port, on_wait=waits.append)
    first.publish(weights(5))
    assert client.next_message().header["policy_version"] == 5
    first.close()
    again = LearnerServer("127.0.0.1", first.port)
    again.publish(weights(3))
    assert client.next_message().header["policy_version"] == 3
    client.send(rollout(3))
    assert again.receive(timeout=10).header["policy_version"] == 3
    client.close()
    again.close()


def test_a_delivery_waits_for_a_learner_that_comes_back():
    first = LearnerServer("127.0.0.1", 0)
    client = connect(first.port)
    first.publish(weights(0))
    client.next_message()
    first.close()
    sender = threading.Thread(target=client.send, args=(rollout(0),))
    sender.start()
    again = LearnerServer("127.0.0.1", first.port)
    assert again.receive(timeout=20).header["policy_version"] == 0
    sender.join(10)
    assert not sender.is_alive()
    client.close()
    again.close()


def test_a_full_inbox_makes_the_actor_wait_and_loses_nothing(monkeypatch):
    monkeypatch.setattr("lerobot_pirl.transport.client.RETRY_S", 0.05)
    server = LearnerServer("127.0.0.1", 0, max_rollouts=1)
    client = connect(server.port)
    sender = threading.Thread(target=lambda: [client.send(rollout(v)) for v in range(3)])
    sender.start()
    versions = [server.receive(timeout=10).header["policy_version"] for _ in range(3)]
    assert versions == [0, 1, 2]
    sender.join(10)
    client.close()
    server.close()


class TooLate(grpc.RpcError):
    """What a call ends with whose time is over."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.DEADLINE_EXCEEDED


def test_what_a_slow_line_has_cut_goes_on_one_by_one(server, client, monkeypatch, caplog):
    monkeypatch.setattr("lerobot_pirl.transport.client.RETRY_S", 0.05)
    call, calls = client._call, []

    def cut_the_first(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 1:
            raise TooLate
        return call(*arguments, **options)

    monkeypatch.setattr(client, "_call", cut_the_first)
    client.send(*map(rollout, range(3)))
    assert len(calls) == 4
    assert [server.receive(timeout=10).header["policy_version"] for _ in range(3)] == [0, 1, 2]
    assert caplog.text.count("the learner did not get what is there within 60 s; trying again") == 1


def test_an_actor_that_reads_nothing_of_its_own_loses_its_stream(server, monkeypatch):
    monkeypatch.setattr("lerobot_pirl.transport.server.MAX_UNREAD", 3)
    server._service.streams["deaf"] = _Stream()
    for _ in range(3):
        server.tell("deaf", Message("share", {}))
    assert server.actors == ["deaf"]
    server.tell("deaf", Message("share", {}))
    assert server.actors == []


def test_no_learner_is_one_sentence_after_the_timeout():
    with LearnerServerPort() as port:
        waits = []
        client = LearnerClient("127.0.0.1", port, connect_timeout=0.2, on_wait=waits.append)
        with pytest.raises(ConnectionError, match=rf"no learner at 127.0.0.1:{port} .* algorithm.wire.port"):
            client.connect()
        assert waits
        client.close()


class LearnerServerPort:
    """A port on which nothing listens."""

    def __enter__(self) -> int:
        server = LearnerServer("127.0.0.1", 0)
        server.close()
        return server.port

    def __exit__(self, *_) -> None:
        return None


def test_a_taken_port_is_named(server):
    with pytest.raises(OSError, match=rf"port {server.port} on 127.0.0.1 is taken"):
        LearnerServer("127.0.0.1", server.port)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "learner.example"])
def test_an_address_that_others_reach_is_refused(host):
    with pytest.raises(ValueError, match="loopback address"):
        LearnerServer(host, 0)


@pytest.mark.parametrize(
    "data",
    [b"", b"garbage", encode(rollout(0))[:-1], encode(Message("refusal", {"reason": "x"}))],
    ids=["empty", "garbage", "cut short", "wrong kind"],
)
def test_bytes_that_are_no_rollout_are_refused_and_the_learner_serves_on(server, client, data):
    with pytest.raises(grpc.RpcError) as refused:
        stub(server.port).SendTransitions(to_pieces([data], services_pb2.Transition), timeout=10)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    client.send(rollout(1))
    assert server.receive(timeout=10).header["policy_version"] == 1


def test_a_pickle_is_never_loaded(server, client, tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "pwned"), "w")

    pieces = to_pieces([pickle.dumps(Evil())], services_pb2.InteractionMessage)
    with pytest.raises(grpc.RpcError):
        stub(server.port).SendInteractions(pieces, timeout=10)
    assert not (tmp_path / "pwned").exists()


def share(number: int) -> Message:
    return Message("share", {"numbers": [number]})


def present(server: LearnerServer, *actors: str) -> bool:
    """Wait until exactly these actors listen."""
    with server._service.condition:
        return server._service.condition.wait_for(lambda: set(server.actors) == set(actors), timeout=10)


def test_a_share_reaches_one_actor_alone_after_the_weights_that_it_belongs_to(server, client):
    other = connect(server.port)
    assert present(server, client.actor, other.actor)
    server.publish(weights(0))
    server.tell(client.actor, share(1))
    server.tell(other.actor, share(2))
    server.tell("nobody", share(3))
    for each, number in ((client, 1), (other, 2)):
        assert each.next_message().header["policy_version"] == 0
        assert each.next_message().header["numbers"] == [number]
    server.tell(client.actor, share(4))
    server.publish(weights(1))
    server.tell(client.actor, share(5))
    with client._condition:
        assert client._condition.wait_for(lambda: client._weights and len(client._shares) == 2, timeout=10)
    # shares wait behind weights, of which only the newest counts
    assert client.news["policy_version"] == 1
    assert client.pop_shares() == []
    assert client.next_message().header["policy_version"] == 1
    assert [each.header["numbers"] for each in client.pop_shares()] == [[4], [5]]
    assert client.news is None
    other.close()


def test_an_actor_that_connects_again_takes_the_place_of_its_former_stream(server, client):
    assert present(server, client.actor)
    service = server._service
    former = service.streams[client.actor]
    again = LearnerClient("127.0.0.1", server.port, 10.0)
    again.actor = client.actor
    client._closed = True  # what is left of a former life does not come back
    again.connect()
    with service.condition:
        assert service.condition.wait_for(
            lambda: service.streams.get(again.actor) not in (None, former), timeout=10
        )
    server.tell(again.actor, share(1))
    assert again.next_message().header["numbers"] == [1]
    assert present(server, again.actor)
    assert client._shares == []
    again.close()


def test_what_is_posted_is_sent_in_order_with_its_sender_and_told_when_it_is_taken(server):
    taken = []
    client = connect(server.port, on_sent=taken.append)
    for version in range(40):
        client.post(rollout(version))
    received = [server.receive(timeout=10).header for _ in range(40)]
    assert [header["policy_version"] for header in received] == list(range(40))
    assert {header["actor"] for header in received} == {client.actor}
    deadline = time.monotonic() + 10
    while len(taken) < 40 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [message.header["policy_version"] for message in taken] == list(range(40))
    client.close()


def test_what_is_posted_and_refused_ends_the_wait_with_a_sentence(server, client):
    client.post(Message("refusal", {"reason": "x"}))
    with pytest.raises(ConnectionError, match="the learner refused the refusal: .*where .* belong"):
        client.next_message()


def test_an_actor_asks_again_after_a_reconnection():
    first = LearnerServer("127.0.0.1", 0)
    client = connect(first.port)
    first.publish(weights(0))
    client.next_message()
    client.ask("a session", 3)
    assert first.receive(timeout=10).header == {"session": "a session", "slots": 3, "actor": client.actor}
    first.close()
    again = LearnerServer("127.0.0.1", first.port)
    again.publish(weights(0))
    assert again.receive(timeout=20).header == {"session": "a session", "slots": 3, "actor": client.actor}
    client.close()
    again.close()


def test_weights_that_the_same_learner_process_sends_again_are_not_returned_again():
    first = LearnerServer("127.0.0.1", 0)
    client = connect(first.port)
    first.publish(Message("weights", {"session": "a", "policy_version": 1}))
    assert client.next_message().header["session"] == "a"
    port = first.port
    first.close()
    # the same ones, and a share that follows them
    again = LearnerServer("127.0.0.1", port)
    again.publish(Message("weights", {"session": "a", "policy_version": 1}))
    assert present(again, client.actor)
    again.tell(client.actor, share(1))
    assert client.next_message().header == {"numbers": [1]}
    again.close()
    # another process, at the same version
    third = LearnerServer("127.0.0.1", port)
    third.publish(Message("weights", {"session": "b", "policy_version": 1}))
    assert client.next_message().header == {"session": "b", "policy_version": 1}
    client.close()
    third.close()


class Wire:
    """Carries bytes between a client and a server until it is cut: then both ends hear nothing more, and no goodbye."""

    def __init__(self, port: int) -> None:
        self.target, self.cut = port, threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                self.sockets += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not self.cut.is_set():
                    target.sendall(data)

    def close(self) -> None:
        for each in (self.listener, *self.sockets):
            each.close()


def test_both_ends_notice_within_their_time_that_the_other_does_not_answer():
    server = LearnerServer("127.0.0.1", 0, peer_timeout_s=3)
    wire = Wire(server.port)
    waits = []
    client = connect(wire.port, peer_timeout_s=3, on_wait=waits.append)
    server.publish(weights(0))
    client.next_message()
    assert present(server, client.actor)
    wire.cut.set()
    deadline = time.monotonic() + 60
    while (server.num_actors or not waits) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.num_actors == 0
    assert waits
    client.close()
    server.close()
    wire.close()


def test_a_learner_that_sends_garbage_is_an_error_not_a_wait(server, client):
    service = server._service
    publication = Publication(weights(0))
    publication.parts = [b"garbage"]
    with service.condition:
        service.published, service.serial = publication, 1
        service.condition.notify_all()
    with pytest.raises(ConnectionError, match="cannot be used: the message ends after 7 bytes"):
        client.next_message()


def read_message(stream) -> Message:
    return decode(next(from_pieces(stream)))


def hold(message: Message) -> torch.Tensor:
    (tensor,) = message.tensors.values()
    return tensor


def test_a_stream_that_an_update_overtakes_delivers_its_version_whole(server):
    slow = stub(server.port).StreamParameters(services_pb2.Empty())
    message = weights(0, size=4_000_000)  # more than the flow-control window takes
    server.publish(message)
    begun = [next(slow)]
    server.withdraw()
    hold(message).fill_(1)
    server.publish(Message("weights", {"policy_version": 1}, message.tensors))
    first = read_message(chain(begun, slow))
    second = read_message(slow)
    assert [each.header["policy_version"] for each in (first, second)] == [0, 1]
    assert hold(first).eq(0).all() and hold(second).eq(1).all()
    slow.cancel()


def test_weights_that_nobody_reads_are_sent_from_their_own_memory_and_never_copied(server, client):
    message = weights(3)
    server.publish(message)
    publication = server._service.published
    assert client.next_message().header["policy_version"] == 3
    with server._service.condition:
        server._service.condition.wait_for(lambda: publication.readers == 0, timeout=10)
    server.withdraw()
    hold(message).fill_(7)
    assert torch.frombuffer(bytearray(publication.parts[-1]), dtype=torch.float32).eq(7).all()


def test_who_comes_while_the_weights_change_waits_for_the_next_and_for_what_refers_to_it(server):
    message = weights(0)
    server.publish(message)
    server.withdraw()
    hold(message).fill_(5)
    late = connect(server.port)
    assert present(server, late.actor)
    server.tell(late.actor, share(8))
    with late._condition:
        assert not late._condition.wait_for(lambda: late._weights or late._shares, timeout=1.5)
    server.publish(Message("weights", {"policy_version": 1}, message.tensors))
    arrived = late.next_message()
    assert (arrived.header["policy_version"], float(hold(arrived).max())) == (1, 5.0)
    assert late.next_message().header == {"numbers": [8]}
    late.close()


def test_the_end_is_told_also_while_there_are_no_weights(server):
    server.publish(weights(0))
    server.withdraw()
    late = connect(server.port)
    assert present(server, late.actor)
    server.end(ok=False, reason="interrupted")
    assert late.next_message().header == {"ok": False, "reason": "interrupted"}
    late.close()


def test_an_actor_never_gets_a_mix_of_two_versions_while_updates_overtake_its_streams(server):
    tensors = {name: torch.zeros(300_000) for name in "abc"}
    stop = threading.Event()

    def learn():
        version = 0
        while not stop.is_set():
            server.withdraw()
            for tensor in tensors.values():
                tensor.fill_(version)
            server.publish(Message("weights", {"policy_version": version}, tensors))
            publication = server._service.published
            while not publication.readers and not stop.is_set():
                time.sleep(0.0005)
            version += 1

    learning = threading.Thread(target=learn)
    learning.start()
    try:
        streams = [
            stub(server.port).StreamParameters(services_pb2.Empty(), metadata=[(ACTOR_KEY, name)])
            for name in "xy"
        ]
        for _ in range(10):
            for stream in streams:
                message = read_message(stream)
                for tensor in message.tensors.values():
                    assert tensor.eq(message.header["policy_version"]).all()
    finally:
        stop.set()
        learning.join(30)
    for stream in streams:
        stream.cancel()


def test_a_received_message_is_in_aligned_memory_which_only_its_reader_keeps():
    for text in ("", "x", "xyz"):
        message = Message("weights", {"text": text}, {"w": torch.arange(5.0)})
        whole = from_pieces(to_pieces([encode(message)], services_pb2.Transition))
        data = next(whole)
        weight = decode(data).tensors["w"]
        payload = weight.data_ptr() - (len(data) - weight.nbytes) + payload_start(data)
        assert payload % 64 == 0
        data[-4:] = bytes(4)
        assert weight.tolist() == [0, 1, 2, 3, 0]
        memory = weakref.ref(data.obj)
        assert memory() is not None
        del data, weight
        assert memory() is None


def test_an_actors_memory_serves_the_next_message_once_nothing_reads_the_one_before():
    memory = Memory(keep=True)

    def receive(version: int) -> Message:
        pieces = to_pieces([encode(weights(version, size=2**20))], services_pb2.Transition)
        return decode(next(from_pieces(pieces, memory=memory)))

    def block() -> int:
        return memory._kept.ctypes.data

    first = receive(9)
    place, kept = block(), next(iter(first.tensors.values()))[:3]
    del first
    # what a single view of it still reads stays as it is
    second = receive(10)
    assert block() != place
    assert kept.tolist() == [9, 9, 9]
    place = block()
    second.tensors.clear()
    third = receive(11)
    assert block() == place
    assert next(iter(third.tensors.values()))[-1] == 11
    # a small message in between does not take it
    third.tensors.clear()
    list(from_pieces(to_pieces([encode(rollout(0))], services_pb2.Transition), memory=memory))
    assert receive(12).tensors and block() == place


def test_who_announces_much_and_sends_little_holds_little(monkeypatch):
    resource = pytest.importorskip("resource")
    start = bytearray(encode(weights(0))[:200])
    struct.pack_into("<Q", start, 10, 2 * 2**30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    messages = [_Message(2**40, Memory()) for _ in range(8)]
    for message in messages:
        message.add(bytes(start))
    assert all(message.content == start for message in messages)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16

    def refuse(*args):
        raise MemoryError

    monkeypatch.setattr("numpy.empty", refuse)
    with pytest.raises(WireError, match="more than this machine has left"):
        _Message(2**40, Memory()).add(bytes(start))


def test_a_message_in_one_piece_never_takes_a_former_rest_along():
    begun = list(to_pieces([encode(rollout(1))], services_pb2.Transition))[:1]
    whole = list(to_pieces([encode(rollout(2))], services_pb2.Transition))
    assert list(from_pieces(begun + whole)) == [encode(rollout(2))]


def piece(state: str, data: bytes) -> services_pb2.Transition:
    number = getattr(services_pb2.TransferState, f"TRANSFER_{state}")
    return services_pb2.Transition(transfer_state=number, data=data)


def test_pieces_may_be_of_any_size():
    data = encode(rollout(0))
    pieces = [piece("MIDDLE", bytes([byte])) for byte in data]
    assert list(from_pieces([piece("BEGIN", data[:1]), *pieces[1:], piece("END", b"")])) == [data]


BAD_PIECES = {
    "no beginning": ([("MIDDLE", b"x")], "without the message's beginning"),
    "end alone": ([("END", b"x")], "without the message's beginning"),
    "after the end": ([("BEGIN", b"x"), ("END", b""), ("MIDDLE", b"y")], "without the message's beginning"),
    "unknown state": ([("BEGIN", b"x"), ("UNKNOWN", b"y")], "without the message's beginning"),
    "empty beginning": ([("BEGIN", b"")], "is empty"),
    "empty middle": ([("BEGIN", b"x"), ("MIDDLE", b"")], "is empty"),
    "no message": ([("BEGIN", b"x" * 100)], "instead of b'PIRL'"),
    "larger than announced": (
        [("BEGIN", encode(rollout(0))), ("MIDDLE", b"x")],
        f"more bytes than the {len(encode(rollout(0)))} that its header announces",
    ),
}


@pytest.mark.parametrize(("pieces", "expected"), BAD_PIECES.values(), ids=BAD_PIECES)
def test_pieces_that_make_no_message_are_refused_when_they_come(pieces, expected):
    def endless():
        for state, data in pieces:
            yield piece(state, data)
        pytest.fail("asked for more after what had to be refused")

    with pytest.raises(WireError, match=re.escape(expected)):
        list(from_pieces(endless()))


def test_a_message_over_the_limit_is_refused_by_its_first_piece():
    data = encode(weights(0, size=1_000_000))
    with pytest.raises(WireError, match="more than the 1000000 allowed"):
        next(from_pieces(iter([piece("BEGIN", data[:60])]), max_bytes=1_000_000))


def test_a_delivery_has_as_long_as_a_slow_line_takes(client, monkeypatch):
    given = []
    monkeypatch.setattr(client, "_call", lambda method, pieces, timeout: given.append(timeout))
    client.send(rollout(0))
    client.send(weights(0, size=2**22))
    assert given == pytest.approx([60, 60 + 2**24 / 2**16], abs=1)


def test_calls_beyond_the_threads_are_refused_and_do_not_queue(monkeypatch):
    monkeypatch.setattr("lerobot_pirl.transport.server.SERVER_THREADS", 2)
    server = LearnerServer("127.0.0.1", 0)
    try:
        streams = [
            stub(server.port).StreamParameters(services_pb2.Empty(), metadata=[(ACTOR_KEY, name)])
            for name in "ab"
        ]
        while server.num_actors < 2:
            time.sleep(0.01)
        with pytest.raises(grpc.RpcError) as refused:
            stub(server.port).Ready(services_pb2.Empty(), timeout=10)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        for stream in streams:
            stream.cancel()
    finally:
        server.close()


def test_the_end_does_not_wait_for_an_actor_that_is_gone(server, monkeypatch):
    monkeypatch.setattr("lerobot_pirl.transport.server.END_GRACE_S", 0.2)
    silent = stub(server.port).StreamParameters(services_pb2.Empty())  # never read
    server.publish(weights(0, size=4_000_000))  # more than the flow-control window takes
    started = time.monotonic()
    server.end(ok=True)
    assert time.monotonic() - started < 30
    silent.cancel()
