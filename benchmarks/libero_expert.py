"""A scripted expert for LIBERO tasks that pick something up and put it down somewhere.

It reads object poses from the simulator and answers with the action that LeRobot's ``LiberoEnv`` takes under
``control_mode: absolute``: position in metres, rotation vector in radians, gripper -1 (open) or +1 (close). The
answer depends on the present state alone, so that a policy without memory can learn to give the same one.

    python -m benchmarks.libero_expert [--task bowl_on_plate] [--episodes 50] [--noise 0.0] [--drawn]
    python -m benchmarks.libero_expert --record FOLDER --episodes 20 [--size 64] [--seed 0]

The first measures it and prints a line of JSON; the second writes demonstrations into a ``LeRobotDataset``.
"""

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

# the hand points down with the fingers opening along y: pi about the horizontal diagonal
POINTING_DOWN = np.pi / np.sqrt(2) * np.array([1.0, 1.0, 0.0])
OPEN, CLOSE = -1.0, 1.0
MAX_STEPS = 100
SLIP_SHIFT = 0.03


@dataclass(frozen=True)
class PickAndPlace:
    """A task and how it is done. Lengths in metres, x away from the robot's base, y to its left, z up.

    The arm moves a quarter of the commanded lead in a control step, so ``lead`` is its speed.

    Attributes:
        suite: LIBERO's suite.
        task_id: the task's number in the suite.
        item: body of what is picked up.
        goal: body that the item goes to.
        goal_offset: from the goal's origin to where the item belongs.
        grasp: from the item's origin to where the fingers close.
        rest_z: height of the item's origin while the item lies on the table.
        carry_height: how far above its resting place on the goal the item travels.
        drop_radius: horizontal distance from the goal at which the item is at its lowest.
        held_opening: the fingers are at most this far apart when they hold the item.
        lead: the longest horizontal way from the hand to its commanded position.
        lead_z: the longest vertical one.
    """

    suite: str
    task_id: int
    item: str
    goal: str
    goal_offset: tuple[float, float, float]
    grasp: tuple[float, float, float]
    rest_z: float
    carry_height: float = 0.05
    drop_radius: float = 0.04
    held_opening: float = 0.012
    lead: float = 0.10
    lead_z: float = 0.10


TASKS = {
    # held by the rim next to the robot's left; a bowl that is not lifted over the plate's edge shoves the plate
    "bowl_on_plate": PickAndPlace(
        suite="libero_goal",
        task_id=8,
        item="akita_black_bowl_1_main",
        goal="plate_1_main",
        goal_offset=(0.0, 0.0, 0.0),
        grasp=(0.0, 0.05, 0.04),
        rest_z=0.898,
    ),
    "bowl_on_stove": PickAndPlace(
        suite="libero_goal",
        task_id=1,
        item="akita_black_bowl_1_main",
        goal="flat_stove_1_burner",
        goal_offset=(0.0, 0.0, 0.025),
        grasp=(0.0, 0.05, 0.04),
        rest_z=0.898,
    ),
}


def expert_action(task: PickAndPlace, env: Any) -> np.ndarray:
    """Return the expert's action for the environment's present state, float32 ``[7]``.

    Args:
        task: what to do.
        env: LeRobot's ``LiberoEnv`` or the slot around one, reset.
    """
    sim = simulator(env)
    hand = sim.data.get_site_xpos("gripper0_grip_site")
    item = sim.data.get_body_xpos(task.item)
    goal = sim.data.get_body_xpos(task.goal) + task.goal_offset
    opening = sim.data.get_joint_qpos("gripper0_finger_joint1") - sim.data.get_joint_qpos(
        "gripper0_finger_joint2"
    )
    away = hand - (item + task.grasp)
    distance = np.linalg.norm(away[:2])
    if opening < task.held_opening and distance < 0.04 and abs(away[2]) < 0.04:
        target, lead, gripper = *_carry(task, hand, item, goal), CLOSE
    else:
        # down a funnel; the fingers need half a second to close and start on the way
        target = item + task.grasp + np.array([0.0, 0.0, np.clip(distance - 0.03, 0.0, 0.2)])
        lead, gripper = task.lead, CLOSE if distance < 0.025 and away[2] < 0.05 else OPEN
    command = _towards(hand, target, lead, task.lead_z)
    return np.concatenate([command, POINTING_DOWN, [gripper]]).astype(np.float32)


def _carry(
    task: PickAndPlace, hand: np.ndarray, item: np.ndarray, goal: np.ndarray
) -> tuple[np.ndarray, float]:
    """Return where the hand goes with the item, and its lead: it is slow until the item is off the table."""
    way = goal - item
    height = np.clip(1.5 * (np.linalg.norm(way[:2]) - task.drop_radius), -0.02, task.carry_height)
    target = np.array([*(hand + way)[:2], goal[2] + task.grasp[2] + height])
    return target, task.lead * np.clip((item[2] - task.rest_z) / 0.03, 0.3, 1.0)


def _towards(hand: np.ndarray, target: np.ndarray, lead: float, lead_z: float) -> np.ndarray:
    way = target - hand
    distance = np.linalg.norm(way[:2])
    way[:2] *= min(1.0, lead / max(distance, 1e-9))
    way[2] = np.clip(way[2], -lead_z, lead_z)
    return hand + way


def simulator(env: Any) -> Any:
    """Return robosuite's simulation inside LeRobot's ``LiberoEnv`` or inside the slot around one."""
    return getattr(env, "env", env)._env.sim


def drawn_init_states(env: Any, count: int, seed: int, widen: float = 1.0) -> np.ndarray:
    """Return initial states that are not among the task's own, ``[count, numbers in a state]``.

    The arm is where one of the own states has it. Every object lies anywhere in the rectangle in which the own
    states have it. Assigned to the ``_init_states`` of a ``LiberoEnv``, they take the place of its own.

    Args:
        env: LeRobot's ``LiberoEnv`` or the slot around one, reset once.
        count: number of states.
        seed: of the draw.
        widen: 2 makes the rectangles twice as long and wide.
    """
    inner = getattr(env, "env", env)
    own, model, rng = inner._init_states, simulator(env).model, np.random.default_rng(seed)
    states = own[rng.integers(len(own), size=count)].copy()
    for joint in np.flatnonzero(model.jnt_type == 0):  # free joints
        x = 1 + model.jnt_qposadr[joint]  # a state begins with the time
        low, high = own[:, x : x + 2].min(axis=0), own[:, x : x + 2].max(axis=0)
        centre, half = (low + high) / 2, widen * (high - low) / 2
        states[:, x : x + 2] = rng.uniform(centre - half, centre + half, (count, 2))
    return states


def run_episode(
    task: PickAndPlace, env: Any, init_state_id: int, noise: float = 0.0, seed: int = 0
) -> tuple[bool, int]:
    """Let the expert play one episode; return whether it succeeded, and its steps.

    Args:
        task: what to do.
        env: LeRobot's ``LiberoEnv``.
        init_state_id: where to start.
        noise: standard deviation in metres of what is added to every commanded position.
        seed: of the reset, which places the fixtures, and of the noise.
    """
    rng = np.random.default_rng(seed)
    env.init_state_id = init_state_id
    env.reset(seed=seed)
    env.render_enabled = False
    for step in range(1, MAX_STEPS + 1):
        action = expert_action(task, env)
        action[:3] += rng.normal(0.0, noise, 3) if noise else 0.0
        if env.step(action)[4]["is_success"]:
            return True, step
    return False, MAX_STEPS


def make_env(task: PickAndPlace, size: int = 64, init_states: bool = True) -> Any:
    """Return the single-step environment of a task, with small pictures and, where possible, soft resets."""
    from lerobot.envs.configs import LiberoEnv as LiberoConfig

    from lerobot_pirl.envs.chunk import make_task_env

    cfg = LiberoConfig(
        task=task.suite,
        task_ids=[task.task_id],
        control_mode="absolute",
        observation_height=size,
        observation_width=size,
        init_states=init_states,
        hard_reset=not init_states,
    )
    return make_task_env(cfg, task.task_id)


def measure(task: PickAndPlace, env: Any, episodes: int, noise: float) -> dict[str, Any]:
    """Return how often and how fast the expert succeeds from the first initial states."""
    run_episode(task, env, 0)  # the first one builds the simulator
    clock = time.monotonic()
    results = [run_episode(task, env, number, noise, seed=number) for number in range(episodes)]
    seconds = time.monotonic() - clock
    steps = [count for success, count in results if success]
    return {
        "episodes": episodes,
        "success": len(steps) / episodes,
        "failures": [number for number, (success, _) in enumerate(results) if not success],
        "mean_steps": round(statistics.mean(steps), 1) if steps else None,
        "longest": max(steps, default=None),
        "steps_per_s_with_resets": round(sum(count for _, count in results) / seconds, 1),
    }


def record_demonstrations(
    task: PickAndPlace, env: Any, folder: Path, episodes: int, seed: int, hold: int, slip_prob: float = 0.0
) -> dict[str, Any]:
    """Write successful episodes from drawn initial states into a new dataset; return what it holds.

    Args:
        task: what to show.
        env: LeRobot's ``LiberoEnv``; its initial states are replaced.
        folder: of the dataset; it must not exist.
        episodes: number of tries.
        seed: of the initial states and the resets.
        hold: frames after the success, which repeat what the expert then commands.
        slip_prob: see :class:`benchmarks.demonstrations.Slips`.
    """
    from benchmarks.demonstrations import Slips, make_dataset, record

    env.reset(seed=seed)
    env._init_states = drawn_init_states(env, episodes, seed)
    env.init_state_id = 0
    env.render_enabled = True
    shape = (env.observation_height, env.observation_width)
    dataset = make_dataset(folder, shape, env.control_freq)
    expert = partial(expert_action, task)
    slips = Slips(slip_prob, SLIP_SHIFT, np.random.default_rng(seed))
    for number in range(episodes):
        record(dataset, env, expert, seed + number, MAX_STEPS, hold, slips)
    dataset.finalize()
    return {"episodes": dataset.num_episodes, "frames": dataset.num_frames, "folder": str(folder)}


def main() -> int:
    """Measure or record, as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, default="bowl_on_plate")
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--noise", type=float, default=0.0, help="metres, added to every commanded position")
    parser.add_argument("--drawn", action="store_true", help="measure on drawn states, not the task's own")
    parser.add_argument("--record", type=Path, metavar="FOLDER", help="write demonstrations")
    parser.add_argument("--size", type=int, default=64, help="height and width of the pictures in pixels")
    parser.add_argument("--hold", type=int, default=10, help="frames of a demonstration after its success")
    parser.add_argument("--seed", type=int, default=0, help="of drawn states")
    parser.add_argument("--slips", type=float, default=0.0, help="probability per step that a slip begins")
    options = parser.parse_args()
    os.environ.setdefault("MUJOCO_GL", "egl")
    task = TASKS[options.task]
    env = make_env(task, options.size)
    if options.record:
        report = record_demonstrations(
            task, env, options.record, options.episodes, options.seed, options.hold, options.slips
        )
    else:
        env.reset(seed=0)
        if options.drawn:
            env._init_states = drawn_init_states(env, options.episodes, options.seed)
        report = measure(task, env, options.episodes, options.noise)
    env.close()
    print(json.dumps({"task": options.task, **report}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
