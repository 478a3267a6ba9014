"""What differs, bit by bit, between two checkpoints or two logs of metrics."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_ABSENT = "(absent)"
_TRAIN_CONFIG = "pretrained_model/train_config.json"
_METADATA = "training_state/pirl_metadata.json"
_DIGESTS = "training_state/pirl_digests.json"
# what a run in one go and a stopped and resumed one do not share: where they write and how they were started
IGNORED = {
    "algorithm/config.json": {"wire.port": "runs beside each other have a port each"},
    _TRAIN_CONFIG: {
        "output_dir": "each run has its folder",
        "checkpoint_path": "the checkpoint that was resumed",
        "resume": "true where a checkpoint was resumed",
        "steps": "a resume may ask for more updates",
        "save_freq": "how often a run saves changes nothing that it saves",
        "algorithm.wire.port": "runs beside each other have a port each",
        "policy.pretrained_path": "a resumed policy comes from the checkpoint",
    },
    "pretrained_model/config.json": {"pretrained_path": "a resumed policy comes from the checkpoint"},
    _METADATA: {
        "run_id": "drawn at random for each run",
        "config_path": "shown only: a resume starts from the checkpoint's config",
    },
    _DIGESTS: dict.fromkeys(
        ("algorithm/config.json", "pretrained_model/config.json", _TRAIN_CONFIG, _METADATA),
        "the digest of a file of which something is ignored here",
    ),
}


def checkpoint_differences(left: Path, right: Path) -> list[str]:
    """Compare every file of two checkpoints; one line per tensor, option or file that differs."""
    names = sorted(
        {_name(path, root) for root in (left, right) for path in root.rglob("*") if path.is_file()}
    )
    found = []
    for name in names:
        values = [_values(root / name) if (root / name).is_file() else {} for root in (left, right)]
        found += [f"{name}: {line}" for line in _differing(*values, ignored=IGNORED.get(name, {}))]
    return found


def metrics_differences(left: list[dict], right: list[dict]) -> list[str]:
    """Compare two logs record by record, but for durations."""
    found = []
    for number in range(max(len(left), len(right))):
        records = [records[number] if number < len(records) else {} for records in (left, right)]
        timed = {name for record in records for name in record if name.startswith("time/")}
        # what an actor sent to a learner that was killed belongs to the process, not to the run
        timed.add("rollout/episodes_dropped")
        found += [
            f"metrics.jsonl record {number + 1}: {line}" for line in _differing(*records, ignored=timed)
        ]
    return found


def _differing(left: dict[str, Any], right: dict[str, Any], ignored: Any) -> list[str]:
    names = [name for name in left | right if name not in ignored]
    pairs = [(name, left.get(name, _ABSENT), right.get(name, _ABSENT)) for name in names]
    # as text, 1 and 1.0 or 0.0 and -0.0 are two values and nan is one
    return [f"{name}: {a!s:.80} / {b!s:.80}" for name, a, b in pairs if repr(a) != repr(b)]


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _values(path: Path) -> dict[str, Any]:
    """Return what a file holds, piece by piece."""
    if path.suffix == ".safetensors":
        return _tensors(path)
    if path.suffix == ".json":
        return _leaves(json.loads(path.read_text()))
    return {"(content)": path.read_bytes()}


def _tensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = {f"(file metadata) {name}": value for name, value in (file.metadata() or {}).items()}
    return about | {name: _bits(value) for name, value in named.items()}


def _bits(tensor: Tensor) -> str:
    """Return a text in which every bit of a tensor counts."""
    content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    digest = hashlib.sha256(content).hexdigest()
    return f"{tensor.dtype} {tuple(tensor.shape)} {digest[:16]} {tensor.reshape(-1)[:3].tolist()}"


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the scalars of nested JSON by their full names."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items:
        return {prefix: value}
    return {
        name: leaf
        for key, item in items
        for name, leaf in _leaves(item, f"{prefix}.{key}" if prefix else str(key)).items()
    }
