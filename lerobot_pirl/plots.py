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
_RATIO_FLOOR = 1e-6
# points of a curve that are few enough to be marked
_FEW = 20
# 97.5 % quantiles for 1 to 10 degrees of freedom: what seeds are few for
_STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


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
    with _figure(Path(run_dir) / CURVE_FILE, 2, 4) as ((curve, kl, clip, ratio), (value, move, norms, times)):
        _draw_success(curve, records, evaluations)
        _draw_per_step(kl, records, "train/approx_kl", log=True)
        kl.set(title="Approximate KL, per denoising step")
        _draw_per_step(clip, records, "train/clip_fraction")
        clip.set(title="Clip fraction, per denoising step", ylim=(0, None))
        _draw_ratio(ratio, records)
        groups = not _holding(records, "train/explained_variance")
        value.plot(*_line(records, "train/groups_kept" if groups else "train/explained_variance"))
        if groups:
            value.set(title="Share of groups learned from", ylim=(0, 1.02))
        else:
            value.axhline(0, color="tab:gray", linewidth=0.8)
            value.set(title="Explained variance of the value function", ylim=(-1, 1))
        move.plot(*_line(_holding(records, "train/action_change_mm"), "train/action_change_mm"))
        move.set(title="Move of executed positions, per update", ylabel="mm", ylim=(0, None))
        for name in sorted({key for record in records for key in record if key.endswith("_grad_norm")}):
            label = name.removeprefix("train/").removesuffix("_grad_norm")
            norms.plot(*_positive(_line(records, name)), label=label)
        norms.set(title="Gradient norm before clipping", yscale="log")
        split = [_column(records, f"time/{name}_s") for name in _TIMES]
        times.stackplot(_column(records, "iteration"), *split, labels=_TIMES)
        times.set(title="Time of an iteration", ylabel="s")
    return Path(run_dir) / CURVE_FILE


def _draw_success(axes: Any, records: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> None:
    iterations, success = _column(records, "iteration"), _percent(records, SUCCESS)
    axes.plot(iterations, success, color="tab:blue", alpha=0.3, label="with noise, per iteration")
    window = max(1, len(success) // 10)
    axes.plot(iterations, moving_average(success, window), color="tab:blue", label=f"mean of {window}")
    if evaluations:
        at, rates = _column(evaluations, "iteration"), _percent(evaluations, EVALUATED)
        axes.plot(at, rates, "o-", markersize=4, color="tab:orange", label="without noise")
        known = _holding(evaluations, "eval/episodes")
        bounds = [wilson_interval(record[EVALUATED], record["eval/episodes"]) for record in known]
        low, high = [100 * low for low, _ in bounds], [100 * high for _, high in bounds]
        axes.vlines(_column(known, "iteration"), low, high, color="tab:orange", alpha=0.4)
    axes.set(title="Success", ylabel="%", ylim=(0, 100))


def _draw_ratio(axes: Any, records: list[dict[str, Any]]) -> None:
    """Draw how far ratios are off 1 in an update, and before its first step, where nothing may be off."""
    iterations = _column(records, "iteration")
    largest = [abs(ratio - 1) for ratio in _column(records, "train/ratio_max")]
    for label, values in (
        ("largest of the update", largest),
        ("before the first step", _column(records, "train/ratio_max_dev_first")),
    ):
        # exactly 1 is the best there is, and has no place on a logarithmic axis
        axes.plot(iterations, [max(value, _RATIO_FLOOR) for value in values], label=label)
    axes.set(title="Largest deviation of the ratio from 1", yscale="log")


def plot_together(run_dirs: list[Path], path: Path) -> Path:
    """Draw the success of runs, such as seeds of one config, and its mean with a 95 % interval; returns the PNG's path.

    Mean and interval are drawn where every run has a record. Success with noise is averaged over a twentieth of the
    shortest run first.
    """
    runs = [read_metrics(run_dir) for run_dir in run_dirs]
    window = max(1, min(len(_holding(run, SUCCESS)) for run in runs) // 20)
    noise = "with noise" if window == 1 else f"with noise, mean of {window} updates"
    curves = [(f"Success {noise}", [_curve(run, SUCCESS, window) for run in runs])]
    if any(_holding(run, EVALUATED) for run in runs):
        curves.append(("Success without noise", [_curve(run, EVALUATED, 1) for run in runs]))
    with _figure(path, 1, len(curves)) as (row,):
        for axes, (title, each) in zip(row, curves, strict=True):
            _draw_mean(axes, each)
            axes.set(title=title, ylabel="%", ylim=(0, 100))
    return path


def _curve(records: list[dict[str, Any]], name: str, window: int) -> dict[int, float]:
    holding = _holding(records, name)
    values = moving_average(_percent(holding, name), window)
    return dict(zip(_column(holding, "iteration"), values, strict=True))


def _draw_mean(axes: Any, curves: list[dict[int, float]]) -> None:
    curves = [curve for curve in curves if curve]
    for curve in curves:
        style = "." if len(curve) == 1 else "-"
        axes.plot(list(curve), list(curve.values()), style, color="tab:gray", alpha=0.4, linewidth=0.8)
    at = sorted(set(curves[0]).intersection(*curves[1:]))
    bands = [mean_and_interval([curve[i] for curve in curves]) for i in at]
    label = f"mean of {len(curves)} runs, 95 % interval"
    style = "o-" if len(at) < _FEW else "-"
    axes.plot(at, [mean for mean, _ in bands], style, markersize=4, color="tab:blue", label=label)
    low, high = ([mean + sign * half for mean, half in bands] for sign in (-1, 1))
    axes.fill_between(at, low, high, color="tab:blue", alpha=0.2)


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and half its 95 % interval by Student's t; 0 for a single value."""
    mean, freedom = sum(values) / len(values), len(values) - 1
    if freedom == 0:
        return mean, 0.0
    t = _STUDENT_T[freedom - 1] if freedom <= len(_STUDENT_T) else 1.96 + 2.37 / freedom + 2.8 / freedom**2
    return mean, t * statistics.stdev(values) / math.sqrt(len(values))


def wilson_interval(rate: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a success rate over so many episodes, after Wilson."""
    z2 = 1.96**2 / count
    middle = rate + z2 / 2
    half = math.sqrt(rate * (1 - rate) * z2 + z2**2 / 4)
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))


@contextlib.contextmanager
def _figure(path: Path, rows: int, columns: int) -> Iterator[Any]:
    """Give axes ``[rows][columns]`` over policy updates and write them to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (5 * columns, 4 * rows)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False, sharex=True
    )
    yield axes
    for each in axes.flat:
        each.set(xlabel="policy updates")
        each.tick_params(labelbottom=True)
        if not each.collections and not any(len(line.get_xdata()) for line in each.lines):
            each.text(0.5, 0.5, "not in this log", ha="center", transform=each.transAxes)
        if each.get_legend_handles_labels()[0]:
            each.legend(fontsize="small")
    figure.savefig(path, dpi=100, format="png")
    pyplot.close(figure)


def _line(records: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Return iterations and a number's values at them."""
    return _column(records, "iteration"), _column(records, name)


def _positive(line: tuple[list[float], list[float]]) -> tuple[list[float], list[float]]:
    """Return a line with gaps for what a logarithmic axis cannot show: zeros, as of updates without the policy."""
    return line[0], [value if value > 0 else math.nan for value in line[1]]


def _percent(records: list[dict[str, Any]], name: str) -> list[float]:
    return [100 * value for value in _column(records, name)]


def _draw_per_step(axes: Any, records: list[dict[str, Any]], name: str, log: bool = False) -> None:
    """Draw a number's curve, and those of its denoising steps where there are several, from the first to the last."""
    from matplotlib import colormaps

    keys = {key for record in records for key in record if key.startswith(f"{name}_step")}
    steps = sorted(int(key.rpartition("step")[2]) for key in keys)

    def line(key: str) -> tuple[list[float], list[float]]:
        return _positive(_line(records, key)) if log else _line(records, key)

    for place, step in enumerate(steps if len(steps) > 1 else []):
        color = colormaps["viridis"](0.9 * place / (len(steps) - 1))
        axes.plot(*line(f"{name}_step{step}"), color=color, linewidth=1, label=f"step {step}")
    axes.plot(*line(name), color="black", label="all" if len(steps) > 1 else None)
    axes.set(yscale="log" if log else "linear")


def summary(run_dir: Path) -> str:
    """Return a run's success as one line: first and last tenth in per cent, and the curve between them."""
    success = _column(_holding(read_metrics(run_dir), SUCCESS), SUCCESS)
    part = max(1, len(success) // 10)
    first, last = sum(success[:part]) / part, sum(success[-part:]) / part
    return f"success {first:.0%} {sparkline(success)} {last:.0%} over {len(success)} updates"
