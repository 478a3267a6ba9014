"""The scripted expert of LIBERO: what it commands, that it succeeds, and where else episodes can start."""

import numpy as np
import pytest
import torch
from lerobot.policies.xvla.processor_xvla import XVLARotation6DToAxisAngleProcessorStep
from lerobot.processor import PolicyProcessorPipeline
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action

from benchmarks.libero_expert import (
    MAX_STEPS,
    TASKS,
    drawn_init_states,
    expert_action,
    make_env,
    measure,
    record_demonstrations,
    run_episode,
    simulator,
)
from lerobot_pirl.envs.check import check_libero
from lerobot_pirl.envs.chunk import _make_slot
from tests.test_libero import CHUNK, assert_same, config, physics_of, step_singly, stock_env

pytestmark = [pytest.mark.libero, pytest.mark.filterwarnings("ignore")]

BOWL_ON_PLATE = TASKS["bowl_on_plate"]
DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])


@pytest.fixture(scope="module", autouse=True)
def usable() -> None:
    """Skip everything here where LIBERO is not usable, and say why."""
    for name, well, detail in check_libero():
        if not well:
            pytest.skip(f"{name}: {detail}")


@pytest.fixture(scope="module")
def env(usable):
    env = make_env(BOWL_ON_PLATE)
    env.reset(seed=0)
    yield env
    env.close()


def start(env, init_state_id: int) -> dict:
    env.init_state_id = init_state_id
    observation = env.reset(seed=init_state_id)[0]
    env.render_enabled = False
    return observation


def body(env, name: str) -> np.ndarray:
    return np.array(simulator(env).data.get_body_xpos(name))


def play(env, steps: int) -> dict:
    for _ in range(steps):
        observation = env.step(expert_action(BOWL_ON_PLATE, env))[0]
    return observation["robot_state"]


# --- what it commands -----------------------------------------------------------------------------------------


def test_a_command_is_an_absolute_pose_within_the_lead(env):
    eef = start(env, 3)["robot_state"]["eef"]
    action = expert_action(BOWL_ON_PLATE, env)
    assert action.shape == (7,)
    assert action.dtype == np.float32
    way = action[:3] - eef["pos"]
    assert np.linalg.norm(way[:2]) == pytest.approx(BOWL_ON_PLATE.lead, abs=1e-4)
    assert way[2] == pytest.approx(-BOWL_ON_PLATE.lead_z, abs=1e-4)
    assert np.dot(way[:2], body(env, BOWL_ON_PLATE.item)[:2] - eef["pos"][:2]) > 0
    assert action[6] == -1.0


def test_a_command_depends_on_the_state_alone(env):
    start(env, 3)
    sim = simulator(env)
    sim.forward()  # a step leaves the poses where they were before its last substep
    state, first = sim.get_state().flatten(), expert_action(BOWL_ON_PLATE, env)
    play(env, 22)  # the bowl is held now
    assert expert_action(BOWL_ON_PLATE, env)[6] != first[6]
    sim.set_state_from_flattened(state)
    sim.forward()
    np.testing.assert_array_equal(expert_action(BOWL_ON_PLATE, env), first)


def test_a_command_comes_back_from_the_policy_s_own_conversion(env):
    """Of the rotation the policy learns the first two columns, and of the gripper 1 for closed."""
    start(env, 3)
    action = expert_action(BOWL_ON_PLATE, env)
    learnt = np.concatenate([action[:3], DOWN[:, 0], DOWN[:, 1], [0.0], np.zeros(10)]).astype(np.float32)
    convert = PolicyProcessorPipeline(
        steps=[XVLARotation6DToAxisAngleProcessorStep()],
        to_transition=policy_action_to_transition,
        to_output=transition_to_policy_action,
    )
    executed = convert(torch.from_numpy(learnt)[None])[0].numpy()
    np.testing.assert_allclose(executed[[0, 1, 2, 6]], action[[0, 1, 2, 6]], atol=1e-6)
    # half a turn about an axis and about its opposite are the same
    np.testing.assert_allclose(executed[3:6] * np.sign(executed[3]), action[3:6], atol=1e-3)


def test_the_hand_gets_to_the_commanded_pose_and_stays_there(env):
    start(env, 3)
    command = expert_action(BOWL_ON_PLATE, env)
    for _ in range(40):
        observation = env.step(command)[0]
    eef = observation["robot_state"]["eef"]
    np.testing.assert_allclose(eef["pos"], command[:3], atol=2e-3)
    np.testing.assert_allclose(eef["mat"], DOWN, atol=0.01)


def test_fingers_close_at_the_rim_and_the_bowl_then_leaves_the_table(env):
    start(env, 5)
    lying = body(env, BOWL_ON_PLATE.item)[2]
    assert lying == pytest.approx(BOWL_ON_PLATE.rest_z, abs=2e-3)
    grippers = []
    for _ in range(24):
        action = expert_action(BOWL_ON_PLATE, env)
        grippers.append(action[6])
        env.step(action)
    assert body(env, BOWL_ON_PLATE.item)[2] > lying + 0.02
    # one change from open to closed
    assert np.flatnonzero(np.diff(grippers)).size == 1
    assert (grippers[0], grippers[-1]) == (-1.0, 1.0)


def test_a_bowl_that_is_lost_on_the_way_is_fetched_again(env):
    start(env, 5)
    play(env, 24)
    sim = simulator(env)
    address = sim.model.get_joint_qpos_addr("akita_black_bowl_1_joint0")[0]
    sim.data.qpos[address : address + 3] = [-0.12, 0.03, BOWL_ON_PLATE.rest_z]
    sim.forward()
    action = expert_action(BOWL_ON_PLATE, env)
    hand = sim.data.get_site_xpos("gripper0_grip_site")
    assert action[6] == -1.0
    assert np.dot((action[:3] - hand)[:2], body(env, BOWL_ON_PLATE.item)[:2] - hand[:2]) > 0
    for _ in range(60):
        success = env.step(expert_action(BOWL_ON_PLATE, env))[4]["is_success"]
        if success:
            break
    assert success


def test_fingers_closed_above_the_bowl_are_opened_first(env):
    start(env, 5)
    command = expert_action(BOWL_ON_PLATE, env)
    command[:3] = body(env, BOWL_ON_PLATE.item) + BOWL_ON_PLATE.grasp + [0.0, 0.0, 0.12]
    command[6] = 1.0
    for _ in range(25):
        opening = env.step(command)[0]["robot_state"]["gripper"]["qpos"] @ [1.0, -1.0]
    assert opening < BOWL_ON_PLATE.held_opening
    assert expert_action(BOWL_ON_PLATE, env)[6] == -1.0


# --- that it succeeds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("init_state_id", [0, 17, 42])
def test_the_bowl_gets_onto_the_plate(env, init_state_id):
    success, steps = run_episode(BOWL_ON_PLATE, env, init_state_id, seed=init_state_id)
    assert success
    assert steps <= 40


def test_the_plate_is_left_where_it_is(env):
    """A bowl that is carried off before it is high enough shoves the plate ahead."""
    start(env, 36)
    before = body(env, BOWL_ON_PLATE.goal)
    play(env, 29)
    assert np.linalg.norm(body(env, BOWL_ON_PLATE.goal) - before) < 2e-3


def test_it_copes_with_a_centimetre_of_noise(env):
    assert run_episode(BOWL_ON_PLATE, env, 8, noise=0.01, seed=8)[0]


def test_an_episode_without_success_ends_at_the_step_limit(env, monkeypatch):
    monkeypatch.setattr("benchmarks.libero_expert.MAX_STEPS", 4)
    assert run_episode(BOWL_ON_PLATE, env, 0) == (False, 4)


def test_a_measurement_counts_successes_and_their_steps(env, monkeypatch):
    steps = {0: 30, 1: 100, 2: 40}
    monkeypatch.setattr(
        "benchmarks.libero_expert.run_episode",
        lambda task, env, number, noise=0.0, seed=0: (number != 1, steps[number]),
    )
    report = measure(BOWL_ON_PLATE, env, 3, 0.0)
    assert report["success"] == pytest.approx(2 / 3)
    assert (report["failures"], report["mean_steps"], report["longest"]) == ([1], 35, 40)


# --- other places to start ------------------------------------------------------------------------------------


def object_places(env, states: np.ndarray) -> np.ndarray:
    """x and y of all objects, ``[states, 2 x objects]``."""
    joints = ("akita_black_bowl_1", "cream_cheese_1", "wine_bottle_1", "plate_1")
    addresses = [simulator(env).model.get_joint_qpos_addr(f"{name}_joint0")[0] for name in joints]
    return np.concatenate([states[:, 1 + address : 3 + address] for address in addresses], axis=1)


def test_drawn_states_are_new_and_lie_where_the_own_ones_do(env):
    own = env._init_states
    drawn = drawn_init_states(env, 200, seed=1)
    assert drawn.shape == (200, own.shape[1])
    ours, theirs = object_places(env, drawn), object_places(env, own)
    assert (ours >= theirs.min(axis=0)).all()
    assert (ours <= theirs.max(axis=0)).all()
    # of the whole rectangle, and nowhere the same as one of the task's own
    assert (np.ptp(ours, axis=0) > 0.9 * np.ptp(theirs, axis=0)).all()
    assert not (ours[:, None] == theirs[None]).all(axis=2).any()
    # heights, turns and the arm are those of own states
    changed = np.ones(own.shape[1], dtype=bool)
    for address in (9, 16, 23, 30):
        changed[1 + address : 3 + address] = False
    kept = {row.tobytes() for row in own[:, changed]}
    assert all(row.tobytes() in kept for row in drawn[:, changed])


def test_wider_rectangles_and_seeds_give_other_states(env):
    drawn = drawn_init_states(env, 200, seed=1)
    np.testing.assert_array_equal(drawn_init_states(env, 200, seed=1), drawn)
    assert not np.array_equal(drawn_init_states(env, 200, seed=2), drawn)
    spread = np.ptp(object_places(env, drawn), axis=0)
    wide = np.ptp(object_places(env, drawn_init_states(env, 200, seed=1, widen=2.0)), axis=0)
    np.testing.assert_allclose(wide, 2 * spread, rtol=1e-9)


def test_a_drawn_state_is_where_the_episode_starts(env, monkeypatch):
    drawn = drawn_init_states(env, 2, seed=4)
    monkeypatch.setattr(env, "_init_states", drawn)
    start(env, 1)
    places = object_places(env, drawn[1:])[0]
    np.testing.assert_allclose(body(env, "akita_black_bowl_1_main")[:2], places[:2], atol=2e-3)
    np.testing.assert_allclose(body(env, "plate_1_main")[:2], places[-2:], atol=2e-3)
    assert run_episode(BOWL_ON_PLATE, env, 1, seed=4)[0]


# --- demonstrations -------------------------------------------------------------------------------------------


def test_a_demonstration_holds_what_the_policy_sees_and_what_the_expert_commands(env, tmp_path, monkeypatch):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    monkeypatch.setattr(env, "_init_states", env._init_states)  # put back afterwards
    report = record_demonstrations(BOWL_ON_PLATE, env, tmp_path / "demos", episodes=1, seed=5, hold=2)
    dataset = LeRobotDataset("local/demonstrations", root=tmp_path / "demos")
    assert report["episodes"] == dataset.num_episodes == 1
    assert report["frames"] == len(dataset) <= 40
    first, last = dataset[0], dataset[len(dataset) - 1]
    assert first["task"] == "put the bowl on the plate"
    assert first["observation.images.image"].shape == (3, 64, 64)
    state, action = first["observation.state"].numpy(), first["action"].numpy()
    assert np.linalg.norm((action - state)[:2]) == pytest.approx(BOWL_ON_PLATE.lead, abs=1e-3)
    np.testing.assert_allclose(action[3:9], DOWN[:, :2].T.flatten(), atol=1e-6)
    assert (action[9], last["action"][9]) == (0.0, 1.0)
    # every frame was rendered when it was recorded, and the hand has come down
    frames = [dataset[number]["observation.images.image2"] for number in range(len(dataset))]
    assert all(not torch.equal(*pair) for pair in zip(frames, frames[1:], strict=False))
    assert last["observation.state"][2] < state[2] - 0.1


# --- another task ---------------------------------------------------------------------------------------------


def test_the_bowl_gets_onto_the_stove(usable):
    """The last one here: what closes its environment spoils the frames of others in the same process."""
    task = TASKS["bowl_on_stove"]
    env = make_env(task)
    try:
        success, steps = run_episode(task, env, 11, seed=11)
    finally:
        env.close()
    assert success
    assert steps <= 45


def test_a_whole_episode_that_succeeds_is_lerobots_state_by_state_and_frame_by_frame(env):
    observation, actions, done = start(env, 3), [], False
    while not done and len(actions) < MAX_STEPS:
        actions.append(expert_action(BOWL_ON_PLATE, env))
        *_, info = env.step(actions[-1])
        done = info["is_success"]
    assert done and len(actions) > 3 * CHUNK
    task = {"task": BOWL_ON_PLATE.suite, "task_ids": [BOWL_ON_PLATE.task_id]}
    fast = _make_slot(config(**task), CHUNK, None, BOWL_ON_PLATE.task_id)
    stock = stock_env(BOWL_ON_PLATE.task_id, BOWL_ON_PLATE.suite)
    try:
        for each in (fast, stock):
            each.init_state_id = 3
        observation, theirs = (each.reset(seed=3)[0] for each in (fast, stock))
        assert_same(observation, theirs)
        rewards, success = 0.0, False
        for first in range(0, len(actions), CHUNK):
            planned = np.array(actions[first : first + CHUNK])
            # what is left of a chunk after the success is not executed
            chunk = np.concatenate([planned, np.zeros((CHUNK - len(planned), 7), np.float32)])
            observation, reward, _, _, info = fast.step(chunk)
            theirs, expected, success = step_singly(stock, planned)
            rewards += reward
            assert (reward, info["is_success"], info["n_steps"]) == (expected, success, len(planned))
            np.testing.assert_array_equal(physics_of(fast), physics_of(stock))
            assert_same(observation, theirs, only="robot_state" if len(planned) < CHUNK else "")
        assert (rewards, success, info["episode_steps"]) == (1.0, True, len(actions))
    finally:
        fast.close()
        stock.close()
