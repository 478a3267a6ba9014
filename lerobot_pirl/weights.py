"""The weights that train: all that travels from learner to actor."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

NOISE_HEAD = "noise_head."


def trainable_parameters(policy: nn.Module, noise_head: nn.Module | None = None) -> dict[str, nn.Parameter]:
    """Return the parameters of a policy that train, by name, and those of a noise head with a prefix."""
    found = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    if noise_head is not None:
        found |= {f"{NOISE_HEAD}{name}": p for name, p in noise_head.named_parameters()}
    return found


def load_weights(policy: nn.Module, weights: dict[str, Tensor], noise_head: nn.Module | None = None) -> None:
    """Copy pushed weights into a policy, and its noise head where it has one, in place.

    Raises:
        ValueError: when a name is unknown or missing, or a shape differs; nothing is copied then.
    """
    parameters = trainable_parameters(policy, noise_head)
    if set(parameters) != set(weights):
        odd = sorted(set(parameters) ^ set(weights))
        raise ValueError(
            f"pushed weights and policy differ in {len(odd)} parameters, the first is {odd[0]!r}"
        )
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            raise ValueError(
                f"pushed weight {name!r} has shape {tuple(weights[name].shape)}, "
                f"the policy's has {tuple(parameter.shape)}"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


@contextmanager
def replaced(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> Iterator[None]:
    """Let parameters have other values for a while, without a copy; no gradient may be under way."""
    present = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = present[name]
