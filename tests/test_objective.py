"""The update with learned noise, its entropy and the KL to the starting policy."""

import dataclasses

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from lerobot_pirl import ppo
from lerobot_pirl.algorithm import PiRLAlgorithm
from lerobot_pirl.objective import policy_objective
from lerobot_pirl.policies.base import chain_log_prob
from lerobot_pirl.rollout import Rollout
from lerobot_pirl.weights import load_weights, replaced
from tests.test_algorithm import (
    changed,
    make_algorithm,
    make_group_algorithm,
    make_groups,
    make_rollout,
    snapshot,
)

pytestmark = pytest.mark.filterwarnings("ignore")

# of a decision's log-ratio: float32's rounding of a step's mean, seen through a std of millimetres, per explored number
TOLERANCE = 1e-5 * 3 * 4 * 9
NOISE = {"variant": "flow_noise", "num_denoising_steps": 3}
VARIANTS = pytest.mark.parametrize("options", [{}, NOISE], ids=["flow_sde", "flow_noise"])


def distributions(algorithm: PiRLAlgorithm, rollout: Rollout):
    with torch.no_grad():
        stored = (rollout.chain, rollout.step_index, rollout.gripper)
        return chain_log_prob(algorithm.adapter, rollout.features, *stored)


def move(algorithm: PiRLAlgorithm, size: float = 1e-3) -> None:
    """Let the weights be others, as an update does."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in algorithm.trainable_parameters().values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def objective(algorithm: PiRLAlgorithm, rollout: Rollout, advantage: float = 0.0, **changes):
    data = {
        "chain": rollout.chain,
        "step_index": rollout.step_index,
        "gripper": rollout.gripper,
        "old_log_prob": rollout.log_prob,
        "weights": torch.ones(len(rollout)),
        "advantages": torch.full((len(rollout),), advantage),
    }
    if algorithm.start:
        data |= algorithm._start_distributions(rollout.features, data, 1.0)
    config = dataclasses.replace(algorithm.config, **changes)
    return policy_objective(
        algorithm.adapter, config, algorithm.step_weights, rollout.features, data, noise_scale=1.0
    )


# learned noise


@pytest.mark.parametrize("gripper", ["exclude", "bernoulli_last"])
def test_first_minibatch_has_ratio_one_with_learned_noise(gripper):
    algorithm = make_algorithm(**NOISE, gripper=gripper, n_epochs=2)
    stats = algorithm.update(iter([make_rollout(algorithm.adapter)])).to_log_dict()
    assert stats["ratio_max_dev_first"] < TOLERANCE
    assert stats["approx_kl"] > 0


def test_train_mode_would_break_the_ratio_of_learned_noise():
    algorithm = make_algorithm(**NOISE)
    rollout = make_rollout(algorithm.adapter)
    algorithm.policy.train()
    assert algorithm.update(iter([rollout])).to_log_dict()["ratio_max_dev_first"] > 1e-2


def test_the_ratio_is_the_product_of_its_steps_and_each_step_has_its_own_divergence():
    algorithm = make_algorithm(**NOISE)
    rollout = make_rollout(algorithm.adapter)
    move(algorithm, 1e-5)
    steps = distributions(algorithm, rollout)[0] - rollout.log_prob
    ratio = steps.exp().prod(dim=1)
    _, sums, samples = objective(algorithm, rollout, advantage=1.0)
    torch.testing.assert_close(samples["ratio"], ratio, rtol=1e-3, atol=1e-4)
    assert float(sums["policy_loss"]) == pytest.approx(-float(ratio.clamp(max=1.2).sum()), rel=1e-3)
    torch.testing.assert_close(samples["step_kl"], ppo.approx_kl(steps), rtol=1e-3, atol=1e-6)
    assert (steps.abs() > 1e-5).all()


def test_every_step_is_logged_with_its_divergence_clipping_and_noise():
    algorithm = make_algorithm(**NOISE)
    rollout = make_rollout(algorithm.adapter)
    stats = algorithm.update(iter([rollout])).to_log_dict()
    for k in range(3):
        assert {f"approx_kl_step{k}", f"clip_fraction_step{k}"} <= set(stats)
        assert 0.002 < stats[f"noise_std_position_step{k}"] < 0.008
        assert 0.01 < stats[f"noise_std_rotation_step{k}"] < 0.05
    assert "approx_kl_step3" not in stats
    fixed = make_algorithm()
    others = fixed.update(iter([make_rollout(fixed.adapter)])).to_log_dict()
    assert not {name for name in others if name.startswith(("noise_std", "entropy", "kl_to_start"))}


def test_logged_noise_is_the_mean_of_its_group_and_step():
    algorithm = make_algorithm(**NOISE, learning_rate=0.0)
    rollout = make_rollout(algorithm.adapter)
    stats = algorithm.update(iter([rollout])).to_log_dict()
    std = distributions(algorithm, rollout)[1].std[:, 1, : algorithm.adapter.n_action_steps]
    assert stats["noise_std_position_step1"] == pytest.approx(float(std[..., 0:3].mean()), rel=1e-4)
    assert stats["noise_std_rotation_step1"] == pytest.approx(float(std[..., 3:9].mean()), rel=1e-4)


def test_entropy_is_that_of_the_explored_gaussians():
    algorithm = make_algorithm(**NOISE, learning_rate=0.0)
    rollout = make_rollout(algorithm.adapter)
    stats = algorithm.update(iter([rollout])).to_log_dict()
    std = distributions(algorithm, rollout)[1].std
    expected = Normal(0.0, std[std > 0]).entropy().mean()
    assert stats["entropy"] == pytest.approx(float(expected), rel=1e-4)


def test_the_objective_holds_the_entropy_with_its_coefficient():
    algorithm = make_algorithm(**NOISE)
    rollout = make_rollout(algorithm.adapter)
    loss, sums, samples = objective(algorithm, rollout, entropy_coef=0.25)
    assert sums["policy_loss"] == 0
    assert float(loss) == pytest.approx(-0.25 * float(samples["entropy"].sum()), rel=1e-5)


def test_the_bonus_of_entropy_widens_the_noise():
    """Advantages of equal episodes are zero, so nothing else moves the weights."""
    widths = []
    for entropy_coef in (0.0, 1.0):
        algorithm = make_group_algorithm(
            **NOISE, entropy_coef=entropy_coef, learning_rate=1e-3, weight_decay=0.0
        )
        rollout = make_groups(algorithm.adapter, (0, 3))
        before = distributions(algorithm, rollout)[1].std
        algorithm.update(iter([rollout]))
        explored = before > 0
        widths.append(((distributions(algorithm, rollout)[1].std / before)[explored].log()).mean())
    assert abs(widths[0]) < 1e-6
    assert widths[1] > 1e-4


def test_the_head_is_trained_at_the_policys_learning_rate():
    algorithm = make_algorithm(**NOISE)
    head = {id(p) for p in algorithm.noise_head.parameters()}
    groups = [{id(p) for p in group["params"]} for group in algorithm.optimizer.param_groups]
    assert head <= groups[0] and not head & (groups[1] | groups[2])
    assert sum(len(group["params"]) for group in algorithm.optimizer.param_groups) == len(set.union(*groups))
    before = snapshot(algorithm.noise_head)
    algorithm.update(iter([make_rollout(algorithm.adapter)]))
    assert changed(before, algorithm.noise_head) == set(before)


def test_learned_noise_makes_what_won_likelier_and_what_lost_less_likely():
    algorithm = make_group_algorithm(**NOISE, learning_rate=1e-7)
    rollout = make_groups(algorithm.adapter, (1, 2))
    algorithm.update(iter([rollout]))
    change = (distributions(algorithm, rollout)[0] - rollout.log_prob).sum(dim=1)
    assert change[rollout.success].mean() > 0 > change[~rollout.success].mean()


def test_annealed_learned_noise_is_updated_with_the_noise_of_the_version_that_acted():
    algorithm = make_algorithm(**NOISE, noise_anneal_iterations=4, noise_anneal_to=0.5)
    rollout = make_rollout(algorithm.adapter, noise_scale=0.75)
    rollout.policy_version = 2
    stats = algorithm.update(iter([rollout])).to_log_dict()
    assert stats["ratio_max_dev_first"] < TOLERANCE
    rollout.policy_version = 0
    assert algorithm.update(iter([rollout])).to_log_dict()["ratio_max_dev_first"] > 0.1


# the starting policy


@VARIANTS
def test_divergence_from_the_start_is_zero_at_the_start_and_grows(options):
    algorithm = make_algorithm(**options, kl_coef=1e-3, minibatch_size=9)
    rollout = make_rollout(algorithm.adapter)
    found = [algorithm.update(iter([rollout])).to_log_dict()["kl_to_start"] for _ in range(2)]
    assert abs(found[0]) < 1e-5
    assert found[1] > 1e-3


@VARIANTS
def test_divergence_equals_torchs_of_present_from_starting_policy(options):
    algorithm = make_algorithm(**options, kl_coef=0.5, gripper="bernoulli_last")
    rollout = make_rollout(algorithm.adapter)
    move(algorithm)
    loss, _, samples = objective(algorithm, rollout, entropy_coef=0.0)
    present = distributions(algorithm, rollout)[1]
    load_weights(algorithm.policy, {n: v for n, v in algorithm.start.items() if "noise_head" not in n})
    if algorithm.noise_head:
        head = {n.removeprefix("noise_head."): v for n, v in algorithm.start.items() if "noise_head" in n}
        algorithm.noise_head.load_state_dict(head)
    start = distributions(algorithm, rollout)[1]
    explored = present.std > 0
    gaussians = [
        Normal(torch.where(explored, d.mean, 0), torch.where(explored, d.std, 1)) for d in (present, start)
    ]
    drawn = (rollout.step_index == len(algorithm.adapter.noise_std) - 1).any(dim=1)
    bernoullis = [Bernoulli(logits=d.gripper_logits) for d in (present, start)]
    bits = kl_divergence(*bernoullis).sum(dim=1)
    assert (bits[~drawn] == 0).all() and (bits[drawn] > 0).all() and drawn.any()
    expected = kl_divergence(*gaussians).sum(dim=(1, 2, 3)) + bits
    torch.testing.assert_close(samples["kl_to_start"], expected, rtol=1e-3, atol=1e-3)
    assert float(loss) == pytest.approx(0.5 * float(expected.sum()), rel=1e-3)


@VARIANTS
@pytest.mark.parametrize("make", [make_algorithm, make_group_algorithm])
def test_the_penalty_keeps_the_policy_near_its_start(make, options):
    distances = []
    for kl_coef in (1e-8, 10.0):
        algorithm = make(
            **options, kl_coef=kl_coef, n_epochs=12, micro_batch_size=9, minibatch_size=9, learning_rate=1e-5
        )
        rollout = (
            make_groups(algorithm.adapter, (1, 2))
            if make is make_group_algorithm
            else make_rollout(algorithm.adapter)
        )
        algorithm.update(iter([rollout]))
        _, _, samples = objective(algorithm, rollout)
        distances.append(float(samples["kl_to_start"].mean()))
    assert 0 < distances[1] < 0.5 * distances[0]


def test_without_a_penalty_no_copy_is_kept():
    algorithm = make_algorithm()
    assert algorithm.start == {}
    assert {name.partition(".")[0] for name in algorithm.state_dict()} == {"value_head"}


@VARIANTS
def test_updates_leave_the_starting_policy_alone(options):
    algorithm = make_algorithm(**options, kl_coef=1e-3)
    before = {name: value.clone() for name, value in algorithm.start.items()}
    algorithm.update(iter([make_rollout(algorithm.adapter)]))
    assert set(before) == set(algorithm.trainable_parameters())
    assert all(torch.equal(before[name], algorithm.start[name]) for name in before)
    present = algorithm.get_weights()
    assert any(not torch.equal(before[name], present[name]) for name in before)


def test_replaced_weights_come_back_also_after_an_error():
    algorithm = make_algorithm(kl_coef=1e-3)
    move(algorithm)
    parameters, before = algorithm.trainable_parameters(), snapshot(algorithm.policy)
    with pytest.raises(ZeroDivisionError), replaced(parameters, algorithm.start):
        assert all(torch.equal(parameters[name], value) for name, value in algorithm.start.items())
        raise ZeroDivisionError
    assert not changed(before, algorithm.policy)


def test_gradients_of_all_parts_accumulate_to_the_whole_minibatch():
    wide = {
        "noise_std_position": (0.5, 2.0),
        "noise_std_rotation": (0.5, 2.0),
        "entropy_coef": 1.0,
        "kl_coef": 1.0,
    }
    gradients = []
    for size in (2, 9):
        algorithm = make_algorithm(
            **NOISE, **wide, minibatch_size=9, micro_batch_size=size, grad_clip_norm=1e6
        )
        rollout = make_rollout(algorithm.adapter)
        move(algorithm)
        algorithm.optimizer.step = lambda: None
        algorithm.update(iter([rollout]))
        gradients.append(torch.cat([p.grad.flatten() for p in algorithm.trainable_parameters().values()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()


# what is saved


def test_state_holds_heads_and_start_and_comes_back():
    source, target = (make_algorithm(**NOISE, kl_coef=1e-3) for _ in range(2))
    move(source)
    for value in source.start.values():
        value += 1
    state = {name: value.clone() for name, value in source.state_dict().items()}
    assert {name.partition(".")[0] for name in state} == {"value_head", "noise_head", "start"}
    target.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in target.state_dict().items())
    assert torch.equal(target.noise_head.mlp[0].weight, source.noise_head.mlp[0].weight)


def test_another_algorithms_state_is_refused():
    algorithm, other = make_algorithm(**NOISE), make_algorithm()
    with pytest.raises(RuntimeError, match=r"differ in 6 names, the first is 'noise_head"):
        algorithm.load_state_dict(other.state_dict())
    state = algorithm.state_dict() | {"value_head.0.bias": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"'value_head.0.bias' has shape \(1,\) instead of"):
        algorithm.load_state_dict(state)
