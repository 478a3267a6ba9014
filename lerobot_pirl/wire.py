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
from torch import Tensor

MAGIC = b"PIRL"
FORMAT_VERSION = 1
KINDS = {"weights": 1, "rollout": 2, "end": 3, "refusal": 4, "evaluation": 5}
_NAMES = {number: name for name, number in KINDS.items()}
_HEADER = struct.Struct("<4sBBIQ32s")
_DIGEST_BYTES = hashlib.sha256().digest_size
MAX_BYTES = 8 * 2**30


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


def decode(data: bytes, max_bytes: int = MAX_BYTES) -> Message:
    """Return the message in ``data``.

    Raises:
        WireError: one sentence on the first thing that is wrong.
    """
    if len(data) > max_bytes:
        raise WireError(f"the message has {len(data)} bytes, more than the {max_bytes} allowed")
    if len(data) < _HEADER.size:
        raise WireError(f"the message ends after {len(data)} bytes, its header alone has {_HEADER.size}")
    magic, version, kind, text_length, payload_length, digest = _HEADER.unpack_from(data)
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
    expected = _HEADER.size + text_length + payload_length
    if len(data) != expected:
        raise WireError(f"the message has {len(data)} bytes, its header announces {expected}")
    body = memoryview(data)[_HEADER.size :]
    if _digest(data, body) != digest:
        raise WireError("the message's digest does not fit its content; it was damaged on the way")
    header = _decode_header(body[:text_length])
    try:
        tensors = safetensors.torch.load(bytes(body[text_length:])) if payload_length else {}
    except Exception as error:  # what safetensors and torch raise for a damaged payload has no common base
        raise WireError(f"the message's tensors cannot be read: {error}") from error
    return Message(_NAMES[kind], header, tensors)


def _decode_header(text: memoryview) -> dict[str, Any]:
    try:
        header = json.loads(str(text, "utf-8"))
    except (ValueError, RecursionError) as error:
        raise WireError(f"the message's header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise WireError(f"the message's header is a JSON {type(header).__name__} instead of an object")
    return header
