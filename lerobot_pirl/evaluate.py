"""Success without exploration, over a fixed set of episodes that every evaluation of a run repeats."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lerobot_pirl.collector import Collector, Episode, EpisodeSpec, Progress, Watch, episode_specs
from lerobot_pirl.policies.base import Features, native_actions
from lerobot_pirl.rollout import derive_seed
from lerobot_pirl.rules import is_finite, shown

# stands where collection has the policy's version, which never gets there
_TAG = int.from_bytes(b"eval")
_FIELDS = {
    "success": torch.bool,
    "rewards": torch.float32,
    "env_steps": torch.int64,
    "task_id": torch.int64,
    "init_state_id": torch.int64,
}
# what to tell the user of a starting policy that never succeeded
ZERO_BASELINE = """the starting policy succeeded in none of {episodes} episodes without noise, and there is nothing to \
reinforce. Usual causes:
  - the policy was not trained for these tasks, or policy.path names another one
  - env.control_mode is 'relative' where the policy predicts absolute poses
  - the processors beside the weights are not those it was trained with: images normalised once, domain_id, tokenizer
  - policy.tokenizer_name is not the tokenizer it was trained with
  - algorithm.n_action_steps or algorithm.num_denoising_steps is far from what it was trained with
  - algorithm.max_episode_steps ends episodes before a success is possible
Measure it with lerobot-eval first; allow_zero_baseline=true trains on regardless"""


@dataclass
class Evaluation:
    """What became of ``N`` episodes.

    Attributes:
        success: bool ``[N]``.
        rewards: summed over the episode, float32 ``[N]``.
        env_steps, task_id, init_state_id: int64 ``[N]``.
        seconds: how long it took.
    """

    success: Tensor
    rewards: Tensor
    env_steps: Tensor
    task_id: Tensor
    init_state_id: Tensor
    seconds: float

    def __len__(self) -> int:
        return len(self.success)

    def to_log_dict(self) -> dict[str, float]:
        """Return the numbers to log, under the names they are logged by."""
        success = self.success.float()
        logs = {"eval/success_rate": float(success.mean())}
        for task in self.task_id.unique().tolist():
            logs[f"eval/success_rate_task{task}"] = float(success[self.task_id == task].mean())
        return logs | {
            "eval/reward_mean": float(self.rewards.mean()),
            "eval/episode_length": float(self.env_steps.float().mean()),
            "time/eval_s": self.seconds,
        }

    def to_tensors(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return a JSON-able header and tensors, from which :meth:`from_tensors` rebuilds the evaluation."""
        return {"seconds": self.seconds}, {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def from_tensors(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> "Evaluation":
        """Rebuild and check an evaluation.

        Raises:
            ValueError: when something is missing, of another type or length, or not finite.
        """
        missing = sorted(set(_FIELDS) - set(tensors))
        if missing:
            raise ValueError(f"the evaluation has no tensor {', '.join(missing)}; update the actor's package")
        seconds = header.get("seconds")
        if not is_finite(seconds):
            raise ValueError(
                f"evaluation: seconds is {shown(seconds)} instead of a number; update the actor's package"
            )
        evaluation = cls(seconds=float(seconds), **{name: tensors[name] for name in _FIELDS})
        evaluation.check()
        return evaluation

    def check(self) -> None:
        """Raise ValueError when types or lengths disagree, there is no episode or a number is not finite."""
        shape = self.success.shape
        if len(shape) != 1 or shape[0] == 0:
            raise ValueError(
                f"evaluation: success has shape {tuple(shape)}, but an evaluation has a list of episodes, at least one"
            )
        for name, dtype in _FIELDS.items():
            value = getattr(self, name)
            if value.dtype != dtype or value.shape != shape:
                raise ValueError(
                    f"evaluation: {name} is {value.dtype} of shape {tuple(value.shape)}, but {shape[0]} episodes "
                    f"need {dtype} of shape {tuple(shape)}"
                )
        if not torch.isfinite(self.rewards).all():
            raise ValueError(
                "evaluation: rewards holds a number that is not finite; the evaluation is not used"
            )


def evaluation_specs(num_init_states: dict[int, int], n_episodes: int) -> list[EpisodeSpec]:
    """Return the first episodes of the walk: tasks change fastest, then initial states."""
    return episode_specs(num_init_states, 0, n_episodes)


def evaluation_episode(seed: int, spec: EpisodeSpec) -> Episode:
    """Return a fresh episode, seeded by run and number alone: so all evaluations of a run are paired."""
    return Episode(spec, derive_seed(seed, _TAG, spec.number))


def evaluate(
    collector: Collector,
    specs: list[EpisodeSpec],
    make_episode: Callable[[EpisodeSpec], Episode] | None = None,
    on_progress: Progress | None = None,
    watch: Watch | None = None,
) -> Evaluation:
    """Run the episodes with the collector's policy as LeRobot runs it: its own sampler, gripper thresholded.

    Args:
        collector: has the environments, the policy and the run's seed.
        specs: see :func:`evaluation_specs`.
        make_episode: in place of :func:`evaluation_episode` with the collector's seed, for example to repeat the
            seeds and the stream of noise of another program.
        on_progress: called with (finished episodes, successes) after every chunk, in place of the collector's.
        watch: sees what the policy sees of every episode.
    """
    started = time.perf_counter()
    make_episode = make_episode or partial(evaluation_episode, collector.seed)
    episodes = [make_episode(spec) for spec in specs]

    def act(features: Features, generators: list[torch.Generator]) -> tuple[Tensor, None]:
        return native_actions(collector.adapter, features, generators), None

    collector.run(episodes, act, on_progress, watch)
    columns = {
        "success": [episode.success for episode in episodes],
        "rewards": [episode.rewards for episode in episodes],
        "env_steps": [episode.env_steps for episode in episodes],
        "task_id": [spec.task_id for spec in specs],
        "init_state_id": [spec.init_state_id for spec in specs],
    }
    tensors = {name: torch.tensor(columns[name], dtype=dtype) for name, dtype in _FIELDS.items()}
    return Evaluation(seconds=time.perf_counter() - started, **tensors)
