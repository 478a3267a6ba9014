"""Learner, actor and checkpoint that do not belong together: real processes, one metadata field at a time.

Whoever refuses ends with status 1 and a table of both sides' values; the refused learner hears why and lives on.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from lerobot_pirl.metadata import Metadata
from tests.forks import ForkedRun, Nursery, changed
from tests.terminals import Run, Terminal, end_well, running

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

# a refusal takes two seconds; one that does not come is many tests' patience
REFUSAL_S = 60
# what may differ: where a config lies, whose run it is, what it accepted before; the config is judged by its hash
NOT_JUDGED = ("config_path", "run_id", "history", "config")
FIELDS = [each.name for each in dataclasses.fields(Metadata) if each.name not in NOT_JUDGED]
# what the refusal tells to make alike; everything else comes from the config
REMEDIES = {
    "format_version": "the same lerobot-pirl",
    "package_version": "the same lerobot-pirl",
    "lerobot_version": "the same lerobot ",
    "tokenizer_digest": "the same tokenizer",
    "encoder_digest": "the same pretrained weights",
    "processors_digest": "policy_preprocessor.json",
    "additional": "validator 'another'",
}
# an option of one process that differs, and what else than the config's hash differs with it
OPTIONS = {
    "algorithm.gamma=0.9": [],
    "algorithm.num_denoising_steps=3": ["num_denoising_steps"],
    "algorithm.n_action_steps=4": ["n_action_steps"],
    "seed=1001": ["encoder_digest"],
}


@dataclasses.dataclass
class Refusal:
    """The table that a process printed when it refused another one.

    Attributes:
        sides: whose values the columns hold.
        differing: the fields named in its first line.
        rows: their values, by name.
        remedy: what it tells to do.
    """

    sides: tuple[str, str]
    differing: list[str]
    rows: dict[str, tuple[str, str]]
    remedy: str


def read_refusal(text: str) -> Refusal:
    """Read the only refusal in a log."""
    found = re.findall(
        r"metadata of (.+) and (.+) differ in (.+):\n(field .+\n(?:\S+ .+\n)+?)What to do: (.+)", text
    )
    assert len(found) == 1, text[-3000:]
    assert "Traceback" not in text, text[-3000:]
    left, right, differing, lines, remedy = found[0]
    table = [re.split(r" {2,}", line) for line in lines.splitlines()]
    assert all(len(row) == 3 for row in table), lines
    assert table[0] == ["field", left, right]
    return Refusal((left, right), differing.split(", "), {name: (a, b) for name, a, b in table[1:]}, remedy)


def own_metadata(terminal: Terminal) -> dict[str, Any]:
    """Return what a process logged about itself."""
    return json.loads(terminal.wait_for(r"(?<=\] INFO metadata )\{.*(?=\n)"))


def expected_rows(field: str, honest: dict[str, Any], changed_side: int) -> dict[str, tuple[str, str]]:
    """Return the row of a field that one side changed; the fields of an object have their own names."""
    value = honest.get(field, {})
    before = value if isinstance(value, dict) else {field: value}
    after = changed(value) if isinstance(value, dict) else {field: changed(value)}
    pairs = {name: (str(before.get(name, "-")), str(after[name])) for name in after}
    return {
        name: (a, b) if changed_side else (b, a)
        for name, (a, b) in pairs.items()
        if before.get(name) != after[name]
    }


def assert_refusal(
    text: str, sides: tuple[str, str], field: str, honest: dict[str, Any], changed_side: int
) -> None:
    """See that a log refuses for this field alone, with both values in the right columns."""
    refusal = read_refusal(text)
    rows = expected_rows(field, honest, changed_side)
    assert refusal.sides == sides
    assert refusal.differing == list(rows)
    assert {name: pair for name, pair in refusal.rows.items() if name != "config_path"} == rows
    assert REMEDIES.get(field, "the same config file") in refusal.remedy


def since(terminal: Terminal, start: int) -> str:
    """Return what a learner logs about a refusal from some length of its log on, and see that it lives."""
    text = terminal.wait_for(
        rf"(?s)(?<=\A.{{{start}}}).*an actor refused this learner.*What to do: .+\n", REFUSAL_S
    )
    assert terminal.process.poll() is None
    return text


@pytest.fixture(scope="module")
def nursery():
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture
def run(nursery, tmp_path):
    with running(ForkedRun(tmp_path, nursery)) as run:
        yield run


@pytest.fixture(scope="module")
def waiting(nursery, tmp_path_factory):
    """A run whose learner is there for the whole file."""
    with running(ForkedRun(tmp_path_factory.mktemp("waiting"), nursery)) as run:
        run.learner = run.start("learner", "--steps=100000")
        run.learner.wait_for("listening on")
        yield run


@pytest.fixture(scope="module")
def finished(nursery, tmp_path_factory):
    """A run that is over and left a checkpoint."""
    with running(ForkedRun(tmp_path_factory.mktemp("finished"), nursery)) as run:
        learner, actor = run.start_both("--steps=1")
        end_well(learner, actor)
        run.learner = learner
        yield run


def snapshot(folder: Path) -> dict[str, Any]:
    """Return content and time of everything in a folder."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mtime_ns,
            path.read_bytes() if path.is_file() else path.is_symlink(),
        )
        for path in folder.rglob("*")
    }


# --- at the start ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", FIELDS)
def test_an_actor_that_differs_in_one_field_refuses_the_learner(waiting, field):
    logged = len(waiting.learner.text())
    actor = waiting.start("actor", different=(field,))
    assert actor.status(REFUSAL_S) == 1
    honest = own_metadata(waiting.learner)
    assert_refusal(actor.text(), ("learner", "actor"), field, honest, changed_side=1)
    assert_refusal(since(waiting.learner, logged), ("learner", "actor"), field, honest, changed_side=1)


@pytest.mark.parametrize("option", OPTIONS)
def test_an_actor_started_with_another_option_refuses_the_learner(waiting, option):
    logged = len(waiting.learner.text())
    actor = waiting.start("actor", f"--{option}")
    assert actor.status(REFUSAL_S) == 1
    refusal = read_refusal(actor.text())
    assert refusal.sides == ("learner", "actor")
    assert sorted(refusal.differing) == sorted(["config_hash", *OPTIONS[option]])
    theirs, mine = own_metadata(waiting.learner), own_metadata(actor)
    for name in refusal.differing:
        assert refusal.rows[name] == (str(theirs[name]), str(mine[name]))
    name, _, value = option.partition("=")
    assert refusal.rows[name][0] not in ("-", value)
    assert refusal.rows[name][1].strip('"') == value
    assert read_refusal(since(waiting.learner, logged)) == refusal


# --- on resume ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", FIELDS)
def test_a_learner_that_differs_in_one_field_refuses_the_checkpoint_and_leaves_it_alone(finished, field):
    before = snapshot(finished.output_dir)
    learner = finished.resume("learner", "--steps=2", different=(field,))
    assert learner.status(REFUSAL_S) == 1
    honest = own_metadata(finished.learner)
    assert_refusal(learner.text(), ("checkpoint", "this run"), field, honest, changed_side=1)
    assert snapshot(finished.output_dir) == before


def test_a_learner_resumed_with_another_option_refuses_the_checkpoint(finished):
    before = snapshot(finished.output_dir)
    learner = finished.resume("learner", "--steps=2", "--algorithm.gamma=0.9")
    assert learner.status(REFUSAL_S) == 1
    refusal = read_refusal(learner.text())
    assert (refusal.sides, refusal.differing) == (("checkpoint", "this run"), ["config_hash"])
    assert refusal.rows["config_hash"][0] == own_metadata(finished.learner)["config_hash"]
    assert refusal.rows["algorithm.gamma"] == ("0.99", "0.9")
    assert snapshot(finished.output_dir) == before


# --- in the middle of a run -----------------------------------------------------------------------------------


def train_and_lose_the_learner(run: Run) -> tuple[Terminal, Terminal]:
    """Return a learner that was killed and its actor, which has applied an update and waits for another learner."""
    learner, actor = run.start_both("--steps=100000")
    actor.wait_for("policy version 1 applied")
    learner.kill()
    return learner, actor


@pytest.mark.parametrize("field", FIELDS)
def test_a_living_actor_refuses_a_restarted_learner_that_differs_in_one_field(run, field):
    killed, actor = train_and_lose_the_learner(run)
    learner = run.start("learner", f"--output_dir={run.folder / 'restarted'}", different=(field,))
    assert actor.status(REFUSAL_S) == 1
    honest = own_metadata(killed)
    assert_refusal(actor.text(), ("learner", "actor"), field, honest, changed_side=0)
    assert_refusal(since(learner, 0), ("learner", "actor"), field, honest, changed_side=0)


def test_a_living_actor_refuses_a_learner_resumed_from_another_run(nursery, run, tmp_path):
    (tmp_path / "other").mkdir()
    with running(ForkedRun(tmp_path / "other", nursery)) as other:
        end_well(*other.start_both("--steps=1", "--algorithm.gamma=0.9"))
        killed, actor = train_and_lose_the_learner(run)
        other.port = run.port
        learner = other.resume("learner", "--steps=100000")
        assert actor.status(REFUSAL_S) == 1
        refusal = read_refusal(actor.text())
        assert (refusal.sides, refusal.differing) == (("learner", "actor"), ["config_hash"])
        hashes = own_metadata(learner)["config_hash"], own_metadata(killed)["config_hash"]
        assert refusal.rows["config_hash"] == hashes
        assert refusal.rows["algorithm.gamma"] == ("0.9", "0.99")
        assert "resumed" in learner.text()
        assert read_refusal(since(learner, 0)) == refusal
