"""Rollouts: their round trip as tensors, what is refused, joining them, and their returns."""

import dataclasses
import json
import math

import pytest
import torch
from torch import Tensor

from lerobot_pirl.rollout import Rollout, compute_returns, concatenate, derive_seed, group_returns

LENGTHS, SUCCESS = (3, 1, 2, 4), (True, False, False, True)


def make_rollout(lengths=LENGTHS, success=SUCCESS, seed=0) -> Rollout:
    """Episodes with a reward of 1 in the last chunk of the successful ones; the others ran out of time."""
    rows, episodes = sum(lengths), len(lengths)
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    terminated = torch.zeros(rows, dtype=torch.bool)
    terminated[torch.tensor(lengths).cumsum(0) - 1] = torch.tensor(success)
    return Rollout(
        policy_version=7,
        features={"vlm": randn(rows, 2, 3), "domain_id": torch.full((rows,), 3)},
        final_features={
            "vlm": randn(success.count(False), 2, 3),
            "domain_id": torch.full((success.count(False),), 3),
        },
        chain=randn(rows, 2, 4, 5),
        step_index=torch.randint(0, 4, (rows, 1), generator=generator),
        gripper=torch.randint(0, 2, (rows, 2), generator=generator, dtype=torch.uint8),
        log_prob=randn(rows, 1),
        rewards=terminated.float(),
        terminated=terminated,
        episode_lengths=torch.tensor(lengths),
        task_id=torch.arange(episodes),
        init_state_id=torch.arange(episodes) + 10,
        success=torch.tensor(success),
        env_steps=torch.tensor(lengths) * 4,
        stats={"env_s": 1.5, "gripper_flips": 2.0},
    )


def assert_equal(first: Rollout, second: Rollout) -> None:
    for field in dataclasses.fields(Rollout):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if isinstance(a, Tensor):
            assert torch.equal(a, b) and a.dtype == b.dtype, field.name
        elif field.name in ("features", "final_features"):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in a), field.name
        else:
            assert a == b, field.name


# --- structure --------------------------------------------------------------------------------------------


def test_length_is_the_number_of_chunks():
    assert len(make_rollout()) == 10


def test_ended_and_truncated_mark_the_last_rows_of_episodes():
    rollout = make_rollout()
    assert rollout.ended.nonzero()[:, 0].tolist() == [2, 3, 5, 9]
    assert rollout.truncated.nonzero()[:, 0].tolist() == [3, 5]


def test_round_trip_keeps_everything_and_the_header_is_json():
    rollout = make_rollout()
    header, tensors = rollout.to_tensors()
    assert_equal(rollout, Rollout.from_tensors(json.loads(json.dumps(header)), tensors))


def test_round_trip_without_a_truncated_episode():
    rollout = make_rollout(lengths=(2, 1), success=(True, True))
    assert_equal(rollout, Rollout.from_tensors(*rollout.to_tensors()))


# --- refusals ---------------------------------------------------------------------------------------------

REQUIRED = [
    *("chain", "step_index", "gripper", "log_prob", "rewards", "terminated"),
    *("episode_lengths", "task_id", "init_state_id", "success", "env_steps"),
]


def refuse(match: str, **changes) -> None:
    """Expect a refusal once tensors are replaced; ``None`` removes one, ``__`` stands for a dot."""
    header, tensors = make_rollout().to_tensors()
    for name, value in changes.items():
        key = name.replace("__", ".")
        assert key in tensors
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value(tensors[key]) if callable(value) else value
    with pytest.raises(ValueError, match=match):
        Rollout.from_tensors(header, tensors)


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_tensor_is_refused_by_name(name):
    refuse(f"has no tensor {name}; update", **{name: None})


@pytest.mark.parametrize("name", ["chain", "step_index", "gripper", "log_prob", "rewards", "terminated"])
def test_a_tensor_with_another_number_of_rows_is_refused(name):
    refuse(f"{name} has 9 rows, the episodes have 10", **{name: lambda value: value[:-1]})


@pytest.mark.parametrize("name", ["task_id", "init_state_id", "success", "env_steps"])
def test_a_tensor_with_another_number_of_episodes_is_refused(name):
    refuse(f"{name} has 3 entries for 4 episodes", **{name: lambda value: value[:-1]})


def test_features_of_another_length_are_refused():
    refuse("features.vlm has 9 rows, the episodes have 10", features__vlm=lambda value: value[:-1])


def test_final_features_must_fit_the_truncated_episodes():
    refuse("final_features.vlm has 1 rows for 2 truncated", final_features__vlm=lambda value: value[:1])


@pytest.mark.parametrize("name", ["features__vlm", "final_features__vlm"])
def test_features_that_only_one_of_both_has_are_refused(name):
    refuse("must have the same names", **{name: None})


def test_no_features_at_all_are_refused():
    names = ("features__vlm", "features__domain_id", "final_features__vlm", "final_features__domain_id")
    refuse("at least one", **dict.fromkeys(names))


@pytest.mark.parametrize("lengths", [[0, 4, 2, 4], [12, -4, 1, 1]])
def test_episodes_without_a_chunk_are_refused(lengths):
    refuse("every episode a chunk", episode_lengths=torch.tensor(lengths))


def test_a_rollout_without_episodes_is_refused():
    refuse("every rollout has an episode", **dict.fromkeys(REQUIRED, lambda value: value[:0]))


def test_termination_before_an_episodes_last_chunk_is_refused():
    refuse("not its episode's last", terminated=lambda value: torch.ones_like(value))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["chain", "log_prob", "rewards", "features__vlm", "final_features__vlm"])
def test_a_number_that_is_not_finite_is_refused(name, number):
    def spoil(value: Tensor) -> Tensor:
        spoiled = value.clone()
        spoiled.view(-1)[-1] = number
        return spoiled

    refuse(f" {name.replace('__', '.')} holds a number that is not finite", **{name: spoil})


def test_a_header_without_a_version_is_refused():
    header, tensors = make_rollout().to_tensors()
    del header["policy_version"]
    with pytest.raises(ValueError, match="policy_version is None; update"):
        Rollout.from_tensors(header, tensors)


HEADERS = {
    "version as text": {"policy_version": "7"},
    "version as a flag": {"policy_version": True},
    "version as a number": {"policy_version": 7.0},
    "stats as a list": {"stats": [["a", 1.0]]},
    "stats of nothing": {"stats": None},
    "a text in stats": {"stats": {"env_s": "1"}},
    "a flag in stats": {"stats": {"env_s": True}},
    "not a number in stats": {"stats": {"env_s": math.nan}},
    "infinity in stats": {"stats": {"env_s": -math.inf}},
    "more than a float holds in stats": {"stats": {"env_s": 10**400}},
    "more than a sum of two holds in stats": {"stats": {"env_s": 17 * 10**307}},
}


@pytest.mark.parametrize("changes", HEADERS.values(), ids=HEADERS)
def test_a_header_with_something_else_is_refused(changes):
    header, tensors = make_rollout().to_tensors()
    name = next(iter(changes))
    with pytest.raises(ValueError, match=f"rollout: {name} is "):
        Rollout.from_tensors(header | changes, tensors)
    del header["stats"]
    assert Rollout.from_tensors(header, tensors).stats == {}


@pytest.mark.parametrize("name", REQUIRED)
def test_a_tensor_of_another_type_is_refused(name):
    refuse(f"rollout: {name} is torch.float16 with ", **{name: lambda value: value.to(torch.float16)})


@pytest.mark.parametrize("name", REQUIRED)
def test_a_tensor_with_other_axes_is_refused(name):
    refuse(rf"rollout: {name} is torch\.\w+ with 0 axes ", **{name: lambda value: value.flatten()[0]})
    refuse(rf"rollout: {name} is torch\.\w+ with \d axes ", **{name: lambda value: value[None]})


def test_features_without_axes_are_refused():
    refuse("features.vlm has 0 rows, the episodes have 10", features__vlm=torch.tensor(1.0))
    refuse("final_features.vlm has 0 rows for 2 truncated", final_features__vlm=torch.tensor(1.0))


def test_lengths_whose_sum_would_run_over_are_refused():
    lengths = torch.tensor([2**63 - 1, 2**63 - 1, 3, 9])
    assert lengths.sum() == 10
    refuse(f"chain has 10 rows, the episodes have {2**64 + 10}", episode_lengths=lengths)


@pytest.mark.parametrize("steps", [-1, 0, 2, 13, 2**63 - 1, -(2**63)])
def test_steps_that_no_episode_of_so_many_chunks_takes_are_refused(steps):
    refuse("rollout: env_steps is ", env_steps=torch.tensor([steps, 4, 8, 16]))


@pytest.mark.parametrize("steps", [3, 12])
def test_the_fewest_and_the_most_steps_pass(steps):
    rollout = dataclasses.replace(make_rollout(), env_steps=torch.tensor([steps, 4, 8, 16]))
    assert_equal(Rollout.from_tensors(*rollout.to_tensors()), rollout)


# --- joining ----------------------------------------------------------------------------------------------


def part(rollout: Rollout, rows: slice, episodes: slice, finals: slice) -> Rollout:
    """Return some consecutive episodes of a rollout."""
    per_row = {name: getattr(rollout, name)[rows] for name in REQUIRED[:6]}
    per_episode = {name: getattr(rollout, name)[episodes] for name in REQUIRED[6:]}
    return Rollout(
        policy_version=rollout.policy_version,
        features={name: value[rows] for name, value in rollout.features.items()},
        final_features={name: value[finals] for name, value in rollout.final_features.items()},
        stats={"env_s": 0.75, "gripper_flips": 1.0},
        **per_row,
        **per_episode,
    )


def test_joined_parts_equal_the_whole():
    whole = make_rollout()
    first = part(whole, slice(0, 4), slice(0, 2), slice(0, 1))
    second = part(whole, slice(4, 10), slice(2, 4), slice(1, 2))
    joined = concatenate([first, second])
    joined.check()
    assert_equal(joined, whole)


def test_joining_one_rollout_gives_it_back():
    whole = make_rollout()
    assert concatenate([whole]) is whole


# --- returns ----------------------------------------------------------------------------------------------


def returns_of(rollout: Rollout, bootstrap_truncation=True, gamma=0.9, gae_lambda=0.8, seed=3):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(rollout), generator=generator)
    final_values = torch.randn(int(rollout.truncated.sum()), generator=generator)
    advantages, returns = compute_returns(
        rollout, values, final_values, gamma, gae_lambda, bootstrap_truncation
    )
    return values, final_values, advantages, returns


def reference_advantages(rollout, values, final_values, bootstrap_truncation, gamma, gae_lambda):
    """Plain Python over one list of rows, episode by episode."""
    advantages, finals, start = [], iter(final_values.tolist()), 0
    for length in rollout.episode_lengths.tolist():
        rows = range(start, start + length)
        running, episode = 0.0, []
        for i in reversed(rows):
            if i != rows[-1]:
                following = values[i + 1].item()
            elif rollout.terminated[i]:
                following = 0.0
            else:
                final = next(finals)
                following = final if bootstrap_truncation else 0.0
            delta = rollout.rewards[i].item() + gamma * following - values[i].item()
            running = delta + gamma * gae_lambda * running
            episode.insert(0, running)
        advantages += episode
        start += length
    return torch.tensor(advantages)


@pytest.mark.parametrize("bootstrap_truncation", [True, False])
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0)])
def test_returns_equal_a_plain_python_reference(bootstrap_truncation, gamma, gae_lambda):
    rollout = make_rollout()
    values, final_values, advantages, returns = returns_of(rollout, bootstrap_truncation, gamma, gae_lambda)
    expected = reference_advantages(rollout, values, final_values, bootstrap_truncation, gamma, gae_lambda)
    torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(returns, advantages + values)


def test_final_values_reach_their_own_episodes_alone_and_only_when_bootstrapping():
    rollout = make_rollout()
    values = torch.zeros(10)
    for bootstrap, expected in ((True, [0.9 * 5, 0.9 * 7]), (False, [0.0, 0.0])):
        advantages, _ = compute_returns(rollout, values, torch.tensor([5.0, 7.0]), 0.9, 0.0, bootstrap)
        assert advantages[[3, 5]].tolist() == pytest.approx(expected)
        others = [i for i in range(10) if i not in (3, 5)]
        assert torch.equal(advantages[others], rollout.rewards[others])


def test_an_episodes_returns_do_not_depend_on_the_episodes_beside_it():
    whole = make_rollout()
    alone = part(whole, slice(4, 6), slice(2, 3), slice(1, 2))
    generator = torch.Generator().manual_seed(3)
    values, final_values = torch.randn(10, generator=generator), torch.randn(2, generator=generator)
    together, _ = compute_returns(whole, values, final_values, 0.9, 0.8, True)
    single, _ = compute_returns(alone, values[4:6], final_values[1:2], 0.9, 0.8, True)
    torch.testing.assert_close(together[4:6], single, atol=0, rtol=0)


# --- seeds ------------------------------------------------------------------------------------------------


def test_derived_seeds_repeat_and_fit_31_bits():
    seeds = [derive_seed(1000, iteration) for iteration in range(500)]
    assert seeds == [derive_seed(1000, iteration) for iteration in range(500)]
    assert len(set(seeds)) == 500
    assert min(seeds) >= 0
    assert 2**30 < max(seeds) < 2**31


def test_derived_seeds_depend_on_every_key_and_on_their_order():
    seeds = {derive_seed(*keys) for keys in ((1, 2, 3), (9, 2, 3), (1, 9, 3), (1, 2, 9), (3, 2, 1))}
    assert len(seeds) == 5


# --- groups -----------------------------------------------------------------------------------------------


def grouped(task_id: list[int], init_state_id: list[int]) -> Rollout:
    rollout = make_rollout(lengths=(3, 2, 4, 1), success=(True, False, True, False))
    rollout.task_id, rollout.init_state_id = torch.tensor(task_id), torch.tensor(init_state_id)
    return rollout


def test_the_return_of_an_episode_sums_its_rewards():
    rollout = grouped([0, 0, 1, 1], [4, 4, 4, 4])
    rollout.rewards[0] = 0.25
    assert group_returns(rollout, 2).tolist() == [1.25, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("task_id", "init_state_id", "size"),
    [([0, 1, 1, 1], [4, 4, 4, 4], 2), ([0, 0, 1, 1], [4, 4, 4, 5], 2), ([0] * 4, [4] * 4, 3)],
)
def test_episodes_that_form_no_groups_are_refused(task_id, init_state_id, size):
    with pytest.raises(ValueError, match=f"its 4 episodes do not come in groups of {size}"):
        group_returns(grouped(task_id, init_state_id), size)
