"""Messages as bytes: what comes back, and what is refused."""

import json
import struct
import tracemalloc

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_128

from lerobot_pirl import wire
from lerobot_pirl.wire import KINDS, Message, WireError, announced_bytes, decode, encode, encode_parts

HEADER = struct.Struct("<4sBBIQ16s")
fuzz = settings(max_examples=200, deadline=None, database=None)


def example(kind: str = "rollout") -> Message:
    tensors = {
        "float32": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)),
        "bfloat16": torch.tensor([1.5, -2.25, float("inf")], dtype=torch.bfloat16),
        "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "bool": torch.tensor([[True], [False]]),
        "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 3, dtype=torch.bfloat16),
    }
    return Message(kind, {"policy_version": 3, "text": "Löffel", "list": [1, None, {"a": 0.1}]}, tensors)


def same(one: Message, other: Message) -> bool:
    return (
        one.kind == other.kind
        and one.header == other.header
        and set(one.tensors) == set(other.tensors)
        and all(same_tensor(one.tensors[name], other.tensors[name]) for name in one.tensors)
    )


def same_tensor(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def raw(
    text: bytes = b"{}",
    payload: bytes = b"",
    magic: bytes = b"PIRL",
    version: int = 2,
    kind: int = 1,
    lengths: tuple[int, int] | None = None,
) -> bytes:
    """A message built by hand, with a digest that fits whatever it holds."""
    fields = (magic, version, kind, *(lengths or (len(text), len(payload))))
    start = HEADER.pack(*fields, b"")[: HEADER.size - 16]
    return start + xxh3_128(start + text + payload).digest() + text + payload


def refusal(data: bytes, **options) -> str:
    with pytest.raises(WireError) as caught:
        decode(data, **options)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_as_it_was(kind):
    assert same(decode(encode(example(kind))), example(kind))
    bare = Message(kind)
    assert same(decode(encode(bare)), bare)


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,), (3, 0, 2)], ids=str)
def test_every_dtype_and_shape_comes_back_as_it_was(dtype, shape):
    value = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    message = Message("weights", {}, {"value": value})
    assert same(decode(encode(message)), message)


def test_not_a_number_keeps_its_bits():
    value = torch.tensor([float("nan"), float("-inf"), -0.0])
    back = decode(encode(Message("weights", {}, {"value": value}))).tensors["value"]
    assert torch.equal(back.view(torch.int32), value.view(torch.int32))


def test_tensors_that_share_memory_or_are_views_travel_as_values():
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "base": base,
        "again": base,
        "row": base[1],
        "transposed": base.T,
        "wide": base[:1].expand(5, 4),
    }
    back = decode(encode(Message("weights", {}, tensors)))
    assert same(back, Message("weights", {}, tensors))
    back.tensors["base"].zero_()
    assert same_tensor(back.tensors["again"], base)


def test_parameters_travel_without_their_graph():
    parameter = torch.nn.Parameter(torch.ones(2))
    back = decode(encode(Message("weights", {}, {"weight": parameter * 2})))
    assert not back.tensors["weight"].requires_grad
    assert back.tensors["weight"].tolist() == [2, 2]


def test_encoding_leaves_the_message_alone():
    message = example()
    encode(message)
    assert same(message, example())


def test_equal_messages_have_equal_bytes_whatever_the_order_of_their_header():
    assert encode(Message("end", {"a": 1, "b": 2})) == encode(Message("end", {"b": 2, "a": 1}))


def test_decoded_tensors_are_writable_views_of_a_buffer_and_copies_of_bytes():
    buffer = bytearray(encode(example()))
    views, copies = decode(buffer), decode(bytes(buffer))
    assert same(views, example()) and same(copies, example())
    views.tensors["uint8"].zero_()
    assert same_tensor(views.tensors["scalar"], example().tensors["scalar"])
    assert bytes(range(256)) not in buffer
    copies.tensors["uint8"].zero_()
    buffer[:] = bytes(len(buffer))
    assert same_tensor(copies.tensors["scalar"], example().tensors["scalar"])


def test_parts_are_the_tensors_own_memory():
    weight = torch.arange(6.0).reshape(2, 3)
    whole, turned = (
        encode_parts(Message("weights", {}, {"w": weight})),
        encode_parts(Message("weights", {}, {"w": weight.T})),
    )
    weight.fill_(9)
    assert torch.frombuffer(bytearray(whole[-1]), dtype=torch.float32).tolist() == [9] * 6
    assert torch.frombuffer(bytearray(turned[-1]), dtype=torch.float32).tolist() == [0, 3, 1, 4, 2, 5]


def test_a_tensor_of_a_type_that_is_not_sent_is_refused():
    with pytest.raises(WireError, match="the weights message cannot be sent: tensor 'w' is torch.complex64"):
        encode(Message("weights", {}, {"w": torch.zeros(2, dtype=torch.complex64)}))


def test_an_unknown_kind_is_not_encoded():
    with pytest.raises(
        WireError, match="unknown message kind 'gradients'; known are weights, rollout, end, ref"
    ):
        encode(Message("gradients"))


def test_the_layout_is_the_documented_one():
    payload = safetensors.torch.save({"x": torch.ones(2)})
    data = raw(b'{"a": 1}', payload, kind=2)
    assert same(decode(data), Message("rollout", {"a": 1}, {"x": torch.ones(2)}))
    assert data == encode(decode(data))


def test_another_magic_is_refused():
    assert refusal(raw(magic=b"GIF8")) == (
        "the message starts with b'GIF8' instead of b'PIRL'; the peer speaks something else"
    )


@pytest.mark.parametrize("version", [0, 1, 255])
def test_another_format_is_refused_with_the_remedy(version):
    text = refusal(raw(version=version))
    assert f"has format {version}, this package speaks 2" in text
    assert "install the same lerobot-pirl on both sides" in text


@pytest.mark.parametrize("kind", [0, max(KINDS.values()) + 1, 255])
def test_another_kind_is_refused(kind):
    assert refusal(raw(kind=kind)) == f"unknown message kind {kind}; known are {sorted(KINDS.values())}"


@pytest.mark.parametrize("lengths", [(0, 0), (1, 0), (3, 0), (2, 1), (2, 2**32), (2**20, 0)])
def test_lengths_that_do_not_fit_are_refused(lengths):
    announced = HEADER.size + sum(lengths)
    assert refusal(raw(b"{}", lengths=lengths)) == (
        f"the message has {HEADER.size + 2} bytes, its header announces {announced}"
    )


def test_a_border_between_text_and_tensors_that_moved_is_refused():
    data = bytearray(encode(example()))
    text, payload = struct.unpack_from("<IQ", data, 6)
    struct.pack_into("<IQ", data, 6, text - 1, payload + 1)
    assert "digest" in refusal(bytes(data))


def test_a_message_cut_anywhere_is_refused():
    data = encode(example())
    for length in range(len(data)):
        text = refusal(data[:length])
        assert f" {length} bytes" in text


def test_bytes_after_the_end_are_refused():
    data = encode(example())
    assert f"has {len(data) + 1} bytes, its header announces {len(data)}" in refusal(data + b"\0")


def test_a_flipped_bit_anywhere_is_refused():
    data = encode(Message("rollout", {"policy_version": 3}, {"x": torch.ones(4)}))
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            refusal(bytes(flipped))


@pytest.mark.parametrize("text", [b"[1]", b"3", b"null", b'"a"', b"true"])
def test_a_header_that_is_no_object_is_refused(text):
    kind = type(json.loads(text)).__name__
    assert refusal(raw(text)) == f"the message's header is a JSON {kind} instead of an object"


NO_JSON = [
    *(b"", b"{", b"{'a': 1}", b"\xff\xfe{}", b'{"a": 1} ,', "{}".encode("utf-16"), b"[" * 100_000),
    # two readers could read two things
    *(b'{"a": 1, "a": 1}', b'{"a": {"b": 1, "b": 2}}'),
    # cannot be compared or shown
    *(b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}", b'{"a": ' * 66 + b"1" + b"}" * 66),
    *(b'{"a": "\\ud800"}', b'{"\\udfff": 1}', b'{"a": ' + b"9" * 5000 + b"}"),
]


@pytest.mark.parametrize("text", NO_JSON, ids=lambda text: repr(text[:12]))
def test_a_header_that_is_no_json_is_refused(text):
    message = refusal(raw(text))
    assert message.startswith("the message's header is no JSON: ")
    assert len(message) < 300


def test_a_header_may_be_nested_as_deep_as_is_allowed():
    deep = b'{"a": ' + b"[" * 63 + b"1" + b"]" * 63 + b"}"
    assert decode(raw(deep)).header == json.loads(deep)


def test_a_message_over_the_limit_is_refused_and_one_at_it_is_not():
    data = encode(example())
    text = refusal(data, max_bytes=len(data) - 1)
    assert text == f"the rollout message has {len(data)} bytes, more than the {len(data) - 1} allowed"
    assert same(decode(data, max_bytes=len(data)), example())


TOO_LARGE = {
    "weights": (KINDS["weights"], (2, wire.MAX_BYTES), "the weights message has "),
    "rollout": (KINDS["rollout"], (2, wire.MAX_BYTES), "the rollout message has "),
    "wrapped": (KINDS["rollout"], (2, 2**64 - 1), "the rollout message has "),
    "evaluation": (KINDS["evaluation"], (2, wire.MAX_SMALL_BYTES), "the evaluation message has "),
    "end": (KINDS["end"], (2, wire.MAX_SMALL_BYTES), "the end message has "),
    "refusal": (KINDS["refusal"], (2, wire.MAX_SMALL_BYTES), "the refusal message has "),
    "JSON": (KINDS["rollout"], (wire.MAX_JSON_BYTES + 1, 0), "the message's header announces 1048577 bytes of JSON"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "lengths", "expected"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_what_is_too_large_is_refused_by_its_first_bytes(kind, lengths, expected):
    start = raw(kind=kind, lengths=lengths)[: HEADER.size]
    assert announced_bytes(start[:-1]) is None
    with pytest.raises(WireError) as caught:
        announced_bytes(start)
    assert str(caught.value).startswith(expected)
    assert " more than the " in str(caught.value)


def test_the_largest_of_each_kind_is_announced():
    for kind, number in KINDS.items():
        allowed = wire.MAX_BYTES if kind in ("weights", "rollout") else wire.MAX_SMALL_BYTES
        start = raw(kind=number, lengths=(2, allowed - HEADER.size - 2))[: HEADER.size]
        assert announced_bytes(start) == allowed


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    return safetensors_text(json.dumps(header).encode()) + data


def safetensors_text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def entry(dtype="F32", shape=(1,), offsets=(0, 4)) -> dict:
    return {"x": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


DAMAGED = {
    "too short": b"1234",
    "no header": struct.pack("<Q", 0),
    "header longer than the payload": struct.pack("<Q", 2**40) + b"{}",
    "no JSON": struct.pack("<Q", 2) + b"{]",
    "no object": safetensors_bytes([1]),
    "unknown dtype": safetensors_bytes(entry("F128"), bytes(4)),
    "dtype that torch lacks": safetensors_bytes(entry("F4", (8,)), bytes(4)),
    "shape and data disagree": safetensors_bytes(entry(shape=(2,)), bytes(4)),
    "offsets past the end": safetensors_bytes(entry(offsets=(0, 8)), bytes(4)),
    "offsets backwards": safetensors_bytes(entry(offsets=(4, 0)), bytes(4)),
    "hole": safetensors_bytes(entry(offsets=(4, 8)), bytes(8)),
    "bytes left over": safetensors_bytes(entry(), bytes(5)),
    "negative shape": safetensors_bytes(entry(shape=(-1,)), bytes(4)),
    "shape overflow": safetensors_bytes(entry(shape=(2**62, 2**62)), bytes(4)),
    "huge and empty": safetensors_bytes(entry(shape=(0, 2**64 - 1), offsets=(0, 0))),
    "type without use": safetensors_bytes(entry("F8_E4M3", (4,)), bytes(4)),
    "complex": safetensors_bytes(entry("C64", offsets=(0, 8)), bytes(8)),
    "long list": struct.pack("<Q", 5 * 2**20) + b"{" + b" " * (5 * 2**20 - 2) + b"}",
    "many axes": safetensors_bytes(entry(shape=(1,) * 17), bytes(4)),
    "axes that are no numbers": safetensors_bytes(entry(shape=("1",)), bytes(4)),
    "axes that are truths": safetensors_bytes(entry(shape=(True,)), bytes(4)),
    "offsets too many": safetensors_bytes(entry(offsets=(0, 4, 8)), bytes(4)),
    "type that is no text": safetensors_bytes(entry(["F32"]), bytes(4)),
    "nothing of a tensor": safetensors_bytes({"x": None}, bytes(4)),
    "another field": safetensors_bytes({"x": entry()["x"] | {"y": 1}}, bytes(4)),
    "two of a name": safetensors_text(b'{"x": 1, "x": 2}'),
    "overlap": safetensors_bytes(entry() | {"y": entry()["x"]}, bytes(4)),
    "long name": safetensors_bytes({"x" * 100_000: entry(shape=(2,))["x"]}, bytes(4)),
}


@pytest.mark.parametrize("payload", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_tensors_are_refused_although_the_digest_fits(payload):
    message = refusal(raw(payload=payload))
    assert message.startswith("the message's tensors cannot be read: ")
    assert len(message) < 300


def test_announced_sizes_allocate_nothing():
    liars = [
        raw(lengths=(2**32 - 1, 2**40)),
        raw(payload=struct.pack("<Q", 90_000_000) + b"{}"),
        raw(payload=safetensors_bytes(entry(shape=(2**36,), offsets=(0, 2**38)), bytes(4))),
    ]
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        for data in liars:
            refusal(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16


def decode_or_refuse(data: bytes) -> Message | None:
    """Anything but a WireError fails the test."""
    try:
        return decode(data)
    except WireError as error:
        assert str(error).strip()
        return None


@fuzz
@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(data):
    assert decode_or_refuse(data) is None
    assert decode_or_refuse(b"PIRL" + data) is None
    assert decode_or_refuse(b"PIRL\x02\x01" + data) is None


@fuzz
@given(st.binary(max_size=60), st.binary(max_size=200), st.sampled_from(sorted(KINDS.values())))
def test_arbitrary_content_under_a_fitting_digest_is_refused_or_read(text, payload, kind):
    message = decode_or_refuse(raw(text, payload, kind=kind))
    if message is not None:
        assert message.header == json.loads(text)
        assert same(decode(encode(message)), message)


VALID = encode(example())


@fuzz
@given(st.data())
def test_a_mutated_message_is_refused_or_the_same(data):
    mutated = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(mutated) - 1))
        how = data.draw(st.sampled_from(["replace", "insert", "delete"]))
        patch = data.draw(st.binary(min_size=1, max_size=8))
        if how == "insert":
            mutated[position:position] = patch
        elif how == "delete" and len(mutated) > len(patch):
            del mutated[position : position + len(patch)]
        else:
            mutated[position : position + len(patch)] = patch
    message = decode_or_refuse(bytes(mutated))
    assert message is None or (bytes(mutated) == VALID and same(message, example()))


PAYLOAD = safetensors.torch.save(example().tensors)


@fuzz
@given(st.integers(0, len(PAYLOAD) - 1), st.binary(min_size=1, max_size=8))
def test_mutated_tensors_under_a_fitting_digest_are_refused_or_read(position, patch):
    payload = bytearray(PAYLOAD)
    payload[position : position + len(patch)] = patch
    message = decode_or_refuse(raw(payload=bytes(payload)))
    if message is not None:
        held = sum(tensor.nbytes for tensor in message.tensors.values())
        assert held <= len(payload)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@fuzz
@given(
    st.sampled_from(sorted(KINDS)),
    st.dictionaries(st.text(max_size=5), json_values, max_size=4),
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)),
        max_size=4,
    ),
)
def test_any_message_comes_back(kind, header, shapes):
    tensors = {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in shapes.items()}
    message = Message(kind, header, tensors)
    assert same(decode(encode(message)), message)


def test_the_limit_admits_the_weights_of_a_real_policy():
    assert wire.MAX_BYTES >= 4 * 2**30
