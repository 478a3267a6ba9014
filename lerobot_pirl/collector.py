"""The only place that steps environments for learning and evaluation: vector environments + policy -> Rollout."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from lerobot_pirl.episodes import Episode, EpisodeSpec, assemble, record, split_rows
from lerobot_pirl.policies.base import Features, PolicyAdapter, sample_actions
from lerobot_pirl.rollout import Rollout, derive_seed


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


# (features of B observations, B generators) -> policy actions [B, A, D] and what to keep of each, or None
Act = Callable[[Features, list[torch.Generator]], tuple[Tensor, list[dict[str, Any]] | None]]
Progress = Callable[[int, int], None]
# the episode that ran in a free environment before, if any -> the next one for it, if any
Take = Callable[[Episode | None], Episode | None]
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
        # of the present or the last run
        self.seconds: dict[str, float] = {}

    def collect(self, specs: list[EpisodeSpec], policy_version: int, noise_scale: float = 1.0) -> Rollout:
        """Run the episodes with the policy as it is; finished environments take the next one in the list.

        Args:
            specs: the episodes.
            policy_version: version of the policy's weights.
            noise_scale: see :func:`lerobot_pirl.policies.base.sample_actions`.
        """
        started = time.perf_counter()
        episodes = [self.episode(spec, policy_version) for spec in specs]
        self.explore(_taking(episodes), noise_scale)
        rollout = assemble(episodes, policy_version)
        rollout.stats |= self.seconds | {"collect_s": time.perf_counter() - started}
        return rollout

    def episode(self, spec: EpisodeSpec, policy_version: int) -> Episode:
        """Return a fresh episode, seeded for a policy version."""
        return Episode(spec, derive_seed(self.seed, policy_version, spec.number))

    def explore(
        self, take: Take, noise_scale: float, on_end: Callable[[Episode], None] | None = None
    ) -> None:
        """Run episodes with the policy as it is, and keep their rows, until there is none left.

        Args:
            take: gives the next episode to an environment that is free; asked again after every chunk.
            noise_scale: see :func:`lerobot_pirl.policies.base.sample_actions`.
            on_end: called with every episode that has ended.
        """

        def act(features: Features, generators: list[torch.Generator]) -> tuple[Tensor, list[dict[str, Any]]]:
            sample = sample_actions(self.adapter, features, self.last_step_prob, generators, noise_scale)
            return sample.actions, split_rows(features, sample)

        self._run(take, act, on_end=on_end)

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
        self._run(_taking(episodes), act, on_progress, watch)

    def _run(
        self,
        take: Take,
        act: Act,
        on_progress: Progress | None = None,
        watch: Watch | None = None,
        on_end: Callable[[Episode], None] | None = None,
    ) -> None:
        on_progress = on_progress or self.on_progress
        self.seconds = {"env_s": 0.0, "inference_s": 0.0}
        finished = successes = 0
        slots: list[Episode | None] = [None] * self.envs.num_envs
        observation = self._start_episodes(slots, take, None)
        while active := [i for i, episode in enumerate(slots) if episode is not None and not episode.done]:
            _show(watch, slots, active, observation)
            with self._timed("inference_s"):
                features = self._encode(observation, active)
                chosen, rows = act(features, [slots[i].generator for i in active])
                actions = self._environment_actions(chosen, active)
            with self._timed("env_s"):
                observation, rewards, _, _, infos = self.envs.step(actions)
            for i, row in zip(active, rows or [None] * len(active), strict=True):
                record(slots[i], row, float(rewards[i]), {name: values[i] for name, values in infos.items()})
            ended = [i for i in active if slots[i].done]
            _show(watch, slots, ended, observation)
            truncated = [i for i in active if infos["truncated"][i]]
            if rows and truncated:
                with self._timed("inference_s"):
                    self._keep_final_features(slots, truncated, observation)
            for episode in (slots[i] for i in ended):
                finished, successes = finished + 1, successes + episode.success
                if on_end:
                    on_end(episode)
            observation = self._start_episodes(slots, take, observation)
            on_progress(finished, successes)

    def _start_episodes(self, slots: list[Episode | None], take: Take, observation: Any | None) -> Any:
        """Start the next episodes in free slots and return the observation of all slots."""
        mask = np.zeros(len(slots), dtype=bool)
        for i, previous in enumerate(slots):
            if (previous is None or previous.done) and (fresh := take(previous)):
                slots[i] = fresh
                mask[i] = True
        if not mask.any():
            return observation
        # the first reset covers every slot, also one for which there is no episode, and which stands still
        episodes = [slot or slots[0] for slot in slots]
        options = None if observation is None else {"reset_mask": mask}
        with self._timed("env_s"):
            self.envs.set_attr("task_id", [episode.spec.task_id for episode in episodes])
            self.envs.set_attr("init_state_id", [episode.spec.init_state_id for episode in episodes])
            self.envs.set_attr("idle", [slot is None for slot in slots])
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
        self.seconds[name] += time.perf_counter() - started


def next_of(waiting: list[EpisodeSpec], previous: Episode | None) -> int:
    """Return the position of the first episode of the previous one's task, else 0: a new task costs a build."""
    tasks = [spec.task_id for spec in waiting]
    task_id = previous.spec.task_id if previous else None
    return tasks.index(task_id) if task_id in tasks else 0


def _taking(episodes: list[Episode]) -> Take:
    waiting = list(episodes)

    def take(previous: Episode | None) -> Episode | None:
        return waiting.pop(next_of([e.spec for e in waiting], previous)) if waiting else None

    return take


def _show(watch: Watch | None, slots: list[Episode | None], shown: list[int], observation: Any) -> None:
    if watch is not None:
        for i in shown:
            watch(slots[i], _select(observation, i))


def _select(observation: Any, slots: list[int] | int) -> Any:
    if isinstance(observation, dict):
        return {key: _select(value, slots) for key, value in observation.items()}
    return observation[slots]
