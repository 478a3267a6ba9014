"""Evaluation without exploration: paired, repeatable, light, and the same as LeRobot's, episode by episode."""

import copy
import random
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lerobot_pirl import flow
from lerobot_pirl.build import make_adapter
from lerobot_pirl.collector import Collector, Episode, EpisodeSpec, episode_specs
from lerobot_pirl.config import PiRLTrainConfig
from lerobot_pirl.envs import make_chunk_envs
from lerobot_pirl.envs.chunk import num_init_states, task_ids
from lerobot_pirl.evaluate import Evaluation, evaluate, evaluation_episode, evaluation_specs
from lerobot_pirl.policies.base import native_actions
from lerobot_pirl.policies.xvla import GRIPPER
from lerobot_pirl.rollout import derive_seed
from lerobot_pirl.wire import Message, decode, encode
from tests.installs import REPO, check_run
from tests.test_collector import LIMIT, GoalAdapter, assert_equal, logged_envs, specs
from tests.toy import CONFIGS, read_json, tiny_adapter, tiny_config

SEED = 1000


def collector_of(n_envs: int, adapter: GoalAdapter | None = None, seed: int = 7, **options) -> Collector:
    return Collector(logged_envs(n_envs, []), adapter or GoalAdapter(), 0.5, seed, **options)


def columns(evaluation: Evaluation) -> dict[str, list]:
    return {name: value.tolist() for name, value in evaluation.to_tensors()[1].items()}


# --- which episodes -------------------------------------------------------------------------------------------


def test_the_set_is_the_start_of_the_walk_and_covers_tasks_before_initial_states():
    num_init_states = {2: 2, 5: 3}
    walk = evaluation_specs(num_init_states, 5)
    assert walk == episode_specs(num_init_states, 0, 5)
    assert [(spec.task_id, spec.init_state_id) for spec in walk] == [(2, 0), (5, 0), (2, 1), (5, 1), (2, 0)]


@pytest.mark.parametrize("n_envs", [1, 3])
def test_fifty_episodes_start_from_each_of_a_tasks_fifty_initial_states_once(n_envs):
    cfg = tiny_config().env
    log: list[list] = []
    walk = evaluation_specs({task: num_init_states(cfg, task) for task in task_ids(cfg)}, 50)
    evaluation = evaluate(Collector(logged_envs(n_envs, log), GoalAdapter(), 0.5, 7), walk)
    assert sorted(episode.start for slot in log for episode in slot) == list(range(50))
    assert evaluation.init_state_id.tolist() == list(range(50))


@pytest.mark.parametrize("n_envs", [1, 2, 4])
def test_outcomes_are_those_of_the_episodes_in_the_order_of_the_list(n_envs):
    evaluation = evaluate(collector_of(n_envs), specs(9, 0, 17))
    steps = evaluation.env_steps.tolist()
    assert steps[0] == steps[2] == LIMIT > steps[1] > 0
    assert columns(evaluation) == {
        "success": [False, True, False],
        "rewards": [0.0, 1.0, 0.0],
        "env_steps": steps,
        "task_id": [0, 0, 0],
        "init_state_id": [9, 0, 17],
    }
    assert evaluation.seconds > 0


# --- the policy as LeRobot runs it ----------------------------------------------------------------------------


def observe(adapter, rows: int) -> dict:
    envs = make_chunk_envs(adapter.run_config.env, rows, adapter.n_action_steps)
    envs.set_attr("init_state_id", list(range(rows)))
    observation, infos = envs.reset(seed=list(range(rows)))
    return adapter.prepare_observation(observation, list(infos["task"]))


def from_seed(rows: int, seed: int = 4) -> list[torch.Generator]:
    """One generator that all rows draw from, as LeRobot draws from torch's own."""
    return [torch.Generator().manual_seed(seed)] * rows


@pytest.mark.parametrize("num_denoising_steps", [2, 5])
@pytest.mark.parametrize("rows", [1, 3])
def test_actions_are_lerobots_bit_for_bit(num_denoising_steps, rows):
    adapter = tiny_adapter(num_denoising_steps=num_denoising_steps)
    batch = observe(adapter, rows)
    torch.manual_seed(4)
    stock = adapter.policy.predict_action_chunk(dict(batch))[:, : adapter.n_action_steps]
    ours = native_actions(adapter, adapter.encode(batch), from_seed(rows))
    assert torch.equal(adapter.environment_actions(ours), adapter.environment_actions(stock))
    # of the whole chunk and of its executed rows, a sigmoid rounds its last bit differently
    torch.testing.assert_close(ours[..., GRIPPER], stock[..., GRIPPER], rtol=0, atol=1e-7)
    ours[..., GRIPPER] = stock[..., GRIPPER]
    assert torch.equal(ours, stock)
    assert not torch.equal(native_actions(adapter, adapter.encode(batch), from_seed(rows, 5)), stock)
    assert not ours.requires_grad


def test_lerobots_sampler_is_not_eulers():
    def net(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x_t) + t[:, None, None]

    x_1 = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    native = flow.sample_native(net, x_1, 2)
    torch.testing.assert_close(native, flow.sample_ode(net, x_1, 2), rtol=0, atol=1e-6)
    assert (flow.sample_native(net, x_1, 5) - flow.sample_ode(net, x_1, 5)).abs().max() > 1e-3


def test_gripper_closes_where_its_logit_is_positive_and_nothing_is_explored():
    adapter = tiny_adapter(gripper="bernoulli_last", gripper_temperature=5.0)
    features = adapter.encode(observe(adapter, 3))
    logits = torch.linspace(-0.2, 0.2, 3 * 8).reshape(3, 8)

    def predict_x0(features: dict, x_t: Tensor, t: Tensor) -> Tensor:
        x_0 = torch.zeros_like(x_t)
        x_0[..., adapter.gripper_index] = logits
        return x_0

    adapter.predict_x0 = predict_x0
    bits = adapter.environment_actions(native_actions(adapter, features, from_seed(3)))[..., -1]
    assert torch.equal(bits, torch.where(logits[:, : adapter.n_action_steps] > 0, 1.0, -1.0))


# --- paired and repeatable ------------------------------------------------------------------------------------


class StartAdapter(GoalAdapter):
    """Writes down the noise that every episode's first chunk is denoised from; ``goal`` makes a policy."""

    def __init__(self, goal: float = 0.1):
        super().__init__()
        self.goal, self.starts = goal, {}

    def predict_x0(self, features: dict, x_t: Tensor, t: Tensor) -> Tensor:
        if t[0] == 1:
            for eef, noise in zip(features["eef"].tolist(), x_t, strict=True):
                self.starts.setdefault(tuple(eef), noise)
        return super().predict_x0(features, x_t, t) * self.goal


def starts(n_envs: int, goal: float = 0.1, seed: int = 7, busy: bool = False) -> dict[tuple, Tensor]:
    """Noise by the position an episode starts in."""
    adapter = StartAdapter(goal)
    collector = collector_of(n_envs, adapter, seed)
    if busy:
        collector.collect(specs(5, 6, 7), 3)
        adapter.starts.clear()
    evaluate(collector, specs(0, 9, 17))
    return dict(list(adapter.starts.items())[:3]) if n_envs == 3 else adapter.starts


def test_every_policy_starts_an_episode_from_the_same_noise_whatever_runs_beside_or_before_it():
    expected = starts(3)
    assert len({tuple(noise.flatten().tolist()) for noise in expected.values()}) == 3
    for other in (starts(3, goal=0.9), starts(1), starts(2), starts(3, busy=True)):
        for eef, noise in expected.items():
            assert torch.equal(other[eef], noise)
    for eef, noise in starts(3, seed=8).items():
        assert not torch.equal(expected[eef], noise)


def test_environments_get_the_episodes_seed():
    log: list[list] = []
    evaluate(Collector(logged_envs(1, log), GoalAdapter(), 0.5, 7), specs(0, 9))
    assert [episode.seed for episode in log[0]] == [evaluation_episode(7, spec).seed for spec in specs(0, 9)]


def test_seeds_differ_between_episodes_and_runs():
    episodes = [evaluation_episode(seed, spec) for seed in range(3) for spec in specs(0, 1, 2)]
    assert len({episode.seed for episode in episodes}) == 9
    assert all(episode.generator.initial_seed() == episode.seed for episode in episodes)


def test_seeds_are_not_those_that_any_policy_version_collects_with():
    evaluations = {evaluation_episode(7, spec).seed for spec in specs(*range(20))}
    collections = {derive_seed(7, version, number) for version in range(100) for number in range(20)}
    assert not evaluations & (collections | {derive_seed(7, number) for number in range(20)})


def test_global_generators_are_neither_read_nor_moved():
    adapter = tiny_adapter()
    envs = make_chunk_envs(adapter.run_config.env, 2, adapter.n_action_steps, 8)
    collector = Collector(envs, adapter, 0.5, 7)
    seen = []
    native, adapter.execute = adapter.execute, lambda x_0, bits: seen.append(x_0) or native(x_0, bits)
    for seed in (1, 2):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)  # noqa: NPY002
        before = (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())  # noqa: NPY002
        evaluate(collector, specs(0, 1, 2))
        assert before == (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())  # noqa: NPY002
    half = len(seen) // 2
    assert half > 1
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))


def test_a_collection_does_not_notice_evaluations():
    collector = collector_of(2)
    evaluate(collector, specs(0, 9, 17))
    rollout = collector.collect(specs(0, 9), 1)
    assert_equal(rollout, collector_of(2).collect(specs(0, 9), 1))


def test_exploration_noise_plays_no_part():
    noisy = evaluate(collector_of(2, GoalAdapter(std=10.0)), specs(0, 9, 17))
    assert columns(noisy) == columns(evaluate(collector_of(2), specs(0, 9, 17)))


# --- light ----------------------------------------------------------------------------------------------------


class WatchedAdapter(GoalAdapter):
    """Counts encoded observations and the features of earlier ones that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.refs: list[weakref.ref] = []
        self.alive: list[int] = []

    def encode(self, batch: dict) -> dict[str, Tensor]:
        self.alive.append(sum(ref() is not None for ref in self.refs))
        features = super().encode(batch)
        self.refs += [weakref.ref(features["eef"])]
        return features


def test_no_features_are_kept_and_no_final_observation_is_encoded():
    adapter, episodes = WatchedAdapter(), []

    def make_episode(spec: EpisodeSpec) -> Episode:
        episodes.append(evaluation_episode(7, spec))
        return episodes[-1]

    chunks = []
    evaluate(
        collector_of(1, adapter), specs(9, 17, 33), make_episode, lambda *numbers: chunks.append(numbers)
    )
    assert len(adapter.refs) == len(chunks) == 9
    # those of the chunk before
    assert max(adapter.alive) == 1
    assert all(episode.rows == [] and episode.final_features is None for episode in episodes)


def test_progress_is_reported_to_the_evaluations_own_callback_or_the_collectors():
    own, collectors = [], []
    collector = collector_of(1, on_progress=lambda *numbers: collectors.append(numbers))
    evaluate(collector, specs(0, 9), on_progress=lambda *numbers: own.append(numbers))
    assert (own[-1], collectors) == ((2, 1), [])
    evaluate(collector, specs(0, 9))
    assert collectors == own


# --- what is reported and sent --------------------------------------------------------------------------------


def example(**changes) -> Evaluation:
    values = {
        "success": torch.tensor([True, False, True]),
        "rewards": torch.tensor([1.0, 0.0, 2.0]),
        "env_steps": torch.tensor([3, 10, 5]),
        "task_id": torch.tensor([4, 7, 4]),
        "init_state_id": torch.tensor([0, 0, 1]),
        "seconds": 2.5,
    }
    return Evaluation(**values | changes)


def test_logged_numbers():
    assert example().to_log_dict() == pytest.approx(
        {
            "eval/success_rate": 2 / 3,
            "eval/success_rate_task4": 1.0,
            "eval/success_rate_task7": 0.0,
            "eval/reward_mean": 1.0,
            "eval/episode_length": 6.0,
            "time/eval_s": 2.5,
        }
    )


def test_an_evaluation_crosses_the_wire():
    sent = evaluate(collector_of(2), specs(0, 9, 17))
    header, tensors = sent.to_tensors()
    message = decode(encode(Message("rollout", header, tensors)))
    received = Evaluation.from_tensors(message.header, message.tensors)
    assert columns(received) == columns(sent)
    assert received.seconds == sent.seconds
    assert received.to_log_dict() == sent.to_log_dict()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rewards": torch.tensor([1.0, float("nan"), 0.0])}, "rewards holds a number that is not finite"),
        ({"rewards": torch.zeros(3, dtype=torch.float64)}, "rewards is torch.float64"),
        (
            {"env_steps": torch.tensor([1, 2])},
            r"env_steps is torch.int64 of shape \(2,\), but 3 episodes need",
        ),
        ({"task_id": torch.zeros(3, 1, dtype=torch.int64)}, r"task_id is torch.int64 of shape \(3, 1\)"),
        ({"success": torch.tensor([1, 0, 1])}, "success is torch.int64 .* need torch.bool"),
        ({"success": torch.tensor([], dtype=torch.bool)}, r"success has shape \(0,\)"),
        ({"success": torch.tensor(True)}, r"success has shape \(\)"),
        ({"seconds": None}, "seconds is None instead of a number"),
        ({"seconds": float("inf")}, "seconds is inf instead of a number"),
        ({"seconds": 10**400}, "seconds is 1000"),
        ({"seconds": True}, "seconds is True instead of a number"),
    ],
)
def test_a_received_evaluation_that_makes_no_sense_is_refused(changes, words):
    with pytest.raises(ValueError, match=words) as error:
        Evaluation.from_tensors(*example(**changes).to_tensors())
    assert "\n" not in str(error.value)


def test_missing_tensors_are_named():
    header, tensors = example().to_tensors()
    del tensors["success"], tensors["env_steps"]
    with pytest.raises(ValueError, match="no tensor env_steps, success; update the actor's package"):
        Evaluation.from_tensors(header, tensors)


# --- parity with lerobot-eval ---------------------------------------------------------------------------------


def stock_episode(generator: torch.Generator, seed: int = SEED):
    """Return what gives an episode LeRobot's seeds: the environment's count up, all noise is one stream."""
    return lambda spec: Episode(spec, seed + spec.number, generator)


def replayed(collector: Collector, state: Tensor, count: int, seed: int = SEED) -> Evaluation:
    """Run the first episodes on the stream that starts in this state of torch's generator."""
    generator = torch.Generator()
    generator.set_state(state)
    return evaluate(collector, evaluation_specs({0: 50}, count), stock_episode(generator, seed))


@pytest.fixture(scope="module")
def tabletop():
    """The adapter of the tabletop run's policy, untrained, and torch's generator after building it."""
    cfg = PiRLTrainConfig.from_pretrained(CONFIGS / "pirl_tabletop.json", cli_args=[])
    assert cfg.seed == SEED
    with torch.random.fork_rng():
        adapter = make_adapter(cfg)
        state = torch.get_rng_state()
    adapter.run_config = cfg
    return adapter, state


def record_actions(envs) -> list[np.ndarray]:
    """Return the list in which a vector environment's actions will be."""
    actions, step = [], envs.step
    envs.step = lambda action: actions.append(np.array(action)) or step(action)
    return actions


def test_an_episode_moves_exactly_as_in_lerobots_rollout(tabletop):
    from lerobot.scripts.lerobot_eval import rollout

    adapter, state = tabletop
    pipelines = adapter.processors
    stock_envs = adapter.run_config.env.create_envs(1)["reach"][0]
    envs = make_chunk_envs(adapter.run_config.env, 1, adapter.n_action_steps)
    ours = record_actions(envs)
    with torch.random.fork_rng():
        torch.set_rng_state(state)
        result = rollout(
            stock_envs,
            adapter.policy,
            pipelines.env_pre,
            pipelines.env_post,
            pipelines.policy_pre,
            pipelines.policy_post,
            seeds=[SEED],
        )
    evaluation = replayed(Collector(envs, adapter, 0.5, 7), state, 1)
    stock = result["action"][0].numpy()
    assert evaluation.env_steps.tolist() == [len(stock)]
    assert evaluation.success.tolist() == result["success"].any(dim=1).tolist()
    np.testing.assert_array_equal(np.concatenate(ours, axis=1)[0, : len(stock)], stock)
    np.testing.assert_array_equal(stock_envs.envs[0].unwrapped.state.eef, envs.envs[0].env.state.eef)


def test_outcomes_are_lerobots_where_the_environments_seed_makes_the_initial_state(tabletop):
    from lerobot.scripts.lerobot_eval import eval_policy

    adapter, state = tabletop
    pipelines, count = adapter.processors, 20
    cfg = PiRLTrainConfig.from_pretrained(
        CONFIGS / "pirl_tabletop.json", cli_args=["--env.init_states=false"]
    ).env
    with torch.random.fork_rng():
        torch.set_rng_state(state)
        info = eval_policy(
            cfg.create_envs(1)["reach"][0],
            adapter.policy,
            pipelines.env_pre,
            pipelines.env_post,
            pipelines.policy_pre,
            pipelines.policy_post,
            count,
            start_seed=SEED,
        )
    stock = [(episode["success"], episode["sum_reward"]) for episode in info["per_episode"]]
    collector = Collector(make_chunk_envs(cfg, 1, adapter.n_action_steps), adapter, 0.5, 7)

    def outcomes(seed: int) -> list[tuple[bool, float]]:
        evaluation = replayed(collector, state, count, seed)
        return list(zip(evaluation.success.tolist(), evaluation.rewards.tolist(), strict=True))

    assert 0 < sum(success for success, _ in stock) < count
    assert outcomes(SEED) == stock
    assert outcomes(SEED + count) != stock


@pytest.mark.e2e
@pytest.mark.slow
def test_a_checkpoints_outcomes_are_those_that_lerobot_eval_reports(tabletop, tmp_path):
    adapter, _ = tabletop
    folder, count = tmp_path / "pretrained_model", 50
    for part in (adapter.policy, adapter.processors.policy_pre, adapter.processors.policy_post):
        part.save_pretrained(folder)
    check_run(
        Path(sys.executable).parent / "lerobot-eval",
        f"--policy.path={folder}",
        *("--policy.device=cpu", "--env.type=tabletop", "--env.discover_packages_path=lerobot_pirl.envs"),
        *(f"--seed={SEED}", "--eval.batch_size=1", f"--eval.n_episodes={count}"),
        f"--output_dir={tmp_path / 'eval'}",
        cwd=REPO,
    )
    metrics = read_json(tmp_path / "eval" / "eval_info.json")["per_task"][0]["metrics"]

    def outcomes(seed: int) -> tuple[list[bool], list[float]]:
        cfg = copy.deepcopy(adapter.run_config)
        cfg.seed, cfg.policy.pretrained_path = seed, folder
        with torch.random.fork_rng():
            loaded = make_adapter(cfg)
            state = torch.get_rng_state()
        envs = make_chunk_envs(cfg.env, 1, loaded.n_action_steps)
        evaluation = replayed(Collector(envs, loaded, 0.5, 7), state, count, seed)
        return evaluation.success.tolist(), evaluation.rewards.tolist()

    assert 0 < sum(metrics["successes"]) < count
    assert outcomes(SEED) == (metrics["successes"], metrics["sum_rewards"])
    assert outcomes(SEED + 1) != (metrics["successes"], metrics["sum_rewards"])
