"""PPO's arithmetic: advantages and losses as pure functions on tensors.

``T`` is the number of executed chunks of an episode, ``E`` the number of episodes, ``N`` a minibatch of chunks.
One entry is one executed chunk, so ``gamma`` and ``gae_lambda`` act per chunk.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def compute_gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    ended: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Return generalised advantages and returns (Schulman et al., arXiv 1506.02438).

    ``delta_t = r_t + gamma * V(o_{t+1}) * (1 - terminated_t) - V(o_t)`` and
    ``A_t = delta_t + gamma * lambda * (1 - ended_t) * A_{t+1}``. A truncated chunk has ``ended`` but not
    ``terminated``: it bootstraps from ``next_values``, the value of the observation it really ended in.

    Args:
        rewards, values, next_values: float ``[T, E]``.
        terminated, ended: bool ``[T, E]``; every padded entry after an episode's end must have ``ended``.
        gamma: discount per chunk.
        gae_lambda: lambda per chunk.

    Returns:
        ``(advantages, returns)``, both ``[T, E]``.
    """
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[0])
    deltas = rewards + gamma * next_values * ~terminated - values
    for t in reversed(range(len(rewards))):
        running = deltas[t] + gamma * gae_lambda * ~ended[t] * running
        advantages[t] = running
    return advantages, advantages + values


def normalize_advantages(advantages: Tensor) -> Tensor:
    """Return advantages with mean 0 and standard deviation 1; zeros when they are all alike. ``[N]``."""
    # float64: float32's rounding of the mean of equal numbers would be scaled up to size 1
    wide = advantages.double()
    scaled = (wide - wide.mean()) / (wide.std(unbiased=False) + 1e-5)
    return scaled.to(advantages.dtype)


def group_advantages(returns: Tensor, group_size: int) -> Tensor:
    """Return every episode's return relative to its group, ``(R - mean) / (std + 1e-6)``, ``[E]``.

    As in GRPO (arXiv 2402.03300); the standard deviation is the unbiased one, and a group without differences
    gets zeros.

    Args:
        returns: undiscounted return of every episode, ``[E]``; neighbours form a group.
        group_size: episodes per group.
    """
    groups = returns.double().unflatten(0, (-1, group_size))
    scaled = (groups - groups.mean(dim=1, keepdim=True)) / (groups.std(dim=1, keepdim=True) + 1e-6)
    return scaled.flatten().to(returns.dtype)


def groups_in_range(success: Tensor, group_size: int, low: float, high: float) -> Tensor:
    """Return for every group whether its success rate lies in ``[low, high]``, bool ``[E / group_size]``."""
    rates = success.double().unflatten(0, (-1, group_size)).mean(dim=1)
    # a rate such as 0.1 is no float of its own
    return (rates >= low - 1e-9) & (rates <= high + 1e-9)


def sample_weights(episode_lengths: Tensor, aggregation: str) -> Tensor:
    """Return the loss weight of every chunk, mean 1, ``[N]`` in episode order.

    ``token`` weighs all chunks alike; ``episode`` weighs all episodes alike, whatever their length.
    """
    weights = torch.ones(int(episode_lengths.sum()))
    if aggregation == "episode":
        weights = torch.repeat_interleave(1 / episode_lengths.float(), episode_lengths)
    return weights / weights.mean()


def policy_loss(ratio: Tensor, advantages: Tensor, clip_range: float, dual_clip: float | None) -> Tensor:
    """Return PPO's clipped surrogate loss per sample, ``[N]``.

    With ``dual_clip`` the loss of negative advantages is bounded by ``dual_clip * |A|`` (arXiv 1912.09729).
    """
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip_range_vf: float | None, huber_delta: float
) -> Tensor:
    """Return the Huber value loss per sample, ``[N]``; with clipping the larger of clipped and unclipped."""
    loss = F.huber_loss(values, returns, reduction="none", delta=huber_delta)
    if clip_range_vf is None:
        return loss
    clipped = old_values + (values - old_values).clamp(-clip_range_vf, clip_range_vf)
    return torch.maximum(loss, F.huber_loss(clipped, returns, reduction="none", delta=huber_delta))


def approx_kl(log_ratio: Tensor) -> Tensor:
    """Return the non-negative k3 estimate of KL(old || new) per sample, ``exp(r) - 1 - r``, ``[N]``."""
    return torch.expm1(log_ratio) - log_ratio


def clip_fraction(ratio: Tensor, clip_range: float) -> Tensor:
    """Return per sample whether the ratio left the trust region, float ``[N]``."""
    return ((ratio - 1).abs() > clip_range).float()


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """Return ``1 - Var(returns - values) / Var(returns)``; nan when the returns do not vary."""
    variance = returns.var(unbiased=False)
    if variance == 0:
        return float("nan")
    return float(1 - (returns - values).var(unbiased=False) / variance)
