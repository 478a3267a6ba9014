"""Environments in worker processes, with a sentence instead of ``EOFError`` when one of them dies."""

import functools
import multiprocessing
import multiprocessing.connection
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
from gymnasium.vector.async_vector_env import AsyncState

# loaded once in the fork server instead of once per worker; nothing here may initialise a renderer
PRELOADED = ["__main__", "lerobot_pirl.envs.chunk"]
# a dead worker's pipe closes a moment before its exit status is known
EXIT_STATUS_TIMEOUT_S = 5.0


class WorkerDied(ConnectionError):
    """A worker process ended on its own; the message says which one, how, and what to look at."""


def _build(maker: Callable[[], gym.Env]) -> gym.Env:
    """Build an environment; in a worker, leave Ctrl-C, which reaches the whole terminal, to the process it serves."""
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return maker()


class WorkerEnvs(gym.vector.AsyncVectorEnv):
    """One process per environment (forkserver, shared memory), none of which resets by itself.

    Args:
        makers: one function per environment that builds it in its worker.

    Raises:
        WorkerDied: from any method; the other workers are stopped then.
    """

    def __init__(self, makers: list[Callable[[], gym.Env]]):
        self.half_done = False
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
        with self._explained():
            super().set_attr(name, values)

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """Close the environments; with one dead, or a call half done, they are stopped without a farewell."""
        waiting = self.half_done or self._state is not AsyncState.DEFAULT
        if not waiting and all(process.is_alive() for process in self.processes):
            super().close_extras(timeout, terminate)
        else:
            self._stop()

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

    def _stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process, pipe in zip(self.processes, self.parent_pipes, strict=True):
            process.join()
            if pipe is not None:
                pipe.close()
