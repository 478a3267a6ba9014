"""Pictures of a run, drawn from its ``metrics.jsonl``."""

import contextlib
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lerobot_pirl.metrics import EVALUATED, METRICS_FILE, SUCCESS, read_records

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
    records = read_records(path, path.read_bytes().splitlines())
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
    """Draw success, PPO's health (also per denoising step) and the time split of a run; returns the PNG's path."""
    everything = read_metrics(run_dir)
    records, evaluations = _holding(everything, SUCCESS), _holding(everything, EVALUATED)
    iterations = _column(records, "iteration")
    with _figure(Path(run_dir) / CURVE_FILE, 2, 3) as ((curve, kl, clip), (value, ratio, times)):
        success = _percent(records, SUCCESS)
        curve.plot(iterations, success, color="tab:blue", alpha=0.3, label="with noise, per iteration")
        window = max(1, len(success) // 10)
        curve.plot(iterations, moving_average(success, window), color="tab:blue", label=f"mean of {window}")
        if evaluations:
            rates = _percent(evaluations, EVALUATED)
            curve.plot(
                _column(evaluations, "iteration"), rates, "o-", color="tab:orange", label="without noise"
            )
        curve.set(title="Success", ylabel="%", ylim=(0, 100))
        for axes, name, title in (
            (kl, "approx_kl", "Approximate KL"),
            (clip, "clip_fraction", "Clip fraction"),
        ):
            _draw_per_step(axes, records, f"train/{name}")
            axes.set(title=f"{title}, per denoising step", ylim=(0, None))
        value.plot(iterations, _column(records, "train/explained_variance"))
        value.set(title="Explained variance of the value function", ylim=(-1, 1))
        for name, label in (
            ("ratio_max", "largest"),
            ("ratio_max_dev_first", "off 1 in the first minibatch"),
        ):
            ratio.plot(iterations, _column(records, f"train/{name}"), label=label)
        ratio.set(title="Probability ratio", ylim=(0, None))
        split = [_column(records, f"time/{name}_s") for name in _TIMES]
        times.stackplot(iterations, *split, labels=_TIMES)
        times.set(title="Time of an iteration", ylabel="s")
    return Path(run_dir) / CURVE_FILE


def plot_together(run_dirs: list[Path], path: Path) -> Path:
    """Draw the mean success of runs, such as seeds of one config, with its 95 % interval; returns the PNG's path.

    The interval is 1.96 standard errors of the mean over the runs that have a record of the iteration.
    """
    runs = [read_metrics(run_dir) for run_dir in run_dirs]
    with _figure(path, 1, 2) as ((noisy, evaluated),):
        for axes, name, title in ((noisy, SUCCESS, "with noise"), (evaluated, EVALUATED, "without noise")):
            curves = [dict(zip(_column(h, "iteration"), _percent(h, name), strict=True))
                      for h in (_holding(run, name) for run in runs)]  # fmt: skip
            for curve in curves:
                axes.plot(list(curve), list(curve.values()), color="tab:gray", alpha=0.4)
            at = sorted(set().union(*curves))
            bands = [mean_and_interval([curve[i] for curve in curves if i in curve]) for i in at]
            means, halves = [mean for mean, _ in bands], [half for _, half in bands]
            axes.plot(at, means, color="tab:blue", label=f"mean of {len(runs)} runs, 95 % interval")
            low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
            axes.fill_between(at, low, high, color="tab:blue", alpha=0.2)
            axes.set(title=f"Success {title}", ylabel="%", ylim=(0, 100))
    return path


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and half its 95 % interval, 1.96 standard errors; 0 for a single value."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    return mean, 1.96 * statistics.stdev(values) / math.sqrt(len(values))


@contextlib.contextmanager
def _figure(path: Path, rows: int, columns: int) -> Iterator[Any]:
    """Give axes ``[rows][columns]`` over policy updates and write them to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (5 * columns, 4 * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    yield axes
    for each in axes.flat:
        each.set(xlabel="policy updates")
        if each.get_legend_handles_labels()[0]:
            each.legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _percent(records: list[dict[str, Any]], name: str) -> list[float]:
    return [100 * value for value in _column(records, name)]


def _draw_per_step(axes: Any, records: list[dict[str, Any]], name: str) -> None:
    """Draw a number's curve, and thinner those of its denoising steps, where there are several."""
    iterations = _column(records, "iteration")
    axes.plot(iterations, _column(records, name), color="black", label="all")
    steps = {key for record in records for key in record if key.startswith(f"{name}_step")}
    for key in sorted(steps, key=lambda key: int(key.rpartition("step")[2])):
        axes.plot(iterations, _column(records, key), linewidth=0.8, label=f"step {key.rpartition('step')[2]}")


def summary(run_dir: Path) -> str:
    """Return a run's success as one line: first and last tenth in per cent, and the curve between them."""
    success = _column(_holding(read_metrics(run_dir), SUCCESS), SUCCESS)
    part = max(1, len(success) // 10)
    first, last = sum(success[:part]) / part, sum(success[-part:]) / part
    return f"success {first:.0%} {sparkline(success)} {last:.0%} over {len(success)} updates"
