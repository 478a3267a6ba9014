"""Run learner and actor as a user does, as two processes with LeRobot's own commands, and report what happened.

    python tests/smoke.py tabletop [--steps=N ...]
    python tests/smoke.py libero [--steps=N ...]

Options after the environment's name go to both commands. The report, the logs and the run itself are in a new
folder under ``outputs/``; the exit status is 0 only when every check passed. Without a usable LIBERO, `libero`
runs the same config on the tabletop for one update and calls that a fallback.
"""

import argparse
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONFIGS = {"tabletop": "configs/pirl_tabletop.json", "libero": "configs/pirl_libero10_smoke.json"}
FALLBACK = ("--env.type=tabletop", "--env.task=reach", "--env.task_ids=[0]", "--steps=1", "--save_freq=1")
PACKAGES = ("lerobot-pirl", "lerobot", "torch", "grpcio", "safetensors", "mujoco", "hf-libero")
SIDES = ("learner", "received by the actor", "actor")
MIN_UPDATES = 3
TIMEOUT_S = 1800
# what a stock LeRobot does with the checkpoint: the plugin cannot even be imported
STOCK_LOAD = """
import sys
sys.modules["lerobot_pirl"] = None
from lerobot.policies.xvla.modeling_xvla import XVLAPolicy
policy = XVLAPolicy.from_pretrained(sys.argv[1], strict=True)
print(policy.config.num_denoising_steps, policy.config.n_action_steps)
"""


PARSE = """
from lerobot_pirl.config import PiRLTrainConfig
from lerobot_pirl.parsing import parse_config
cfg = parse_config(PiRLTrainConfig)
cfg.validate(check_output_dir=False)
print("recipe", cfg.recipe, "on", cfg.env.type, cfg.env.task)
"""


@dataclass
class Process:
    """One of the two processes."""

    command: list[str]
    log: Path
    exit_status: int | None = None

    def lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()

    def metadata(self, words: str = " metadata ") -> dict:
        """The metadata that the process logged about itself, or about its peer."""
        found = [line.partition(words)[2] for line in self.lines() if f"{words}{{" in line]
        return json.loads(found[0]) if found else {}


@dataclass
class Report:
    """What the smoke run did and whether it passed."""

    environment: str
    fallback: str | None
    started: str
    folder: str
    versions: dict[str, str]
    commands: dict[str, str] = field(default_factory=dict)
    exit_statuses: dict[str, int | None] = field(default_factory=dict)
    seconds: float = 0.0
    updates_applied_by_actor: list[int] = field(default_factory=list)
    success_rates: list[float] = field(default_factory=list)
    metadata: dict[str, dict] = field(default_factory=dict)
    checks: list[dict] = field(default_factory=list)
    passed: bool = False

    def check(self, name: str, passed: bool, detail: str) -> None:
        self.checks.append({"check": name, "passed": bool(passed), "detail": detail})


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            found[name] = "not installed"
    return found


def libero_problem() -> str | None:
    """Why LIBERO cannot run here, or None; asked in a process of its own, as doctor does."""
    code = "from lerobot_pirl.envs.check import check_libero; import json; print(json.dumps(check_libero()))"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    failures = [detail for _, ok, detail in json.loads(answer.stdout.splitlines()[-1]) if not ok]
    return failures[0] if failures else None


def run_processes(processes: dict[str, Process], timeout: float) -> None:
    """Start both at once, show what the learner says, and wait; a process that fails ends the other."""
    running: dict[str, subprocess.Popen] = {}
    for role, process in processes.items():
        file = process.log.open("wb")
        running[role] = subprocess.Popen(
            process.command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT
        )
    done = threading.Event()
    follower = threading.Thread(target=follow, args=(processes["learner"].log, done))
    follower.start()
    deadline = time.monotonic() + timeout
    try:
        while any(p.poll() is None for p in running.values()):
            failed = [role for role, p in running.items() if p.poll() not in (None, 0)]
            if failed or time.monotonic() > deadline:
                deadline = min(deadline, time.monotonic()) + 60
                for process in running.values():
                    process.terminate()
                for process in running.values():
                    process.wait(60)
            time.sleep(0.2)
    finally:
        for role, process in running.items():
            if process.poll() is None:
                process.kill()
            processes[role].exit_status = process.wait()
        done.set()
        follower.join()


def follow(log: Path, done: threading.Event) -> None:
    """Print a growing file's log lines until told to stop."""
    with log.open(errors="replace") as file:
        while True:
            line = file.readline()
            if not line and done.wait(0.2):
                return
            if "[LEARNER]" in line:
                print(line, end="", flush=True)


def check_run(report: Report, processes: dict[str, Process], run_dir: Path, min_updates: int) -> None:
    """Fill the report's checks from exit statuses, logs, metrics and checkpoint."""
    for role, process in processes.items():
        report.exit_statuses[role] = process.exit_status
        report.check(f"{role} exits with status 0", process.exit_status == 0, f"status {process.exit_status}")
        report.metadata[role] = process.metadata()
    report.metadata["received by the actor"] = processes["actor"].metadata(" metadata of the learner ")
    applied = [
        int(n) for n in re.findall(r"policy version (\d+) applied", processes["actor"].log.read_text())
    ]
    report.updates_applied_by_actor = [number for number in applied if number > 0]
    count = len(set(report.updates_applied_by_actor))
    report.check(
        f"at least {min_updates} updates reached the actor", count >= min_updates, f"{count} updates"
    )
    check_metadata(report)
    metrics = run_dir / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    report.success_rates = [record["rollout/success_rate"] for record in records]
    steps = records[-1]["env_steps"] if records else 0
    report.check("episodes were collected and learned from", steps > 0, f"{steps} environment steps")
    stale = [r["iteration"] for r in records if r["policy_version"] != r["iteration"] - 1]
    detail = f"{len(records) - len(stale)} of {len(records)} updates"
    report.check("every update used episodes of the version before it", records and not stale, detail)
    norms = [record["train/policy_grad_norm"] for record in records]
    trained = sum(norm > 0 for norm in norms)
    report.check("the policy got a gradient", trained, f"in {trained} of {len(norms)} updates")
    check_checkpoint(report, run_dir)
    curve = run_dir / "learning_curve.png"
    report.check("a learning curve was drawn", curve.is_file(), str(curve))


def check_metadata(report: Report) -> None:
    learner, received, actor = (report.metadata[side] for side in SIDES)
    report.check("the learner's metadata reached the actor", learner and received == learner, f"{received}")
    differing = {
        name: [learner.get(name), actor.get(name)]
        for name in learner.keys() | actor.keys()
        if name != "run_id" and learner.get(name) != actor.get(name)
    }
    detail = json.dumps(differing) if differing else f"config_hash {learner.get('config_hash')}"
    report.check("metadata agree on both sides", learner and not differing, detail)


def check_checkpoint(report: Report, run_dir: Path) -> None:
    last = run_dir / "checkpoints" / "last"
    files = (
        "pretrained_model/model.safetensors",
        "algorithm/model.safetensors",
        "training_state/rng_state.safetensors",
    )
    missing = [name for name in files if not (last / name).is_file()]
    report.check("`last` is a complete checkpoint", not missing, f"{last}, missing: {missing or 'nothing'}")
    load = subprocess.run(
        [sys.executable, "-c", STOCK_LOAD, str(last / "pretrained_model")], capture_output=True, text=True
    )
    words = (load.stdout or load.stderr).strip().splitlines()
    detail = f"denoising steps, executed chunk: {words[-1]}" if words else f"status {load.returncode}"
    report.check("XVLAPolicy.from_pretrained loads it without the plugin", load.returncode == 0, detail)


def check_learning(report: Report, episodes: int) -> None:
    """Compare the first tenth of the run with the last fifth, by the standard error of their difference."""
    rates = report.success_rates
    parts = [rates[: max(1, len(rates) // 10)], rates[-max(1, len(rates) // 5) :]]
    (first, last), counts = (
        [sum(part) / len(part) for part in parts],
        [episodes * len(part) for part in parts],
    )
    error = sum(p * (1 - p) / n for p, n in zip((first, last), counts, strict=True)) ** 0.5
    detail = f"first tenth of the run {first:.1%}, last fifth {last:.1%}, standard error {error:.1%}"
    report.check("success rose by more than three standard errors", last - first > 3 * error, detail)


def check_scene(report: Report, actor: Process) -> None:
    scene = [line for line in actor.lines() if "environment libero" in line]
    report.check(
        "the actor stepped LIBERO's simulator", scene, scene[0] if scene else "no such line in its log"
    )


def check_config(report: Report, config: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PARSE, f"--config_path={config}"], capture_output=True, text=True, cwd=ROOT
    )
    words = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    report.check(f"{config} parses and validates", done.returncode == 0, words[-1] if words else "")


def verdict(report: Report) -> str:
    return ("PASSED" if report.passed else "FAILED") + (
        " (FALLBACK, LIBERO did not run)" if report.fallback else ""
    )


def write_report(report: Report, folder: Path) -> None:
    report.passed = all(check["passed"] for check in report.checks)
    (folder / "smoke_report.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
    lines = [f"# Smoke run on {report.environment}: {verdict(report)}", ""]
    if report.fallback:
        lines += [
            f"LIBERO did not run: {report.fallback}.",
            "The same config ran on the tabletop instead.",
            "",
        ]
    lines += [f"Started {report.started}, took {report.seconds:.0f} s.", "", "## Checks", ""]
    lines += ["| check | | detail |", "|---|---|---|"]
    lines += [
        f"| {c['check']} | {'pass' if c['passed'] else 'FAIL'} | {c['detail']} |" for c in report.checks
    ]
    lines += ["", "## Commands", ""] + [f"    {command}" for command in report.commands.values()]
    lines += ["", "## Versions", ""] + [f"- {name} {number}" for name, number in report.versions.items()]
    lines += ["", "## Updates", "", f"Applied by the actor: {report.updates_applied_by_actor}", ""]
    lines += ["## Metadata", "", f"| field | {' | '.join(SIDES)} |", "|---|---|---|---|"]
    for name in report.metadata["learner"]:
        values = [str(report.metadata[side].get(name)) for side in SIDES]
        lines.append(f"| {name} | {' | '.join(values)} |")
    if (folder / "run" / "learning_curve.png").is_file():
        lines += ["", "![learning curve](run/learning_curve.png)"]
    (folder / "smoke_report.md").write_text("\n".join(lines) + "\n")


def main() -> int:
    """Run, check and report; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("environment", choices=CONFIGS)
    parser.add_argument("--require-simulator", action="store_true", help="fail where LIBERO cannot run")
    arguments, options = parser.parse_known_args()
    name = arguments.environment
    problem = libero_problem() if name == "libero" else None
    if problem and arguments.require_simulator:
        print(f"FAILED, LIBERO cannot run here: {problem}")
        return 1
    if problem:
        print(f"LIBERO cannot run here, falling back to the tabletop: {problem}", flush=True)
    started = datetime.now()
    folder = ROOT / "outputs" / f"smoke_{name}" / f"{started:%Y-%m-%d_%H-%M-%S}"
    folder.mkdir(parents=True)
    relative = (folder / "run").relative_to(ROOT)
    shared = [
        f"--config_path={CONFIGS[name]}",
        f"--output_dir={relative}",
        f"--algorithm.wire.port={free_port()}",
        *(FALLBACK if problem else ()),
        *options,
    ]
    processes = {
        role: Process([sys.executable, "-m", f"lerobot.rl.{role}", *shared], folder / f"{role}.log")
        for role in ("learner", "actor")
    }
    report = Report(
        name, problem, started.isoformat(timespec="seconds"), str(folder.relative_to(ROOT)), versions()
    )
    report.commands = {role: shlex.join(["python", *p.command[1:]]) for role, p in processes.items()}
    for command in report.commands.values():
        print(command, flush=True)
    clock = time.monotonic()
    os.environ.setdefault("MUJOCO_GL", "egl")
    run_processes(processes, TIMEOUT_S)
    report.seconds = time.monotonic() - clock
    check_config(report, CONFIGS[name])
    check_run(report, processes, folder / "run", 1 if problem else MIN_UPDATES)
    if name == "tabletop" and not options:
        check_learning(
            report, json.loads((ROOT / CONFIGS[name]).read_text())["algorithm"]["episodes_per_iteration"]
        )
    if name == "libero" and not problem:
        check_scene(report, processes["actor"])
    write_report(report, folder)
    for check in report.checks:
        print(f"{'pass' if check['passed'] else 'FAIL'}  {check['check']} ({check['detail']})")
    print(f"{verdict(report)}: {report.folder}/smoke_report.md")
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
