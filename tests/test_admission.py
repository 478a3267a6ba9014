"""Rollouts that an update could not read: refused before it tries, with the policy as it is."""

import re

import pytest
import torch

from lerobot_pirl import admission
from lerobot_pirl.rollout import Rollout
from tests.test_algorithm import make_rollout
from tests.toy import tiny_adapter

VARIANTS = ("flow_sde", "flow_noise")


@pytest.fixture(scope="module")
def adapters():
    return {variant: tiny_adapter(variant=variant) for variant in VARIANTS}


def spoiled(adapter, name: str, change) -> Rollout:
    """Return a rollout of the policy with one of its tensors replaced, fit in itself."""
    header, tensors = make_rollout(adapter).to_tensors()
    names = [name] if name in tensors else [f"features.{name}", f"final_features.{name}"]
    for each in names:
        tensors[each] = change(tensors[each])
    return Rollout.from_tensors(header, tensors)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_the_policy_makes_is_admitted(adapters, variant):
    rollout = make_rollout(adapters[variant])
    rollout.check()
    admission.check(rollout, adapters[variant])


@pytest.mark.parametrize(("made", "learner"), [VARIANTS, VARIANTS[::-1]])
def test_what_the_other_variant_makes_is_refused(adapters, made, learner):
    with pytest.raises(ValueError, match="rollout: chain has rows of shape"):
        admission.check(make_rollout(adapters[made]), adapters[learner])


def put(number: int):
    """Return a change that writes a number into the last place."""

    def change(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value.view(-1)[-1] = number
        return value

    return change


def wider(axis: int):
    """Return a change that repeats the last entry along an axis."""
    return lambda value: torch.cat([value, value.narrow(axis, -1, 1)], dim=axis)


UNFIT = {
    "chain, more steps": ("chain", wider(1), "chain has rows of shape (3, 8, 20), this policy makes (2, 8, 20)"),
    "chain, more rows": ("chain", wider(2), "chain has rows of shape (2, 9, 20)"),
    "chain, more channels": ("chain", wider(3), "chain has rows of shape (2, 8, 21)"),
    "step, more": ("step_index", wider(1), "step_index has rows of shape (2,), this policy makes (1,)"),
    "step below": ("step_index", put(-1), "step_index goes from -1 to "),
    "step above": ("step_index", put(4), "to 4, but must lie in 0 to 3"),
    "step far above": ("step_index", put(2**63 - 1), f"to {2**63 - 1}, but must lie in 0 to 3"),
    "log-prob, more": ("log_prob", wider(1), "log_prob has rows of shape (2,)"),
    "gripper, more": ("gripper", wider(1), "gripper has rows of shape (5,), this policy makes (4,)"),
    "gripper, no bit": ("gripper", put(2), "gripper goes from 0 to 2, but must lie in 0 to 1"),
    "wide view": ("vlm_features", wider(2), "features have rows of shapes {'vlm_features': (6, 129)"),
    "wide auxiliary view": ("aux_visual_inputs", wider(2), "features have rows of shapes"),
    "flat view": ("vlm_features", lambda value: value.flatten(1), "features have rows of shapes"),
    "no view": ("vlm_features", lambda value: value[:, :0], "features have rows of shapes"),
    "long view": ("vlm_features", lambda value: value.repeat(1, 20, 1), "features have rows of shapes"),
    "long auxiliary view": ("aux_visual_inputs", lambda value: value.repeat(1, 40, 1), "features have rows of shapes"),
    "long empty view": ("empty_views", lambda value: value.new_empty(len(value), 200, 0), "features have rows of shapes"),
    "wide empty view": ("empty_views", lambda value: value.new_zeros(len(value), 2, 1), "features have rows of shapes"),
    "wide state": ("proprio", wider(1), "features have rows of shapes"),
    "state of integers": ("proprio", lambda value: value.long(), "features.proprio is torch.int64 instead of floating"),
    "domains": ("domain_id", lambda value: value[:, None], "features have rows of shapes"),
    "domain below": ("domain_id", put(-1), "features.domain_id is torch.int64 with [-1, 3], but must be int64 from 0 to 3"),
    "domain above": ("domain_id", put(4), "features.domain_id is torch.int64 with [3, 4]"),
    "domain of another type": ("domain_id", lambda value: value.float(), "features.domain_id is torch.float32"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "change", "expected"), UNFIT.values(), ids=UNFIT)
def test_what_the_policy_cannot_have_made_is_refused(adapters, name, change, expected):
    adapter = adapters["flow_sde"]
    with pytest.raises(ValueError, match=re.escape(expected)):
        admission.check(spoiled(adapter, name, change), adapter)


def test_missing_and_additional_features_are_refused(adapters):
    adapter = adapters["flow_sde"]
    header, tensors = make_rollout(adapter).to_tensors()
    without = {name: value for name, value in tensors.items() if not name.endswith("proprio")}
    more = tensors | {
        f"{group}.more": tensors[f"{group}.proprio"] for group in ("features", "final_features")
    }
    for changed in (without, more):
        with pytest.raises(ValueError, match="features have rows of shapes"):
            admission.check(Rollout.from_tensors(header, changed), adapter)


def test_the_last_observations_are_looked_at_too(adapters):
    adapter = adapters["flow_sde"]
    header, tensors = make_rollout(adapter).to_tensors()
    tensors["final_features.domain_id"] = put(9)(tensors["final_features.domain_id"])
    with pytest.raises(ValueError, match=re.escape("domain_id is torch.int64 with [3, 9]")):
        admission.check(Rollout.from_tensors(header, tensors), adapter)


def test_an_adapter_may_have_nothing_to_say_about_features(adapters, monkeypatch):
    adapter = adapters["flow_sde"]
    monkeypatch.setattr(adapter, "check_features", None)
    admission.check(spoiled(adapter, "domain_id", put(9)), adapter)
