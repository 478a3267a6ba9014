"""Several LIBERO environments in one process: each shows what it shows alone, whatever the others do."""

from collections.abc import Iterator

import pytest

from lerobot_pirl.envs import ChunkEnv
from lerobot_pirl.envs.chunk import _make_slot
from tests.test_libero import CHUNK, TASK, assert_same, config, start, usable, wandering_actions

pytestmark = [pytest.mark.libero, pytest.mark.filterwarnings("ignore")]
__all__ = ["usable"]

# a kitchen and a study: no object is in both
OTHER = 5


def slot(task_id: int) -> ChunkEnv:
    return _make_slot(config(task_ids=[TASK, OTHER]), CHUNK, None, task_id)


def course(env: ChunkEnv) -> Iterator[dict]:
    """Two episodes of two chunks; yields every observation."""
    for init_state_id in (3, 8):
        observation = start(env, init_state_id)
        yield observation
        actions = wandering_actions(observation, 2 * CHUNK)
        for first in (0, CHUNK):
            yield env.step(actions[first : first + CHUNK])[0]


@pytest.fixture(scope="module")
def alone(usable) -> dict[int, list[dict]]:
    """What each task's environment shows while there is no other in the process."""
    shown = {}
    for task_id in (TASK, OTHER):
        env = slot(task_id)
        shown[task_id] = list(course(env))
        env.close()
    return shown


def test_environments_that_take_turns_show_what_each_shows_alone(alone):
    first, second = slot(TASK), slot(OTHER)
    try:
        for ours, others, *expected in zip(
            course(first), course(second), alone[TASK], alone[OTHER], strict=True
        ):
            assert_same(ours, expected[0])
            assert_same(others, expected[1])
    finally:
        first.close()
        second.close()


def test_environment_goes_on_after_another_was_built_reset_and_closed(alone):
    first = slot(TASK)
    turns, expected = course(first), iter(alone[TASK])
    try:
        assert_same(next(turns), next(expected))
        second = slot(OTHER)
        start(second, 3)
        assert_same(next(turns), next(expected))
        start(second, 8)
        assert_same(next(turns), next(expected))
        second.close()
        for observation in turns:
            assert_same(observation, next(expected))
    finally:
        first.close()
