"""Tensors in safetensors' layout: what safetensors itself writes and reads is what we read and write."""

import json
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lerobot_pirl.tensors import from_bytes, to_parts

fuzz = settings(max_examples=200, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]
shapes = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)),
    min_size=1,
    max_size=5,
)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@fuzz
@given(shapes)
def test_safetensors_reads_what_we_write_and_we_what_it_writes(chosen):
    tensors = {
        name: torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
        for name, (dtype, shape) in chosen.items()
    }
    ours = b"".join(to_parts(tensors))
    assert equal(safetensors.torch.load(ours), tensors)
    theirs = safetensors.torch.save(tensors)
    assert equal(from_bytes(memoryview(theirs)), tensors)


@fuzz
@given(st.data())
def test_what_we_read_of_damaged_bytes_safetensors_reads_too(data):
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.bfloat16), "c": torch.tensor(True)}
    damaged = bytearray(b"".join(to_parts(tensors)))
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(damaged) - 1))
        damaged[position : position + 1] = data.draw(st.binary(max_size=2))
    try:
        read = from_bytes(memoryview(damaged))
    except (ValueError, RuntimeError):
        return
    held = safetensors.torch.load(bytes(damaged))
    assert set(read) == set(held)
    for name, value in read.items():
        assert (value.dtype, value.shape) == (held[name].dtype, held[name].shape)
        assert torch.equal(*(each.flatten().view(torch.uint8) for each in (value, held[name])))


def test_metadata_of_a_file_is_passed_over():
    tensors = {"a": torch.ones(2)}
    data = safetensors.torch.save(tensors, metadata={"format": "pt"})
    assert equal(from_bytes(memoryview(data)), tensors)


def test_a_type_that_is_not_aligned_is_read_all_the_same():
    text = json.dumps(
        {
            "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        }
    ).encode()
    data = bytearray(struct.pack("<Q", len(text)) + text + b"\7" + struct.pack("<2f", 1.5, -2))
    for shift in range(4):
        moved = bytearray(shift) + data
        found = from_bytes(memoryview(moved)[shift:])
        assert found["a"].tolist() == [7]
        assert found["b"].tolist() == [1.5, -2]
        assert found["b"].data_ptr() % 4 == 0


@pytest.mark.parametrize("empty", [torch.zeros(0), torch.zeros(3, 0, 2)])
def test_empty_tensors_have_no_part(empty):
    parts = to_parts({"empty": empty, "one": torch.ones(1)})
    assert [len(part) for part in parts[1:]] == [4]
    assert from_bytes(memoryview(b"".join(parts)))["empty"].shape == empty.shape
