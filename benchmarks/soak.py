"""A long run whose processes are restarted over and over: memory stays flat, the ledger exact, the curve unbroken.

A tiny policy on the tabletop. The actor, whose environments are worker processes, is restarted every 50 updates, the
learner every 200; both by turns with SIGTERM and SIGKILL, and the learner is resumed. A killed learner is waited for by
its actor. Beside it stands a run in one go: log and last checkpoint of the two must be equal, bit for bit. What the
processes hold is sampled; its growth is the median of all slopes between two samples of a life (Theil and Sen), after
the life's first third. Takes about twenty minutes on two cores.

    python -m benchmarks.soak [--updates 1000] [--actor-every 50] [--learner-every 200] [--output FILE]
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from lerobot_pirl.ledger import LEDGER_FILE
from lerobot_pirl.metrics import METRICS_FILE, SUCCESS
from lerobot_pirl.plots import moving_average
from tests.comparison import checkpoint_differences, metrics_differences
from tests.smoke import versions
from tests.terminals import SMALL, Run, Terminal, end_well, kill_group, running
from tests.test_ledger import read_ledger

RESULT = Path(__file__).parent / "results" / "soak.json"
SHARED = Path("/dev/shm")
EPISODES = 4
# one environment, so that all batches have one row: who collects what makes no difference
OPTIONS = (*(each for each in SMALL if "n_envs" not in each), "--algorithm.n_envs=1", "--keep_last_n=2")
WORKERS = "--algorithm.async_envs=true"
SAMPLE_EVERY_S = 1.0
# without an update
PATIENCE_S = 600.0
# what a thousand updates may add to what the processes of a role hold
ALLOWED = {"resident_mib": 32.0, "descriptors": 4.0, "threads": 4.0, "shared_mib": 1.0, "processes": 0.5}
# that the workers of a killed process may take to go
LEAVE_S = 30.0
# updates that a life must have after its first third, so that its growth says something
MIN_SPAN = 30
MIB_PER_KB = 1 / 1024


@dataclass
class Life:
    """A process from its start to its end.

    Attributes:
        role: whose life it is.
        terminal: the process.
        samples: (updates of the run, never fewer than before; what its process group holds, by the names of
            :data:`ALLOWED`).
    """

    role: str
    terminal: Terminal
    samples: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def sample(self, updates: int) -> None:
        """Look at what it holds; a resumed run does some updates again, which are left out."""
        if not self.samples or updates >= self.samples[-1][0]:
            self.samples.append((updates, holdings(self.terminal.process.pid)))

    @property
    def settled(self) -> list[tuple[int, dict[str, float]]]:
        """The samples after the first third of its updates; none where too few are left to say something."""
        if not self.samples:
            return []
        (first, _), (last, _) = self.samples[0], self.samples[-1]
        start = first + (last - first) / 3
        return [each for each in self.samples if each[0] > start] if last - start >= MIN_SPAN else []


@dataclass
class Report:
    """What was done and seen.

    Attributes:
        restarts: how often who got which signal.
        ledger: number of episodes by what became of them; of ``resumed``, of resumes.
        refusals: the reasons why episodes were refused, without their numbers.
        growth: by role and measure, per thousand updates; the median over the lives that were long enough.
        lives: by role, how many were long enough.
        levels_mib: by role, the median resident set of each of these lives.
        file_bytes: what the run's files have grown to.
        problems: what must not be; empty when all is well.
    """

    updates: int
    restarts: Counter[str] = field(default_factory=Counter)
    ledger: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    growth: dict[str, dict[str, float]] = field(default_factory=dict)
    lives: dict[str, int] = field(default_factory=dict)
    levels_mib: dict[str, list[float]] = field(default_factory=dict)
    file_bytes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=versions)


def holdings(group: int) -> dict[str, float]:
    """Return what the processes of a group hold together."""
    held = dict.fromkeys(ALLOWED, 0.0)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # behind the name, which may hold anything, stand state, parent and group
            if int((folder / "stat").read_text().rpartition(")")[2].split()[2]) != group:
                continue
            status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
            descriptors = len(os.listdir(folder / "fd"))
        except OSError:
            # it ended while it was looked at
            continue
        if "VmRSS" in status:
            held["resident_mib"] += int(status["VmRSS"].split()[0]) * MIB_PER_KB
            held["shared_mib"] += int(status["RssShmem"].split()[0]) * MIB_PER_KB
            held["processes"] += 1
            held["threads"] += int(status["Threads"])
            held["descriptors"] += descriptors
    return held


def slope(samples: list[tuple[int, dict[str, float]]], name: str) -> float:
    """Return the growth of a measure per thousand updates: the median over all pairs of samples."""
    updates = np.array([update for update, _ in samples], float)
    values = np.array([held[name] for _, held in samples])
    first, second = np.triu_indices(len(samples), k=1)
    apart = updates[first] != updates[second]
    first, second = first[apart], second[apart]
    return 1000 * float(np.median((values[second] - values[first]) / (updates[second] - updates[first])))


@dataclass
class Soak:
    """A run under way, and all its processes so far.

    Attributes:
        run: its folder and how its processes are started.
        report: of the whole soak.
        now: the process of each role.
        lives: all of them.
        restarted: updates after which something was restarted, and who.
    """

    run: Run
    report: Report
    now: dict[str, Life] = field(default_factory=dict)
    lives: list[Life] = field(default_factory=list)
    restarted: list[tuple[int, str]] = field(default_factory=list)

    def start(self, role: str, *options: str) -> None:
        """Start a role, or resume it."""
        if role == "learner" and self.run.resume_config.exists():
            terminal = self.run.resume(role)
        else:
            terminal = self.run.start(role, *options)
        self.now[role] = Life(role, terminal)
        self.lives.append(self.now[role])

    @property
    def updates(self) -> int:
        """The updates in the log; fewer again after a kill."""
        path = self.run.output_dir / METRICS_FILE
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return max((json.loads(line)["iteration"] for line in lines[-2:] if line.endswith(b"\n")), default=0)

    def watch(self, until: int) -> None:
        """Sample until so many updates are done; raises AssertionError when a process ends or nothing happens."""
        deadline, known = time.monotonic() + PATIENCE_S, -1
        while (done := self.updates) < until:
            if done != known:
                deadline, known = time.monotonic() + PATIENCE_S, done
            for life in self.now.values():
                life.sample(done)
                ended = life.terminal.process.poll() is not None
                if (ended or time.monotonic() > deadline) and self.updates < until:
                    state = "ended" if ended else "does not get on"
                    raise AssertionError(
                        f"after update {done} the {life.role} {state}:\n{life.terminal.text()[-3000:]}"
                    )
            time.sleep(SAMPLE_EVERY_S)

    def restart(self, role: str) -> None:
        """Restart a role, by turns with SIGTERM and SIGKILL; with a learner that says goodbye the actor ends too."""
        self.restarted.append((self.updates, role))
        terminal, restarts = self.now.pop(role).terminal, self.report.restarts
        kill = restarts[f"{role} SIGTERM"] > restarts[f"{role} SIGKILL"]
        restarts[f"{role} {'SIGKILL' if kill else 'SIGTERM'}"] += 1
        if kill:
            self._kill(role, terminal)
        else:
            os.kill(terminal.process.pid, signal.SIGTERM)
            self._expect(role, terminal, 130)
            if role == "learner":
                self._expect("actor", self.now.pop("actor").terminal, 1)
        if role == "learner":
            self.start("learner")
        if "actor" not in self.now:
            self.start("actor", WORKERS)

    def _kill(self, role: str, terminal: Terminal) -> None:
        """Kill the one process; its workers and what they share go by themselves."""
        terminal.process.kill()
        terminal.process.wait()
        deadline = time.monotonic() + LEAVE_S
        while left := int(holdings(terminal.process.pid)["processes"]):
            if time.monotonic() > deadline:
                self.report.problems.append(
                    f"{left} processes of a killed {role} are left after {LEAVE_S:.0f} s"
                )
                kill_group(terminal.process)
                return
            time.sleep(0.1)

    def _expect(self, role: str, terminal: Terminal, wanted: int) -> None:
        if (status := terminal.status()) != wanted:
            self.report.problems.append(f"a {role} ended with {status} instead of {wanted}")

    def end(self, updates: int) -> None:
        """Watch until a run is over."""
        self.watch(updates)
        end_well(*[life.terminal for life in self.now.values()])


def disturb(soak: Soak, updates: int, actor_every: int, learner_every: int) -> None:
    """Restart the actor and the learner until a run is over."""
    soak.start("learner")
    soak.start("actor", WORKERS)
    for update in range(1, updates):
        if update % learner_every == 0 or update % actor_every == 0:
            soak.watch(update)
            role = "learner" if update % learner_every == 0 else "actor"
            soak.restart(role)
            print(f"{time.strftime('%H:%M:%S')} update {update}: {role} restarted", flush=True)
    soak.end(updates)


def check_content(run: Run, whole: Run, report: Report) -> None:
    """Note what is wrong with the ledger, the log and the last checkpoint of a disturbed run."""
    folder = run.output_dir
    expected = {k: list(range((k - 1) * EPISODES, k * EPISODES)) for k in range(1, report.updates + 1)}
    found = read_ledger(folder / LEDGER_FILE)
    if {k: sorted(numbers) for k, numbers in found.items()} != expected:
        report.problems.append("the ledger does not hold every episode once, in its own update")
    if any(acted != k - 1 for k, numbers in found.items() for _, acted in numbers.values()):
        report.problems.append("the ledger holds an episode that another policy version acted in")
    # of a run that went astray, the first lines say enough
    report.problems += metrics_differences(whole.metrics(), run.metrics())[:20]
    report.problems += checkpoint_differences(*(each.checkpoint(report.updates) for each in (whole, run)))
    for line in map(json.loads, (folder / LEDGER_FILE).read_text().splitlines()):
        report.ledger[line["state"]] += len(line.get("numbers", [None]))
        if line["state"] == "refused":
            report.refusals["".join(each for each in line["reason"] if not each.isdigit())] += 1
    report.file_bytes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.jsonl"))}
    report.file_bytes["logs"] = sum(path.stat().st_size for path in run.folder.glob("*.log"))


def check_growth(soak: Soak, name: str, report: Report) -> None:
    """Note what the processes of a run have grown by, and what is too much."""
    by_role = defaultdict(list)
    for life in soak.lives:
        if life.settled:
            by_role[f"{life.role} {name}"].append(life.settled)
    for role, lives in by_role.items():
        growth = {each: statistics.median(slope(life, each) for life in lives) for each in ALLOWED}
        levels = [statistics.median(held["resident_mib"] for _, held in life) for life in lives]
        report.lives[role] = len(lives)
        report.growth[role] = {each: round(value, 3) for each, value in growth.items()}
        report.levels_mib[role] = [round(level, 1) for level in levels]
        report.problems += [
            f"the {role} grows by {value:.1f} {each} in a thousand updates, more than {ALLOWED[each]:g}"
            for each, value in growth.items()
            if value > ALLOWED[each]
        ]
        if (more := levels[-1] - levels[0]) > ALLOWED["resident_mib"]:
            report.problems.append(f"the last {role} holds {more:.0f} MiB more than the first")


def draw(disturbed: Soak, whole: Soak, path: Path) -> None:
    """Draw success and resident sets of both runs, with the restarts."""
    figure, (curve, memory) = plt.subplots(2, 1, figsize=(10, 7), sharex=True, layout="constrained")
    for soak, name, style in ((whole, "in one go", "-"), (disturbed, "restarted", "--")):
        success = moving_average([record[SUCCESS] for record in soak.run.metrics()], 50)
        curve.plot(range(1, len(success) + 1), success, style, label=name)
        for life in soak.lives:
            colour = {"learner": "tab:blue", "actor": "tab:orange"}[life.role]
            updates = [update for update, _ in life.samples]
            memory.plot(updates, [held["resident_mib"] for _, held in life.samples], style, color=colour)
    for update, role in disturbed.restarted:
        for axes in (curve, memory):
            axes.axvline(update, color="tab:red" if role == "learner" else "0.8", linewidth=0.8, zorder=0)
    curve.set(
        title="Success with noise, mean of 50 updates; red: learner restarted, grey: actor", ylim=(0, 1)
    )
    curve.legend()
    memory.set(
        title="Resident set; blue: learner, orange: actor with its workers", ylabel="MiB", ylim=(0, None)
    )
    memory.set(xlabel="update")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> int:
    """Soak, print and write report and picture; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--actor-every", type=int, default=50)
    parser.add_argument("--learner-every", type=int, default=200)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    plt.switch_backend("agg")
    report, started, shared = Report(args.updates), time.monotonic(), set(SHARED.iterdir())
    steps = (f"--steps={args.updates}", f"--save_freq={max(1, args.learner_every // 10)}")
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / name for name in ("disturbed", "whole")]
        for each in folders:
            each.mkdir()
        disturbed, whole = (Soak(Run(each, options=(*OPTIONS, *steps)), report) for each in folders)
        with running(disturbed.run), running(whole.run):
            disturb(disturbed, args.updates, args.actor_every, args.learner_every)
            whole.start("learner")
            whole.start("actor")
            whole.end(args.updates)
        check_content(disturbed.run, whole.run, report)
        check_growth(disturbed, "restarted", report)
        check_growth(whole, "in one go", report)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        draw(disturbed, whole, args.output.with_suffix(".png"))
    left = sorted(path.name for path in set(SHARED.iterdir()) - shared)
    report.problems += [f"{SHARED / name} is left" for name in left]
    report.seconds = round(time.monotonic() - started, 1)
    text = json.dumps(vars(report), indent=2)
    args.output.write_text(text + "\n")
    print(text)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
