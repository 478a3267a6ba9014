"""What the losses need of every row of a rollout, and what to log about it."""

import torch
from torch import Tensor

from lerobot_pirl import ppo
from lerobot_pirl.options import PiRLConfig
from lerobot_pirl.rollout import Rollout, compute_returns, group_returns

Targets = tuple[dict[str, Tensor], dict[str, float]]


def gae_targets(rollout: Rollout, values: Tensor, final_values: Tensor, config: PiRLConfig) -> Targets:
    """Return values, returns and generalised advantages, each ``[N]``.

    Args:
        rollout: ``N`` rows.
        values: of every row's observation, ``[N]``.
        final_values: of the last observation of every truncated episode.
        config: options.
    """
    advantages, returns = compute_returns(
        rollout, values, final_values, config.gamma, config.gae_lambda, config.bootstrap_truncation
    )
    extra = {
        "explained_variance": ppo.explained_variance(values, returns),
        "value_mean": float(values.mean()),
        "return_mean": float(returns.mean()),
        "advantage_std": float(advantages.std(unbiased=False)),
    }
    if config.normalize_advantage:
        advantages = ppo.normalize_advantages(advantages)
    return {"old_values": values, "returns": returns, "advantages": advantages}, extra


def group_targets(rollout: Rollout, config: PiRLConfig) -> Targets:
    """Return advantages by comparison within groups; ``kept`` tells the rows of groups that are learned from.

    Raises:
        ValueError: when the episodes do not come in groups that share task and initial state.
    """
    size = config.resolved_group_size
    returns = group_returns(rollout, size)
    kept = torch.ones(len(rollout.success) // size, dtype=torch.bool)
    if config.group_filter is not None:
        kept = ppo.groups_in_range(rollout.success, size, *config.group_filter)
    lengths = rollout.episode_lengths
    advantages = ppo.group_advantages(returns, size).repeat_interleave(lengths)
    extra = {
        "groups_kept": float(kept.float().mean()),
        "return_mean": float(returns.mean()),
        "advantage_std": float(advantages.std(unbiased=False)),
    }
    rows = kept.repeat_interleave(size).repeat_interleave(lengths)
    return {"advantages": advantages, "kept": rows}, extra
