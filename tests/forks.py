"""Learners and actors as forks of one process that has imported everything, so that each starts in a second or two.

Run as a program, it answers one JSON request a line: ``start`` forks a process of its own group, ``poll`` tells
its exit status. Nothing in it may start a thread or a channel before it forks; Python warns if something does.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.terminals import TIMEOUT_S, Run, Terminal


def changed(value: Any) -> Any:
    """Return another value for a metadata field; the values of an object stand under their own names."""
    if isinstance(value, dict):
        return value | {"another.field": "another value"}
    return value + 1 if isinstance(value, int) else f"another-{value[:8]}"


class Fork:
    """A process that the nursery forked; the part of ``subprocess.Popen`` that a :class:`Terminal` uses."""

    def __init__(self, nursery: "Nursery", pid: int) -> None:
        self.nursery, self.pid = nursery, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.nursery.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float = TIMEOUT_S) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.02)
        return self.returncode


class Nursery:
    """The process that forks."""

    def __init__(self) -> None:
        # pyarrow's allocator starts a thread at import otherwise
        single = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
            env={**os.environ, **single},
        )

    def ask(self, **request: Any) -> Any:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """End it, and with it every fork that still runs."""
        self.process.stdin.close()
        self.process.wait(TIMEOUT_S)
        self.process.stdout.close()


class ForkedRun(Run):
    """A run whose processes are forks.

    Args:
        folder: of output and logs.
        nursery: forks them.
    """

    def __init__(self, folder: Path, nursery: Nursery) -> None:
        super().__init__(folder)
        self.nursery = nursery

    def start(
        self,
        role: str,
        *options: str,
        config: Path | None = None,
        different: tuple[str, ...] = (),
        namespace: str | None = None,
    ) -> Terminal:
        """Start a role.

        Args:
            role, options, config: as :meth:`Run.start`.
            different: fields of its metadata that differ from what they would be.
            namespace: the network that it sees, by its name for ``ip netns``.
        """
        log = self.folder / f"{role}{len(self.started)}.log"
        log.touch()
        arguments = self.arguments(*options, config=config)
        more = {"different": different, "namespace": namespace}
        pid = self.nursery.ask(start=role, arguments=arguments, log=str(log), **more)
        fork = Fork(self.nursery, pid)
        self.started.append(fork)
        return Terminal(fork, log)


def _make_different(names: list[str]) -> None:
    """Let metadata of this process differ in some fields."""
    from lerobot_pirl import build, registry

    honest, validators = build.make_metadata, registry.checkpoint_validators

    def make_metadata(cfg: Any, *arguments: Any) -> Any:
        # a recipe of another name, and the same validators
        registry.checkpoint_validators = lambda recipe: validators(cfg.recipe)
        metadata = honest(cfg, *arguments)
        return dataclasses.replace(metadata, **{name: changed(getattr(metadata, name)) for name in names})

    build.make_metadata = make_metadata


def _become(request: dict[str, Any]) -> None:
    """Run a role in this fork, as its own process with its own output; does not return."""
    from lerobot_pirl import launch

    status = 70
    try:
        os.setpgid(0, 0)
        with open(request["log"], "wb") as log, open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        if request["namespace"]:
            with open(f"/run/netns/{request['namespace']}") as network:
                os.setns(network.fileno(), os.CLONE_NEWNET)
        sys.argv = [f"lerobot-pirl-{request['start']}", *request["arguments"]]
        _make_different(request["different"])
        status = launch.main(request["start"])
        launch.exit_process(status)
    finally:
        # whatever happened, this is not the process that answers requests
        os._exit(status)


def _poll(pid: int, ended: dict[int, int]) -> int | None:
    if pid not in ended:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            ended[pid] = os.waitstatus_to_exitcode(status)
    return ended.get(pid)


def _serve() -> None:
    import torch  # noqa: F401
    from lerobot.policies.xvla import modeling_xvla  # noqa: F401

    from lerobot_pirl import actor, learner  # noqa: F401

    pids: list[int] = []
    ended: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            answer = _poll(request["poll"], ended)
        else:
            answer = os.fork()
            if answer == 0:
                _become(request)
            # also here, since either may run first; who asked can send the group a signal at once
            os.setpgid(answer, answer)
            pids.append(answer)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for pid in pids:
        if _poll(pid, ended) is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    _serve()
