"""What one micro-batch adds to the loss: sums over its ``B`` samples, and what to log of each."""

import math

from torch import Tensor

from lerobot_pirl import flow, ppo
from lerobot_pirl.options import PiRLConfig
from lerobot_pirl.policies.base import (
    Distributions,
    Features,
    PolicyAdapter,
    chain_log_prob,
    kl_divergence,
    noise_head,
)

Samples = dict[str, Tensor]
_START = "start_"


def decision_distributions(
    adapter: PolicyAdapter, features: Features, data: dict[str, Tensor], noise_scale: float
) -> dict[str, Tensor]:
    """Return what the policy, as it is, draws the stored decisions from, as the starting policy's part of ``data``."""
    stored = (data["chain"], data["step_index"], data["gripper"])
    _, drawn_from = chain_log_prob(adapter, features, *stored, noise_scale)
    return {f"{_START}{name}": value for name, value in vars(drawn_from).items()}


def policy_objective(
    adapter: PolicyAdapter,
    config: PiRLConfig,
    step_weights: Tensor,
    features: Features,
    data: dict[str, Tensor],
    noise_scale: float,
) -> tuple[Tensor, dict[str, Tensor], Samples]:
    """Return the policy's summed loss, its parts (sums) and per-sample diagnostics.

    PPO's surrogate, with the ratio of a whole decision; less ``entropy_coef`` times the learned noise's entropy (mean
    over explored numbers of all steps), plus ``kl_coef`` times the KL from the starting policy (sum over the same).

    Args:
        adapter: the policy.
        config: options.
        step_weights: of every denoising step, ``[K]``.
        features: of ``B`` observations.
        data: rows of a rollout and its targets; per-step values are ``[B, S]``.
        noise_scale: the one that the decisions were drawn with.
    """
    stored = (data["chain"], data["step_index"], data["gripper"])
    log_prob, drawn_from = chain_log_prob(adapter, features, *stored, noise_scale)
    step_log_ratio = log_prob - data["old_log_prob"]
    log_ratio = step_log_ratio.sum(dim=1)
    ratio = log_ratio.exp()
    surrogate = ppo.policy_loss(ratio, data["advantages"], config.clip_range, config.dual_clip)
    step_weight = step_weights[data["step_index"]].mean(dim=1)
    policy_sum = (surrogate * step_weight * data["weights"]).sum()
    loss = policy_sum
    samples = _ratio_diagnostics(log_ratio.detach(), step_log_ratio.detach(), config.clip_range)
    samples["step_index"] = data["step_index"]
    head = noise_head(adapter)
    if head is not None:
        entropy = flow.mean_entropy(drawn_from.std)
        loss = loss - config.entropy_coef * (entropy * data["weights"]).sum()
        groups = head.group_means(drawn_from.std.detach())
        samples |= {"entropy": entropy.detach()} | {f"noise_std_{name}": std for name, std in groups.items()}
    if config.kl_coef:
        start = Distributions(
            **{name.removeprefix(_START): value for name, value in data.items() if name.startswith(_START)}
        )
        kl = kl_divergence(drawn_from, start)
        loss = loss + config.kl_coef * (kl * data["weights"]).sum()
        samples["kl_to_start"] = kl.detach()
    return loss, {"policy_loss": policy_sum.detach()}, samples


def _ratio_diagnostics(log_ratio: Tensor, step_log_ratio: Tensor, clip_range: float) -> Samples:
    """Return KL and clipping of whole decisions ``[B]`` and of their steps, each by its own ratio, ``[B, S]``."""
    ratio = log_ratio.exp()
    return {
        "kl": ppo.approx_kl(log_ratio),
        "kl_k1": -log_ratio,
        "clipped": ppo.clip_fraction(ratio, clip_range),
        "ratio": ratio,
        "step_kl": ppo.approx_kl(step_log_ratio),
        "step_clipped": ppo.clip_fraction(step_log_ratio.exp(), clip_range),
    }


def value_objective(
    values: Tensor, config: PiRLConfig, data: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor], Samples]:
    """Return the same of the value function, whose values are ``[B]``."""
    losses = ppo.value_loss(
        values, data["old_values"], data["returns"], config.clip_range_vf, config.huber_delta
    )
    loss = (losses * data["weights"]).sum()
    change = (values.detach() - data["old_values"]).abs()
    clipped = change > (math.inf if config.clip_range_vf is None else config.clip_range_vf)
    return loss, {"value_loss": loss.detach()}, {"vf_clipped": clipped.float()}
