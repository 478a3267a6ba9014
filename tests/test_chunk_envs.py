"""Chunks of actions in an environment slot, and vectors of slots in one process or in many."""

import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from lerobot.envs.configs import EnvConfig, PushtEnv

from lerobot_pirl.envs import (
    ChunkEnv,
    TabletopEnv,
    TabletopTask,
    expert_chunk,
    make_chunk_envs,
    num_init_states,
    task_description,
    task_ids,
)
from lerobot_pirl.envs.chunk import _make_slot
from lerobot_pirl.envs.workers import WorkerDied, WorkerEnvs, WorkerHangs

CHUNK = 5
# workers import LeRobot once, in the fork server, but that may take its time on a busy machine
WORKER_TIMEOUT_S = 120


class CountingEnv(gym.Env):
    """Succeeds in step ``succeed_at``; its observation tells the step and which one was rendered last."""

    metadata: dict = {}
    render_mode = "rgb_array"
    _max_episode_steps = 100

    def __init__(self, task_id: int = 0, succeed_at: int | None = None):
        self.task_id = task_id
        self.succeed_at = succeed_at
        self.task_description = f"task {task_id}"
        self.observation_space = gym.spaces.Dict(
            {"step": gym.spaces.Box(0, 999, (), np.int64), "rendered": gym.spaces.Box(0, 999, (), np.int64)}
        )
        self.render_enabled = True
        self.closed = False
        self.actions: list[float] = []
        self.rendered = 0

    def _observe(self) -> dict:
        if self.render_enabled:
            self.rendered = len(self.actions)
        return {"step": np.int64(len(self.actions)), "rendered": np.int64(self.rendered)}

    def reset(self, *, seed=None, options=None):
        self.started_at = self.init_state_id
        self.actions = []
        return self._observe(), {}

    def step(self, action):
        self.actions.append(float(action[0]))
        success = len(self.actions) == self.succeed_at
        return self._observe(), float(success), success, False, {"is_success": success}

    def close(self):
        self.closed = True


def slot(succeed_at: int | None = None, limit: int | None = None) -> ChunkEnv:
    env = ChunkEnv(partial(CountingEnv, succeed_at=succeed_at), CHUNK, limit)
    env.reset()
    return env


def chunk(first: int = 0) -> np.ndarray:
    """Actions that tell which one they are: ``first``, ``first + 1``, ..."""
    actions = np.zeros((CHUNK, 7), np.float32)
    actions[:, 0] = np.arange(first, first + CHUNK)
    return actions


def step(env: ChunkEnv, first: int = 0) -> tuple[dict, float, dict]:
    observation, reward, terminated, truncated, info = env.step(chunk(first))
    assert terminated is truncated is False  # Gymnasium's vectors would refuse to step such a slot again
    return observation, reward, info


# --- success --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("succeed_at", range(1, 2 * CHUNK + 1))
def test_success_is_rewarded_with_exactly_one_wherever_in_a_chunk_it_falls(succeed_at):
    env = slot(succeed_at)
    results = [step(env) for _ in range(4)]
    rewards = [reward for _, reward, _ in results]
    winning = (succeed_at - 1) // CHUNK
    assert rewards == [float(number == winning) for number in range(4)]
    assert [info["terminated"] for _, _, info in results] == [number == winning for number in range(4)]
    assert [info["is_success"] for _, _, info in results] == [number == winning for number in range(4)]
    assert not any(info["truncated"] for _, _, info in results)
    assert sum(info["n_steps"] for _, _, info in results) == succeed_at


def test_actions_after_success_are_not_executed():
    env = slot(succeed_at=7)
    step(env, first=10)
    _, _, info = step(env, first=20)
    assert env.env.actions == [10, 11, 12, 13, 14, 20, 21]
    assert (info["n_steps"], info["episode_steps"]) == (2, 7)


@pytest.mark.parametrize(("succeed_at", "limit"), [(3, None), (None, 3)], ids=["success", "time-out"])
def test_finished_slot_stays_as_it_is(succeed_at, limit):
    env = slot(succeed_at, limit)
    last, _, _ = step(env)
    for _ in range(2):
        observation, reward, info = step(env)
        assert observation is last
        assert reward == 0.0
        assert info == {
            "is_success": False,
            "terminated": False,
            "truncated": False,
            "n_steps": 0,
            "episode_steps": 3,
        }
    assert len(env.env.actions) == 3


def test_a_slot_that_is_reset_idle_executes_nothing_until_its_next_reset():
    env = slot()
    env.idle = True
    env.reset()
    for _ in range(2):
        _, reward, info = step(env)
        assert (reward, info["n_steps"], info["truncated"]) == (0.0, 0, False)
    assert env.env.actions == []
    env.idle = False
    env.reset()
    step(env)
    assert len(env.env.actions) == CHUNK


def test_an_environment_without_steps_is_refused():
    class Endless(CountingEnv):
        _max_episode_steps = 0

    with pytest.raises(ValueError, match="env.episode_length gives an episode 0 steps; raise it"):
        ChunkEnv(Endless, CHUNK)


# --- the step limit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, CHUNK - 1, CHUNK, CHUNK + 2, 2 * CHUNK])
def test_time_runs_out_exactly_at_the_limit(limit):
    env = slot(limit=limit)
    infos = [step(env)[2] for _ in range(2)]
    executed = [min(CHUNK, limit), max(0, min(CHUNK, limit - CHUNK))]
    assert [info["n_steps"] for info in infos] == executed
    assert len(env.env.actions) == limit
    last = 0 if limit <= CHUNK else 1
    assert [info["truncated"] for info in infos] == [number == last for number in range(2)]
    assert not any(info["terminated"] or info["is_success"] for info in infos)


@pytest.mark.parametrize("limit", [CHUNK - 2, CHUNK])
def test_success_in_the_very_last_step_is_success(limit):
    _, reward, info = step(slot(succeed_at=limit, limit=limit))
    assert (reward, info["terminated"], info["truncated"]) == (1.0, True, False)


def test_environments_own_limit_counts_unless_one_is_given_but_never_its_hard_limit():
    env = slot()
    assert env.max_episode_steps == 100
    assert slot(limit=200).max_episode_steps == 200
    env.env.hard_step_limit = CHUNK + 1
    assert step(env)[2]["truncated"] is False
    assert step(env)[2] | {"n_steps": 1, "truncated": True, "episode_steps": CHUNK + 1} == step(env)[2] | {
        "n_steps": 1,
        "truncated": True,
    }
    assert len(env.env.actions) == CHUNK + 1


def test_a_new_episode_counts_from_zero():
    env = slot(limit=CHUNK)
    assert step(env)[2]["truncated"]
    env.reset()
    assert step(env)[2]["episode_steps"] == CHUNK


# --- rendering ------------------------------------------------------------------------------------------------


def test_only_the_last_step_of_a_chunk_renders():
    env = slot()
    shown = []
    original = env.env.step
    env.env.step = lambda action: shown.append(env.env.render_enabled) or original(action)
    for number in (1, 2):
        observation, _, _ = step(env)
        assert observation["rendered"] == observation["step"] == number * CHUNK
    assert shown == [False, False, False, False, True] * 2


def test_frame_of_a_time_out_inside_a_chunk_is_the_true_last_one():
    env = slot(limit=CHUNK + 2)
    step(env)
    observation, _, info = step(env)
    assert info["truncated"]
    assert observation["rendered"] == observation["step"] == CHUNK + 2


def test_frame_after_success_inside_a_chunk_is_the_one_before_it():
    env = slot(succeed_at=CHUNK + 2)
    step(env)
    observation, _, _ = step(env)
    assert (observation["step"], observation["rendered"]) == (CHUNK + 2, CHUNK)


def test_first_frame_of_an_episode_is_rendered():
    env = slot(succeed_at=CHUNK + 2)
    step(env)
    step(env)
    observation, _ = env.reset()
    assert observation["rendered"] == observation["step"] == 0


def test_chunked_tabletop_shows_what_single_steps_show():
    env = ChunkEnv(lambda task_id: TabletopTask("pickup", task_id), CHUNK)
    env.init_state_id = 4
    env.reset(seed=0)
    single = TabletopTask("pickup", episode_index=4)
    single.reset(seed=0)
    for _ in range(2):
        actions = expert_chunk(single, CHUNK)
        for action in actions:
            expected = single.step(action)[0]
        observation = env.step(actions)[0]
        assert_same(observation, expected)


# --- misuse ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(CHUNK - 1, 7), (CHUNK, 6), (1, CHUNK, 7), (7,)])
def test_chunk_of_another_shape_is_refused(shape):
    env = slot()
    with pytest.raises(ValueError, match=r"shape .* but this environment takes \(5, 7\).*n_action_steps"):
        env.step(np.zeros(shape, np.float32))
    assert env.env.actions == []


def test_stepping_before_the_first_reset_is_refused():
    env = ChunkEnv(CountingEnv, CHUNK)
    with pytest.raises(RuntimeError, match="never reset"):
        env.step(chunk())


@pytest.mark.parametrize(
    ("options", "name"),
    [({"n_action_steps": 0}, "n_action_steps is 0"), ({"max_episode_steps": 0}, "max_episode_steps is 0")],
)
def test_numbers_below_one_are_refused(options, name):
    with pytest.raises(ValueError, match=f"{name} but must be at least 1"):
        ChunkEnv(CountingEnv, **({"n_action_steps": CHUNK} | options))


def test_vector_without_slots_is_refused():
    with pytest.raises(ValueError, match="number of environments is 0"):
        make_chunk_envs(TabletopEnv(), 0, CHUNK)


@pytest.mark.parametrize("ask", [task_ids, partial(make_chunk_envs, n_envs=1, n_action_steps=CHUNK)])
def test_other_environment_types_are_refused_by_name(ask):
    cfg: EnvConfig = PushtEnv()
    with pytest.raises(ValueError, match="env.type is 'pusht' but lerobot-pirl runs tabletop, libero"):
        ask(cfg)


# --- tasks ----------------------------------------------------------------------------------------------------


def test_new_task_is_built_at_the_next_reset_and_the_old_one_closed():
    env = slot()
    old = env.env
    env.task_id, env.init_state_id = 3, 17
    step(env)
    assert env.env is old and not old.closed
    _, info = env.reset()
    assert info == {"is_success": False, "task": "task 3"}
    assert old.closed
    assert (env.env.task_id, env.env.started_at, env.task_description) == (3, 17, "task 3")


def test_same_task_is_not_built_again_and_the_initial_state_stays():
    env = slot()
    old = env.env
    env.init_state_id = 8
    for _ in range(2):
        env.reset()
        assert env.env is old and not old.closed
        assert (env.env.started_at, env.init_state_id) == (8, 8)


def test_each_task_of_tabletop_has_its_own_limit():
    envs = make_chunk_envs(TabletopEnv(task="reach,pickup"), 1, CHUNK)
    limits = []
    for task_id in (0, 1):
        envs.set_attr("task_id", [task_id])
        envs.reset()
        limits.append(envs.get_attr("max_episode_steps")[0])
    assert limits == [40, 60]


def test_tasks_of_a_config():
    cfg = TabletopEnv(task="reach,pickup", task_ids=[1])
    assert task_ids(cfg) == [1]
    assert task_description(cfg, 1) == "pick up the green cube"
    assert num_init_states(cfg, 1) == 50
    assert num_init_states(TabletopEnv(init_states=False), 0) == 1
    envs = make_chunk_envs(cfg, 1, CHUNK)
    assert envs.get_attr("task_description") == ("pick up the green cube",)


# --- vectors --------------------------------------------------------------------------------------------------


def assert_same(left, right) -> None:
    if isinstance(left, dict):
        assert set(left) == set(right)
        for key in left:
            assert_same(left[key], right[key])
    else:
        np.testing.assert_array_equal(left, right)
        assert np.asarray(left).dtype == np.asarray(right).dtype


def tabletop(**options) -> TabletopEnv:
    return TabletopEnv(task="reach,pickup", observation_height=24, observation_width=24, **options)


def drive(envs: gym.vector.VectorEnv) -> list:
    """A fixed course with a change of task, slots that finish and a masked reset; returns all that was seen."""
    seen = []
    envs.set_attr("init_state_id", [0, 1, 2])
    seen.append(envs.reset(seed=[0, 1, 2])[0])
    rng = np.random.default_rng(0)
    for number in range(4):
        actions = rng.uniform(-0.2, 0.2, (3, CHUNK, 7)).astype(np.float32)
        observation, rewards, _, _, infos = envs.step(actions)
        seen += [
            observation,
            rewards,
            {name: infos[name] for name in ("n_steps", "truncated", "episode_steps")},
        ]
        if number == 2:
            envs.set_attr("task_id", [0, 1, 0])
            mask = np.array([False, True, False])
            seen.append(envs.reset(seed=[5, 6, 7], options={"reset_mask": mask})[0])
    return seen


def test_reset_mask_resets_some_slots_and_leaves_the_others_running():
    envs = make_chunk_envs(tabletop(), 3, CHUNK)
    seen = drive(envs)
    assert [slot.env.task for slot in envs.envs] == ["reach", "pickup", "reach"]
    before, after = seen[9]["episode_steps"], seen[13]["episode_steps"]
    np.testing.assert_array_equal(before, [15, 15, 15])
    np.testing.assert_array_equal(after, [20, 5, 20])
    masked = seen[10]["robot_state"]["eef"]["pos"]
    np.testing.assert_array_equal(masked[[0, 2]], seen[7]["robot_state"]["eef"]["pos"][[0, 2]])
    assert not np.array_equal(masked[1], seen[7]["robot_state"]["eef"]["pos"][1])


def bounded(call):
    """Run ``call`` in a thread and return what it raised; a hang fails the test instead of blocking it."""
    raised = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # handed to the caller
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(WORKER_TIMEOUT_S)
    assert not thread.is_alive(), "the call hangs"
    return raised[0] if raised else None


@pytest.fixture
def workers():
    envs = make_chunk_envs(tabletop(), 3, CHUNK, use_async=True)
    yield envs
    envs.close()


def test_worker_processes_show_the_same_as_one_process(workers):
    assert isinstance(workers, WorkerEnvs)
    for ours, theirs in zip(drive(workers), drive(make_chunk_envs(tabletop(), 3, CHUNK)), strict=True):
        assert_same(ours, theirs)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="semaphores are no files here")
@pytest.mark.parametrize("dies", [False, True])
def test_workers_that_are_closed_or_die_leave_no_semaphore(workers, dies):
    queue = workers.error_queue
    names = [lock._semlock.name.strip("/") for lock in (queue._rlock, queue._wlock, queue._sem)]
    files = [Path("/dev/shm") / f"sem.{name}" for name in names]
    del queue
    assert all(file.exists() for file in files)
    if dies:
        workers.processes[1].kill()
        assert isinstance(bounded(lambda: workers.reset(seed=0)), WorkerDied)
    else:
        workers.close()
    assert not any(file.exists() for file in files)


@pytest.mark.filterwarnings("ignore:.*ERROR")  # Gymnasium prints the worker's traceback as a warning
def test_error_inside_a_worker_arrives_as_itself(workers):
    workers.reset(seed=0)
    actions = np.zeros((3, CHUNK, 7), np.float32)
    actions[1, 2, 3] = np.nan
    error = bounded(lambda: workers.step(actions))
    assert isinstance(error, ValueError)
    assert "7 finite numbers" in str(error)
    assert bounded(workers.close) is None
    assert not any(process.is_alive() for process in workers.processes)


@pytest.mark.parametrize(
    "moment", ["before a step", "during a step", "before a reset", "before an attribute"]
)
def test_death_of_a_worker_is_one_sentence_and_no_hang(workers, moment):
    workers.reset(seed=0)
    victim = workers.processes[1]
    actions = np.zeros((3, CHUNK, 7), np.float32)
    calls = {
        "before a step": lambda: workers.step(actions),
        "during a step": workers.step_wait,
        "before a reset": lambda: workers.reset(seed=0),
        "before an attribute": lambda: workers.set_attr("task_id", 0),
    }
    if moment == "during a step":
        os.kill(victim.pid, signal.SIGSTOP)  # so that it cannot answer before it dies
        workers.step_async(actions)
    victim.kill()
    if moment != "during a step":
        victim.join()
    error = bounded(calls[moment])
    assert isinstance(error, WorkerDied)
    assert str(error).startswith(
        f"environment worker number 1 (pid {victim.pid}, exit status -9) of 3 died; "
    )
    assert "\n" not in str(error)
    assert not any(process.is_alive() for process in workers.processes)
    assert bounded(workers.close) is None


def test_ctrl_c_which_reaches_the_workers_too_leaves_them_working(workers):
    first, _ = workers.reset(seed=0)
    for process in workers.processes:
        os.kill(process.pid, signal.SIGINT)
    again, _ = workers.reset(seed=0)
    assert_same(first, again)
    assert all(process.is_alive() for process in workers.processes)


def test_workers_are_stopped_in_silence_when_a_call_is_interrupted(workers, monkeypatch, capfd):
    workers.reset(seed=0)
    workers.step_async(np.zeros((3, CHUNK, 7), np.float32))

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    # the first answer is taken, the others are on their way
    workers.parent_pipes[0].recv()
    monkeypatch.setattr("gymnasium.vector.AsyncVectorEnv.step_wait", interrupted)
    assert isinstance(bounded(workers.step_wait), KeyboardInterrupt)
    assert bounded(workers.close) is None
    assert not any(process.is_alive() for process in workers.processes)
    assert "Traceback" not in "".join(capfd.readouterr())


class Probe(CountingEnv):
    """Tells in its task description which modules were there when it was built."""

    def __init__(self, task_id: int = 0):
        super().__init__(task_id)
        self.task_description = " ".join(sys.modules)


def test_a_worker_starts_without_a_renderer():
    """Forked children cannot use a renderer that their parent initialised."""
    envs = WorkerEnvs([partial(ChunkEnv, Probe, CHUNK)])
    loaded = envs.get_attr("task_description")[0].split()
    envs.close()
    assert "lerobot_pirl" in loaded
    assert not {"mujoco", "robosuite", "libero", "OpenGL"} & set(loaded)


def test_worker_that_dies_while_it_builds_its_environment_is_named():
    good = partial(_make_slot, tabletop(), CHUNK, None, 0)
    error = bounded(lambda: WorkerEnvs([good, partial(os._exit, 3)]))
    assert isinstance(error, WorkerDied)
    assert "worker number 1 (pid" in str(error)
    assert "exit status 3) of 2 died" in str(error)


FOR_GOOD = 10**6


class Sleeper(CountingEnv):
    """Falls asleep where its task says so."""

    def step(self, action):
        if self.task_id == 1:
            time.sleep(FOR_GOOD)
        return super().step(action)

    def close(self):
        if self.task_id == 2:
            time.sleep(FOR_GOOD)


@pytest.fixture
def sleepers():
    envs = WorkerEnvs([partial(ChunkEnv, Sleeper, CHUNK)] * 2)
    envs.reset(seed=0)
    yield envs
    envs.close()


def hurry(envs: WorkerEnvs) -> None:
    """Let the workers, which have started, answer within a second from now on."""
    envs._timeout_s = 1.0
    for pipe in envs.parent_pipes:
        pipe._timeout_s = 1.0


def assert_hangs(error: BaseException | None, envs: WorkerEnvs, place: str) -> None:
    assert isinstance(error, WorkerHangs)
    sentence = str(error)
    assert sentence.startswith("environment worker number ") and "\n" not in sentence
    assert f"number 1 (pid {envs.processes[1].pid}, {place})" in sentence
    assert f" of {envs.num_envs} has not answered for 1 s; " in sentence
    assert "raise algorithm.env_timeout_s" in sentence
    assert not any(process.is_alive() for process in envs.processes)
    assert bounded(envs.close) is None


def test_worker_that_sleeps_for_good_is_one_sentence_with_its_task(sleepers):
    sleepers.set_attr("task_id", [0, 1])
    sleepers.reset(seed=0)
    hurry(sleepers)
    actions = np.zeros((2, CHUNK, 7), np.float32)
    assert_hangs(bounded(lambda: sleepers.step(actions)), sleepers, "at task 1")


def test_worker_that_sleeps_while_it_closes_is_killed(sleepers, monkeypatch):
    sleepers.set_attr("task_id", [0, 2])
    sleepers.reset(seed=0)
    monkeypatch.setattr("lerobot_pirl.envs.workers.CLOSE_TIMEOUT_S", 1.0)
    assert bounded(sleepers.close) is None
    assert sleepers.processes[1].exitcode == -signal.SIGKILL


@pytest.mark.parametrize("unanswered", ["task_id", "init_state_id"])
def test_worker_that_the_system_has_stopped_is_one_sentence_and_gone(workers, unanswered):
    if unanswered != "task_id":
        workers.set_attr("task_id", 0)
    hurry(workers)
    os.kill(workers.processes[1].pid, signal.SIGSTOP)
    assert_hangs(bounded(lambda: workers.set_attr(unanswered, 0)), workers, "at task 0")


def test_worker_that_is_never_built_is_one_sentence():
    good = partial(_make_slot, tabletop(), CHUNK, None, 0)
    error = bounded(lambda: WorkerEnvs([good, partial(time.sleep, FOR_GOOD)], timeout_s=1.0))
    assert isinstance(error, WorkerHangs)
    assert "being built) of 2 has not answered for 1 s" in str(error)


def test_workers_get_the_time_that_is_given():
    envs = make_chunk_envs(tabletop(), 1, CHUNK, use_async=True, timeout_s=123.0)
    try:
        assert [pipe._timeout_s for pipe in envs.parent_pipes] == [123.0]
    finally:
        envs.close()
