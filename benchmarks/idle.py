"""What a learner that waits for rollouts costs: of a core, and of a collection that runs beside it.

The learner is the package's server and inbox in a process of its own, with an actor that is connected; it is stopped
(SIGSTOP) while the collection runs alone. LeRobot's learner polls its queues without a pause and takes a whole core.

    python -m benchmarks.idle [--rounds 8] [--seconds 10] [--write]
"""

import argparse
import multiprocessing
import os
import signal
import time
from typing import Any

import torch

from benchmarks.ratios import Ratio, report, timed
from benchmarks.sizes import make_adapter, make_config
from lerobot_pirl.collector import Collector, episode_specs
from lerobot_pirl.envs import make_chunk_envs, num_init_states
from lerobot_pirl.inbox import Inbox
from lerobot_pirl.ledger import Ledger
from lerobot_pirl.transport import LearnerClient, LearnerServer
from lerobot_pirl.wire import Message

IDLE, BESIDE = 0.005, 0.98
ADDRESS = {"config_hash": "benchmark", "session": "benchmark"}


def wait(pipe: Any) -> None:
    """Be a learner for whom nothing comes; answer with the CPU time so far and the time."""
    server = LearnerServer("127.0.0.1", 0)

    def answer() -> None:
        if pipe.poll():
            pipe.recv()
            pipe.send((time.process_time(), time.perf_counter()))

    inbox = Inbox(server, Ledger(1), ADDRESS, 1e6, 1e6, answer)
    server.publish(Message("weights", {"policy_version": 0} | ADDRESS, {"w": torch.zeros(10**6)}))
    inbox.open(0, 1, 0)
    pipe.send(server.port)
    inbox.rollout(0)


class Learner:
    """The waiting learner, and an actor that listens to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=wait, args=(other,), daemon=True)
        self.process.start()
        self.client = LearnerClient("127.0.0.1", self.pipe.recv(), 30.0)
        self.client.connect()
        self.client.next_message()

    def _times(self) -> tuple[float, float]:
        self.pipe.send("?")
        return self.pipe.recv()

    def share_of_a_core(self, seconds: float) -> tuple[float, float]:
        """Return the CPU seconds that the learner takes, and in how many seconds."""
        before = self._times()
        time.sleep(seconds)
        after = self._times()
        return after[0] - before[0], after[1] - before[1]

    def pause(self, is_paused: bool) -> None:
        """Stop the learner, or let it go on."""
        os.kill(self.process.pid, signal.SIGSTOP if is_paused else signal.SIGCONT)

    def close(self) -> None:
        """End both."""
        self.pause(False)
        self.client.close()
        self.process.kill()
        self.process.join()


def compare(rounds: int, seconds: float, episodes: int = 16) -> list[Ratio]:
    """Measure both; of collections the first round does not count."""
    idle = Ratio("CPU of a waiting learner to a core", "s", IDLE, at_least=False)
    beside = Ratio("collection beside a waiting learner to alone", "env steps/s", BESIDE)
    cfg = make_config("tiny")
    envs = make_chunk_envs(cfg.env, episodes, 10)
    collector = Collector(envs, make_adapter(cfg), 0.5, seed=0)
    specs = episode_specs({0: num_init_states(cfg.env, 0)}, 0, episodes)
    learner = Learner()
    try:
        for number in range(rounds + 1):
            speeds = []
            # who goes first changes, so that neither is always the warmer one
            for is_paused in (True, False) if number % 2 else (False, True):
                learner.pause(is_paused)
                rollout, taken = timed(collector.collect, specs, 0)
                speeds.append((is_paused, int(rollout.env_steps.sum()) / taken))
            if number > 0:
                beside.add(dict(speeds)[False], dict(speeds)[True])
        learner.pause(False)
        idle.add(*learner.share_of_a_core(seconds))
    finally:
        learner.close()
        envs.close()
    return [idle, beside]


def main() -> None:
    """Measure, print and, if asked to, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0, help="of waiting")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/idle.json")
    options = parser.parse_args()
    report(compare(options.rounds, options.seconds), "idle", {"seconds": options.seconds}, options.write)


if __name__ == "__main__":
    main()
