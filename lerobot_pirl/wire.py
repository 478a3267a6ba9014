"""Messages between learner and actor as bytes: a header, JSON and safetensors; nothing is ever unpickled.

Layout, little endian: magic ``PIRL``, format version u8, kind u8, JSON length u32, payload length u64, XXH3 (128 bits)
over everything before and after it, JSON (UTF-8), safetensors payload (empty without tensors). The digest finds damage,
at the speed of memory; against who wants to deceive, a connection has its token and TLS.
"""

import json
import struct
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from xxhash import xxh3_128

from lerobot_pirl import tensors as layout

MAGIC = b"PIRL"
FORMAT_VERSION = 2
KINDS = {"weights": 1, "rollout": 2, "end": 3, "refusal": 4, "evaluation": 5, "ask": 6, "share": 7}
_NAMES = {number: name for name, number in KINDS.items()}
_DIGEST_BYTES = xxh3_128().digest_size
_HEADER = struct.Struct(f"<4sBBIQ{_DIGEST_BYTES}s")
MAX_BYTES = 8 * 2**30
# of a message whose size does not grow with the policy
MAX_SMALL_BYTES = 64 * 2**20
LARGE_KINDS = ("weights", "rollout")
MAX_JSON_BYTES = 2**20
MAX_JSON_DEPTH = 64
# of what a library says about hostile bytes
_SHOWN_CHARACTERS = 200
Buffer = bytes | bytearray | memoryview


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


def _digest(head: Buffer, *parts: Buffer) -> bytes:
    """Return the digest over the header up to its digest and over the parts that follow it."""
    digest = xxh3_128(head[: _HEADER.size - _DIGEST_BYTES])
    for part in parts:
        digest.update(part)
    return digest.digest()


def encode(message: Message) -> bytes:
    """Return the bytes of a message; raises WireError as :func:`encode_parts`."""
    return b"".join(encode_parts(message))


def encode_parts(message: Message) -> list[Buffer]:
    """Return the bytes of a message in parts: what comes before its tensors, and the tensors' own memory.

    Tensors on the CPU must not change until the parts are sent: they are not copied.

    Raises:
        WireError: for an unknown kind, or a tensor of a type that is not sent.
    """
    if message.kind not in KINDS:
        raise WireError(f"unknown message kind {message.kind!r}; known are {', '.join(KINDS)}")
    text = json.dumps(message.header, sort_keys=True).encode()
    try:
        payload = layout.to_parts(message.tensors) if message.tensors else []
    except ValueError as error:
        raise WireError(f"the {message.kind} message cannot be sent: {error}") from error
    fields = (MAGIC, FORMAT_VERSION, KINDS[message.kind], len(text), sum(map(len, payload)))
    digest = _digest(_HEADER.pack(*fields, b""), text, *payload)
    return [_HEADER.pack(*fields, digest) + text, *payload]


def announced_bytes(start: Buffer, max_bytes: int = MAX_BYTES) -> int | None:
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


def payload_start(start: Buffer) -> int:
    """Return the place of the tensors in the message that begins with ``start``, which holds its whole header."""
    return _HEADER.size + _HEADER.unpack_from(start)[3]


def decode(data: Buffer, max_bytes: int = MAX_BYTES) -> Message:
    """Return the message in ``data``.

    Its tensors are views of ``data`` and change with it; where it is read-only, they are copies.

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
        header = json.loads(str(text, "utf-8"), object_pairs_hook=layout.unique)
        _check_json(header, MAX_JSON_DEPTH)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the message's header is no JSON: {str(error)[:_SHOWN_CHARACTERS]}") from error
    if not isinstance(header, dict):
        raise WireError(f"the message's header is a JSON {type(header).__name__} instead of an object")
    return header


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
    try:
        return layout.from_bytes(payload) if payload else {}
    except (ValueError, RuntimeError, RecursionError) as error:
        reason = str(error)[:_SHOWN_CHARACTERS]
        raise WireError(f"the message's tensors cannot be read: {reason}") from error
