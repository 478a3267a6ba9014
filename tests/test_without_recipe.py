"""Without a recipe LeRobot's commands behave byte for byte as if this package were not installed.

Every command runs twice from folders with the same content: in the running environment, whose interpreter starts
with the hook, and in one that holds links to every installed distribution but this one. Compared are exit status,
standard output, standard error and the files that are written. Before the comparison of the two streams these are
made equal, and nothing else: the prefixes of the two environments, dates with times, process ids, and in the
trainer's log the measured durations and rates.
"""

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.installs import SITE_PACKAGES, link_dependencies, make_venv, run, site_packages, write_files

pytestmark = pytest.mark.slow

SAC = """{"job_name": "sac", "output_dir": "out", "seed": 1, "env": {"type": "gym_manipulator"},
"policy": {"type": "gaussian_actor", "device": "cpu", "push_to_hub": false}}"""
TRAIN_SCRIPT = Path(sys.executable).parent / "lerobot-train"
TRAIN = [
    *("--dataset.repo_id=local/tiny", "--dataset.root=dataset", "--output_dir=out", "--seed=1", "--steps=2"),
    *("--batch_size=2", "--num_workers=0", "--log_freq=1", "--save_freq=2"),
    *("--policy.type=act", "--policy.device=cpu", "--policy.push_to_hub=false", "--policy.use_vae=false"),
    *("--policy.dim_model=16", "--policy.n_heads=2", "--policy.dim_feedforward=16"),
    *("--policy.n_encoder_layers=1", "--policy.chunk_size=4", "--policy.n_action_steps=4"),
]
SEES_THE_PLUGIN = """
import importlib.metadata, importlib.util, sys
print("lerobot_pirl.startup.hook" in sys.modules)
print(importlib.util.find_spec("lerobot_pirl") is not None)
print("lerobot-pirl" in {d.name for d in importlib.metadata.distributions()})
print(len({d.name for d in importlib.metadata.distributions()} - {"lerobot-pirl"}))
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment like the running one, this package left out."""
    python = make_venv(tmp_path_factory.mktemp("plain") / "env")
    link_dependencies(site_packages(python))
    return python


def normalised(text: str, plain: Path) -> str:
    for prefix in (site_packages(plain), plain.parent.parent, SITE_PACKAGES, sys.prefix):
        text = text.replace(str(prefix), "PREFIX")
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", text)
    text = re.sub(r"\b(pid|PID)[:= ]+\d+", "PID", text)
    text = re.sub(r"\b(updt_s|data_s|smp/s):[\d.]+", r"\1:N", text)
    return re.sub(r"\[[\d:]+<[\d:?]+, +[\d.?]+(step/s|s/step)\]", "[RATE]", text)


def run_both(
    plain: Path, folder: Path, command: list[object], files: dict[str, str], dataset: Path | None = None
) -> tuple[subprocess.CompletedProcess, subprocess.CompletedProcess]:
    """Run a command with the plugin and without it, side by side."""

    def one(name: str, python: object) -> subprocess.CompletedProcess:
        cwd = write_files(folder / name, files)
        cwd.mkdir(exist_ok=True)
        if dataset:
            shutil.copytree(dataset, cwd / "dataset")
        # progress bars are drawn at their start and end; each run fills a cache of its own
        env = {"TQDM_MININTERVAL": "1000", "HF_HOME": "hf"}
        return run(python, *command, cwd=cwd, timeout=400, **env)

    with ThreadPoolExecutor(2) as pool:
        results = pool.map(one, ("with", "without"), (sys.executable, plain))
        return tuple(results)


def assert_same(results: tuple[subprocess.CompletedProcess, ...], plain: Path) -> None:
    first, second = results
    assert first.returncode == second.returncode
    assert normalised(first.stdout, plain) == normalised(second.stdout, plain)
    assert normalised(first.stderr, plain) == normalised(second.stderr, plain)


def written(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted((folder / "out").rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_one_environment_has_the_plugin_and_the_other_does_not(plain, tmp_path):
    command = ["-c", SEES_THE_PLUGIN, "-m", "lerobot.rl.learner"]
    first, second = run_both(plain, tmp_path, command, {})
    *seen, others = first.stdout.split()
    assert seen == ["True", "True", "True"], first.stderr
    assert second.stdout.split() == ["False", "False", "False", others], second.stderr


@pytest.mark.parametrize(
    "command",
    [["-m", "lerobot.rl.learner"], ["-m", "lerobot.rl.actor"], [TRAIN_SCRIPT]],
    ids=["learner", "actor", "train"],
)
def test_help_is_the_same(plain, tmp_path, command):
    results = run_both(plain, tmp_path, [*command, "--help"], {})
    assert_same(results, plain)
    assert results[0].returncode == 0
    assert "--policy.type" in results[0].stdout
    assert "--recipe" not in results[0].stdout


def test_a_config_error_is_the_same(plain, tmp_path):
    config = SAC.replace('"seed": 1', '"recipe": null')
    command = ["-m", "lerobot.rl.learner", "--config_path=run.json"]
    results = run_both(plain, tmp_path, command, {"run.json": config})
    assert_same(results, plain)
    assert results[0].returncode != 0
    assert "`recipe`" in results[0].stderr


@pytest.mark.parametrize("role", ["learner", "actor"])
def test_a_run_that_lerobot_cannot_start_dies_the_same_way(plain, tmp_path, role):
    command = ["-m", f"lerobot.rl.{role}", "--config_path=run.json"]
    results = run_both(plain, tmp_path, command, {"run.json": SAC})
    assert_same(results, plain)
    assert results[0].returncode == 1
    assert "Traceback" in results[0].stderr
    assert f"lerobot/rl/{role}.py" in results[0].stderr


def test_a_training_run_writes_the_same_bytes(plain, tmp_path):
    dataset = make_dataset(tmp_path / "dataset")
    results = run_both(plain, tmp_path, [TRAIN_SCRIPT, *TRAIN], {}, dataset)
    assert_same(results, plain)
    assert results[0].returncode == 0, results[0].stderr
    first, second = written(tmp_path / "with"), written(tmp_path / "without")
    assert "out/checkpoints/000002/pretrained_model/model.safetensors" in first
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def make_dataset(root: Path) -> Path:
    """Write a dataset of two short episodes without images; return its folder."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    sizes = {"observation.state": 2, "observation.environment_state": 3, "action": 2}
    features = {
        key: {"dtype": "float32", "shape": (size,), "names": [f"{i}" for i in range(size)]}
        for key, size in sizes.items()
    }
    dataset = LeRobotDataset.create("local/tiny", fps=10, features=features, root=root, use_videos=False)
    generator = np.random.default_rng(0)
    for _ in range(2):
        for _ in range(6):
            values = {key: generator.random(size, dtype=np.float32) for key, size in sizes.items()}
            dataset.add_frame(values | {"task": "reach"})
        dataset.save_episode()
    dataset.finalize()
    return root
