"""What the plugin adds to the start of a Python interpreter.

Five kinds of runs take turns, so that a busy machine slows all alike: a bare environment and one with the plugin,
each with a command that has nothing to do with it and with LeRobot's learner on the command line, and a run whose
config selects a recipe, timed from the first import of the hook to the finder's answer. LeRobot itself never runs.
Most of the finder's answer is the import of importlib.metadata and json, which LeRobot imports in any case.

    python benchmarks/startup.py [--runs 60] [--output benchmarks/results/startup.json]
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "lerobot_pirl"
RESULT = Path(__file__).parent / "results" / "startup.json"
LEARNER = ["-m", "lerobot.rl.learner"]
# as runpy does, and then nothing
FIND = """
import sys, time
started = time.perf_counter()
from importlib.util import find_spec
from lerobot_pirl.startup.hook import Redirect
assert Redirect.find_spec("lerobot.rl.learner") is not None
print(1e3 * (time.perf_counter() - started))
"""


def make_environment(folder: Path, plugin: bool) -> Path:
    """Make an environment with a LeRobot of metadata only and, if asked, the plugin's start-up; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    info = site / "lerobot-0.6.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lerobot\nVersion: 0.6.1\n")
    if plugin:
        shutil.copytree(PACKAGE / "startup", site / "lerobot_pirl" / "startup")
        shutil.copy(PACKAGE / "__init__.py", site / "lerobot_pirl")
        shutil.move(site / "lerobot_pirl" / "startup" / "lerobot_pirl.pth", site)
    return folder / "bin" / "python"


def milliseconds(command: list[object], environment: dict[str, str]) -> tuple[float, str]:
    """Run a command; return how long it took, and what it printed."""
    started = time.perf_counter()
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    return 1e3 * (time.perf_counter() - started), done.stdout


def measure(runs: int) -> dict[str, list[float]]:
    """Return the milliseconds of every run, by kind."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LEROBOT"))
    }
    with tempfile.TemporaryDirectory() as folder:
        bare = make_environment(Path(folder) / "bare", plugin=False)
        plugin = make_environment(Path(folder) / "plugin", plugin=True)
        config = Path(folder) / "run.json"
        config.write_text(json.dumps({"recipe": "pi-rl", "job_name": "any", "seed": 1}))
        commands = {
            "bare": [bare, "-c", "pass"],
            "plugin, unrelated command": [plugin, "-c", "pass"],
            "bare, learner": [bare, "-c", "pass", *LEARNER],
            "plugin, learner": [plugin, "-c", "pass", *LEARNER],
            "finder's answer": [plugin, "-c", FIND, *LEARNER, f"--config_path={config}"],
        }
        times: dict[str, list[float]] = {kind: [] for kind in commands}
        for run in range(-3, runs):
            for kind, command in commands.items():
                taken, printed = milliseconds(command, environment)
                # the first runs fill caches
                if run >= 0:
                    times[kind].append(float(printed) if printed else taken)
    return times


def summarise(times: dict[str, list[float]]) -> dict[str, object]:
    """Return medians, minima and what the plugin adds, in milliseconds."""
    median = {kind: statistics.median(values) for kind, values in times.items()}
    fastest = {kind: min(values) for kind, values in times.items()}
    added = {
        "unrelated command": median["plugin, unrelated command"] - median["bare"],
        "learner, before the finder is asked": median["plugin, learner"] - median["bare, learner"],
        "learner, the finder's answer": median["finder's answer"],
    }
    return {
        "runs": len(times["bare"]),
        "median_ms": {kind: round(value, 3) for kind, value in median.items()},
        "minimum_ms": {kind: round(value, 3) for kind, value in fastest.items()},
        "added_ms": {kind: round(value, 3) for kind, value in added.items()},
        "machine": {"python": platform.python_version(), "system": platform.system(), "cpus": os.cpu_count()},
    }


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--runs", type=int, default=60, help="runs of each kind, at least 40 for a fair median"
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    result = summarise(measure(args.runs))
    for kind, value in result["median_ms"].items():
        print(f"{kind:28s} median {value:8.3f} ms   fastest {result['minimum_ms'][kind]:8.3f} ms")
    for kind, value in result["added_ms"].items():
        print(f"the plugin adds {value:6.3f} ms: {kind}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
