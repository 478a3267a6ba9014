"""Environments: ``tabletop`` (numpy, the embedded default) and ``libero`` (LeRobot's, made fast).

Importing this package registers ``tabletop`` with LeRobot's environment configs, so that
``--env.discover_packages_path=lerobot_pirl.envs`` is all a stock LeRobot command needs.
"""

from lerobot_pirl.envs.chunk import ChunkEnv, make_chunk_envs, num_init_states, task_description, task_ids
from lerobot_pirl.envs.tabletop import TabletopEnv
from lerobot_pirl.envs.tabletop_task import TabletopTask, expert_action, expert_chunk

__all__ = [
    "ChunkEnv",
    "TabletopEnv",
    "TabletopTask",
    "expert_action",
    "expert_chunk",
    "make_chunk_envs",
    "num_init_states",
    "task_description",
    "task_ids",
]
