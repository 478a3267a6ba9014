"""How long a decision takes with all that an update needs of it, and how long LeRobot's without.

Ours encodes an observation, denoises with one stochastic step per sample and keeps chain, log-probability and features on
the CPU; theirs is the policy's own ``predict_action_chunk`` (``generate_actions``) with as many denoising steps.

    python -m benchmarks.encode_sample [--sizes tiny mid] [--batches 1 8 32] [--steps 5] [--write]
"""

import argparse

import torch

from benchmarks.ratios import Ratio, report, timed
from benchmarks.sizes import SIZES, act, generators, make_adapter, make_batch, make_config
from lerobot_pirl.policies.xvla import XVLAAdapter

TARGET = 1.10


def decide(adapter: XVLAAdapter, batch: dict, draw: list[torch.Generator]) -> None:
    """Encode and sample a batch as a collection does."""
    act(adapter, adapter.encode(batch), draw)


def compare(adapter: XVLAAdapter, name: str, size: int, seconds: float) -> Ratio:
    """Measure one batch size for so many seconds, at least five rounds."""
    ratio = Ratio(f"{name} X-VLA, batch {size}, encode and sample to LeRobot's", "s", TARGET, at_least=False)
    batch, draw = make_batch(adapter, size), generators(size)
    for warm_up in (True, False):
        spent = 0.0
        while spent < (0.05 * seconds if warm_up else seconds) or (not warm_up and len(ratio.ours) < 5):
            _, theirs = timed(adapter.policy.predict_action_chunk, batch)
            _, ours = timed(decide, adapter, batch, draw)
            spent += ours + theirs
            if not warm_up:
                ratio.add(ours, theirs)
    return ratio


def main() -> None:
    """Measure, print and, if asked to, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["tiny", "mid"], choices=list(SIZES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=5, help="denoising steps")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each size and batch")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/encode_sample.json")
    options = parser.parse_args()
    ratios = []
    for name in options.sizes:
        adapter = make_adapter(make_config(name, num_denoising_steps=options.steps))
        ratios += [compare(adapter, name, size, options.seconds) for size in options.batches]
    settings = {"steps": options.steps, "threads": torch.get_num_threads()}
    report(ratios, "encode_sample", settings, options.write)


if __name__ == "__main__":
    main()
