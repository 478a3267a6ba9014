"""The noise head of Flow-Noise: the policy learns how much it explores, in every step, row and channel."""

import torch
from torch import Tensor, nn

from lerobot_pirl.mlp import make_mlp

# channels of a group and the (lowest, highest) std that they may have
Groups = dict[str, tuple[slice, tuple[float, float]]]


class NoiseHead(nn.Module):
    """Hidden action features ``[B, H, W]`` -> std ``[B, H, D]``, as in ReinFlow and piRL.

    A tanh MLP per row, whose output moves log(std) between the logarithms of its channel's limits; it starts near
    the middle, the geometric mean. Nothing is detached: surrogate and entropy also train the policy through it.
    """

    def __init__(
        self, input_dim: int, hidden_dims: tuple[int, ...], groups: Groups, num_channels: int, num_rows: int
    ) -> None:
        """Make the network.

        Args:
            input_dim: ``W``.
            hidden_dims: widths of the hidden layers.
            groups: what is explored, by name; all other channels get 0.
            num_channels: ``D``.
            num_rows: rows that are executed; all later ones get 0.
        """
        super().__init__()
        self.mlp = make_mlp(input_dim, hidden_dims, num_channels, nn.Tanh)
        self.channels = {name: channels for name, (channels, _) in groups.items()}
        self.num_rows = num_rows
        # 1 where nothing is explored keeps logarithms, and with them gradients, finite
        limits = torch.ones(2, num_channels)
        explored = torch.zeros(num_channels, dtype=torch.bool)
        for channels, limit in groups.values():
            limits[:, channels] = torch.tensor(limit)[:, None]
            explored[channels] = True
        # they follow from the config and are no weights
        self.register_buffer("log_limits", limits.log(), persistent=False)
        self.register_buffer("explored", explored, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the std, float32 whatever autocast says: a log-prob is sensitive to it."""
        with torch.autocast(hidden.device.type, enabled=False):
            share = (1 + torch.tanh(self.mlp(hidden.float()))) / 2
        lowest, highest = self.log_limits
        std = torch.exp(lowest + (highest - lowest) * share)
        rows = torch.arange(hidden.shape[1], device=hidden.device) < self.num_rows
        return torch.where(rows[:, None] & self.explored, std, torch.zeros_like(std))

    def upper_bound(self, num_denoising_steps: int, chunk_size: int) -> Tensor:
        """Return the largest std of every step, row and channel, ``[K, H, D]``; 0 where nothing is explored."""
        bound = torch.where(self.explored, self.log_limits[1].exp(), 0).repeat(
            num_denoising_steps, chunk_size, 1
        )
        bound[:, self.num_rows :] = 0
        return bound

    def group_means(self, std: Tensor) -> dict[str, Tensor]:
        """Return the mean of std ``[..., H, D]`` over the explored rows and channels of every group, ``[...]``."""
        return {
            name: std[..., : self.num_rows, channels].mean(dim=(-2, -1))
            for name, channels in self.channels.items()
        }
