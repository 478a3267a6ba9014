"""Small networks on the policy's features."""

import itertools

from torch import nn


def make_mlp(
    input_dim: int, hidden_dims: tuple[int, ...], output_dim: int, activation: type[nn.Module]
) -> nn.Sequential:
    """Return an MLP ``[..., input_dim] -> [..., output_dim]`` whose last layer starts near zero, as RLinf's do."""
    widths = (input_dim, *hidden_dims)
    layers: list[nn.Module] = []
    for width, next_width in itertools.pairwise(widths):
        layers += [nn.Linear(width, next_width), activation()]
    last = nn.Linear(widths[-1], output_dim)
    nn.init.normal_(last.weight, std=0.02)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)
