"""A learner that is killed at random moments, over and over, ends where an undisturbed one ends.

An actor lives through it all. After each kill `checkpoints/last` must verify, and the learner is resumed from it.
At the end the log must hold every update once, the counters must be exact, and the last checkpoint must equal, bit
for bit, that of a run in one go. Takes a quarter of an hour on two cores.

    python -m benchmarks.kill_soak [--kills 50] [--seed 0] [--output benchmarks/results/kill_soak.json]
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lerobot_pirl import folders
from tests.comparison import checkpoint_differences, metrics_differences
from tests.smoke import versions
from tests.terminals import Run, Terminal, end_well, running
from tests.toy import read_json

RESULT = Path(__file__).parent / "results" / "kill_soak.json"
OPTIONS = (
    "--save_freq=1",
    "--keep_last_n=2",
    "--env_eval_freq=2",
    "--eval.n_episodes=4",
    "--allow_zero_baseline=true",
)
EPISODES_PER_ITERATION = 4
ENDLESS = "--steps=100000"
# seconds from the first update: into its save or the next one, or anywhere
SHORT_S, LONG_S = 0.3, 3.0


@dataclass
class Report:
    """What was done and seen.

    Attributes:
        during_a_save: kills that left something half done beside the checkpoints.
        lost_updates: updates that were logged and not saved when the learner was killed.
        problems: what must not be; empty when all is well.
    """

    kills: int = 0
    during_a_save: int = 0
    lost_updates: int = 0
    most_lost_at_once: int = 0
    updates: int = 0
    evaluations: int = 0
    seconds: float = 0.0
    seed: int = 0
    problems: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=versions)


def last_update(learner: Terminal) -> int:
    """Return the newest update that a learner logged."""
    return int(re.findall(r"update (\d+)/", learner.text())[-1])


def half_done(checkpoints: Path) -> dict[str, int]:
    """Return what a save has not put away yet, each with the time of its last change."""
    return {path.name: path.lstat().st_ctime_ns for path in checkpoints.glob(".*")}


def kill(run: Run, learner: Terminal, delay: float, report: Report) -> None:
    """Kill a learner, that was just started, some time after its first update, and look at what it left."""
    checkpoints = run.output_dir / "checkpoints"
    # of the kill before, until the learner gets to a save
    before = half_done(checkpoints)
    learner.wait_for(r"update \d+/")
    time.sleep(delay)
    learner.kill()
    left = sorted(name for name, _ in half_done(checkpoints).items() - before.items())
    report.kills += 1
    report.during_a_save += bool(left)
    for name in (folders.LAST, folders.BEST):
        try:
            folders.verify(checkpoints / name)
        except ValueError as error:
            report.problems.append(f"kill {report.kills}, {name}: {error}")
    lost = last_update(learner) - run.last_step()
    report.lost_updates += lost
    report.most_lost_at_once = max(report.most_lost_at_once, lost)
    print(
        f"kill {report.kills}: {delay:.2f} s after an update, {lost} updates lost, left: {left}", flush=True
    )


def disturb(run: Run, kills: int, seed: int, report: Report) -> int:
    """Kill and resume a learner so many times, then let it end; return the number of its updates."""
    drawn = random.Random(seed)
    learner, actor = run.start_both(ENDLESS, *OPTIONS)
    # before it there is nothing to resume
    learner.wait_for("INFO checkpoint ")
    for _ in range(kills):
        kill(run, learner, drawn.uniform(0, drawn.choice((SHORT_S, LONG_S))), report)
        options = () if report.kills < kills else (f"--steps={run.last_step() + 2}",)
        learner = run.resume("learner", *options)
    end_well(learner, actor)
    return run.last_step()


def compare(run: Run, whole: Run, updates: int, report: Report) -> None:
    """Note what is wrong with a disturbed run's log, counters and weights."""
    records = run.metrics()
    done = [record["iteration"] for record in records if "rollout/success_rate" in record]
    if done != list(range(1, updates + 1)):
        report.problems.append(f"metrics.jsonl holds the updates {done}")
    evaluated = [record["iteration"] for record in records if "eval/success_rate" in record]
    if evaluated != list(range(0, updates + 1, 2)):
        report.problems.append(f"metrics.jsonl holds the evaluations {evaluated}")
    report.updates, report.evaluations = len(done), len(evaluated)
    counters = read_json(run.checkpoint(updates) / "training_state/training_step.json")
    if (counters["step"], counters["episodes"]) != (updates, EPISODES_PER_ITERATION * updates):
        report.problems.append(f"the counters are {counters}")
    report.problems += checkpoint_differences(whole.checkpoint(updates), run.checkpoint(updates))
    report.problems += metrics_differences(whole.metrics(), records)
    names = sorted(path.name for path in (run.output_dir / "checkpoints").iterdir())
    if any(name.startswith(".") for name in names):
        report.problems.append(f"at the end there are {names}")


def soak(kills: int, seed: int) -> Report:
    """Run both runs and compare them."""
    report = Report(seed=seed)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        runs = [Run(Path(folder) / name) for name in ("disturbed", "whole")]
        for run in runs:
            run.folder.mkdir()
        with running(runs[0]) as disturbed, running(runs[1]) as whole:
            updates = disturb(disturbed, kills, seed, report)
            end_well(*whole.start_both(f"--steps={updates}", *OPTIONS))
            compare(disturbed, whole, updates, report)
    report.seconds = round(time.monotonic() - started, 1)
    return report


def main() -> int:
    """Soak, print and write the report; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    report = soak(args.kills, args.seed)
    text = json.dumps(asdict(report), indent=2)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text + "\n")
    print(text)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
