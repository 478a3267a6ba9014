"""A distribution that is not ours adds a recipe, a policy adapter and a validator, and LeRobot's commands run them.

The environment is fresh: this package and the third party's are installed in it as wheels. LeRobot and torch come
from the running environment by a path file, so nothing large is installed.
"""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import lerobot_pirl
from tests.installs import (
    REPO,
    build_wheel,
    check_run,
    install,
    link_dependencies,
    make_venv,
    run,
    site_packages,
    write_files,
)
from tests.terminals import SMALL, TABLETOP, free_port

pytestmark = pytest.mark.slow

PROJECT = {
    "pyproject.toml": """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "gait-plugin"
version = "3.1"
dependencies = ["lerobot-pirl"]

[project.entry-points."lerobot_pirl.recipes"]
gait = "gait.recipe:RECIPE"
torn = "gait.torn:RECIPE"

[project.entry-points."lerobot_pirl.policy_adapters"]
act = "gait.adapter:ACTAdapter"

[project.entry-points."lerobot_pirl.checkpoint_validators"]
"pi-rl.lab" = "gait.lab:VALIDATOR"

[tool.hatch.build.targets.wheel]
packages = ["gait"]
""",
    "gait/__init__.py": "",
    "gait/torn.py": "import a_module_that_is_not_there\n",
    "gait/recipe.py": """
from dataclasses import dataclass

from lerobot.rl.train_rl import TrainRLServerPipelineConfig

from lerobot_pirl.registry import Recipe


@dataclass(kw_only=True)
class GaitConfig(TrainRLServerPipelineConfig):
    recipe: str | None = None
    stride: float = 1.0


RECIPE = Recipe(name="gait", config_class=GaitConfig, learner="gait.run:learn", actor="gait.run:act")
""",
    "gait/run.py": """
import json
from pathlib import Path


def learn(cfg):
    seen = {"class": type(cfg).__name__, "recipe": cfg.recipe, "stride": cfg.stride, "steps": cfg.steps,
            "policy": type(cfg.policy).__name__}
    Path("learner.json").write_text(json.dumps(seen))
    return 0


def act(cfg):
    Path("actor.json").write_text(json.dumps({"recipe": cfg.recipe}))
    return 7
""",
    "gait/adapter.py": """
class ACTAdapter:
    @staticmethod
    def validate(cfg):
        print("gait validates", cfg.policy.type, cfg.recipe, flush=True)

    def __init__(self, policy, cfg):
        raise ValueError(f"gait cannot walk with {type(policy).__name__}")
""",
    "gait/lab.py": """
import os

from lerobot_pirl.metadata import MetadataMismatch
from lerobot_pirl.registry import CheckpointValidator


def fields(cfg, adapter):
    return {"gravity": float(os.environ["LAB_GRAVITY"])}


def validate(mine, theirs, my_label, their_label):
    limit = float(os.environ.get("LAB_LIMIT", "20"))
    if theirs["pi-rl.lab.gravity"] > limit:
        raise MetadataMismatch(f"{their_label} is of a gravity that this lab cannot stand; raise LAB_LIMIT")


VALIDATOR = CheckpointValidator(validate=validate, fields=fields)
""",
}
GAIT = {"recipe": "gait", "stride": 0.5, "steps": 3, "env": {"type": "pusht"}, "policy": {"type": "act"}}
PI_RL = {
    "recipe": "pi-rl",
    "output_dir": "out",
    "env": {"type": "tabletop", "task": "reach"},
    "policy": {"type": "act", "device": "cpu", "push_to_hub": False, "pretrained_backbone_weights": None},
}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh environment with both distributions."""
    folder = tmp_path_factory.mktemp("third_party")
    project = write_files(folder / "project", PROJECT)
    wheels = [build_wheel(REPO, folder / "ours"), build_wheel(project, folder / "theirs")]
    python = make_venv(folder / "env")
    link_dependencies(folder / "dependencies")
    write_files(site_packages(python), {"dependencies.pth": f"{folder / 'dependencies'}\n"})
    install(python, *wheels)
    return python


def start(python: Path, cwd: Path, role: str, config: dict, *arguments: str) -> subprocess.CompletedProcess:
    write_files(cwd, {"run.json": json.dumps(config)})
    command = ("-m", f"lerobot.rl.{role}", "--config_path=run.json", *arguments)
    return run(python, *command, cwd=cwd, timeout=300)


def test_both_distributions_are_the_installed_wheels(python, tmp_path):
    code = "import lerobot_pirl, gait; print(lerobot_pirl.__file__, gait.__file__)"
    installed = [site_packages(python) / name / "__init__.py" for name in ("lerobot_pirl", "gait")]
    assert check_run(python, "-c", code, cwd=tmp_path).split() == [str(path) for path in installed]


def test_the_learner_command_runs_a_third_partys_recipe(python, tmp_path):
    result = start(python, tmp_path, "learner", GAIT, "--steps=7")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "learner.json").read_text()) == {
        "class": "GaitConfig",
        "recipe": "gait",
        "stride": 0.5,
        "steps": 7,
        "policy": "ACTConfig",
    }
    assert "running recipe gait in place of lerobot.rl.learner" in result.stderr


def test_the_actor_command_ends_with_the_status_of_the_third_partys_recipe(python, tmp_path):
    result = start(python, tmp_path, "actor", GAIT)
    assert result.returncode == 7, result.stderr
    assert json.loads((tmp_path / "actor.json").read_text()) == {"recipe": "gait"}


def test_our_recipe_asks_a_third_partys_adapter(python, tmp_path):
    result = start(python, tmp_path, "learner", PI_RL)
    assert result.stdout == "gait validates act pi-rl\n"
    assert "gait cannot walk with ACTPolicy" in result.stderr
    assert result.returncode != 0


def test_a_broken_recipe_is_named_with_its_distribution(python, tmp_path):
    result = start(python, tmp_path, "learner", GAIT | {"recipe": "torn"})
    assert result.returncode == 2
    assert (
        "the entry point torn = gait.torn:RECIPE of gait-plugin 3.1 in lerobot_pirl.recipes cannot be loaded: "
        "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"
    ) in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_recipe_lists_the_third_partys_too(python, tmp_path):
    result = start(python, tmp_path, "learner", GAIT | {"recipe": "run"})
    assert result.returncode == 2
    assert (
        f"unknown recipe 'run'; known are 'gait' (from gait-plugin 3.1), "
        f"'pi-rl' (from lerobot-pirl {lerobot_pirl.__version__}), 'torn' (from gait-plugin 3.1)"
    ) in result.stderr


# --- a validator of its own for our recipe ------------------------------------------------------------------------


def train(python: Path, cwd: Path, role: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    return run(python, "-m", f"lerobot.rl.{role}", *arguments, cwd=cwd, timeout=300, **env)


@pytest.fixture(scope="module")
def lab_run(python, tmp_path_factory):
    """A run of one update whose processes both had the validator: its folder, learner and actor."""
    folder = tmp_path_factory.mktemp("lab")
    arguments = (f"--config_path={TABLETOP}", "--output_dir=run", "--steps=1", *SMALL)
    arguments += (f"--algorithm.wire.port={free_port()}",)
    with ThreadPoolExecutor() as pool:
        ended = pool.map(
            lambda role: train(python, folder, role, *arguments, LAB_GRAVITY="9.81"), ("learner", "actor")
        )
    return folder, *ended


@pytest.fixture(scope="module")
def refused(python, lab_run):
    """Two resumes of that run, one with another gravity, one that the lab itself does not let pass."""
    checkpoint = "run/checkpoints/last/pretrained_model/train_config.json"
    environments = ({"LAB_GRAVITY": "1.62"}, {"LAB_GRAVITY": "9.81", "LAB_LIMIT": "5"})
    arguments = (f"--config_path={checkpoint}", "--resume=true", "--steps=2", "--algorithm.wire.port=0")
    with ThreadPoolExecutor() as pool:
        return [*pool.map(lambda env: train(python, lab_run[0], "learner", *arguments, **env), environments)]


def test_a_third_partys_field_is_saved_and_sent(lab_run):
    folder, learner, actor = lab_run
    assert (learner.returncode, actor.returncode) == (0, 0), learner.stderr + actor.stderr
    saved = json.loads((folder / "run/checkpoints/last/training_state/pirl_metadata.json").read_text())
    assert saved["pi-rl.lab.gravity"] == 9.81
    (sent,) = [line for line in actor.stderr.splitlines() if "metadata of the learner " in line]
    assert json.loads(sent.partition("metadata of the learner ")[2])["pi-rl.lab.gravity"] == 9.81


def test_a_resume_after_a_third_partys_field_has_changed_is_refused_by_name(refused):
    result, _ = refused
    assert result.returncode == 1, result.stderr
    lines = result.stderr.splitlines()
    start = next(
        i for i, line in enumerate(lines) if "metadata of checkpoint and this run differ in " in line
    )
    assert lines[start].endswith("differ in pi-rl.lab.gravity:")
    assert lines[start + 2].split() == ["pi-rl.lab.gravity", "9.81", "1.62"]
    assert lines[start + 4 :] == [
        "What to do: make validator 'pi-rl.lab' find the same on both sides.",
        "If the change is meant, name it: --accept_changes=pi-rl.lab.gravity; the metadata's history keeps it.",
    ]


def test_a_third_partys_validator_refuses_in_its_own_words(refused):
    _, result = refused
    assert result.returncode == 1, result.stderr
    assert result.stderr.splitlines()[-1].endswith(
        "ERROR checkpoint is of a gravity that this lab cannot stand; raise LAB_LIMIT"
    )
