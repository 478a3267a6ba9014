"""The embedded environment: observations, physics, pictures, config, and LeRobot's own commands on it."""

import hashlib
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from lerobot.configs import parser
from lerobot.configs.eval import EvalPipelineConfig
from lerobot.envs import make_env, preprocess_observation
from lerobot.envs.configs import EnvConfig, LiberoEnv
from lerobot.envs.factory import make_env_config
from lerobot.envs.utils import NEW_ROLLOUT_OPTION, env_to_policy_features
from lerobot.processor import LiberoProcessorStep
from lerobot.scripts.lerobot_eval import rollout
from lerobot.utils.constants import OBS_IMAGES

from lerobot_pirl.envs import TabletopEnv, TabletopTask, expert_action, expert_chunk
from lerobot_pirl.envs import tabletop_physics as physics
from lerobot_pirl.envs.tabletop_render import (
    VIEW_HALF_WIDTH,
    WRIST_HALF_WIDTH,
    WRIST_WIDENING,
    TabletopRenderer,
)
from tests.toy import tiny_adapter

NUM_STATES = physics.NUM_INIT_STATES


def started(task: str, init_state_id: int = 0, **options) -> TabletopTask:
    env = TabletopTask(task, episode_index=init_state_id, **options)
    env.reset(seed=0)
    return env


def run(env: TabletopTask, policy) -> tuple[bool, int]:
    """Step until success or the step limit; returns success and the number of steps."""
    for step in range(1, env._max_episode_steps + 1):
        _, reward, terminated, truncated, info = env.step(policy(env))
        assert reward == float(terminated) == float(info["is_success"])
        assert truncated is False
        if terminated:
            return True, step
    return False, env._max_episode_steps


# --- observations ---------------------------------------------------------------------------------------------


def test_observations_lie_in_the_declared_space_and_have_liberos_structure():
    env = started("pickup", observation_height=48, observation_width=80)
    observation, *_ = env.step(expert_action(env))
    assert env.observation_space.contains(observation)
    assert observation["pixels"]["image"].shape == observation["pixels"]["image2"].shape == (48, 80, 3)
    assert set(observation["robot_state"]) == {"eef", "gripper", "joints"}
    assert observation["robot_state"]["eef"]["mat"].shape == (3, 3)


def test_features_are_liberos_at_the_same_image_size():
    ours = TabletopEnv(observation_height=64, observation_width=96)
    theirs = LiberoEnv(observation_height=64, observation_width=96)
    assert ours.features == theirs.features
    assert ours.features_map == theirs.features_map
    assert env_to_policy_features(ours) == env_to_policy_features(theirs)


def test_robot_state_tells_where_the_gripper_is():
    env = started("reach", init_states=True)
    for action in ([0.1, -0.05, 0.2, 0.3, 0, 0, -1], [0.1, -0.05, 0.2, 0.3, 0, 0, 1]):
        for _ in range(10):
            observation, *_ = env.step(np.array(action, np.float32))
    eef, gripper = observation["robot_state"]["eef"], observation["robot_state"]["gripper"]
    np.testing.assert_allclose(eef["pos"], [0.1, -0.05, 0.2], atol=1e-6)
    np.testing.assert_allclose(eef["quat"], [math.sin(0.15), 0, 0, math.cos(0.15)], atol=1e-6)
    cos, sin = math.cos(0.3), math.sin(0.3)
    np.testing.assert_allclose(eef["mat"], [[1, 0, 0], [0, cos, -sin], [0, sin, cos]], atol=1e-6)
    np.testing.assert_allclose(gripper["qpos"], [0, 0])


# --- determinism ----------------------------------------------------------------------------------------------

STATES_SCRIPT = """
import hashlib
from lerobot_pirl.envs.tabletop_physics import NUM_INIT_STATES, TASKS, init_state
states = [init_state(task, i) for task in TASKS.values() for i in range(NUM_INIT_STATES)]
print(hashlib.sha256(repr(states).encode()).hexdigest())
"""


def test_initial_states_are_the_same_in_another_process_and_differ_from_each_other():
    states = [physics.init_state(task, i) for task in physics.TASKS.values() for i in range(NUM_STATES)]
    assert len({state.target for state in states}) == len(states)
    # an own package context keeps the child free of LeRobot's import
    script = (
        "import sys, types; p = types.ModuleType('lerobot_pirl.envs'); "
        f"p.__path__ = [{str(_envs_folder())!r}]; sys.modules['lerobot_pirl.envs'] = p\n{STATES_SCRIPT}"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hashlib.sha256(repr(states).encode()).hexdigest()


def _envs_folder() -> str:
    return physics.__file__.rpartition("/")[0]


def test_fixed_initial_states_ignore_the_seed_and_drawn_ones_follow_it():
    fixed, drawn = TabletopTask("reach"), TabletopTask("reach", init_states=False)

    def start(env: TabletopTask, seed: int):
        env.init_state_id = 3
        env.reset(seed=seed)
        return env.state

    assert start(fixed, 1) == start(fixed, 2) == physics.init_state(physics.TASKS["reach"], 3)
    assert start(drawn, 1) == start(drawn, 1) != start(drawn, 2)


def test_initial_state_moves_on_by_the_number_of_environments_and_wraps_around():
    env = TabletopTask("reach", episode_index=48, n_envs=4)
    seen = []
    for _ in range(2):
        env.reset()
        seen.append(env.state)
    assert seen == [physics.init_state(env.task_spec, 48), physics.init_state(env.task_spec, 2)]


# --- tasks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "longest"), [("reach", 10), ("pickup", 20)])
def test_expert_succeeds_from_every_initial_state_well_within_the_limit(task, longest):
    outcomes = [
        run(started(task, i, observation_height=16, observation_width=16), expert_action) for i in range(50)
    ]
    assert all(success for success, _ in outcomes)
    assert max(steps for _, steps in outcomes) <= longest


def test_expert_chunk_is_what_the_expert_would_do_step_by_step():
    env = started("pickup", 5)
    chunk = expert_chunk(env, 12)
    for action in chunk:
        np.testing.assert_array_equal(action, expert_action(env))
        env.step(action)


def test_reach_needs_the_target():
    env = started("reach", 0)
    x, y, _ = env.state.target
    outside, inside = physics.REACH_RADIUS + 1e-4, physics.REACH_RADIUS - 1e-4
    at = lambda distance: replace(env.state, eef=(x + distance, y, 0.1))  # noqa: E731
    assert not physics.is_success(env.task_spec, at(outside))
    assert physics.is_success(env.task_spec, at(inside))


def go_down_and_up(closes_at: float):
    """A policy that visits the cube and lifts, its gripper closed from a height of ``closes_at`` metres down."""
    visited = []

    def policy(env: TabletopTask) -> np.ndarray:
        x, y, z = env.state.target
        if math.dist(env.state.eef, (x, y, z)) < 1e-6:
            visited.append(True)
        closed = bool(visited) and closes_at > z or env.state.eef[2] <= closes_at
        return np.array([x, y, 0.2 if visited else z, 0, 0, 0, 1 if closed else -1], np.float32)

    return policy


@pytest.mark.parametrize(
    "closes_at", [-1.0, 0.3, 0.14], ids=["always open", "always closed", "closes too early"]
)
def test_pickup_fails_with_a_gripper_that_does_not_close_around_the_cube(closes_at):
    for init_state_id in range(0, NUM_STATES, 5):
        env = started("pickup", init_state_id, observation_height=16, observation_width=16)
        assert run(env, go_down_and_up(closes_at)) == (False, 60)
        assert env.state.grip is None
        assert env.state.eef[2] == pytest.approx(0.2)  # it did lift


def test_opening_the_gripper_drops_the_cube_and_ends_the_lift():
    env = started("pickup", 2)
    while env.state.grip is None:
        env.step(expert_action(env))
    lift = expert_action(env)
    lift[2] = 0.05
    for _ in range(2):
        env.step(lift)
    assert env.state.target[2] > physics.CUBE_REST_Z
    lift[6] = -1
    env.step(lift)
    assert env.state.grip is None
    assert env.state.target[2] == physics.CUBE_REST_Z


def test_step_limit_is_the_tasks_own_unless_the_config_gives_one():
    assert [TabletopTask(task)._max_episode_steps for task in ("reach", "pickup")] == [40, 60]
    env = make_env(TabletopEnv(task="pickup", episode_length=7))["pickup"][0]
    assert env.call("_max_episode_steps") == (7,)


def test_gripper_moves_at_most_its_speed_and_never_leaves_the_workspace():
    env = started("reach")
    before = env.state.eef
    env.step(np.array([5, 5, 5, 3, 0, 0, -1], np.float32))
    assert math.dist(before, env.state.eef) == pytest.approx(physics.MAX_MOVE)
    turned = 2 * math.acos(min(1.0, env.state.quat[3]))
    assert turned == pytest.approx(physics.MAX_TURN)
    for _ in range(30):
        env.step(np.array([5, 5, -5, 3, 0, 0, -1], np.float32))
    np.testing.assert_allclose(env.state.eef, [physics.WORKSPACE_XY, physics.WORKSPACE_XY, 0])


@pytest.mark.parametrize(
    "action",
    [
        np.zeros(6),
        np.zeros((1, 7)),
        np.array([0, 0, np.nan, 0, 0, 0, 1]),
        np.array([0, 0, 0, 0, np.inf, 0, 1]),
    ],
    ids=["six numbers", "a batch", "nan", "inf"],
)
def test_bad_action_is_refused_and_changes_nothing(action):
    env = started("reach")
    before = env.state
    with pytest.raises(ValueError, match=r"action of shape \(.*\) with values .* needs 7 finite numbers"):
        env.step(action)
    assert env.state == before


# --- pictures -------------------------------------------------------------------------------------------------


def centroid(mask: np.ndarray) -> tuple[float, float]:
    rows, cols = np.nonzero(mask)
    return rows.mean(), cols.mean()


def test_pictures_show_the_object_where_it_is():
    """A pixel's row tells x, its column y, for a target anywhere in the square."""
    task, size = physics.TASKS["reach"], 64
    renderer = TabletopRenderer(size, size)
    far = (0.19, 0.19, 0.0)
    for x, y in ((0.0, 0.0), (0.1, -0.05), (-0.11, 0.08)):
        state = replace(physics.init_state(task, 0), eef=far, target=(x, y, 0.0))
        frame = renderer.agentview(task, state).astype(int)
        row, col = centroid((frame[..., 0] > 180) & (frame[..., 1] < 80))
        metres = 2 * VIEW_HALF_WIDTH / size
        assert (row + 0.5) * metres - VIEW_HALF_WIDTH == pytest.approx(x, abs=metres)
        assert (col + 0.5) * metres - VIEW_HALF_WIDTH == pytest.approx(y, abs=metres)


def test_wrist_camera_travels_with_the_gripper():
    """Its pictures tell where the cube is from the gripper's point of view."""
    task, size = physics.TASKS["pickup"], 64
    renderer = TabletopRenderer(size, size)
    height = 0.1
    half = WRIST_HALF_WIDTH + WRIST_WIDENING * height
    for x, y in ((0.0, 0.0), (0.08, -0.1)):
        state = replace(physics.init_state(task, 0), eef=(x, y, height), target=(x - 0.05, y + 0.06, 0.02))
        frame = renderer.wrist(task, state).astype(int)
        row, col = centroid((frame[..., 1] > 160) & (frame[..., 0] < 80))
        metres = 2 * half / size
        assert (row + 0.5) * metres - half == pytest.approx(-0.05, abs=metres)
        assert (col + 0.5) * metres - half == pytest.approx(0.06, abs=metres)


@pytest.mark.parametrize(
    "change",
    [
        {"target": (0.05, 0.05, 0.02)},
        {"eef": (0.03, -0.04, 0.15)},
        {"eef": (0.0, 0.0, 0.06)},
        {"closure": 1.0},
    ],
    ids=["object", "gripper sideways", "gripper down", "gripper closes"],
)
def test_whatever_moves_moves_pixels_of_both_cameras(change):
    task = physics.TASKS["pickup"]
    before = replace(physics.init_state(task, 0), eef=(0.0, 0.0, 0.15), target=(0.0, 0.06, 0.02))
    renderer = TabletopRenderer(64, 64)
    for camera in (renderer.agentview, renderer.wrist):
        assert not np.array_equal(camera(task, before), camera(task, replace(before, **change)))


def test_fixed_camera_is_upright_after_liberos_processor():
    env = TabletopTask("reach", observation_height=32, observation_width=32)
    observation, _ = env.reset()
    upright = env._renderer.agentview(env.task_spec, env.state)
    batch = preprocess_observation({"pixels": {k: v[None] for k, v in observation["pixels"].items()}})
    processed = LiberoProcessorStep()._process_observation(batch)[f"{OBS_IMAGES}.image"]
    shown = (processed[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    np.testing.assert_array_equal(shown, upright)


def test_frames_repeat_while_rendering_is_off_and_are_true_again_after():
    env, reference = started("reach", 1), started("reach", 1)
    first = env.step(expert_action(env))[0]["pixels"]
    reference.step(expert_action(reference))
    env.render_enabled = False
    hidden, _, _, _, _ = env.step(expert_action(env))
    seen, _, _, _, _ = reference.step(expert_action(reference))
    for camera in ("image", "image2"):
        np.testing.assert_array_equal(hidden["pixels"][camera], first[camera])
        assert not np.array_equal(hidden["pixels"][camera], seen["pixels"][camera])
    np.testing.assert_array_equal(hidden["robot_state"]["eef"]["pos"], seen["robot_state"]["eef"]["pos"])
    env.render_enabled = True
    action = np.array([0, 0, 0.2, 0, 0, 0, -1], np.float32)
    for camera in ("image", "image2"):
        np.testing.assert_array_equal(
            env.step(action)[0]["pixels"][camera], reference.step(action)[0]["pixels"][camera]
        )


def test_render_shows_the_present_state_enlarged():
    env = started("reach")
    env.render_enabled = False
    env.step(np.array([0.1, 0.1, 0.1, 0, 0, 0, -1], np.float32))
    picture = env.render()
    assert picture.shape == (256, 256, 3)
    np.testing.assert_array_equal(picture[::4, ::4], env._renderer.agentview(env.task_spec, env.state))


# --- config ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "field", "value", "allowed"),
    [
        ({"control_mode": "relative"}, "env.control_mode", "'relative'", "'absolute'"),
        ({"observation_height": 8}, "env.observation_height", "8", "from 16 to 4096"),
        ({"observation_width": 15}, "env.observation_width", "15", "from 16 to 4096"),
        ({"observation_height": 4097}, "env.observation_height", "4097", "from 16 to 4096"),
        ({"observation_width": 10**9}, "env.observation_width", "1000000000", "from 16 to 4096"),
        ({"episode_length": 0}, "env.episode_length", "0", "from 1 to 1000000"),
        ({"fps": 0}, "env.fps", "0", "from 1 to 1000"),
        ({"fps": 1001}, "env.fps", "1001", "from 1 to 1000"),
        ({"task": "stack"}, "env.task", "'stack'", "reach, pickup"),
        ({"task": ""}, "env.task", "''", "reach, pickup"),
        ({"task": "reach,fly"}, "env.task", "'fly'", "reach, pickup"),
        ({"task": "reach,pickup", "task_ids": [0, 2]}, "env.task_ids", "2", "0 to 1"),
        ({"task_ids": [-1]}, "env.task_ids", "-1", "0 to 0"),
        ({"task_ids": []}, "env.task_ids", "[]", "name one"),
    ],
)
def test_config_refuses_what_it_cannot_do_with_field_value_and_range(options, field, value, allowed):
    with pytest.raises(ValueError) as refusal:
        TabletopEnv(**options)
    message = str(refusal.value)
    assert message.startswith(f"{field}=")
    assert value in message
    assert allowed in message


def test_task_ids_are_positions_in_the_list_of_tasks():
    assert TabletopEnv(task="reach, pickup").selected_tasks() == {0: "reach", 1: "pickup"}
    assert TabletopEnv(task="reach,pickup", task_ids=[1, 1]).selected_tasks() == {1: "pickup"}


# --- LeRobot's own commands -----------------------------------------------------------------------------------


def test_lerobots_factory_knows_tabletop_and_builds_its_environments():
    cfg = make_env_config("tabletop", task="reach,pickup", observation_height=32, observation_width=32)
    envs = make_env(cfg, n_envs=3, use_async_envs=True)
    assert {name: list(tasks) for name, tasks in envs.items()} == {"reach": [0], "pickup": [1]}
    env = envs["pickup"][1]
    observation, _ = env.reset(seed=[1, 2, 3])
    assert observation["pixels"]["image"].shape == (3, 32, 32, 3)
    assert env.call("task_description") == ("pick up the green cube",) * 3
    assert [e.unwrapped.state for e in env.envs] == [
        physics.init_state(physics.TASKS["pickup"], i) for i in range(3)
    ]


def test_every_rollout_of_lerobots_eval_takes_the_next_initial_states():
    """An environment that finishes early must not be reset behind the rollout's back."""
    env = make_env(TabletopEnv(observation_height=16, observation_width=16), n_envs=2)["reach"][0]
    for batch in range(3):
        env.reset(seed=[0, 1], options={NEW_ROLLOUT_OPTION: True})
        task = physics.TASKS["reach"]
        states = [slot.unwrapped.state for slot in env.envs]
        assert states == [physics.init_state(task, 2 * batch), physics.init_state(task, 2 * batch + 1)]
        for _ in range(12):
            env.step(np.stack([expert_action(env.envs[0].unwrapped), np.array([0, 0, 0.2, 0, 0, 0, -1])]))


def test_lerobots_eval_runs_a_tiny_xvla():
    adapter = tiny_adapter()
    processors = adapter.processors
    env = make_env(TabletopEnv(episode_length=9), n_envs=2)["reach"][0]
    episodes = rollout(
        env,
        adapter.policy,
        processors.env_pre,
        processors.env_post,
        processors.policy_pre,
        processors.policy_post,
        seeds=[0, 1],
    )
    actions = episodes["action"]
    assert actions.shape == (2, 9, 7)
    assert torch.isfinite(actions).all()
    assert set(actions[..., 6].flatten().tolist()) <= {-1.0, 1.0}
    assert episodes["done"][:, -1].all()
    # the environments took those very actions
    replayed = started("reach", 1)
    for action in actions[1]:
        replayed.step(action.numpy())
    assert env.envs[1].unwrapped.state == replayed.state


def test_the_package_is_all_that_discovery_needs(monkeypatch):
    """What ``lerobot-eval --env.discover_packages_path=lerobot_pirl.envs --env.type=tabletop`` does first."""
    seen = {}

    @parser.wrap()
    def command(cfg: EvalPipelineConfig) -> None:
        seen["env"] = cfg.env

    arguments = ["--env.discover_packages_path=lerobot_pirl.envs", "--env.type=tabletop", "--env.task=pickup"]
    monkeypatch.setattr(sys, "argv", ["lerobot-eval", *arguments, "--policy.type=xvla"])
    command()
    assert isinstance(seen["env"], TabletopEnv)
    assert seen["env"].task == "pickup"
    assert EnvConfig.get_choice_class("tabletop") is TabletopEnv
