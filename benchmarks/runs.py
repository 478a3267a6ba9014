"""Learner and actor as the commands that a user starts, for benchmarks of whole runs."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CONFIG = "configs/pirl_tabletop.json"
LEARNER = ("-m", "lerobot_pirl.learner")
ACTOR = ("-m", "lerobot_pirl.actor")
TIMEOUT_S = 600


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(threads: int | None) -> dict[str, str]:
    """Return the environment of a process that computes with so many threads; None leaves it to torch."""
    threading = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return os.environ | threading


@contextmanager
def run(
    options: list[str], threads: int | None = None, actor: tuple[str, ...] = ACTOR
) -> Iterator[tuple[Path, subprocess.Popen, subprocess.Popen]]:
    """Start learner and actor with the tabletop's config; yield the run's folder and both.

    Raises:
        SystemExit: when one of them has failed; with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "run"
        common = [f"--config_path={CONFIG}", f"--output_dir={folder}", f"--algorithm.wire.port={free_port()}"]
        processes, logs = [], []
        try:
            for number, command in enumerate((LEARNER, actor)):
                logs.append(Path(root) / f"{number}.log")
                with logs[-1].open("w") as log:
                    processes.append(
                        subprocess.Popen(
                            [sys.executable, *command, *common, *options],
                            stdout=log,
                            stderr=log,
                            env=environment(threads),
                        )
                    )
            yield folder, *processes
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
        for process, log in zip(processes, logs, strict=True):
            if process.returncode > 0:
                raise SystemExit(f"{' '.join(process.args)} failed:\n{log.read_text()[-2000:]}")


def iterations(folder: Path) -> list[dict[str, Any]]:
    """Return what a run logged of its iterations."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "time/iteration_s" in record]
