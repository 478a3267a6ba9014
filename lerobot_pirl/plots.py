"""Pictures of a run, drawn from its ``metrics.jsonl``."""

import json
import math
from pathlib import Path
from typing import Any

from lerobot_pirl.metrics import EVALUATED, METRICS_FILE, SUCCESS

CURVE_FILE = "learning_curve.png"
_BARS = "▁▂▃▄▅▆▇█"
_MAX_BARS = 60
_TIMES = ("env", "inference", "update", "transfer")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return a run's records, one per iteration and one per evaluation.

    Raises:
        ValueError: when the folder holds no metrics or a line of them is damaged.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing; name the output folder of a run that finished an iteration")
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"line {number} of {path} is no JSON; remove it and try again") from error
    if not any(SUCCESS in record for record in records):
        raise ValueError(f"{path} is empty; the run has not finished an iteration yet")
    return records


def _holding(records: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [record for record in records if name in record]


def _column(records: list[dict[str, Any]], name: str) -> list[float]:
    return [math.nan if record.get(name) is None else record[name] for record in records]


def moving_average(values: list[float], window: int) -> list[float]:
    """Return the mean of the last ``window`` values at every place; of fewer at the start."""
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(values))]


def sparkline(values: list[float]) -> str:
    """Return values in [0, 1] as a line of bars, at most 60 wide."""
    width = math.ceil(len(values) / _MAX_BARS)
    groups = [values[i : i + width] for i in range(0, len(values), width)]
    means = [sum(group) / len(group) for group in groups]
    return "".join(_BARS[min(len(_BARS) - 1, int(mean * len(_BARS)))] for mean in means)


def plot_run(run_dir: Path) -> Path:
    """Draw success, PPO's health and the time split of a run; returns the PNG's path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    everything = read_metrics(run_dir)
    records, evaluations = _holding(everything, SUCCESS), _holding(everything, EVALUATED)
    iterations = _column(records, "iteration")
    success = [100 * value for value in _column(records, SUCCESS)]
    figure, (curve, health, times) = pyplot.subplots(1, 3, figsize=(15, 4), layout="constrained")
    curve.plot(iterations, success, color="tab:blue", alpha=0.3, label="per iteration")
    window = max(1, len(success) // 10)
    curve.plot(iterations, moving_average(success, window), color="tab:blue", label=f"mean of {window}")
    if evaluations:
        rates = [100 * value for value in _column(evaluations, EVALUATED)]
        curve.plot(_column(evaluations, "iteration"), rates, "o-", color="tab:orange", label="without noise")
    curve.set(title="Success of the noisy rollouts", xlabel="policy updates", ylabel="%", ylim=(0, 100))
    curve.legend()
    health.plot(iterations, _column(records, "train/approx_kl"), label="approx. KL")
    health.plot(iterations, _column(records, "train/clip_fraction"), label="clip fraction")
    health.set(title="PPO", xlabel="policy updates", ylim=(0, None))
    health.legend()
    split = [_column(records, f"time/{name}_s") for name in _TIMES]
    times.stackplot(iterations, *split, labels=_TIMES)
    times.set(title="Time of an iteration", xlabel="policy updates", ylabel="s")
    times.legend(loc="upper right")
    path = Path(run_dir) / CURVE_FILE
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return path


def summary(run_dir: Path) -> str:
    """Return a run's success as one line: first and last tenth in per cent, and the curve between them."""
    success = _column(_holding(read_metrics(run_dir), SUCCESS), SUCCESS)
    part = max(1, len(success) // 10)
    first, last = sum(success[:part]) / part, sum(success[-part:]) / part
    return f"success {first:.0%} {sparkline(success)} {last:.0%} over {len(success)} updates"
