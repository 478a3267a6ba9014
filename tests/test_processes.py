"""Learner and actor as two real processes, started with LeRobot's own commands and one config."""

import json
import re
import time

import pytest
from safetensors.torch import load_file

from lerobot_pirl.options import VARIANT_OPTIONS
from tests.terminals import TABLETOP, Run, end_well, running
from tests.toy import read_json

pytestmark = pytest.mark.e2e


@pytest.fixture
def run(tmp_path):
    with running(Run(tmp_path)) as run:
        yield run


def test_two_terminals_train_refuse_a_stranger_and_meet_a_restarted_actor(run):
    learner = run.start("learner", "--steps=4", "--save_freq=2")
    stranger = run.start("actor", "--steps=4", "--algorithm.gamma=0.9")
    assert stranger.status() == 1
    table = stranger.text()
    assert re.search(r"config_hash +\w{64} +\w{64}", table)
    assert re.search(r"algorithm.gamma +0.99 +0.9\n", table)
    assert "the same config file" in table
    assert "Traceback" not in table
    learner.wait_for("an actor refused this learner")
    assert "config_hash" in learner.text()

    killed = run.start("actor", "--steps=4")
    killed.wait_for("policy version 1 applied")
    killed.process.kill()
    actor = run.start("actor", "--steps=4")
    end_well(learner, actor)

    assert [r["iteration"] for r in run.metrics()] == [1, 2, 3, 4]
    assert [r["policy_version"] for r in run.metrics()] == [0, 1, 2, 3]
    assert all(r["train/ratio_max_dev_first"] < 1e-3 for r in run.metrics())
    assert [r["episodes"] for r in run.metrics()] == [4, 8, 12, 16]
    checkpoints = run.output_dir / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["000002", "000004", "last"]
    assert run.last_step() == 4
    config = read_json(checkpoints / "last/pretrained_model/config.json")
    assert (config["type"], config["num_denoising_steps"], config["n_action_steps"]) == ("xvla", 4, 5)
    assert "policy version 4 applied" in actor.text()
    assert (run.output_dir / "learning_curve.png").stat().st_size > 1000


def test_learned_noise_trains_is_saved_and_resumed(tmp_path):
    raw = read_json(TABLETOP)
    for name in VARIANT_OPTIONS["flow_sde"]:
        raw["algorithm"].pop(name, None)
    raw["algorithm"] |= {"variant": "flow_noise", "gripper": "bernoulli_last", "kl_coef": 1e-4}
    raw["algorithm"] |= {"noise_std_position": [0.04, 0.12], "noise_std_rotation": [0.2, 0.8]}
    config = tmp_path / "flow_noise.json"
    config.write_text(json.dumps(raw))
    with running(Run(tmp_path, config)) as run:
        end_well(*run.start_both("--steps=2"))
        end_well(*run.resume_both("--steps=3"))
        first, *_, last = run.metrics()
        assert [r["iteration"] for r in run.metrics()] == [1, 2, 3]
        assert all(r["train/ratio_max_dev_first"] < 1e-3 for r in run.metrics())
        assert first["train/kl_to_start"] == pytest.approx(0, abs=1e-5) and last["train/kl_to_start"] > 0
        for k in range(4):
            assert 0.04 < last[f"train/noise_std_position_step{k}"] < 0.12
            assert f"train/approx_kl_step{k}" in last
        saved = load_file(run.checkpoint(3) / "algorithm/model.safetensors")
        assert {name.partition(".")[0] for name in saved} == {"value_head", "noise_head", "start"}
        stock = load_file(run.checkpoint(3) / "pretrained_model/model.safetensors")
        assert not [name for name in stock if "noise_head" in name]


def test_ctrl_c_ends_both_leaves_a_checkpoint_and_a_resume_goes_on(run):
    learner = run.start("learner", "--steps=100000", "--save_freq=0")
    actor = run.start("actor", "--steps=100000", "--algorithm.async_envs=true")
    actor.wait_for("policy version 2 applied")
    pressed = time.monotonic()
    learner.interrupt()
    assert learner.status() == 130
    assert actor.status() == 1
    assert time.monotonic() - pressed < 60
    assert "the learner ended: the learner was interrupted" in actor.text()
    assert "Traceback" not in learner.text() + actor.text()
    done = run.last_step()
    assert done >= 2

    learner, actor = run.resume_both(f"--steps={done + 2}")
    end_well(learner, actor)
    assert run.last_step() == done + 2
    assert [r["iteration"] for r in run.metrics()] == list(range(1, done + 3))
    assert "policy version 0 applied" not in actor.text()


def test_ctrl_c_on_an_actor_ends_it_alone(run):
    learner = run.start("learner", "--steps=100000")
    actor = run.start("actor", "--steps=100000", "--algorithm.async_envs=true")
    actor.wait_for("policy version 1 applied")
    actor.interrupt()
    assert actor.status() == 130
    assert "Traceback" not in actor.text()
    assert learner.process.poll() is None
    learner.interrupt()
    assert learner.status() == 130


def test_a_killed_learner_is_resumed_while_the_actor_waits_and_its_steps_count(run):
    learner = run.start("learner", "--steps=100000", "--save_freq=1")
    # the number of updates is the learner's business
    actor = run.start("actor", "--steps=1")
    actor.wait_for("policy version 2 applied")
    learner.kill()
    done = run.last_step()
    learner = run.resume("learner", f"--steps={done + 2}")
    end_well(learner, actor)
    assert [r["iteration"] for r in run.metrics()] == list(range(1, done + 3))
    assert [r["episodes"] for r in run.metrics()] == [4 * n for n in range(1, done + 3)]
    assert run.last_step() == done + 2


def test_an_actor_without_a_learner_and_a_learner_without_a_port_end_with_a_sentence(run):
    actor = run.start("actor", "--algorithm.wire.connect_timeout_s=1")
    assert actor.status() == 1
    assert f"no learner at 127.0.0.1:{run.port}" in actor.text()
    assert not run.output_dir.exists()

    first = run.start("learner")
    first.wait_for("listening on")
    second = run.start("learner", f"--output_dir={run.folder / 'other'}")
    assert second.status() == 1
    assert f"port {run.port} on 127.0.0.1 is taken" in second.text()
    assert "Traceback" not in actor.text() + second.text()
    assert not (run.folder / "other").exists()


def test_a_learner_that_hears_nothing_fails_with_a_sentence_and_status_1(run):
    learner = run.start("learner", "--algorithm.wire.rollout_timeout_s=1")
    assert learner.status() == 1
    assert "no rollout for 1 s with 0 actors connected" in learner.text()
    assert run.last_step() == 0
    assert "Traceback" not in learner.text()
