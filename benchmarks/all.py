"""All benchmarks of speed, one after the other, and the table of what they found; about 20 minutes on two cores.

    python -m benchmarks.all [--thorough] [NAME ...]

Results go to ``benchmarks/results``. Those of LIBERO are left out, with the reason, where it is not installed.
"""

import argparse
import importlib.util
import subprocess
import sys
import time

from benchmarks.table import NAMES, table

# fewer rounds than by itself, for the time of all
OPTIONS = {
    "rollout_libero": ["--rounds=3", "--stock_rounds=1", "--env_steps=60"],
    "reset_libero": ["--rounds=3"],
    "encode_sample": ["--seconds=3"],
    "update": ["--rounds=2"],
    "push": ["--rounds=3"],
    "iteration": ["--rounds=1"],
    "startup_run": ["--rounds=2"],
}
LIBERO = ("rollout_libero", "reset_libero")


def why_not(name: str) -> str | None:
    """Return why a benchmark cannot run here, None if it can."""
    if name in LIBERO and importlib.util.find_spec("libero") is None:
        return 'LIBERO is not installed; pip install "lerobot-pirl[libero]"'
    return None


def main() -> int:
    """Run, tell how long each took, and print the table; returns 1 when one has failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(NAMES)}; all if none")
    parser.add_argument(
        "--thorough", action="store_true", help="as many rounds as each makes by itself; an hour"
    )
    arguments = parser.parse_args()
    names = arguments.names or list(NAMES)
    if unknown := sorted(set(names) - set(NAMES)):
        parser.error(f"unknown benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    failed = []
    for name in names:
        if reason := why_not(name):
            print(f"{name}: left out, {reason}", flush=True)
            continue
        started = time.monotonic()
        options = [] if arguments.thorough else OPTIONS.get(name, [])
        command = [sys.executable, "-m", f"benchmarks.{name}", "--write", *options]
        if subprocess.run(command).returncode:
            failed.append(name)
        print(f"{name}: took {time.monotonic() - started:.0f} s", flush=True)
    print(table())
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
