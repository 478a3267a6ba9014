"""An episode: which one, what is kept of it while it runs, and the rollout that it leaves behind."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lerobot_pirl.policies.base import ActionSample, Features
from lerobot_pirl.rollout import Rollout


@dataclass(frozen=True)
class EpisodeSpec:
    """Which episode to run: its number in the walk, a task and one of its initial states."""

    number: int
    task_id: int
    init_state_id: int


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
        gripper_flips: sum over the chunks of the share of gripper commands that were drawn against the policy's choice.
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
    gripper_flips: float = 0.0

    def __post_init__(self) -> None:
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(self.seed)


def split_rows(features: Features, sample: ActionSample) -> list[dict[str, Any]]:
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
        flips = float(sample.gripper_flips[i])
        return {"features": kept, "gripper_flips": flips} | {
            name: value[i : i + 1] for name, value in decision.items()
        }

    return [row(i) for i in range(len(sample.log_prob))]


def record(episode: Episode, row: dict[str, Any] | None, reward: float, info: dict[str, Any]) -> None:
    """Account for an executed chunk in its episode, and add its row where there is one."""
    terminated = bool(info["terminated"])
    if row is not None:
        episode.gripper_flips += row.pop("gripper_flips")
        outcome = {"rewards": torch.tensor([reward]), "terminated": torch.tensor([terminated])}
        episode.rows.append(row | outcome)
    episode.rewards += reward
    episode.env_steps += int(info["n_steps"])
    episode.success = bool(info["is_success"])
    episode.done = terminated or bool(info["truncated"])


def assemble(episodes: list[Episode], policy_version: int) -> Rollout:
    """Return what was kept of episodes that have ended."""
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
        stats={"gripper_flips": sum(episode.gripper_flips for episode in episodes)},
    )
