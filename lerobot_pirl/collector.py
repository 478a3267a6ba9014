"""The only place that steps environments for learning and evaluation: vector environments + policy -> Rollout."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from lerobot_pirl.policies.base import ActionSample, Features, PolicyAdapter, sample_actions
from lerobot_pirl.rollout import Rollout, derive_seed


@dataclass(frozen=True)
class EpisodeSpec:
    """Which episode to run: its number in the walk, a task and one of its initial states."""

    number: int
    task_id: int
    init_state_id: int


def episode_specs(
    num_init_states: dict[int, int], start: int, count: int, group_size: int = 1
) -> list[EpisodeSpec]:
    """Return episodes ``start`` to ``start + count`` of the walk over all tasks and their initial states.

    Tasks change fastest; after the last initial state the walk starts again. With groups, each place of the walk is
    visited by ``group_size`` episodes in a row. Being a function of the episode's number alone, it needs no state to
    resume.
    """
    task_ids = list(num_init_states)
    specs = []
    for number in range(start, start + count):
        place = number // group_size
        task_id = task_ids[place % len(task_ids)]
        specs.append(EpisodeSpec(number, task_id, place // len(task_ids) % num_init_states[task_id]))
    return specs


@dataclass(eq=False)
class Episode:
    """An episode to run, and what has become of it.

    Attributes:
        spec: which one.
        seed: of the environment's reset.
        generator: of everything the policy draws; not given, it has the same seed.
        rows: what was kept of every executed chunk.
        final_features: of the last observation of a truncated episode, where rows are kept.
        rewards: their sum.
    """

    spec: EpisodeSpec
    seed: int
    generator: torch.Generator | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    final_features: Features | None = None
    done: bool = False
    success: bool = False
    rewards: float = 0.0
    env_steps: int = 0

    def __post_init__(self) -> None:
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(self.seed)


# (features of B observations, B generators) -> policy actions [B, A, D] and what to keep of each, or None
Act = Callable[[Features, list[torch.Generator]], tuple[Tensor, list[dict[str, Any]] | None]]
Progress = Callable[[int, int], None]
# an episode and what the policy is about to see of it, or the observation in which it has ended
Watch = Callable[[Episode, dict[str, Any]], None]


class Collector:
    """Steps a vector environment with a policy, a chunk at a time."""

    def __init__(
        self,
        envs: gym.vector.VectorEnv,
        adapter: PolicyAdapter,
        last_step_prob: float,
        seed: int,
        on_progress: Progress | None = None,
    ) -> None:
        """Keep hold of the environments.

        Args:
            envs: vector of :class:`lerobot_pirl.envs.chunk.ChunkEnv`, autoreset disabled.
            adapter: the policy.
            last_step_prob: see :class:`lerobot_pirl.options.PiRLConfig`.
            seed: seed of the run; noise and environment of an episode follow from it, the policy's version and
                the episode's number, and from nothing that runs beside it.
            on_progress: called with (finished episodes, successes) after every chunk.
        """
        self.envs = envs
        self.adapter = adapter
        self.last_step_prob = last_step_prob
        self.seed = seed
        self.on_progress = on_progress or (lambda finished, successes: None)
        self.tasks = [""] * envs.num_envs
        self._seconds: dict[str, float] = {}

    def collect(self, specs: list[EpisodeSpec], policy_version: int, noise_scale: float = 1.0) -> Rollout:
        """Run the episodes with the policy as it is; finished environments take the next one in the list.

        Args:
            specs: the episodes.
            policy_version: version of the policy's weights.
            noise_scale: see :func:`lerobot_pirl.policies.base.sample_actions`.
        """
        started = time.perf_counter()
        episodes = [Episode(spec, derive_seed(self.seed, policy_version, spec.number)) for spec in specs]
        gripper_flips = 0.0

        def act(features: Features, generators: list[torch.Generator]) -> tuple[Tensor, list[dict[str, Any]]]:
            nonlocal gripper_flips
            sample = sample_actions(self.adapter, features, self.last_step_prob, generators, noise_scale)
            gripper_flips += float(sample.gripper_flips.sum())
            return sample.actions, _split_rows(features, sample)

        self.run(episodes, act)
        rollout = _assemble(episodes, policy_version)
        elapsed = time.perf_counter() - started
        rollout.stats = self._seconds | {"collect_s": elapsed, "gripper_flips": gripper_flips}
        return rollout

    def run(
        self,
        episodes: list[Episode],
        act: Act,
        on_progress: Progress | None = None,
        watch: Watch | None = None,
    ) -> None:
        """Run the episodes to their ends, with what ``act`` does, and write in them what became of them.

        Args:
            episodes: fresh ones; finished environments take the next one in the list.
            act: chooses the actions. Where it keeps nothing, nothing of an episode stays in memory.
            on_progress: in place of the collector's own.
            watch: sees every observation; the next one may overwrite it.
        """
        on_progress = on_progress or self.on_progress
        self._seconds = {"env_s": 0.0, "inference_s": 0.0}
        waiting = list(episodes)
        slots: list[Episode | None] = [None] * self.envs.num_envs
        observation = self._start_episodes(slots, waiting, None)
        while not all(episode.done for episode in episodes):
            active = [i for i, episode in enumerate(slots) if episode is not None and not episode.done]
            _show(watch, slots, active, observation)
            with self._timed("inference_s"):
                features = self._encode(observation, active)
                chosen, rows = act(features, [slots[i].generator for i in active])
                actions = self._environment_actions(chosen, active)
            with self._timed("env_s"):
                observation, rewards, _, _, infos = self.envs.step(actions)
            for i, row in zip(active, rows or [None] * len(active), strict=True):
                _record(slots[i], row, float(rewards[i]), {name: values[i] for name, values in infos.items()})
            _show(watch, slots, [i for i in active if slots[i].done], observation)
            truncated = [i for i in active if infos["truncated"][i]]
            if rows and truncated:
                with self._timed("inference_s"):
                    self._keep_final_features(slots, truncated, observation)
            observation = self._start_episodes(slots, waiting, observation)
            on_progress(sum(e.done for e in episodes), sum(e.success for e in episodes))

    def _start_episodes(
        self, slots: list[Episode | None], waiting: list[Episode], observation: Any | None
    ) -> Any:
        """Start waiting episodes in free slots and return the observation of all slots."""
        mask = np.zeros(len(slots), dtype=bool)
        for i, previous in enumerate(slots):
            if waiting and (previous is None or previous.done):
                slots[i] = _take(waiting, previous)
                mask[i] = True
        if not mask.any():
            return observation
        # the first reset covers every slot, also one for which there is no episode
        episodes = [slot or slots[0] for slot in slots]
        options = None if observation is None else {"reset_mask": mask}
        with self._timed("env_s"):
            self.envs.set_attr("task_id", [episode.spec.task_id for episode in episodes])
            self.envs.set_attr("init_state_id", [episode.spec.init_state_id for episode in episodes])
            observation, infos = self.envs.reset(seed=[episode.seed for episode in episodes], options=options)
        for i in np.flatnonzero(mask):
            self.tasks[i] = infos["task"][i]
        return observation

    def _encode(self, observation: Any, slots: list[int]) -> Features:
        selected = _select(observation, slots)
        batch = self.adapter.prepare_observation(selected, [self.tasks[i] for i in slots])
        return self.adapter.encode(batch)

    def _environment_actions(self, chosen: Tensor, active: list[int]) -> np.ndarray:
        """Return actions of all slots; those without an episode ignore theirs."""
        actions = self.adapter.environment_actions(chosen).numpy()
        padded = np.zeros((self.envs.num_envs, *actions.shape[1:]), dtype=np.float32)
        padded[active] = actions
        return padded

    def _keep_final_features(
        self, slots: list[Episode | None], truncated: list[int], observation: Any
    ) -> None:
        """Encode the observations in which episodes ran out of time, before their slots are reset."""
        features = self._encode(observation, truncated)
        for row, i in enumerate(truncated):
            slots[i].final_features = {name: value[row : row + 1].cpu() for name, value in features.items()}

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - started


def _take(waiting: list[Episode], previous: Episode | None) -> Episode:
    """Remove and return the first episode of the previous one's task, else the first: a new task costs a build."""
    same = [e for e in waiting if previous is not None and e.spec.task_id == previous.spec.task_id]
    episode = (same or waiting)[0]
    waiting.remove(episode)
    return episode


def _show(watch: Watch | None, slots: list[Episode | None], shown: list[int], observation: Any) -> None:
    if watch is not None:
        for i in shown:
            watch(slots[i], _select(observation, i))


def _select(observation: Any, slots: list[int] | int) -> Any:
    if isinstance(observation, dict):
        return {key: _select(value, slots) for key, value in observation.items()}
    return observation[slots]


def _split_rows(features: Features, sample: ActionSample) -> list[dict[str, Any]]:
    """Return a row per sample, on the CPU, every tensor with a batch axis of 1."""
    features = {name: value.cpu() for name, value in features.items()}
    decision = {
        "chain": sample.chain.cpu(),
        "step_index": sample.step_index.cpu(),
        "gripper": sample.gripper.cpu(),
        "log_prob": sample.log_prob.cpu(),
    }

    def row(i: int) -> dict[str, Any]:
        kept = {name: value[i : i + 1] for name, value in features.items()}
        return {"features": kept} | {name: value[i : i + 1] for name, value in decision.items()}

    return [row(i) for i in range(len(sample.log_prob))]


def _record(episode: Episode, row: dict[str, Any] | None, reward: float, info: dict[str, Any]) -> None:
    """Account for an executed chunk in its episode, and add its row where there is one."""
    terminated = bool(info["terminated"])
    if row is not None:
        outcome = {"rewards": torch.tensor([reward]), "terminated": torch.tensor([terminated])}
        episode.rows.append(row | outcome)
    episode.rewards += reward
    episode.env_steps += int(info["n_steps"])
    episode.success = bool(info["is_success"])
    episode.done = terminated or bool(info["truncated"])


def _assemble(episodes: list[Episode], policy_version: int) -> Rollout:
    rows = [row for episode in episodes for row in episode.rows]
    finals = [episode.final_features for episode in episodes if episode.final_features is not None]
    names = list(rows[0]["features"])

    def per_episode(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64)

    def final(name: str) -> Tensor:
        return torch.cat([part[name] for part in finals]) if finals else rows[0]["features"][name][:0]

    return Rollout(
        policy_version=policy_version,
        features={name: torch.cat([row["features"][name] for row in rows]) for name in names},
        final_features={name: final(name) for name in names},
        **{key: torch.cat([row[key] for row in rows]) for key in rows[0] if key != "features"},
        episode_lengths=per_episode([len(episode.rows) for episode in episodes]),
        task_id=per_episode([episode.spec.task_id for episode in episodes]),
        init_state_id=per_episode([episode.spec.init_state_id for episode in episodes]),
        success=torch.tensor([episode.success for episode in episodes]),
        env_steps=per_episode([episode.env_steps for episode in episodes]),
    )
