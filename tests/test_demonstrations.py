"""Demonstrations: what the expert does, as X-VLA is to predict it, and which frames are kept."""

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from lerobot.envs.factory import make_env_pre_post_processors
from lerobot.utils.constants import ACTION, OBS_STATE

from benchmarks import demonstrations
from benchmarks.demonstrations import (
    SLIP_STEPS,
    Slips,
    frame,
    make_dataset,
    record,
    short_expert,
    xvla_action,
)
from lerobot_pirl.envs.tabletop_task import TabletopTask, expert_action
from tests.toy import tiny_config

SIZE, MAX_STEPS = 16, 12


@pytest.mark.parametrize("gripper", [-1.0, 1.0])
def test_lerobots_pipeline_turns_it_into_the_experts_action_again(gripper):
    cfg = tiny_config()
    _, post = make_env_pre_post_processors(cfg.env, cfg.policy)
    action = np.array([0.1, -0.05, 0.2, 0.3, -0.4, 1.2, gripper], np.float32)
    again = post({ACTION: torch.from_numpy(xvla_action(action))[None]})[ACTION][0]
    np.testing.assert_allclose(again.numpy(), action, atol=1e-5)


def test_a_frame_holds_the_pictures_upright_and_the_proprioception():
    env = TabletopTask("pickup", observation_height=SIZE, observation_width=SIZE)
    observation, _ = env.reset(seed=0)
    found = frame(observation, expert_action(env), env.task_description)
    pixels = observation["pixels"]
    # LIBERO's fixed camera comes rotated, the other one does not
    np.testing.assert_array_equal(found["observation.images.image"], pixels["image"][::-1, ::-1])
    np.testing.assert_array_equal(found["observation.images.image2"], pixels["image2"])
    np.testing.assert_allclose(found[OBS_STATE][:3], env.state.eef, rtol=1e-6)
    assert found["task"] == "pick up the green cube"


class Counted:
    """An environment that succeeds in one step of its choice; its state is the number of steps."""

    task_description = "count"

    def __init__(self, succeeds_at: int):
        self.tabletop = TabletopTask("reach", observation_height=SIZE, observation_width=SIZE)
        self.succeeds_at = succeeds_at

    def reset(self, seed: int):
        self.steps = 0
        self.observation, _ = self.tabletop.reset(seed=seed)
        return self.observation, {}

    def step(self, action):
        self.steps += 1
        return self.observation, 0.0, False, False, {"is_success": self.steps == self.succeeds_at}


def recorded(tmp_path, succeeds_at: int, hold: int) -> list[int]:
    """Record one episode; returns the commands of its frames, which count them."""
    dataset = make_dataset(tmp_path / "dataset", (SIZE, SIZE), fps=20)
    env = Counted(succeeds_at)
    kept = record(dataset, env, lambda env: np.array([env.steps, *[0] * 6], np.float32), 0, MAX_STEPS, hold)
    assert kept == (dataset.num_episodes == 1)
    dataset.finalize()
    return [round(row[ACTION][0].item()) for row in dataset] if kept else []


@pytest.mark.parametrize("hold", [0, 3])
@pytest.mark.parametrize("succeeds_at", [1, 5, MAX_STEPS])
def test_an_episode_ends_so_many_frames_after_its_success(tmp_path, succeeds_at, hold):
    assert recorded(tmp_path, succeeds_at, hold) == list(range(succeeds_at + hold))


def test_an_episode_without_success_in_time_is_left_out(tmp_path):
    assert recorded(tmp_path, MAX_STEPS + 1, 3) == []


def test_a_slip_displaces_some_steps_alike_and_may_turn_the_gripper_round():
    slips = Slips(0.1, 0.03, np.random.default_rng(0))
    command = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0], np.float32)
    executed = np.array([slips(command) for _ in range(4000)])
    wrong = (executed[:, :3] != command[:3]).all(axis=1)
    # one in ten of the steps outside of a slip begins one
    assert 0.2 < wrong.mean() < 0.27
    shifts = executed[wrong, :3].reshape(-1, SLIP_STEPS, 3) - command[:3]
    np.testing.assert_array_equal(shifts, shifts[:, :1].repeat(SLIP_STEPS, axis=1))
    assert 0.025 < shifts[:, 0].std() < 0.035
    assert 0.4 < (executed[wrong, 6] == -1).mean() < 0.6
    np.testing.assert_array_equal(executed[~wrong], np.tile(command, (int((~wrong).sum()), 1)))
    np.testing.assert_array_equal(executed[:, 3:6], np.tile(command[3:6], (4000, 1)))


def test_frames_hold_the_experts_commands_and_not_the_slips(tmp_path):
    dataset = make_dataset(tmp_path / "dataset", (SIZE, SIZE), fps=20)
    env, executed = Counted(3), []
    step = env.step
    env.step = lambda action: executed.append(action[0]) or step(action)
    assert record(
        dataset, env, lambda env: np.full(7, 5.0, np.float32), 0, MAX_STEPS, 1, lambda action: action * 2
    )
    dataset.finalize()
    assert executed == [10.0] * 4
    assert [row[ACTION][0].item() for row in dataset] == [5.0] * 4


@pytest.mark.parametrize("task", ["reach", "pickup"])
@pytest.mark.parametrize("short", [0.0, 0.02])
def test_an_expert_that_aims_short_stops_so_far_from_the_object_on_its_way_from_the_tables_centre(
    task, short
):
    env = TabletopTask(task, observation_height=SIZE, observation_width=SIZE)
    env.reset(seed=0)
    env.state = replace(env.state, target=(0.06, -0.08, env.state.target[2]))
    aimed = short_expert(short)(env)
    assert math.hypot(*aimed[:2]) == pytest.approx(0.1 - short)
    assert aimed[0] / aimed[1] == pytest.approx(-0.75)
    np.testing.assert_array_equal(aimed[2:], expert_action(env)[2:])


def test_an_expert_that_aims_short_does_not_aim_beyond_the_tables_centre():
    env = TabletopTask("reach", observation_height=SIZE, observation_width=SIZE)
    for target in ((0.01, 0.0, 0.0), (0.0, 0.0, 0.0)):
        env.state = replace(env.state, target=target)
        np.testing.assert_array_equal(short_expert(0.02)(env)[:2], [0.0, 0.0])


@pytest.mark.parametrize("widen", [1.0, 1.5])
def test_the_objects_of_demonstrations_lie_in_the_tasks_square_or_in_a_wider_one(
    tmp_path, monkeypatch, widen
):
    seen = []

    def note(dataset, env, *rest):
        env.reset(seed=rest[1])
        seen.append(np.abs(env.state.target[:2]).max())

    monkeypatch.setattr(demonstrations, "record", note)
    options = [str(tmp_path / "demos"), "--episodes=60", f"--size={SIZE}", f"--widen={widen}"]
    monkeypatch.setattr(sys, "argv", ["demonstrations", *options])
    demonstrations.main()
    assert 0.11 * widen < max(seen) < 0.12 * widen
