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
from lerobot_pirl.noise import NoiseHead

Features = dict[str, Tensor]


class PolicyAdapter(Protocol):
    """What piRL asks of a policy.

    Attributes:
        policy: the LeRobot policy, in eval mode for good (dropout would break the ratio), encoder frozen.
        noise_std: ``[K, H, D]`` noise of every denoising step; 0 where nothing is explored. With a noise head, the
            most that it may give.
        noise_head: what gives the noise of ``flow_noise``, None with ``flow_sde``. An adapter without this attribute
            offers ``flow_sde`` alone.
        n_action_steps: ``A``, executed rows of a chunk.
        gripper_index: the channel whose x0 prediction is a gripper logit, or None.
        gripper_temperature: temperature of the gripper's Bernoulli at the last step, or None to threshold.
        position_index: slice of the channels of an action that are a position in metres, or None; an adapter without it
            has its changes not measured.
        value_input_dim: width of :meth:`value_input`.
        processors: what turns a raw environment observation into ``encode``'s batch, and back.
    """

    policy: nn.Module
    noise_std: Tensor
    noise_head: NoiseHead | None
    n_action_steps: int
    gripper_index: int | None
    gripper_temperature: float | None
    position_index: slice | None
    value_input_dim: int
    processors: Any

    @staticmethod
    def validate(cfg: Any) -> None:
        """Raise ValueError when the run config cannot work with this policy."""

    def encode(self, batch: dict[str, Any]) -> Features:
        """Return everything of an observation that the trainable part reads; every tensor is ``[B, ...]``."""

    def check_features(self, features: Features) -> None:
        """Raise ValueError for features that :meth:`encode` cannot have made; an adapter may lack this.

        They come over the wire, and an update that stumbles over them ends the run.
        """

    def predict_x0(self, features: Features, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the predicted clean chunk ``[B, H, D]`` for ``x_t`` at per-sample times ``t`` ``[B]``."""

    def predict_x0_and_std(self, features: Features, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same and the noise head's std ``[B, H, D]``, float32; asked for only with a noise head."""

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

    def bfloat16_inputs(self) -> set[str]:
        """Return the names of float32 parameters that acting reads rounded to bfloat16; an adapter may lack this.

        They are pushed to the actors in bfloat16.
        """


@dataclass(frozen=True)
class ActionSample:
    """One decision per environment.

    Attributes:
        actions: policy actions ``[B, A, D]``.
        chain: ``[B, S + 1, H, D]``.
        step_index: int64 ``[B, S]``.
        gripper: executed gripper bits, uint8 ``[B, A]``; ``A`` is 0 without a gripper.
        log_prob: log-probability of what was drawn in every stored step, ``[B, S]``; the sum is the decision's. Drawn
            gripper bits belong to the last step.
        gripper_flips: share of the executed gripper bits that differ from the thresholded logit, ``[B]``.
    """

    actions: Tensor
    chain: Tensor
    step_index: Tensor
    gripper: Tensor
    log_prob: Tensor
    gripper_flips: Tensor


@dataclass(frozen=True)
class Distributions:
    """What stored decisions were drawn from, under one set of weights.

    Attributes:
        mean, std: Gaussians of the stored steps, ``[B, S, H, D]``.
        gripper_logits: of the gripper's Bernoullis, ``[B, A]``; 0 where it was not drawn, ``A`` is 0 without any.
    """

    mean: Tensor
    std: Tensor
    gripper_logits: Tensor


def noise_head(adapter: PolicyAdapter) -> NoiseHead | None:
    """Return the adapter's noise head, None where the noise is a table."""
    return getattr(adapter, "noise_head", None)


def _predict_step(adapter: PolicyAdapter, features: Features, noise_scale: float) -> flow.PredictStep:
    def predict(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x0_pred, std = adapter.predict_x0_and_std(features, x_t, t)
        return x0_pred, std * noise_scale

    return predict


def _add_to_last(log_prob: Tensor, bits: Tensor, logits: Tensor, drawn: Tensor) -> Tensor:
    """Add the log pmf of gripper bits ``[B, A]`` to the last step's log-probs where they were drawn, ``[B, S]``."""
    added = torch.where(drawn, flow.bernoulli_log_prob(bits.float(), logits).sum(dim=1), 0)
    return torch.cat([log_prob[:, :-1], log_prob[:, -1:] + added[:, None]], dim=1)


@torch.no_grad()
def sample_actions(
    adapter: PolicyAdapter,
    features: Features,
    last_step_prob: float,
    generators: Sequence[torch.Generator],
    noise_scale: float = 1.0,
) -> ActionSample:
    """Draw a chunk per sample: with one stochastic denoising step each (hybrid Flow-SDE), or all of them (Flow-Noise).

    Args:
        adapter: the policy; with a noise head it is Flow-Noise.
        features: of ``B`` observations.
        last_step_prob: Flow-SDE's probability that the last step is the stochastic one.
        generators: one per sample, on the CPU: what an episode draws depends neither on the device nor on the
            episodes that run beside it.
        noise_scale: factor on the noise; the gripper's temperature stays as it is.
    """
    num_steps, chunk_size, action_dim = adapter.noise_std.shape
    learned = noise_head(adapter) is not None
    draws = [
        (
            torch.empty(0) if learned else flow.draw_step_index(1, num_steps, last_step_prob, generator)[0],
            torch.randn(1 + (num_steps if learned else 1), chunk_size, action_dim, generator=generator),
            torch.rand(adapter.n_action_steps, generator=generator),
        )
        for generator in generators
    ]
    stacked = (torch.stack(drawn).to(adapter.noise_std.device) for drawn in zip(*draws, strict=True))
    step_index, noise, uniform = stacked
    if learned:
        result = flow.sample_noisy_chain(
            _predict_step(adapter, features, noise_scale), noise[:, 0], noise[:, 1:]
        )
    else:
        result = flow.sample_chain(
            lambda x_t, t: adapter.predict_x0(features, x_t, t),
            noise[:, 0],
            adapter.noise_std * noise_scale,
            step_index,
            noise[:, 1],
        )
    return _execute(adapter, result, uniform)


def _execute(adapter: PolicyAdapter, result: flow.Chain, uniform: Tensor) -> ActionSample:
    """Draw or threshold the gripper of sampled chains with uniform numbers ``[B, A]``."""
    log_prob = result.log_prob.sum(dim=(2, 3))
    batch_size, device = len(log_prob), log_prob.device
    if adapter.gripper_index is None:
        gripper = torch.empty(batch_size, 0, dtype=torch.uint8, device=device)
        actions, flips = adapter.execute(result.x_0, None), torch.zeros(batch_size, device=device)
        return ActionSample(actions, result.chain, result.step_index, gripper, log_prob, flips)
    # the last step has no noise on the gripper's channel, so x_0 holds the logit the network predicted there
    logits = result.x_0[:, : adapter.n_action_steps, adapter.gripper_index]
    threshold = logits > 0
    bits = threshold
    if adapter.gripper_temperature is not None:
        drawn = result.step_index[:, -1] == len(adapter.noise_std) - 1
        logits = logits / adapter.gripper_temperature
        bits = torch.where(drawn[:, None], uniform < torch.sigmoid(logits), threshold)
        log_prob = _add_to_last(log_prob, bits, logits, drawn)
    flips = (bits != threshold).float().mean(dim=1)
    actions = adapter.execute(result.x_0, bits)
    return ActionSample(actions, result.chain, result.step_index, bits.to(torch.uint8), log_prob, flips)


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
) -> tuple[Tensor, Distributions]:
    """Recompute the log-probability of stored decisions under the present weights.

    ``noise_scale`` must be the one the decisions were drawn with. The network is called once per stored step.

    Returns:
        log-probs of the stored steps ``[B, S]``, as in :class:`ActionSample`, and what the decisions are drawn from.
    """
    num_steps = len(adapter.noise_std)
    if noise_head(adapter) is None:
        log_prob, steps = flow.evaluate_chain(
            lambda x_t, t: adapter.predict_x0(features, x_t, t),
            chain,
            step_index,
            adapter.noise_std * noise_scale,
        )
    else:
        predict = _predict_step(adapter, features, noise_scale)
        log_prob, steps = flow.evaluate_noisy_chain(predict, chain, step_index, num_steps)
    log_prob = log_prob.sum(dim=(2, 3))
    logits = log_prob.new_zeros(len(log_prob), 0)
    if adapter.gripper_temperature is not None:
        drawn = step_index[:, -1] == num_steps - 1
        logits = steps.x0_pred[:, -1, : adapter.n_action_steps, adapter.gripper_index]
        logits = torch.where(drawn[:, None], logits / adapter.gripper_temperature, 0)
        log_prob = _add_to_last(log_prob, gripper, logits, drawn)
    return log_prob, Distributions(steps.mean, steps.std, logits)


def kl_divergence(one: Distributions, other: Distributions) -> Tensor:
    """Return KL(one || other) of every decision, in closed form given the states of its chain, ``[B]``."""
    gaussian = flow.gaussian_kl(one.mean, one.std, other.mean, other.std).sum(dim=(1, 2, 3))
    return gaussian + flow.bernoulli_kl(one.gripper_logits, other.gripper_logits).sum(dim=1)
