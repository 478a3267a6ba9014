"""Advantages and losses against hand values and plain-Python references."""

import math

import pytest
import torch
from torch import Tensor

from lerobot_pirl import ppo

# --- generalised advantages -------------------------------------------------------------------------------


def random_episodes(seed: int, num_steps: int, num_episodes: int) -> dict[str, Tensor]:
    """Padded ``[T, E]`` inputs: episodes of random length, some terminated and some truncated."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, num_steps + 1, (num_episodes,), generator=generator)
    lengths[0] = num_steps
    steps = torch.arange(num_steps)[:, None]
    last, padding = steps == lengths - 1, steps >= lengths
    success = torch.rand(num_episodes, generator=generator) < 0.5
    floats = torch.randn(3, num_steps, num_episodes, generator=generator, dtype=torch.float64)
    rewards, values, next_values = floats.masked_fill(padding, 0.0)
    return {
        "rewards": rewards,
        "values": values,
        "next_values": next_values,
        "terminated": (last & success) | padding,
        "ended": last | padding,
    }


def reference_gae(episode: dict[str, list], gamma: float, gae_lambda: float) -> list[float]:
    """Advantages of one episode, summed up from the definition: discounted sums of TD errors."""
    length = episode["ended"].index(True) + 1
    deltas = []
    for t in range(length):
        bootstrap = 0.0 if episode["terminated"][t] else episode["next_values"][t]
        deltas.append(episode["rewards"][t] + gamma * bootstrap - episode["values"][t])
    return [sum((gamma * gae_lambda) ** (i - t) * deltas[i] for i in range(t, length)) for t in range(length)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.99, 0.95), (0.9, 0.0), (1.0, 1.0), (0.0, 0.5)])
def test_advantages_equal_the_definition(seed, gamma, gae_lambda):
    inputs = random_episodes(seed, num_steps=3 + 2 * seed, num_episodes=1 + seed)
    advantages, returns = ppo.compute_gae(**inputs, gamma=gamma, gae_lambda=gae_lambda)
    for e in range(advantages.shape[1]):
        expected = reference_gae({k: v[:, e].tolist() for k, v in inputs.items()}, gamma, gae_lambda)
        rows = slice(0, len(expected))
        torch.testing.assert_close(
            advantages[rows, e], torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0
        )
        torch.testing.assert_close(returns[rows, e], advantages[rows, e] + inputs["values"][rows, e])
        assert (advantages[len(expected) :, e] == 0).all()


def column(**inputs: list) -> dict[str, Tensor]:
    """One episode as ``[T, 1]`` tensors."""
    return {name: torch.tensor(values)[:, None] for name, values in inputs.items()}


def test_lambda_one_without_discount_is_return_minus_value():
    inputs = column(
        rewards=[0.0, 0.5, 1.0],
        values=[0.3, -0.2, 0.8],
        next_values=[-0.2, 0.8, 9.0],
        terminated=[False, False, True],
        ended=[False, False, True],
    )
    advantages, returns = ppo.compute_gae(**inputs, gamma=1.0, gae_lambda=1.0)
    torch.testing.assert_close(returns[:, 0], torch.tensor([1.5, 1.5, 1.0]))
    torch.testing.assert_close(advantages[:, 0], torch.tensor([1.5 - 0.3, 1.5 + 0.2, 1.0 - 0.8]))


def test_lambda_zero_is_the_td_error():
    inputs = random_episodes(seed=1, num_steps=7, num_episodes=5)
    advantages, _ = ppo.compute_gae(**inputs, gamma=0.9, gae_lambda=0.0)
    bootstrap = torch.where(inputs["terminated"], 0.0, inputs["next_values"])
    torch.testing.assert_close(advantages, inputs["rewards"] + 0.9 * bootstrap - inputs["values"])


@pytest.mark.parametrize(("terminated", "last_advantage"), [(True, -0.5), (False, 0.9 * 2.0 - 0.5)])
def test_truncation_bootstraps_the_final_value_and_termination_does_not(terminated, last_advantage):
    inputs = column(
        rewards=[0.0, 0.0],
        values=[0.1, 0.5],
        next_values=[0.5, 2.0],
        terminated=[False, terminated],
        ended=[False, True],
    )
    advantages, _ = ppo.compute_gae(**inputs, gamma=0.9, gae_lambda=0.8)
    assert advantages[1, 0].item() == pytest.approx(last_advantage)
    first_advantage = 0.9 * 0.5 - 0.1 + 0.9 * 0.8 * last_advantage
    assert advantages[0, 0].item() == pytest.approx(first_advantage, abs=1e-6)


def test_nothing_flows_across_an_episodes_end():
    inputs = random_episodes(seed=2, num_steps=6, num_episodes=20)
    changed = {name: value.clone() for name, value in inputs.items()}
    padding = inputs["ended"].cumsum(0) > 1
    changed["rewards"][padding] = 100.0
    real = ~padding
    before, _ = ppo.compute_gae(**inputs, gamma=0.99, gae_lambda=0.95)
    after, _ = ppo.compute_gae(**changed, gamma=0.99, gae_lambda=0.95)
    ends = inputs["ended"] & real
    assert (ends[:-1] & inputs["terminated"][:-1]).any() and (ends[:-1] & ~inputs["terminated"][:-1]).any()
    assert torch.equal(before[real], after[real])


# --- normalisation and weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e4])
def test_normalised_advantages_have_mean_zero_and_std_one(scale):
    raw = scale * (torch.randn(500, generator=torch.Generator().manual_seed(0)) + 3)
    normalised = ppo.normalize_advantages(raw)
    assert normalised.dtype == torch.float32
    assert abs(normalised.mean().item()) < 1e-6
    assert normalised.std(unbiased=False).item() == pytest.approx(1, abs=2e-3)
    assert torch.equal(normalised.argsort(), raw.argsort())


@pytest.mark.parametrize("number", [0.0, 0.1, 0.95, -1.7])
@pytest.mark.parametrize("count", [1, 3, 1001])
def test_equal_advantages_normalise_to_zeros(number, count):
    normalised = ppo.normalize_advantages(torch.full((count,), number))
    assert normalised.abs().max() < 1e-6


def test_token_weighs_chunks_alike_and_episode_weighs_episodes_alike():
    lengths = torch.tensor([3, 30])
    token, episode = (ppo.sample_weights(lengths, how) for how in ("token", "episode"))
    assert torch.equal(token, torch.ones(33))
    assert episode.mean().item() == pytest.approx(1)
    assert episode[:3].sum().item() == pytest.approx(episode[3:].sum().item())
    assert token[3:].sum() == 10 * token[:3].sum()
    assert len(set(episode[:3].tolist())) == 1


# --- policy loss ------------------------------------------------------------------------------------------

RATIOS = [0.5, 0.8, 1.0, 1.2, 2.0]
# loss by hand, -min(A r, A clip(r, 0.8, 1.2))
HAND = {1.0: [-0.5, -0.8, -1.0, -1.2, -1.2], -1.0: [0.8, 0.8, 1.0, 1.2, 2.0]}


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_clipped_loss_equals_hand_values(advantage):
    loss = ppo.policy_loss(torch.tensor(RATIOS), torch.full((5,), advantage), clip_range=0.2, dual_clip=None)
    torch.testing.assert_close(loss, torch.tensor(HAND[advantage]))


@pytest.mark.parametrize(
    ("advantage", "moves"),
    [(1.0, [True, True, True, False]), (-1.0, [False, True, True, True])],
)
def test_gradient_vanishes_where_the_loss_is_clipped(advantage, moves):
    ratio = torch.tensor([0.5, 0.9, 1.0, 2.0], requires_grad=True)
    ppo.policy_loss(ratio, torch.full((4,), advantage), clip_range=0.2, dual_clip=None).sum().backward()
    assert torch.equal(ratio.grad, torch.where(torch.tensor(moves), -advantage, 0.0))


def test_gradient_at_ratio_one_is_the_plain_policy_gradient():
    log_prob = torch.zeros(3, requires_grad=True)
    advantages = torch.tensor([2.0, -1.0, 0.0])
    ppo.policy_loss(log_prob.exp(), advantages, clip_range=0.2, dual_clip=3.0).sum().backward()
    assert torch.equal(log_prob.grad, -advantages)


def test_dual_clip_bounds_the_loss_of_negative_advantages_alone():
    ratio = torch.tensor([2.0, 5.0, 5.0], requires_grad=True)
    advantages = torch.tensor([-1.0, -1.0, 1.0])
    plain = ppo.policy_loss(ratio, advantages, clip_range=0.2, dual_clip=None)
    bounded = ppo.policy_loss(ratio, advantages, clip_range=0.2, dual_clip=3.0)
    torch.testing.assert_close(plain, torch.tensor([2.0, 5.0, -1.2]))
    torch.testing.assert_close(bounded, torch.tensor([2.0, 3.0, -1.2]))
    bounded.sum().backward()
    assert torch.equal(ratio.grad, torch.tensor([1.0, 0.0, 0.0]))


def test_clip_fraction_marks_ratios_outside_the_trust_region():
    marked = ppo.clip_fraction(torch.tensor([0.5, 0.85, 1.0, 1.15, 2.0]), clip_range=0.2)
    assert marked.tolist() == [1, 0, 0, 0, 1]


# --- value loss -------------------------------------------------------------------------------------------


def test_value_loss_is_quadratic_then_linear():
    values, returns = torch.tensor([0.5, 20.0, -20.0]), torch.zeros(3)
    loss = ppo.value_loss(values, values, returns, clip_range_vf=None, huber_delta=10.0)
    torch.testing.assert_close(loss, torch.tensor([0.125, 10 * (20 - 5.0), 10 * (20 - 5.0)]))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.1, 0.5 * 0.9**2),  # inside the range: nothing is clipped
        (0.5, 0.5 * 0.8**2),  # ran ahead of the range: the clipped value is the worse one
        (-0.5, 0.5 * 1.5**2),  # ran away from the return: the unclipped value is the worse one
    ],
)
def test_value_loss_takes_the_larger_of_clipped_and_unclipped(value, expected):
    loss = ppo.value_loss(
        torch.tensor([value]), torch.tensor([0.0]), torch.tensor([1.0]), clip_range_vf=0.2, huber_delta=10.0
    )
    assert loss.item() == pytest.approx(expected)


def test_value_gradient_vanishes_where_the_clipped_value_counts():
    values = torch.tensor([0.5, -0.5], requires_grad=True)
    ppo.value_loss(
        values, torch.zeros(2), torch.ones(2), clip_range_vf=0.2, huber_delta=10.0
    ).sum().backward()
    assert values.grad.tolist() == [0.0, -1.5]


# --- diagnostics ------------------------------------------------------------------------------------------


def test_kl_estimate_is_zero_at_ratio_one_and_never_negative():
    tiny = torch.logspace(-12, 1, 400)
    assert ppo.approx_kl(torch.zeros(1)).item() == 0
    assert (ppo.approx_kl(torch.cat([tiny, -tiny])) >= 0).all()
    hand = [r - 1 - math.log(r) for r in (0.5, 2.0)]
    torch.testing.assert_close(ppo.approx_kl(torch.tensor([0.5, 2.0]).log()), torch.tensor(hand))


def test_kl_estimate_averages_to_the_kl_of_two_gaussians():
    shift = 0.3
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    log_ratio = shift * x - shift**2 / 2  # N(shift, 1) over N(0, 1)
    assert ppo.approx_kl(log_ratio).mean().item() == pytest.approx(shift**2 / 2, rel=0.02)


def test_explained_variance_of_perfect_constant_and_opposite_values():
    returns = torch.tensor([0.0, 1.0, 2.0])
    assert ppo.explained_variance(returns + 5, returns) == pytest.approx(1)
    assert ppo.explained_variance(torch.full((3,), 7.0), returns) == pytest.approx(0)
    assert ppo.explained_variance(-returns, returns) == pytest.approx(-3)
    assert math.isnan(ppo.explained_variance(returns, torch.ones(3)))


# advantages within groups


def test_group_advantages_equal_the_definition():
    returns = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    found = ppo.group_advantages(returns, 4)
    for start in (0, 4):
        group = returns[start : start + 4].tolist()
        mean = sum(group) / 4
        std = math.sqrt(sum((value - mean) ** 2 for value in group) / 3)
        expected = [(value - mean) / (std + 1e-6) for value in group]
        assert found[start : start + 4].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_a_group_without_differences_gets_zeros(value):
    assert ppo.group_advantages(torch.full((6,), value), 3).tolist() == [0.0] * 6


def test_group_advantages_do_not_depend_on_shift_scale_or_other_groups():
    generator = torch.Generator().manual_seed(0)
    returns = torch.randn(8, generator=generator)
    found = ppo.group_advantages(returns, 4)
    torch.testing.assert_close(ppo.group_advantages(3 * returns + 7, 4), found, atol=1e-5, rtol=0)
    torch.testing.assert_close(ppo.group_advantages(returns[:4], 4), found[:4])


def test_the_range_of_groups_includes_its_ends():
    success = torch.tensor([[i < n for i in range(10)] for n in (0, 1, 5, 9, 10)]).flatten()
    assert ppo.groups_in_range(success, 10, 0.1, 0.9).tolist() == [False, True, True, True, False]
    assert ppo.groups_in_range(success, 10, 0.2, 0.8).tolist() == [False, False, True, False, False]
    assert ppo.groups_in_range(success, 10, 0.0, 1.0).all()
