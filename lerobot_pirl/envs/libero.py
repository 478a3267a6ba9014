"""LeRobot's ``LiberoEnv`` around a faster simulator, and LIBERO's tasks.

Frames, physics, proprioception and rewards are bit-identical with the stock environment's.
"""

from functools import cache
from typing import Any

from lerobot.envs.configs import LiberoEnv as LiberoEnvConfig

from lerobot_pirl.envs.check import prepare_libero
from lerobot_pirl.envs.simulator import FastSimulator

ROBOSUITE_HORIZON = 1000


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
                self._env = FastSimulator(self._env, self.num_steps_wait)
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
    cameras = [each.strip() for each in env_cfg.camera_name.split(",")]
    if env_cfg.camera_name_mapping is not None and (
        unnamed := sorted(set(cameras) - set(env_cfg.camera_name_mapping))
    ):
        raise ValueError(
            f"env.camera_name_mapping={env_cfg.camera_name_mapping} has no name for {', '.join(unnamed)} of env.camera_name="
            f"{env_cfg.camera_name!r}; add it"
        )
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
