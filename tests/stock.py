"""Show that a checkpoint needs nothing of this package: a LeRobot without it loads, evaluates and trains it.

    python tests/stock.py make FOLDER [--require-simulator]    # with the package: two processes write a checkpoint
    python tests/stock.py check FOLDER                         # without it: LeRobot's own commands use the checkpoint

The first makes FOLDER, the second goes on in it and completes ``stock_report.json``; each prints a line per check and
exits with status 0 only when every check passed. Without a usable LIBERO the checkpoint comes from the tabletop and
the evaluation is left out, which is called a fallback. The tiny config names its tokenizer by a folder of the clone,
so that all commands run in the clone, and Python is kept from importing what lies there.
"""

import argparse
import json
import logging
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from smoke import (
    CONFIGS,
    FALLBACK,
    ROOT,
    TIMEOUT_S,
    Process,
    Report,
    check_scene,
    free_port,
    libero_problem,
    run_processes,
    verdict,
    versions,
)

CONFIG = CONFIGS["libero"]
# other values than the policy config has, so that these must have come from the run
RUN_VALUES = {"num_denoising_steps": 3, "n_action_steps": 4}
EPISODES, EPISODE_STEPS = 2, 12
TRAIN_STEPS, BATCH_SIZE = 2, 4
TRAINED = Path("train", "checkpoints", "last", "pretrained_model")
# everything by which an interpreter could notice this package; with the words of a learner's command the hook wakes
TRACES_OPTIONS = ("-m", "lerobot.rl.learner")
TRACES = """
import json, sys
from importlib.metadata import distributions
from pathlib import Path
name, traces = "lerobot_pirl", []
if any(module.startswith(name) for module in sys.modules):
    traces.append("a module is imported at start")
try:
    import lerobot_pirl
    traces.append("it can be imported")
except ModuleNotFoundError:
    pass
found = list(distributions())
if any(d.name.replace("-", "_") == name for d in found):
    traces.append("a distribution")
if any(name in e.group or name in e.value for d in found for e in d.entry_points):
    traces.append("entry points")
files = [f for p in sys.path for f in Path(p).glob("*") if f.suffix in (".pth", ".start")]
if any(name in f.name or name in f.read_text() for f in files):
    traces.append("a start-up file")
print(json.dumps(traces))
"""
TRACES_COUNT = 5

type Outcome = tuple[bool, str]


def attempt(report: Report, name: str, do: Callable[[], Outcome]) -> None:
    """Do something, record whether it is as it should be, and print both its start and its outcome."""
    print(f"...   {name}", flush=True)
    clock = time.monotonic()
    try:
        passed, detail = do()
    except Exception as error:  # whatever goes wrong is a failed check, and the others still run
        passed, detail = False, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    report.check(name, passed, f"{detail}; {time.monotonic() - clock:.0f} s")
    show(report.checks[-1])


def show(check: dict) -> None:
    print(f"{'pass' if check['passed'] else 'FAIL'}  {check['check']} ({check['detail']})", flush=True)


def finish(report: Report, folder: Path) -> int:
    """Write the report and print the verdict; returns the exit status."""
    report.passed = all(check["passed"] for check in report.checks)
    path = folder / "stock_report.json"
    path.write_text(json.dumps(asdict(report), indent=2) + "\n")
    passed = sum(check["passed"] for check in report.checks)
    print(f"{verdict(report)}: {passed} of {len(report.checks)} checks passed, {path}", flush=True)
    return 0 if report.passed else 1


def find_traces(isolation: str) -> list[str]:
    """Return how this package shows in an interpreter that leaves the working directory out of its path."""
    command = [sys.executable, isolation, "-c", TRACES, *TRACES_OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout)


def make(folder: Path, require_simulator: bool) -> int:
    """Let learner and actor write a checkpoint; returns the exit status."""
    os.environ["LIBERO_CONFIG_PATH"] = str(folder.resolve() / "libero_config")
    os.environ.setdefault("MUJOCO_GL", "egl")
    problem = libero_problem()
    if problem and require_simulator:
        print(f"FAILED, LIBERO cannot run here: {problem}")
        return 1
    if problem:
        print(f"LIBERO cannot run here, the checkpoint comes from the tabletop: {problem}", flush=True)
    folder.mkdir(parents=True)
    options = [
        f"--config_path={CONFIG}",
        f"--output_dir={folder / 'run'}",
        f"--algorithm.wire.port={free_port()}",
        *(FALLBACK if problem else ("--steps=1", "--save_freq=1")),
        "--algorithm.max_episode_steps=20",
        *(f"--algorithm.{name}={value}" for name, value in RUN_VALUES.items()),
    ]
    processes = {
        role: Process([sys.executable, "-m", f"lerobot.rl.{role}", *options], folder / f"{role}.log")
        for role in ("learner", "actor")
    }
    now = datetime.now().isoformat(timespec="seconds")
    report = Report("libero", problem, now, str(folder), versions())
    report.commands = {role: shlex.join(["python", *p.command[1:]]) for role, p in processes.items()}
    clock = time.monotonic()

    def train() -> Outcome:
        run_processes(processes, TIMEOUT_S)
        report.exit_statuses = {role: process.exit_status for role, process in processes.items()}
        return not any(
            report.exit_statuses.values()
        ), f"exit statuses {report.exit_statuses}, logs in {folder}"

    def plugin_shows() -> Outcome:
        traces = find_traces("-P")
        return len(traces) == TRACES_COUNT, ", ".join(traces)

    attempt(report, "learner and actor, with the package, write a checkpoint", train)
    if not problem:
        check_scene(report, processes["actor"])
        show(report.checks[-1])
    attempt(report, "each trace of the package shows while it is installed", plugin_shows)
    report.seconds = time.monotonic() - clock
    return finish(report, folder)


def no_traces(isolation: str) -> Outcome:
    traces = find_traces(isolation)
    return not traces, ", ".join(traces) or f"LeRobot {versions()['lerobot']}, without lerobot-pirl"


def load(checkpoint: Path) -> Any:
    from lerobot.policies.xvla.modeling_xvla import XVLAPolicy

    if not checkpoint.is_dir():  # LeRobot would take it for a name on the Hub
        raise FileNotFoundError(f"{checkpoint} was not written")
    return XVLAPolicy.from_pretrained(checkpoint, strict=True)


def loads(checkpoint: Path) -> Outcome:
    """See that LeRobot loads a checkpoint that holds the run's values, which are not those of the config file."""
    policy = load(checkpoint)
    before = json.loads((ROOT / CONFIG).read_text())["policy"]
    saved = json.loads((checkpoint / "config.json").read_text())
    well, words = True, []
    for name, value in RUN_VALUES.items():
        well = well and saved.get(name) == getattr(policy.config, name) == value != before[name]
        words.append(f"{name} {before[name]} before the run, {saved.get(name)} in config.json")
    return well, ", ".join(words)


def run_command(report: Report, work: Path, name: str, options: list[str], answer: str = "") -> None:
    """Run one of LeRobot's own commands.

    Raises:
        RuntimeError: when it fails.
    """
    report.commands[name] = shlex.join([name, *options])
    log = work / f"{name}.log"
    with log.open("wb") as file:
        done = subprocess.run(
            [str(Path(sys.executable).parent / name), *options],
            input=answer.encode(),
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            timeout=TIMEOUT_S,
            check=False,
        )
    report.exit_statuses[name] = done.returncode
    if done.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"{name} exits with status {done.returncode}, {log} ends with: {' '.join(last)}")


def evaluates(report: Report, work: Path, checkpoint: Path) -> Outcome:
    """Evaluate in LIBERO and see that every episode was counted."""
    env = json.loads((ROOT / CONFIG).read_text())["env"]
    options = [
        f"--policy.path={checkpoint}",
        *(f"--env.{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in env.items()),
        f"--env.episode_length={EPISODE_STEPS}",
        f"--eval.n_episodes={EPISODES}",
        "--eval.batch_size=1",
        f"--output_dir={work / 'eval'}",
    ]
    # at its first import LIBERO asks whether its datasets lie elsewhere
    run_command(report, work, "lerobot-eval", options, answer="n\n")
    info = json.loads((work / "eval" / "eval_info.json").read_text())
    tasks = [(task["task_group"], task["task_id"]) for task in info["per_task"]]
    rewards = [reward for task in info["per_task"] for reward in task["metrics"]["sum_rewards"]]
    successes = [success for task in info["per_task"] for success in task["metrics"]["successes"]]
    well = (
        tasks == [(env["task"], number) for number in env["task_ids"]]
        and info["overall"]["n_episodes"] == len(rewards) == len(successes) == EPISODES * len(tasks)
        and all(math.isfinite(reward) for reward in rewards)
    )
    return well, f"tasks {tasks}, rewards {rewards}, successes {successes}"


def make_dataset(root: Path, policy: dict[str, Any]) -> Outcome:
    """Write two short episodes of noise with the features that X-VLA's LIBERO data have."""
    import numpy as np
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    axes = [str(number) for number in range(policy["max_state_dim"])]
    vector = {"dtype": "float32", "shape": (len(axes),), "names": axes}
    features = {"observation.state": vector, "action": vector}
    for key, feature in policy["input_features"].items():
        if feature["type"] == "VISUAL":
            channels, height, width = feature["shape"]
            shape, names = (height, width, channels), ["height", "width", "channels"]
            features[key] = {"dtype": "image", "shape": shape, "names": names}
    dataset = LeRobotDataset.create("local/noise", fps=20, features=features, root=root, use_videos=False)
    generator = np.random.default_rng(0)
    for _ in range(2):
        for _ in range(policy["chunk_size"] + 2):
            frame = {"task": "pick up the noise"}
            for key, feature in features.items():
                values = generator.random(feature["shape"], dtype=np.float32)
                frame[key] = (values * 255).astype(np.uint8) if feature["dtype"] == "image" else values
            dataset.add_frame(frame)
        dataset.save_episode()
    dataset.finalize()
    return dataset.num_frames > BATCH_SIZE, f"{dataset.num_frames} frames of {', '.join(features)}"


def trains(report: Report, work: Path, checkpoint: Path) -> Outcome:
    """Go on training from the checkpoint, with a seed that is not the run's."""
    options = [
        f"--policy.path={checkpoint}",
        "--dataset.repo_id=local/noise",
        f"--dataset.root={work / 'dataset'}",
        f"--output_dir={work / 'train'}",
        f"--steps={TRAIN_STEPS}",
        f"--batch_size={BATCH_SIZE}",
        "--num_workers=0",
        "--log_freq=1",
        f"--save_freq={TRAIN_STEPS}",
        "--seed=7",
    ]
    run_command(report, work, "lerobot-train", options)
    log = (work / "lerobot-train.log").read_text(errors="replace")
    losses = [word.removeprefix("loss:") for word in log.split() if word.startswith("loss:")]
    well = len(losses) == TRAIN_STEPS and all(math.isfinite(float(loss)) for loss in losses)
    return well, f"losses {losses}"


def starts_from_ours(checkpoint: Path, trained: Path) -> Outcome:
    """See that what LeRobot trained is our checkpoint plus its own steps, and not a policy of its own.

    AdamW without weight decay moves a weight by at most its learning rate a step; a policy from scratch is much
    farther away. What is frozen stays bit for bit.
    """
    import torch

    ours, theirs = load(checkpoint), load(trained)
    torch.manual_seed(7)
    scratch = type(ours)(ours.config)
    limit = 1.01 * TRAIN_STEPS * ours.config.optimizer_lr
    weights = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    moved = distances(weights, theirs)
    frozen = {name: p for name, p in ours.named_parameters() if not p.requires_grad}
    frozen_moved = sum(distance > 0 for distance in distances(frozen, theirs))
    afar = max(distances(weights, scratch))
    well = 0 < max(moved) <= limit < afar and frozen and not frozen_moved
    changed = sum(distance > 0 for distance in moved)
    detail = (
        f"{changed} of {len(weights)} trained tensors moved, by {max(moved):.1e} at most, AdamW's limit is "
        f"{limit:.1e} and a policy from scratch {afar:.1e} away; {frozen_moved} of {len(frozen)} frozen ones moved"
    )
    return bool(well), detail


def distances(weights: dict[str, Any], policy: Any) -> list[float]:
    """Return the largest difference in each of the named tensors."""
    others = dict(policy.named_parameters())
    return [(weight - others[name]).abs().max().item() for name, weight in weights.items()]


def nothing_imported() -> Outcome:
    modules = [name for name in sys.modules if name.startswith("lerobot_pirl")]
    return not modules, ", ".join(modules) or "no module of it in this process"


def check(folder: Path) -> int:
    """Use the checkpoint in FOLDER by LeRobot's own means; returns the exit status."""
    report = Report(**json.loads((folder / "stock_report.json").read_text()))
    work = folder / "stock"
    work.mkdir()
    os.environ |= {
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work.resolve() / "hf"),
        "LIBERO_CONFIG_PATH": str(work.resolve() / "libero_config"),
        "PYTHONSAFEPATH": "1",
    }
    os.environ.pop("PYTHONPATH", None)
    # of video codecs that are missing; the dataset has images
    logging.disable(logging.WARNING)
    os.environ.setdefault("MUJOCO_GL", "egl")
    checkpoint, trained = folder / "run" / "checkpoints" / "last" / "pretrained_model", work / TRAINED
    policy = json.loads((ROOT / CONFIG).read_text())["policy"]
    report.versions = versions()
    clock = time.monotonic()
    for isolation in ("-P", "-I"):
        name = f"no trace of the package is left (python {isolation})"
        attempt(report, name, lambda isolation=isolation: no_traces(isolation))
    attempt(report, "XVLAPolicy.from_pretrained loads the checkpoint", lambda: loads(checkpoint))
    if report.fallback:
        print(f"left out  lerobot-eval in LIBERO, which cannot run here: {report.fallback}", flush=True)
    else:
        evaluate = "lerobot-eval runs it in LIBERO"
        attempt(report, evaluate, lambda: evaluates(report, work, checkpoint))
    attempt(report, "LeRobot writes a dataset", lambda: make_dataset(work / "dataset", policy))
    attempt(report, "lerobot-train goes on from it", lambda: trains(report, work, checkpoint))
    attempt(report, "XVLAPolicy.from_pretrained loads lerobot-train's checkpoint", lambda: loads(trained))
    attempt(report, "lerobot-train started from our weights", lambda: starts_from_ours(checkpoint, trained))
    attempt(report, "none of this imported the package", nothing_imported)
    report.seconds += time.monotonic() - clock
    return finish(report, folder)


def main() -> int:
    """Read the command line and do one of the two; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("make", "check"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--require-simulator", action="store_true", help="fail where LIBERO cannot run")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    if arguments.part == "make":
        return make(arguments.folder, arguments.require_simulator)
    return check(arguments.folder)


if __name__ == "__main__":
    sys.exit(main())
