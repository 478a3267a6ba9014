"""SHA-256 of what two processes must have alike: options, frozen weights, tokenizer and processors."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from lerobot.processor import TokenizerProcessorStep
from torch import Tensor, nn

# of a processor step: where it runs, and where its tokenizer was loaded from, which has a digest of its own
_PROCESS_STEP = ("device", "tokenizer_name", "tokenizer")
# of a tokenizer: set anew by every call, from the processor step's own options
_SET_BY_CALLS = ("truncation", "padding")


def canonical(value: Any) -> Any:
    """Return a JSON value in which equal configs look alike: 1 and 1.0 are one number."""
    if isinstance(value, dict):
        return {str(key): canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _text(value: Any) -> bytes:
    return json.dumps(canonical(value), sort_keys=True, separators=(",", ":")).encode()


def json_digest(value: Any) -> str:
    """Return a SHA-256 over the canonical JSON of a value."""
    return hashlib.sha256(_text(value)).hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().flatten().view(torch.uint8).numpy()


def frozen_digest(policy: nn.Module) -> str:
    """Return a SHA-256 over the weights that do not train; actors compute features with them."""
    digest = hashlib.sha256()
    for name, parameter in sorted(policy.named_parameters()):
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(_bytes(parameter))
    return digest.hexdigest()


def tokenizer_digest(steps: Iterable[Any]) -> str:
    """Return a SHA-256 over a pipeline's tokenizer, wherever it was loaded from."""
    digest = hashlib.sha256()
    for step in steps:
        if isinstance(step, TokenizerProcessorStep):
            digest.update(_text(_tokenizer(step.input_tokenizer)))
    return digest.hexdigest()


def _tokenizer(tokenizer: Any) -> list[Any]:
    """Return what a tokenizer makes of a text, as JSON: all rules of a fast one, otherwise the vocabulary."""
    special = {name: str(token) for name, token in getattr(tokenizer, "special_tokens_map", {}).items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [special, tokenizer.get_vocab()]
    rules = json.loads(backend.to_str())
    return [special, {name: value for name, value in rules.items() if name not in _SET_BY_CALLS}]


def processors_digest(*pipelines: Any) -> str:
    """Return a SHA-256 over the steps of processor pipelines: their names, options and tensors."""
    digest = hashlib.sha256()
    for place, pipeline in enumerate(pipelines):
        for step in pipeline.steps:
            kind = type(step)
            name = getattr(kind, "_registry_name", None) or f"{kind.__module__}.{kind.__qualname__}"
            options = {key: value for key, value in step.get_config().items() if key not in _PROCESS_STEP}
            digest.update(_text([place, name, options]))
            for key, tensor in sorted(step.state_dict().items()):
                digest.update(_text([key, str(tensor.dtype), list(tensor.shape)]))
                digest.update(_bytes(tensor))
    return digest.hexdigest()
