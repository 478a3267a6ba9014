"""The tabletop's physics as pure functions: a state and an action give the next state.

Everything is in metres and plain Python floats, so that one step costs microseconds and the same initial
state and actions give bit-identical states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Vec3 = tuple[float, float, float]
Quat = tuple[float, float, float, float]

WORKSPACE_XY = 0.2
WORKSPACE_Z = 0.3
MAX_MOVE = 0.03
MAX_TURN = 0.15
GRIPPER_RATE = 0.5
REACH_RADIUS = 0.03
GRASP_RADIUS = 0.025
GRASP_HEIGHT = 0.03
LIFT_HEIGHT = 0.06
CUBE_REST_Z = 0.02
START_EEF: Vec3 = (0.0, 0.0, 0.15)
START_JITTER = 0.01
NUM_INIT_STATES = 50


@dataclass(frozen=True)
class TaskSpec:
    """What tells one tabletop task from another.

    Attributes:
        name: the task's name in ``env.task``.
        description: the sentence given to the policy.
        max_steps: default step limit of an episode.
        spread: half-width in metres of the square in which the object starts.
        object_z: height of the object's centre at rest, in metres.
        seed: seeds the fixed initial states.
    """

    name: str
    description: str
    max_steps: int
    spread: float
    object_z: float
    seed: int


TASKS: dict[str, TaskSpec] = {
    "reach": TaskSpec("reach", "move the gripper over the red target", 40, 0.12, 0.0, 11),
    "pickup": TaskSpec("pickup", "pick up the green cube", 60, 0.10, CUBE_REST_Z, 23),
}


@dataclass(frozen=True)
class TabletopState:
    """Everything that the next step depends on.

    Attributes:
        eef: end effector position (x, y, z), metres.
        quat: end effector orientation (x, y, z, w), unit norm.
        closure: 0 = gripper open, 1 = closed.
        closure_rate: change of ``closure`` in the last step.
        target: centre of the disc (reach) or of the cube (pickup), metres.
        grip: cube centre minus end effector while the cube is held, otherwise None.
    """

    eef: Vec3
    quat: Quat
    closure: float
    closure_rate: float
    target: Vec3
    grip: Vec3 | None = None


def sample_state(task: TaskSpec, rng: np.random.Generator) -> TabletopState:
    """Draw an initial state: object in the task's square, end effector near ``START_EEF``, gripper open."""
    x, y = rng.uniform(-task.spread, task.spread, size=2).tolist()
    jitter = rng.uniform(-START_JITTER, START_JITTER, size=3).tolist()
    eef = tuple(a + b for a, b in zip(START_EEF, jitter, strict=True))
    return TabletopState(eef, (0.0, 0.0, 0.0, 1.0), 0.0, 0.0, (x, y, task.object_z))


def init_state(task: TaskSpec, init_state_id: int) -> TabletopState:
    """Return the fixed initial state number ``init_state_id % NUM_INIT_STATES``, the same in every process."""
    return sample_state(task, np.random.default_rng([task.seed, init_state_id % NUM_INIT_STATES]))


def advance(task: TaskSpec, state: TabletopState, action: Sequence[float]) -> TabletopState:
    """Return the state after one environment step.

    A closing gripper takes two steps; the cube is grasped only in the step in which the gripper shuts, and only if
    it is within reach then, so closing too early needs reopening.

    Args:
        task: the task.
        state: the state before the step.
        action: 7 finite numbers: absolute position (m), absolute orientation (axis-angle, rad), gripper (> 0
            closes).
    """
    eef = _move(state.eef, action)
    quat = turn_towards(state.quat, (action[3], action[4], action[5]))
    command = GRIPPER_RATE if action[6] > 0 else -GRIPPER_RATE
    closure = min(1.0, max(0.0, state.closure + command))
    grip, target = state.grip, state.target
    if closure < 1.0:
        grip = None
    elif state.closure < 1.0 and task.name == "pickup" and _in_grasp(eef, target):
        grip = (target[0] - eef[0], target[1] - eef[1], target[2] - eef[2])
    if grip is not None:
        target = (eef[0] + grip[0], eef[1] + grip[1], max(task.object_z, eef[2] + grip[2]))
    elif target[2] != task.object_z:
        target = (target[0], target[1], task.object_z)
    return TabletopState(eef, quat, closure, closure - state.closure, target, grip)


def is_success(task: TaskSpec, state: TabletopState) -> bool:
    """Return whether xy is within 3 cm of the disc (reach), or the held cube 6 cm above its rest height (pickup)."""
    if task.name == "reach":
        return math.dist(state.eef[:2], state.target[:2]) <= REACH_RADIUS
    return state.grip is not None and state.target[2] - task.object_z >= LIFT_HEIGHT


def expert(task: TaskSpec, state: TabletopState) -> np.ndarray:
    """Return the scripted expert's action, float32 ``[7]`` (metres, radians, gripper -1 open / +1 close)."""
    x, y, z = state.target
    if task.name == "reach":
        return np.array([x, y, 0.10, 0, 0, 0, -1], np.float32)
    ex, ey, ez = state.eef
    if state.grip is not None:
        return np.array([ex, ey, 0.2, 0, 0, 0, 1], np.float32)
    if math.dist((ex, ey), (x, y)) > 0.005 and ez > z + 0.01 or state.closure == 1.0:
        return np.array([x, y, 0.08, 0, 0, 0, -1], np.float32)
    if abs(ez - z) > 0.005 or math.dist((ex, ey), (x, y)) > 0.005:
        return np.array([x, y, z, 0, 0, 0, -1], np.float32)
    return np.array([x, y, z, 0, 0, 0, 1], np.float32)


def expert_actions(task: TaskSpec, state: TabletopState, n_steps: int) -> np.ndarray:
    """Return the expert's next ``n_steps`` actions from ``state``, float32 ``[n_steps, 7]``."""
    actions = np.empty((n_steps, 7), np.float32)
    for step in range(n_steps):
        actions[step] = expert(task, state)
        state = advance(task, state, actions[step].tolist())
    return actions


def quat_to_mat(quat: Quat) -> np.ndarray:
    """Return the rotation matrix ``[3, 3]`` (float64) of a unit quaternion (x, y, z, w)."""
    x, y, z, w = quat
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def axis_angle_to_quat(axis_angle: Sequence[float]) -> Quat:
    """Return the unit quaternion (x, y, z, w) of an axis-angle vector in radians."""
    ax, ay, az = axis_angle
    angle = math.sqrt(ax * ax + ay * ay + az * az)
    if angle < 1e-9:
        return (0.0, 0.0, 0.0, 1.0)
    scale = math.sin(angle / 2) / angle
    return (ax * scale, ay * scale, az * scale, math.cos(angle / 2))


def turn_towards(quat: Quat, axis_angle: Vec3, max_angle: float = MAX_TURN) -> Quat:
    """Return ``quat`` turned towards the commanded orientation by at most ``max_angle`` radians, the short way."""
    target = axis_angle_to_quat(axis_angle)
    x, y, z, w = _quat_mul(target, (-quat[0], -quat[1], -quat[2], quat[3]))
    if w < 0:
        x, y, z, w = -x, -y, -z, -w
    sine = math.sqrt(x * x + y * y + z * z)
    angle = 2 * math.atan2(sine, w)
    if angle <= max_angle:
        return target
    turn = math.sin(max_angle / 2) / sine
    return _normalised(_quat_mul((x * turn, y * turn, z * turn, math.cos(max_angle / 2)), quat))


def _move(eef: Vec3, action: Sequence[float]) -> Vec3:
    goal = (
        min(WORKSPACE_XY, max(-WORKSPACE_XY, action[0])),
        min(WORKSPACE_XY, max(-WORKSPACE_XY, action[1])),
        min(WORKSPACE_Z, max(0.0, action[2])),
    )
    distance = math.dist(eef, goal)
    if distance <= MAX_MOVE:
        return goal
    part = MAX_MOVE / distance
    return tuple(e + part * (g - e) for e, g in zip(eef, goal, strict=True))


def _in_grasp(eef: Vec3, cube: Vec3) -> bool:
    return math.dist(eef[:2], cube[:2]) <= GRASP_RADIUS and abs(eef[2] - cube[2]) < GRASP_HEIGHT


def _quat_mul(a: Quat, b: Quat) -> Quat:
    ax, ay, az, aw = a
    bx, by, bz, bw = b
    return (
        aw * bx + ax * bw + ay * bz - az * by,
        aw * by - ax * bz + ay * bw + az * bx,
        aw * bz + ax * by - ay * bx + az * bw,
        aw * bw - ax * bx - ay * by - az * bz,
    )


def _normalised(q: Quat) -> Quat:
    norm = math.sqrt(sum(c * c for c in q))
    return tuple(c / norm for c in q)
