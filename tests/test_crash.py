"""Saves that are killed, and disks that are full or closed: what was saved stays, and the run goes on from it."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lerobot_pirl import folders
from tests import kills
from tests.forks import Fork, ForkedRun, Nursery
from tests.terminals import Run, Terminal, end_well, running

# whatever the machine does besides, a save that is killed hangs nowhere
TIMEOUT_S = 900


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict]:
    """Every scene, played in a process that has one thread."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    # pyarrow's allocator starts a thread at import otherwise
    single = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        done = subprocess.run(
            [sys.executable, "-m", "tests.kills", folder],
            cwd=Path(__file__).parent.parent,
            env=os.environ | single,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(params=kills.SCENES)
def outcome(request, outcomes) -> dict:
    return outcomes[request.param]


@pytest.mark.slow
def test_wherever_a_save_is_killed_links_lead_to_whole_checkpoints_and_the_next_save_leaves_no_trace(outcome):
    assert outcome["problems"] == []
    assert len(outcome["generations"]) == len(outcome["kills"]) > 40


@pytest.mark.slow
def test_last_leads_to_the_former_checkpoint_until_it_leads_to_the_new_one(outcome):
    assert outcome["generations"] == sorted(outcome["generations"])
    assert set(outcome["generations"]) == {kills.FORMER, kills.NEW}


@pytest.mark.slow
def test_saves_are_killed_at_everything_that_they_do_to_files(outcomes):
    done = set().union(*(outcome["operations"] for outcome in outcomes.values()))
    assert done - kills.READS - kills.CONTENTS - kills.TREES - kills.NAMES == {"serialize_file"}
    killed_at = Counter(name for outcome in outcomes.values() for name in outcome["kills"])
    assert {"mkdir", "serialize_file", "open", "write", "fsync", "symlink", "rename"} <= killed_at.keys()
    assert {"replace", "link", "unlink", "rmdir"} <= killed_at.keys()
    for outcome in outcomes.values():
        # before and after each
        assert all(Counter(outcome["kills"])[name] % 2 == 0 for name in kills.NAMES)


# a disk that takes no more: a learner whose files may not grow beyond a limit


class Screen(Terminal):
    """A process whose output goes through a pipe, so that a limit on its files is none on its output."""

    def __init__(self, process: Fork, log: Path, copy: subprocess.Popen) -> None:
        super().__init__(process, log)
        self.copy = copy

    def text(self) -> str:
        if self.process.poll() is not None:
            self.copy.wait()
        return super().text()

    def limit_files(self, size: int) -> None:
        """Let no file of the process grow beyond so many bytes; other writes fail as on a full disk."""
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


class PipedRun(ForkedRun):
    """A run whose processes write into pipes."""

    def start(self, role: str, *options: str, **others: Any) -> Screen:
        pipe = self.folder / f"{role}{len(self.started)}.log"
        os.mkfifo(pipe)
        log = pipe.with_suffix(".txt")
        with log.open("wb") as file:
            copy = subprocess.Popen(["cat", pipe], stdout=file)
        return Screen(super().start(role, *options, **others).process, log, copy)


@pytest.fixture(scope="module")
def nursery():
    made = Nursery()
    yield made
    made.close()


@pytest.fixture(scope="module")
def one_update(nursery, tmp_path_factory) -> Path:
    """The output folder of a run that ended after one update; tests go on with copies."""
    with running(ForkedRun(tmp_path_factory.mktemp("one_update"), nursery)) as run:
        end_well(*run.start_both("--steps=1"))
        return run.output_dir


@pytest.fixture
def run(nursery, one_update, tmp_path):
    with running(PipedRun(tmp_path, nursery)) as made:
        shutil.copytree(one_update, made.output_dir, symlinks=True)
        yield made


REMEDY = "version 1 is the last one saved; free space or make the folder writable"
# less than the policy's weights, and less than the metrics' first line
LIMITS = {"checkpoints": 100_000, "checkpoints and metrics": 500}


@pytest.fixture(params=LIMITS)
def limit(request) -> int:
    return LIMITS[request.param]


def resume_limited(run: PipedRun, limit: int, *options: str) -> tuple[Screen, Screen]:
    """Resume in both terminals; the learner's files are limited before it does anything."""
    learner = run.resume("learner", *options)
    learner.wait_for("listening on")
    learner.limit_files(limit)
    return learner, run.resume("actor", *options)


def folder_names(run: Run) -> list[str]:
    return sorted(path.name for path in (run.output_dir / "checkpoints").iterdir())


def assert_first_checkpoint_is_intact(run: Run) -> None:
    checkpoints = run.output_dir / "checkpoints"
    assert os.readlink(checkpoints / "last") == "000001"
    folders.verify(checkpoints / "000001")


def failures(learner: Terminal, run: Run, limit: int) -> int:
    """Return how often saving failed, after a look at that it was told with folder, reason, version and remedy."""
    text = learner.text()
    assert "Traceback" not in text
    errors = [line for line in text.splitlines() if " ERROR " in line]
    told = [line for line in errors if line.endswith(REMEDY)]
    named = errors
    if limit == LIMITS["checkpoints"]:
        assert told == errors
        where = rf"the checkpoint {run.output_dir}/checkpoints/\d{{6}} cannot be written \("
    else:
        named = [line for line in errors if "metrics.jsonl cannot" in line]
        assert len(named) >= len(told)
        where = rf"{run.output_dir}/metrics.jsonl cannot be written \("
    assert all(re.search(rf"{where}.*File too large.*\)", line) for line in named)
    return len(told)


def saved_steps(learner: Terminal) -> list[int]:
    return [int(step) for step in re.findall(r"INFO checkpoint \S+/(\d+)", learner.text())]


@pytest.mark.e2e
def test_training_goes_on_while_the_disk_is_full_and_saves_when_there_is_space(run, limit):
    learner, actor = resume_limited(run, limit, "--steps=12", "--save_freq=1")
    learner.wait_for(rf"(?s)({REMEDY}.*){{2}}")
    assert_first_checkpoint_is_intact(run)
    learner.limit_files(resource.RLIM_INFINITY)
    end_well(learner, actor)
    saved = saved_steps(learner)
    # space comes in the middle of any update, and the next one saves
    assert saved == list(range(saved[0], 13))
    assert failures(learner, run, limit) >= saved[0] - 2 >= 2
    assert [record["iteration"] for record in run.metrics()] == list(range(1, 13))
    assert folder_names(run) == ["000001", *(f"{step:06d}" for step in saved), "last"]
    folders.verify(run.output_dir / "checkpoints" / "last")


@pytest.mark.e2e
def test_a_run_that_ends_on_a_full_disk_waits_for_space_and_ends_well(run, limit):
    learner, actor = resume_limited(run, limit, "--steps=3", "--save_freq=0")
    learner.wait_for("trying again every 10 s")
    assert_first_checkpoint_is_intact(run)
    assert learner.process.poll() is None
    assert actor.process.poll() is None
    learner.limit_files(resource.RLIM_INFINITY)
    end_well(learner, actor)
    assert failures(learner, run, limit) > 0
    assert saved_steps(learner) == [3]
    assert folder_names(run) == ["000001", "000003", "last"]
    folders.verify(run.checkpoint(3))
    assert [record["iteration"] for record in run.metrics()] == [1, 2, 3]


@pytest.mark.e2e
def test_ctrl_c_ends_the_wait_for_space_with_the_last_checkpoint_intact(run):
    learner, actor = resume_limited(run, LIMITS["checkpoints"], "--steps=2")
    learner.wait_for("trying again every 10 s; interrupt to give the state up")
    learner.interrupt()
    assert (learner.status(), actor.status()) == (130, 1)
    assert "the learner ended: the learner was interrupted" in actor.text()
    assert "Traceback" not in learner.text()
    assert_first_checkpoint_is_intact(run)
    assert folder_names(run) == ["000001", "last"]


# a folder that cannot be made or written


def close(folder: Path) -> None:
    """Forbid to write into a folder; skip for who may do so all the same, as root may."""
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):
        folder.chmod(0o755)
        pytest.skip("this user may write into every folder")


def make_unusable(parent: Path, how: str) -> None:
    if how == "a file":
        parent.touch()
    else:
        parent.mkdir()
        close(parent)


@pytest.mark.e2e
@pytest.mark.parametrize("how", ["a file", "closed"])
def test_an_output_folder_that_cannot_be_made_is_refused_at_the_start(how, nursery, tmp_path):
    parent = tmp_path / "parent"
    make_unusable(parent, how)
    with running(ForkedRun(tmp_path, nursery)) as run:
        learner = run.start("learner", f"--output_dir={parent}/run")
        assert learner.status() == 1
        (line,) = [line for line in learner.text().splitlines() if " ERROR " in line]
        assert f"{parent}/run" in line
        assert "Traceback" not in learner.text()


@pytest.mark.e2e
def test_training_goes_on_while_the_folder_is_closed(run):
    checkpoints = run.output_dir / "checkpoints"
    close(checkpoints)
    learner, actor = run.resume_both("--steps=12", "--save_freq=1")
    text = learner.wait_for("000003 cannot be written .*")
    assert "Permission denied" in text
    assert_first_checkpoint_is_intact(run)
    checkpoints.chmod(0o755)
    end_well(learner, actor)
    assert "Traceback" not in learner.text()
    assert folder_names(run) == ["000001", *(f"{step:06d}" for step in saved_steps(learner)), "last"]
    assert saved_steps(learner)[-1] == 12
