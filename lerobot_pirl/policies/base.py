"""The interface of a policy adapter, and acting and re-evaluating through it.

An adapter tells piRL how one family of flow-matching policies encodes an observation, predicts the clean action
and executes a chunk. Another policy is added by registering a class of this shape in the entry-point group
``lerobot_pirl.policy_adapters`` under its LeRobot ``policy.type``.

Shapes: ``B`` batch, ``K`` denoising steps, ``S`` stored stochastic steps, ``H`` chunk rows, ``D`` channels,
``A`` executed rows (``n_action_steps``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lerobot_pirl import flow

Features = dict[str, Tensor]


class PolicyAdapter(Protocol):
    """What piRL asks of a policy.

    Attributes:
        policy: the LeRobot policy, in eval mode for good (dropout would break the ratio), encoder frozen.
        noise_std: ``[K, H, D]`` noise of every denoising step; 0 where nothing is explored.
        n_action_steps: ``A``, executed rows of a chunk.
        gripper_index: the channel whose x0 prediction is a gripper logit, or None.
        gripper_temperature: temperature of the gripper's Bernoulli at the last step, or None to threshold.
        value_input_dim: width of :meth:`value_input`.
        processors: what turns a raw environment observation into ``encode``'s batch, and back.
    """

    policy: nn.Module
    noise_std: Tensor
    n_action_steps: int
    gripper_index: int | None
    gripper_temperature: float | None
    value_input_dim: int
    processors: Any

    @staticmethod
    def validate(cfg: Any) -> None:
        """Raise ValueError when the run config cannot work with this policy."""

    def encode(self, batch: dict[str, Any]) -> Features:
        """Return everything of an observation that the trainable part reads; every tensor is ``[B, ...]``."""

    def predict_x0(self, features: Features, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the predicted clean chunk ``[B, H, D]`` for ``x_t`` at per-sample times ``t`` ``[B]``."""

    def value_input(self, features: Features) -> Tensor:
        """Return the value head's detached float32 input ``[B, value_input_dim]``."""

    def execute(self, x_0: Tensor, gripper: Tensor | None) -> Tensor:
        """Return the first ``A`` rows as policy actions ``[B, A, D]``; ``gripper`` bits ``[B, A]`` override."""

    def prepare_observation(self, observation: dict[str, Any], tasks: list[str]) -> dict[str, Any]:
        """Return ``encode``'s batch for raw vector-environment observations."""

    def environment_actions(self, actions: Tensor) -> Tensor:
        """Return environment actions ``[B, A, E]`` for policy actions ``[B, A, D]``."""

    def no_decay(self) -> set[str]:
        """Return the names of trainable parameters that weight decay must not touch."""


@dataclass(frozen=True)
class ActionSample:
    """One decision per environment.

    Attributes:
        actions: policy actions ``[B, A, D]``.
        chain: ``[B, S + 1, H, D]``.
        step_index: int64 ``[B, S]``.
        gripper: executed gripper bits, uint8 ``[B, A]``; ``A`` is 0 without a gripper.
        log_prob: joint log-probability of what was drawn, ``[B]``.
        gripper_flips: share of the executed gripper bits that differ from the thresholded logit, ``[B]``.
    """

    actions: Tensor
    chain: Tensor
    step_index: Tensor
    gripper: Tensor
    log_prob: Tensor
    gripper_flips: Tensor


def _gripper_log_prob(adapter: PolicyAdapter, bits: Tensor, logits: Tensor, last: Tensor) -> Tensor:
    """Return ``[B]``, the log pmf of the bits ``[B, A]`` where the last step was the stochastic one, else 0."""
    log_prob = flow.bernoulli_log_prob(bits.float(), logits / adapter.gripper_temperature).sum(dim=1)
    return torch.where(last, log_prob, torch.zeros_like(log_prob))


@torch.no_grad()
def sample_actions(
    adapter: PolicyAdapter,
    features: Features,
    last_step_prob: float,
    generators: Sequence[torch.Generator],
    noise_scale: float = 1.0,
) -> ActionSample:
    """Draw a chunk per sample with one stochastic denoising step each (hybrid Flow-SDE).

    Args:
        adapter: the policy.
        features: of ``B`` observations.
        last_step_prob: probability that the last step is the stochastic one.
        generators: one per sample, on the CPU: what an episode draws depends neither on the device nor on the
            episodes that run beside it.
        noise_scale: factor on ``adapter.noise_std``; the gripper's temperature stays as it is.
    """
    noise_std = adapter.noise_std * noise_scale
    num_steps, chunk_size, action_dim = noise_std.shape
    batch_size = len(generators)
    device = noise_std.device
    draws = [
        (
            flow.draw_step_index(1, num_steps, last_step_prob, generator)[0],
            *torch.randn(2, chunk_size, action_dim, generator=generator),
            torch.rand(adapter.n_action_steps, generator=generator),
        )
        for generator in generators
    ]
    step_index, x_1, noise, uniform = (torch.stack(drawn).to(device) for drawn in zip(*draws, strict=True))
    result = flow.sample_chain(
        lambda x_t, t: adapter.predict_x0(features, x_t, t), x_1, noise_std, step_index, noise
    )
    log_prob = result.log_prob.sum(dim=(1, 2, 3))
    if adapter.gripper_index is None:
        gripper = torch.empty(batch_size, 0, dtype=torch.uint8, device=device)
        actions = adapter.execute(result.x_0, None)
        return ActionSample(
            actions, result.chain, step_index, gripper, log_prob, torch.zeros(batch_size, device=device)
        )
    # the last step has no noise on the gripper's channel, so x_0 holds the logit the network predicted there
    logits = result.x_0[:, : adapter.n_action_steps, adapter.gripper_index]
    threshold = logits > 0
    bits = threshold
    if adapter.gripper_temperature is not None:
        last = step_index[:, 0] == num_steps - 1
        drawn = uniform < torch.sigmoid(logits / adapter.gripper_temperature)
        bits = torch.where(last[:, None], drawn, threshold)
        log_prob = log_prob + _gripper_log_prob(adapter, bits, logits, last)
    flips = (bits != threshold).float().mean(dim=1)
    actions = adapter.execute(result.x_0, bits)
    return ActionSample(actions, result.chain, step_index, bits.to(torch.uint8), log_prob, flips)


@torch.no_grad()
def native_actions(
    adapter: PolicyAdapter, features: Features, generators: Sequence[torch.Generator]
) -> Tensor:
    """Return policy actions ``[B, A, D]`` without exploration, as LeRobot runs the policy.

    Args:
        adapter: the policy.
        features: of ``B`` observations.
        generators: one per sample, on the CPU; each gives the noise that its sample is denoised from.
    """
    num_steps, chunk_size, action_dim = adapter.noise_std.shape
    draws = [torch.randn(chunk_size, action_dim, generator=generator) for generator in generators]
    x_1 = torch.stack(draws).to(adapter.noise_std.device)
    x_0 = flow.sample_native(lambda x_t, t: adapter.predict_x0(features, x_t, t), x_1, num_steps)
    return adapter.execute(x_0, None)


def chain_log_prob(
    adapter: PolicyAdapter,
    features: Features,
    chain: Tensor,
    step_index: Tensor,
    gripper: Tensor,
    noise_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Recompute the joint log-probability of stored decisions under the present weights.

    ``noise_scale`` must be the one the decisions were drawn with.

    Returns:
        ``(log_prob [B], x0_pred [B, S, H, D])``.
    """
    log_prob, x0_pred = flow.evaluate_chain(
        lambda x_t, t: adapter.predict_x0(features, x_t, t),
        chain,
        step_index,
        adapter.noise_std * noise_scale,
    )
    total = log_prob.sum(dim=(1, 2, 3))
    if adapter.gripper_temperature is not None:
        last = step_index[:, -1] == adapter.noise_std.shape[0] - 1
        logits = x0_pred[:, -1, : adapter.n_action_steps, adapter.gripper_index]
        total = total + _gripper_log_prob(adapter, gripper, logits, last)
    return total, x0_pred
