"""X-VLA of the real size on one GPU: decisions, updates and memory, against the network alone.

0.88 B parameters with random weights; nothing is downloaded. Each figure has its peer in the same run: LeRobot's
``predict_action_chunk`` in bfloat16 for a decision, forward and backward of the action transformer for an update, and for
both the chip itself: its speed in one large matrix product and in one large copy. Memory is that of a learner and of an
actor with the options of ``configs/pirl_libero10_xvla.json``, at several micro-batches; where both share a card, it is the
sum, and a CUDA context for each.

    python -m benchmarks.gpu.xvla [--batches 1 16 64] [--compile] [--write]
    python -m benchmarks.gpu.xvla --size tiny --device cpu --dtype float32 --rounds 1      # does it run at all
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from lerobot.policies.xvla.modeling_xvla import XVLAPolicy
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.encode_sample import decide
from benchmarks.ratios import Ratio, report
from benchmarks.sizes import (
    SIZES,
    generators,
    make_adapter,
    make_algorithm,
    make_batch,
    make_config,
    make_rollout,
)
from benchmarks.update import bare, bare_batches
from lerobot_pirl.algorithm import PiRLAlgorithm
from lerobot_pirl.config import PiRLTrainConfig

DECISION, UPDATE = 1.10, 0.93
ROWS = 64
CONFIG = "configs/pirl_libero10_xvla.json"
# edge of the matrices, and bytes that are copied, on a GPU and elsewhere
MATRIX, COPY_BYTES = {"cuda": 8192, "cpu": 512}, {"cuda": 2**31, "cpu": 2**24}
# what one process needs to act or to update alone, and what an actor's environments do
OTHERS = ("type", "episodes_per_iteration", "async_envs", "max_episode_steps")


def seconds(device: str, call: Callable[..., Any], *args: Any) -> float:
    """Return the seconds of a call, to its last kernel."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    call(*args)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def run_options() -> dict[str, Any]:
    """Return what the shipped config of a single-GPU run sets under ``algorithm`` and matters here."""
    with open(CONFIG) as file:
        return {name: value for name, value in json.load(file)["algorithm"].items() if name not in OTHERS}


def chip(device: str, dtype: str) -> dict[str, float]:
    """Return what the device does at best: TFLOP/s of a matrix product, GB/s read and written by a copy."""
    kind = torch.device(device).type
    edge, size = MATRIX[kind], COPY_BYTES[kind]
    a = torch.randn(edge, edge, device=device, dtype=getattr(torch, dtype))
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = min(seconds(device, torch.matmul, a, a) for _ in range(10))
    copy = min(seconds(device, target.copy_, source) for _ in range(10))
    return {"TFLOP/s": 2 * edge**3 / product / 1e12, "GB/s": 2 * size / copy / 1e9}


def flops(call: Callable[..., Any], *args: Any) -> int:
    """Return the operations of a call's matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        call(*args)
    return counter.get_total_flops()


def make_stock(cfg: PiRLTrainConfig) -> XVLAPolicy:
    """Return the policy as LeRobot runs it, all of it in the config's dtype."""
    with torch.device(cfg.policy.device):
        return XVLAPolicy(cfg.policy).eval()


def decisions(
    algorithm: PiRLAlgorithm, stock: XVLAPolicy, batches: list[int], rounds: int, label: str
) -> list[Ratio]:
    """Measure a chunk with all that an update needs of it."""
    adapter, device, ratios = algorithm.adapter, str(algorithm.device), []
    weights_gb = sum(p.nbytes for p in adapter.policy.parameters()) / 1e9
    for size in batches:
        ratio = Ratio(f"{label}, batch {size}, decision to LeRobot's", "ms/chunk", DECISION, at_least=False)
        batch, draw = make_batch(adapter, size), generators(size)
        for number in range(rounds + 2):
            theirs = seconds(device, stock.predict_action_chunk, batch)
            ours = seconds(device, decide, adapter, batch, draw)
            if number > 1:
                ratio.add(1e3 * ours / size, 1e3 * theirs / size)
        ratios.append(ratio)
        spent = statistics.median(ratio.ours) * size / 1e3
        print(
            f"{label}, batch {size}: {flops(decide, adapter, batch, draw) / spent / 1e12:.3g} TFLOP/s, "
            f"{weights_gb / spent:.3g} GB/s if every weight is read once"
        )
    return ratios


def actor_memory(cfg: PiRLTrainConfig, rounds: int) -> float | None:
    """Return the GiB that an actor with the config's environments comes to hold, on a GPU."""
    adapter, size = make_adapter(cfg), cfg.algorithm.n_envs
    if torch.device(cfg.policy.device).type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(rounds):
        decide(adapter, make_batch(adapter, size), generators(size))
    return torch.cuda.max_memory_allocated() / 2**30


def update(algorithm: PiRLAlgorithm, rounds: int, label: str) -> tuple[Ratio, float | None]:
    """Measure an update; return the GiB that it comes to hold too, on a GPU."""
    size, device = algorithm.config.micro_batch_size, str(algorithm.device)
    ratio = Ratio(f"{label}, micro-batch {size}, update to forward + backward", "samples/s", UPDATE)
    rollout = make_rollout(algorithm.adapter, ROWS)
    batches = bare_batches(algorithm, rollout, size)
    for number in range(rounds + 1):
        theirs = seconds(device, bare, algorithm, batches)
        ours = seconds(device, algorithm.update, iter([rollout]))
        if number > 0:
            ratio.add(ROWS * algorithm.config.n_epochs / ours, ROWS / theirs)
    spent = ROWS / statistics.median(ratio.theirs)
    print(
        f"{label}, micro-batch {size}: forward + backward {flops(bare, algorithm, batches) / spent / 1e12:.3g} TFLOP/s"
    )
    if algorithm.device.type != "cuda":
        return ratio, None
    del batches
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    algorithm.update(iter([rollout]))
    return ratio, torch.cuda.max_memory_allocated() / 2**30


def measure(options: argparse.Namespace) -> tuple[list[Ratio], dict[str, float]]:
    """Return all ratios, and the peak memory of an update in GiB by micro-batch."""
    ratios, memory = [], {}
    for compiled in (False, True) if options.compile else (False,):
        label = f"{options.size} X-VLA, {options.dtype}{', compiled' if compiled else ''}"
        for micro_batch in options.micro_batches:
            cfg = make_config(
                options.size,
                options.dtype,
                options.device,
                micro_batch_size=micro_batch,
                **run_options() | {"minibatch_size": max(ROWS, micro_batch)},
            )
            algorithm = make_algorithm(cfg)
            if compiled:
                algorithm.adapter.model.transformer.compile()
            ratio, held = update(algorithm, options.rounds, label)
            ratios.append(ratio)
            if held is not None:
                memory[f"{label}, micro-batch {micro_batch}"] = round(held, 2)
        ratios += decisions(algorithm, make_stock(cfg), options.batches, options.rounds, label)
        # the next one must have room
        del algorithm
    held = actor_memory(cfg, options.rounds)
    if held is not None:
        memory[f"{options.size} X-VLA, {options.dtype}, actor with {cfg.algorithm.n_envs} environments"] = (
            round(held, 2)
        )
    return ratios, memory


def main() -> None:
    """Measure, print and, if asked to, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="real", choices=list(SIZES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--compile", action="store_true", help="also with torch.compile on the action transformer"
    )
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/gpu_xvla.json")
    options = parser.parse_args()
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu --size tiny shows whether the script runs")
    limits = chip(options.device, options.dtype)
    print("the chip: " + ", ".join(f"{value:.4g} {unit}" for unit, value in limits.items()))
    ratios, memory = measure(options)
    for what, held in memory.items():
        print(f"{what}: comes to hold {held:.1f} GiB of the GPU; a learner's with AdamW's state")
    is_gpu = torch.device(options.device).type == "cuda"
    device = torch.cuda.get_device_name() if is_gpu else "cpu"
    report(ratios, "gpu_xvla", {"device": device, "memory_gib": memory, "chip": limits}, options.write)


if __name__ == "__main__":
    main()
