"""What the formulas promise where they come together: marginals at every time, and each option in the update's losses."""

import math

import pytest
import torch
from torch import Tensor

from lerobot_pirl import flow, ppo
from lerobot_pirl.algorithm import PiRLAlgorithm
from lerobot_pirl.rollout import Rollout, compute_returns
from tests.test_algorithm import changed, make_algorithm, make_rollout, snapshot

pytestmark = pytest.mark.filterwarnings("ignore")

# --- marginals ------------------------------------------------------------------------------------------------
# With data N(MEAN, STD^2) every step is linear in x_t, so mean and variance follow exactly, without a sample.

MEAN, STD = 0.7, 0.5


def moments(noise_level: float, num_steps: int, sign: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return mean and variance of x at every time of the grid, all steps noisy; ``sign`` is of the drift's correction."""
    times = flow.time_grid(num_steps).double()
    stds = flow.flow_sde_std(noise_level, num_steps).double()
    mean, variance = torch.zeros(1).double(), torch.ones(1).double()
    found = [(mean, variance)]
    for t, s, std in zip(times[:-1], times[1:], stds, strict=True):
        c_x, c_0 = flow.sde_coefficients(t, s, std)
        plain_x, plain_0 = flow.sde_coefficients(t, s, torch.zeros_like(std))
        c_x, c_0 = plain_x + sign * (c_x - plain_x), plain_0 + sign * (c_0 - plain_0)
        gain = (1 - t) * STD**2 / ((1 - t) ** 2 * STD**2 + t**2)
        mean = c_x * mean + c_0 * (MEAN + gain * (mean - (1 - t) * MEAN))
        variance = (c_x + c_0 * gain) ** 2 * variance + std**2
        found.append((mean, variance))
    means, variances = zip(*found, strict=True)
    return torch.cat(means), torch.cat(variances)


def exact_moments(num_steps: int) -> tuple[Tensor, Tensor]:
    times = flow.time_grid(num_steps).double()
    return (1 - times) * MEAN, (1 - times) ** 2 * STD**2 + times**2


def variance_errors(noise_level: float, num_steps: int) -> Tensor:
    """Return the relative error of the variance at every time, after a check of the mean, which has none."""
    (mean, variance), (true_mean, true_variance) = moments(noise_level, num_steps), exact_moments(num_steps)
    torch.testing.assert_close(mean, true_mean, atol=1e-6, rtol=0)
    return (variance / true_variance - 1).abs()


@pytest.mark.parametrize("noise_level", [0.0, 0.1, 0.3, 0.5, 1.0])
def test_noisy_steps_have_the_flows_marginals_at_every_time(noise_level):
    """What is left comes from the size of the steps and goes with it."""
    coarse, fine = (variance_errors(noise_level, num_steps) for num_steps in (100, 1000))
    coarse, fine = (errors[flow.time_grid(len(errors) - 1) <= 0.9] for errors in (coarse, fine))
    assert fine.max() < 0.02
    assert fine.max() < 0.6 * coarse.max()


@pytest.mark.parametrize("noise_level", [0.1, 0.3, 0.5])
def test_noisy_steps_have_the_marginals_of_noise_free_ones_at_every_time(noise_level):
    # the very first steps are as noisy on the finest grid, which the variance sees in the fourth power
    _, plain = moments(0.0, 1000)
    _, noisy = moments(noise_level, 1000)
    errors = (noisy / plain - 1).abs()
    assert errors.max() < 0.02 * noise_level + 0.5 * noise_level**4
    assert errors[-1] < 0.01


@pytest.mark.parametrize(("sign", "least"), [(0.0, 0.1), (-1.0, 0.2)])
def test_without_the_drifts_correction_or_with_its_opposite_no_time_has_the_right_variance(sign, least):
    _, variance = moments(0.5, 1000, sign)
    errors = variance / exact_moments(1000)[1] - 1
    assert errors[0].abs() < 1e-9
    assert errors[1:].min() > least
    assert errors.max() > 2


@pytest.mark.parametrize("num_steps", [2, 4, 5, 10])
def test_coefficients_are_those_of_the_two_end_points(num_steps):
    """``mean = (1 - s) x0 + (s - std^2 / 2t) x1`` in the words of the predicted end points, at any noise."""
    times = flow.time_grid(num_steps).double()
    x_t, x_0 = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).double()
    for k in range(num_steps):
        t, s = times[k], times[k + 1]
        x_1 = (x_t - (1 - t) * x_0) / t
        for std in (0.0, 0.01, 0.3, 1.0):
            expected = (1 - s) * x_0 + (s - std**2 / (2 * t)) * x_1
            found = flow.sde_mean(x_t, x_0, t, s, torch.tensor(std, dtype=torch.float64))
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


# --- what the update makes of its options ---------------------------------------------------------------------

LENGTHS = (1, 4, 2)


def one_step(**options) -> PiRLAlgorithm:
    """Return an algorithm whose updates are one optimiser step over all rows, on advantages as they are."""
    plain = {"minibatch_size": 64, "normalize_advantage": False, "step_loss_weight": "none"}
    return make_algorithm(**plain | options)


def rows_of(algorithm: PiRLAlgorithm, ratio: float = 1.0) -> Rollout:
    """Return a rollout whose decisions are so many times as likely now as when they were drawn."""
    rollout = make_rollout(algorithm.adapter, LENGTHS)
    rollout.log_prob = rollout.log_prob.clone()
    rollout.log_prob[:, -1] -= math.log(ratio)
    return rollout


def targets_of(algorithm: PiRLAlgorithm, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, advantages and returns of the rows."""
    config, values = algorithm.config, algorithm.values(rollout.features)
    final = algorithm.values(rollout.final_features)
    advantages, returns = compute_returns(
        rollout, values, final, config.gamma, config.gae_lambda, config.bootstrap_truncation
    )
    return values, advantages, returns


def update(algorithm: PiRLAlgorithm, rollout: Rollout) -> dict[str, float]:
    return algorithm.update(iter([rollout])).to_log_dict()


def by_episode(rows: Tensor) -> Tensor:
    """Return the mean over episodes of the mean over their rows."""
    return torch.stack([part.mean() for part in rows.split(LENGTHS)]).mean()


@pytest.mark.parametrize("aggregation", ["token", "episode"])
def test_losses_are_means_over_rows_or_over_episodes(aggregation):
    algorithm = one_step(loss_aggregation=aggregation, micro_batch_size=3)
    rollout = rows_of(algorithm)
    values, advantages, returns = targets_of(algorithm, rollout)
    mean = torch.mean if aggregation == "token" else by_episode
    assert abs(advantages.mean() - by_episode(advantages)) > 1e-2
    stats = update(algorithm, rollout)
    assert stats["policy_loss"] == pytest.approx(float(-mean(advantages)), rel=1e-3)
    assert stats["value_loss"] == pytest.approx(float(mean((values - returns) ** 2 / 2)), rel=1e-4)


def test_losses_of_every_denoising_step_have_its_weight():
    algorithm = one_step(step_loss_weight="inv_sensitivity")
    rollout = rows_of(algorithm)
    weights = algorithm.step_weights
    assert weights.max() / weights.min() > 5
    _, advantages, _ = targets_of(algorithm, rollout)
    expected = -(weights[rollout.step_index[:, 0]] * advantages).mean()
    assert update(algorithm, rollout)["policy_loss"] == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize(("clip_range", "clipped"), [(0.2, 1.0), (0.5, 0.0)])
def test_the_ratio_is_clipped_where_the_option_says(clip_range, clipped):
    algorithm = one_step(clip_range=clip_range)
    rollout = rows_of(algorithm, ratio=1.4)
    _, advantages, _ = targets_of(algorithm, rollout)
    assert (advantages > 0).any() and (advantages < 0).any()
    most = min(1.4, 1 + clip_range)
    expected = -torch.where(advantages > 0, most * advantages, 1.4 * advantages).mean()
    stats = update(algorithm, rollout)
    assert stats["policy_loss"] == pytest.approx(float(expected), rel=1e-3)
    assert stats["clip_fraction"] == clipped
    assert stats["ratio_max"] == pytest.approx(1.4, abs=1e-3)


def test_both_estimates_of_the_kl_are_of_the_policy_that_acted_from_the_present_one():
    algorithm = one_step()
    stats = update(algorithm, rows_of(algorithm, ratio=1.4))
    assert stats["approx_kl"] == pytest.approx(0.4 - math.log(1.4), abs=1e-3)
    assert stats["approx_kl_k1"] == pytest.approx(-math.log(1.4), abs=1e-3)


@pytest.mark.parametrize(("huber_delta", "expected"), [(10.0, 2.0**2 / 2), (0.5, 0.5 * (2.0 - 0.25))])
def test_the_value_loss_turns_linear_where_the_option_says(huber_delta, expected):
    algorithm = one_step(huber_delta=huber_delta, gamma=0.0, clip_range_vf=None)
    rollout = rows_of(algorithm)
    # without discount the return is the reward
    rollout.rewards = algorithm.values(rollout.features) + 2.0
    assert update(algorithm, rollout)["value_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("clip_range_vf", "fraction", "distance"), [(0.25, 1.0, 3.75), (2.0, 0.0, 3.0), (None, 0.0, 3.0)]
)
def test_the_values_change_is_clipped_and_counted_before_it_is_clipped(
    clip_range_vf, fraction, distance, monkeypatch
):
    """Values have moved by 1 towards returns that are 4 above the old ones: 3 are left, or 4 less the range."""
    algorithm = one_step(clip_range_vf=clip_range_vf, gamma=0.0)
    rollout = rows_of(algorithm)
    present = algorithm.values(rollout.features)
    before, final = present - 1.0, algorithm.values(rollout.final_features)
    rollout.rewards = before + 4.0
    monkeypatch.setattr(algorithm, "values", lambda f: before if f is rollout.features else final)
    stats = update(algorithm, rollout)
    assert stats["value_clip_fraction"] == fraction
    assert stats["value_loss"] == pytest.approx(distance**2 / 2, rel=1e-4)


@pytest.mark.parametrize("bootstrap", [True, False])
def test_a_time_out_is_bootstrapped_where_the_option_says(bootstrap):
    algorithm = one_step(bootstrap_truncation=bootstrap, gamma=0.5, gae_lambda=0.0)
    rollout = rows_of(algorithm)
    values, final = algorithm.values(rollout.features), algorithm.values(rollout.final_features)
    following = torch.cat([values[1:], values[:1]])
    following[rollout.ended] = 0.0
    following[rollout.truncated] = final * bootstrap
    returns = rollout.rewards + 0.5 * following
    assert final.abs().min() > 1e-4
    stats = update(algorithm, rollout)
    assert stats["return_mean"] == pytest.approx(float(returns.mean()), rel=1e-5)
    assert stats["policy_loss"] == pytest.approx(float(-(returns - values).mean()), rel=1e-3)


@pytest.mark.parametrize("normalize", [True, False])
def test_advantages_are_scaled_where_the_option_says(normalize):
    algorithm = one_step(normalize_advantage=normalize)
    rollout = rows_of(algorithm)
    _, advantages, _ = targets_of(algorithm, rollout)
    used = ppo.normalize_advantages(advantages) if normalize else advantages
    rollout.log_prob[:, -1] -= torch.linspace(-0.1, 0.1, len(rollout))
    ratio = torch.linspace(-0.1, 0.1, len(rollout)).exp()
    expected = -(ratio * used).mean()
    assert update(algorithm, rollout)["policy_loss"] == pytest.approx(float(expected), rel=1e-2)


def test_the_optimiser_has_the_options_values_and_decays_no_table_of_domains():
    algorithm = make_algorithm(
        betas=(0.7, 0.8), weight_decay=0.3, learning_rate=2e-4, value_learning_rate=5e-4
    )
    groups = algorithm.optimizer.param_groups
    assert [group["betas"] for group in groups] == [(0.7, 0.8)] * 3
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0, 0.3]
    assert [group["lr"] for group in groups] == [2e-4, 2e-4, 5e-4]
    spared = {id(algorithm.trainable_parameters()[name]) for name in algorithm.adapter.no_decay()}
    assert {id(parameter) for parameter in groups[1]["params"]} == spared


# --- gradients ------------------------------------------------------------------------------------------------


def test_gradients_are_clipped_per_group():
    algorithm = make_algorithm(minibatch_size=64, grad_clip_norm=1e-3)
    stats = update(algorithm, make_rollout(algorithm.adapter))
    groups = {
        "policy": list(algorithm.trainable_parameters().values()),
        "value": list(algorithm.value_head.parameters()),
    }
    for name, group in groups.items():
        left = torch.cat([p.grad.flatten() for p in group if p.grad is not None]).norm()
        assert stats[f"{name}_grad_norm"] > 1e-3
        assert float(left) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_skips_the_step_although_the_losses_are(poison):
    algorithm = make_algorithm(minibatch_size=64)
    parameter = next(iter(algorithm.trainable_parameters().values()))
    handle = parameter.register_hook(lambda gradient: gradient * poison)
    policy, value = snapshot(algorithm.policy), snapshot(algorithm.value_head)
    stats = update(algorithm, make_rollout(algorithm.adapter))
    assert math.isfinite(stats["policy_loss"]) and math.isfinite(stats["value_loss"])
    assert stats["skipped_steps"] == 1
    assert not changed(policy, algorithm.policy) and not changed(value, algorithm.value_head)
    handle.remove()
    assert update(algorithm, make_rollout(algorithm.adapter))["skipped_steps"] == 1
    assert changed(policy, algorithm.policy) and changed(value, algorithm.value_head)


def test_a_loss_that_is_not_finite_skips_the_step_although_the_gradients_are():
    algorithm = make_algorithm(minibatch_size=64, critic_warmup_iterations=1, normalize_advantage=False)
    rollout = make_rollout(algorithm.adapter)
    # far from the return the value loss is a straight line, also infinitely far
    rollout.rewards[-1] = math.inf
    value = snapshot(algorithm.value_head)
    stats = update(algorithm, rollout)
    assert math.isinf(stats["value_loss"]) and math.isfinite(stats["value_grad_norm"])
    assert stats["skipped_steps"] == 1
    assert not changed(value, algorithm.value_head)
