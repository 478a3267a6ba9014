"""How many steps a second LIBERO's environments take while our actor collects, and while others step them.

A tiny, untrained X-VLA plays the same initial states with the same seeds in environment workers, in turns:

- our actor's collection, with noise and all that is kept for an update;
- LeRobot's own ``rollout``, as ``lerobot-eval`` runs it;
- the bare simulator, as fast as ours steps it, that repeats the collection's actions, renders a frame of each
  camera per chunk and asks no policy.

Every figure has its resets in it: one per episode.

    python -m benchmarks.rollout_libero [--rounds 5] [--env_steps 120] [--write]
"""

import argparse
import time
from functools import partial
from typing import Any

import numpy as np
from lerobot.scripts.lerobot_eval import rollout

from benchmarks.ratios import Ratio, report, timed
from benchmarks.reset_libero import SUITE, make_config, make_stock
from lerobot_pirl.build import make_adapter
from lerobot_pirl.collector import Collector, episode_specs
from lerobot_pirl.config import PiRLTrainConfig
from lerobot_pirl.envs import ChunkEnv, num_init_states
from lerobot_pirl.envs.check import prepare_libero
from lerobot_pirl.envs.chunk import make_task_env
from lerobot_pirl.envs.workers import WorkerEnvs
from lerobot_pirl.rollout import derive_seed

TASK = 2
CONFIG = "configs/pirl_libero10_smoke.json"
# chunk -> our speed over LeRobot's
TARGETS = {10: 7.5, 30: 13.0}
BARE_TARGET = 0.9


class RepeatableEnv(ChunkEnv):
    """A slot that can play its last episode again without anything around the simulator."""

    recorded: list[np.ndarray]

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """Reset, and record from here."""
        self.recorded, self.seed = [], seed
        return super().reset(seed=seed, options=options)

    def step(self, actions: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Execute and record a chunk."""
        self.recorded.append(np.array(actions))
        return super().step(actions)

    def repeat(self) -> int:
        """Play the recorded episode in the bare simulator and return its number of steps."""
        self.env.init_state_id = self.init_state_id
        self.env.reset(seed=self.seed)
        simulator, left = self.env._env, self._episode_steps
        for chunk in self.recorded:
            chunk = chunk[:left]
            left -= len(chunk)
            for number, action in enumerate(chunk, start=1):
                simulator.enabled = number == len(chunk)
                simulator.step(action)
        return self._episode_steps - left


def policy_config(chunk: int, env_steps: int) -> PiRLTrainConfig:
    """Return the smoke run's config with another chunk and time limit."""
    return PiRLTrainConfig.from_pretrained(
        CONFIG,
        cli_args=[
            f"--policy.chunk_size={chunk}",
            f"--policy.n_action_steps={chunk}",
            f"--algorithm.n_action_steps={chunk}",
            f"--algorithm.max_episode_steps={env_steps}",
        ],
    )


def play_stock(stock: Any, adapter: Any, seeds: list[int]) -> int:
    """Run LeRobot's rollout and return how many steps it took."""
    pipelines = adapter.processors
    processors = (pipelines.env_pre, pipelines.env_post, pipelines.policy_pre, pipelines.policy_post)
    result = rollout(stock, adapter.policy, *processors, seeds=seeds)
    return result["action"].shape[0] * result["action"].shape[1]


def compare(
    stock: Any, env_cfg: Any, chunk: int, options: argparse.Namespace, first: int
) -> tuple[list[Ratio], float]:
    """Measure one chunk length and number of environments; return the share of the collection that is the policy, too.

    Args:
        stock: LeRobot's environments.
        env_cfg: their config.
        chunk: executed actions per decision.
        options: of the command line.
        first: how often ``stock`` was reset.
    """
    n_envs = stock.num_envs
    cfg = policy_config(chunk, options.env_steps)
    adapter = make_adapter(cfg)
    maker = partial(RepeatableEnv, partial(make_task_env, env_cfg), chunk, options.env_steps, TASK)
    what = f"{n_envs} env worker(s), chunk {chunk}, collection to"
    to_stock = Ratio(f"{what} LeRobot's rollout", "env steps/s", TARGETS[chunk])
    to_bare = Ratio(f"{what} bare simulator", "env steps/s", BARE_TARGET)
    envs = WorkerEnvs([maker] * n_envs)
    collector = Collector(envs, adapter, cfg.algorithm.last_step_prob, cfg.seed)
    states, inference, whole = {TASK: num_init_states(env_cfg, TASK)}, 0.0, 0.0
    try:
        # builds the simulators
        collector.collect(episode_specs(states, 0, n_envs), 0)
        for turn in range(options.rounds):
            specs = episode_specs(states, (first + turn) * n_envs, n_envs)
            collected, ours = timed(collector.collect, specs, 0)
            steps = int(collected.env_steps.sum())
            inference, whole = inference + collected.stats["inference_s"], whole + ours
            repeated, bare = timed(envs.call, "repeat")
            if steps != sum(repeated):
                raise SystemExit(f"the collection took {steps} steps, the bare simulator {repeated}")
            to_bare.add(steps / ours, steps / bare)
            if turn < options.stock_rounds:
                seeds = [derive_seed(cfg.seed, 0, spec.number) for spec in specs]
                stock_steps, theirs = timed(play_stock, stock, adapter, seeds)
                if stock_steps != steps:
                    raise SystemExit(f"the collection took {steps} steps, LeRobot's rollout {stock_steps}")
                to_stock.add(steps / ours, steps / theirs)
    finally:
        envs.close()
    return [to_stock, to_bare], inference / whole


def main() -> None:
    """Measure, print and, if asked to, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--stock_rounds", type=int, default=3, help="of these, rounds that LeRobot's plays too"
    )
    parser.add_argument("--chunks", type=int, nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--n_envs", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--env_steps", type=int, default=120, help="steps of an episode, up to 520")
    parser.add_argument("--size", type=int, default=256, help="height and width of the frames, in pixels")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/rollout_libero.json")
    options = parser.parse_args()
    options.stock_rounds = min(options.stock_rounds, options.rounds)
    prepare_libero()
    env_cfg = make_config(TASK, options.size, episode_length=options.env_steps)
    ratios, shares, started = [], {}, time.perf_counter()
    for n_envs in options.n_envs:
        stock = make_stock(env_cfg, n_envs)
        try:
            # builds the simulators
            stock.reset(seed=list(range(n_envs)))
            for place, chunk in enumerate(options.chunks):
                found, share = compare(stock, env_cfg, chunk, options, 1 + place * options.stock_rounds)
                ratios += found
                shares[f"{n_envs} env worker(s), chunk {chunk}"] = round(share, 3)
        finally:
            stock.close()
    print(f"took {time.perf_counter() - started:.0f} s")
    for what, share in shares.items():
        print(
            f"{what}: the policy takes {share:.1%} of the collection, which the bare simulator does without"
        )
    settings = {"size": options.size, "env_steps": options.env_steps, "suite": SUITE, "task_id": TASK}
    settings["policy_share"] = shares
    report(ratios, "rollout_libero", settings, options.write)


if __name__ == "__main__":
    main()
