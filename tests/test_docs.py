"""What the documentation lists and quotes is what there is."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

import lerobot_pirl
from lerobot_pirl import metadata
from lerobot_pirl.registry import CheckpointValidator
from tests.test_checkpoint import FILES
from tests.toy import tiny_config

REPO = Path(__file__).parent.parent
README = (REPO / "README.md").read_text()
CHECKPOINTS = (REPO / "docs/checkpoints.md").read_text()
TUNING = (REPO / "docs/tuning.md").read_text()
SECURITY = (REPO / "docs/security.md").read_text()
RELIABILITY = (REPO / "docs/reliability.md").read_text()
# of argparse, LeRobot's parser and pip: no fields of a config
# a resume or a config names these, and other commands the rest
NO_FIELDS = {
    "help",
    "runs",
    "config_path",
    "policy.path",
    "env.discover_packages_path",
    "quiet",
    "together",
    "logdir",
}


def between(text: str, start: str, end: str) -> str:
    """Return what stands between two marks, the first of which must be there."""
    assert start in text
    return text.partition(start)[2].partition(end)[0]


@pytest.fixture(scope="module")
def cfg():
    return tiny_config()


def test_every_file_of_a_checkpoint_is_listed_in_its_folder():
    found, folder = set(), ""
    layout = between(CHECKPOINTS, "checkpoints/\n", "\n\n")
    for name in [line.split()[0] for line in layout.splitlines()]:
        folder = name if name.endswith("/") else folder
        found |= {folder + name} if "." in name else set()
    assert found == FILES


def test_every_field_of_the_metadata_is_explained():
    rows = between(CHECKPOINTS, "| field | what it is |\n|---|---|\n", "\n\n").splitlines()
    names = [re.findall("`([^`]+)`", row.split("|")[1]) for row in rows]
    fields = {field.name for field in dataclasses.fields(metadata.Metadata)} - {"additional"}
    assert {name for row in names for name in row} == fields | {"<validator>.<field>"}
    assert set(names[-1]) == set(metadata.SHOWN_ONLY)


def test_what_no_flag_can_change_is_named():
    sentence = ", ".join(f"`{name}`" for name in metadata.NEVER_ACCEPTED[:-1])
    assert f"No flag changes {sentence} or `{metadata.NEVER_ACCEPTED[-1]}`." in CHECKPOINTS


def test_exactly_the_options_that_do_not_count_are_listed(cfg):
    section = between(CHECKPOINTS, "**Options that do not**", "\n\nThe hash")
    counted = metadata.critical_config(cfg)
    for group in ("algorithm", "policy", "env"):
        left_out = {field.name for field in dataclasses.fields(getattr(cfg, group))} - set(counted[group])
        listed = set(re.findall(rf"`{group}\.(\w+)`", section))
        assert listed == {name for name in left_out if not name.startswith(("optimizer_", "scheduler_"))}
    assert {"`optimizer_*`", "`scheduler_*`"} <= set(re.findall("`[^`]+`", section))
    counting = between(CHECKPOINTS, "**Options that count**", "**Options that do not**")
    assert all(f"`{name}`" in counting for name in counted)


def options(text: str) -> set[str]:
    """Return the options that a text names: on a command line, or in a group of a config."""
    named = set(re.findall(r"--([a-z_][\w.]*\w)", text))
    return named | set(re.findall(r"\b((?:algorithm|policy|eval|wandb)\.[a-z_][\w.]*[a-z_])\b(?!\()", text))


@pytest.mark.parametrize(
    "text",
    [README, CHECKPOINTS, TUNING, SECURITY, RELIABILITY],
    ids=["README", "checkpoints", "tuning", "security", "reliability"],
)
def test_every_option_that_is_named_exists(cfg, text):
    found = options(text) - NO_FIELDS
    assert len(found) > 3
    for name in found:
        owner = cfg
        for part in name.split("."):
            assert hasattr(owner, part), name
            owner = getattr(owner, part)


def test_every_test_and_report_that_reliability_names_exists():
    named = set(re.findall(r"`(test_\w+)`", RELIABILITY))
    tests = "\n".join(path.read_text() for path in REPO.glob("tests/*.py"))
    there = set(re.findall(r"^def (test_\w+)", tests, re.M))
    assert len(named) > 10 and named <= there, named - there
    assert all((REPO / name).exists() for name in re.findall(r"`(tests/\w+\.py)`", RELIABILITY))
    # one that is announced is not there yet
    reports = re.findall(r"\| ([^|]+) \| `(\w+\.json)`", RELIABILITY)
    assert len(reports) > 1
    for figures, name in reports:
        assert (REPO / "benchmarks/results" / name).exists() != (figures == "not run in full yet"), name


def literals(path: Path) -> list[str]:
    """Return the pieces of text in a module."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_every_message_of_the_table_of_refusals_is_one_that_the_code_can_give():
    rows = between(CHECKPOINTS, "| message | meaning | what to do |\n|---|---|---|\n", "\n\n").splitlines()
    modules = Path(lerobot_pirl.__file__).parent.glob("*.py")
    known = "\n".join(piece for path in modules for piece in literals(path))
    # between these the code puts a sentence together: where a value stands, and some seams
    seams = r"\.\.\.|; |(?<=resume)(?= of recipe)|checkpoint and this run|learner and actor|(?<=_version )\d"
    assert len(rows) > 10
    for row in rows:
        for part in re.split(seams, row.split("|")[1].strip(" `")):
            assert part.strip(" (),;") in known, row


def test_the_validator_of_the_example_is_one():
    (source,) = re.findall(r"```python\n(.*?)```", CHECKPOINTS, re.DOTALL)
    names: dict = {}
    exec(source, names)
    validator = names["VALIDATOR"]
    assert isinstance(validator, CheckpointValidator)
    assert validator.fields(None, None) == {"gravity": 9.81}
    validator.validate({}, {"num_denoising_steps": 2}, "this run", "checkpoint")
    with pytest.raises(metadata.MetadataMismatch, match="checkpoint has too few denoising steps"):
        validator.validate({}, {"num_denoising_steps": 1}, "this run", "checkpoint")
