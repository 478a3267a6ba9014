"""The only place that steps environments for learning: vector environments + policy -> Rollout."""

import time
from collections.abc import Callable, Iterator
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
    """Which episode to run: a task and one of its initial states."""

    task_id: int
    init_state_id: int


def episode_specs(num_init_states: dict[int, int], start: int, count: int) -> list[EpisodeSpec]:
    """Return episodes ``start`` to ``start + count`` of the walk over all tasks and their initial states.

    Tasks change fastest; after the last initial state the walk starts again. Being a function of the episode's
    number alone, it needs no state to resume.
    """
    task_ids = list(num_init_states)
    specs = []
    for number in range(start, start + count):
        task_id = task_ids[number % len(task_ids)]
        specs.append(EpisodeSpec(task_id, number // len(task_ids) % num_init_states[task_id]))
    return specs


@dataclass
class _Episode:
    """Rows of one running episode."""

    spec: EpisodeSpec
    rows: list[dict[str, Any]] = field(default_factory=list)
    final_features: Features | None = None
    success: bool = False
    env_steps: int = 0


class Collector:
    """Steps a vector environment with a policy, a chunk at a time."""

    def __init__(
        self,
        envs: gym.vector.VectorEnv,
        adapter: PolicyAdapter,
        last_step_prob: float,
        seed: int,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Keep hold of the environments.

        Args:
            envs: vector of :class:`lerobot_pirl.envs.chunk.ChunkEnv`, autoreset disabled.
            adapter: the policy.
            last_step_prob: see :class:`lerobot_pirl.config.PiRLConfig`.
            seed: seed of the run; noise and environments of an iteration follow from it and the version.
            on_progress: called with (finished episodes, successes) after every chunk.
        """
        self.envs = envs
        self.adapter = adapter
        self.last_step_prob = last_step_prob
        self.seed = seed
        self.on_progress = on_progress or (lambda finished, successes: None)
        self.tasks = [""] * envs.num_envs

    def collect(self, specs: list[EpisodeSpec], policy_version: int) -> Rollout:
        """Run the episodes with the policy as it is; finished environments take the next one in the list."""
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(derive_seed(self.seed, policy_version))
        seconds = {"env_s": 0.0, "inference_s": 0.0}
        slots: list[_Episode | None] = [None] * self.envs.num_envs
        pending = iter(specs)
        episodes: list[_Episode] = []
        observation = self._fill(slots, pending, episodes, None, seconds)
        finished = successes = 0
        flips: list[float] = []
        while any(slots):
            active = [i for i, episode in enumerate(slots) if episode is not None]
            clock = time.perf_counter()
            features = self._encode(observation, active)
            sample = sample_actions(self.adapter, features, self.last_step_prob, generator)
            actions = self._actions(sample, active)
            seconds["inference_s"] += time.perf_counter() - clock
            flips += sample.gripper_flips.tolist()
            clock = time.perf_counter()
            observation, rewards, _, _, infos = self.envs.step(actions)
            seconds["env_s"] += time.perf_counter() - clock
            out_of_time = []
            for row, i in enumerate(active):
                episode = slots[i]
                terminated = bool(infos["terminated"][i])
                episode.rows.append(_row(features, sample, row, rewards[i], terminated))
                episode.env_steps += int(infos["n_steps"][i])
                if terminated or infos["truncated"][i]:
                    episode.success = bool(infos["is_success"][i])
                    finished += 1
                    successes += episode.success
                    slots[i] = None
                    if not terminated:
                        out_of_time.append((i, episode))
            if out_of_time:
                clock = time.perf_counter()
                final = self._encode(observation, [i for i, _ in out_of_time])
                for j, (_, episode) in enumerate(out_of_time):
                    episode.final_features = {name: value[j : j + 1].cpu() for name, value in final.items()}
                seconds["inference_s"] += time.perf_counter() - clock
            observation = self._fill(slots, pending, episodes, observation, seconds)
            self.on_progress(finished, successes)
        rollout = _assemble(episodes, policy_version)
        rollout.stats = seconds | {
            "collect_s": time.perf_counter() - started,
            "gripper_flips": float(np.sum(flips)),
        }
        return rollout

    def _fill(
        self,
        slots: list[_Episode | None],
        pending: Iterator[EpisodeSpec],
        episodes: list[_Episode],
        observation: Any,
        seconds: dict[str, float],
    ) -> Any:
        """Start the next episodes in free slots and return the observation of all slots."""
        mask = np.zeros(len(slots), dtype=bool)
        for i, episode in enumerate(slots):
            if episode is not None:
                continue
            spec = next(pending, None)
            if spec is None:
                continue
            slots[i] = _Episode(spec)
            episodes.append(slots[i])
            mask[i] = True
        first = observation is None
        if not mask.any():
            return observation
        clock = time.perf_counter()
        # a slot without an episode of its own keeps the spec it has; the first reset must cover all slots
        self._set_specs([slot.spec if slot else None for slot in slots], mask)
        seeds = [derive_seed(self.seed, *_key(slot)) for slot in slots]
        options = None if first else {"reset_mask": mask}
        observation, _ = self.envs.reset(seed=seeds, options=options)
        descriptions = self.envs.get_attr("task_description")
        self.tasks = [str(description) for description in descriptions]
        seconds["env_s"] += time.perf_counter() - clock
        return observation

    def _set_specs(self, specs: list[EpisodeSpec | None], mask: np.ndarray) -> None:
        for name in ("task_id", "init_state_id"):
            current = list(self.envs.get_attr(name))
            wanted = [
                getattr(spec, name) if chosen and spec is not None else old
                for spec, chosen, old in zip(specs, mask, current, strict=True)
            ]
            self.envs.set_attr(name, wanted)

    def _encode(self, observation: Any, rows: list[int]) -> Features:
        selected = _select(observation, rows)
        batch = self.adapter.prepare_observation(selected, [self.tasks[i] for i in rows])
        return self.adapter.encode(batch)

    def _actions(self, sample: ActionSample, active: list[int]) -> np.ndarray:
        actions = self.adapter.environment_actions(sample.actions).numpy()
        full = np.zeros((self.envs.num_envs, *actions.shape[1:]), dtype=np.float32)
        full[active] = actions
        return full


def _key(episode: _Episode | None) -> tuple[int, int]:
    return (episode.spec.task_id, episode.spec.init_state_id) if episode else (0, 0)


def _select(observation: Any, rows: list[int]) -> Any:
    if isinstance(observation, dict):
        return {key: _select(value, rows) for key, value in observation.items()}
    return observation[rows]


def _row(
    features: Features, sample: ActionSample, row: int, reward: float, terminated: bool
) -> dict[str, Any]:
    return {
        "features": {name: value[row : row + 1].cpu() for name, value in features.items()},
        "chain": sample.chain[row : row + 1].cpu(),
        "step_index": sample.step_index[row : row + 1].cpu(),
        "gripper": sample.gripper[row : row + 1].cpu(),
        "log_prob": sample.log_prob[row : row + 1].cpu(),
        "rewards": torch.tensor([float(reward)]),
        "terminated": torch.tensor([bool(terminated)]),
    }


def _assemble(episodes: list[_Episode], policy_version: int) -> Rollout:
    rows = [row for episode in episodes for row in episode.rows]
    finals = [episode.final_features for episode in episodes if episode.final_features is not None]
    names = list(rows[0]["features"])

    def stacked(key: str) -> Tensor:
        return torch.cat([row[key] for row in rows])

    def per_episode(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64)

    def final(name: str) -> Tensor:
        return torch.cat([part[name] for part in finals]) if finals else rows[0]["features"][name][:0]

    return Rollout(
        policy_version=policy_version,
        features={name: torch.cat([row["features"][name] for row in rows]) for name in names},
        final_features={name: final(name) for name in names},
        **{key: stacked(key) for key in rows[0] if key != "features"},
        episode_lengths=per_episode([len(episode.rows) for episode in episodes]),
        task_id=per_episode([episode.spec.task_id for episode in episodes]),
        init_state_id=per_episode([episode.spec.init_state_id for episode in episodes]),
        success=torch.tensor([episode.success for episode in episodes]),
        env_steps=per_episode([episode.env_steps for episode in episodes]),
    )
