"""Environments in worker processes, with a sentence when one of them dies or answers no more."""

import functools
import multiprocessing
import multiprocessing.connection
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
from gymnasium.vector.async_vector_env import AsyncState

# loaded once in the fork server instead of once per worker; nothing here may initialise a renderer
PRELOADED = ["__main__", "lerobot_pirl.envs.chunk"]
# a dead worker's pipe closes a moment before its exit status is known
EXIT_STATUS_TIMEOUT_S = 5.0
# afterwards a worker that was told to close is killed
CLOSE_TIMEOUT_S = 30.0


class WorkerDied(ConnectionError):
    """A worker process ended on its own; the message says which one, how, and what to look at."""


class WorkerHangs(ConnectionError):
    """A worker process did not answer in time; the message says which one, at what, and what to do."""


class _NoAnswer(Exception):
    """Nothing came through a pipe in time."""


class _BoundedPipe:
    """A pipe whose answer must come within ``timeout_s`` of the question."""

    def __init__(self, pipe: multiprocessing.connection.Connection, timeout_s: float):
        self._pipe = pipe
        self._timeout_s = timeout_s
        self._deadline = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)

    def send(self, question: Any) -> None:
        """Send a question; its time runs from here."""
        self._deadline = time.monotonic() + self._timeout_s
        self._pipe.send(question)

    def recv(self) -> Any:
        """Return the answer."""
        if not self._pipe.poll(max(0.0, self._deadline - time.monotonic())):
            raise _NoAnswer
        return self._pipe.recv()


def _build(maker: Callable[[], gym.Env]) -> gym.Env:
    """Build an environment; in a worker, leave Ctrl-C, which reaches the whole terminal, to the process it serves."""
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return maker()


class WorkerEnvs(gym.vector.AsyncVectorEnv):
    """One process per environment (forkserver, shared memory), none of which resets by itself.

    Args:
        makers: one function per environment that builds it in its worker.
        timeout_s: seconds that a worker may take to be built, to reset or to step.

    Raises:
        WorkerDied: from any method; the other workers are stopped then.
        WorkerHangs: likewise.
    """

    def __init__(self, makers: list[Callable[[], gym.Env]], timeout_s: float = 600.0):
        self.half_done = False
        self._timeout_s = timeout_s
        self._task_ids: list[int] | None = None
        multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
        with self._explained():
            super().__init__(
                [functools.partial(_build, maker) for maker in makers],
                context="forkserver",
                shared_memory=True,
                autoreset_mode=gym.vector.AutoresetMode.DISABLED,
            )

    def reset(self, **kwargs: Any) -> tuple:
        """Reset all environments, or those of ``options["reset_mask"]``."""
        with self._explained():
            return super().reset(**kwargs)

    def step_async(self, actions: Any) -> None:
        """Send every environment its action."""
        with self._explained():
            super().step_async(actions)

    def step_wait(self, timeout: float | None = None) -> tuple:
        """Return what :meth:`step_async` led to."""
        with self._explained():
            return super().step_wait(timeout)

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple:
        """Return the results of a method, or the values of an attribute, of every environment."""
        with self._explained():
            return super().call(name, *args, **kwargs)

    def set_attr(self, name: str, values: Any) -> None:
        """Set an attribute of every environment."""
        if name == "task_id":
            # a worker that hangs from here on does so at its task
            self._task_ids = list(values) if isinstance(values, (list, tuple)) else [values] * self.num_envs
        with self._explained():
            super().set_attr(name, values)

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """Close the environments; with one dead, or a call half done, they are stopped without a farewell."""
        waiting = self.half_done or self._state is not AsyncState.DEFAULT
        if not waiting and all(process.is_alive() for process in self.processes):
            # Gymnasium leaves no pipe to a worker that has sent an error
            for pipe in filter(None, self.parent_pipes):
                pipe.send(("close", None))
            deadline = time.monotonic() + CLOSE_TIMEOUT_S
            for process in self.processes:
                process.join(max(0.0, deadline - time.monotonic()))
        self._stop()

    def _check_spaces(self) -> None:
        # Gymnasium's first question, which the workers answer when they are built
        self.parent_pipes = [_BoundedPipe(pipe, self._timeout_s) for pipe in self.parent_pipes]
        super()._check_spaces()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError) as error:
            notice = self._death_notice()
            if notice is None:
                raise
            self._stop()
            self.closed = True
            # without frames: a failed send leaves a memoryview there, on which the garbage collector of Python
            # 3.12.1 crashes (python/cpython#77894)
            raise WorkerDied(notice) from error.with_traceback(None)
        except _NoAnswer:
            notice = self._hang_notice()
            self._stop()
            self.closed = True
            raise WorkerHangs(notice) from None
        except KeyboardInterrupt:
            # whose answers are on their way is not known any more
            self.half_done = True
            raise

    def _death_notice(self) -> str | None:
        sentinels = [process.sentinel for process in self.processes]
        multiprocessing.connection.wait(sentinels, EXIT_STATUS_TIMEOUT_S)
        dead = [
            f"number {index} (pid {process.pid}, exit status {process.exitcode})"
            for index, process in enumerate(self.processes)
            if not process.is_alive()
        ]
        if not dead:
            return None
        return (
            f"environment worker {', '.join(dead)} of {self.num_envs} died; look for its last words above and, if "
            "the system killed it for memory (exit status -9), lower algorithm.n_envs"
        )

    def _hang_notice(self) -> str:
        hanging = [
            f"number {index} (pid {process.pid}, "
            + ("being built)" if self._task_ids is None else f"at task {self._task_ids[index]})")
            for index, (process, pipe) in enumerate(zip(self.processes, self.parent_pipes, strict=True))
            if not pipe.poll(0)
        ]
        return (
            f"environment worker {', '.join(hanging)} of {self.num_envs} has not answered for {self._timeout_s:g} s; "
            "look for its last words above, raise algorithm.env_timeout_s if the simulator takes that long here, "
            "and start the actor again"
        )

    def _stop(self) -> None:
        for process in self.processes:
            # a process that hangs may not heed more polite signals
            process.kill()
        for process, pipe in zip(self.processes, self.parent_pipes, strict=True):
            process.join(EXIT_STATUS_TIMEOUT_S)
            if pipe is not None:
                pipe.close()
        # its semaphores would outlive this process until Python's tracker warns of them
        self.__dict__.pop("error_queue", None)
