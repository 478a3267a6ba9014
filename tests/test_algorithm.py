"""The update: ratio, gradients, what trains and what must not."""

import math

import pytest
import torch
from lerobot.optim.schedulers import CosineAnnealingWithWarmupSchedulerConfig

from lerobot_pirl.algorithm import PiRLAlgorithm
from lerobot_pirl.options import VALUE_OPTIONS, PiRLConfig
from lerobot_pirl.policies.base import chain_log_prob, sample_actions
from lerobot_pirl.policies.xvla import XVLAAdapter
from lerobot_pirl.rollout import Rollout
from lerobot_pirl.weights import load_weights
from tests.toy import tiny_adapter, tiny_features

pytestmark = pytest.mark.filterwarnings("ignore")


def make_rollout(
    adapter: XVLAAdapter, lengths=(3, 2, 4), seed=0, last_step_prob=0.5, noise_scale=1.0
) -> Rollout:
    """Rows with features of random observations; the first episode succeeds, the others run out of time."""
    rows = sum(lengths)
    generators = [torch.Generator().manual_seed(1000 * seed + row) for row in range(rows)]
    features = tiny_features(adapter, rows, seed=seed)
    sample = sample_actions(adapter, features, last_step_prob, generators, noise_scale)
    ends = torch.tensor(lengths).cumsum(0) - 1
    rewards = torch.zeros(rows)
    rewards[ends[0]] = 1.0
    terminated = rewards > 0
    return Rollout(
        policy_version=0,
        features=features,
        final_features=tiny_features(adapter, len(lengths) - 1, seed=seed + 1),
        chain=sample.chain,
        step_index=sample.step_index,
        gripper=sample.gripper,
        log_prob=sample.log_prob,
        rewards=rewards,
        terminated=terminated,
        episode_lengths=torch.tensor(lengths),
        task_id=torch.zeros(len(lengths), dtype=torch.int64),
        init_state_id=torch.arange(len(lengths)),
        success=torch.tensor([True] + [False] * (len(lengths) - 1)),
        env_steps=torch.tensor(lengths) * 4,
    )


def make_algorithm(**options) -> PiRLAlgorithm:
    options = {"critic_warmup_iterations": 0, "minibatch_size": 4, "micro_batch_size": 2} | options
    options = {"n_epochs": 1, "learning_rate": 1e-4, "target_kl": None, "value_hidden_dims": (16,)} | options
    adapter = tiny_adapter(**options)
    torch.manual_seed(0)
    return PiRLAlgorithm(adapter, adapter.run_config.algorithm, seed=1)


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], module: torch.nn.Module) -> set[str]:
    after = module.state_dict()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_first_minibatch_has_ratio_one_although_the_network_has_dropout():
    algorithm = make_algorithm(n_epochs=2)
    assert any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in algorithm.policy.modules())
    stats = algorithm.update(iter([make_rollout(algorithm.adapter)])).to_log_dict()
    assert stats["ratio_max_dev_first"] < 1e-4
    assert stats["approx_kl"] > 0


def test_train_mode_would_break_the_ratio():
    algorithm = make_algorithm()
    rollout = make_rollout(algorithm.adapter)
    algorithm.policy.train()
    stats = algorithm.update(iter([rollout])).to_log_dict()
    assert stats["ratio_max_dev_first"] > 1e-2


def test_zero_learning_rates_leave_every_weight_bit_identical():
    algorithm = make_algorithm(learning_rate=0.0, value_learning_rate=0.0)
    policy, value = snapshot(algorithm.policy), snapshot(algorithm.value_head)
    stats = algorithm.update(iter([make_rollout(algorithm.adapter)])).to_log_dict()
    assert not changed(policy, algorithm.policy)
    assert not changed(value, algorithm.value_head)
    assert stats["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert stats["clip_fraction"] == 0


def test_encoder_never_changes_and_has_no_gradient():
    algorithm = make_algorithm()
    before = snapshot(algorithm.policy.model.vlm)
    for _ in range(2):
        algorithm.update(iter([make_rollout(algorithm.adapter)]))
    assert not changed(before, algorithm.policy.model.vlm)
    assert all(p.grad is None for p in algorithm.policy.model.vlm.parameters())
    assert not algorithm.policy.training


def test_critic_warmup_changes_the_value_head_alone():
    algorithm = make_algorithm(critic_warmup_iterations=1)
    policy, value = snapshot(algorithm.policy), snapshot(algorithm.value_head)
    algorithm.update(iter([make_rollout(algorithm.adapter)]))
    assert not changed(policy, algorithm.policy)
    assert changed(value, algorithm.value_head)
    algorithm.update(iter([make_rollout(algorithm.adapter)]))
    assert changed(policy, algorithm.policy)


def test_other_domains_rows_stay():
    algorithm = make_algorithm(learning_rate=1e-2, weight_decay=0.1)
    tables = ("soft_prompt_hub.weight", "action_encoder.fc.weight", "action_decoder.fc.weight")
    before = {t: algorithm.policy.model.transformer.get_parameter(t).detach().clone() for t in tables}
    algorithm.update(iter([make_rollout(algorithm.adapter)]))
    for table in tables:
        after = algorithm.policy.model.transformer.get_parameter(table)
        assert torch.equal(before[table][:3], after[:3])
        assert not torch.equal(before[table][3], after[3])


def test_every_trainable_parameter_is_in_exactly_one_group():
    algorithm = make_algorithm()
    grouped = [id(p) for group in algorithm.optimizer.param_groups for p in group["params"]]
    expected = [*algorithm.trainable_parameters().values(), *algorithm.value_head.parameters()]
    assert sorted(grouped) == sorted(id(p) for p in expected)
    assert [g["lr"] for g in algorithm.optimizer.param_groups] == [1e-4, 1e-4, 1e-3]


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
def test_gradient_accumulation_equals_the_whole_minibatch(micro_batch_size):
    # wide noise keeps the gradient, and with it float32's rounding, of size 1
    wide = {"last_step_std_position": 1.0, "last_step_std_rotation": 1.0, "noise_level": 1.0}
    gradients = []
    for size in (micro_batch_size, 9):
        algorithm = make_algorithm(minibatch_size=9, micro_batch_size=size, grad_clip_norm=1e6, **wide)
        algorithm.optimizer.step = lambda: None
        algorithm.update(iter([make_rollout(algorithm.adapter)]))
        gradients.append(torch.cat([p.grad.flatten() for p in algorithm.trainable_parameters().values()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


def test_minibatches_cover_every_row_once_per_epoch_in_a_new_order():
    algorithm = make_algorithm(n_epochs=2, minibatch_size=4)
    seen = []
    original = algorithm._minibatch
    algorithm._minibatch = lambda f, d, rows, *rest: seen.append(rows) or original(f, d, rows, *rest)
    for _ in range(2):
        algorithm.update(iter([make_rollout(algorithm.adapter)]))
    orders = [torch.cat(seen[i : i + 3]).tolist() for i in range(0, 12, 3)]
    assert all(sorted(order) == list(range(9)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_target_kl_stops_before_the_next_minibatch():
    algorithm = make_algorithm(n_epochs=5, learning_rate=1e-1, target_kl=1e-4)
    stats = algorithm.update(iter([make_rollout(algorithm.adapter)])).to_log_dict()
    assert stats["kl_stop"] == 1.0
    assert stats["minibatches"] == 2


def test_dual_clip_is_wired():
    losses = []
    for dual_clip in (1.01, None):
        algorithm = make_algorithm(dual_clip=dual_clip, minibatch_size=9, normalize_advantage=False)
        rollout = make_rollout(algorithm.adapter)
        rollout.rewards -= 1.0
        rollout.log_prob -= 1.0
        losses.append(algorithm.update(iter([rollout])).losses["policy_loss"])
    assert losses[0] < losses[1]


def test_a_number_that_is_not_finite_skips_the_step():
    algorithm = make_algorithm(minibatch_size=9)
    rollout = make_rollout(algorithm.adapter)
    rollout.log_prob[0] = math.nan
    policy, value = snapshot(algorithm.policy), snapshot(algorithm.value_head)
    stats = algorithm.update(iter([rollout])).to_log_dict()
    assert stats["skipped_steps"] == 1
    assert not changed(policy, algorithm.policy)
    assert not changed(value, algorithm.value_head)


def test_same_seed_same_numbers_other_seed_other_numbers():
    results = []
    for seed in (1, 1, 2):
        algorithm = make_algorithm()
        algorithm.seed = seed
        rollout = make_rollout(algorithm.adapter)
        results.append([algorithm.update(iter([rollout])).to_log_dict() for _ in range(2)])
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_update_follows_the_advantage():
    """One step makes what was rewarded likelier and what was not less likely: catches a flipped sign."""
    algorithm = make_algorithm(
        minibatch_size=64, micro_batch_size=64, learning_rate=1e-5, step_loss_weight="none", gamma=0.0
    )
    rollout = make_rollout(algorithm.adapter, lengths=(1,) * 16)
    good = torch.arange(16) % 2 == 0
    rollout.rewards, rollout.terminated = good.float(), torch.ones(16, dtype=torch.bool)
    rollout.final_features = {name: value[:0] for name, value in rollout.final_features.items()}
    algorithm.update(iter([rollout]))
    with torch.no_grad():
        log_prob, _ = chain_log_prob(
            algorithm.adapter, rollout.features, rollout.chain, rollout.step_index, rollout.gripper
        )
    gain = log_prob - rollout.log_prob
    assert gain[good].mean() > 0 > gain[~good].mean()


def test_weights_round_trip_and_misfits_are_refused():
    source, target = make_algorithm(), make_algorithm()
    source.update(iter([make_rollout(source.adapter)]))
    weights = source.get_weights()
    target.load_weights(weights)
    assert not changed(snapshot(source.policy), target.policy)
    first = next(iter(weights))
    with pytest.raises(ValueError, match="differ in 1 parameters"):
        load_weights(target.policy, {k: v for k, v in weights.items() if k != first})
    with pytest.raises(ValueError, match="has shape"):
        load_weights(target.policy, weights | {first: torch.zeros(1)})


# schedules


def test_a_schedule_sets_the_learning_rates_of_every_update():
    adapter = tiny_adapter(
        critic_warmup_iterations=0, minibatch_size=16, micro_batch_size=16, value_hidden_dims=(8,)
    )
    config = adapter.run_config.algorithm
    schedule = CosineAnnealingWithWarmupSchedulerConfig(num_warmup_steps=2)
    algorithm = PiRLAlgorithm(adapter, config, seed=1, schedule=schedule, steps=6)
    rates = []
    for _ in range(4):
        stats = algorithm.update(iter([make_rollout(adapter)])).to_log_dict()
        rates.append(stats["learning_rate"] / config.learning_rate)
    assert rates == pytest.approx([0, 0.5, 1, 0.5 * (1 + math.cos(math.pi / 4))])
    shares = [group["lr"] / group["initial_lr"] for group in algorithm.optimizer.param_groups]
    assert shares == pytest.approx([0.5] * 3)


def test_without_a_schedule_the_learning_rate_stays():
    algorithm = make_algorithm()
    for _ in range(2):
        stats = algorithm.update(iter([make_rollout(algorithm.adapter)])).to_log_dict()
        assert stats["learning_rate"] == algorithm.config.learning_rate


def test_annealed_noise_shrinks_linearly_and_then_stays():
    config = make_algorithm(noise_anneal_iterations=4, noise_anneal_to=0.2).config
    assert [config.noise_scale(version) for version in (0, 1, 2, 4, 9)] == pytest.approx(
        [1, 0.8, 0.6, 0.2, 0.2]
    )
    assert make_algorithm().config.noise_scale(1000) == 1


def test_the_update_uses_the_noise_of_the_version_that_acted():
    algorithm = make_algorithm(noise_anneal_iterations=4, noise_anneal_to=0.5)
    scale = algorithm.config.noise_scale(2)
    rollout = make_rollout(algorithm.adapter, noise_scale=scale)
    rollout.policy_version = 2
    stats = algorithm.update(iter([rollout])).to_log_dict()
    assert stats["noise_scale"] == scale == 0.75
    assert stats["ratio_max_dev_first"] < 1e-4
    rollout.policy_version = 0
    assert algorithm.update(iter([rollout])).to_log_dict()["ratio_max_dev_first"] > 0.1


# groups in place of a value function


def make_group_algorithm(**options) -> PiRLAlgorithm:
    # a config for groups names no option of the value function
    options = {name: getattr(PiRLConfig(), name) for name in VALUE_OPTIONS} | options
    options = {"advantage": "grpo", "group_size": 3, "episodes_per_iteration": 6} | options
    options = {
        "minibatch_size": 64,
        "micro_batch_size": 64,
        "target_kl": None,
        "learning_rate": 1e-4,
    } | options
    adapter = tiny_adapter(**options)
    return PiRLAlgorithm(adapter, adapter.run_config.algorithm, seed=1)


def make_groups(adapter: XVLAAdapter, successes: tuple[int, int]) -> Rollout:
    """Two groups of three episodes of one chunk, of which so many succeed."""
    rollout = make_rollout(adapter, lengths=(1,) * 6)
    success = torch.tensor([i < count for count in successes for i in range(3)])
    rollout.rewards, rollout.success, rollout.terminated = success.float(), success, success.clone()
    rollout.final_features = {
        n: v[: int((~success).sum())] for n, v in tiny_features(adapter, 6, seed=9).items()
    }
    rollout.task_id, rollout.init_state_id = (
        torch.zeros(6, dtype=torch.int64),
        torch.tensor([0, 0, 0, 1, 1, 1]),
    )
    rollout.check()
    return rollout


def log_probs(algorithm: PiRLAlgorithm, rollout: Rollout) -> torch.Tensor:
    with torch.no_grad():
        found, _ = chain_log_prob(
            algorithm.adapter, rollout.features, rollout.chain, rollout.step_index, rollout.gripper
        )
    return found


def test_groups_make_what_won_likelier_and_what_lost_less_likely():
    algorithm = make_group_algorithm(n_epochs=3)
    rollout = make_groups(algorithm.adapter, (1, 2))
    before = log_probs(algorithm, rollout)
    stats = algorithm.update(iter([rollout])).to_log_dict()
    change = log_probs(algorithm, rollout) - before
    weight = algorithm.step_weights[rollout.step_index[:, 0]]
    won = rollout.success
    assert (change * weight)[won].mean() > 0 > (change * weight)[~won].mean()
    assert stats["groups_kept"] == 1
    assert stats["ratio_max_dev_first"] < 1e-4
    assert not {"value_loss", "explained_variance", "value_grad_norm"} & set(stats)


def test_groups_need_no_value_head():
    algorithm = make_group_algorithm()
    assert algorithm.value_head is None
    assert algorithm.state_dict() == {}
    assert len(algorithm.optimizer.param_groups) == 2
    algorithm.load_state_dict({})


def test_the_filter_leaves_groups_outside_its_range_alone():
    rollouts = [make_groups(make_group_algorithm().adapter, successes) for successes in ((1, 3), (1, 2))]
    after = []
    for rollout in rollouts:
        algorithm = make_group_algorithm(group_filter=(0.1, 0.5))
        stats = algorithm.update(iter([rollout])).to_log_dict()
        assert stats["groups_kept"] == 0.5
        after.append(snapshot(algorithm.policy))
    # what the second group did makes no difference
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])


def test_without_a_group_to_learn_from_nothing_changes_but_the_version():
    algorithm = make_group_algorithm(group_filter=(0.1, 0.9))
    before = snapshot(algorithm.policy)
    stats = algorithm.update(iter([make_groups(algorithm.adapter, (0, 3))])).to_log_dict()
    assert not changed(before, algorithm.policy)
    assert (stats["groups_kept"], stats["minibatches"], algorithm.optimization_step) == (0, 0, 1)


@pytest.mark.parametrize("aggregation", ["token", "episode"])
def test_weights_of_the_groups_that_are_kept_have_mean_one(aggregation, monkeypatch):
    algorithm = make_group_algorithm(n_epochs=1, group_filter=(0.1, 0.9), loss_aggregation=aggregation)
    rollout = make_rollout(algorithm.adapter, lengths=(1, 2, 3, 4, 4, 4))
    rollout.task_id, rollout.init_state_id = (
        torch.zeros(6, dtype=torch.int64),
        torch.tensor([0, 0, 0, 1, 1, 1]),
    )
    seen = []
    take = algorithm._take
    monkeypatch.setattr(
        algorithm, "_take", lambda tensors, rows: seen.append(take(tensors, rows)) or seen[-1]
    )
    algorithm.update(iter([rollout]))
    weights = torch.cat([data["weights"] for data in seen if "weights" in data])
    assert len(weights) == 6
    assert float(weights.mean()) == pytest.approx(1)


def test_episodes_without_groups_are_refused():
    algorithm = make_group_algorithm()
    rollout = make_groups(algorithm.adapter, (1, 2))
    rollout.init_state_id[1] = 7
    with pytest.raises(ValueError, match="groups of 3"):
        algorithm.update(iter([rollout]))
