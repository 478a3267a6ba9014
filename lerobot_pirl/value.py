"""The value function: a small network on the policy's detached features."""

import itertools

from torch import nn


def make_value_head(input_dim: int, hidden_dims: tuple[int, ...]) -> nn.Sequential:
    """Return a ReLU MLP ``[B, input_dim] -> [B, 1]`` whose last layer starts near zero, as RLinf's does."""
    widths = (input_dim, *hidden_dims)
    layers: list[nn.Module] = []
    for width, next_width in itertools.pairwise(widths):
        layers += [nn.Linear(width, next_width), nn.ReLU()]
    last = nn.Linear(widths[-1], 1)
    nn.init.normal_(last.weight, std=0.02)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)
