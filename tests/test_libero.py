"""LIBERO for real: chunked stepping shows, does and earns what LeRobot's own environment does step by step."""

import os
import subprocess
import sys
from contextlib import nullcontext

import gymnasium as gym
import numpy as np
import pytest
import torch
from lerobot.envs.configs import LiberoEnv as LiberoConfig

from lerobot_pirl.build import make_adapter
from lerobot_pirl.collector import Collector, Episode, EpisodeSpec
from lerobot_pirl.config import PiRLTrainConfig
from lerobot_pirl.envs import TabletopTask, make_chunk_envs, num_init_states, task_description, task_ids
from lerobot_pirl.envs.check import check_libero, rendered_frame
from lerobot_pirl.envs.chunk import _make_slot
from lerobot_pirl.envs.libero import selected_tasks
from lerobot_pirl.evaluate import Evaluation, evaluate
from tests.toy import CONFIGS

pytestmark = [pytest.mark.libero, pytest.mark.filterwarnings("ignore")]

CHUNK, SIZE, TASK = 5, 128, 2


@pytest.fixture(scope="module", autouse=True)
def usable() -> None:
    """Skip everything here where LIBERO is not usable, and say why."""
    for name, well, detail in check_libero():
        if not well:
            pytest.skip(f"{name}: {detail}")


def config(**options) -> LiberoConfig:
    options = {"task": "libero_10", "task_ids": [TASK, TASK + 1], "control_mode": "absolute"} | options
    return LiberoConfig(observation_height=SIZE, observation_width=SIZE, **options)


@pytest.fixture(scope="module")
def fast(usable):
    env = _make_slot(config(), CHUNK, None, TASK)
    env.reset(seed=0)
    yield env
    env.close()


def stock_env(task_id: int, task: str = "libero_10"):
    """LeRobot's environment of a task, which would draw in whatever GL context is current."""
    from lerobot.envs.libero import LiberoEnv, _get_suite

    class StockEnv(LiberoEnv):
        def make_current(self) -> None:
            if self._env is not None:
                self._env.sim._render_context_offscreen.gl_ctx.make_current()

        def reset(self, seed=None, **kwargs):
            self.make_current()
            return super().reset(seed, **kwargs)

        def step(self, action):
            self.make_current()
            return super().step(action)

        def close(self):
            self.make_current()
            super().close()

    kwargs = {key: value for key, value in config().gym_kwargs.items() if key != "task_ids"}
    return StockEnv(_get_suite(task), task_id, task, control_mode="absolute", **kwargs)


@pytest.fixture(scope="module")
def stock(fast):
    """LeRobot's environment of the same task."""
    env = stock_env(TASK)
    env.reset(seed=0)
    yield env
    env.close()


def simulator(env):
    """The robosuite environment inside."""
    return getattr(env, "env", env)._env.env


def start(env, init_state_id: int, seed: int = 3) -> dict:
    env.init_state_id = init_state_id
    return env.reset(seed=seed)[0]


def leaves(tree: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def assert_same(left: dict, right: dict, only: str = "") -> None:
    left, right = leaves(left), leaves(right)
    assert set(left) == set(right)
    for name in left:
        if name.startswith(only):
            np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def physics_of(env) -> np.ndarray:
    """All that the simulation goes on from."""
    import mujoco

    sim, parts = simulator(env).sim, mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(sim.model._model, parts))
    mujoco.mj_getState(sim.model._model, sim.data._data, state, parts)
    return state


def model_of(env) -> dict[str, np.ndarray]:
    model = simulator(env).sim.model._model
    values = {name: getattr(model, name) for name in dir(model) if not name.startswith("_")}
    return {name: np.array(value) for name, value in values.items() if isinstance(value, np.ndarray)}


def pose(observation: dict, offset=(0.0, 0.0, 0.0), gripper: float = -1.0, turn: float = 0.0) -> np.ndarray:
    """The action that goes ``offset`` metres away from where the arm is and turns it about the vertical."""
    from scipy.spatial.transform import Rotation  # comes with LIBERO

    eef = observation["robot_state"]["eef"]
    # the controller's frame is that of `mat`; `quat` is that of another body of the hand
    rotation = Rotation.from_rotvec([0, 0, turn]) * Rotation.from_matrix(eef["mat"])
    return np.concatenate([eef["pos"] + offset, rotation.as_rotvec(), [gripper]]).astype(np.float32)


def wandering_actions(observation: dict, count: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    offsets = np.cumsum(rng.uniform(-0.02, 0.02, (count, 3)), axis=0)
    return np.stack([pose(observation, offset, (-1.0) ** (i // 4)) for i, offset in enumerate(offsets)])


def step_singly(env, actions: np.ndarray) -> tuple[dict, float, bool]:
    """Step LeRobot's environment as it comes, until success; returns the last observation and summed rewards."""
    total = 0.0
    for action in actions:
        observation, reward, terminated, _, info = env.step(action)
        total += reward
        if terminated:
            break
    return observation, total, info["is_success"]


# --- the same as LeRobot's environment ------------------------------------------------------------------------


def test_a_camera_without_a_name_is_refused():
    with pytest.raises(
        ValueError, match="env.camera_name_mapping=.* has no name for robot0_eye_in_hand_image of"
    ):
        _make_slot(config(camera_name_mapping={"agentview_image": "image"}), CHUNK, None, TASK)


def test_first_observation_of_an_episode_is_the_same(fast, stock):
    assert_same(start(fast, 4), start(stock, 4))
    np.testing.assert_array_equal(physics_of(fast), physics_of(stock))


def test_whole_episode_with_a_time_out_inside_a_chunk_is_the_same(fast, stock, monkeypatch):
    limit = 2 * CHUNK + 3
    monkeypatch.setattr(fast, "_max_episode_steps_given", limit)
    observation = start(fast, 0)
    start(stock, 0)
    actions = wandering_actions(observation, 3 * CHUNK)
    for number in range(3):
        chunk = actions[number * CHUNK : (number + 1) * CHUNK]
        ours, reward, _, _, info = fast.step(chunk)
        theirs, expected, success = step_singly(stock, chunk[: limit - number * CHUNK])
        assert_same(ours, theirs)
        np.testing.assert_array_equal(physics_of(fast), physics_of(stock))
        assert (reward, info["is_success"]) == (expected, success) == (0.0, False)
    assert (info["n_steps"], info["truncated"], info["episode_steps"]) == (3, True, limit)


def test_success_inside_a_chunk_is_the_same_and_ends_the_episode(fast, stock, monkeypatch):
    observation = start(fast, 1)
    start(stock, 1)
    for env in (fast, stock):
        inner = simulator(env)
        goal = inner.timestep + CHUNK + 3
        monkeypatch.setattr(inner, "_check_success", lambda inner=inner, goal=goal: inner.timestep >= goal)
    actions = wandering_actions(observation, 2 * CHUNK)
    before, reward, *_ = fast.step(actions[:CHUNK])
    assert_same(before, step_singly(stock, actions[:CHUNK])[0])
    assert reward == 0.0
    ours, reward, _, _, info = fast.step(actions[CHUNK:])
    theirs, expected, success = step_singly(stock, actions[CHUNK:])
    assert (reward, info["is_success"], info["terminated"]) == (expected, success, True) == (1.0, True, True)
    assert (info["n_steps"], info["episode_steps"]) == (3, CHUNK + 3)
    np.testing.assert_array_equal(physics_of(fast), physics_of(stock))
    assert_same(ours, theirs, only="robot_state")
    assert_same(ours, before, only="pixels")
    # nothing moves any more
    after = fast.step(actions[:CHUNK])
    assert (after[1], after[4]["n_steps"]) == (0.0, 0)
    np.testing.assert_array_equal(physics_of(fast), physics_of(stock))


def test_soft_reset_is_the_same(fast, stock, monkeypatch):
    for env in (fast, stock):
        start(env, 6)
        monkeypatch.setattr(simulator(env), "hard_reset", False)
    ours, theirs = start(fast, 7), start(stock, 7)
    assert_same(ours, theirs)
    actions = wandering_actions(ours, CHUNK)
    assert_same(fast.step(actions)[0], step_singly(stock, actions)[0])
    np.testing.assert_array_equal(physics_of(fast), physics_of(stock))


def test_evaluation_moves_as_lerobots_rollout_does(stock, monkeypatch):
    """The policy of the smoke run, untrained, for four chunks: actions, robot and physics, to the last bit."""
    from lerobot.scripts.lerobot_eval import rollout

    cfg = PiRLTrainConfig.from_pretrained(CONFIGS / "pirl_libero10_smoke.json", cli_args=[])
    limit = cfg.algorithm.max_episode_steps
    with torch.random.fork_rng():
        adapter = make_adapter(cfg)
        state = torch.get_rng_state()
        monkeypatch.setattr(stock, "_max_episode_steps", limit)
        stock.init_state_id = 5
        pipelines = adapter.processors
        result = rollout(
            gym.vector.SyncVectorEnv([lambda: stock], autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP),
            adapter.policy,
            pipelines.env_pre,
            pipelines.env_post,
            pipelines.policy_pre,
            pipelines.policy_post,
            seeds=[3],
        )
    theirs = result["action"][0].numpy()

    def replay(state: torch.Tensor) -> tuple[np.ndarray, Evaluation]:
        generator, actions, step = torch.Generator(), [], envs.step
        generator.set_state(state)
        monkeypatch.setattr(envs, "step", lambda chunk: actions.append(np.array(chunk)) or step(chunk))
        collector = Collector(envs, adapter, 0.5, 7)
        evaluation = evaluate(collector, [EpisodeSpec(0, TASK, 5)], lambda spec: Episode(spec, 3, generator))
        return np.concatenate(actions, axis=1)[0], evaluation

    envs = make_chunk_envs(cfg.env, 1, adapter.n_action_steps, limit)
    try:
        ours, evaluation = replay(state)
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(physics_of(envs.envs[0]), physics_of(stock))
        assert evaluation.env_steps.tolist() == [len(theirs)] == [limit]
        assert evaluation.success.tolist() == result["success"].any(dim=1).tolist()
        assert not np.array_equal(replay(torch.Generator().manual_seed(4).get_state())[0], theirs)
    finally:
        envs.close()


# --- speed without difference ---------------------------------------------------------------------------------


def test_settling_renders_one_frame_per_camera_and_so_does_a_chunk(fast, monkeypatch):
    from robosuite.utils.binding_utils import MjSim

    frames = []
    render = MjSim.render
    monkeypatch.setattr(MjSim, "render", lambda *args, **kwargs: frames.append(1) or render(*args, **kwargs))
    cameras = fast.env._env
    per_step = []

    def step(action):
        before = len(frames)
        result = type(cameras).step(cameras, action)
        per_step.append(len(frames) - before)
        return result

    monkeypatch.setattr(cameras, "step", step, raising=False)
    observation = start(fast, 2)
    assert per_step == [0] * 9 + [2]
    per_step.clear()
    fast.step(wandering_actions(observation, CHUNK))
    assert per_step == [0, 0, 0, 0, 2]


def test_settling_is_not_part_of_the_episode(fast):
    observation = start(fast, 2)
    inner = simulator(fast)
    assert inner.timestep == fast.env.num_steps_wait == 10
    assert fast.env.hard_step_limit == inner.horizon - inner.timestep
    assert fast.max_episode_steps == 520
    assert fast.step(wandering_actions(observation, CHUNK))[4]["episode_steps"] == CHUNK


def test_reset_keeps_the_simulation_but_nothing_of_the_episode(fast, stock):
    observation = start(fast, 0)
    kept = simulator(fast).sim
    for _ in range(2):
        fast.step(np.tile(pose(observation, (0.05, 0.05, -0.1), 1.0), (CHUNK, 1)))
    for name in ("geom_rgba", "body_mass", "body_pos", "site_rgba", "jnt_range", "light_diffuse"):
        getattr(kept.model._model, name)[...] *= 0.5
    shown, draws, models = [], [], []
    for env in (fast, stock):
        shown.append(start(env, 9, seed=11))
        draws.append(np.random.get_state()[1:3])
        models.append(model_of(env))
    assert simulator(fast).sim is kept
    assert_same(*shown)
    assert_same(*models)
    assert len(models[0]) > 300
    np.testing.assert_array_equal(physics_of(fast), physics_of(stock))
    # fixtures are placed by what numpy draws
    np.testing.assert_array_equal(draws[0][0], draws[1][0])
    assert draws[0][1] == draws[1][1]


def test_another_xml_makes_another_simulation(fast, stock, monkeypatch):
    before = simulator(fast).sim
    monkeypatch.setattr(fast.env._env, "_xml", "of another scene")
    assert_same(start(fast, 5), start(stock, 5))
    assert simulator(fast).sim is not before
    actions = wandering_actions(start(fast, 6), CHUNK)
    start(stock, 6)
    assert_same(fast.step(actions)[0], step_singly(stock, actions)[0])
    np.testing.assert_array_equal(physics_of(fast), physics_of(stock))


def test_grasping_and_pushing_moves_the_same_with_one_forward_pass(fast, monkeypatch):
    """A hundred steps through the things on the table, against robosuite's own substeps."""

    def push() -> list[np.ndarray]:
        observation = start(fast, 3)
        inner = simulator(fast)
        thing = inner.sim.data.body_xpos[inner.obj_body_id["moka_pot_1"]].copy()
        offset = thing - observation["robot_state"]["eef"]["pos"]
        course = [
            (offset + (0, 0, 0.1), -1.0),
            (offset, -1.0),
            (offset, 1.0),
            (offset + (0.1, 0.1, 0.1), 1.0),
        ]
        states = [thing]
        for shift, gripper in course:
            for _ in range(5):
                fast.step(np.tile(pose(observation, shift, gripper), (CHUNK, 1)))
                states.append(physics_of(fast))
        return [*states, inner.sim.data.body_xpos[inner.obj_body_id["moka_pot_1"]].copy()]

    ours = push()
    monkeypatch.setattr("lerobot_pirl.envs.simulator.one_forward_pass", lambda sim: nullcontext())
    for state, expected in zip(ours, push(), strict=True):
        np.testing.assert_array_equal(state, expected)
    assert np.abs(ours[-1] - ours[0]).max() > 0.02


# --- what it does ---------------------------------------------------------------------------------------------


def test_absolute_poses_are_reached(fast):
    from scipy.spatial.transform import Rotation

    observation = start(fast, 3)
    goal = pose(observation, (0.06, -0.05, 0.04), turn=0.4)
    for _ in range(8):
        reached = fast.step(np.tile(goal, (CHUNK, 1)))[0]["robot_state"]["eef"]
    np.testing.assert_allclose(reached["pos"], goal[:3], atol=0.01)
    missing = Rotation.from_matrix(reached["mat"]) * Rotation.from_rotvec(goal[3:6]).inv()
    assert missing.magnitude() < 0.05


def test_tabletop_has_the_structure_of_these_observations(fast):
    tabletop = TabletopTask("reach", observation_height=SIZE, observation_width=SIZE)
    assert tabletop.observation_space == fast.observation_space
    ours, theirs = leaves(tabletop.reset()[0]), leaves(start(fast, 0))
    assert {name: (value.shape, value.dtype) for name, value in ours.items()} == {
        name: (value.shape, value.dtype) for name, value in theirs.items()
    }


def test_worker_process_shows_the_same(fast):
    """The renderer must come to life in the worker although the fork server has loaded the package."""
    expected = start(fast, 4)
    action = wandering_actions(expected, CHUNK)
    envs = make_chunk_envs(config(), 1, CHUNK, use_async=True)
    try:
        envs.set_attr("init_state_id", [4])
        observation, infos = envs.reset(seed=[3])
        assert infos["task"][0] == task_description(config(), TASK)
        assert_same({name: value[0] for name, value in leaves(observation).items()}, leaves(expected))
        observation = envs.step(action[None])[0]
        assert_same(
            {name: value[0] for name, value in leaves(observation).items()}, leaves(fast.step(action)[0])
        )
    finally:
        envs.close()


def test_task_changes_at_a_reset(fast):
    before = fast.task_description
    fast.task_id = TASK + 1
    observation = start(fast, 0)
    assert fast.observation_space.contains(observation)
    assert before == task_description(config(), TASK)
    assert fast.task_description == task_description(config(), TASK + 1) != before
    fast.task_id = TASK


# --- selection ------------------------------------------------------------------------------------------------


def test_suites_count_on_from_each_other():
    cfg = config(task="libero_10, libero_goal", task_ids=[2, 0, 2])
    assert selected_tasks(cfg) == {
        0: ("libero_10", 0),
        2: ("libero_10", 2),
        10: ("libero_goal", 0),
        12: ("libero_goal", 2),
    }
    assert task_ids(cfg) == [0, 2, 10, 12]
    assert task_description(cfg, 12) == task_description(config(task="libero_goal", task_ids=[2]), 2)
    assert task_ids(config(task_ids=None)) == list(range(10))


def test_tasks_have_fifty_initial_states_unless_they_are_off():
    assert num_init_states(config(), TASK) == 50
    assert num_init_states(config(init_states=False), TASK) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "libero_11"}, ("env.task names 'libero_11'", "libero_10", "libero_spatial")),
        ({"task": "libero_10,nope"}, ("env.task names 'nope'",)),
        ({"task_ids": [2, 10]}, ("env.task_ids=[2, 10] holds 10", "0 to 9")),
        ({"task_ids": [-1]}, ("env.task_ids=[-1] holds -1",)),
        ({"task_ids": []}, ("env.task_ids=[] selects no task",)),
        ({"task": " , "}, ("env.task=' , '", "selects no task")),
    ],
)
def test_wrong_suite_or_task_is_one_sentence(options, words):
    with pytest.raises(ValueError) as error:
        make_chunk_envs(config(**options), 1, CHUNK)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)


# --- this machine ---------------------------------------------------------------------------------------------


def test_missing_config_file_is_written_and_nothing_is_asked(tmp_path):
    """hf-libero asks on stdin when its config file is missing; here nobody could answer."""
    script = (
        "from lerobot.envs.configs import LiberoEnv\n"
        "from lerobot_pirl.envs.libero import selected_tasks\n"
        "print(selected_tasks(LiberoEnv(task='libero_10', task_ids=[2])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        stdin=subprocess.DEVNULL,
        env=os.environ | {"LIBERO_CONFIG_PATH": str(tmp_path / "new")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "{2: ('libero_10', 2)}"
    assert "custom path" not in done.stdout
    assert (tmp_path / "new" / "config.yaml").is_file()


def test_mujoco_renders_here():
    assert rendered_frame().startswith("rendered a frame with MUJOCO_GL=")
