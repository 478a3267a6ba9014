"""Pictures of the tabletop in numpy: a fixed camera above the table and one that travels with the gripper."""

from __future__ import annotations

import math

import numpy as np

from lerobot_pirl.envs.tabletop_physics import GRASP_RADIUS, REACH_RADIUS, TabletopState, TaskSpec

VIEW_HALF_WIDTH = 0.24
WRIST_HALF_WIDTH = 0.05
WRIST_WIDENING = 0.5
CUBE_HALF_WIDTH = 0.02

RED = (205.0, 40.0, 40.0)
GREEN = (45.0, 175.0, 70.0)
BLUE = (50.0, 80.0, 200.0)
SHADOW = (70.0, 62.0, 55.0)
FINGER_OPEN = (245.0, 245.0, 245.0)
FINGER_CLOSED = (250.0, 200.0, 30.0)


class TabletopRenderer:
    """Both cameras at a fixed size; holds nothing but the pixel grids.

    Args:
        height: image height in pixels.
        width: image width in pixels.
    """

    def __init__(self, height: int, width: int):
        self.height, self.width = height, width
        self._rows = ((np.arange(height, dtype=np.float32) + 0.5) / height * 2 - 1).astype(np.float32)
        self._cols = ((np.arange(width, dtype=np.float32) + 0.5) / width * 2 - 1).astype(np.float32)

    def agentview(self, task: TaskSpec, state: TabletopState) -> np.ndarray:
        """Return the table from above, upright, uint8 ``[height, width, 3]``: x grows downwards, y to the right."""
        return self._draw(task, state, (0.0, 0.0), VIEW_HALF_WIDTH)

    def wrist(self, task: TaskSpec, state: TabletopState) -> np.ndarray:
        """Return what the gripper sees, uint8 ``[height, width, 3]``: centred on it, wider the higher it is."""
        return self._draw(task, state, state.eef[:2], WRIST_HALF_WIDTH + WRIST_WIDENING * state.eef[2])

    def _draw(self, task: TaskSpec, state: TabletopState, centre: tuple, half: float) -> np.ndarray:
        xs = self._rows * np.float32(half) + np.float32(centre[0])
        ys = self._cols * np.float32(half) + np.float32(centre[1])
        frame = _table(xs, ys)
        canvas = (frame, xs, ys)
        ex, ey, ez = state.eef
        # The shadow falls aside with height: its distance from the gripper shows z.
        _disc(canvas, ex + 0.35 * ez, ey, 0.014, SHADOW, 0.6)
        tx, ty, tz = state.target
        if task.name == "reach":
            _disc(canvas, tx, ty, REACH_RADIUS, RED)
        else:
            lift = tz - task.object_z
            _square(canvas, tx, ty, CUBE_HALF_WIDTH * (1 + 2 * lift), tuple(c * (1 + lift) for c in GREEN))
        _disc(canvas, ex, ey, 0.010 + 0.04 * ez, tuple(c * (0.7 + ez) for c in BLUE))
        finger = FINGER_CLOSED if state.closure >= 1.0 else FINGER_OPEN
        gap = 0.006 + (GRASP_RADIUS - 0.006) * (1.0 - state.closure)
        _disc(canvas, ex, ey - gap, 0.006 + 0.01 * ez, finger)
        _disc(canvas, ex, ey + gap, 0.006 + 0.01 * ez, finger)
        return np.clip(frame, 0.0, 255.0).astype(np.uint8)


def _table(xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Return a background whose colour tells the place: red grows with x, blue with y, dark off the workspace."""
    frame = np.empty((xs.size, ys.size, 3), np.float32)
    frame[..., 0] = (150.0 + 150.0 * xs)[:, None]
    frame[..., 1] = 135.0
    frame[..., 2] = (120.0 + 150.0 * ys)[None, :]
    frame[np.abs(xs) > 0.21] *= 0.5
    frame[:, np.abs(ys) > 0.21] *= 0.5
    return frame


def _window(axis: np.ndarray, centre: float, radius: float) -> slice:
    """Return the pixels of ``axis`` (ascending, metres) that a shape may touch."""
    step = float(axis[1] - axis[0])
    low = math.floor((centre - radius - float(axis[0])) / step) - 1
    high = math.ceil((centre + radius - float(axis[0])) / step) + 2
    return slice(max(0, low), max(0, min(axis.size, high)))


def _disc(canvas: tuple, x: float, y: float, radius: float, colour: tuple, opacity: float = 1.0) -> None:
    frame, xs, ys = canvas
    rows, cols = _window(xs, x, radius), _window(ys, y, radius)
    dx, dy = xs[rows] - np.float32(x), ys[cols] - np.float32(y)
    distance = np.sqrt((dx * dx)[:, None] + (dy * dy)[None, :])
    _blend(frame[rows, cols], (radius - distance) / (xs[1] - xs[0]) + 0.5, colour, opacity)


def _square(canvas: tuple, x: float, y: float, half: float, colour: tuple) -> None:
    frame, xs, ys = canvas
    rows, cols = _window(xs, x, half), _window(ys, y, half)
    distance = np.maximum(
        np.abs(xs[rows] - np.float32(x))[:, None], np.abs(ys[cols] - np.float32(y))[None, :]
    )
    _blend(frame[rows, cols], (half - distance) / (xs[1] - xs[0]) + 0.5, colour, 1.0)


def _blend(patch: np.ndarray, coverage: np.ndarray, colour: tuple, opacity: float) -> None:
    """Mix ``colour`` into ``patch`` in place; partly covered pixels make positions readable below one pixel."""
    alpha = (np.minimum(np.maximum(coverage, 0.0), 1.0) * np.float32(opacity))[..., None]
    patch += alpha * (np.array(colour, np.float32) - patch)
