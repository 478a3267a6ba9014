"""A learner of two processes and its actor, started with the real commands."""

import re

import psutil
import pytest

from tests.terminals import Run, end_well, running

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
# without a GPU too
LAUNCHER = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0")


@pytest.fixture
def run(tmp_path):
    with running(Run(tmp_path)) as run:
        try:
            yield run
        finally:
            # each of a launcher's processes leads a group of its own
            for process in run.started:
                for each in ranks(process.pid).values():
                    each.kill()


def ranks(launcher: int) -> dict[int, psutil.Process]:
    """Return the processes of a launcher that is running, by rank."""
    try:
        children = psutil.Process(launcher).children()
        return {int(child.environ()["RANK"]): child for child in children if "RANK" in child.environ()}
    except psutil.Error:
        return {}


def test_two_processes_train_and_one_or_two_go_on(run):
    learner = run.start("learner", "--steps=2", "--save_freq=1", launcher=LAUNCHER)
    actor = run.start("actor", "--steps=2")
    end_well(learner, actor)
    # the second says nothing that the first one says
    assert "[LEARNER] INFO" in learner.text() and "[LEARNER 1] INFO" not in learner.text()
    end_well(*run.resume_both("--steps=3"))
    launched = run.resume("learner", "--steps=4", launcher=LAUNCHER, package="lerobot_pirl")
    end_well(launched, run.resume("actor", "--steps=4"))

    assert [r["iteration"] for r in run.metrics()] == [1, 2, 3, 4]
    assert [r.get("learner/num_processes") for r in run.metrics()] == [2, None, None, 2]
    assert all(r["train/ratio_max_dev_first"] < 1e-3 for r in run.metrics())
    assert run.last_step() == 4


def test_a_process_that_dies_ends_the_run(run):
    learner = run.start("learner", "--steps=100000", "--save_freq=1", launcher=LAUNCHER)
    actor = run.start("actor", "--steps=100000")
    actor.wait_for("policy version 1 applied")
    members = ranks(learner.process.pid)
    assert set(members) == {0, 1}
    members[1].kill()
    assert learner.status() != 0
    assert actor.status() == 1
    assert re.search(
        r"\[LEARNER\] (ERROR process 0 of the learner's 2 cannot reach|WARNING interrupted)", learner.text()
    )
    assert not any(each.is_running() for each in members.values())
    assert run.last_step() >= 1
    assert "Traceback" not in actor.text()


def test_ctrl_c_finishes_the_update_leaves_a_checkpoint_and_lets_the_others_go(run):
    learner = run.start("learner", "--steps=100000", "--save_freq=0", launcher=LAUNCHER)
    actor = run.start("actor", "--steps=100000")
    actor.wait_for("policy version 1 applied")
    learner.interrupt()
    assert learner.status() != 0
    assert actor.status() == 1
    assert "the learner ended: the learner was interrupted" in actor.text()
    assert "[LEARNER 1] ERROR" not in learner.text()
    assert run.last_step() >= 1
