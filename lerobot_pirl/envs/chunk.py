"""Environments stepped a chunk of actions at a time, the same way for every environment type."""

from collections.abc import Callable
from functools import partial

import gymnasium as gym
import numpy as np
from lerobot.envs.configs import EnvConfig

from lerobot_pirl.envs import libero
from lerobot_pirl.envs.tabletop_physics import NUM_INIT_STATES, TASKS
from lerobot_pirl.envs.tabletop_task import TabletopTask
from lerobot_pirl.envs.workers import WorkerEnvs

SUPPORTED_TYPES = ("tabletop", "libero")
ACTION_DIM = 7


class ChunkEnv(gym.Env):
    """One environment slot whose step executes a chunk of actions.

    The step limit is kept here, since LeRobot's LIBERO environment never truncates, and success counts once.
    Where the wrapped environment has ``render_enabled``, only a chunk's last step renders. An observation after
    success repeats the frames of the chunk before: nobody acts on it.

    Args:
        make_task_env: builds the environment of a task id; it takes single actions, float32 ``[7]``, and reports
            ``info["is_success"]``.
        n_action_steps: actions in a chunk.
        max_episode_steps: step limit of an episode; None means the environment's ``_max_episode_steps``.
        task_id: the first task.

    Attributes:
        task_id: the task of the next reset (settable, also through a vector environment's ``set_attr``).
        init_state_id: the initial state of the next reset (likewise); it stays as it is after a reset.
        idle: whether the next reset leaves the slot finished (likewise).
        env: the environment of the task now running.

    Raises:
        ValueError: when ``n_action_steps`` or the step limit is below 1.
    """

    def __init__(
        self,
        make_task_env: Callable[[int], gym.Env],
        n_action_steps: int,
        max_episode_steps: int | None = None,
        task_id: int = 0,
    ):
        if n_action_steps < 1:
            raise ValueError(f"n_action_steps is {n_action_steps} but must be at least 1: raise it")
        if max_episode_steps is not None and max_episode_steps < 1:
            raise ValueError(f"max_episode_steps is {max_episode_steps} but must be at least 1: raise it")
        self._make_task_env = make_task_env
        self._n_action_steps = n_action_steps
        self._max_episode_steps_given = max_episode_steps
        self.task_id = task_id
        self.init_state_id = 0
        self.idle = False
        self.env = make_task_env(task_id)
        hard_limit = getattr(self.env, "hard_step_limit", None)
        if hard_limit is not None and (max_episode_steps or 0) > hard_limit:
            raise ValueError(
                f"max_episode_steps is {max_episode_steps} but the simulator ends an episode after {hard_limit} "
                "steps: lower it"
            )
        if self.max_episode_steps < 1:
            raise ValueError(f"env.episode_length gives an episode {self.max_episode_steps} steps; raise it")
        self._built_task_id = task_id
        self.observation_space = self.env.observation_space
        self.action_space = gym.spaces.Box(-np.inf, np.inf, (n_action_steps, ACTION_DIM), np.float32)
        self.metadata = self.env.metadata
        self.render_mode = self.env.render_mode
        self._episode_steps = 0
        self._done = True
        self._last_observation: dict | None = None

    @property
    def task_description(self) -> str:
        """The sentence that describes the task now built."""
        return self.env.task_description

    @property
    def max_episode_steps(self) -> int:
        """Step limit of an episode of the task now built."""
        limit = self._max_episode_steps_given or self.env._max_episode_steps
        return min(limit, getattr(self.env, "hard_step_limit", limit))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """Start an episode of ``task_id`` at ``init_state_id``.

        Returns:
            The observation and ``{"is_success": False, "task": description}``.
        """
        super().reset(seed=seed)
        if self.task_id != self._built_task_id:
            self.env.close()
            self.env = self._make_task_env(self.task_id)
            self._built_task_id = self.task_id
        self.env.init_state_id = self.init_state_id
        self._set_rendering(True)
        observation, _ = self.env.reset(seed=seed)
        self._episode_steps = 0
        self._done = self.idle
        self._last_observation = observation
        return observation, {"is_success": False, "task": self.task_description}

    def step(self, actions: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Execute up to ``n_action_steps`` actions, fewer if the episode ends on the way.

        An episode's end is reported in the last return value alone: Gymnasium's vector environments refuse to
        step while a finished slot waits, and the last episodes of a collection end at different times. A
        finished slot that is stepped again stays as it is.

        Args:
            actions: float32 ``[n_action_steps, 7]``.

        Returns:
            Observation; reward 1.0 in the chunk that succeeds and otherwise 0.0; False; False;
            ``{"is_success", "terminated" (success), "truncated" (step limit without success), "n_steps" executed
            in this chunk, "episode_steps" so far}``.

        Raises:
            ValueError: when the chunk has another shape.
            RuntimeError: when the slot was never reset.
        """
        if np.shape(actions) != self.action_space.shape:
            raise ValueError(
                f"the action chunk has shape {np.shape(actions)} but this environment takes "
                f"{self.action_space.shape}: set n_action_steps alike"
            )
        if self._last_observation is None:
            raise RuntimeError("the slot was never reset: reset it before the first step")
        if self._done:
            return self._last_observation, 0.0, False, False, self._report(False, 0)
        n_planned = min(self._n_action_steps, self.max_episode_steps - self._episode_steps)
        for n_steps in range(1, n_planned + 1):
            self._set_rendering(n_steps == n_planned)
            observation, _, _, _, info = self.env.step(actions[n_steps - 1])
            success = bool(info["is_success"])
            if success:
                break
        self._episode_steps += n_steps
        self._done = success or self._episode_steps >= self.max_episode_steps
        self._last_observation = observation
        return observation, float(success), False, False, self._report(success, n_steps)

    def _report(self, success: bool, n_steps: int) -> dict:
        return {
            "is_success": success,
            "terminated": success,
            "truncated": self._done and n_steps > 0 and not success,
            "n_steps": n_steps,
            "episode_steps": self._episode_steps,
        }

    def render(self) -> np.ndarray:
        """Return the wrapped environment's picture, uint8 ``[H, W, 3]``."""
        return self.env.render()

    def close(self) -> None:
        """Close the wrapped environment."""
        self.env.close()

    def _set_rendering(self, enabled: bool) -> None:
        if hasattr(self.env, "render_enabled"):
            self.env.render_enabled = enabled


def make_chunk_envs(
    env_cfg: EnvConfig,
    n_envs: int,
    n_action_steps: int,
    max_episode_steps: int | None = None,
    use_async: bool = False,
    timeout_s: float = 600.0,
) -> gym.vector.VectorEnv:
    """Return ``n_envs`` slots of :class:`ChunkEnv` that never reset by themselves.

    Reset some slots with ``reset(options={"reset_mask": bool [n_envs]})``.

    Args:
        env_cfg: a ``tabletop`` or ``libero`` config.
        n_envs: number of slots.
        n_action_steps: actions in a chunk.
        max_episode_steps: step limit; None means the environment's own.
        use_async: one process per slot instead of all in this one.
        timeout_s: seconds that such a process may take to be built, to reset or to step.

    Raises:
        ValueError: when the type is unsupported or a number is below 1.
        RuntimeError: when LIBERO is not usable here.
        WorkerDied: when a worker process does not come up.
        WorkerHangs: when it takes too long.
    """
    if n_envs < 1:
        raise ValueError(f"the number of environments is {n_envs} but must be at least 1: raise it")
    first = task_ids(env_cfg)[0]
    maker = partial(_make_slot, env_cfg, n_action_steps, max_episode_steps, first)
    if use_async:
        return WorkerEnvs([maker] * n_envs, timeout_s)
    return gym.vector.SyncVectorEnv([maker] * n_envs, autoreset_mode=gym.vector.AutoresetMode.DISABLED)


def make_task_env(env_cfg: EnvConfig, task_id: int) -> gym.Env:
    """Return the single-step environment of one task, with the attributes that :class:`ChunkEnv` uses."""
    if _env_type(env_cfg) == "libero":
        return libero.make_libero_task_env(env_cfg, task_id)
    return TabletopTask(env_cfg.selected_tasks()[task_id], task_id, **env_cfg.gym_kwargs)


def task_ids(env_cfg: EnvConfig) -> list[int]:
    """Return the ids of the tasks this config runs."""
    if _env_type(env_cfg) == "libero":
        return list(libero.selected_tasks(env_cfg))
    return list(env_cfg.selected_tasks())


def num_init_states(env_cfg: EnvConfig, task_id: int) -> int:
    """Return the number of fixed initial states of a task; 1 if ``env.init_states`` is off."""
    if _env_type(env_cfg) == "libero":
        return libero.count_init_states(env_cfg, task_id)
    return NUM_INIT_STATES if env_cfg.init_states else 1


def task_description(env_cfg: EnvConfig, task_id: int) -> str:
    """Return the sentence that describes a task to the policy."""
    if _env_type(env_cfg) == "libero":
        return libero.task_language(env_cfg, task_id)
    return TASKS[env_cfg.selected_tasks()[task_id]].description


def _make_slot(
    env_cfg: EnvConfig, n_action_steps: int, max_episode_steps: int | None, task_id: int
) -> ChunkEnv:
    return ChunkEnv(partial(make_task_env, env_cfg), n_action_steps, max_episode_steps, task_id)


def _env_type(env_cfg: EnvConfig) -> str:
    if env_cfg.type not in SUPPORTED_TYPES:
        raise ValueError(
            f"env.type is {env_cfg.type!r} but lerobot-pirl runs {', '.join(SUPPORTED_TYPES)}: use one of them"
        )
    return env_cfg.type
