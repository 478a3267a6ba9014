"""What an update tells about itself: the records of its minibatches -> numbers to log."""

from typing import Any

import torch
from lerobot.rl.algorithms.configs import TrainingStats

POLICY, VALUE = "policy", "value"
LOSSES = (f"{POLICY}_loss", f"{VALUE}_loss")


def training_stats(
    records: list[dict[str, Any]], num_denoising_steps: int, extra: dict[str, float]
) -> TrainingStats:
    """Return losses, gradient norms and diagnostics, also per denoising step.

    Args:
        records: of every minibatch: means by name, per-sample tensors ``[N]`` of ratio, KL and clipping, and the same
            per stored step, ``[N, S]``; none when there was nothing to learn from.
        num_denoising_steps: ``K``.
        extra: what else to log.
    """
    extra = extra | {"minibatches": float(len(records))}
    if not records:
        return TrainingStats(extra=extra)

    def means(names: tuple[str, ...]) -> dict[str, float]:
        return {
            name: sum(record[name] for record in records) / len(records)
            for name in names
            if name in records[0]
        }

    def samples(name: str) -> torch.Tensor:
        return torch.cat([record[name] for record in records])

    kl, clipped, ratio = (samples(name) for name in ("kl", "clipped", "ratio"))
    extra |= {
        "approx_kl": float(kl.mean()),
        "approx_kl_k1": float(samples("kl_k1").mean()),
        "clip_fraction": float(clipped.mean()),
        "ratio_max": float(ratio.max()),
        "ratio_max_dev_first": float((records[0]["ratio"] - 1).abs().max()),
        "kl_stop": float(any(record.get("kl_stop", False) for record in records)),
    }
    if "vf_clipped" in records[0]:
        extra["value_clip_fraction"] = float(samples("vf_clipped").mean())
    for name in ("entropy", "kl_to_start"):
        if name in records[0]:
            extra[name] = float(samples(name).mean())
    per_step = {"approx_kl": samples("step_kl"), "clip_fraction": samples("step_clipped")}
    per_step |= {name: samples(name) for name in records[0] if name.startswith("noise_std_")}
    step_index = samples("step_index")
    for k in range(num_denoising_steps):
        at_k = step_index == k
        if at_k.any():
            extra |= {f"{name}_step{k}": float(values[at_k].mean()) for name, values in per_step.items()}
    norms = means((f"{POLICY}_grad_norm", f"{VALUE}_grad_norm"))
    return TrainingStats(
        losses=means(LOSSES),
        grad_norms={name.removesuffix("_grad_norm"): value for name, value in norms.items()},
        extra=extra,
    )
