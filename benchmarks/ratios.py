"""Ratios of two ways to do the same thing, measured in turns, so that a busy machine slows both alike."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass
class Ratio:
    """Our figure over another one's, once per round.

    Attributes:
        name: what is compared.
        unit: of both figures.
        target: what the median ratio should reach.
        at_least: whether the ratio should be high, as for speeds, or low, as for times.
    """

    name: str
    unit: str
    target: float
    at_least: bool = True
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    def add(self, ours: float, theirs: float) -> None:
        """Add a round."""
        self.ours.append(ours)
        self.theirs.append(theirs)

    @property
    def median(self) -> float:
        """The median of the rounds' ratios."""
        return statistics.median(a / b for a, b in zip(self.ours, self.theirs, strict=True))

    def __str__(self) -> str:
        """Both medians, their ratio and the target."""
        is_met = self.median >= self.target if self.at_least else self.median <= self.target
        return (
            f"{self.name}: {statistics.median(self.ours):.4g} to {statistics.median(self.theirs):.4g} {self.unit}, "
            f"ratio {self.median:.3g}, target {'>=' if self.at_least else '<='} {self.target:g} "
            f"{'met' if is_met else 'missed'} ({len(self.ours)} rounds)"
        )


def timed[T](call: Callable[..., T], *args: Any, **kwargs: Any) -> tuple[T, float]:
    """Return what a call returns, and the seconds that it takes."""
    started = time.perf_counter()
    result = call(*args, **kwargs)
    return result, time.perf_counter() - started


def report(ratios: list[Ratio], name: str, settings: dict, write: bool) -> None:
    """Print the ratios and, if asked to, write them with all rounds to ``results/<name>.json``."""
    for ratio in ratios:
        print(ratio)
    if write:
        machine = {
            "python": platform.python_version(),
            "system": platform.system(),
            "cpus": os.cpu_count(),
            "load": os.getloadavg()[0],
        }
        rows = [asdict(ratio) | {"ratio": ratio.median} for ratio in ratios]
        result = {"settings": settings, "machine": machine, "ratios": rows}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
