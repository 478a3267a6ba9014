"""Learned noise: its range, what it explores, and that a tiny X-VLA's decisions are recomputed as they were drawn."""

import pytest
import torch
from lerobot.policies.xvla.modeling_xvla import XVLAPolicy
from torch import Tensor

from lerobot_pirl import flow
from lerobot_pirl.build import make_adapter
from lerobot_pirl.noise import NoiseHead
from lerobot_pirl.policies.base import chain_log_prob, native_actions, sample_actions
from lerobot_pirl.policies.xvla import GRIPPER, POSITION, ROTATION, XVLAAdapter
from lerobot_pirl.weights import load_weights, trainable_parameters
from tests.toy import flow_noise_config, tiny_features

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS, STEPS = 12, 3
GROUPS = {"position": (slice(0, 3), (0.002, 0.008)), "rotation": (slice(3, 5), (0.01, 0.05))}


def make_head() -> NoiseHead:
    torch.manual_seed(0)
    return NoiseHead(16, (8,), GROUPS, num_channels=7, num_rows=2)


def make(dtype: str = "float32", **algorithm) -> XVLAAdapter:
    cfg = flow_noise_config(**{"num_denoising_steps": STEPS, "gripper": "bernoulli_last"} | algorithm)
    cfg.policy.dtype = dtype
    torch.manual_seed(0)
    adapter = XVLAAdapter(XVLAPolicy(cfg.policy), cfg)
    # a head that has learned: far from the middle of its range, and different for every input
    with torch.no_grad():
        for parameter in adapter.noise_head.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return adapter


@pytest.fixture(scope="module")
def adapter() -> XVLAAdapter:
    """Tests leave it as it is."""
    return make()


def features_for(adapter: XVLAAdapter, rows: int = ROWS) -> dict[str, Tensor]:
    found = tiny_features(adapter, rows).items()
    return {name: value.to(adapter.dtype) if value.is_floating_point() else value for name, value in found}


def draw(adapter, features, noise_scale=1.0):
    rows = len(features["proprio"])
    generators = [torch.Generator().manual_seed(row) for row in range(rows)]
    return sample_actions(adapter, features, 0.5, generators, noise_scale)


def recompute(adapter, features, drawn, rows=slice(None), noise_scale=1.0):
    selected = {name: value[rows] for name, value in features.items()}
    stored = (drawn.chain[rows], drawn.step_index[rows], drawn.gripper[rows])
    return chain_log_prob(adapter, selected, *stored, noise_scale)


# the head


def test_std_stays_in_its_groups_range_and_starts_near_the_geometric_mean():
    head = make_head()
    for size, expected in ((1.0, (0.004, 0.01 * 5**0.5)), (1e4, None)):
        std = head(size * torch.randn(50, 4, 16)).detach()[:, :2]
        for (channels, (low, high)), middle in zip(GROUPS.values(), expected or (None, None), strict=True):
            found = std[..., channels]
            assert found.min() >= low * 0.9999 and found.max() <= high * 1.0001
            if middle:
                torch.testing.assert_close(found, torch.full_like(found, middle), rtol=0.1, atol=0)


def test_log_of_std_lies_between_the_limits_logarithms_by_the_tanh():
    head, hidden = make_head(), torch.randn(5, 4, 16)
    std = head(hidden).detach()
    share = (1 + torch.tanh(head.mlp(hidden))) / 2
    expected = 0.002 ** (1 - share) * 0.008**share
    torch.testing.assert_close(std[:, :2, :3], expected[:, :2, :3].detach())


def test_other_channels_and_later_rows_get_no_noise_and_no_gradient():
    head, hidden = make_head(), torch.randn(5, 4, 16, requires_grad=True)
    std = head(hidden)
    assert (std[:, :2, :5] > 0).all()
    assert (std[:, 2:] == 0).all() and (std[..., 5:] == 0).all()
    std.sum().backward()
    assert (hidden.grad[:, :2] != 0).any() and (hidden.grad[:, 2:] == 0).all()
    assert (head.mlp[-1].weight.grad[5:] == 0).all() and (head.mlp[-1].weight.grad[:5] != 0).any()


def test_upper_bound_is_the_highest_std_where_there_is_noise():
    bound = make_head().upper_bound(3, 4)
    assert bound.shape == (3, 4, 7)
    assert bound[:, :2, :3].unique().tolist() == pytest.approx([0.008])
    assert bound[:, :2, 3:5].unique().tolist() == pytest.approx([0.05])
    assert bound[:, 2:].sum() == 0 == bound[..., 5:].sum()


def test_limits_are_no_weights():
    assert all(name.startswith("mlp.") for name in make_head().state_dict())


# acting and recomputing


@pytest.mark.parametrize("micro_batch", [1, 5, 64])
@torch.no_grad()
def test_recomputed_log_probs_equal_the_rollouts_in_any_batch(adapter, micro_batch):
    features = features_for(adapter, 64)
    drawn = draw(adapter, features)
    assert drawn.chain.shape == (64, STEPS + 1, 8, 20) and drawn.log_prob.shape == (64, STEPS)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    again = torch.cat([recompute(adapter, features, drawn, rows)[0] for rows in order.split(micro_batch)])
    torch.testing.assert_close(again, drawn.log_prob[order], atol=1e-3, rtol=0)


@pytest.mark.parametrize("micro_batch", [1, 64])
@torch.no_grad()
def test_recomputed_log_probs_of_a_bfloat16_policy_stay_close(micro_batch):
    adapter = make("bfloat16")
    features = features_for(adapter, 64)
    drawn = draw(adapter, features)
    assert drawn.log_prob.dtype == drawn.chain.dtype == torch.float32
    parts = torch.arange(64).split(micro_batch)
    again = torch.cat([recompute(adapter, features, drawn, rows)[0] for rows in parts])
    torch.testing.assert_close(again, drawn.log_prob, atol=2e-2, rtol=0)


@torch.no_grad()
def test_log_probs_of_the_chain_and_the_gripper_equal_torchs_distributions(adapter):
    features = features_for(adapter)
    drawn = draw(adapter, features)
    times, mask = flow.time_grid(STEPS), adapter.noise_std[0] > 0
    for k in range(STEPS):
        x_t, x_s, t, s = drawn.chain[:, k], drawn.chain[:, k + 1], times[k], times[k + 1]
        x0_pred, std = adapter.predict_x0_and_std(features, x_t, t.expand(ROWS))
        mean = x_t - (t - s) * (x_t - x0_pred) / t
        expected = torch.distributions.Normal(mean[:, mask], std[:, mask]).log_prob(x_s[:, mask]).sum(1)
        if k == STEPS - 1:
            logits = x0_pred[:, : adapter.n_action_steps, GRIPPER] / adapter.gripper_temperature
            bits = torch.distributions.Bernoulli(logits=logits).log_prob(drawn.gripper.float()).sum(1)
            assert bits.abs().min() > 0.1
            expected += bits
        torch.testing.assert_close(drawn.log_prob[:, k], expected, atol=2e-3, rtol=1e-4)


@torch.no_grad()
def test_prediction_is_that_without_a_head_and_noise_follows_observation_and_time(adapter):
    features, x_t = features_for(adapter), torch.randn(ROWS, 8, 20)
    early, late = torch.ones(ROWS), torch.full((ROWS,), 0.25)
    x0_pred, std = adapter.predict_x0_and_std(features, x_t, early)
    assert torch.equal(x0_pred, adapter.predict_x0(features, x_t, early))
    assert not torch.equal(std, adapter.predict_x0_and_std(features, x_t, late)[1])
    assert len(std[:, 0, 0].unique()) == ROWS


@torch.no_grad()
def test_noise_is_on_position_and_rotation_of_the_executed_rows_alone(adapter):
    features = features_for(adapter)
    mask = torch.zeros(8, 20, dtype=torch.bool)
    mask[: adapter.n_action_steps, POSITION] = mask[: adapter.n_action_steps, ROTATION] = True
    assert torch.equal(adapter.noise_std > 0, mask.expand(STEPS, 8, 20))
    _, drawn_from = recompute(adapter, features, draw(adapter, features))
    assert torch.equal(drawn_from.std > 0, mask.expand(ROWS, STEPS, 8, 20))


@torch.no_grad()
def test_what_is_stored_in_the_last_state_where_nothing_is_explored_does_not_change_the_log_prob(adapter):
    features = features_for(adapter)
    drawn = draw(adapter, features)
    before, _ = recompute(adapter, features, drawn)
    silent = adapter.noise_std[0] == 0
    drawn.chain[:, -1][:, silent] += 100.0
    assert torch.equal(recompute(adapter, features, drawn)[0], before)
    drawn.chain[:, -1][:, ~silent] += 0.1
    assert (recompute(adapter, features, drawn)[0][:, -1] != before[:, -1]).all()


@torch.no_grad()
def test_annealing_scales_the_noise_of_every_step(adapter):
    features = features_for(adapter)
    drawn = draw(adapter, features, noise_scale=0.25)
    log_prob, quarter = recompute(adapter, features, drawn, noise_scale=0.25)
    torch.testing.assert_close(log_prob, drawn.log_prob, atol=2e-3, rtol=0)
    _, whole = recompute(adapter, features, drawn)
    torch.testing.assert_close(quarter.std, whole.std / 4)


@torch.no_grad()
def test_acting_without_exploration_does_not_ask_the_head(adapter):
    features, generators = features_for(adapter, 2), [torch.Generator().manual_seed(i) for i in range(2)]
    noise = torch.stack([torch.randn(8, 20, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    found = native_actions(adapter, features, generators)
    x_0 = flow.sample_native(lambda x_t, t: adapter.predict_x0(features, x_t, t), noise, STEPS)
    assert torch.equal(found, adapter.execute(x_0, None))


def test_gradient_of_the_noise_reaches_head_and_transformer(adapter):
    features = features_for(adapter)
    _, drawn_from = recompute(adapter, features, draw(adapter, features))
    try:
        drawn_from.std.sum().backward()
        for parameters in (adapter.noise_head.parameters(), adapter.model.transformer.blocks.parameters()):
            assert any(p.grad is not None and p.grad.abs().max() > 0 for p in parameters)
    finally:
        adapter.policy.zero_grad()
        adapter.noise_head.zero_grad()


# travelling


def test_the_head_travels_with_the_policys_weights():
    source, target = make(), make()
    with torch.no_grad():
        source.noise_head.mlp[0].weight += 1
    weights = trainable_parameters(source.policy, source.noise_head)
    assert {name for name in weights if name.startswith("noise_head.")} == {
        f"noise_head.mlp.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")
    }
    load_weights(target.policy, weights, target.noise_head)
    assert torch.equal(target.noise_head.mlp[0].weight, source.noise_head.mlp[0].weight)
    with pytest.raises(ValueError, match=r"differ in 6 parameters, the first is 'noise_head\.mlp\.0\.bias'"):
        load_weights(target.policy, weights)


def test_an_adapter_without_a_head_is_refused(monkeypatch):
    cfg = flow_noise_config()
    assert make_adapter(cfg).noise_head is not None

    class Headless(XVLAAdapter):
        def __init__(self, policy, cfg):
            cfg.algorithm.variant = "flow_sde"
            super().__init__(policy, cfg)
            cfg.algorithm.variant = "flow_noise"
            del self.noise_head

    monkeypatch.setattr("lerobot_pirl.registry.policy_adapter", lambda policy_type: Headless)
    with pytest.raises(
        ValueError, match=r"algorithm\.variant='flow_noise' needs a noise head, which the adapter"
    ):
        make_adapter(cfg)
