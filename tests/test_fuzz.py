"""Hostile bytes through every decoder and into a server: each is read or refused with a sentence."""

import random

import grpc
import pytest
from lerobot.transport import services_pb2, services_pb2_grpc

from lerobot_pirl.transport import LearnerServer
from lerobot_pirl.transport.pieces import from_pieces, to_pieces
from lerobot_pirl.wire import KINDS, Message, decode, encode
from tests.fuzzing import (
    OUTCOMES,
    good_messages,
    mutate_message,
    mutate_stream,
    seal,
    swallow,
    talk,
    unseal,
)


@pytest.fixture(scope="module")
def good() -> list[bytes]:
    return good_messages()


def test_good_messages_of_all_kinds_are_read(good):
    assert {unseal(data)[2] for data in good} == set(KINDS.values())
    assert {swallow(data, [("BEGIN", data), ("END", b"")]) for data in good} == {"read"}
    assert all(seal(*unseal(data)) == data for data in good)


def test_three_thousand_mutated_messages_are_read_or_refused_in_every_layer(good):
    rng = random.Random(0)
    seen = dict.fromkeys(OUTCOMES, 0)
    for _ in range(3000):
        data = mutate_message(rng, rng.choice(good), rng.choice(good))
        seen[swallow(data, list(mutate_stream(rng, data)))] += 1
    # a mutator that reaches no further than the digest would find nothing
    assert all(seen.values()), seen


def test_the_same_seed_makes_the_same_mutations(good):
    first, second = ([mutate_message(random.Random(3), data, good[0]) for data in good] for _ in range(2))
    assert first == second
    assert any(mutated != data for mutated, data in zip(first, good, strict=True))


def test_two_hundred_mutated_streams_leave_a_server_as_it_was(good):
    server = LearnerServer("127.0.0.1", 0)
    server.publish(Message("weights", {"policy_version": 4}))
    channel = grpc.insecure_channel(f"127.0.0.1:{server.port}")
    stub = services_pb2_grpc.LearnerServiceStub(channel)
    rng = random.Random(1)
    codes = set()
    for _ in range(200):
        codes.add(talk(rng, stub, mutate_message(rng, rng.choice(good), rng.choice(good))))
        while server.receive(timeout=0) is not None:
            pass
    assert "INVALID_ARGUMENT" in codes and codes <= {
        "OK",
        "INVALID_ARGUMENT",
        "RESOURCE_EXHAUSTED",
        "CANCELLED",
    }
    stream = stub.StreamParameters(services_pb2.Empty())
    assert decode(next(from_pieces(stream))).header["policy_version"] == 4
    last = encode(Message("refusal", {"reason": "still here"}))
    stub.SendInteractions(to_pieces([last], services_pb2.InteractionMessage), timeout=10)
    assert server.receive(timeout=10).header["reason"] == "still here"
    stream.cancel()
    channel.close()
    server.close()
