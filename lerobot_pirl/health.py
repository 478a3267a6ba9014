"""What is wrong with a run, in words: its records -> warnings that name a section of ``docs/tuning.md``.

Every warning holds of the records so far or not; nothing here knows of a running learner.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

from lerobot_pirl.metrics import EVALUATED, SUCCESS

Records = list[dict[str, Any]]

# updates that a judgement takes, where one update says little
WINDOW = 10
NEARBY = 5
# updates after which a warning that still holds is given again
REPEAT_EVERY = 25


def _last(updates: Records, count: int, *names: str) -> list[list[float]] | None:
    """Return the last ``count`` values of each number, or None when there are fewer updates that have them all."""
    having = [u for u in updates if all(u.get(name) is not None for name in names)][-count:]
    return [[u[name] for u in having] for name in names] if len(having) == count else None


def _trained(updates: Records) -> Records:
    """Return the updates that trained the policy: neither the critic's warm-up nor one without a sample."""
    return [u for u in updates if u.get("train/policy_grad_norm", 0) != 0]


def _trust_region(updates: Records, evaluations: Records) -> str | None:
    # a single minibatch is compared with the weights that it comes from: always 0, however far the step goes
    several = [u for u in _trained(updates) if u.get("train/minibatches", 0) > 1]
    if not (found := _last(several, WINDOW, "train/clip_fraction", "train/approx_kl")):
        return None
    clipped, kl = map(statistics.mean, found)
    if clipped >= 0.005 or kl >= 0.001:
        return None
    return f"updates hardly change the policy: clip fraction {clipped:.2%} and KL {kl:.1e}, mean of {WINDOW} updates"


def _ratio(updates: Records, evaluations: Records) -> str | None:
    off = updates[-1].get("train/ratio_max_dev_first") if updates else None
    # of an older policy's probabilities it is off by the updates in between
    if off is None or off <= 0.01 or updates[-1].get("rollout/staleness"):
        return None
    return f"the learner does not find the actor's probabilities: before the first step a ratio is {off:.3f} off 1"


def _low_success(updates: Records, evaluations: Records) -> str | None:
    found = _last(updates, NEARBY, SUCCESS)
    if not found or (rate := statistics.mean(found[0])) >= 0.05:
        return None
    return f"{rate:.1%} of the episodes with noise succeed, mean of {NEARBY} updates: too few to learn from"


def _value_function(updates: Records, evaluations: Records) -> str | None:
    found = _last(_trained(updates), WINDOW, "train/explained_variance")
    if not found or (median := statistics.median(found[0])) > 0:
        return None
    return f"the value function tells no more than a constant: explained variance {median:.2f}, median of {WINDOW} updates"


def _noise(updates: Records, evaluations: Records) -> str | None:
    if not evaluations:
        return None
    without, version = evaluations[-1][EVALUATED], evaluations[-1]["policy_version"]
    near = [u[SUCCESS] for u in updates if abs(u["policy_version"] - version) < NEARBY]
    if len(near) < 3 or without < 0.1 or (noisy := statistics.mean(near)) >= without / 2:
        return None
    return f"the noise costs more than half of the success: {noisy:.0%} with it, {without:.0%} without, around policy {version}"


def _early_stops(updates: Records, evaluations: Records) -> str | None:
    found = _last(_trained(updates), WINDOW, "train/kl_stop", "train/minibatches")
    if not found:
        return None
    # the first minibatch always has KL 0, so that of the second is the first that can stop an update
    early = sum(stop > 0 and count <= 2 for stop, count in zip(*found, strict=True))
    if early < 0.8 * WINDOW:
        return None
    return f"algorithm.target_kl ended {early} of {WINDOW} updates after their first steps, and most samples went unused"


def _skipped_steps(updates: Records, evaluations: Records) -> str | None:
    counts = [u.get("train/skipped_steps") or 0 for u in updates[-WINDOW - 1 :]]
    # a resume from an older checkpoint sets the count back
    before = [0, *counts] if len(counts) <= WINDOW else counts
    skipped = sum(b - a if b >= a else b for a, b in zip(before, before[1:], strict=False))
    if not skipped:
        return None
    return (
        f"{skipped:.0f} steps of the last {WINDOW} updates were skipped: a loss or a gradient was not finite"
    )


def _dropped_groups(updates: Records, evaluations: Records) -> str | None:
    found = _last(updates, NEARBY, "train/groups_kept")
    if not found or (kept := statistics.mean(found[0])) >= 0.5:
        return None
    return f"most groups of episodes teach nothing: {kept:.0%} are kept, mean of {NEARBY} updates"


def _gripper_flips(updates: Records, evaluations: Records) -> str | None:
    found = _last(updates, NEARBY, "rollout/gripper_flip_rate")
    if not found or (rate := statistics.mean(found[0])) <= 0.02:
        return None
    return f"the gripper flickers: {rate:.1%} of its commands are not what the policy would choose, mean of {NEARBY} updates"


def _fallen_evaluation(updates: Records, evaluations: Records) -> str | None:
    if not evaluations:
        return None
    last, best = evaluations[-1], max(evaluations, key=lambda e: e[EVALUATED])
    rate, fall = last[EVALUATED], round(best[EVALUATED] - last[EVALUATED], 6)
    middle = (rate + best[EVALUATED]) / 2
    # within two standard errors it is chance
    if fall <= max(0.05, 2 * math.sqrt(middle * (1 - middle) / last.get("eval/episodes", math.inf))):
        return None
    return (
        f"success without noise fell: {rate:.0%} of policy {last['policy_version']}, {100 * fall:.0f} points below the "
        f"{best[EVALUATED]:.0%} of policy {best['policy_version']}"
    )


# section of docs/tuning.md -> what finds a reason to read it
SYMPTOMS: dict[str, Callable[[Records, Records], str | None]] = {
    "Ratio off 1": _ratio,
    "Steps skipped": _skipped_steps,
    "Hardly any success": _low_success,
    "Noise too large": _noise,
    "Gripper flickers": _gripper_flips,
    "Updates end early": _early_stops,
    "Trust region unused": _trust_region,
    "Value function useless": _value_function,
    "Groups dropped": _dropped_groups,
    "Evaluation fell": _fallen_evaluation,
}


class Watch:
    """Follows a run record by record."""

    def __init__(self) -> None:
        """Start before the first record."""
        # what is older than this decides nothing any more, but for the best evaluation
        self._updates: deque[dict[str, Any]] = deque(maxlen=4 * WINDOW)
        self._evaluations: Records = []
        self._given: dict[str, int] = {}

    def warnings(self, record: dict[str, Any]) -> dict[str, str]:
        """Add a record; returns every warning that holds now, by the section it names."""
        if SUCCESS in record:
            self._updates.append(record)
        if record.get(EVALUATED) is not None:
            self._evaluations.append(record)
        updates = list(self._updates)
        found = {section: test(updates, self._evaluations) for section, test in SYMPTOMS.items()}
        return {section: f"{text}; see docs/tuning.md, {section}" for section, text in found.items() if text}

    def news(self, record: dict[str, Any]) -> list[str]:
        """Add a record; returns the warnings that were not given in the last :data:`REPEAT_EVERY` updates."""
        now, texts = record["iteration"], []
        for section, text in self.warnings(record).items():
            if now - self._given.get(section, -math.inf) >= REPEAT_EVERY:
                self._given[section] = now
                texts.append(text)
        return texts


def review(records: Records) -> list[str]:
    """Return every warning of a run once, as it was last, with the updates at which it held first and last."""
    watch, held = Watch(), {}
    for record in records:
        now = record["iteration"]
        for section, text in watch.warnings(record).items():
            held[section] = (held[section][0] if section in held else now, now, text)
    return [
        f"update {first}{f' to {last}' if last > first else ''}: {text}"
        for first, last, text in held.values()
    ]
