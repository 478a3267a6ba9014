"""How long a run takes from its two commands to its first environment step, and LeRobot's learner to be imported.

Ours starts learner and actor at once, on the tabletop, with a tiny policy that is built from nothing.

    python -m benchmarks.startup_run [--rounds 3] [--write]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import runs
from benchmarks.ratios import Ratio, report, timed

TARGET = 0.7
IMPORT = [sys.executable, "-c", "import lerobot.rl.learner"]


def first_step(timeout_s: float = runs.TIMEOUT_S) -> float:
    """Return the seconds from the commands to the first step; raises SystemExit when it does not come."""
    with tempfile.TemporaryDirectory() as folder:
        stamp = Path(folder) / "first_step"
        actor = ("-m", "benchmarks.first_step", str(stamp))
        started = time.perf_counter()
        with runs.run(["--steps=1"], actor=actor) as (_, *processes):
            while not stamp.exists() and all(process.poll() is None for process in processes):
                if time.perf_counter() - started > timeout_s:
                    raise SystemExit(f"no environment took a step in {timeout_s:.0f} s")
                time.sleep(0.005)
            # it is written right after it is there
            time.sleep(0.1)
        return float(stamp.read_text()) - started


def main() -> None:
    """Measure, print and, if asked to, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/startup_run.json")
    options = parser.parse_args()
    ratio = Ratio("command to first env step, to import of LeRobot's learner", "s", TARGET, at_least=False)
    for number in range(options.rounds + 1):
        _, theirs = timed(subprocess.run, IMPORT, check=True, capture_output=True)
        ours = first_step()
        # the first one reads files from the disk
        if number > 0:
            ratio.add(ours, theirs)
    report([ratio], "startup_run", {}, options.write)


if __name__ == "__main__":
    main()
