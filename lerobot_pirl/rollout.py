"""What one iteration's collection leaves behind: a row per executed chunk, ordered by episode."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lerobot_pirl.ppo import compute_gae
from lerobot_pirl.rules import is_finite, shown

# of the seconds and counts that an actor sends
MAX_STAT = 1e12
# per row of a rollout, with type and number of axes; features come on top, with a prefix
_ROW_FIELDS = {
    "chain": (torch.float32, 4),
    "step_index": (torch.int64, 2),
    "gripper": (torch.uint8, 2),
    "log_prob": (torch.float32, 2),
    "rewards": (torch.float32, 1),
    "terminated": (torch.bool, 1),
}
_EPISODE_FIELDS = {
    "episode_lengths": (torch.int64, 1),
    "task_id": (torch.int64, 1),
    "init_state_id": (torch.int64, 1),
    "success": (torch.bool, 1),
    "env_steps": (torch.int64, 1),
}


def derive_seed(*keys: int) -> int:
    """Return a seed below 2**31 that depends on every key, for example (run seed, iteration)."""
    # the count tells (1, 2) from (1, 2, 0), which numpy pads alike
    return int(np.random.SeedSequence((len(keys), *keys)).generate_state(1)[0] >> 1)


@dataclass
class Rollout:
    """Episodes collected with one version of the policy.

    ``N`` executed chunks (rows) of ``E`` episodes; rows of an episode are consecutive and in order.

    Attributes:
        policy_version: version of the weights that acted.
        features: what the policy's trainable part reads, each ``[N, ...]``.
        final_features: the same for the last observation of every truncated episode, in episode order, each
            ``[M, ...]``.
        chain, step_index, gripper, log_prob: see :class:`lerobot_pirl.policies.base.ActionSample`, ``[N, ...]``.
        rewards: float32 ``[N]``, 1 for the chunk in which the episode first succeeded.
        terminated: bool ``[N]``, the episode ended in this chunk for good (success).
        episode_lengths: chunks per episode, int64 ``[E]``.
        task_id, init_state_id, env_steps: int64 ``[E]``.
        success: bool ``[E]``.
        stats: seconds and counters of the collection.
    """

    policy_version: int
    features: dict[str, Tensor]
    final_features: dict[str, Tensor]
    chain: Tensor
    step_index: Tensor
    gripper: Tensor
    log_prob: Tensor
    rewards: Tensor
    terminated: Tensor
    episode_lengths: Tensor
    task_id: Tensor
    init_state_id: Tensor
    success: Tensor
    env_steps: Tensor
    stats: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(value.nbytes for value in self.to_tensors()[1].values())

    @property
    def ended(self) -> Tensor:
        """Whether a row is its episode's last, bool ``[N]``."""
        ended = torch.zeros(len(self), dtype=torch.bool)
        ended[self.episode_lengths.cumsum(0) - 1] = True
        return ended

    @property
    def truncated(self) -> Tensor:
        """Whether a row ended its episode without terminating it, bool ``[N]``."""
        return self.ended & ~self.terminated

    def to_tensors(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return a JSON-able header and flat tensors, from which :meth:`from_tensors` rebuilds the rollout."""
        tensors = {name: getattr(self, name) for name in (*_ROW_FIELDS, *_EPISODE_FIELDS)}
        tensors |= {f"features.{name}": value for name, value in self.features.items()}
        tensors |= {f"final_features.{name}": value for name, value in self.final_features.items()}
        return {"policy_version": self.policy_version, "stats": self.stats}, tensors

    @classmethod
    def from_tensors(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> "Rollout":
        """Rebuild and check a rollout.

        Raises:
            ValueError: when something is missing, of another type or length, or not finite.
        """
        plain = (*_ROW_FIELDS, *_EPISODE_FIELDS)
        missing = sorted(set(plain) - set(tensors))
        if missing:
            raise ValueError(f"the rollout has no tensor {', '.join(missing)}; update the actor's package")
        groups: dict[str, dict[str, Tensor]] = {"features": {}, "final_features": {}}
        for name, value in tensors.items():
            prefix, _, rest = name.partition(".")
            if rest and prefix in groups:
                groups[prefix][rest] = value
        version, stats = header.get("policy_version"), header.get("stats", {})
        if type(version) is not int:
            raise ValueError(f"rollout: policy_version is {shown(version)}; update the actor's package")
        # sums of them must be numbers too
        fits = isinstance(stats, dict) and all(is_finite(n) and abs(n) <= MAX_STAT for n in stats.values())
        if not fits:
            raise ValueError(f"rollout: stats is {shown(stats)} instead of numbers by name")
        rollout = cls(
            policy_version=version,
            stats=stats,
            **groups,
            **{name: tensors[name] for name in plain},
        )
        rollout.check()
        return rollout

    def check(self) -> None:
        """Raise ValueError when types, lengths or names disagree or a number is not finite."""
        for name, (dtype, num_axes) in (_ROW_FIELDS | _EPISODE_FIELDS).items():
            value = getattr(self, name)
            if value.dtype != dtype or value.dim() != num_axes:
                raise ValueError(
                    f"rollout: {name} is {value.dtype} with {value.dim()} axes instead of {dtype} with {num_axes}; "
                    "update the actor's package"
                )
        for name in _EPISODE_FIELDS:
            if len(getattr(self, name)) != len(self.episode_lengths):
                raise ValueError(
                    f"rollout: {name} has {len(getattr(self, name))} entries for {len(self.episode_lengths)} episodes"
                )
        if len(self.episode_lengths) == 0 or self.episode_lengths.min() < 1:
            raise ValueError(
                f"rollout: episode_lengths is {shown(self.episode_lengths.tolist())}, but every rollout has an episode "
                "and every episode a chunk"
            )
        if not self.features or set(self.features) != set(self.final_features):
            raise ValueError(
                f"rollout: features {sorted(self.features)} and final_features {sorted(self.final_features)} must "
                "have the same names, at least one"
            )
        # their sum in int64 could run over
        num_rows = sum(self.episode_lengths.tolist())
        rows = {name: getattr(self, name) for name in _ROW_FIELDS}
        rows |= {f"features.{name}": value for name, value in self.features.items()}
        for name, value in rows.items():
            if _num_rows(value) != num_rows:
                raise ValueError(f"rollout: {name} has {_num_rows(value)} rows, the episodes have {num_rows}")
        if (self.terminated & ~self.ended).any():
            raise ValueError("rollout: terminated is set in a row that is not its episode's last")
        num_truncated = int(self.truncated.sum())
        finals = {f"final_features.{name}": value for name, value in self.final_features.items()}
        for name, value in finals.items():
            if _num_rows(value) != num_truncated:
                raise ValueError(
                    f"rollout: {name} has {_num_rows(value)} rows for {num_truncated} truncated episodes"
                )
        for name, value in (rows | finals).items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise ValueError(
                    f"rollout: {name} holds a number that is not finite; the rollout is not used"
                )
        # a chunk takes a step at least, and executes no more than its rows
        most = self.episode_lengths * self.chain.shape[2]
        if ((self.env_steps < self.episode_lengths) | (self.env_steps > most)).any():
            raise ValueError(
                f"rollout: env_steps is {shown(self.env_steps.tolist())} in episodes of "
                f"{shown(self.episode_lengths.tolist())} chunks of {self.chain.shape[2]} rows"
            )


def _num_rows(value: Tensor) -> int:
    return value.shape[0] if value.dim() else 0


def concatenate(rollouts: list[Rollout]) -> Rollout:
    """Join rollouts of one policy version; stats are summed."""
    first = rollouts[0]
    if len(rollouts) == 1:
        return first
    names = (*_ROW_FIELDS, *_EPISODE_FIELDS)
    joined = {name: torch.cat([getattr(r, name) for r in rollouts]) for name in names}
    for group in ("features", "final_features"):
        parts = [getattr(r, group) for r in rollouts]
        joined[group] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    keys = {key for r in rollouts for key in r.stats}
    stats = {key: sum(r.stats.get(key, 0.0) for r in rollouts) for key in keys}
    return Rollout(policy_version=first.policy_version, stats=stats, **joined)


def compute_returns(
    rollout: Rollout,
    values: Tensor,
    final_values: Tensor,
    gamma: float,
    gae_lambda: float,
    bootstrap_truncation: bool,
) -> tuple[Tensor, Tensor]:
    """Return GAE advantages and returns of every row, both ``[N]``.

    Args:
        rollout: ``N`` rows of ``E`` episodes.
        values: value of every row's observation, ``[N]``.
        final_values: value of the last observation of every truncated episode, ``[M]``.
        gamma, gae_lambda: per chunk.
        bootstrap_truncation: use ``final_values``; otherwise a time-out is an end like any other.
    """
    lengths = rollout.episode_lengths
    steps = torch.arange(int(lengths.max()))[:, None]
    valid = steps < lengths  # [T, E]

    def padded(rows: Tensor, fill: float | bool = 0) -> Tensor:
        out = torch.full(valid.shape, fill, dtype=rows.dtype)
        out.T[valid.T] = rows
        return out

    next_values = torch.zeros_like(values)
    next_values[:-1] = values[1:]
    next_values[rollout.truncated] = final_values
    terminated = rollout.terminated if bootstrap_truncation else rollout.ended
    advantages, returns = compute_gae(
        padded(rollout.rewards),
        padded(values),
        padded(next_values),
        padded(terminated, True),
        padded(rollout.ended, True),
        gamma,
        gae_lambda,
    )
    return advantages.T[valid.T], returns.T[valid.T]


def group_returns(rollout: Rollout, group_size: int) -> Tensor:
    """Return the undiscounted return of every episode, float32 ``[E]``.

    Raises:
        ValueError: when neighbouring episodes do not form groups that share task and initial state.
    """
    count = len(rollout.episode_lengths)
    starts = torch.stack([rollout.task_id, rollout.init_state_id])
    if count % group_size or (starts.unflatten(1, (-1, group_size)).diff(dim=2) != 0).any():
        raise ValueError(
            f"rollout: its {count} episodes do not come in groups of {group_size} that share task_id and init_state_id; "
            "start the actor with the learner's config"
        )
    episode = torch.arange(count).repeat_interleave(rollout.episode_lengths)
    return torch.zeros(count).index_add(0, episode, rollout.rewards)
