"""The X-VLA adapter against LeRobot's own X-VLA, and acting and recomputing through it."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lerobot.policies.xvla.modeling_xvla import XVLAPolicy
from lerobot.utils.constants import IMAGENET_STATS, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor
from transformers import AutoTokenizer

from lerobot_pirl import flow
from lerobot_pirl.algorithm import PiRLAlgorithm
from lerobot_pirl.build import make_adapter
from lerobot_pirl.policies import xvla_processors
from lerobot_pirl.policies.base import chain_log_prob, sample_actions
from lerobot_pirl.policies.xvla import GRIPPER, POSITION, ROTATION, XVLAAdapter
from lerobot_pirl.policies.xvla_processors import PACKAGED_TOKENIZER, make_processors, resolve_tokenizer
from lerobot_pirl.weights import load_weights
from tests.toy import tiny_adapter, tiny_config, tiny_features

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = 12
IMAGE, WRIST = "observation.images.image", "observation.images.image2"


def adapter_with(policy: dict, **algorithm) -> XVLAAdapter:
    """Return a tiny adapter with some options of the policy's config replaced."""
    cfg = tiny_config(**algorithm)
    for name, value in policy.items():
        assert hasattr(cfg.policy, name)
        setattr(cfg.policy, name, value)
    torch.manual_seed(0)
    return XVLAAdapter(XVLAPolicy(cfg.policy), cfg)


@pytest.fixture(scope="module")
def adapter() -> XVLAAdapter:
    """An adapter whose gripper is drawn; tests must leave it as it is."""
    return tiny_adapter(gripper="bernoulli_last", last_step_std_position=0.005)


def features_for(adapter: XVLAAdapter, rows: int = ROWS) -> dict[str, Tensor]:
    return {
        name: value.to(adapter.dtype) if value.is_floating_point() else value
        for name, value in tiny_features(adapter, rows).items()
    }


def sample(adapter, features, seed=0, last_step_prob=0.5):
    rows = len(next(iter(features.values())))
    generators = [torch.Generator().manual_seed(1000 * seed + row) for row in range(rows)]
    return sample_actions(adapter, features, last_step_prob, generators)


@torch.no_grad()
def recompute(adapter, features, sample, rows=slice(None)) -> Tensor:
    selected = {name: value[rows] for name, value in features.items()}
    decisions = (sample.chain[rows], sample.step_index[rows], sample.gripper[rows])
    return chain_log_prob(adapter, selected, *decisions)[0]


def explored(adapter) -> int:
    """Elements of a joint log-prob: what is explored in the last step, and the gripper bits."""
    return int((adapter.noise_std[-1] > 0).sum()) + adapter.n_action_steps


# --- recomputing what was sampled -------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 5, 64])
def test_recomputed_log_prob_equals_the_rollouts_in_any_batch(adapter, micro_batch):
    features = features_for(adapter, 64)
    drawn = sample(adapter, features)
    assert set(drawn.step_index[:, 0].tolist()) == set(range(4))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    again = torch.cat([recompute(adapter, features, drawn, rows) for rows in order.split(micro_batch)])
    torch.testing.assert_close(again, drawn.log_prob[order], atol=1e-5 * explored(adapter), rtol=0)


@pytest.mark.parametrize("micro_batch", [1, 64])
def test_recomputed_log_prob_of_a_bfloat16_policy_stays_close(micro_batch):
    adapter = adapter_with({"dtype": "bfloat16"}, gripper="bernoulli_last", last_step_std_position=0.005)
    features = features_for(adapter, 64)
    drawn = sample(adapter, features)
    assert drawn.log_prob.dtype == drawn.chain.dtype == torch.float32
    parts = torch.arange(64).split(micro_batch)
    again = torch.cat([recompute(adapter, features, drawn, rows) for rows in parts])
    torch.testing.assert_close(again, drawn.log_prob, atol=1e-2, rtol=0)


def test_train_mode_would_break_the_ratio():
    adapter = tiny_adapter(last_step_std_position=0.005)
    features = features_for(adapter)
    drawn = sample(adapter, features)
    assert any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in adapter.policy.modules())
    adapter.policy.train()
    assert ((recompute(adapter, features, drawn) - drawn.log_prob).abs() > 0.1).any()


def test_rollout_and_recompute_read_one_noise_table():
    adapter = tiny_adapter()
    features = features_for(adapter)
    adapter.noise_std = adapter.noise_std * 3
    drawn = sample(adapter, features)
    torch.testing.assert_close(recompute(adapter, features, drawn), drawn.log_prob, atol=1e-3, rtol=0)
    adapter.noise_std = adapter.noise_std / 3
    assert ((recompute(adapter, features, drawn) - drawn.log_prob).abs() > 1).all()


def test_sampling_repeats_with_the_generator_and_leaves_the_global_one_alone(adapter):
    features = features_for(adapter)
    state = torch.get_rng_state()
    first, again, other = (sample(adapter, features, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("actions", "chain", "step_index", "gripper", "log_prob"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.actions, other.actions)


def test_log_prob_of_pose_and_gripper_equals_torchs_distributions(adapter):
    features = features_for(adapter)
    drawn = sample(adapter, features, last_step_prob=1.0)
    table, times = adapter.noise_std[-1], flow.time_grid(len(adapter.noise_std))
    with torch.no_grad():
        x0_pred = adapter.predict_x0(features, drawn.chain[:, 0], times[-2].expand(ROWS))
    mean = flow.sde_mean(drawn.chain[:, 0], x0_pred, times[-2], times[-1], table)
    mask = table > 0
    pose = torch.distributions.Normal(mean[:, mask], table[mask]).log_prob(drawn.chain[:, 1][:, mask]).sum(1)
    logits = x0_pred[:, : adapter.n_action_steps, GRIPPER] / adapter.gripper_temperature
    bits = torch.distributions.Bernoulli(logits=logits).log_prob(drawn.gripper.float()).sum(1)
    torch.testing.assert_close(drawn.log_prob[:, 0], pose + bits, atol=1e-3, rtol=1e-5)


# --- what is explored -------------------------------------------------------------------------------------


def test_noise_is_on_position_and_rotation_of_the_executed_rows_alone(adapter):
    options = adapter.run_config.algorithm
    table = adapter.noise_std
    assert table.shape == (4, 8, 20)
    expected = torch.zeros_like(table, dtype=torch.bool)
    expected[:, : options.n_action_steps, POSITION] = expected[:, : options.n_action_steps, ROTATION] = True
    assert torch.equal(table > 0, expected)
    assert (table[-1, : options.n_action_steps, POSITION] == 0.005).all()
    assert (table[-1, : options.n_action_steps, ROTATION] == options.last_step_std_rotation).all()
    early = flow.flow_sde_std(options.noise_level, 4)[:-1]
    assert torch.equal(table[:-1, 0, 0], early) and torch.equal(table[:-1, 3, 8], early)


def test_rotation_can_be_left_out_of_the_last_step_alone():
    quiet = tiny_adapter(last_step_std_rotation=0.0, last_step_prob=1.0)
    table = quiet.noise_std
    assert (table[-1, :, ROTATION] == 0).all() and (table[-1, :4, POSITION] > 0).all()
    assert (table[:-1, :4, ROTATION] > 0).all()
    features = features_for(quiet)
    drawn = sample(quiet, features, last_step_prob=1.0)
    times = flow.time_grid(len(table))
    with torch.no_grad():
        x0_pred = quiet.predict_x0(features, drawn.chain[:, 0], times[-2].expand(ROWS))
    torch.testing.assert_close(drawn.chain[:, 1, :, ROTATION], x0_pred[:, :, ROTATION])
    torch.testing.assert_close(recompute(quiet, features, drawn), drawn.log_prob, atol=1e-3, rtol=0)


def test_changes_where_nothing_is_explored_do_not_change_the_log_prob(adapter):
    features = features_for(adapter)
    drawn = sample(adapter, features)
    silent = (adapter.noise_std == 0)[drawn.step_index[:, 0]]
    drawn.chain[:, 1][silent] += 100.0
    torch.testing.assert_close(recompute(adapter, features, drawn), drawn.log_prob, atol=1e-3, rtol=0)
    drawn.chain[:, 1][~silent] += 0.1
    assert ((recompute(adapter, features, drawn) - drawn.log_prob).abs() > 0.1).all()


def test_second_arm_feeds_back_and_therefore_must_not_be_noised(adapter):
    """Changing its channels of x_t changes the prediction of the first arm."""
    features, x_t = features_for(adapter), torch.randn(ROWS, 8, 20)
    moved = x_t.clone()
    moved[..., 10:19] += 1.0
    t = torch.full((ROWS,), 0.5)
    with torch.no_grad():
        change = adapter.predict_x0(features, moved, t) - adapter.predict_x0(features, x_t, t)
    assert change[..., :9].abs().amax(dim=(1, 2)).min() > 1e-3


# --- gripper ----------------------------------------------------------------------------------------------


def test_log_prob_does_not_depend_on_the_grippers_channel_of_x_t(adapter):
    features = features_for(adapter)
    drawn = sample(adapter, features)
    before = recompute(adapter, features, drawn)
    drawn.chain[:, 0, :, [GRIPPER, 19]] += 100.0
    assert torch.equal(recompute(adapter, features, drawn), before)


def test_executed_command_is_the_stored_bit_and_the_chain_keeps_the_logit(adapter):
    features = features_for(adapter, 64)
    drawn = sample(adapter, features, last_step_prob=1.0)
    assert drawn.gripper.dtype == torch.uint8 and set(drawn.gripper.unique().tolist()) == {0, 1}
    assert torch.equal(drawn.actions[..., GRIPPER], drawn.gripper.float())
    commands = adapter.environment_actions(drawn.actions)[..., -1]
    assert torch.equal(commands, 2 * drawn.gripper.float() - 1)
    logits = drawn.chain[:, -1, :, GRIPPER]
    with torch.no_grad():
        x0_pred = adapter.predict_x0(features, drawn.chain[:, 0], torch.full((64,), 0.25))
    torch.testing.assert_close(logits, x0_pred[..., GRIPPER], atol=1e-5, rtol=1e-5)
    assert logits.min() < 0


def test_executing_does_not_write_into_its_argument(adapter):
    x_0 = torch.randn(3, 8, 20)
    kept = x_0.clone()
    actions = adapter.execute(x_0, torch.ones(3, 4, dtype=torch.bool))
    adapter.environment_actions(actions)
    assert torch.equal(x_0, kept)
    assert torch.equal(actions[..., :9], x_0[:, :4, :9])
    torch.testing.assert_close(adapter.execute(x_0, None)[..., GRIPPER], x_0[:, :4, GRIPPER].sigmoid())


def test_gripper_is_thresholded_unless_the_last_step_is_the_stochastic_one(adapter):
    rows = 200
    features = features_for(adapter, rows)
    drawn = sample(adapter, features)
    last = drawn.step_index[:, 0] == 3
    assert (drawn.gripper_flips[~last] == 0).all()
    assert (drawn.gripper_flips[last] > 0).any()
    drawn.gripper.copy_(1 - drawn.gripper)
    difference = (recompute(adapter, features, drawn) - drawn.log_prob).abs()
    assert (difference[~last] < 1e-3).all()
    assert (difference[last] > 1e-2).any()


def test_gripper_bits_have_the_bernoullis_frequency(adapter):
    rows = 400
    features = {
        name: value.expand(rows, *value.shape[1:]) for name, value in features_for(adapter, 1).items()
    }
    drawn = sample(adapter, features, last_step_prob=1.0)
    prob = torch.sigmoid(drawn.chain[:, -1, : adapter.n_action_steps, GRIPPER] / adapter.gripper_temperature)
    count, expected = drawn.gripper.sum(), prob.sum()
    assert abs(count - expected) < 4 * (prob * (1 - prob)).sum().sqrt()
    assert 0.05 < prob.mean() < 0.95


def test_excluded_gripper_is_never_drawn_and_adds_nothing():
    adapter = tiny_adapter(gripper="exclude")
    features = features_for(adapter, 64)
    drawn = sample(adapter, features, last_step_prob=1.0)
    assert (drawn.gripper_flips == 0).all()
    logits = drawn.chain[:, -1, : adapter.n_action_steps, GRIPPER]
    assert torch.equal(drawn.gripper.bool(), logits > 0)
    before = recompute(adapter, features, drawn)
    drawn.gripper.copy_(1 - drawn.gripper)
    assert torch.equal(recompute(adapter, features, drawn), before)


def test_a_policy_without_a_gripper_needs_no_more_than_the_interface():
    policy = SimpleNamespace(
        noise_std=torch.full((3, 4, 2), 0.1),
        n_action_steps=2,
        gripper_index=None,
        gripper_temperature=None,
        predict_x0=lambda features, x_t, t: torch.tanh(x_t + t[:, None, None] * features["state"][:, None]),
        execute=lambda x_0, gripper: x_0[:, :2],
    )
    features = {"state": torch.randn(ROWS, 2)}
    drawn = sample(policy, features)
    assert drawn.gripper.shape == (ROWS, 0)
    assert drawn.actions.shape == (ROWS, 2, 2)
    torch.testing.assert_close(recompute(policy, features, drawn), drawn.log_prob, atol=1e-4, rtol=0)


# --- against LeRobot's own X-VLA --------------------------------------------------------------------------


def observe(adapter, num_envs=2):
    """Return raw observations of tabletop and the batch the adapter makes of them."""
    (envs,) = adapter.run_config.env.create_envs(num_envs)["reach"].values()
    observation, _ = envs.reset(seed=0)
    tasks = list(envs.call("task_description"))
    return observation, tasks, adapter.prepare_observation(observation, tasks)


@pytest.fixture(scope="module")
def observed(adapter):
    return observe(adapter)


@torch.no_grad()
def test_encode_gives_the_transformer_what_the_stock_policy_gives_it(adapter, observed):
    seen = []
    transformer = adapter.model.transformer
    handle = transformer.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    try:
        adapter.policy.predict_action_chunk(observed[2])
    finally:
        handle.remove()
    features = adapter.encode(observed[2])
    assert features.keys() == {"vlm_features", "aux_visual_inputs", "empty_views", "proprio", "domain_id"}
    assert features["empty_views"].shape == (2, 0, 0)
    for name in ("vlm_features", "aux_visual_inputs", "domain_id"):
        assert torch.equal(features[name], seen[0][name]), name
    noise = torch.zeros_like(seen[0]["action_with_noise"])
    proprio, _ = adapter.model.action_space.preprocess(features["proprio"], noise)
    assert torch.equal(proprio, seen[0]["proprio"])


@torch.no_grad()
@pytest.mark.parametrize("num_empty", [1, 2])
def test_views_without_a_camera_are_not_kept_and_the_network_sees_them_all_the_same(num_empty):
    adapter = adapter_with({"num_image_views": 2 + num_empty})
    adapter.run_config = tiny_config()
    batch = observe(adapter)[2]
    features = adapter.encode(batch)
    inputs = adapter.policy._build_model_inputs(batch)
    stock = adapter.model.forward_vlm(inputs["input_ids"], inputs["image_input"], inputs["image_mask"])
    tokens = features["aux_visual_inputs"].shape[1]
    assert stock["aux_visual_inputs"].shape[1] == tokens * (1 + num_empty)
    assert features["empty_views"].shape == (2, tokens * num_empty, 0)
    x_t = torch.randn(2, 8, 20)
    t = torch.full((2,), 0.7)
    proprio, without_gripper = adapter.model.action_space.preprocess(features["proprio"], x_t)
    expected = adapter.model.transformer(
        domain_id=features["domain_id"], action_with_noise=without_gripper, proprio=proprio, t=t, **stock
    )
    assert torch.equal(adapter.predict_x0(features, x_t, t), expected)
    pooled = adapter.value_input(features)
    width = stock["aux_visual_inputs"].shape[2]
    torch.testing.assert_close(pooled[:, width : 2 * width], stock["aux_visual_inputs"].mean(dim=1))


@torch.no_grad()
def test_prediction_equals_the_stock_transformers_at_the_same_state_and_time(adapter):
    features, x_t, t = features_for(adapter), torch.randn(ROWS, 8, 20), torch.linspace(0.2, 1, ROWS)
    kept = x_t.clone()
    proprio, without_gripper = adapter.model.action_space.preprocess(features["proprio"], x_t)
    stock = adapter.model.transformer(
        domain_id=features["domain_id"],
        vlm_features=features["vlm_features"],
        aux_visual_inputs=features["aux_visual_inputs"],
        action_with_noise=without_gripper,
        proprio=proprio,
        t=t,
    )
    assert torch.equal(adapter.predict_x0(features, x_t, t), stock)
    assert torch.equal(x_t, kept)


@torch.no_grad()
def stock_actions(adapter, batch, steps: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return adapter.model.generate_actions(**adapter.policy._build_model_inputs(batch), steps=steps)


def initial_noise(batch_size: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(batch_size, 8, 20)


@torch.no_grad()
@pytest.mark.parametrize("steps", [2, 5])
def test_stock_sampling_loop_on_the_adapters_prediction_gives_the_stock_actions(adapter, observed, steps):
    features = adapter.encode(observed[2])
    x_1 = initial_noise(2, seed=4)
    action = torch.zeros_like(x_1)
    for i in range(steps, 0, -1):
        t = torch.full((2,), i / steps)
        x_t = x_1 * t[:, None, None] + action * (1 - t)[:, None, None]
        action = adapter.predict_x0(features, x_t, t)
    stock = stock_actions(adapter, observed[2], steps, seed=4)
    torch.testing.assert_close(adapter.execute(action, None), stock[:, :4], atol=1e-6, rtol=0)


@torch.no_grad()
def test_euler_steps_equal_the_stock_loop_with_two_steps_and_differ_with_more(adapter, observed):
    """The stock loop keeps the initial noise where Euler moves it; up to the second prediction both agree."""
    features = adapter.encode(observed[2])

    def gap(steps: int) -> Tensor:
        x_0 = flow.sample_ode(
            lambda x_t, t: adapter.predict_x0(features, x_t, t), initial_noise(2, seed=4), steps
        )
        stock = stock_actions(adapter, observed[2], steps, seed=4)
        return (adapter.execute(x_0, None) - stock[:, :4]).abs().max()

    assert gap(2) < 1e-6
    assert gap(5) > 1e-4


def test_bfloat16_policy_predicts_finer_than_bfloat16():
    """Steps of a quantum, 2 mm at half a metre, would make jumps of the ratio out of small updates."""
    adapter = adapter_with({"dtype": "bfloat16"})
    features = features_for(adapter)
    with torch.no_grad():
        x0_pred = adapter.predict_x0(features, torch.randn(ROWS, 8, 20), torch.ones(ROWS))
    exact = x0_pred == x0_pred.bfloat16().float()
    assert exact.float().mean() < 0.05


def test_bfloat16_policy_is_close_to_the_float32_policy_and_trains_in_float32():
    wide, narrow = adapter_with({"dtype": "float32"}), adapter_with({"dtype": "bfloat16"})
    assert {p.dtype for p in narrow.policy.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in narrow.model.vlm.parameters()} == {torch.bfloat16}
    x_t, t = torch.randn(ROWS, 8, 20), torch.linspace(0.2, 1, ROWS)
    with torch.no_grad():
        exact = wide.predict_x0(features_for(wide), x_t, t)
        rough = narrow.predict_x0(features_for(narrow), x_t, t)
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() < 0.03 * exact.norm()
    narrow.predict_x0(features_for(narrow), x_t, t).square().sum().backward()
    decoder = narrow.model.transformer.action_decoder.fc.weight.grad
    assert decoder[3].abs().sum() > 0 and decoder[:3].abs().sum() == 0


def test_bfloat16_policy_encodes_and_acts_on_an_observation():
    adapter = adapter_with({"dtype": "bfloat16"})
    adapter.run_config = tiny_config()
    features = adapter.encode(observe(adapter)[2])
    assert features["vlm_features"].dtype == torch.bfloat16
    drawn = sample(adapter, features)
    assert torch.isfinite(adapter.environment_actions(drawn.actions)).all()
    torch.testing.assert_close(recompute(adapter, features, drawn), drawn.log_prob, atol=1e-2, rtol=0)


def test_what_is_pushed_of_a_bfloat16_policy_acts_bit_for_bit_as_the_learners_own_weights():
    ours, theirs = adapter_with({"dtype": "bfloat16"}), adapter_with({"dtype": "bfloat16"})
    algorithm = PiRLAlgorithm(ours, tiny_config().algorithm, seed=1)
    trainable = algorithm.trainable_parameters()
    with torch.no_grad():
        for parameter in trainable.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    pushed = algorithm.get_weights()
    rounded = {name for name, value in pushed.items() if value.dtype == torch.bfloat16}
    blocks = {name for name in trainable if ".mlp." in name or ".attn." in name}
    assert len(blocks) > 4 and rounded == blocks | {
        f"model.transformer.{name}"
        for name in ("vlm_proj.weight", "vlm_proj.bias", "aux_visual_proj.weight", "aux_visual_proj.bias")
    }
    assert all(torch.equal(pushed[name], trainable[name]) for name in set(pushed) - rounded)
    features, x_t, t = features_for(ours), torch.randn(ROWS, 8, 20), torch.linspace(0.2, 1, ROWS)
    with torch.no_grad():
        wanted = ours.predict_x0(features, x_t, t)
        load_weights(theirs.policy, pushed)
        assert torch.equal(theirs.predict_x0(features, x_t, t), wanted)
        # of the others, none but the encoder's matrix could be rounded without a trace
        for name in set(pushed) - rounded - {"model.transformer.action_encoder.fc.weight"}:
            parameter = dict(theirs.policy.named_parameters())[name]
            parameter.copy_(parameter.bfloat16())
            assert not torch.equal(theirs.predict_x0(features, x_t, t), wanted), name
            parameter.copy_(pushed[name])


def test_what_is_pushed_of_a_float32_policy_is_as_it_is():
    algorithm = PiRLAlgorithm(adapter_with({"dtype": "float32"}), tiny_config().algorithm, seed=1)
    trainable = algorithm.trainable_parameters()
    assert all(
        value.data_ptr() == trainable[name].data_ptr() for name, value in algorithm.get_weights().items()
    )


# --- from the environment's observation to the network ----------------------------------------------------


def test_images_are_normalised_once_and_turned_as_libero_does(adapter, observed):
    observation, _, batch = observed
    mean, std = (torch.tensor(IMAGENET_STATS[name]).reshape(3, 1, 1) for name in ("mean", "std"))

    def normalised(pixels: np.ndarray) -> Tensor:
        return (torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2) / 255 - mean) / std

    pixels = observation["pixels"]
    torch.testing.assert_close(batch[IMAGE], normalised(pixels["image"][:, ::-1, ::-1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(batch[WRIST], normalised(pixels["image2"]), atol=1e-5, rtol=0)
    for name in (IMAGE, WRIST):  # the band of pixels in [0, 1] normalised once
        assert -2.2 < batch[name].min() < batch[name].max() < 2.7
        assert -2 < batch[name].mean() < 2 and 0.2 < batch[name].std() < 2


@torch.no_grad()
def test_encoder_sees_the_fixed_camera_first(adapter, observed, monkeypatch):
    seen = []
    original = adapter.model.forward_vlm
    monkeypatch.setattr(adapter.model, "forward_vlm", lambda *args: seen.append(args) or original(*args))
    adapter.encode(observed[2])
    input_ids, images, mask = seen[0]
    assert torch.equal(images[:, 0], observed[2][IMAGE])
    assert torch.equal(images[:, 1], observed[2][WRIST])
    assert mask.shape == (2, 2) and mask.all()
    assert torch.equal(input_ids, observed[2][OBS_LANGUAGE_TOKENS])


def test_domain_state_and_tokens_of_an_observation(adapter, observed):
    observation, tasks, batch = observed
    features = adapter.encode(batch)
    assert features["domain_id"].tolist() == [3, 3]
    eef = observation["robot_state"]["eef"]
    expected = np.zeros((2, 20), dtype=np.float32)
    expected[:, :3] = eef["pos"]
    expected[:, 3:6], expected[:, 6:9] = eef["mat"][:, :, 0], eef["mat"][:, :, 1]
    np.testing.assert_allclose(batch[OBS_STATE].numpy(), expected, atol=1e-6)
    assert torch.equal(features["proprio"], batch[OBS_STATE])
    tokenizer = AutoTokenizer.from_pretrained(resolve_tokenizer(PACKAGED_TOKENIZER))
    tokens = tokenizer(tasks, padding="max_length", truncation=True, max_length=24, return_tensors="pt")
    assert torch.equal(batch[OBS_LANGUAGE_TOKENS], tokens["input_ids"])
    assert (batch[OBS_LANGUAGE_TOKENS] != tokenizer.pad_token_id).sum() > 4


@torch.no_grad()
def test_features_change_with_task_image_and_state_and_rows_do_not_mix(adapter, observed):
    observation, tasks, batch = observed
    features = adapter.encode(batch)
    alone = adapter.encode(adapter.prepare_observation(pick(observation, [1]), tasks[1:]))
    for name, value in alone.items():
        torch.testing.assert_close(value, features[name][1:], atol=1e-5, rtol=0)
    other = adapter.encode(adapter.prepare_observation(observation, ["open the drawer"] * 2))
    assert not torch.allclose(other["vlm_features"], features["vlm_features"])
    assert not torch.allclose(features["vlm_features"][0], features["vlm_features"][1])


def pick(observation, rows: list[int]):
    if isinstance(observation, dict):
        return {name: pick(value, rows) for name, value in observation.items()}
    return observation[rows]


def rotation_matrix(axis_angle: np.ndarray) -> np.ndarray:
    angle = np.linalg.norm(axis_angle)
    x, y, z = axis_angle / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


def test_environment_actions_give_back_a_known_pose(adapter):
    rng = np.random.default_rng(0)
    poses = rng.uniform(-1.5, 1.5, (2, 4, 6))
    actions = torch.zeros(2, 4, 20)
    bits = torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0]])
    for row in np.ndindex(2, 4):
        matrix = rotation_matrix(poses[row][3:])
        pose = np.concatenate([poses[row][:3], matrix[:, 0], matrix[:, 1]])
        actions[row][:9] = torch.tensor(pose, dtype=torch.float32)
    actions[..., GRIPPER] = bits
    actions[..., 10:] = 7.0  # the second arm must not leak
    executed = adapter.environment_actions(actions)
    assert executed.shape == (2, 4, 7) and executed.dtype == torch.float32
    np.testing.assert_allclose(executed[..., :6].numpy(), poses, atol=1e-4)
    assert torch.equal(executed[..., 6], 2 * bits - 1)


# --- what trains ------------------------------------------------------------------------------------------


def test_encoder_is_frozen_and_the_policy_in_eval_mode(adapter):
    assert not any(p.requires_grad for p in adapter.model.vlm.parameters())
    assert all(p.requires_grad for p in adapter.model.transformer.parameters())
    assert not any(module.training for module in adapter.policy.modules())
    assert adapter.policy.config.freeze_vision_encoder


def test_encoder_is_frozen_whatever_the_policys_config_says():
    adapter = adapter_with({"freeze_vision_encoder": False, "freeze_language_encoder": False})
    assert not any(p.requires_grad for p in adapter.model.vlm.parameters())


def test_policy_config_carries_the_grid_and_the_executed_chunk():
    adapter = tiny_adapter(num_denoising_steps=3, n_action_steps=2)
    assert adapter.policy.config.num_denoising_steps == 3
    assert adapter.policy.config.n_action_steps == 2
    assert adapter.policy._queues["action"].maxlen == 2
    assert adapter.execute(torch.zeros(1, 8, 20), None).shape == (1, 2, 20)


@pytest.mark.parametrize("use_hetero_proj", [False, True])
def test_decay_spares_exactly_the_tables_with_a_row_per_domain(use_hetero_proj):
    adapter = adapter_with({"use_hetero_proj": use_hetero_proj})
    num_domains = adapter.policy.config.num_domains
    trainable = {name: p for name, p in adapter.policy.named_parameters() if p.requires_grad}
    tables = {name for name, p in trainable.items() if p.ndim == 2 and p.shape[0] == num_domains}
    assert adapter.no_decay() == tables
    assert len(tables) == (9 if use_hetero_proj else 5)


@pytest.mark.parametrize("num_image_views", [1, 2, 3])
def test_value_input_pools_all_views_and_appends_the_proprio(num_image_views):
    adapter = tiny_adapter()
    features = features_for(adapter)
    tokens = features["aux_visual_inputs"]
    features["aux_visual_inputs"] = tokens.repeat(1, num_image_views - 1, 1)
    features["empty_views"] = torch.empty(ROWS, 0, 0)
    pooled = adapter.value_input(features)
    assert pooled.shape == (ROWS, adapter.value_input_dim) and pooled.dtype == torch.float32
    auxiliary = tokens.mean(dim=1) if num_image_views > 1 else torch.zeros(ROWS, 128)
    expected = torch.cat([features["vlm_features"].mean(dim=1), auxiliary, features["proprio"]], dim=1)
    torch.testing.assert_close(pooled, expected)


def test_critic_cannot_reach_the_policy_through_its_input():
    adapter = tiny_adapter()
    features = features_for(adapter)
    features["vlm_features"].requires_grad_()
    assert not adapter.value_input(features).requires_grad


def test_gradient_reaches_every_trainable_parameter_and_domain_three_alone(adapter):
    features = features_for(adapter)
    drawn = sample(adapter, features)
    log_prob, _ = chain_log_prob(adapter, features, drawn.chain, drawn.step_index, drawn.gripper)
    log_prob.sum().backward()
    try:
        trainable = {name: p for name, p in adapter.policy.named_parameters() if p.requires_grad}
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trainable.values())
        for name in adapter.no_decay():
            assert trainable[name].grad[:3].abs().sum() == 0
            assert trainable[name].grad[3].abs().sum() > 0
        assert all(p.grad is None for p in adapter.model.vlm.parameters())
    finally:
        adapter.policy.zero_grad(set_to_none=True)


# --- configs that are refused -----------------------------------------------------------------------------


def test_the_tiny_config_is_valid():
    XVLAAdapter.validate(tiny_config())


@pytest.mark.parametrize(
    ("part", "changes", "match"),
    [
        ("policy", {"action_mode": "joint"}, r"policy.action_mode='joint' is not supported.*'ee6d'"),
        ("policy", {"use_peft": True}, r"policy.use_peft=True is not supported; merge"),
        (
            "policy",
            {"use_proprio": False},
            r"policy.use_proprio=False and policy.max_state_dim=.* set policy.use_pro",
        ),
        ("policy", {"max_state_dim": 19}, r"policy.max_state_dim=19 leave no room for the 20 numbers"),
        (
            "policy",
            {"num_image_views": 65},
            "policy.num_image_views=65 is not allowed; it must be at most 64",
        ),
        ("policy", {"use_amp": True}, r"policy.use_amp=True is not supported; set policy.dtype"),
        ("env", {"obs_type": "pixels"}, r"env.obs_type=.pixels. lacks the robot state.*.pixels_agent_pos."),
        ("env", {"control_mode": "relative"}, r"env.control_mode='relative'.*to 'absolute'"),
        ("algorithm", {"n_action_steps": 9}, r"n_action_steps=9 exceeds policy.chunk_size=8; lower"),
        ("policy", {"num_domains": 3}, r"policy.num_domains=3 .* use 4 or more"),
        # what would take an hour, or all memory, to find out about
        ("policy", {"chunk_size": 129}, "policy.chunk_size=129 is not allowed; it must be at most 128"),
        (
            "policy",
            {"tokenizer_max_length": 10**9},
            "policy.tokenizer_max_length=1000000000 is not .* at most 128",
        ),
        (
            "policy",
            {"max_len_seq": 65537},
            "policy.max_len_seq=65537 is not allowed; it must be at most 65536",
        ),
        ("policy", {"empty_cameras": 65}, "policy.empty_cameras=65 is not allowed; it must be at most 64"),
        (
            "policy",
            {"resize_imgs_with_padding": (64, 4097)},
            r"policy.resize_imgs_with_padding=\(64, 4097\) is not",
        ),
        (
            "policy",
            {"depth": 10**9},
            r"policy.depth=1000000000, .* take about .* GiB, more than the .* GiB of this",
        ),
        ("policy", {"hidden_size": 10**7}, r"policy.hidden_size=10000000, .* GiB, more than the"),
        ("policy", {"mlp_ratio": 1e12}, r"policy.mlp_ratio=1000000000000.0, .* GiB, more than the"),
        (
            "policy",
            {"mlp_ratio": float("nan")},
            r"policy.mlp_ratio=nan, .* take about nan GiB, more than the",
        ),
        ("policy", {"num_domains": 10**9}, r"policy.num_domains=1000000000 .* GiB, more than the"),
        (
            "policy",
            {"len_soft_prompts": 10**9},
            r"policy.len_soft_prompts=1000000000 take about .* GiB, more than the",
        ),
    ],
)
def test_a_config_x_vla_cannot_run_is_refused(part, changes, match):
    cfg = tiny_config()
    for name, value in changes.items():
        setattr(getattr(cfg, part), name, value)
    with pytest.raises(ValueError, match=match):
        XVLAAdapter.validate(cfg)


# --- processors -------------------------------------------------------------------------------------------


def test_only_the_packaged_tokenizers_name_is_resolved():
    assert resolve_tokenizer("facebook/bart-large") == "facebook/bart-large"
    assert AutoTokenizer.from_pretrained(resolve_tokenizer(PACKAGED_TOKENIZER)).vocab_size <= 600


def test_building_processors_leaves_the_policys_config_as_it_is():
    cfg = tiny_config()
    make_processors(cfg.policy, cfg.env)
    assert cfg.policy.tokenizer_name == PACKAGED_TOKENIZER


PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"


@pytest.fixture
def saved(adapter, tmp_path):
    """A pretrained_model folder and the policy config that points to it."""
    adapter.policy.save_pretrained(tmp_path)
    adapter.processors.policy_pre.save_pretrained(tmp_path)
    adapter.processors.policy_post.save_pretrained(tmp_path)
    cfg = tiny_config()
    cfg.policy.pretrained_path = tmp_path
    return cfg, tmp_path


def edit_steps(file, change) -> None:
    pipeline = json.loads(file.read_text())
    pipeline["steps"] = change(pipeline["steps"])
    file.write_text(json.dumps(pipeline))


def step(name: str, **config) -> dict:
    return {"registry_name": name, "config": config}


def test_saved_processors_do_what_the_built_ones_do(adapter, observed, saved):
    cfg, _ = saved
    loaded = make_processors(cfg.policy, cfg.env)
    observation, tasks, batch = observed
    twin = SimpleNamespace(processors=loaded)
    again = XVLAAdapter.prepare_observation(twin, observation, tasks)
    for name in (IMAGE, WRIST, OBS_STATE, OBS_LANGUAGE_TOKENS, "domain_id"):
        assert torch.equal(again[name], batch[name]), name
    actions = torch.randn(2, 4, 20)
    executed = XVLAAdapter.environment_actions(twin, actions)
    assert torch.equal(executed, adapter.environment_actions(actions))


def test_processors_come_from_the_same_revision_as_the_weights(saved, monkeypatch):
    cfg, folder = saved
    cfg.policy.pretrained_revision = "v1.2"
    asked = {}
    original = xvla_processors.make_pre_post_processors
    monkeypatch.setattr(
        xvla_processors,
        "make_pre_post_processors",
        lambda *args, **kwargs: asked.update(kwargs) or original(*args, **kwargs),
    )
    make_processors(cfg.policy, cfg.env)
    assert asked["pretrained_revision"] == "v1.2"
    assert asked["pretrained_path"] == str(folder)


def set_tokenizer(folder: Path, **options) -> None:
    """Change options of the tokenizer in a saved pipeline."""

    def changed(steps):
        for entry in steps:
            if entry["registry_name"] == "tokenizer_processor":
                entry["config"] |= options
        return steps

    edit_steps(folder / PRE, changed)


def test_saved_processors_find_the_packaged_tokenizer_wherever_they_were_saved(saved):
    cfg, folder = saved
    set_tokenizer(folder, tokenizer_name="/somewhere/else/tokenizer")
    make_processors(cfg.policy, cfg.env)


@pytest.mark.parametrize(
    ("file", "extra", "match"),
    [
        (PRE, step("xvla_imagenet_normalize", image_keys=None), "xvla_imagenet_normalize.* 2 times"),
        (PRE, step("xvla_image_scale", image_keys=None), "xvla_image_scale.* 1 times.* must not occur"),
        (PRE, step("xvla_image_to_float"), "xvla_image_to_float.* 1 times.* must not occur"),
        (POST, step("xvla_rotation_6d_to_axis_angle"), "xvla_rotation_6d_to_axis_angle.* 2 times"),
        (PRE, step("xvla_add_domain_id", domain_id=0), "send domain_id 0 to X-VLA, but LIBERO is domain 3"),
    ],
)
def test_saved_processors_with_a_step_too_many_are_refused(saved, file, extra, match):
    cfg, folder = saved
    edit_steps(folder / file, lambda steps: [*steps, extra])
    with pytest.raises(ValueError, match=match) as refusal:
        make_processors(cfg.policy, cfg.env)
    assert str(folder) in str(refusal.value)


def test_a_saved_tokenizer_that_pads_to_the_longest_sentence_of_a_batch_is_refused(saved):
    cfg, folder = saved
    set_tokenizer(folder, padding="longest")
    with pytest.raises(
        ValueError, match="pads to 'longest', so that what runs beside an episode would change it"
    ):
        make_processors(cfg.policy, cfg.env)


def test_saved_processors_that_leave_the_domain_to_the_environment_are_refused(saved):
    """The environment's pipeline inserts domain 0."""
    cfg, folder = saved
    edit_steps(folder / PRE, lambda steps: [s for s in steps if s["registry_name"] != "xvla_add_domain_id"])
    with pytest.raises(ValueError, match="send domain_id 0"):
        make_processors(cfg.policy, cfg.env)


@pytest.mark.parametrize("tokenizer_name", [PACKAGED_TOKENIZER, "facebook/bart-large"])
def test_saved_processors_without_a_tokenizer_are_refused(saved, tokenizer_name):
    cfg, folder = saved
    cfg.policy.tokenizer_name = tokenizer_name
    edit_steps(folder / PRE, lambda steps: [s for s in steps if s["registry_name"] != "tokenizer_processor"])
    with pytest.raises(ValueError, match="tokenizer_processor") as refusal:
        make_processors(cfg.policy, cfg.env)
    assert str(folder) in str(refusal.value)


@pytest.mark.parametrize(
    ("where", "step_name", "match"),
    [
        ("pre", "xvla_imagenet_normalize", "xvla_imagenet_normalize.* 0 times.* exactly once"),
        ("post", "xvla_rotation_6d_to_axis_angle", "xvla_rotation_6d_to_axis_angle.* 0 times.* exactly once"),
    ],
)
def test_an_environment_pipeline_without_a_needed_step_is_refused(monkeypatch, where, step_name, match):
    original = xvla_processors.make_env_pre_post_processors

    def stripped(env_cfg, policy_cfg):
        pipelines = dict(zip(("pre", "post"), original(env_cfg, policy_cfg), strict=True))
        steps = pipelines[where].steps
        pipelines[where].steps = [s for s in steps if getattr(s, "_registry_name", None) != step_name]
        assert len(pipelines[where].steps) == len(steps) - 1
        return pipelines["pre"], pipelines["post"]

    monkeypatch.setattr(xvla_processors, "make_env_pre_post_processors", stripped)
    cfg = tiny_config()
    with pytest.raises(ValueError, match=match):
        make_processors(cfg.policy, cfg.env)


# --- weights ----------------------------------------------------------------------------------------------


def test_saved_policy_loads_into_an_equal_adapter(adapter, saved):
    cfg, _ = saved
    loaded = make_adapter(cfg)
    before, after = adapter.policy.state_dict(), loaded.policy.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_stock_x_vla_loads_the_saved_policy_and_acts_alike(adapter, observed, saved):
    stock = XVLAPolicy.from_pretrained(saved[1])
    assert stock.config.num_denoising_steps == 4
    assert stock.config.n_action_steps == 4
    actions = []
    for policy in (stock, adapter.policy):
        torch.manual_seed(6)
        actions.append(policy.predict_action_chunk(dict(observed[2])))
    assert torch.equal(actions[0], actions[1])


def test_weights_of_another_shape_are_refused(saved):
    cfg, _ = saved
    cfg.policy.hidden_size = 32
    with pytest.raises(ValueError, match=r"do not fit the options under `policy`.*size mismatch"):
        make_adapter(cfg)


def test_a_refused_push_copies_nothing():
    adapter = tiny_adapter()
    before = {name: value.clone() for name, value in adapter.policy.state_dict().items()}
    weights = {name: p.detach() + 1 for name, p in adapter.policy.named_parameters() if p.requires_grad}
    last = list(weights)[-1]
    weights[last] = weights[last][:-1]
    with pytest.raises(ValueError, match=f"{last}.* has shape"):
        load_weights(adapter.policy, weights)
    after = adapter.policy.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
