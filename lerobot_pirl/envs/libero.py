"""LeRobot's ``LiberoEnv``, rendering only the frames that a policy looks at.

Rendering is over 90 % of a LIBERO step without a GPU. robosuite samples a camera a fixed number of substeps
into a control step, so a frame rendered afterwards is not the frame that stepping gives. Here the camera
observables stay enabled and keep their timers; only their sensor answers with the last frame while nobody
looks. Frames, physics, proprioception and rewards are then bit-identical with the stock environment's.
"""

from functools import cache
from typing import Any

import numpy as np
from lerobot.envs.configs import LiberoEnv as LiberoEnvConfig

from lerobot_pirl.envs.check import prepare_libero

ROBOSUITE_HORIZON = 1000


class LazyCameras:
    """Stand-in for ``OffScreenRenderEnv`` inside ``LiberoEnv`` that decides which control steps render.

    Args:
        env: hf-libero's environment, already built.
        camera_names: names of the camera observables, such as ``agentview_image``.
        settle_steps: number of steps after a reset of which only the last renders.

    Attributes:
        enabled: whether steps after the settling render.
    """

    def __init__(self, env: Any, camera_names: list[str], settle_steps: int):
        self._inner = env
        self._camera_names = camera_names
        self._settle_steps = settle_steps
        self._settle_left = 0
        self._rendering = True
        self.enabled = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def reset(self) -> dict:
        """Reset; a hard reset makes new sensors, so the cameras are bound again each time."""
        self._rendering = self._settle_steps == 0
        observation = self._inner.reset()
        self._bind()
        self._settle_left = self._settle_steps
        return observation

    def set_init_state(self, state: np.ndarray) -> dict:
        """Set the simulator's state, with frames only if no settle step follows to render them."""
        self._rendering = self._settle_steps == 0
        return self._inner.set_init_state(state)

    def step(self, action: Any) -> tuple:
        """Take a control step; during settling the last step alone renders, later ``enabled`` says."""
        if self._settle_left > 0:
            self._settle_left -= 1
            self._rendering = self._settle_left == 0
        else:
            self._rendering = self.enabled
        return self._inner.step(action)

    def _bind(self) -> None:
        for name in self._camera_names:
            observable = self._inner.env._observables[name]
            if not getattr(observable._sensor, "is_lazy", False):
                # Observable.set_sensor would call the sensor once more, that is, render a frame.
                observable._sensor = self._lazy_sensor(observable)

    def _lazy_sensor(self, observable: Any) -> Any:
        sensor = observable._sensor

        def lazy(obs_cache: dict) -> np.ndarray:
            return sensor(obs_cache) if self._rendering else observable._current_observed_value

        lazy.__modality__ = sensor.__modality__
        lazy.is_lazy = True
        return lazy


@cache
def fast_libero_class() -> type:
    """Return the class ``FastLiberoEnv``, built on first use: its base imports hf-libero and robosuite (10 s).

    Raises:
        RuntimeError: when LIBERO is not usable here (see :func:`lerobot_pirl.envs.check.prepare_libero`).
    """
    prepare_libero()
    from lerobot.envs.libero import LiberoEnv

    class FastLiberoEnv(LiberoEnv):
        """``LiberoEnv`` with ``render_enabled``: while it is False, observations repeat the last frames."""

        @property
        def hard_step_limit(self) -> int:
            """Steps that robosuite allows in an episode: its horizon counts the settle steps too."""
            return ROBOSUITE_HORIZON - self.num_steps_wait

        @property
        def render_enabled(self) -> bool:
            """Whether the next step renders its frames."""
            return self._render_enabled

        @render_enabled.setter
        def render_enabled(self, enabled: bool) -> None:
            self._render_enabled = enabled
            if self._env is not None:
                self._env.enabled = enabled

        _render_enabled = True

        def _ensure_env(self) -> None:
            if self._env is None:
                super()._ensure_env()
                self._env = LazyCameras(self._env, self.camera_name, self.num_steps_wait)
                self._env.enabled = self._render_enabled

    return FastLiberoEnv


@cache
def _suite(name: str) -> Any:
    prepare_libero()
    from libero.libero import benchmark

    suites = benchmark.get_benchmark_dict()
    if name not in suites:
        raise ValueError(
            f"env.task names {name!r}, but LIBERO has the suites {', '.join(sorted(suites))}; use one of them"
        )
    return suites[name]()


def selected_tasks(env_cfg: LiberoEnvConfig) -> dict[int, tuple[str, int]]:
    """Return task id -> (suite name, task number in the suite) of every task this config runs.

    With one suite the id is the suite's own number; a further suite counts on from the end of the one before.
    ``env.task_ids`` selects numbers within each suite, as in LeRobot.

    Raises:
        ValueError: when a suite is unknown or a number is outside of it.
    """
    tasks: dict[int, tuple[str, int]] = {}
    offset = 0
    for name in [part.strip() for part in env_cfg.task.split(",") if part.strip()]:
        total = len(_suite(name).tasks)
        for number in range(total) if env_cfg.task_ids is None else sorted(set(env_cfg.task_ids)):
            if not 0 <= number < total:
                raise ValueError(
                    f"env.task_ids={env_cfg.task_ids} holds {number}, but the suite {name!r} has the tasks 0 to "
                    f"{total - 1}; remove it"
                )
            tasks[offset + number] = (name, number)
        offset += total
    if not tasks:
        raise ValueError(
            f"env.task={env_cfg.task!r} with env.task_ids={env_cfg.task_ids} selects no task; name one"
        )
    return tasks


def task_language(env_cfg: LiberoEnvConfig, task_id: int) -> str:
    """Return the sentence that describes a task."""
    name, number = selected_tasks(env_cfg)[task_id]
    return _suite(name).get_task(number).language


def count_init_states(env_cfg: LiberoEnvConfig, task_id: int) -> int:
    """Return the number of fixed initial states of a task; 1 if ``env.init_states`` is off."""
    if not env_cfg.init_states:
        return 1
    name, number = selected_tasks(env_cfg)[task_id]
    from lerobot.envs.libero import get_task_init_states

    return len(get_task_init_states(_suite(name), number, is_libero_plus=env_cfg.is_libero_plus))


def make_libero_task_env(env_cfg: LiberoEnvConfig, task_id: int) -> Any:
    """Return the ``FastLiberoEnv`` of one task; the simulator itself starts at the first reset."""
    env_class = fast_libero_class()
    name, number = selected_tasks(env_cfg)[task_id]
    kwargs = {key: value for key, value in env_cfg.gym_kwargs.items() if key != "task_ids"}
    return env_class(
        task_suite=_suite(name),
        task_id=number,
        task_suite_name=name,
        episode_length=env_cfg.episode_length,
        camera_name=env_cfg.camera_name,
        init_states=env_cfg.init_states,
        control_mode=env_cfg.control_mode,
        camera_name_mapping=env_cfg.camera_name_mapping,
        is_libero_plus=env_cfg.is_libero_plus,
        **kwargs,
    )
