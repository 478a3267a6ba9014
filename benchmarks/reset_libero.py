"""How long a reset of LIBERO takes in an environment worker, ours and LeRobot's.

Both reset to the same initial states with the same seeds, in turns, and must show the same.

    python -m benchmarks.reset_libero [--rounds 10] [--task_ids 2 5] [--write]
"""

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
from lerobot.envs.configs import LiberoEnv as LiberoConfig

from benchmarks.ratios import Ratio, report, timed
from lerobot_pirl.envs import make_chunk_envs
from lerobot_pirl.envs.check import prepare_libero

SUITE, TARGET = "libero_10", 0.2


def make_config(task_id: int, size: int, **options: Any) -> LiberoConfig:
    """Return the config of one task with square frames."""
    return LiberoConfig(
        task=SUITE,
        task_ids=[task_id],
        control_mode="absolute",
        observation_height=size,
        observation_width=size,
        **options,
    )


def make_stock(cfg: LiberoConfig, n_envs: int) -> Any:
    """Return LeRobot's vector of worker processes, as for ``eval.use_async_envs``, for the config's task.

    Environment ``i`` begins with initial state ``i`` and goes on by ``n_envs`` at every reset.
    """
    from lerobot.envs.libero import create_libero_envs

    suites = create_libero_envs(
        task=cfg.task,
        n_envs=n_envs,
        camera_name=cfg.camera_name,
        gym_kwargs=cfg.gym_kwargs,
        env_cls=gym.vector.AsyncVectorEnv,
        control_mode=cfg.control_mode,
        episode_length=cfg.episode_length,
    )
    (envs,) = suites[SUITE].values()
    return envs


def assert_same(ours: Any, theirs: Any) -> None:
    """See that two nested observations are equal to the last bit."""
    if isinstance(ours, dict):
        for name in ours.keys() | theirs.keys():
            assert_same(ours[name], theirs[name])
    elif not np.array_equal(ours, theirs):
        raise SystemExit("the two resets show different things")


def compare(task_id: int, size: int, rounds: int) -> Ratio:
    """Reset both environments in turns; the first time, which builds the simulator, does not count."""
    cfg = make_config(task_id, size)
    ratio = Ratio(f"reset of {SUITE} task {task_id}, ours to LeRobot's", "s", TARGET, at_least=False)
    stock, envs = make_stock(cfg, 1), make_chunk_envs(cfg, 1, 10, use_async=True)
    try:
        for init_state_id in range(rounds + 1):
            (expected, _), theirs = timed(stock.reset, seed=[init_state_id])
            envs.set_attr("init_state_id", init_state_id)
            (observation, _), ours = timed(envs.reset, seed=[init_state_id])
            assert_same(observation, expected)
            if init_state_id > 0:
                ratio.add(ours, theirs)
    finally:
        stock.close()
        envs.close()
    return ratio


def main() -> None:
    """Measure, print and, if asked to, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--task_ids", type=int, nargs="+", default=[2, 5])
    parser.add_argument("--size", type=int, default=256, help="height and width of the frames, in pixels")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/reset_libero.json")
    options = parser.parse_args()
    prepare_libero()
    ratios = [compare(task_id, options.size, options.rounds) for task_id in options.task_ids]
    report(ratios, "reset_libero", {"size": options.size, "suite": SUITE}, options.write)


if __name__ == "__main__":
    main()
