"""Config of ``tabletop``: a small numpy world with LIBERO's observations and actions.

It needs neither a simulator nor a GL library, so training, tests and benchmarks run on any laptop.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium as gym
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.envs.utils import freeze_after_episode_end
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
from lerobot_pirl.envs.tabletop_task import TabletopTask
from lerobot_pirl.rules import refusal

MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 16, 4096
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
    """Config of ``tabletop``; names and meaning of the fields are those of LeRobot's LIBERO config.

    Raises:
        ValueError: when a field asks for what the tabletop cannot do.
    """

    # `reach`, `pickup`, or several separated by commas; a task id is a position in this list.
    task: str = "reach"
    # Run only these positions.
    task_ids: list[int] | None = None
    # Frames per second of a video; the physics has no clock.
    fps: int = 20
    # Step limit of an episode; not given: the task's own (reach 40, pickup 60).
    episode_length: int | None = None
    # Size of both cameras' images in pixels.
    observation_height: int = 64
    observation_width: int = 64
    # Actions are absolute poses; nothing else is possible.
    control_mode: str = "absolute"
    # Start from the task's 50 fixed initial states; otherwise draw from the reset's seed.
    init_states: bool = True
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

    def __post_init__(self) -> None:
        if self.control_mode != "absolute":
            raise ValueError(
                f"env.control_mode={self.control_mode!r} is not possible, tabletop moves to absolute poses; set it "
                "to 'absolute'"
            )
        for name, low, high in (
            ("observation_height", MIN_IMAGE_SIZE, MAX_IMAGE_SIZE),
            ("observation_width", MIN_IMAGE_SIZE, MAX_IMAGE_SIZE),
            ("episode_length", 1, 1_000_000),
            ("fps", 1, 1000),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise refusal(f"env.{name}", value, f"an integer from {low} to {high}")
        self.selected_tasks()
        image = PolicyFeature(FeatureType.VISUAL, (self.observation_height, self.observation_width, 3))
        self.features[LIBERO_KEY_PIXELS_AGENTVIEW] = image
        self.features[LIBERO_KEY_PIXELS_EYE_IN_HAND] = image
        for key, shape in STATE_SHAPES.items():
            self.features[key] = PolicyFeature(FeatureType.STATE, shape)

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of :class:`TabletopTask`, its task and slot excepted."""
        return {
            "episode_length": self.episode_length,
            "observation_height": self.observation_height,
            "observation_width": self.observation_width,
            "init_states": self.init_states,
            "fps": self.fps,
        }

    def selected_tasks(self) -> dict[int, str]:
        """Return task id -> task name of every task this config runs.

        Raises:
            ValueError: when a task is unknown, or a task id is outside the list.
        """
        names = [name.strip() for name in self.task.split(",") if name.strip()]
        for name in names or [self.task]:
            if name not in physics.TASKS:
                raise ValueError(
                    f"env.task={self.task!r} names {name!r}, but tabletop has {', '.join(physics.TASKS)}; use one "
                    "of them"
                )
        ids = range(len(names)) if self.task_ids is None else sorted(set(self.task_ids))
        for task_id in ids:
            if not 0 <= task_id < len(names):
                raise ValueError(
                    f"env.task_ids={self.task_ids} holds {task_id}, but env.task={self.task!r} has the ids 0 to "
                    f"{len(names) - 1}; remove it"
                )
        if not ids:
            raise ValueError("env.task_ids=[] leaves no task to run; name one or leave it out")
        return {task_id: names[task_id] for task_id in ids}

    def create_envs(
        self, n_envs: int, use_async_envs: bool = False
    ) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        """Return vector environments ``{task: {task id: env}}`` for LeRobot's own commands.

        A step takes less time than a message to another process, so ``use_async_envs`` changes nothing.
        """
        envs: dict[str, dict[int, gym.vector.VectorEnv]] = {}
        for task_id, name in self.selected_tasks().items():
            makers = [
                partial(TabletopTask, name, task_id, episode_index=slot, n_envs=n_envs, **self.gym_kwargs)
                for slot in range(n_envs)
            ]
            # an automatic reset of a finished environment would skip an initial state
            makers = [freeze_after_episode_end(maker) for maker in makers]
            vector = gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP)
            envs.setdefault(name, {})[task_id] = vector
        return envs

    def get_env_processors(self) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
        """Return LIBERO's processors, since the observations are LIBERO's."""
        return PolicyProcessorPipeline(steps=[LiberoProcessorStep()]), PolicyProcessorPipeline(steps=[])
