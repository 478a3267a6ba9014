"""Tensors in safetensors' layout without a copy: their bytes where they lie, and views of bytes that came.

safetensors' own functions copy every tensor on both ways, which for weights is most of the time and twice the memory.
What is written here they read, and the other way round; ``tests/test_tensors.py`` compares the two.
"""

import json
import math
from typing import Any

import torch
from torch import Tensor

# of the list of tensors; thousands of them need less
MAX_INDEX_BYTES = 4 * 2**20
MAX_AXES = 16
_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of a JSON text; raises ValueError when two readers could see two values in it."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice in an object")
    return found


def to_parts(tensors: dict[str, Tensor]) -> list[memoryview]:
    """Return the bytes of a safetensors file in parts: the list of tensors, then every tensor.

    A part is the memory of a contiguous tensor on the CPU itself, which must not change while the part is read; of another
    tensor it is a copy.

    Raises:
        ValueError: for a tensor of a type that is not sent.
    """
    index, parts, end = {}, [], 0
    # wide types first, so that every tensor begins at a multiple of its type's size
    for name, value in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        if value.dtype not in _NAMES:
            raise ValueError(f"tensor {name!r} is {value.dtype}, which is not sent")
        start, end = end, end + value.nbytes
        index[name] = {
            "dtype": _NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [start, end],
        }
        if value.nbytes:
            flat = value.detach().cpu().contiguous().flatten()
            parts.append(memoryview(flat.view(torch.uint8).numpy()))
    text = json.dumps(index, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return [memoryview(len(text).to_bytes(_LENGTH_BYTES, "little") + text), *parts]


def from_bytes(data: memoryview) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file: views of ``data``, copies where it is read-only or a type is not aligned.

    Raises:
        ValueError: one sentence on the first thing that is wrong; nothing is allocated by what the bytes announce.
    """
    index_bytes = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if index_bytes > MAX_INDEX_BYTES:
        raise ValueError(f"their list has {index_bytes} bytes, more than the {MAX_INDEX_BYTES} allowed")
    content = _LENGTH_BYTES + index_bytes
    if len(data) < content:
        raise ValueError(f"they have {len(data)} bytes, their list alone {content}")
    index = json.loads(str(data[_LENGTH_BYTES:content], "utf-8"), object_pairs_hook=unique)
    if not isinstance(index, dict):
        raise ValueError(f"their list is a JSON {type(index).__name__} instead of an object")
    index.pop(_METADATA, None)
    body = data[content:]
    entries = {name: _check_entry(name, entry) for name, entry in index.items()}
    end = 0
    for name, (_, _, start, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if start != end:
            raise ValueError(f"{name[:50]!r} begins at byte {start} instead of {end}")
        end = stop
    if end != len(body):
        raise ValueError(f"they hold {len(body)} bytes, their list names {end}")
    if body.readonly:
        body = memoryview(bytearray(body))
    return {name: _view(body, *entry) for name, entry in entries.items()}


def _check_entry(name: str, entry: Any) -> tuple[torch.dtype, list[int], int, int]:
    """Return type, shape, first byte and end of a tensor in the list; raises ValueError when they do not fit."""
    fields = entry if isinstance(entry, dict) else {}
    if set(fields) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name[:50]!r} does not have dtype, shape and data_offsets")
    shape, offsets = fields["shape"], fields["data_offsets"]
    dtype = _DTYPES.get(fields["dtype"]) if isinstance(fields["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"{name[:50]!r} has the unknown type {str(fields['dtype'])[:50]}")
    for what, numbers, most in (("shape", shape, MAX_AXES), ("data_offsets", offsets, 2)):
        # torch counts in 63 bits
        fits = isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)
        if not fits or len(numbers) > most:
            raise ValueError(f"{name[:50]!r} has the {what} {str(numbers)[:50]}")
    start, stop = offsets if len(offsets) == 2 else (0, -1)
    # without its zeros: an empty tensor of another axis beyond all bounds is none
    if (
        math.prod(shape) * dtype.itemsize != stop - start
        or math.prod(filter(None, shape)) * dtype.itemsize >= 2**63
    ):
        raise ValueError(f"{name[:50]!r} has the shape {str(shape)[:50]} and bytes {start} to {stop}")
    return dtype, shape, start, stop


def _view(body: memoryview, dtype: torch.dtype, shape: list[int], start: int, stop: int) -> Tensor:
    if start == stop:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(body, dtype=torch.uint8, count=stop - start, offset=start)
    if flat.data_ptr() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).view(shape)
