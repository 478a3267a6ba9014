"""One task of ``tabletop`` as a single-step Gymnasium environment with LIBERO's observations and actions."""

from typing import Any

import gymnasium as gym
import numpy as np

from lerobot_pirl.envs import tabletop_physics as physics
from lerobot_pirl.envs.tabletop_render import TabletopRenderer

FINGER_OPENING = 0.04
HELD_OPENING = 0.02


class TabletopTask(gym.Env):
    """A tabletop task with the attributes of LeRobot's ``LiberoEnv``.

    The joints in the observation are zeros: there is no arm, and no LIBERO processor of X-VLA reads them.

    Args:
        task: ``reach`` or ``pickup``.
        task_id: the id reported in ``info``.
        episode_index: first ``init_state_id``.
        n_envs: added to ``init_state_id`` after each reset.
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
        self._fixed_init_states = init_states
        self._stride = n_envs
        self._max_episode_steps = self.task_spec.max_steps if episode_length is None else episode_length
        self._renderer = TabletopRenderer(observation_height, observation_width)
        self._frames: dict[str, np.ndarray] = {}
        self.state = physics.init_state(self.task_spec, self.init_state_id)
        self.observation_space = observation_space(observation_height, observation_width)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (7,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """Start an episode at ``init_state_id``, which then moves on by ``n_envs``."""
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
            ValueError: when the action is not 7 finite numbers.
        """
        action = np.asarray(action)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(
                f"tabletop got an action of shape {action.shape} with values {action.tolist()} but needs 7 "
                "finite numbers: check the policy's output"
            )
        self.state = physics.advance(self.task_spec, self.state, action.tolist())
        success = physics.is_success(self.task_spec, self.state)
        info = {"task": self.task, "task_id": self.task_id, "is_success": success}
        return self._observe(self.render_enabled), float(success), success, False, info

    def render(self) -> np.ndarray:
        """Return the fixed camera's picture upright, enlarged to about 256 pixels, uint8 ``[H, W, 3]``."""
        frame = self._renderer.agentview(self.task_spec, self.state)
        scale = max(1, 256 // frame.shape[0])
        return frame.repeat(scale, axis=0).repeat(scale, axis=1)

    def _observe(self, render: bool) -> dict[str, Any]:
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
    """Return the space of LIBERO's ``pixels_agent_pos`` observations at this image size."""

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
    """Return the scripted expert's action for the environment's present state, float32 ``[7]``."""
    return physics.expert(env.task_spec, env.state)


def expert_chunk(env: TabletopTask, n_steps: int) -> np.ndarray:
    """Return the scripted expert's next ``n_steps`` actions, float32 ``[n_steps, 7]``."""
    return physics.expert_actions(env.task_spec, env.state, n_steps)
