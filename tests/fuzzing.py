"""Hostile bytes and configs: seeded mutations that know the structure of what they spoil.

What is spoiled is given a fitting digest and fitting lengths every other time, so that the layers behind are reached.
"""

import contextlib
import copy
import dataclasses
import json
import math
import random
import struct
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import torch
from lerobot.transport import services_pb2, services_pb2_grpc
from xxhash import xxh3_128

from lerobot_pirl.evaluate import Evaluation
from lerobot_pirl.rollout import Rollout
from lerobot_pirl.rules import is_finite
from lerobot_pirl.transport.pieces import from_pieces
from lerobot_pirl.wire import KINDS, MAX_SMALL_BYTES, Message, WireError, decode, encode
from tests.test_rollout import make_rollout

HEADER = struct.Struct("<4sBBIQ16s")
NUMBERS = (0, 1, -1, 2, 7, 255, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
DTYPES = (
    *("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"),
    *("F128", "C64", "F8_E4M3", "U64", "", "f32", "F4"),
)
# what JSON can hold where something else is expected
JUNK = (
    *(None, True, False, 0, 1, -1, 0.5, math.nan, math.inf, -math.inf, 10**400, 2**63, -(2**63), 1e300),
    *(
        "",
        "x",
        "0",
        "true",
        "null",
        "\0",
        "\n",
        "../..",
        "\u2028",
        "x" * 5000,
        [],
        {},
        [None],
        [[[]]],
        {"": None},
    ),
)


def seal(text: bytes, payload: bytes, kind: int, lengths: tuple[int, int] | None = None) -> bytes:
    """Return a message of these parts with a digest that fits them."""
    fields = (b"PIRL", 2, kind, *(lengths or (len(text), len(payload))))
    start = HEADER.pack(*fields, b"")[: HEADER.size - 16]
    return start + xxh3_128(start + text + payload).digest() + text + payload


def unseal(data: bytes) -> tuple[bytes, bytes, int]:
    """Return text, payload and kind of a message."""
    _, _, kind, text_length, _, _ = HEADER.unpack_from(data)
    border = HEADER.size + text_length
    return data[HEADER.size : border], data[border:], kind


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Return data with bits flipped, or a piece of it cut, doubled, moved or replaced."""
    spoiled = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        if not spoiled:
            return bytes(rng.randbytes(rng.randrange(64)))
        start = rng.randrange(len(spoiled))
        end = min(len(spoiled), start + rng.choice((1, 2, 4, 8, 64, 4096)))
        how = rng.randrange(6)
        if how == 0:
            spoiled[start] ^= 1 << rng.randrange(8)
        elif how == 1:
            spoiled[start:end] = rng.randbytes(end - start)
        elif how == 2:
            del spoiled[start:end]
        elif how == 3:
            spoiled[start:start] = spoiled[start:end]
        elif how == 4:
            del spoiled[start:]
        else:
            number = rng.choice(NUMBERS) % 2**64
            spoiled[start : start + 8] = struct.pack("<Q", number)
    return bytes(spoiled)


def mutate_json(rng: random.Random, value: Any) -> Any:
    """Return a JSON value with something in it replaced, removed, added or nested."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        changed = dict(value)
        name = rng.choice(list(changed))
        how = rng.randrange(5)
        if how == 0:
            del changed[name]
        elif how == 1:
            changed[rng.choice(("", "x", name.upper(), name + " ", "type"))] = rng.choice(JUNK)
        else:
            changed[name] = mutate_json(rng, changed[name])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        changed = list(value)
        position = rng.randrange(len(changed))
        how = rng.randrange(4)
        if how == 0:
            del changed[position]
        elif how == 1:
            changed.insert(position, rng.choice(JUNK))
        else:
            changed[position] = mutate_json(rng, changed[position])
        return changed
    if type(value) in (int, float) and rng.random() < 0.5:
        factor = rng.choice((-1, 0, 2, 0.5, 10, 1000, 10**9, 10**18))
        return type(value)(value * factor) if is_finite(value) else factor
    return copy.deepcopy(rng.choice(JUNK))


def mutate_index(rng: random.Random, payload: bytes) -> bytes:
    """Return safetensors bytes of which the list of tensors lies about types, shapes or places."""
    if len(payload) < 8:
        return mutate_bytes(rng, payload)
    (length,) = struct.unpack_from("<Q", payload)
    try:
        index = json.loads(payload[8 : 8 + length])
        name = rng.choice([each for each in index if each != "__metadata__"])
        entry = index[name]
        how = rng.randrange(7)
        if how == 0:
            entry["dtype"] = rng.choice(DTYPES)
        elif how == 1:
            axes = entry["shape"] or [1]
            entry["shape"] = [*axes[:-1], rng.choice(NUMBERS)]
        elif how == 2:
            # the same bytes as another shape, which is no lie
            size = math.prod(entry["shape"])
            entry["shape"] = rng.choice(([size], [1, size], [size, 1], [*entry["shape"], 1]))
        elif how == 3:
            entry["data_offsets"] = [rng.choice(NUMBERS), rng.choice(NUMBERS)]
        elif how == 4:
            other = rng.choice(list(index))
            index[name], index[other] = index[other], index[name]
        elif how == 5:
            index[rng.choice(("", "x", "features.", "features.x"))] = index.pop(name)
        else:
            index = mutate_json(rng, index)
        text = json.dumps(index).encode()
    except (ValueError, LookupError, TypeError, AttributeError):
        text = mutate_bytes(rng, payload[8 : 8 + length])
    announced = len(text) if rng.random() < 0.9 else rng.choice(NUMBERS) % 2**64
    return struct.pack("<Q", announced) + text + payload[8 + length :]


def mutate_values(rng: random.Random, payload: bytes) -> bytes:
    """Return safetensors bytes with some of the tensors' numbers replaced."""
    if len(payload) < 16:
        return payload
    (length,) = struct.unpack_from("<Q", payload)
    spoiled = bytearray(payload)
    first = min(8 + length, len(payload) - 8)
    for _ in range(rng.choice((1, 1, 8))):
        # on a tensor's own grid, mostly: so that a whole number becomes another one
        place = first + (rng.randrange(len(payload) - first) & ~7)
        spoiled[place : place + 8] = struct.pack("<Q", rng.choice(NUMBERS) % 2**64)[: len(payload) - place]
    return bytes(spoiled)


def mutate_message(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Return a message spoiled in one of its layers.

    Args:
        data: a good message.
        other: another one, of which parts may be taken.
    """
    how = rng.randrange(10)
    if how == 0:
        return mutate_bytes(rng, data)
    if how == 1:
        cut, resumed = rng.randrange(len(data)), rng.randrange(len(other))
        return data[:cut] + other[resumed:]
    text, payload, kind = unseal(data)
    lengths = None
    if how == 2:
        text = mutate_bytes(rng, text)
    elif how in (3, 4):
        text = json.dumps(mutate_json(rng, json.loads(text))).encode()
    elif how == 5:
        text, payload = unseal(other)[0], mutate_values(rng, payload)
    elif how == 6:
        payload = mutate_bytes(rng, payload)
    elif how == 7:
        payload = mutate_index(rng, payload)
    elif how == 8:
        payload = mutate_values(rng, payload)
    else:
        kind = rng.choice((*KINDS.values(), 0, 255))
        lengths = (rng.choice(NUMBERS) % 2**32, rng.choice((len(payload), MAX_SMALL_BYTES, 2**40, 2**64 - 1)))
    return seal(text, payload, kind, lengths)


def mutate_stream(rng: random.Random, data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield (state, bytes) of the pieces of a message: cut anywhere, in any number, in the wrong order or state."""
    size = rng.choice((1, 7, 64, 1000, 512 * 1024)) if len(data) < 2000 else rng.choice((1000, 512 * 1024))
    pieces = [["MIDDLE", data[at : at + size]] for at in range(0, len(data), size)] or [["MIDDLE", b""]]
    pieces[0][0] = "BEGIN"
    pieces.append(["END", b""])
    if rng.random() < 0.6:
        yield from map(tuple, pieces)
        return
    for _ in range(rng.choice((1, 1, 3))):
        position = rng.randrange(len(pieces))
        how = rng.randrange(5)
        if how == 0:
            pieces[position][0] = rng.choice(("BEGIN", "MIDDLE", "END", "UNKNOWN"))
        elif how == 1:
            pieces.insert(position, list(rng.choice(pieces)))
        elif how == 2 and len(pieces) > 1:
            del pieces[position]
        elif how == 3:
            rng.shuffle(pieces)
        else:
            pieces[position][1] = rng.choice((b"", pieces[position][1] * 2, rng.randbytes(100)))
    yield from map(tuple, pieces)


OUTCOMES = ("read", "bytes refused", "content refused")


def good_messages(address: dict[str, Any] | None = None, rollout: Rollout | None = None) -> list[bytes]:
    """Return a message of every kind, and some variety of tensors.

    Args:
        address: what every header says besides.
        rollout: one to send; a small one of nobody's policy when not given.
    """
    evaluation = Evaluation(
        success=torch.tensor([True, False]),
        rewards=torch.tensor([1.0, 0.0]),
        env_steps=torch.tensor([8, 12]),
        task_id=torch.tensor([0, 0]),
        init_state_id=torch.tensor([0, 1]),
        seconds=1.5,
    )
    tensors = {"a": torch.ones(3, 2), "b": torch.zeros(0, 4, dtype=torch.bfloat16), "c": torch.tensor(True)}
    contents = {
        "weights": ({"metadata": {"recipe": "pi-rl", "features": {"x": [3, 64]}}, "collect": True}, tensors),
        "rollout": (rollout or make_rollout()).to_tensors(),
        "evaluation": evaluation.to_tensors(),
        "end": ({"ok": True, "reason": "3 updates are done"}, {}),
        "refusal": ({"reason": "gamma differs\nhere 0.9, there 0.99"}, {}),
        "ask": ({"slots": 4}, {}),
        "share": ({"numbers": [0, 1, 2]}, {}),
    }
    address = address or {
        "policy_version": 7,
        "session": "5e55",
        "config_hash": "c0f1",
        "actor": "a",
        "number": 0,
    }
    return [encode(Message(kind, contents[kind][0] | address, contents[kind][1])) for kind in KINDS]


def to_piece(state: str, data: bytes) -> services_pb2.Transition:
    """Return a piece as the service carries it."""
    number = getattr(services_pb2.TransferState, f"TRANSFER_{state}")
    return services_pb2.Transition(transfer_state=number, data=data)


def swallow(data: bytes, pieces: list[tuple[str, bytes]]) -> str:
    """Put a message through the decoders, and its pieces through theirs; return one of :data:`OUTCOMES`.

    Anything that they raise besides their own refusals is a defect, and comes out of here.
    """
    with contextlib.suppress(WireError):
        for whole in from_pieces(to_piece(*piece) for piece in pieces):
            decode(whole)
    try:
        message = decode(data)
    except WireError as refused:
        assert len(str(refused)) < 1000
        return "bytes refused"
    kind = {"rollout": Rollout, "evaluation": Evaluation}.get(message.kind)
    try:
        if kind is not None:
            kind.from_tensors(message.header, message.tensors)
    except ValueError as refused:
        assert len(str(refused)) < 2000, str(refused)
        return "content refused"
    return "read"


def talk(rng: random.Random, stub: services_pb2_grpc.LearnerServiceStub, data: bytes) -> str:
    """Send the pieces of a message, mutated, to one of the RPCs that take some; return the status code's name.

    Now and then the call is left before its end.
    """
    method = rng.choice((stub.SendTransitions, stub.SendTransitions, stub.SendInteractions))
    pieces = [to_piece(*piece).SerializeToString() for piece in mutate_stream(rng, data)]
    kind = services_pb2.Transition if method == stub.SendTransitions else services_pb2.InteractionMessage
    leave, begun = rng.random() < 0.1, threading.Event()

    def request() -> Iterator:
        for piece in pieces:
            yield kind.FromString(piece)
        if leave:
            # gRPC may be here before it has returned the call
            begun.wait()
            call.cancel()

    call = method.future(request(), timeout=60.0)
    begun.set()
    with contextlib.suppress(grpc.FutureCancelledError):
        call.exception()
    return call.code().name


# values that contradict each other, or what most configs say
CONTRADICTIONS = (
    {"algorithm.gripper": "exclude", "algorithm.gripper_temperature": 0.5},
    {"algorithm.variant": "flow_noise"},
    {"algorithm.advantage": "grpo", "algorithm.episodes_per_iteration": 7},
    {"algorithm.minibatch_size": 4, "algorithm.micro_batch_size": 8},
    {"algorithm.n_action_steps": 1000},
    {"algorithm.wire.host": "0.0.0.0"},
    {"algorithm.wire.tls_cert": "x.pem"},
    {"algorithm.type": "sac"},
    {"resume": True},
    {"early_stop_patience": 3},
    {"recipe": "nonsense"},
    {"env.type": "libero", "env.task": "tabletop"},
    {"env.control_mode": "relative"},
    {"policy.type": "act"},
    {"policy.path": "no/where/at/all"},
    {"policy.hidden_size": 130, "policy.num_heads": 7},
    {"scheduler": {"type": "nonsense"}},
    {"scheduler": {"type": "diffuser", "name": "x", "num_warmup_steps": -1}},
)


def put(config: dict[str, Any], name: str, value: Any) -> None:
    """Write an option by its dotted name; what stands in the way is replaced."""
    *groups, leaf = name.split(".")
    for group in groups:
        if not isinstance(config.get(group), dict):
            config[group] = {}
        config = config[group]
    config[leaf] = value


def option_names(config: Any, prefix: str = "") -> list[str]:
    """Return the dotted names of all options of a config, groups included."""
    names = []
    for each in dataclasses.fields(config):
        names.append(f"{prefix}{each.name}")
        value = getattr(config, each.name)
        if dataclasses.is_dataclass(value):
            names += option_names(value, f"{prefix}{each.name}.")
    return names


def mutate_config(rng: random.Random, base: dict[str, Any], names: list[str]) -> tuple[dict, list[str]]:
    """Return a config with up to three things wrong, and the dotted names of the options that were touched."""
    config, touched = copy.deepcopy(base), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        how = rng.randrange(8)
        if how < 4:
            name = rng.choice(names)
            put(config, name, copy.deepcopy(rng.choice((*JUNK, *NUMBERS, 1e-12, 1e12, 10**9, -(10**9)))))
        elif how == 4:
            group = rng.choice(("", "algorithm.", "algorithm.wire.", "policy.", "env.", "eval."))
            name = f"{group}{rng.choice(('nonsense', 'Seed', 'gama', 'x.y', '', '__class__'))}"
            put(config, name, rng.choice(JUNK))
        elif how == 5:
            name = rng.choice(list(config))
            group = config[name]
            if isinstance(group, dict) and group and rng.random() < 0.8:
                name = f"{name}.{(leaf := rng.choice(list(group)))}"
                del group[leaf]
            else:
                del config[name]
        elif how == 6:
            name = rng.choice(list(config))
            config[name] = mutate_json(rng, config[name])
        else:
            contradiction = rng.choice(CONTRADICTIONS)
            for name, value in contradiction.items():
                put(config, name, copy.deepcopy(value))
            touched += contradiction
        touched.append(name)
        if not config:
            break
    return config, touched
