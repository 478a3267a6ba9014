"""`tabletop`: a small numpy world with LIBERO's observations and actions, for laptops, tests and
benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.processor import LiberoProcessorStep, PolicyProcessorPipeline
from lerobot.utils.constants import (
    ACTION,
    LIBERO_KEY_EEF_MAT,
    LIBERO_KEY_EEF_POS,
    LIBERO_KEY_EEF_QUAT,
    LIBERO_KEY_GRIPPER_QPOS,
    LIBERO_KEY_GRIPPER_QVEL,
    LIBERO_KEY_JOINTS_POS,
    LIBERO_KEY_JOINTS_VEL,
    LIBERO_KEY_PIXELS_AGENTVIEW,
    LIBERO_KEY_PIXELS_EYE_IN_HAND,
    OBS_IMAGES,
    OBS_STATE,
)

from lerobot_pirl.envs import tabletop_physics as physics
from lerobot_pirl.envs.tabletop_render import TabletopRenderer

FINGER_OPENING = 0.04
HELD_OPENING = 0.02
MIN_IMAGE_SIZE = 16
STATE_SHAPES = {
    LIBERO_KEY_EEF_POS: (3,),
    LIBERO_KEY_EEF_QUAT: (4,),
    LIBERO_KEY_EEF_MAT: (3, 3),
    LIBERO_KEY_GRIPPER_QPOS: (2,),
    LIBERO_KEY_GRIPPER_QVEL: (2,),
    LIBERO_KEY_JOINTS_POS: (7,),
    LIBERO_KEY_JOINTS_VEL: (7,),
}


@EnvConfig.register_subclass("tabletop")
@dataclass
class TabletopEnv(EnvConfig):
    """Config of `tabletop`; names and meaning of the fields are those of LeRobot's LIBERO config.

    Attributes:
        task: `reach`, `pickup`, or several separated by commas; a task id is a position in this list.
        task_ids: run only these positions.
        fps: frames per second of a video; the physics has no clock.
        episode_length: step limit; None means the task's own (reach 40, pickup 60).
        observation_height: image height in pixels.
        observation_width: image width in pixels.
        control_mode: `absolute` is the only one.
        init_states: start from the 50 fixed initial states of the task; otherwise draw from the reset's seed.

    Raises:
        ValueError: on a field that the tabletop cannot honour.
    """

    task: str = "reach"
    task_ids: list[int] | None = None
    fps: int = 20
    episode_length: int | None = None
    observation_height: int = 64
    observation_width: int = 64
    control_mode: str = "absolute"
    init_states: bool = True
    render_mode: str = "rgb_array"
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(7,))}
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            ACTION: ACTION,
            LIBERO_KEY_EEF_POS: f"{OBS_STATE}.eef_pos",
            LIBERO_KEY_EEF_QUAT: f"{OBS_STATE}.eef_quat",
            LIBERO_KEY_EEF_MAT: f"{OBS_STATE}.eef_mat",
            LIBERO_KEY_GRIPPER_QPOS: f"{OBS_STATE}.gripper_qpos",
            LIBERO_KEY_GRIPPER_QVEL: f"{OBS_STATE}.gripper_qvel",
            LIBERO_KEY_JOINTS_POS: f"{OBS_STATE}.joint_pos",
            LIBERO_KEY_JOINTS_VEL: f"{OBS_STATE}.joint_vel",
            LIBERO_KEY_PIXELS_AGENTVIEW: f"{OBS_IMAGES}.image",
            LIBERO_KEY_PIXELS_EYE_IN_HAND: f"{OBS_IMAGES}.image2",
        }
    )

    def __post_init__(self):
        if self.control_mode != "absolute":
            raise ValueError(
                f"env.control_mode is '{self.control_mode}' but tabletop moves to absolute positions only: "
                "set it to "
                "'absolute'."
            )
        if min(self.observation_height, self.observation_width) < MIN_IMAGE_SIZE:
            raise ValueError(
                f"env.observation_height x env.observation_width is {self.observation_height}x"
                f"{self.observation_width} but tabletop needs at least {MIN_IMAGE_SIZE}x{MIN_IMAGE_SIZE}: "
                "raise them."
            )
        if self.episode_length is not None and self.episode_length < 1:
            raise ValueError(f"env.episode_length is {self.episode_length} but must be at least 1: raise it.")
        if self.fps <= 0:
            raise ValueError(f"env.fps is {self.fps} but must be positive: raise it.")
        self.selected_tasks()
        image = PolicyFeature(FeatureType.VISUAL, (self.observation_height, self.observation_width, 3))
        self.features[LIBERO_KEY_PIXELS_AGENTVIEW] = image
        self.features[LIBERO_KEY_PIXELS_EYE_IN_HAND] = image
        for key, shape in STATE_SHAPES.items():
            self.features[key] = PolicyFeature(FeatureType.STATE, shape)

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `TabletopTask`, its task and slot excepted."""
        return {
            "episode_length": self.episode_length,
            "observation_height": self.observation_height,
            "observation_width": self.observation_width,
            "init_states": self.init_states,
            "fps": self.fps,
        }

    def selected_tasks(self) -> dict[int, str]:
        """Task id -> task name of every task this config runs.

        Raises:
            ValueError: on an unknown task or a task id outside the list.
        """
        names = [name.strip() for name in self.task.split(",") if name.strip()]
        for name in names or [self.task]:
            if name not in physics.TASKS:
                raise ValueError(
                    f"env.task names '{name}' but tabletop has {', '.join(physics.TASKS)}: use one of them."
                )
        ids = range(len(names)) if self.task_ids is None else sorted(set(self.task_ids))
        for task_id in ids:
            if not 0 <= task_id < len(names):
                raise ValueError(
                    f"env.task_ids holds {task_id} but env.task '{self.task}' has ids 0 to "
                    f"{len(names) - 1}: remove it."
                )
        if not ids:
            raise ValueError("env.task_ids is an empty list, so no task would run: name one or leave it out.")
        return {task_id: names[task_id] for task_id in ids}

    def create_envs(
        self, n_envs: int, use_async_envs: bool = False
    ) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        """Vector environments `{task: {task id: env}}` for LeRobot's own commands.

        A step takes microseconds, less than a message to another process, so `use_async_envs` changes
        nothing.
        """
        envs: dict[str, dict[int, gym.vector.VectorEnv]] = {}
        for task_id, name in self.selected_tasks().items():
            makers = [
                partial(TabletopTask, name, task_id, episode_index=slot, n_envs=n_envs, **self.gym_kwargs)
                for slot in range(n_envs)
            ]
            vector = gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP)
            envs.setdefault(name, {})[task_id] = vector
        return envs

    def get_env_processors(self) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
        """LIBERO's processors, since the observations are LIBERO's."""
        return PolicyProcessorPipeline(steps=[LiberoProcessorStep()]), PolicyProcessorPipeline(steps=[])


class TabletopTask(gym.Env):
    """One tabletop task as a single-step gymnasium environment with the attributes of LeRobot's `LiberoEnv`.

    The joints in the observation are zeros: there is no arm, and no LIBERO processor of X-VLA reads them.

    Args:
        task: `reach` or `pickup`.
        task_id: the id reported in `info`.
        episode_index: first `init_state_id`.
        n_envs: added to `init_state_id` after each reset.
        episode_length: step limit for whoever counts the steps; the environment itself never truncates.
        observation_height: image height in pixels.
        observation_width: image width in pixels.
        init_states: use the fixed initial states.
        fps: frames per second of a video.

    Attributes:
        init_state_id: the initial state the next reset uses.
        render_enabled: while False, observations repeat the last frames.
    """

    def __init__(
        self,
        task: str,
        task_id: int = 0,
        episode_index: int = 0,
        n_envs: int = 1,
        episode_length: int | None = None,
        observation_height: int = 64,
        observation_width: int = 64,
        init_states: bool = True,
        fps: int = 20,
    ):
        self.task_spec = physics.TASKS[task]
        self.task, self.task_id = task, task_id
        self.task_description = self.task_spec.description
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": fps}
        self.render_mode = "rgb_array"
        self.render_enabled = True
        self.init_state_id = episode_index
        self.num_init_states = physics.NUM_INIT_STATES if init_states else 1
        self._fixed_init_states = init_states
        self._stride = n_envs
        self._max_episode_steps = self.task_spec.max_steps if episode_length is None else episode_length
        self._renderer = TabletopRenderer(observation_height, observation_width)
        self._frames: dict[str, np.ndarray] = {}
        self.state = physics.init_state(self.task_spec, self.init_state_id)
        self.observation_space = observation_space(observation_height, observation_width)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (7,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """Start an episode at `init_state_id`, which then moves on by `n_envs`."""
        super().reset(seed=seed)
        if self._fixed_init_states:
            self.state = physics.init_state(self.task_spec, self.init_state_id)
            self.init_state_id += self._stride
        else:
            self.state = physics.sample_state(self.task_spec, self.np_random)
        return self._observe(render=True), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Take one step; success terminates with reward 1.

        Raises:
            ValueError: on an action that is not 7 finite numbers.
        """
        action = np.asarray(action)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(
                f"tabletop got an action of shape {action.shape} with values {action.tolist()} but needs 7 "
                "finite "
                "numbers: check the policy's output."
            )
        self.state = physics.advance(self.task_spec, self.state, action.tolist())
        success = physics.is_success(self.task_spec, self.state)
        info = {"task": self.task, "task_id": self.task_id, "is_success": success}
        return self._observe(self.render_enabled), float(success), success, False, info

    def render(self) -> np.ndarray:
        """The fixed camera upright, enlarged by a whole factor to about 256 pixels, uint8 [H, W, 3]."""
        frame = self._renderer.agentview(self.task_spec, self.state)
        scale = max(1, 256 // frame.shape[0])
        return frame.repeat(scale, axis=0).repeat(scale, axis=1)

    def _observe(self, render: bool) -> dict:
        state = self.state
        if render:
            # LIBERO's fixed camera comes rotated by 180 degrees, and X-VLA's processor turns it back.
            upright = self._renderer.agentview(self.task_spec, state)
            self._frames = {
                "image": np.ascontiguousarray(upright[::-1, ::-1]),
                "image2": self._renderer.wrist(self.task_spec, state),
            }
        closed_to = HELD_OPENING if state.grip is not None else 0.0
        finger = closed_to + (FINGER_OPENING - closed_to) * (1.0 - state.closure)
        speed = -state.closure_rate * FINGER_OPENING
        return {
            "pixels": dict(self._frames),
            "robot_state": {
                "eef": {
                    "pos": np.array(state.eef),
                    "quat": np.array(state.quat),
                    "mat": physics.quat_to_mat(state.quat),
                },
                "gripper": {"qpos": np.array([finger, -finger]), "qvel": np.array([speed, -speed])},
                "joints": {"pos": np.zeros(7), "vel": np.zeros(7)},
            },
        }


def observation_space(height: int, width: int) -> gym.spaces.Dict:
    """The space of LIBERO's `pixels_agent_pos` observations at this image size."""

    def vector(*shape: int) -> gym.spaces.Box:
        return gym.spaces.Box(-np.inf, np.inf, shape, np.float64)

    def image() -> gym.spaces.Box:
        return gym.spaces.Box(0, 255, (height, width, 3), np.uint8)

    return gym.spaces.Dict(
        {
            "pixels": gym.spaces.Dict({"image": image(), "image2": image()}),
            "robot_state": gym.spaces.Dict(
                {
                    "eef": gym.spaces.Dict({"pos": vector(3), "quat": vector(4), "mat": vector(3, 3)}),
                    "gripper": gym.spaces.Dict({"qpos": vector(2), "qvel": vector(2)}),
                    "joints": gym.spaces.Dict({"pos": vector(7), "vel": vector(7)}),
                }
            ),
        }
    )


def expert_action(env: TabletopTask) -> np.ndarray:
    """The scripted expert's action for the environment's present state, float32 [7]."""
    return physics.expert(env.task_spec, env.state)


def expert_chunk(env: TabletopTask, n_steps: int) -> np.ndarray:
    """The scripted expert's next `n_steps` actions, float32 [n_steps, 7]."""
    return physics.expert_actions(env.task_spec, env.state, n_steps)
