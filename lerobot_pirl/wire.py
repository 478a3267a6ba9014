"""Messages between learner and actor as bytes: a header, JSON and safetensors; nothing is ever unpickled.

Layout, little endian: magic ``PIRL``, format version u8, kind u8, JSON length u32, payload length u64, SHA-256
over everything before and after it, JSON (UTF-8), safetensors payload (empty without tensors).
"""

import hashlib
import json
import struct
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

MAGIC = b"PIRL"
FORMAT_VERSION = 1
KINDS = {"weights": 1, "rollout": 2, "end": 3, "refusal": 4, "evaluation": 5, "ask": 6, "share": 7}
_NAMES = {number: name for name, number in KINDS.items()}
_HEADER = struct.Struct("<4sBBIQ32s")
_DIGEST_BYTES = hashlib.sha256().digest_size
MAX_BYTES = 8 * 2**30
# of a message whose size does not grow with the policy
MAX_SMALL_BYTES = 64 * 2**20
LARGE_KINDS = ("weights", "rollout")
MAX_JSON_BYTES = 2**20
MAX_JSON_DEPTH = 64
# of safetensors' own header; thousands of tensors need less
MAX_INDEX_BYTES = 4 * 2**20
DTYPES = frozenset(
    (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    + (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
)
# of what a library says about hostile bytes
_SHOWN_CHARACTERS = 200


class WireError(ValueError):
    """Bytes that are no message of this package."""


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        kind: one of :data:`KINDS`.
        header: JSON-able values.
        tensors: CPU or device tensors; they arrive on the CPU.
    """

    kind: str
    header: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def _digest(head: bytes, *parts: bytes | memoryview) -> bytes:
    """Return the SHA-256 over the header up to its digest and over the parts that follow it."""
    digest = hashlib.sha256(head[: _HEADER.size - _DIGEST_BYTES])
    for part in parts:
        digest.update(part)
    return digest.digest()


def encode(message: Message) -> bytes:
    """Return the bytes of a message; raises WireError for an unknown kind."""
    if message.kind not in KINDS:
        raise WireError(f"unknown message kind {message.kind!r}; known are {', '.join(KINDS)}")
    text = json.dumps(message.header, sort_keys=True).encode()
    payload = b""
    if message.tensors:
        # safetensors refuses tensors that share memory, so every one gets its own
        payload = safetensors.torch.save(
            {name: value.detach().cpu().contiguous().clone() for name, value in message.tensors.items()}
        )
    fields = (MAGIC, FORMAT_VERSION, KINDS[message.kind], len(text), len(payload))
    digest = _digest(_HEADER.pack(*fields, b""), text, payload)
    return b"".join((_HEADER.pack(*fields, digest), text, payload))


def announced_bytes(start: bytes | bytearray, max_bytes: int = MAX_BYTES) -> int | None:
    """Return the size of the message that begins with ``start``, None while its header is not whole.

    Called on the first bytes that arrive, so that what will be refused is never held in memory.

    Raises:
        WireError: when it is no message, or one that would be too large.
    """
    if len(start) < _HEADER.size:
        return None
    magic, version, kind, text_length, payload_length, _ = _HEADER.unpack_from(start)
    if magic != MAGIC:
        raise WireError(
            f"the message starts with {magic!r} instead of {MAGIC!r}; the peer speaks something else"
        )
    if version != FORMAT_VERSION:
        raise WireError(
            f"the message has format {version}, this package speaks {FORMAT_VERSION}; "
            "install the same lerobot-pirl on both sides"
        )
    if kind not in _NAMES:
        raise WireError(f"unknown message kind {kind}; known are {sorted(_NAMES)}")
    if text_length > MAX_JSON_BYTES:
        raise WireError(
            f"the message's header announces {text_length} bytes of JSON, more than the {MAX_JSON_BYTES} allowed"
        )
    expected = _HEADER.size + text_length + payload_length
    allowed = max_bytes if _NAMES[kind] in LARGE_KINDS else min(max_bytes, MAX_SMALL_BYTES)
    if expected > allowed:
        raise WireError(f"the {_NAMES[kind]} message has {expected} bytes, more than the {allowed} allowed")
    return expected


def decode(data: bytes | bytearray, max_bytes: int = MAX_BYTES) -> Message:
    """Return the message in ``data``.

    Raises:
        WireError: one sentence on the first thing that is wrong.
    """
    expected = announced_bytes(data, max_bytes)
    if expected is None:
        raise WireError(f"the message ends after {len(data)} bytes, its header alone has {_HEADER.size}")
    if len(data) != expected:
        raise WireError(f"the message has {len(data)} bytes, its header announces {expected}")
    _, _, kind, text_length, _, digest = _HEADER.unpack_from(data)
    body = memoryview(data)[_HEADER.size :]
    if _digest(data, body) != digest:
        raise WireError("the message's digest does not fit its content; it was damaged on the way")
    return Message(_NAMES[kind], _decode_header(body[:text_length]), _decode_tensors(body[text_length:]))


def _decode_header(text: memoryview) -> dict[str, Any]:
    try:
        header = json.loads(str(text, "utf-8"), object_pairs_hook=_unique)
        _check_json(header, MAX_JSON_DEPTH)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the message's header is no JSON: {str(error)[:_SHOWN_CHARACTERS]}") from error
    if not isinstance(header, dict):
        raise WireError(f"the message's header is a JSON {type(header).__name__} instead of an object")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of a JSON text; raises ValueError when two readers could see two values in it."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice in an object")
    return found


def _check_json(value: Any, depth: int) -> None:
    """Raise ValueError for what cannot be shown or compared: nested without end, or half a character."""
    if depth < 0:
        raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} deep")
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_json(name, depth)
            _check_json(item, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _check_json(item, depth - 1)


def _decode_tensors(payload: memoryview) -> dict[str, Tensor]:
    if not payload:
        return {}
    index_bytes = int.from_bytes(payload[:8], "little")
    if index_bytes > MAX_INDEX_BYTES:
        raise WireError(
            f"the message's tensors cannot be read: their list has {index_bytes} bytes, more than the "
            f"{MAX_INDEX_BYTES} allowed"
        )
    try:
        tensors = safetensors.torch.load(bytes(payload))
    except Exception as error:  # what safetensors and torch raise for a damaged payload has no common base
        reason = str(error)[:_SHOWN_CHARACTERS]
        raise WireError(f"the message's tensors cannot be read: {reason}") from error
    unknown = sorted({str(value.dtype) for value in tensors.values()} - {str(dtype) for dtype in DTYPES})
    if unknown:
        raise WireError(f"the message's tensors cannot be read: unknown type {', '.join(unknown)}")
    return tensors
