"""The value function: a small network on the policy's detached features."""

from torch import nn

from lerobot_pirl.mlp import make_mlp


def make_value_head(input_dim: int, hidden_dims: tuple[int, ...]) -> nn.Sequential:
    """Return a ReLU MLP ``[B, input_dim] -> [B, 1]``."""
    return make_mlp(input_dim, hidden_dims, 1, nn.ReLU)
