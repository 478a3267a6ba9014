"""What an iteration costs against environments, chunk length, denoising steps, episodes and the size of the policy.

One of these changes at a time, the others stay; collection and update run one after the other in this process, on the
tabletop. Every axis becomes a plot, ``docs/pictures/scaling_<axis>.png``, beside a line for costs that grow in proportion.

    python -m benchmarks.scaling [--axes envs chunk ...] [--repeats 3] [--write]
"""

import argparse
import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.ratios import RESULTS, timed
from benchmarks.sizes import make_algorithm, make_config
from lerobot_pirl.collector import Collector, episode_specs
from lerobot_pirl.config import PiRLTrainConfig
from lerobot_pirl.envs import make_chunk_envs, num_init_states

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
EPISODES, ENVS, CHUNK, STEPS, WIDTH = 16, 16, 5, 4, 128
# axis -> label and values
AXES: dict[str, tuple[str, list[int]]] = {
    "envs": ("environments side by side (episodes per iteration as many)", [1, 4, 16, 32]),
    "chunk": ("executed steps of a chunk", [2, 5, 10]),
    "steps": ("denoising steps K", [2, 4, 8, 16]),
    "episodes": ("episodes per iteration", [4, 8, 16, 32]),
    "width": ("width of the action transformer", [64, 128, 256, 512]),
}
# its cost is expected in proportion to this of a value
PROPORTION = {"chunk": lambda value: 1 / value, "width": lambda value: value**2}


def config(axis: str, value: int) -> PiRLTrainConfig:
    """Return the config in which one number is another."""
    cfg = make_config("tiny", num_denoising_steps=STEPS, n_action_steps=CHUNK, n_envs=ENVS)
    cfg.algorithm.episodes_per_iteration = EPISODES
    if axis == "envs":
        cfg.algorithm.n_envs = cfg.algorithm.episodes_per_iteration = value
    elif axis == "chunk":
        cfg.algorithm.n_action_steps = value
    elif axis == "steps":
        cfg.algorithm.num_denoising_steps = value
    elif axis == "episodes":
        cfg.algorithm.episodes_per_iteration = value
    else:
        cfg.policy.hidden_size = value
    return cfg


def cost(cfg: PiRLTrainConfig, repeats: int) -> dict[str, float]:
    """Return the medians of the seconds of a collection and an update; the first of each does not count."""
    algorithm, options = make_algorithm(cfg), cfg.algorithm
    envs = make_chunk_envs(cfg.env, options.n_envs, options.n_action_steps)
    collector = Collector(envs, algorithm.adapter, options.last_step_prob, seed=0)
    states, count = {0: num_init_states(cfg.env, 0)}, options.episodes_per_iteration
    seconds: dict[str, list[float]] = {"collection": [], "update": []}
    for number in range(repeats + 1):
        specs = episode_specs(states, number * count, count)
        rollout, taken = timed(collector.collect, specs, number)
        seconds["collection"].append(taken)
        seconds["update"].append(timed(algorithm.update, iter([rollout]))[1])
    envs.close()
    return {part: statistics.median(values[1:]) for part, values in seconds.items()}


def draw(axis: str, values: list[int], costs: list[dict[str, float]], path: Path) -> None:
    """Draw one axis, and what its first value would lead to in proportion."""
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for part in costs[0]:
        axes.plot(values, [each[part] for each in costs], marker="o", label=part)
    total = [sum(each.values()) for each in costs]
    axes.plot(values, total, marker="o", label="both")
    grow = PROPORTION.get(axis, float)
    expected = [total[0] * grow(value) / grow(values[0]) for value in values]
    axes.plot(values, expected, linestyle="--", color="grey", label="in proportion")
    axes.set(xlabel=AXES[axis][0], ylabel="seconds per iteration", xlim=(0, None), ylim=(0, 1.1 * max(total)))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def measure(axes: list[str], repeats: int, folder: Path) -> dict[str, Any]:
    """Measure and draw axes."""
    result = {}
    for axis in axes:
        _, values = AXES[axis]
        costs = [cost(config(axis, value), repeats) for value in values]
        for value, parts in zip(values, costs, strict=True):
            shown = ", ".join(f"{part} {seconds:.3f} s" for part, seconds in parts.items())
            print(f"{axis} {value}: {shown}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        draw(axis, values, costs, folder / f"scaling_{axis}.png")
        result[axis] = {"values": values, "seconds": costs}
    return result


def main() -> None:
    """Measure, draw and, if asked to, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=PICTURES, help="folder of the plots")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/scaling_costs.json")
    options = parser.parse_args()
    result = measure(options.axes, options.repeats, options.output)
    if options.write:
        machine = {
            "python": platform.python_version(),
            "system": platform.system(),
            "cpus": os.cpu_count(),
            "load": os.getloadavg()[0],
        }
        text = json.dumps({"axes": result, "machine": machine}, indent=2)
        (RESULTS / "scaling_costs.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
