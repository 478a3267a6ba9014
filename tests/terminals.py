"""Learner and actor as real processes, started with LeRobot's own commands and one config."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.smoke import free_port
from tests.toy import CONFIGS, read_json

TABLETOP = CONFIGS / "pirl_tabletop.json"
# long enough for two busy cores, short enough to fail before a test run's patience ends
TIMEOUT_S = 180
SMALL = (
    "--algorithm.episodes_per_iteration=4",
    "--algorithm.n_envs=2",
    "--algorithm.max_episode_steps=10",
    "--algorithm.minibatch_size=8",
    "--algorithm.micro_batch_size=8",
    "--policy.hidden_size=32",
    "--policy.depth=1",
    "--policy.num_heads=2",
)


class Run:
    """Two terminals with one config; ``options`` are those of every start that is no resume."""

    def __init__(self, folder: Path, config: Path = TABLETOP, options: tuple[str, ...] = SMALL) -> None:
        self.folder, self.config, self.options = folder, config, options
        self.output_dir = folder / "run"
        self.port = free_port()
        self.started: list[subprocess.Popen] = []

    def start(
        self,
        role: str,
        *options: str,
        config: Path | None = None,
        launcher: tuple[str, ...] = (),
        package: str = "lerobot.rl",
    ) -> "Terminal":
        """Start a role of this run's config, or of another, such as a checkpoint's; by a launcher, if one is given."""
        command = [sys.executable, *launcher, "-m", f"{package}.{role}"]
        command += self.arguments(*options, config=config)
        log = self.folder / f"{role}{len(self.started)}.log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
                env=environment,
                start_new_session=True,
            )
        self.started.append(process)
        return Terminal(process, log)

    def arguments(self, *options: str, config: Path | None = None) -> list[str]:
        """Return what follows the command's name."""
        found = [f"--config_path={config or self.config}", f"--algorithm.wire.port={self.port}"]
        if "--resume=true" not in options:
            found += self.options
            found += [] if "--output_dir" in str(options) else [f"--output_dir={self.output_dir}"]
        return found + list(options)

    def start_both(self, *options: str) -> tuple["Terminal", "Terminal"]:
        """Start learner and actor alike."""
        return self.start("learner", *options), self.start("actor", *options)

    def resume(self, role: str, *options: str, **others: Any) -> "Terminal":
        """Start a role as LeRobot resumes: with the config of the last checkpoint."""
        return self.start(role, "--resume=true", *options, config=self.resume_config, **others)

    def resume_both(self, *options: str) -> tuple["Terminal", "Terminal"]:
        """Resume in both terminals."""
        return self.resume("learner", *options), self.resume("actor", *options)

    @property
    def resume_config(self) -> Path:
        return self.output_dir / "checkpoints/last/pretrained_model/train_config.json"

    def checkpoint(self, step: int) -> Path:
        return self.output_dir / "checkpoints" / f"{step:06d}"

    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.output_dir / "metrics.jsonl").read_text().splitlines()]

    def last_step(self) -> int:
        return read_json(self.output_dir / "checkpoints/last/training_state/training_step.json")["step"]

    def kill_all(self) -> None:
        for process in self.started:
            kill(process)


@contextmanager
def running(run: Run) -> Iterator[Run]:
    """Give a run and leave none of its processes behind."""
    try:
        yield run
    finally:
        run.kill_all()


def kill(process: subprocess.Popen) -> None:
    """End a process and its workers at once, as a crash of the machine does."""
    if process.poll() is None:
        kill_group(process)
        process.wait()


def kill_group(process: subprocess.Popen) -> None:
    """End what is left of a process and its workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class Terminal:
    """One process and what it prints."""

    def __init__(self, process: subprocess.Popen, log: Path) -> None:
        self.process, self.log = process, log

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, pattern: str, timeout: float = TIMEOUT_S) -> str:
        """Return the first match of a pattern in the output, once it is there."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            # asked before the text is read: what a process writes last must not be missed
            ended = self.process.poll()
            if found := re.search(pattern, self.text()):
                return found[0]
            assert ended is None, f"ended with {ended}:\n{self.text()[-3000:]}"
            time.sleep(0.05)
        raise AssertionError(f"{pattern!r} did not appear in:\n{self.text()[-3000:]}")

    def status(self, timeout: float = TIMEOUT_S) -> int:
        """Return the exit status once the process has ended."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running:\n{self.text()[-3000:]}") from None

    def interrupt(self) -> None:
        """Press Ctrl-C: the signal goes to the whole process group, as a terminal sends it."""
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        """End the process and its workers at once."""
        kill(self.process)


def end_well(*terminals: Terminal) -> None:
    """Wait until all terminals have ended, and see that they ended well; one that fails is not waited for."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        statuses = [terminal.process.poll() for terminal in terminals]
        if all(status == 0 for status in statuses):
            return
        if any(status not in (None, 0) for status in statuses):
            break
        time.sleep(0.05)
    raise AssertionError(f"{statuses}\n" + "\n".join(terminal.text()[-3000:] for terminal in terminals))
