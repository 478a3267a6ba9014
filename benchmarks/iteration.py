"""How long an iteration of a run takes, and how long its collection and its update take alone.

The run is the tabletop's, with both commands as processes on this machine. On-policy the two take turns, so an iteration
is compared with the sum; with ``max_staleness=1`` they work at once, with half the cores each, so it is compared with the
longer one, alone and beside a stranger that does the same: cores share caches and memory, which no protocol changes. What an
iteration has on top is waiting, sending, applying and logging.

    python -m benchmarks.iteration [--rounds 2] [--steps 8] [--episodes 32] [--write]
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks import runs
from benchmarks.ratios import Ratio, report, timed
from lerobot_pirl.algorithm import PiRLAlgorithm
from lerobot_pirl.build import make_adapter
from lerobot_pirl.collector import Collector, episode_specs
from lerobot_pirl.config import PiRLTrainConfig
from lerobot_pirl.envs import make_chunk_envs, num_init_states

TURNS, OVERLAP = 1.10, 1.05
# the first iterations fill caches, and the first update trains the value function alone
SKIPPED = 2
IMPORTS_S = 15.0


def alone(options: list[str], threads: int, repeats: int = 3) -> tuple[float, float]:
    """Return the medians of the seconds of a collection and of its update, each by itself in this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    cfg = PiRLTrainConfig.from_pretrained(runs.CONFIG, cli_args=options)
    adapter = make_adapter(cfg)
    algorithm = PiRLAlgorithm(adapter, cfg.algorithm, cfg.seed)
    envs = make_chunk_envs(cfg.env, cfg.algorithm.n_envs, cfg.algorithm.n_action_steps)
    collector = Collector(envs, adapter, cfg.algorithm.last_step_prob, cfg.seed)
    states, count = {0: num_init_states(cfg.env, 0)}, cfg.algorithm.episodes_per_iteration
    collecting, updating = [], []
    for number in range(SKIPPED + repeats):
        rollout, seconds = timed(collector.collect, episode_specs(states, number * count, count), number)
        collecting.append(seconds)
        updating.append(timed(algorithm.update, iter([rollout]))[1])
    envs.close()
    torch.set_num_threads(before)
    return statistics.median(collecting[SKIPPED:]), statistics.median(updating[SKIPPED:])


def stranger(options: list[str], threads: int) -> None:
    """Collect and update until killed."""
    while True:
        alone(options, threads)


@contextmanager
def beside_a_stranger(options: list[str], threads: int) -> Iterator[None]:
    """Keep the other half of the machine busy with the same work, in a process of its own."""
    process = multiprocessing.get_context("spawn").Process(
        target=stranger, args=(options, threads), daemon=True
    )
    process.start()
    try:
        # its imports are another work
        time.sleep(IMPORTS_S)
        yield
    finally:
        process.kill()
        process.join()


def whole(options: list[str], steps: int, threads: int) -> float:
    """Return the median of the seconds of a run's iterations."""
    with runs.run([*options, f"--steps={steps}", "--save_freq=1000"], threads) as (folder, learner, actor):
        try:
            # an actor whose learner has failed would wait for another
            if learner.wait(runs.TIMEOUT_S) == 0:
                actor.wait(runs.TIMEOUT_S)
                seconds = [record["time/iteration_s"] for record in runs.iterations(folder)][SKIPPED:]
        except subprocess.TimeoutExpired as late:
            raise SystemExit(f"the run did not end in {runs.TIMEOUT_S} s") from late
    return statistics.median(seconds)


def main() -> None:
    """Measure, print and, if asked to, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="updates of a run")
    parser.add_argument("--episodes", type=int, default=32, help="of an iteration")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/iteration.json")
    args = parser.parse_args()
    cores = os.cpu_count() or 1
    options = [f"--algorithm.episodes_per_iteration={args.episodes}", "--algorithm.target_kl=null"]
    turns = Ratio("on-policy iteration to collection + update", "s", TURNS, at_least=False)
    overlap = Ratio("iteration with max_staleness=1 to the longer of both", "s", OVERLAP, at_least=False)
    beside = Ratio(
        "iteration with max_staleness=1 to the longer of both beside a stranger", "s", OVERLAP, at_least=False
    )
    for _ in range(args.rounds):
        turns.add(whole(options, args.steps, cores), sum(alone(options, cores)))
        half = max(1, cores // 2)
        stale = [*options, "--algorithm.max_staleness=1"]
        measured = whole(stale, args.steps, half)
        overlap.add(measured, max(alone(options, half)))
        with beside_a_stranger(options, half):
            beside.add(measured, max(alone(options, half)))
    report(
        [turns, overlap, beside], "iteration", {"steps": args.steps, "episodes": args.episodes}, args.write
    )


if __name__ == "__main__":
    main()
