"""Collecting episodes: which ones are run, what of them is kept, and that it can be repeated."""

import copy
from functools import partial
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from lerobot_pirl.algorithm import PiRLAlgorithm
from lerobot_pirl.collector import Collector, EpisodeSpec, episode_specs
from lerobot_pirl.envs import ChunkEnv, TabletopEnv, TabletopTask, make_chunk_envs
from lerobot_pirl.envs import tabletop_physics as physics
from lerobot_pirl.envs.workers import WorkerDied
from lerobot_pirl.rollout import Rollout
from tests.toy import tiny_adapter

CHUNK, LIMIT = 4, 10
REACH = physics.TASKS["reach"]
GOAL = physics.init_state(REACH, 0).target


class GoalAdapter:
    """A policy of three position channels that always moves to ``GOAL``; its features are where the gripper is.

    It succeeds in initial state 0 of reach, whose target is there, and runs out of time in the others.
    """

    n_action_steps = CHUNK
    gripper_index = gripper_temperature = None
    processors = None

    def __init__(self, std: float = 1e-3):
        self.noise_std = torch.full((2, CHUNK, 3), std)
        self.tasks: list[list[str]] = []

    def prepare_observation(self, observation: dict, tasks: list[str]) -> dict:
        self.tasks.append(tasks)
        return {"eef": observation["robot_state"]["eef"]["pos"]}

    def encode(self, batch: dict) -> dict[str, Tensor]:
        return {"eef": torch.from_numpy(batch["eef"])}

    def predict_x0(self, features: dict, x_t: Tensor, t: Tensor) -> Tensor:
        return torch.tensor([GOAL[0], GOAL[1], 0.1]).expand_as(x_t)

    def execute(self, x_0: Tensor, gripper: None) -> Tensor:
        return x_0

    def environment_actions(self, actions: Tensor) -> Tensor:
        return torch.cat([actions, torch.zeros(*actions.shape[:2], 4)], dim=2)


class LoggedTask(TabletopTask):
    """Writes down every episode's start and its observations in ``log``."""

    log: list

    def reset(self, **kwargs):
        start = self.init_state_id
        observation, info = super().reset(**kwargs)
        self.log.append(
            SimpleNamespace(task=self.task, start=start, eefs=[self.state.eef], seed=kwargs["seed"])
        )
        return observation, info

    def step(self, action):
        result = super().step(action)
        self.log[-1].eefs.append(self.state.eef)
        return result


def logged_envs(n_envs: int, log: list[list], tasks=("reach",)) -> gym.vector.VectorEnv:
    """Slots of short tabletop episodes; ``log`` gets a list per slot."""

    def make_slot() -> ChunkEnv:
        log.append([])
        return ChunkEnv(partial(make_task, log=log[-1]), CHUNK, LIMIT)

    def make_task(task_id: int, log: list) -> LoggedTask:
        task = LoggedTask(tasks[task_id], task_id, observation_height=16, observation_width=16)
        task.log = log
        return task

    return gym.vector.SyncVectorEnv([make_slot] * n_envs, autoreset_mode=gym.vector.AutoresetMode.DISABLED)


def specs(*init_state_ids: int, task_id: int = 0) -> list[EpisodeSpec]:
    return [EpisodeSpec(number, task_id, state) for number, state in enumerate(init_state_ids)]


def collect(
    n_envs: int, episodes: list[EpisodeSpec], seed=7, version=0, tasks=("reach",), **options
) -> Rollout:
    collector = Collector(logged_envs(n_envs, [], tasks), GoalAdapter(**options), 0.5, seed)
    rollout = collector.collect(episodes, version)
    rollout.check()
    return rollout


def assert_equal(left: Rollout, right: Rollout, atol: float = 0.0) -> None:
    """Compare everything but the timings."""
    (_, ours), (_, theirs) = left.to_tensors(), right.to_tensors()
    assert set(ours) == set(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=atol, msg=name)


# --- which episodes -------------------------------------------------------------------------------------------


def test_walk_visits_every_task_and_initial_state_once_before_it_starts_again():
    num_init_states = {2: 3, 5: 3}
    walk = episode_specs(num_init_states, 0, 12)
    pairs = [(spec.task_id, spec.init_state_id) for spec in walk]
    assert pairs[:6] == [(2, 0), (5, 0), (2, 1), (5, 1), (2, 2), (5, 2)]
    assert pairs[6:] == pairs[:6]
    assert [spec.number for spec in walk] == list(range(12))


def test_groups_visit_each_place_of_the_walk_several_times_in_a_row_under_numbers_of_their_own():
    walk = episode_specs({2: 3, 5: 3}, 0, 12, group_size=3)
    assert [(spec.task_id, spec.init_state_id) for spec in walk] == [
        *([(2, 0)] * 3), *([(5, 0)] * 3), *([(2, 1)] * 3), *([(5, 1)] * 3)
    ]  # fmt: skip
    assert [spec.number for spec in walk] == list(range(12))
    assert episode_specs({2: 3, 5: 3}, 6, 6, group_size=3) == walk[6:]


def test_walk_continues_where_the_iteration_before_ended():
    num_init_states = {0: 5, 1: 7, 2: 1}
    parts = [episode_specs(num_init_states, start, 4) for start in range(0, 40, 4)]
    assert sum(parts, []) == episode_specs(num_init_states, 0, 40)


@pytest.mark.parametrize("n_envs", [1, 2, 3, 5])
def test_each_episode_is_run_exactly_once_and_stored_in_the_order_of_the_list(n_envs):
    log: list[list] = []
    envs = logged_envs(n_envs, log)
    wanted = specs(5, 0, 17, 0, 49)
    rollout = Collector(envs, GoalAdapter(), 0.5, 7).collect(wanted, 0)
    assert sorted(episode.start for slot in log for episode in slot) == [0, 0, 5, 17, 49]
    assert rollout.init_state_id.tolist() == [5, 0, 17, 0, 49]
    starts = torch.tensor([physics.init_state(REACH, state).eef for state in (5, 0, 17, 0, 49)])
    first_rows = rollout.episode_lengths.cumsum(0) - rollout.episode_lengths
    torch.testing.assert_close(rollout.features["eef"][first_rows].float(), starts)


def test_more_environments_than_episodes_add_nothing():
    rollout = collect(4, specs(0, 5))
    assert len(rollout.episode_lengths) == 2
    assert_equal(rollout, collect(2, specs(0, 5)))


def test_every_environment_gets_the_sentence_of_its_own_task():
    adapter = GoalAdapter()
    log: list[list] = []
    walk = episode_specs({0: 50, 1: 50}, 0, 6)
    rollout = Collector(logged_envs(3, log, ("reach", "pickup")), adapter, 0.5, 7).collect(walk, 0)
    assert rollout.task_id.tolist() == [0, 1, 0, 1, 0, 1]
    descriptions = [physics.TASKS[name].description for name in ("reach", "pickup", "reach")]
    assert adapter.tasks[0] == descriptions
    assert sorted((e.task, e.start) for slot in log for e in slot) == sorted(
        (("reach", "pickup")[spec.task_id], spec.init_state_id) for spec in walk
    )


def test_environment_keeps_its_task_while_there_are_episodes_of_it():
    log: list[list] = []
    walk = episode_specs({0: 50, 1: 50}, 0, 12)
    Collector(logged_envs(3, log, ("reach", "pickup")), GoalAdapter(), 0.5, 7).collect(walk, 0)
    changes = [sum(a.task != b.task for a, b in zip(slot, slot[1:], strict=False)) for slot in log]
    assert max(changes) <= 1


# --- what is kept ---------------------------------------------------------------------------------------------


def test_rows_hold_what_was_seen_drawn_and_earned():
    log: list[list] = []
    rollout = Collector(logged_envs(2, log), GoalAdapter(), 0.5, 7).collect(specs(0, 9), 3)
    assert rollout.policy_version == 3
    assert rollout.success.tolist() == [True, False]
    won = int(rollout.episode_lengths[0])
    assert rollout.rewards.tolist() == [0.0] * (won - 1) + [1.0] + [0.0] * 3
    assert rollout.terminated.tolist() == [False] * (won - 1) + [True] + [False] * 3
    for slot, rows in zip(log, rollout.features["eef"].split(rollout.episode_lengths.tolist()), strict=True):
        seen = torch.tensor(slot[0].eefs, dtype=torch.float64)[::CHUNK][: len(rows)]
        torch.testing.assert_close(rows, seen, rtol=0, atol=0)
    assert rollout.chain.shape == (len(rollout), 2, CHUNK, 3)


def test_env_steps_count_executed_steps():
    log: list[list] = []
    rollout = Collector(logged_envs(2, log), GoalAdapter(), 0.5, 7).collect(specs(0, 9, 0), 0)
    by_start = {slot[0].start: len(slot[0].eefs) - 1 for slot in log}
    assert by_start[9] == LIMIT
    assert by_start[0] < LIMIT
    assert rollout.env_steps.tolist()[:2] == [by_start[0], by_start[9]]
    assert rollout.episode_lengths.tolist() == [-(-steps // CHUNK) for steps in rollout.env_steps.tolist()]


class SettlingTask(TabletopTask):
    """Takes steps of its own in every reset, as LIBERO does until its objects lie still."""

    def reset(self, **kwargs):
        _, info = super().reset(**kwargs)
        for _ in range(3):
            observation, *_ = super().step(np.array([0.0, 0.0, 0.2, 0, 0, 0, -1]))
        return observation, info


def test_settling_is_neither_counted_nor_stored():
    def make_slot() -> ChunkEnv:
        return ChunkEnv(lambda task_id: SettlingTask("reach"), CHUNK, LIMIT)

    envs = gym.vector.SyncVectorEnv([make_slot], autoreset_mode=gym.vector.AutoresetMode.DISABLED)
    rollout = Collector(envs, GoalAdapter(), 0.5, 7).collect(specs(9), 0)
    assert rollout.env_steps.tolist() == [LIMIT]
    assert rollout.episode_lengths.tolist() == [3]
    assert rollout.features["eef"][0, 2] == pytest.approx(0.2)


@pytest.mark.parametrize("n_envs", [1, 2, 3])
def test_time_outs_keep_the_observation_they_ended_in_and_successes_keep_none(n_envs):
    log: list[list] = []
    wanted = specs(9, 0, 17, 33, 0)
    rollout = Collector(logged_envs(n_envs, log), GoalAdapter(), 0.5, 7).collect(wanted, 0)
    assert rollout.success.tolist() == [False, True, False, False, True]
    ended_in = {episode.start: episode.eefs[-1] for slot in log for episode in slot}
    expected = torch.tensor([ended_in[state] for state in (9, 17, 33)], dtype=torch.float64)
    torch.testing.assert_close(rollout.final_features["eef"], expected, rtol=0, atol=0)


def test_rollout_of_successes_alone_has_empty_final_features():
    rollout = collect(2, specs(0, 0))
    assert rollout.success.all()
    assert rollout.final_features["eef"].shape == (0, 3)


def test_progress_counts_finished_episodes_and_successes_after_every_chunk():
    calls = []
    collector = Collector(
        logged_envs(2, []), GoalAdapter(), 0.5, 7, on_progress=lambda *numbers: calls.append(numbers)
    )
    rollout = collector.collect(specs(9, 0, 0), 0)
    assert calls[-1] == (3, 2)
    assert calls == sorted(calls)
    # one environment ran the two successes while the other ran out of time
    assert len(calls) == max(int(rollout.episode_lengths[0]), int(rollout.episode_lengths[1:].sum()))


def test_an_exception_in_progress_leaves_the_collector_usable():
    class Stopped(Exception):
        pass

    def stop(finished: int, successes: int) -> None:
        raise Stopped

    collector = Collector(logged_envs(2, []), GoalAdapter(), 0.5, 7, on_progress=stop)
    with pytest.raises(Stopped):
        collector.collect(specs(9, 17), 0)
    collector.on_progress = lambda finished, successes: None
    assert_equal(collector.collect(specs(0, 9), 1), collect(2, specs(0, 9), version=1))


def test_stats_tell_where_the_time_went():
    rollout = collect(2, specs(0, 9))
    stats = rollout.stats
    assert set(stats) == {"env_s", "inference_s", "collect_s", "gripper_flips"}
    assert min(stats["env_s"], stats["inference_s"]) > 0
    assert stats["env_s"] + stats["inference_s"] <= stats["collect_s"]


def test_gripper_flips_are_summed_over_the_rows():
    adapter = tiny_adapter(gripper="bernoulli_last", gripper_temperature=5.0)
    envs = make_chunk_envs(adapter.run_config.env, 2, CHUNK, 8)
    rollout = Collector(envs, adapter, 1.0, 7).collect(specs(0, 1), 0)
    assert 0 < rollout.stats["gripper_flips"] < len(rollout)


# --- repeatability --------------------------------------------------------------------------------------------


def test_same_seed_and_version_give_bit_identical_rollouts_and_others_do_not():
    wanted = specs(0, 9, 17)
    reference = collect(2, wanted)
    assert_equal(reference, collect(2, wanted))
    for other in (collect(2, wanted, seed=8), collect(2, wanted, version=1)):
        assert not torch.equal(other.chain[0], reference.chain[0])


def test_environments_without_an_episode_stand_still():
    log: list[list] = []
    Collector(logged_envs(4, log), GoalAdapter(), 0.5, 7).collect(specs(1, 2), 0)
    steps = [[len(episode.eefs) - 1 for episode in slot] for slot in log]
    assert steps == [[LIMIT], [LIMIT], [0], [0]]


def test_a_collector_has_no_memory():
    """An actor that joins later collects what one that was there from the start would."""
    collector = Collector(logged_envs(2, [], ("reach", "pickup")), GoalAdapter(), 0.5, 7)
    later = episode_specs({0: 50, 1: 50}, 5, 5)
    collector.collect(episode_specs({0: 50, 1: 50}, 0, 5), 0)
    assert_equal(collector.collect(later, 1), collect(2, later, version=1, tasks=("reach", "pickup")))


def test_drawn_initial_states_differ_between_episodes_and_iterations_and_can_be_repeated():
    adapter = GoalAdapter()
    envs = make_chunk_envs(
        TabletopEnv(init_states=False, observation_height=16, observation_width=16), 2, CHUNK, 8
    )
    collector = Collector(envs, adapter, 0.5, 7)

    def starts(version: int) -> list[list[float]]:
        rollout = collector.collect(episode_specs({0: 1}, 4 * version, 4), version)
        first_rows = rollout.episode_lengths.cumsum(0) - rollout.episode_lengths
        return rollout.features["eef"][first_rows].tolist()

    first, second = starts(0), starts(1)
    assert len({tuple(start) for start in first + second}) == 8
    assert starts(0) == first


@pytest.mark.parametrize("n_envs", [2, 3])
def test_tiny_xvla_gives_bit_identical_rollouts_that_its_log_probs_confirm(n_envs):
    from lerobot_pirl.policies.base import chain_log_prob

    adapter = tiny_adapter()
    cfg = adapter.run_config
    wanted = episode_specs({0: 50}, 0, 5)
    rollouts = [
        Collector(make_chunk_envs(cfg.env, n_envs, CHUNK, 8), adapter, 0.5, cfg.seed).collect(wanted, 2)
        for _ in range(2)
    ]
    assert_equal(*rollouts)
    rollout = rollouts[0]
    with torch.no_grad():
        log_prob, _ = chain_log_prob(
            adapter, rollout.features, rollout.chain, rollout.step_index, rollout.gripper
        )
    torch.testing.assert_close(log_prob, rollout.log_prob, rtol=0, atol=1e-3)


def test_noise_scale_reaches_what_is_drawn_and_its_log_probs():
    """Half the scale on twice the noise is the noise."""
    wanted = specs(0, 9)

    def scaled(scale: float, std: float) -> Rollout:
        return Collector(logged_envs(2, []), GoalAdapter(std), 0.5, 7).collect(wanted, 0, scale)

    reference = scaled(1.0, 1e-3)
    assert_equal(reference, scaled(0.5, 2e-3))
    assert not torch.equal(reference.log_prob, scaled(0.5, 1e-3).log_prob)
    assert (scaled(0.0, 1e-3).log_prob == 0).all()


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_log_probs_are_confirmed_with_the_scale_they_were_drawn_with_alone(scale):
    from lerobot_pirl.policies.base import chain_log_prob

    adapter = tiny_adapter()
    envs = make_chunk_envs(adapter.run_config.env, 2, CHUNK, 8)
    rollout = Collector(envs, adapter, 0.5, 7).collect(specs(0, 1), 0, noise_scale=scale)
    stored = (rollout.features, rollout.chain, rollout.step_index, rollout.gripper)
    with torch.no_grad():
        again, _ = chain_log_prob(adapter, *stored, noise_scale=scale)
        other, _ = chain_log_prob(adapter, *stored, noise_scale=scale / 2)
    torch.testing.assert_close(again, rollout.log_prob, rtol=0, atol=1e-3)
    assert (other - rollout.log_prob).abs().min() > 1


def test_an_episode_does_not_depend_on_the_episodes_that_run_beside_it():
    alone = collect(1, specs(0, 9, 17, 3, 8))
    for n_envs in (2, 3, 5, 8):
        assert_equal(alone, collect(n_envs, specs(0, 9, 17, 3, 8)), atol=1e-6)


def test_tiny_xvla_collects_the_same_with_any_number_of_environments():
    adapter = tiny_adapter()
    cfg = adapter.run_config
    wanted = episode_specs({0: 50}, 0, 5)
    rollouts = [
        Collector(make_chunk_envs(cfg.env, n_envs, CHUNK, 8), adapter, 0.5, cfg.seed).collect(wanted, 2)
        for n_envs in (1, 4)
    ]
    # what differs is float32's rounding in batches of another size
    assert_equal(*rollouts, atol=1e-3)


def test_features_that_were_kept_are_those_that_would_be_computed_again_after_updates(monkeypatch):
    adapter = tiny_adapter(
        critic_warmup_iterations=0, minibatch_size=8, micro_batch_size=8, learning_rate=1e-3
    )
    cfg, seen = adapter.run_config, []
    encode = adapter.encode
    monkeypatch.setattr(
        adapter, "encode", lambda batch: (seen.append(copy.deepcopy(batch)), encode(batch))[1]
    )
    envs = make_chunk_envs(cfg.env, 1, CHUNK, 8)
    rollout = Collector(envs, adapter, 0.5, cfg.seed).collect(specs(0, 1), 0)
    before = {name: p.detach().clone() for name, p in adapter.policy.named_parameters()}
    PiRLAlgorithm(adapter, cfg.algorithm, seed=1).update(iter([rollout]))
    assert any(not torch.equal(before[name], p) for name, p in adapter.policy.named_parameters())
    # each episode's rows, and the observation in which it ran out of time
    assert rollout.truncated.sum() == 2
    again = [encode(batch) for batch in seen]
    for name in rollout.features:
        rows = rollout.features[name].split(rollout.episode_lengths.tolist())
        ends = rollout.final_features[name].split(1)
        expected = torch.cat([part for pair in zip(rows, ends, strict=True) for part in pair])
        assert torch.equal(torch.cat([features[name].cpu() for features in again]), expected), name


def test_worker_processes_collect_the_same():
    cfg = TabletopEnv(observation_height=16, observation_width=16)
    rollouts = []
    for use_async in (False, True):
        envs = make_chunk_envs(cfg, 2, CHUNK, LIMIT, use_async)
        rollouts.append(Collector(envs, GoalAdapter(), 0.5, 7).collect(specs(0, 9, 17), 0))
        envs.close()
    assert_equal(*rollouts)


def test_death_of_a_worker_ends_the_collection_with_a_sentence():
    envs = make_chunk_envs(TabletopEnv(observation_height=16, observation_width=16), 2, CHUNK, LIMIT, True)

    def kill(finished: int, successes: int) -> None:
        envs.processes[0].kill()
        envs.processes[0].join()

    collector = Collector(envs, GoalAdapter(), 0.5, 7, on_progress=kill)
    with pytest.raises(WorkerDied, match="environment worker number 0 .* died; "):
        collector.collect(specs(9, 17), 0)
    envs.close()
