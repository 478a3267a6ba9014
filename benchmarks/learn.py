"""From a few demonstrations to a policy that masters its task, with LeRobot's own commands, and the controls.

A scripted expert records demonstrations, ``lerobot-train`` fits a tiny X-VLA, ``lerobot-pirl prepare`` makes it act in
environments, LeRobot's learner and actor improve it under this recipe, and ``lerobot-eval`` measures before and after
without any exploration. What is finished is not done again, what was interrupted goes on from its last checkpoint.

    python -m benchmarks.learn [tabletop | libero] [--folder FOLDER] [--only NAME ...] [--jobs 2] [--write]

Names are shell patterns of runs, such as ``pickup-flow_sde-*``; ``--write`` puts figures and curves where
``docs/results.md`` shows them. ``libero`` is a task on LIBERO's simulator, which must be installed.
"""

import argparse
import fnmatch
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lerobot_pirl.plots import mean_and_interval, plot_run, plot_together
from tests.smoke import free_port, versions

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "benchmarks" / "configs"
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "pictures"
INIT_STATES = 50
SEEDS = (1, 2, 3)
REPORT_EVERY_S = 60
VARIANTS = ("flow_sde", "flow_noise")
SHUFFLED = (
    "from benchmarks import learn; learn.shuffle_advantages(); from lerobot_pirl.learner import main; main()"
)


@dataclass(frozen=True)
class Task:
    """A task, what its starting policy is made of, and where it acts.

    Attributes:
        name: of the task.
        record: module that records demonstrations and its options, up to the folder.
        train_steps: of ``lerobot-train``.
        train: its config file's name.
        env: options of the environment, in training and evaluation.
        eval_episodes: of every ``lerobot-eval``.
        eval_batch: how many of them side by side.
    """

    name: str
    record: tuple[str, ...]
    train_steps: int
    train: str
    env: tuple[str, ...]
    eval_episodes: int
    eval_batch: int


def tabletop_task(name: str, record: tuple[str, ...], train_steps: int, step_limit: int) -> Task:
    """Return a tabletop task whose episodes end after so many steps."""
    env = (
        "--env.discover_packages_path=lerobot_pirl.envs",
        "--env.type=tabletop",
        f"--env.task={name}",
        "--env.observation_height=32",
        "--env.observation_width=32",
        f"--env.episode_length={step_limit}",
    )
    words = ("benchmarks.demonstrations", f"--task={name}", "--size=32", *record)
    return Task(name, words, train_steps, "train", env, 4 * INIT_STATES, INIT_STATES)


@dataclass(frozen=True)
class Run:
    """One run of the recipe.

    Attributes:
        task: name of the task.
        kind: what runs of several seeds have in common.
        seed: seed of the run.
        options: beyond those of the config.
        learner: what to start the learner with.
    """

    task: str
    kind: str
    seed: int
    options: tuple[str, ...] = ()
    learner: tuple[str, ...] = ("-m", "lerobot.rl.learner")

    @property
    def name(self) -> str:
        """Name of the run and of its folder."""
        return f"{self.task}-{self.kind}-{self.seed}"


LIBERO = (
    "--env.type=libero",
    "--env.task=libero_goal",
    "--env.task_ids=[8]",
    "--env.control_mode=absolute",
    "--env.observation_height=64",
    "--env.observation_width=64",
    "--env.episode_length=60",
)
BOWL = ("benchmarks.libero_expert", "--episodes=30", "--seed=500", "--slips=0.05", "--size=64", "--record")
SUITES = {
    "tabletop": (
        tabletop_task("reach", ("--episodes=200", "--widen=1.25", "--short=0.027"), 600, 5),
        tabletop_task("pickup", ("--episodes=150", "--widen=1.25", "--short=0.02", "--slips=0.04"), 1000, 15),
    ),
    "libero": (Task("bowl_on_plate", BOWL, 600, "train_libero", LIBERO, 2 * INIT_STATES, 1),),
}
TASKS = {task.name: task for suite in SUITES.values() for task in suite}
ANNOTATIONS = {
    "flow_sde": "Flow-SDE",
    "flow_noise": "Flow-Noise",
    "rate_zero": "learning rate 0",
    "shuffled": "advantages shuffled",
    "noise_off": "no exploration",
    "exclude": "gripper never explored",
    "grpo": "GRPO in place of GAE",
}


def config(task: str, variant: str) -> str:
    """Return the option that names a run's config."""
    return f"--config_path={CONFIGS / f'{task}_{variant}.json'}"


def all_runs(suite: str) -> list[Run]:
    """Return the runs of a report: every task with every variant and seed, then the controls."""
    if suite == "libero":
        return [Run("bowl_on_plate", "flow_sde", 1, (config("bowl_on_plate", "flow_sde"),))]
    runs = [
        Run(task.name, variant, seed, (config(task.name, variant),))
        for task in SUITES[suite]
        for variant in VARIANTS
        for seed in SEEDS
    ]
    sde = config("pickup", "flow_sde")
    exclude = ("--algorithm.gripper=exclude", "--algorithm.gripper_temperature=null")
    # what does not learn shows it in a third of the time
    short = "--steps=20"
    for seed in SEEDS:
        runs += [
            Run("pickup", "rate_zero", seed, (sde, short, "--algorithm.learning_rate=0")),
            Run("pickup", "shuffled", seed, (sde, short), ("-c", SHUFFLED)),
            Run(
                "pickup", "noise_off", seed, (sde, short, "--algorithm.last_step_std_position=1e-5", *exclude)
            ),
            Run("pickup", "exclude", seed, (sde, short, *exclude)),
            Run("pickup", "grpo", seed, (config("pickup", "grpo"), short)),
        ]
    return runs


def shuffle_advantages() -> None:
    """Let the learner of this process give every advantage to another chunk."""
    import torch

    from lerobot_pirl import ppo

    normalize = ppo.normalize_advantages
    ppo.normalize_advantages = lambda advantages: normalize(advantages)[torch.randperm(len(advantages))]


@dataclass
class Bench:
    """A folder with everything that is made on the way.

    Attributes:
        folder: where it goes.
    """

    folder: Path

    @property
    def commands(self) -> dict[str, str]:
        """Every command that was run, as a user types it, by the name of its log."""
        logs = {log.stem: log.read_text(errors="replace") for log in sorted(self.folder.glob("*.log"))}
        return {name: text.partition("\n")[0].removeprefix("$ ") for name, text in logs.items()}

    def command(self, name: str, words: Iterable[Any]) -> None:
        """Run a command, itself and its output in ``<name>.log``; raises RuntimeError when it fails."""
        words = [str(word) for word in words]
        typed = [
            "python" if word == sys.executable else word.removeprefix(f"{Path(sys.executable).parent}/")
            for word in words
        ]
        log = self.folder / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            file.write(f"$ {shlex.join(typed)}\n".encode())
            file.flush()
            done = subprocess.run(
                words, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT, check=False
            )
        if done.returncode:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(
                f"{name} exits with status {done.returncode}, {log} ends with: {' '.join(last)}"
            )

    def start(self, task: Task) -> Path:
        """Return the starting policy of a task: demonstrations, LeRobot's training, preparation."""
        demos, trained, start = (
            self.folder / part / task.name for part in ("demonstrations", "trained", "start")
        )
        if start.exists():
            return start
        for folder in (demos, trained):
            shutil.rmtree(folder, ignore_errors=True)
        show(f"{task.name}: demonstrations")
        self.command(f"{task.name}-record", [sys.executable, "-m", *task.record, demos])
        show(f"{task.name}: lerobot-train, {task.train_steps} steps")
        options = [
            f"--config_path={CONFIGS / f'{task.train}.json'}",
            f"--dataset.root={demos}",
            f"--output_dir={trained}",
            f"--steps={task.train_steps}",
            f"--save_freq={task.train_steps}",
            f"--policy.scheduler_decay_steps={task.train_steps}",
        ]
        self.command(f"{task.name}-train", [tool("lerobot-train"), *options])
        last = trained / "checkpoints" / "last" / "pretrained_model"
        self.command(f"{task.name}-prepare", [tool("lerobot-pirl"), "prepare", last, start])
        return start

    def evaluate(self, name: str, task: str, policy: Path, *options: str) -> float:
        """Return the success rate that ``lerobot-eval`` measures."""
        folder = self.folder / "evaluations" / name
        info = folder / "eval_info.json"
        if not info.exists():
            words = [
                tool("lerobot-eval"),
                f"--policy.path={policy}",
                "--policy.device=cpu",
                *TASKS[task].env,
                f"--eval.n_episodes={TASKS[task].eval_episodes}",
                f"--eval.batch_size={TASKS[task].eval_batch}",
                f"--output_dir={folder}",
                *options,
            ]
            self.command(f"{name}-eval", words)
        return json.loads(info.read_text())["overall"]["pc_success"] / 100

    def measure(self, name: str, task: str, policy: Path) -> dict[str, float]:
        """Return the success on the fixed initial states, which training uses, and on others."""
        return {
            "success": self.evaluate(name, task, policy),
            "success_elsewhere": self.evaluate(f"{name}-elsewhere", task, policy, "--env.init_states=false"),
        }

    def train(self, run: Run) -> dict[str, Any]:
        """Train, or go on, and measure; returns the run's results."""
        output = self.folder / "runs" / run.name
        if not (output / "trained.json").exists():
            self.run_recipe(run, output)
        trained = json.loads((output / "trained.json").read_text())
        records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]

        def curve(name: str) -> list[list[float]]:
            return [[record["iteration"], record[name]] for record in records if name in record]

        best = output / "checkpoints" / "best" / "pretrained_model"
        found = {"run": run.name, "kind": run.kind, "task": run.task, "seed": run.seed, **trained}
        found |= self.measure(run.name, run.task, best)
        found |= {"updates": max(record["iteration"] for record in records)}
        found |= {"evaluations": curve("eval/success_rate"), "rollouts": curve("rollout/success_rate")}
        show(f"{run.name}: {found['success']:.1%} in {found['seconds']:.0f} s")
        return found

    def run_recipe(self, run: Run, output: Path) -> None:
        """Run learner and actor until the run is done; an interrupted one goes on from its last checkpoint."""
        last = output / "checkpoints" / "last" / "pretrained_model" / "train_config.json"
        options = [f"--algorithm.wire.port={free_port()}"]
        resumed = last.exists()
        if resumed:
            options += [f"--config_path={last}", "--resume=true"]
        else:
            shutil.rmtree(output, ignore_errors=True)
            start = self.folder / "start" / run.task
            options += [*run.options, f"--policy.path={start}", "--policy.device=cpu"]
            options += [f"--seed={run.seed}", f"--output_dir={output}"]
        show(f"{run.name}: learner and actor")
        clock = time.monotonic()
        self.run_both(run, options)
        # of a resumed run the seconds of the last sitting alone
        trained = {"seconds": time.monotonic() - clock, "resumed": resumed}
        (output / "trained.json").write_text(json.dumps(trained) + "\n")

    def run_both(self, run: Run, options: list[str]) -> None:
        """Run learner and actor to their ends; raises RuntimeError when one of them fails."""
        with ThreadPoolExecutor(2) as pool:
            sides = {"learner": run.learner, "actor": ("-m", "lerobot.rl.actor")}
            futures = [
                pool.submit(self.command, f"{run.name}-{side}", [sys.executable, *start, *options])
                for side, start in sides.items()
            ]
            while wait(futures, timeout=REPORT_EVERY_S).not_done:
                show(f"{run.name}: {progress(self.folder / 'runs' / run.name)}")
            for future in futures:
                future.result()


def progress(folder: Path) -> str:
    """Return how far a run is, by its log."""
    log = folder / "metrics.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if not records:
        return "no update yet"
    found = [record["eval/success_rate"] for record in records if "eval/success_rate" in record]
    return f"update {records[-1]['iteration']}, success without noise {', '.join(f'{rate:.0%}' for rate in found[-5:])}"


def tool(name: str) -> str:
    """Return where a command of this environment lies."""
    return str(Path(sys.executable).parent / name)


def show(text: str) -> None:
    """Print a line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def summarize(starts: dict[str, dict[str, float]], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per task and kind of run, in the order of the results."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        rows.setdefault((result["task"], result["kind"]), []).append(result)
    return [
        {
            "task": task,
            "kind": kind,
            "seeds": [result["seed"] for result in group],
            "before": starts[task]["success"],
            "before_elsewhere": starts[task]["success_elsewhere"],
            "after": mean_and_interval([result["success"] for result in group]),
            "after_elsewhere": mean_and_interval([result["success_elsewhere"] for result in group]),
            "lowest": min(result["success"] for result in group),
            "minutes": max(result["seconds"] for result in group) / 60,
        }
        for (task, kind), group in rows.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""

    def percent(row: dict[str, Any], name: str) -> str:
        mean, half = row[name]
        # one seed says nothing of the others
        return f"{100 * mean:.1f}" + (f" ± {100 * half:.1f} %" if len(row["seeds"]) > 1 else " %")

    lines = [
        "| task | run | before | after | lowest seed | other initial states: before | after | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['task']} | {ANNOTATIONS[row['kind']]} | {row['before']:.1%} | {percent(row, 'after')} | {row['lowest']:.1%} "
        f"| {row['before_elsewhere']:.1%} | {percent(row, 'after_elsewhere')} | {row['minutes']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def draw(bench: Bench, results: list[dict[str, Any]], pictures: Path) -> None:
    """Draw the curves of every kind of run together, and all of one run."""
    pictures.mkdir(parents=True, exist_ok=True)
    kinds = {(result["task"], result["kind"]) for result in results}
    for task, kind in sorted(kinds):
        runs = [bench.folder / "runs" / r["run"] for r in results if (r["task"], r["kind"]) == (task, kind)]
        plot_together(runs, pictures / f"{task}-{kind}.png")
        if kind in VARIANTS:
            shutil.copy(plot_run(runs[0]), pictures / f"{task}-{kind}-run.png")


def main() -> int:
    """Run what is not done yet and report; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", nargs="?", choices=SUITES, default="tabletop")
    parser.add_argument("--folder", type=Path, help="outputs/learn_<suite> when not given")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="names of runs")
    parser.add_argument(
        "--jobs", type=int, default=2, help="runs side by side, each with a thread per process"
    )
    parser.add_argument("--write", action="store_true", help="write figures and pictures into the repository")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    bench = Bench((arguments.folder or Path(f"outputs/learn_{arguments.suite}")).resolve())
    runs = [
        run
        for run in all_runs(arguments.suite)
        if any(fnmatch.fnmatch(run.name, pattern) for pattern in arguments.only)
    ]
    tasks = [task for name, task in TASKS.items() if any(run.task == name for run in runs)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        policies = dict(zip(tasks, pool.map(bench.start, tasks), strict=True))
        measured = pool.map(
            lambda task: bench.measure(f"{task.name}-start", task.name, policies[task]), tasks
        )
        starts = {task.name: found for task, found in zip(tasks, measured, strict=True)}
        for name, found in starts.items():
            show(f"{name}: the starting policy succeeds in {found['success']:.1%}")
        results = list(pool.map(bench.train, runs))
    rows = summarize(starts, results)
    report = {
        "rows": rows,
        "starts": starts,
        "runs": results,
        "commands": bench.commands,
        "episodes": {task.name: task.eval_episodes for task in tasks},
        "hours_of_training": sum(result["seconds"] for result in results) / 3600,
        "cpu": {"cores": os.cpu_count(), "machine": platform.machine()},
        "versions": versions(),
    }
    text = json.dumps(report, indent=1).replace(f"{bench.folder}/", "").replace(f"{ROOT}/", "")
    pictures = PICTURES if arguments.write else bench.folder / "pictures"
    (
        RESULTS / f"learn_{arguments.suite}.json" if arguments.write else bench.folder / "report.json"
    ).write_text(text + "\n")
    draw(bench, results, pictures)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
