"""Demonstrations of a scripted expert, recorded into a ``LeRobotDataset`` that X-VLA trains on.

    python -m benchmarks.demonstrations FOLDER --task pickup --episodes 20 [--seed 0]

A frame is what the policy sees when it acts: both cameras upright, the proprioception of LeRobot's LIBERO processor
for X-VLA, and the expert's command as X-VLA predicts it: position, the rotation's first two columns, gripper 0 or 1,
and zeros for the second arm.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.envs.utils import preprocess_observation
from lerobot.policies.xvla.processor_xvla import LiberoProcessorStep
from lerobot.policies.xvla.utils import mat_to_rotate6d
from lerobot.utils.constants import ACTION, OBS_STATE
from lerobot.utils.rotation import Rotation

from lerobot_pirl.envs.tabletop_physics import TASKS, expert
from lerobot_pirl.envs.tabletop_task import TabletopTask

REPO_ID = "local/demonstrations"
DIM = 20
# a gripper takes two to close
SLIP_STEPS = 3

type Expert = Callable[[Any], np.ndarray]


def xvla_action(action: np.ndarray) -> np.ndarray:
    """Return an environment action ``[7]`` as X-VLA predicts it, float32 ``[20]``."""
    columns = mat_to_rotate6d(Rotation.from_rotvec(action[3:6]).as_matrix())
    out = np.zeros(DIM, np.float32)
    out[:10] = *action[:3], *columns, action[6] > 0
    return out


def frame(observation: dict[str, Any], action: np.ndarray, task: str) -> dict[str, Any]:
    """Return a dataset frame for an environment's observation and the action taken in it."""
    batched = _map(observation, lambda value: np.asarray(value)[None])
    processed = LiberoProcessorStep()._process_observation(preprocess_observation(batched))
    images = {key: value[0] for key, value in processed.items() if key.startswith("observation.images.")}
    uint8 = {key: (255 * value).round().byte().permute(1, 2, 0).numpy() for key, value in images.items()}
    return {**uint8, OBS_STATE: processed[OBS_STATE][0].numpy(), ACTION: xvla_action(action), "task": task}


def _map(tree: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(tree, dict):
        return {key: _map(value, function) for key, value in tree.items()}
    return function(tree)


def make_dataset(root: Path, shape: tuple[int, int], fps: int) -> LeRobotDataset:
    """Return an empty dataset of two cameras' images of a height and width."""
    axes = [str(number) for number in range(DIM)]
    features = {key: {"dtype": "float32", "shape": (DIM,), "names": axes} for key in (OBS_STATE, ACTION)}
    for name in ("image", "image2"):
        names = ["height", "width", "channels"]
        features[f"observation.images.{name}"] = {"dtype": "image", "shape": (*shape, 3), "names": names}
    return LeRobotDataset.create(REPO_ID, fps=fps, features=features, root=root, use_videos=False)


@dataclass
class Slips:
    """Commands go wrong for some steps on their way to the environment: the expert then shows how to recover.

    A slip displaces the position by one draw, and in half of all slips the gripper does the opposite. What a policy
    learns are the expert's own commands, as in DART (Laskey et al., arXiv 1703.09327).

    Attributes:
        prob: probability per step that a slip of ``SLIP_STEPS`` steps begins.
        shift_std: std of the displacement per axis, metres.
        rng: what is drawn from.
    """

    prob: float
    shift_std: float
    rng: np.random.Generator
    _left: int = 0
    _shift: np.ndarray = field(default_factory=lambda: np.zeros(3))
    _flip: bool = False

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """Return what is executed in place of the command ``action`` ``[7]``."""
        if self._left == 0 and self.rng.random() < self.prob:
            self._left = SLIP_STEPS
            self._shift = self.rng.normal(0.0, self.shift_std, 3)
            self._flip = bool(self.rng.random() < 0.5)
        if self._left == 0:
            return action
        self._left -= 1
        executed = action.copy()
        executed[:3] += self._shift
        executed[6] *= -1 if self._flip else 1
        return executed


def short_expert(short: float) -> Expert:
    """Return an expert that aims so many metres short of the object's centre, as seen from the table's centre.

    It succeeds nevertheless, as people do who stop at what is good enough; who copies it has no margin left.
    """

    def act(env: TabletopTask) -> np.ndarray:
        x, y, z = env.state.target
        scale = max(0.0, 1 - short / max(np.hypot(x, y), 1e-9))
        return expert(env.task_spec, replace(env.state, target=(scale * x, scale * y, z)))

    return act


def record(
    dataset: LeRobotDataset,
    env: Any,
    expert: Expert,
    seed: int,
    max_steps: int,
    hold: int,
    slips: Callable[[np.ndarray], np.ndarray] | None = None,
) -> bool:
    """Add an episode to the dataset if the expert succeeds; returns whether it did.

    Args:
        dataset: see :func:`make_dataset`.
        env: takes single actions and reports ``info["is_success"]``.
        expert: gives the action for an environment's present state.
        seed: of the reset.
        max_steps: give up without a success in these.
        hold: frames after the success, so that the chunks of the last steps are whole.
        slips: what is executed in place of the expert's command; not given, the command.
    """
    observation, _ = env.reset(seed=seed)
    succeeded_at = None
    for step in range(1, max_steps + hold + 1):
        action = expert(env)
        dataset.add_frame(frame(observation, action, env.task_description))
        observation, _, _, _, info = env.step(slips(action) if slips else action)
        if info["is_success"] and succeeded_at is None:
            succeeded_at = step
        if succeeded_at is None and step == max_steps:
            break
        if succeeded_at is not None and step == succeeded_at + hold:
            dataset.save_episode()
            return True
    dataset.clear_episode_buffer()
    return False


def main() -> None:
    """Record demonstrations on the tabletop."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", choices=sorted(TASKS), default="reach")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images in pixels")
    parser.add_argument("--hold", type=int, default=5, help="frames after the success")
    parser.add_argument("--slips", type=float, default=0.0, help="probability per step that a slip begins")
    parser.add_argument("--slip-shift", type=float, default=0.03, help="std of its displacement, metres")
    parser.add_argument("--widen", type=float, default=1.0, help="factor on the square the object starts in")
    parser.add_argument("--short", type=float, default=0.0, help="aim so many metres short of the object")
    arguments = parser.parse_args()
    slips = Slips(arguments.slips, arguments.slip_shift, np.random.default_rng(arguments.seed))
    env = TabletopTask(
        arguments.task,
        observation_height=arguments.size,
        observation_width=arguments.size,
        init_states=False,
    )
    # what lies at the edge of the task's own square is then between demonstrations, not beyond them
    env.task_spec = replace(env.task_spec, spread=arguments.widen * env.task_spec.spread)
    shape = (arguments.size, arguments.size)
    dataset = make_dataset(arguments.folder, shape, env.metadata["render_fps"])
    for number in range(arguments.episodes):
        # far from the seeds of any run: no demonstration shows an initial state of an evaluation
        record(
            dataset,
            env,
            short_expert(arguments.short),
            10_000 + 1_000 * arguments.seed + number,
            env.task_spec.max_steps,
            arguments.hold,
            slips,
        )
    dataset.finalize()
    print(f"{dataset.num_episodes} episodes, {dataset.num_frames} frames in {arguments.folder}")


if __name__ == "__main__":
    main()
