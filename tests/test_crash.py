"""Saves that are killed, and disks that are full or closed: what was saved stays, and the run goes on from it."""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from tests import kills

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
