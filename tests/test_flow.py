"""The denoising kernels: their Gaussians, their marginals, and that recomputing equals sampling."""

import math

import pytest
import torch
from torch import Tensor, nn

from lerobot_pirl import flow

B, K, H, D = 12, 5, 4, 6
EXPLORED_ROWS, EXPLORED_CHANNELS = 3, 4
# of a joint log-prob: float32's rounding of a step's mean, seen through a std of 5 mm, once per explored element
TOLERANCE = 1e-5 * EXPLORED_ROWS * EXPLORED_CHANNELS


class MixingNet(nn.Module):
    """A network in which every element of ``x_t`` and the time reach every element of the prediction."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.inner, self.outer = nn.Linear(H * D + 1, 32), nn.Linear(32, H * D)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(torch.cat([x_t.flatten(1), t[:, None]], dim=1)))
        return self.outer(hidden).unflatten(1, (H, D))


def make_table(noise_level=0.3, last_std=0.005, num_steps=K) -> Tensor:
    early, last = torch.zeros(num_steps, D), torch.zeros(D)
    early[:, :EXPLORED_CHANNELS] = flow.flow_sde_std(noise_level, num_steps)[:, None]
    last[:EXPLORED_CHANNELS] = last_std
    return flow.noise_table(early, last, EXPLORED_ROWS, H)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sample(net, step_index: Tensor, table: Tensor | None = None, seed: int = 0) -> flow.Chain:
    x_1, noise = randn(2, len(step_index), H, D, seed=seed)
    with torch.no_grad():
        return flow.sample_chain(net, x_1, make_table() if table is None else table, step_index, noise)


def joint(log_prob: Tensor) -> Tensor:
    return log_prob.sum(dim=(1, 2, 3))


def mixed_steps(rows: int = B) -> Tensor:
    return (torch.arange(rows) % K)[:, None]


# --- grid and noise ---------------------------------------------------------------------------------------


def test_time_grid_runs_from_noise_to_data():
    assert torch.equal(flow.time_grid(4), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))
    assert flow.time_grid(4).dtype == torch.float32


@pytest.mark.parametrize("make", [flow.time_grid, lambda k: flow.flow_sde_std(0.3, k)])
@pytest.mark.parametrize("num_steps", [1, 0, -1])
def test_fewer_than_two_denoising_steps_are_refused(make, num_steps):
    with pytest.raises(ValueError, match=f"num_denoising_steps={num_steps} .* use 2 or more"):
        make(num_steps)


@pytest.mark.parametrize("noise_level", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("num_steps", [2, 3, 5, 10])
def test_std_starts_at_the_noise_level_and_ends_at_its_closed_form(noise_level, num_steps):
    std = flow.flow_sde_std(noise_level, num_steps)
    assert len(std) == num_steps
    assert std[0].item() == pytest.approx(noise_level, rel=1e-6)
    assert std[-1].item() == pytest.approx(noise_level / math.sqrt(num_steps * (num_steps - 1)), rel=1e-6)


def test_std_of_five_steps_at_half_noise():
    expected = torch.tensor([0.500, 0.447, 0.274, 0.183, 0.112])
    torch.testing.assert_close(flow.flow_sde_std(0.5, 5), expected, atol=5e-4, rtol=0)


def test_noise_table_takes_the_last_step_from_the_caller_and_nothing_else():
    table = make_table(noise_level=0.3, last_std=0.005)
    assert table.shape == (K, H, D)
    assert (table[-1, :EXPLORED_ROWS, :EXPLORED_CHANNELS] == 0.005).all()
    early = flow.flow_sde_std(0.3, K)[:-1, None, None].expand(-1, EXPLORED_ROWS, EXPLORED_CHANNELS)
    assert torch.equal(table[:-1, :EXPLORED_ROWS, :EXPLORED_CHANNELS], early)


def test_noise_table_explores_neither_later_rows_nor_other_channels():
    table = make_table()
    assert (table[:, EXPLORED_ROWS:] == 0).all()
    assert (table[:, :, EXPLORED_CHANNELS:] == 0).all()


# --- which step is stochastic -----------------------------------------------------------------------------


@pytest.mark.parametrize("last_step_prob", [0.2, 0.5, 0.9])
def test_drawn_steps_have_the_asked_frequencies(last_step_prob):
    rows = 20_000
    index = flow.draw_step_index(rows, K, last_step_prob, torch.Generator().manual_seed(0))
    assert index.shape == (rows, 1) and index.dtype == torch.int64
    counts = torch.bincount(index[:, 0], minlength=K).double()
    assert len(counts) == K
    prob = torch.full((K,), (1 - last_step_prob) / (K - 1), dtype=torch.float64)
    prob[-1] = last_step_prob
    chi_squared = ((counts - rows * prob) ** 2 / (rows * prob)).sum()
    assert chi_squared < 18.47  # 99.9 % quantile with 4 degrees of freedom


def test_drawn_steps_differ_within_a_batch_and_repeat_with_the_seed():
    first, again, other = (
        flow.draw_step_index(64, K, 0.5, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert set(first[:, 0].tolist()) == set(range(K))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_last_step_probability_one_draws_the_last_step_alone():
    assert (flow.draw_step_index(100, K, 1.0, torch.Generator().manual_seed(0)) == K - 1).all()


# --- sampling and recomputing -----------------------------------------------------------------------------


@pytest.mark.parametrize("k", range(K))
def test_recomputed_log_prob_equals_the_samplers_at_every_step(k):
    net, table = MixingNet(), make_table()
    result = sample(net, torch.full((B, 1), k), table)
    log_prob, _ = flow.evaluate_chain(net, result.chain, result.step_index, table)
    assert log_prob.shape == (B, 1, H, D)
    assert (result.log_prob != 0).any()
    torch.testing.assert_close(joint(log_prob), joint(result.log_prob), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("micro_batch", [1, 5, B])
def test_recomputed_log_prob_does_not_depend_on_batch_size_or_order(micro_batch):
    net, table = MixingNet(), make_table()
    result = sample(net, mixed_steps(), table)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(3))
    parts = [
        flow.evaluate_chain(net, result.chain[rows], result.step_index[rows], table)[0]
        for rows in order.split(micro_batch)
    ]
    torch.testing.assert_close(joint(torch.cat(parts)), joint(result.log_prob[order]), atol=TOLERANCE, rtol=0)


def test_another_noise_table_gives_another_log_prob():
    net = MixingNet()
    result = sample(net, mixed_steps(), make_table(noise_level=0.3))
    log_prob, _ = flow.evaluate_chain(net, result.chain, result.step_index, make_table(noise_level=0.2))
    early = result.step_index[:, 0] < K - 1
    gap = joint((log_prob - result.log_prob).abs())
    assert (gap[early] > 0.1).all()
    assert (gap[~early] < TOLERANCE).all()  # both tables share the last step's std


def test_another_network_gives_another_log_prob():
    result = sample(MixingNet(seed=0), mixed_steps())
    log_prob, _ = flow.evaluate_chain(MixingNet(seed=1), result.chain, result.step_index, make_table())
    assert (joint((log_prob - result.log_prob).abs()) > 1e-2).all()


def warped_grid(num_steps: int) -> Tensor:
    return torch.linspace(1, 0, num_steps + 1) ** 2


def test_sampler_and_recompute_take_their_times_from_the_same_function(monkeypatch):
    net, table, seen = MixingNet(), make_table(), []

    def recording(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(t.clone())
        return net(x_t, t)

    monkeypatch.setattr(flow, "time_grid", warped_grid)
    result = sample(recording, mixed_steps(), table)
    sampler_times = torch.stack([t[0] for t in seen])
    torch.testing.assert_close(sampler_times, warped_grid(K)[:-1], atol=0, rtol=0)
    seen.clear()
    log_prob, _ = flow.evaluate_chain(recording, result.chain, result.step_index, table)
    torch.testing.assert_close(seen[0], warped_grid(K)[result.step_index[:, 0]], atol=0, rtol=0)
    torch.testing.assert_close(joint(log_prob), joint(result.log_prob), atol=TOLERANCE, rtol=0)


def test_a_recompute_on_another_time_grid_would_be_seen(monkeypatch):
    net, table = MixingNet(), make_table()
    result = sample(net, mixed_steps(), table)
    monkeypatch.setattr(flow, "time_grid", warped_grid)
    log_prob, _ = flow.evaluate_chain(net, result.chain, result.step_index, table)
    middle = (result.step_index[:, 0] > 0) & (result.step_index[:, 0] < K - 1)
    assert (joint((log_prob - result.log_prob).abs())[middle] > 1e-2).all()


def test_chain_holds_the_states_around_the_stochastic_step():
    """Before it the chain is the ODE's; after it the ODE goes on from where the noise led."""
    net, table, k = MixingNet(), make_table(), 2
    x_1, noise = randn(2, B, H, D)
    times = flow.time_grid(K)
    with torch.no_grad():
        result = flow.sample_chain(net, x_1, table, torch.full((B, 1), k), noise)
        states = [x_1]
        for i in range(K):
            x_t, t = states[-1], times[i]
            x0_pred = net(x_t, t.expand(B))
            x_s = x_t - (t - times[i + 1]) * (x_t - x0_pred) / t
            if i == k:
                x1_pred = (x_t - (1 - t) * x0_pred) / t
                x_s = x_s - table[k] ** 2 / (2 * t) * x1_pred + table[k] * noise
            states.append(x_s)
    torch.testing.assert_close(result.chain[:, 0], states[k], atol=1e-5, rtol=0)
    torch.testing.assert_close(result.chain[:, 1], states[k + 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(result.x_0, states[-1], atol=1e-5, rtol=0)


def test_network_of_another_dtype_still_gives_a_float32_chain():
    net = MixingNet()
    result = sample(lambda x_t, t: net(x_t, t).bfloat16(), mixed_steps())
    assert result.chain.dtype == result.log_prob.dtype == result.x_0.dtype == torch.float32


# --- the ODE ----------------------------------------------------------------------------------------------


def test_vanishing_noise_is_the_ode():
    net = MixingNet()
    x_1 = randn(2, B, H, D)[0]
    result = sample(net, mixed_steps(), make_table(noise_level=1e-8, last_std=1e-8))
    with torch.no_grad():
        ode = flow.sample_ode(net, x_1, K)
    torch.testing.assert_close(result.x_0, ode, atol=1e-6, rtol=0)
    noisy = sample(net, mixed_steps(), make_table())
    assert (noisy.x_0 - ode).abs().amax(dim=(1, 2)).min() > 1e-4


@torch.no_grad()
def test_ode_is_deterministic_and_equals_euler_on_the_velocity():
    net, x_t = MixingNet(), randn(B, H, D)
    first, again = flow.sample_ode(net, x_t, K), flow.sample_ode(net, x_t, K)
    assert torch.equal(first, again)
    times = flow.time_grid(K)
    for k in range(K):
        velocity = (x_t - net(x_t, times[k].expand(B))) / times[k]
        x_t = x_t + (times[k + 1] - times[k]) * velocity
    torch.testing.assert_close(first, x_t, atol=1e-6, rtol=0)


@torch.no_grad()
def test_last_ode_step_returns_the_prediction_itself():
    net, seen = MixingNet(), []

    def recording(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(net(x_t, t))
        return seen[-1]

    x_0 = flow.sample_ode(recording, randn(B, H, D), K)
    assert torch.equal(x_0, seen[-1])


# --- marginals --------------------------------------------------------------------------------------------
# Data N(mean, cov) makes E[x_0 | x_t] linear, so the marginals of x_t are known at every time.

FINE = 1000


def gaussian_posterior(mean: Tensor, cov: Tensor):
    """Return the exact ``x0_pred`` of data ``N(mean, cov)`` for row vectors ``x_t``."""
    eye = torch.eye(len(mean))

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        gain = (1 - t) * cov @ torch.linalg.inv((1 - t) ** 2 * cov + t**2 * eye)
        return mean + (x_t - (1 - t) * mean) @ gain.T

    return predict


def run_all_steps_stochastic(predict, step_mean, x_1: Tensor, levels: Tensor) -> dict[float, Tensor]:
    """Denoise with noise in all of ``FINE`` steps; ``levels`` are per variant and channel ``[V, 1, C]``.

    Returns the states ``[V, N, C]`` at some times on the way.
    """
    generator = torch.Generator().manual_seed(5)
    times, unit = flow.time_grid(FINE), flow.flow_sde_std(1.0, FINE)
    x_t = x_1.expand(len(levels), *x_1.shape).clone()
    states = {}
    for k in range(FINE):
        std = levels * unit[k]
        mean = step_mean(x_t, predict(x_t, times[k]), times[k], times[k + 1], std)
        x_t = mean + std * torch.randn(x_1.shape, generator=generator)
        if FINE - 1 - k in (500, 250, 0):
            states[times[k + 1].item()] = x_t
    return states


def without_drift(x_t: Tensor, x0_pred: Tensor, t: Tensor, s: Tensor, std: Tensor) -> Tensor:
    return flow.sde_mean(x_t, x0_pred, t, s, torch.zeros_like(std))


def with_opposite_drift(x_t: Tensor, x0_pred: Tensor, t: Tensor, s: Tensor, std: Tensor) -> Tensor:
    return 2 * without_drift(x_t, x0_pred, t, s, std) - flow.sde_mean(x_t, x0_pred, t, s, std)


DATA_MEAN, DATA_STD = 0.7, 0.5
SAMPLES = 100_000


def scalar_marginals(step_mean, levels: list[float]) -> list[tuple[float, Tensor, Tensor]]:
    """Return ``(t, relative error of the variance, error of the mean in s.e.)`` per variant."""
    predict = gaussian_posterior(torch.tensor([DATA_MEAN]), torch.tensor([[DATA_STD**2]]))
    x_1 = randn(SAMPLES, 1)
    states = run_all_steps_stochastic(predict, step_mean, x_1, torch.tensor(levels)[:, None, None])
    results = []
    for t, x_t in states.items():
        mean, variance = (1 - t) * DATA_MEAN, (1 - t) ** 2 * DATA_STD**2 + t**2
        x_t = x_t.double()
        results.append(
            (
                t,
                (x_t.var(dim=(1, 2)) / variance - 1).abs(),
                (x_t.mean(dim=(1, 2)) - mean).abs() / math.sqrt(variance / SAMPLES),
            )
        )
    return results


def test_sde_keeps_the_marginals_of_the_ode_at_any_noise_level():
    for _, variance_error, mean_error in scalar_marginals(flow.sde_mean, [0.1, 0.3, 0.5]):
        assert (variance_error < 0.03).all()
        assert (mean_error < 4).all()


@pytest.mark.parametrize("step_mean", [without_drift, with_opposite_drift])
def test_a_wrong_drift_is_far_from_the_marginals(step_mean):
    t, variance_error, _ = scalar_marginals(step_mean, [0.5])[-1]
    assert t == 0
    assert (variance_error > 1).all()


COV = torch.tensor([[0.25, 0.12], [0.12, 0.16]])


def covariance_errors(step_mean, levels: list[tuple[float, float]]) -> list[float]:
    """Return the largest error of the data's covariance per variant, relative to its largest entry."""
    predict = gaussian_posterior(torch.tensor([0.3, -0.2]), COV)
    states = run_all_steps_stochastic(predict, step_mean, randn(30_000, 2), torch.tensor(levels)[:, None])
    covariances = [torch.cov(x_0.T.double()) for x_0 in states[0.0]]
    return [float((covariance - COV).abs().max() / COV.max()) for covariance in covariances]


def test_noise_that_differs_per_channel_keeps_the_joint_covariance():
    assert max(covariance_errors(flow.sde_mean, [(0.5, 0.0), (0.5, 0.1), (0.0, 0.3)])) < 0.04


def test_noise_on_one_channel_without_drift_breaks_the_joint_covariance():
    assert min(covariance_errors(without_drift, [(0.5, 0.0)])) > 0.2


# --- log-probs --------------------------------------------------------------------------------------------


def test_log_prob_is_the_normals_summed_over_what_is_explored():
    table = make_table()
    result = sample(MixingNet(), mixed_steps(), table)
    times = flow.time_grid(K)
    for row, k in enumerate(result.step_index[:, 0].tolist()):
        x_t, x_s = result.chain[row]
        with torch.no_grad():
            x0_pred = MixingNet()(x_t[None], times[k : k + 1])[0]
        x1_pred = (x_t - (1 - times[k]) * x0_pred) / times[k]
        mean = (1 - times[k + 1]) * x0_pred + (times[k + 1] - table[k] ** 2 / (2 * times[k])) * x1_pred
        mask = table[k] > 0
        expected = torch.distributions.Normal(mean[mask], table[k][mask]).log_prob(x_s[mask]).sum()
        torch.testing.assert_close(result.log_prob[row].sum(), expected, atol=1e-3, rtol=1e-5)


def test_log_prob_per_step_is_the_sum_over_rows_is_the_sum_over_elements():
    result = sample(MixingNet(), mixed_steps())
    per_row = result.log_prob.sum(dim=3)
    torch.testing.assert_close(per_row.sum(dim=2), result.log_prob.flatten(2).sum(dim=2))
    assert (per_row[..., :EXPLORED_ROWS] != 0).all()
    assert (per_row[..., EXPLORED_ROWS:] == 0).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_zero_std_gives_log_prob_zero_and_clean_gradients_whatever_stands_there(poison):
    mean = torch.tensor([0.1, 0.2, 0.3, poison], requires_grad=True)
    std = torch.tensor([0.5, 0.0, 0.0, 0.0], requires_grad=True)
    log_prob = flow.gaussian_log_prob(torch.tensor([0.2, 0.2, poison, 0.0]), mean, std)
    assert torch.equal(log_prob[1:], torch.zeros(3))
    log_prob.sum().backward()
    assert torch.isfinite(mean.grad).all() and torch.isfinite(std.grad).all()
    assert mean.grad[0] != 0
    assert torch.equal(mean.grad[1:], torch.zeros(3))


def test_explored_nan_is_not_hidden():
    assert flow.gaussian_log_prob(torch.tensor([math.nan]), torch.zeros(1), torch.ones(1)).isnan().all()


def test_what_is_stored_where_nothing_is_explored_does_not_change_the_log_prob():
    net, table = MixingNet(), make_table()
    result = sample(net, mixed_steps(), table)
    silent = (table == 0)[result.step_index[:, 0]]
    chain = result.chain.clone()
    chain[:, 1][silent] = 1e6
    log_prob, _ = flow.evaluate_chain(net, chain, result.step_index, table)
    untouched, _ = flow.evaluate_chain(net, result.chain, result.step_index, table)
    assert torch.equal(log_prob, untouched)
    assert (log_prob[:, 0][silent] == 0).all()


def test_unexplored_elements_of_x_t_count_only_through_the_network():
    """A network that does not read them gives the same log-prob; a network that does, another."""
    table = make_table()
    mixing = MixingNet()

    def blind(x_t: Tensor, t: Tensor) -> Tensor:
        seen = x_t.clone()
        seen[:, EXPLORED_ROWS:], seen[:, :, EXPLORED_CHANNELS:] = 0, 0
        return mixing(seen, t)

    for net, same in ((blind, True), (mixing, False)):
        result = sample(net, mixed_steps(), table)
        chain = result.chain.clone()
        chain[:, 0][(table == 0)[result.step_index[:, 0]]] += 0.5
        log_prob, _ = flow.evaluate_chain(net, chain, result.step_index, table)
        assert (
            torch.equal(log_prob, flow.evaluate_chain(net, result.chain, result.step_index, table)[0]) == same
        )


def test_no_gradient_passes_through_what_is_not_explored():
    table, predictions = make_table(), []
    net = MixingNet()

    def recording(x_t: Tensor, t: Tensor) -> Tensor:
        predictions.append(net(x_t, t))
        predictions[-1].retain_grad()
        return predictions[-1]

    result = sample(net, mixed_steps(), table)
    chain = result.chain.clone().requires_grad_()
    flow.evaluate_chain(recording, chain, result.step_index, table)[0].sum().backward()
    active = (table > 0)[result.step_index[:, 0]]
    for gradient in (predictions[0].grad, chain.grad[:, 1]):
        assert (gradient[~active] == 0).all()
        assert (gradient[active] != 0).all()


@pytest.mark.parametrize("k", range(K))
def test_derivative_of_the_log_prob_by_the_prediction_is_its_closed_form(k):
    times = flow.time_grid(K).double()
    t, s, std = times[k], times[k + 1], flow.flow_sde_std(0.3, K)[k].double()
    x_t, x_s, x0_pred = (randn(7, seed=seed).double() for seed in (1, 2, 3))

    def log_prob(x0_pred: Tensor) -> Tensor:
        return flow.gaussian_log_prob(x_s, flow.sde_mean(x_t, x0_pred, t, s, std), std.expand(7))

    step = 1e-6
    numeric = (log_prob(x0_pred + step) - log_prob(x0_pred - step)) / (2 * step)
    w1 = s - std**2 / (2 * t)
    c_0 = (1 - s) - w1 * (1 - t) / t
    closed = c_0 * (x_s - flow.sde_mean(x_t, x0_pred, t, s, std)) / std**2
    torch.testing.assert_close(numeric, closed, rtol=1e-6, atol=1e-6)


def test_coefficients_of_the_first_step_do_not_depend_on_the_noise():
    times = flow.time_grid(K)
    c_0 = [flow.sde_coefficients(times[0], times[1], torch.tensor(std))[1].item() for std in (0.0, 0.3, 1.0)]
    assert c_0 == pytest.approx([1 / K] * 3)


def test_bernoulli_log_prob_equals_torchs():
    logits = torch.tensor([-30.0, -2.0, 0.0, 0.3, 30.0]).repeat(2)
    bits = torch.tensor([0.0, 1.0]).repeat_interleave(5)
    expected = torch.distributions.Bernoulli(logits=logits).log_prob(bits)
    torch.testing.assert_close(flow.bernoulli_log_prob(bits, logits), expected)


# --- loss weights per step --------------------------------------------------------------------------------


def step_probability(last_step_prob: float) -> Tensor:
    prob = torch.full((K,), (1 - last_step_prob) / (K - 1))
    prob[-1] = last_step_prob
    return prob


@pytest.mark.parametrize("last_step_prob", [0.2, 0.5, 0.9])
def test_step_weights_have_mean_one_over_the_drawn_steps(last_step_prob):
    prob = step_probability(last_step_prob)
    weights = flow.inverse_sensitivity(make_table(), prob)
    assert (weights * prob).sum().item() == pytest.approx(1, rel=1e-5)
    assert (weights > 0).all()


def test_step_weights_level_the_gradients_of_all_steps():
    table, times, rows = make_table(), flow.time_grid(K), 4000
    weights = flow.inverse_sensitivity(table, step_probability(0.5))
    sizes = []
    for k in range(K):
        x_t, noise = randn(2, rows, H, D, seed=k)
        x0_pred = torch.zeros(rows, H, D, requires_grad=True)
        std = table[k].expand(rows, H, D)
        mean = flow.sde_mean(x_t, x0_pred, times[k], times[k + 1], std)
        flow.gaussian_log_prob((mean + std * noise).detach(), mean, std).sum().backward()
        sizes.append(x0_pred.grad[table[k].expand(rows, H, D) > 0].square().mean().sqrt())
    sizes = torch.stack(sizes)
    assert sizes.max() / sizes.min() > 50
    weighted = sizes * weights
    assert weighted.max() / weighted.min() < 1.05


def test_a_step_that_explores_nothing_has_weight_zero():
    table = make_table()
    table[1] = 0
    weights = flow.inverse_sensitivity(table, step_probability(0.5))
    assert weights[1] == 0
    assert torch.isfinite(weights).all()


# --- learned noise ----------------------------------------------------------------------------------------


def noisy_net(seed: int = 0):
    """A network that predicts an end point and, where the table explores, a std of its own."""
    net, spread, explored = MixingNet(seed), MixingNet(seed + 1), make_table()[0] > 0

    def predict(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return net(x_t, t), torch.where(explored, 0.1 * torch.exp(spread(x_t, t)), 0)

    return predict


def noisy_sample(predict, rows: int = B, seed: int = 0) -> flow.Chain:
    drawn = randn(rows, K + 1, H, D, seed=seed)
    with torch.no_grad():
        return flow.sample_noisy_chain(predict, drawn[:, 0], drawn[:, 1:])


def test_learned_noise_is_in_every_step_around_the_eulers():
    predict, drawn = noisy_net(), randn(B, K + 1, H, D)
    result = noisy_sample(predict)
    times = flow.time_grid(K)
    assert result.chain.shape == (B, K + 1, H, D) and torch.equal(result.chain[:, 0], drawn[:, 0])
    assert torch.equal(result.x_0, result.chain[:, -1])
    assert torch.equal(result.step_index, torch.arange(K).expand(B, K))
    for k in range(K):
        x_t, t, s = result.chain[:, k], times[k], times[k + 1]
        with torch.no_grad():
            x0_pred, std = predict(x_t, t.expand(B))
        velocity = (x_t - x0_pred) / t
        expected = x_t - (t - s) * velocity + std * drawn[:, k + 1]
        torch.testing.assert_close(result.chain[:, k + 1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 5, B])
def test_recomputed_log_probs_of_learned_noise_equal_the_sampled_in_any_batch(size):
    predict = noisy_net()
    result = noisy_sample(predict)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(3))
    parts = [
        flow.evaluate_noisy_chain(predict, result.chain[rows], result.step_index[rows], K)[0]
        for rows in order.split(size)
    ]
    torch.testing.assert_close(torch.cat(parts), result.log_prob[order], atol=1e-4, rtol=1e-4)


def test_log_probs_of_learned_noise_equal_torchs_normal_and_are_zero_elsewhere():
    result = noisy_sample(noisy_net())
    log_prob, steps = flow.evaluate_noisy_chain(noisy_net(), result.chain, result.step_index, K)
    explored = (make_table()[0] > 0).expand_as(log_prob)
    normal = torch.distributions.Normal(steps.mean[explored], steps.std[explored])
    torch.testing.assert_close(log_prob[explored], normal.log_prob(result.chain[:, 1:][explored]))
    assert (log_prob[~explored] == 0).all()


def test_without_learned_noise_the_chain_is_the_odes():
    net = MixingNet()
    x_1 = randn(B, H, D)
    with torch.no_grad():
        silent = flow.sample_noisy_chain(
            lambda x_t, t: (net(x_t, t), torch.zeros_like(x_t)), x_1, randn(B, K, H, D, seed=1)
        )
        assert torch.equal(silent.x_0, flow.sample_ode(net, x_1, K))


# --- entropy and divergence -------------------------------------------------------------------------------


def test_entropy_is_that_of_torchs_normal_averaged_over_what_is_explored():
    std = torch.rand(B, 2, H, D, generator=torch.Generator().manual_seed(0)) + 0.1
    std[:, :, 1:] = 0
    expected = torch.distributions.Normal(0.0, std[:, :, 0]).entropy().mean(dim=(1, 2))
    torch.testing.assert_close(flow.mean_entropy(std), expected)
    assert (flow.mean_entropy(torch.zeros(B, 2, H, D)) == 0).all()


def test_gradient_of_the_entropy_is_one_over_std_and_finite_where_nothing_is_explored():
    std = torch.tensor([[0.5, 0.25, 0.0, 0.0]], requires_grad=True)
    flow.mean_entropy(std).sum().backward()
    torch.testing.assert_close(std.grad, torch.tensor([[1.0, 2.0, 0.0, 0.0]]))


def test_divergence_of_gaussians_equals_torchs_and_is_zero_between_equals():
    mean, other_mean = randn(2, B, D)
    std, other_std = randn(2, B, D, seed=1).abs() + 0.1
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(other_mean, other_std))
    torch.testing.assert_close(flow.gaussian_kl(mean, std, other_mean, other_std), expected)
    assert (flow.gaussian_kl(mean, std, mean, std) == 0).all()


def test_divergence_is_zero_in_value_and_gradient_where_nothing_is_explored():
    mean, std = torch.ones(3, requires_grad=True), torch.tensor([0.5, 0.0, 0.0], requires_grad=True)
    other = torch.tensor([0.0, 5.0, math.inf])
    found = flow.gaussian_kl(mean, std, other, torch.tensor([0.5, 0.0, 0.0]))
    found.sum().backward()
    assert found[0] == 2 and (found[1:] == 0).all()
    assert mean.grad[0] == 4 and (mean.grad[1:] == 0).all() and (std.grad[1:] == 0).all()


def test_divergence_of_sde_steps_is_the_squared_change_of_the_prediction_over_twice_the_variance():
    t, s, std = flow.time_grid(K)[2], flow.time_grid(K)[3], torch.tensor(0.2)
    x_t, x0_pred, change = randn(3, B, D)
    c_0 = flow.sde_coefficients(t, s, std)[1]
    one, other = (flow.sde_mean(x_t, x0, t, s, std) for x0 in (x0_pred, x0_pred + change))
    spread = std.expand(B, D)
    expected = (c_0 * change).square() / (2 * std.square())
    torch.testing.assert_close(flow.gaussian_kl(one, spread, other, spread), expected, atol=1e-5, rtol=1e-4)


def test_divergence_of_bernoullis_equals_torchs_and_is_zero_between_equals():
    logits, other = 3 * randn(2, B, D)
    bernoulli = torch.distributions.Bernoulli
    expected = torch.distributions.kl_divergence(bernoulli(logits=logits), bernoulli(logits=other))
    torch.testing.assert_close(flow.bernoulli_kl(logits, other), expected, atol=1e-5, rtol=1e-4)
    assert (flow.bernoulli_kl(logits, logits) == 0).all()
