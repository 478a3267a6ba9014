"""How many samples a second an update trains on, and how many the network alone could.

Ours is the whole update of a rollout whose features are there: advantages, minibatches, PPO's losses, the value head,
gradient clipping and AdamW; a sample counts once per epoch. Theirs is a forward and a backward pass of the action transformer over the same micro-batches.

    python -m benchmarks.update [--sizes tiny mid] [--micro_batch 32] [--minibatches 32 512] [--write]
"""

import argparse

import torch
from torch import Tensor

from benchmarks.ratios import Ratio, report, timed
from benchmarks.sizes import SIZES, make_algorithm, make_config, make_rollout
from lerobot_pirl.algorithm import PiRLAlgorithm

TARGET = 0.93
# chunks of a rollout, and what is measured of them at least
ROWS = {"tiny": 512, "mid": 32, "real": 32}


def bare_batches(algorithm: PiRLAlgorithm, rollout, size: int) -> list[dict[str, Tensor]]:
    """Return the action transformer's inputs in micro-batches."""
    adapter, batches = algorithm.adapter, []
    for rows in torch.arange(len(rollout)).split(size):
        features = {name: value[rows].to(adapter.device) for name, value in rollout.features.items()}
        batches.append(features | {"x_t": rollout.chain[rows, 0].to(adapter.device)})
    return batches


def bare(algorithm: PiRLAlgorithm, batches: list[dict[str, Tensor]]) -> None:
    """Run the action transformer forward and backward over all micro-batches."""
    adapter = algorithm.adapter
    for batch in batches:
        features = {name: value for name, value in batch.items() if name != "x_t"}
        t = torch.full((len(batch["x_t"]),), 0.5, device=adapter.device)
        adapter.predict_x0(features, batch["x_t"], t).sum().backward()
    algorithm.optimizer.zero_grad(set_to_none=True)


def compare(name: str, micro_batch: int, minibatch: int, rounds: int, rows: int) -> Ratio:
    """Measure one size of policy and of minibatch; the first round does not count."""
    what = f"{name} X-VLA, micro-batch {micro_batch}, minibatch {minibatch}, update to forward + backward"
    ratio = Ratio(what, "samples/s", TARGET)
    algorithm = make_algorithm(make_config(name, micro_batch_size=micro_batch, minibatch_size=minibatch))
    rollout = make_rollout(algorithm.adapter, rows)
    batches = bare_batches(algorithm, rollout, micro_batch)
    for number in range(rounds + 1):
        _, theirs = timed(bare, algorithm, batches)
        _, ours = timed(algorithm.update, iter([rollout]))
        if number > 0:
            ratio.add(rows * algorithm.config.n_epochs / ours, rows / theirs)
    return ratio


def main() -> None:
    """Measure, print and, if asked to, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["tiny", "mid"], choices=list(SIZES))
    parser.add_argument("--micro_batch", type=int, default=32)
    parser.add_argument("--minibatches", type=int, nargs="+", default=[32, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/update.json")
    options = parser.parse_args()
    ratios = [
        compare(name, options.micro_batch, minibatch, options.rounds, ROWS[name])
        for name in options.sizes
        for minibatch in options.minibatches
    ]
    settings = {"rows": ROWS, "threads": torch.get_num_threads()}
    report(ratios, "update", settings, options.write)


if __name__ == "__main__":
    main()
