"""A tiny policy learns to reach on the tabletop, and a wrong sign anywhere in the way is noticed.

Collector, update and environment are the real ones; the policy is a straight line from where the target is seen to
where it is taken to be, inside an exact denoiser, so that a run takes seconds and what must come out is known.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from lerobot_pirl import flow, ppo
from lerobot_pirl.algorithm import PiRLAlgorithm
from lerobot_pirl.collector import Collector, episode_specs
from lerobot_pirl.envs import TabletopEnv, make_chunk_envs
from lerobot_pirl.options import PiRLConfig

CHUNK, STEP_LIMIT, EPISODES, ITERATIONS = 4, 8, 64, 12
# metres per half picture: what points at the targets, and what the policy starts with
TRUE_GAIN, FIRST_GAIN = 0.232, 0.12
NOISE, LAST_STD, SPREAD = 0.3, 0.03, 0.03
# success of the last three iterations above the first one's: seeds 0 to 9 gain 0.36 to 0.72, and lose 0.12 to 0.29 with
# the wrong sign of advantages or log-probs
CLEAR_RISE = 0.25
# relative error of a variance; the right drift has 0.012 here, none 0.11 and the opposite one 0.21
CLEAR_ERROR = 0.05
ROWS, FINE = 5_000, 20


class PointingAdapter:
    """Moves where it takes the target to be; its data are ``N(that place, SPREAD^2)``, so its denoiser is known."""

    n_action_steps = CHUNK
    gripper_index = gripper_temperature = processors = None
    value_input_dim = 3

    def __init__(self, num_denoising_steps: int) -> None:
        self.policy = nn.Linear(2, 2)
        with torch.no_grad():
            self.policy.weight.copy_(FIRST_GAIN * torch.eye(2))
            self.policy.bias.zero_()
        early = flow.flow_sde_std(NOISE, num_denoising_steps)[:, None].expand(-1, 3)
        self.noise_std = flow.noise_table(early, torch.full((3,), LAST_STD), CHUNK, CHUNK)

    def prepare_observation(self, observation: dict, tasks: list[str]) -> dict:
        # the fixed camera comes rotated by 180 degrees
        return {"image": torch.from_numpy(observation["pixels"]["image"]).float().flip(1, 2)}

    def encode(self, batch: dict) -> dict[str, Tensor]:
        """Return where the red disc is in the picture, ``[B, 2]`` in [-1, 1]."""
        image = batch["image"]
        red = (image[..., 0] - image[..., 1:].amax(dim=-1) - 80).clamp(min=0)
        share = red / red.sum(dim=(1, 2), keepdim=True).clamp(min=1)
        grid = torch.linspace(-1, 1, image.shape[1])
        return {"seen": torch.stack([share.sum(dim=2) @ grid, share.sum(dim=1) @ grid], dim=1)}

    def predict_x0(self, features: dict, x_t: Tensor, t: Tensor) -> Tensor:
        place = self.policy(features["seen"])
        mean = torch.cat([place, torch.full_like(place[:, :1], 0.1)], dim=1)[:, None]
        t = t[:, None, None]
        gain = (1 - t) * SPREAD**2 / ((1 - t) ** 2 * SPREAD**2 + t**2)
        return mean + gain * (x_t - (1 - t) * mean)

    def value_input(self, features: dict) -> Tensor:
        return torch.cat([features["seen"], features["seen"].abs().amax(dim=1, keepdim=True)], dim=1)

    def execute(self, x_0: Tensor, gripper: None) -> Tensor:
        return x_0

    def environment_actions(self, actions: Tensor) -> Tensor:
        return torch.cat([actions, torch.zeros(*actions.shape[:2], 4)], dim=2)

    def no_decay(self) -> set[str]:
        return set()


@dataclass
class Run:
    """What a training run showed: success per iteration, and how far the first ratios were from 1."""

    success: list[float]
    ratio_error: float
    gain: Tensor

    @property
    def rise(self) -> float:
        return sum(self.success[-3:]) / 3 - self.success[0]


def train(seed: int = 0, iterations: int = ITERATIONS) -> Run:
    config = PiRLConfig(
        num_denoising_steps=4,
        n_action_steps=CHUNK,
        episodes_per_iteration=EPISODES,
        max_episode_steps=STEP_LIMIT,
        n_envs=32,
        n_epochs=2,
        minibatch_size=64,
        micro_batch_size=64,
        learning_rate=4e-3,
        value_learning_rate=3e-3,
        value_hidden_dims=(16,),
        critic_warmup_iterations=0,
        target_kl=None,
    )
    config.validate()
    torch.manual_seed(seed)
    adapter = PointingAdapter(config.num_denoising_steps)
    algorithm = PiRLAlgorithm(adapter, config, seed)
    env = TabletopEnv(observation_height=32, observation_width=32)
    envs = make_chunk_envs(env, config.n_envs, CHUNK, STEP_LIMIT)
    collector = Collector(envs, adapter, config.last_step_prob, seed)
    success, ratio_error = [], 0.0
    for version in range(iterations):
        walk = episode_specs({0: 50}, version * EPISODES, EPISODES)
        rollout = collector.collect(walk, version)
        stats = algorithm.update(iter([rollout])).to_log_dict()
        success.append(float(rollout.success.float().mean()))
        ratio_error = max(ratio_error, stats["ratio_max_dev_first"])
    return Run(success, ratio_error, adapter.policy.weight.detach())


@torch.no_grad()
def marginal_error() -> float:
    """Return how far the noisy steps in a chain's first half are from having the noise-free step's variance.

    The largest relative error, on a grid so fine that the right drift leaves hardly any.
    """
    adapter = PointingAdapter(FINE)
    features = {"seen": torch.zeros(ROWS, 2)}
    x_1, noise = torch.randn(2, ROWS, CHUNK, 3, generator=torch.Generator().manual_seed(0))
    times, errors = torch.linspace(1, 0, FINE + 1), []
    for k in range(FINE // 2):
        index = torch.full((ROWS, 1), k)
        chain = flow.sample_chain(
            lambda x_t, t: adapter.predict_x0(features, x_t, t), x_1, adapter.noise_std, index, noise
        ).chain
        before, after = chain[:, 0], chain[:, 1]
        share = times[k + 1] / times[k]
        x0_pred = adapter.predict_x0(features, before, times[k].expand(ROWS))
        errors.append(after.var() / (share * before + (1 - share) * x0_pred).var() - 1)
    return float(torch.stack(errors).abs().max())


# --- as it is -------------------------------------------------------------------------------------------------


def test_success_rises_clearly_and_the_policy_points_nearer_to_the_targets():
    run = train()
    assert run.rise > CLEAR_RISE
    error = TRUE_GAIN * torch.eye(2) - run.gain
    assert error.norm() < 0.8 * (TRUE_GAIN - FIRST_GAIN) * 2**0.5


def test_the_same_seed_learns_the_same_and_another_one_something_else():
    runs = [train(seed, iterations=2) for seed in (3, 3, 4)]
    assert torch.equal(runs[0].gain, runs[1].gain)
    assert not torch.equal(runs[0].gain, runs[2].gain)


def test_first_ratios_are_one_in_every_iteration():
    assert train(iterations=3).ratio_error < 1e-3


def test_noisy_steps_have_the_variance_of_noise_free_ones():
    assert marginal_error() < CLEAR_ERROR


# --- with a wrong sign ----------------------------------------------------------------------------------------


def opposite_drift(t: Tensor, s: Tensor, std: Tensor) -> tuple[Tensor, ...]:
    """Return the coefficients of a step whose correction for the noise has the wrong sign."""
    pairs = zip(COEFFICIENTS(t, s, std), no_drift(t, s, std), strict=True)
    return tuple(2 * without - right for right, without in pairs)


def no_drift(t: Tensor, s: Tensor, std: Tensor) -> tuple[Tensor, ...]:
    return COEFFICIENTS(t, s, torch.zeros_like(std))


COEFFICIENTS, SAMPLE_CHAIN = flow.sde_coefficients, flow.sample_chain


def test_advantages_of_the_wrong_sign_make_success_fall(monkeypatch):
    normalize = ppo.normalize_advantages
    monkeypatch.setattr(ppo, "normalize_advantages", lambda advantages: -normalize(advantages))
    run = train()
    assert run.rise < 0
    assert run.ratio_error < 1e-3


def test_log_probs_of_the_wrong_sign_make_success_fall(monkeypatch):
    log_prob = flow.gaussian_log_prob
    monkeypatch.setattr(flow, "gaussian_log_prob", lambda *args: -log_prob(*args))
    run = train()
    assert run.rise < 0
    assert run.ratio_error < 1e-3


def test_log_probs_of_the_wrong_sign_in_the_update_alone_show_in_the_ratio(monkeypatch):
    log_prob = flow.gaussian_log_prob

    def right_while_sampling(*args):
        with monkeypatch.context() as patch:
            patch.setattr(flow, "gaussian_log_prob", log_prob)
            return SAMPLE_CHAIN(*args)

    monkeypatch.setattr(flow, "gaussian_log_prob", lambda *args: -log_prob(*args))
    monkeypatch.setattr(flow, "sample_chain", right_while_sampling)
    assert train(iterations=1).ratio_error > 0.1


@pytest.mark.parametrize("wrong", [opposite_drift, no_drift])
def test_a_wrong_drift_in_the_sampler_alone_shows_in_ratio_and_marginals(monkeypatch, wrong):
    def wrong_while_sampling(*args):
        with monkeypatch.context() as patch:
            patch.setattr(flow, "sde_coefficients", wrong)
            return SAMPLE_CHAIN(*args)

    monkeypatch.setattr(flow, "sample_chain", wrong_while_sampling)
    assert train(iterations=1).ratio_error > 0.1
    assert marginal_error() > CLEAR_ERROR


@pytest.mark.parametrize("wrong", [opposite_drift, no_drift])
def test_a_wrong_drift_on_both_sides_shows_in_the_marginals_though_not_in_the_ratio(monkeypatch, wrong):
    """Both sides agree on a policy, which even learns; it is only not the one that the ODE evaluates."""
    monkeypatch.setattr(flow, "sde_coefficients", wrong)
    assert train(iterations=1).ratio_error < 1e-3
    assert marginal_error() > CLEAR_ERROR
