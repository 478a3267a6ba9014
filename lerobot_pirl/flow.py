"""Denoising kernels for flow-matching policies that predict the clean action: pure functions on tensors.

Convention (X-VLA's and openpi's): ``t = 1`` is noise, ``t = 0`` is data and ``x_t = (1 - t) x_0 + t x_1``.
The network predicts ``x0_pred = E[x_0 | x_t]``, hence ``x1_pred = (x_t - (1 - t) x0_pred) / t``.
One step goes from ``t`` to ``s < t``:

* ODE (Euler): ``x_s = (1 - s) x0_pred + s x1_pred``
* SDE (Flow-SDE): Gaussian with ``mean = (1 - s) x0_pred + (s - std^2 / (2 t)) x1_pred`` and ``std``, the
  Euler-Maruyama step of ``dx = [v - sigma^2/2 * score] dt + sigma dw`` with ``score = -x1_pred / t`` and
  ``std = sqrt(t - s) * sigma``. It has the ODE's marginals for any diagonal ``sigma``, and is the ODE for 0.
* Flow-Noise: Gaussian around the ODE step, without a correction of the drift, with a learned ``std``.

All shapes use ``B`` batch, ``K`` denoising steps, ``S`` stored stochastic steps, ``H`` chunk rows and ``D``
action channels. Everything here is float32 whatever the network's dtype is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

# (x_t [B, H, D], t [B]) -> x0_pred [B, H, D]
PredictX0 = Callable[[Tensor, Tensor], Tensor]
# the same -> (x0_pred, std), both [B, H, D]
PredictStep = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def time_grid(num_denoising_steps: int) -> Tensor:
    """Return ``[1, (K-1)/K, ..., 1/K, 0]``, float32 ``[K + 1]``.

    Raises:
        ValueError: for fewer than two steps, where the SDE's first and last step would coincide.
    """
    if num_denoising_steps < 2:
        raise ValueError(
            f"num_denoising_steps={num_denoising_steps} is not possible with an SDE; use 2 or more"
        )
    steps = torch.arange(num_denoising_steps, -1, -1, dtype=torch.float32)
    return steps / num_denoising_steps


def flow_sde_std(noise_level: float, num_denoising_steps: int) -> Tensor:
    """Return the standard deviation of every step of Flow-SDE, ``[K]``.

    ``std_k = sqrt(1/K) * a * sqrt(t_k / (1 - t_k))``; at ``t = 1`` the denominator uses the next grid time, so
    the first step has ``std = a`` and the last ``a / sqrt(K (K - 1))`` (piRL, arXiv 2510.25889).
    """
    times = time_grid(num_denoising_steps)[:-1]
    denominator = 1 - torch.where(times == 1, times[1], times)
    return noise_level * torch.sqrt(times / denominator / num_denoising_steps)


def noise_table(early_std: Tensor, last_std: Tensor, explored_rows: int, chunk_size: int) -> Tensor:
    """Return the two-part noise of every step, row and channel, ``[K, H, D]``.

    Args:
        early_std: ``[K, D]``, std of the steps before the last (its last row is ignored).
        last_std: ``[D]``, std of the last step in action units, 0 for channels that must not be explored.
        explored_rows: rows that are executed; all later rows get 0, so nothing uncredited is explored.
        chunk_size: ``H``.
    """
    table = early_std[:, None, :].repeat(1, chunk_size, 1)
    table[-1] = last_std
    table[:, explored_rows:] = 0
    return table


def sde_coefficients(t: Tensor, s: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(c_x, c_0)`` with ``mean = c_x x_t + c_0 x0_pred``; broadcasts over its arguments."""
    w1 = s - std.square() / (2 * t)
    return w1 / t, (1 - s) - w1 * (1 - t) / t


def sde_mean(x_t: Tensor, x0_pred: Tensor, t: Tensor, s: Tensor, std: Tensor) -> Tensor:
    """Return the mean of one step from ``t`` to ``s``; all arguments broadcast to ``x_t``'s shape."""
    c_x, c_0 = sde_coefficients(t, s, std)
    return c_x * x_t + c_0 * x0_pred


def ode_mean(x_t: Tensor, x0_pred: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Return the Euler step from ``t`` to ``s``."""
    return sde_mean(x_t, x0_pred, t, s, torch.zeros_like(x_t))


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the element-wise Gaussian log density; exactly 0, in value and gradient, where ``std`` is 0."""
    active = std > 0
    safe_std = torch.where(active, std, torch.ones_like(std))
    # the mask goes on the difference too: 0 * nan would poison the gradient
    z = torch.where(active, x - mean, torch.zeros_like(mean)) / safe_std
    log_prob = -0.5 * z.square() - safe_std.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(active, log_prob, torch.zeros_like(log_prob))


def bernoulli_log_prob(bits: Tensor, logits: Tensor) -> Tensor:
    """Return the element-wise log pmf of ``bits`` in {0, 1} under ``sigmoid(logits)``."""
    return bits * logits - F.softplus(logits)


def mean_entropy(std: Tensor) -> Tensor:
    """Return the Gaussians' entropy ``log(std) + log(2 pi e) / 2``, mean over a sample's ``std > 0``, ``[B]``."""
    active = std > 0
    entropy = torch.where(active, std, torch.ones_like(std)).log() + 0.5 * math.log(2 * math.pi * math.e)
    per_sample = torch.where(active, entropy, torch.zeros_like(entropy)).flatten(1).sum(dim=1)
    return per_sample / active.flatten(1).sum(dim=1).clamp(min=1)


def gaussian_kl(mean: Tensor, std: Tensor, other_mean: Tensor, other_std: Tensor) -> Tensor:
    """Return the element-wise KL(N(mean, std) || N(other_mean, other_std)); 0 where ``std`` is 0.

    With equal ``std`` it is ``(mean - other_mean)^2 / (2 std^2)``.
    """
    active = std > 0
    one = torch.ones_like(std)
    ratio = torch.where(active, std, one) / torch.where(active, other_std, one)
    z = torch.where(active, mean - other_mean, torch.zeros_like(mean)) / torch.where(active, other_std, one)
    return 0.5 * (ratio.square() + z.square() - 1) - ratio.log()


def bernoulli_kl(logits: Tensor, other_logits: Tensor) -> Tensor:
    """Return the element-wise KL of two Bernoullis, given by their logits."""
    return logits.sigmoid() * (logits - other_logits) - F.softplus(logits) + F.softplus(other_logits)


@dataclass(frozen=True)
class Chain:
    """What one call of the sampler leaves behind.

    Attributes:
        x_0: the generated chunk before the policy's postprocessing, ``[B, H, D]``.
        chain: states around the stochastic steps, ``[B, S + 1, H, D]``; Flow-SDE stores one step, ``S = 1``,
            Flow-Noise all of them, ``S = K``.
        step_index: which denoising steps these are, int64 ``[B, S]``.
        log_prob: element-wise log density of the stored steps, ``[B, S, H, D]``.
    """

    x_0: Tensor
    chain: Tensor
    step_index: Tensor
    log_prob: Tensor


class Steps(NamedTuple):
    """The Gaussians of stored steps under one network, and its predictions, each ``[B, S, H, D]``."""

    mean: Tensor
    std: Tensor
    x0_pred: Tensor


def draw_step_index(
    batch_size: int, num_denoising_steps: int, last_step_prob: float, generator: torch.Generator
) -> Tensor:
    """Draw one stochastic step per sample, int64 ``[B, 1]``: the last with ``last_step_prob``, else uniform."""
    weights = torch.full((num_denoising_steps,), (1 - last_step_prob) / (num_denoising_steps - 1))
    weights[-1] = last_step_prob
    return torch.multinomial(weights, batch_size, replacement=True, generator=generator)[:, None]


def _per_sample(values: Tensor, index: Tensor) -> Tensor:
    """Return ``values[index]`` shaped to broadcast against ``[B, H, D]``."""
    return values[index][:, None, None]


def sample_chain(
    predict_x0: PredictX0, x_1: Tensor, noise_std: Tensor, step_index: Tensor, noise: Tensor
) -> Chain:
    """Denoise ``x_1`` with one SDE step per sample and ODE steps elsewhere (hybrid Flow-SDE).

    Args:
        predict_x0: the network.
        x_1: initial noise, float32 ``[B, H, D]``.
        noise_std: ``[K, H, D]`` as made by :func:`noise_table`.
        step_index: ``[B, 1]``, the stochastic step of every sample.
        noise: standard normal noise of that step, ``[B, H, D]``.
    """
    num_steps = noise_std.shape[0]
    times = time_grid(num_steps).to(x_1.device)
    # all steps at once: beside a small network it is the number of operations that counts
    grid = torch.arange(num_steps, device=x_1.device)
    stochastic = (step_index == grid).T[:, :, None, None]  # [K, B, 1, 1]
    std = torch.where(stochastic, noise_std[:, None], 0)
    c_x, c_0 = sde_coefficients(times[:-1, None, None, None], times[1:, None, None, None], std)
    drawn = std * noise
    states, means = [x_1], []
    for k in range(num_steps):
        x0_pred = predict_x0(states[-1], times[k].expand(len(x_1))).float()
        means.append(c_x[k] * states[-1] + c_0[k] * x0_pred)
        states.append(means[-1] + drawn[k])
    index, rows = step_index[:, 0], torch.arange(len(x_1), device=x_1.device)
    stacked = torch.stack(states)  # [K + 1, B, H, D]
    before, after, mean = stacked[index, rows], stacked[index + 1, rows], torch.stack(means)[index, rows]
    log_prob = gaussian_log_prob(after, mean, noise_std[index])
    return Chain(states[-1], torch.stack([before, after], dim=1), step_index, log_prob[:, None])


def sample_noisy_chain(predict: PredictStep, x_1: Tensor, noise: Tensor) -> Chain:
    """Denoise ``x_1`` with learned noise in every step (Flow-Noise).

    Args:
        predict: the network and its noise head.
        x_1: initial noise, float32 ``[B, H, D]``.
        noise: standard normal noise of every step, ``[B, K, H, D]``.
    """
    num_steps = noise.shape[1]
    times = time_grid(num_steps).to(x_1.device)
    states, log_probs = [x_1], []
    for k in range(num_steps):
        x_t = states[-1]
        x0_pred, std = predict(x_t, times[k].expand(len(x_t)))
        mean = ode_mean(x_t, x0_pred, times[k], times[k + 1])
        states.append(mean + std * noise[:, k])
        log_probs.append(gaussian_log_prob(states[-1], mean, std))
    step_index = torch.arange(num_steps, device=x_1.device).repeat(len(x_1), 1)
    return Chain(states[-1], torch.stack(states, dim=1), step_index, torch.stack(log_probs, dim=1))


def evaluate_chain(
    predict_x0: PredictX0, chain: Tensor, step_index: Tensor, noise_std: Tensor
) -> tuple[Tensor, Steps]:
    """Recompute the log-probs of stored Flow-SDE steps under the present network.

    Args:
        predict_x0: the network; called once per stored step.
        chain: ``[B, S + 1, H, D]``.
        step_index: ``[B, S]``.
        noise_std: ``[K, H, D]``, the table the chain was sampled with.

    Returns:
        element-wise log-probs ``[B, S, H, D]``, 0 where std is 0, and the steps.
    """
    times = time_grid(noise_std.shape[0]).to(chain.device)

    def step(x_t: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x0_pred = predict_x0(x_t, times[index]).float()
        std = noise_std[index]
        t, s = _per_sample(times, index), _per_sample(times, index + 1)
        return sde_mean(x_t, x0_pred, t, s, std), std, x0_pred

    return _evaluate(step, chain, step_index)


def evaluate_noisy_chain(
    predict: PredictStep, chain: Tensor, step_index: Tensor, num_denoising_steps: int
) -> tuple[Tensor, Steps]:
    """Recompute the log-probs of stored Flow-Noise steps; see :func:`evaluate_chain`."""
    times = time_grid(num_denoising_steps).to(chain.device)

    def step(x_t: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x0_pred, std = predict(x_t, times[index])
        return ode_mean(x_t, x0_pred, _per_sample(times, index), _per_sample(times, index + 1)), std, x0_pred

    return _evaluate(step, chain, step_index)


def _evaluate(
    step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]], chain: Tensor, step_index: Tensor
) -> tuple[Tensor, Steps]:
    """Evaluate ``(x_t, index [B]) -> (mean, std, x0_pred)`` at every stored step."""
    found = [step(chain[:, j], step_index[:, j]) for j in range(step_index.shape[1])]
    steps = Steps(*(torch.stack(parts, dim=1) for parts in zip(*found, strict=True)))
    return gaussian_log_prob(chain[:, 1:], steps.mean, steps.std), steps


def sample_ode(predict_x0: PredictX0, x_1: Tensor, num_denoising_steps: int) -> Tensor:
    """Denoise ``x_1`` with the noise-free Euler steps; returns ``x_0``, ``[B, H, D]``."""
    times = time_grid(num_denoising_steps).to(x_1.device)
    x_t = x_1
    for k in range(num_denoising_steps):
        x0_pred = predict_x0(x_t, times[k].expand(len(x_t))).float()
        x_t = ode_mean(x_t, x0_pred, times[k], times[k + 1])
    return x_t


def sample_native(predict_x0: PredictX0, x_1: Tensor, num_denoising_steps: int) -> Tensor:
    """Denoise ``x_1`` as X-VLA's own ``generate_actions`` does; returns ``x_0``, ``[B, H, D]``.

    It mixes every prediction with the initial noise, where Euler moves the noise along: from the third step on
    the two differ.
    """
    times = time_grid(num_denoising_steps).to(x_1.device)
    x_0 = torch.zeros_like(x_1)
    for t in times[:-1]:
        x_t = x_1 * t + x_0 * (1 - t)
        x_0 = predict_x0(x_t, t.expand(len(x_t))).float()
    return x_0


def inverse_sensitivity(noise_std: Tensor, step_prob: Tensor) -> Tensor:
    """Return loss weights per denoising step, ``[K]``, that level the size of their gradients.

    ``d log_prob / d x0_pred = c_0 (x_s - mean) / std^2`` is of size ``c_0 / std``; the weight is its inverse
    (mean over explored elements), normalised to mean 1 under ``step_prob``. Steps that explore nothing get 0.

    Args:
        noise_std: ``[K, H, D]``.
        step_prob: probability of every step being the stochastic one, ``[K]``.
    """
    times = time_grid(noise_std.shape[0])
    t, s = times[:-1, None, None], times[1:, None, None]
    c_0 = sde_coefficients(t, s, noise_std)[1]
    active = noise_std > 0
    count = active.sum(dim=(1, 2))
    weights = torch.where(active, noise_std / c_0, 0).sum(dim=(1, 2)) / count.clamp(min=1)
    return weights / (weights * step_prob).sum()
