"""The weights that train: all that travels from learner to actor."""

import torch
from torch import Tensor, nn


def trainable_parameters(policy: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a policy that train, by name."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def load_weights(policy: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy pushed weights into a policy in place.

    Raises:
        ValueError: when a name is unknown or missing, or a shape differs; nothing is copied then.
    """
    parameters = trainable_parameters(policy)
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
