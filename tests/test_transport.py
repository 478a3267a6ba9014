"""Learner and actor ends over real gRPC on loopback, in one process."""

import re
import threading
import time

import grpc
import pytest
import torch
from lerobot.transport import services_pb2, services_pb2_grpc

from lerobot_pirl.transport import LearnerClient, LearnerServer
from lerobot_pirl.transport.pieces import from_pieces, to_pieces
from lerobot_pirl.wire import Message, WireError, encode


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
        message = client.next_weights()
        assert message.header["policy_version"] == version
        assert torch.equal(message.tensors["w"], torch.full((300_000,), float(version)))
        client.send(rollout(version))
        assert server.receive(timeout=10).header["policy_version"] == version


def test_every_actor_gets_every_version_and_a_late_one_the_newest(server, client):
    server.publish(weights(0))
    assert client.next_weights().header["policy_version"] == 0
    server.publish(weights(1))
    assert client.next_weights().header["policy_version"] == 1
    late = connect(server.port)
    assert late.next_weights().header["policy_version"] == 1
    server.publish(weights(2))
    assert [c.next_weights().header["policy_version"] for c in (client, late)] == [2, 2]
    late.close()


def test_the_end_follows_the_last_weights(server, client):
    server.publish(weights(7))
    server.end(ok=True, reason="7 updates are done")
    assert client.next_weights().header["policy_version"] == 7
    end = client.next_weights()
    assert (end.kind, end.header) == ("end", {"ok": True, "reason": "7 updates are done"})


def test_the_end_is_seen_without_asking_and_stops_deliveries(server, client):
    server.publish(weights(0))
    client.next_weights()
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
    assert client.next_weights().header["policy_version"] == 5
    first.close()
    again = LearnerServer("127.0.0.1", first.port)
    again.publish(weights(3))
    assert client.next_weights().header["policy_version"] == 3
    client.send(rollout(3))
    assert again.receive(timeout=10).header["policy_version"] == 3
    client.close()
    again.close()


def test_a_delivery_waits_for_a_learner_that_comes_back():
    first = LearnerServer("127.0.0.1", 0)
    client = connect(first.port)
    first.publish(weights(0))
    client.next_weights()
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
        stub(server.port).SendTransitions(to_pieces(data, services_pb2.Transition), timeout=10)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    client.send(rollout(1))
    assert server.receive(timeout=10).header["policy_version"] == 1


def test_a_pickle_is_never_loaded(server, client, tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "pwned"), "w")

    pieces = to_pieces(pickle.dumps(Evil()), services_pb2.InteractionMessage)
    with pytest.raises(grpc.RpcError):
        stub(server.port).SendInteractions(pieces, timeout=10)
    assert not (tmp_path / "pwned").exists()


def test_a_stream_that_was_left_says_nothing_more(server, client):
    server.publish(weights(1))
    assert client.next_weights().header["policy_version"] == 1
    left = client._channel
    client.connect()
    assert client.next_weights().header["policy_version"] == 1
    for what, value in (("_weights", weights(9)), ("_end", Message("end")), ("_error", OSError())):
        client._tell(left, what, value)
    server.publish(weights(2))
    assert client.next_weights().header["policy_version"] == 2
    assert not client.ended


def test_a_learner_that_sends_garbage_is_an_error_not_a_wait(server, client):
    service = server._service
    with service.condition:
        service.published, service.serial = b"garbage", 1
        service.condition.notify_all()
    with pytest.raises(ConnectionError, match="cannot be used: the message ends after 7 bytes"):
        client.next_weights()


def test_a_message_in_one_piece_never_takes_a_former_rest_along():
    begun = list(to_pieces(encode(rollout(1)), services_pb2.Transition))[:1]
    whole = list(to_pieces(encode(rollout(2)), services_pb2.Transition))
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


def test_the_end_does_not_wait_for_an_actor_that_is_gone(server, monkeypatch):
    monkeypatch.setattr("lerobot_pirl.transport.server.END_GRACE_S", 0.2)
    silent = stub(server.port).StreamParameters(services_pb2.Empty())  # never read
    server.publish(weights(0, size=4_000_000))  # more than the flow-control window takes
    started = time.monotonic()
    server.end(ok=True)
    assert time.monotonic() - started < 30
    silent.cancel()
