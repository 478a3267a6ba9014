"""Warnings: what they hold of, how often they are given, and that the documentation has a section for each."""

import re
from pathlib import Path

import pytest

from lerobot_pirl.health import REPEAT_EVERY, SYMPTOMS, Watch, review

TUNING = (Path(__file__).parent.parent / "docs/tuning.md").read_text()


def update(iteration: int, **numbers) -> dict:
    """Return the record of an update in a run that is well, but for these numbers."""
    return {
        "iteration": iteration,
        "policy_version": iteration - 1,
        "rollout/success_rate": 0.4,
        "rollout/gripper_flip_rate": 0.0,
        "train/policy_grad_norm": 3.0,
        "train/minibatches": 4.0,
        "train/kl_stop": 0.0,
        "train/skipped_steps": 0.0,
        "train/clip_fraction": 0.2,
        "train/approx_kl": 0.01,
        "train/ratio_max_dev_first": 1e-5,
        "train/explained_variance": 0.5,
    } | numbers


def updates(count: int, **numbers) -> list[dict]:
    return [update(i + 1, **numbers) for i in range(count)]


def evaluation(version: int, success: float, episodes: int = 1000) -> dict:
    return {
        "iteration": version,
        "policy_version": version,
        "eval/success_rate": success,
        "eval/episodes": episodes,
    }


def found(records: list[dict]) -> dict[str, str]:
    """Return the warnings that hold after the last of the records."""
    watch = Watch()
    for record in records[:-1]:
        watch.warnings(record)
    return watch.warnings(records[-1])


WELL = [evaluation(0, 0.5), *updates(30), evaluation(30, 0.6)]
# section -> a run of which it holds, and what its sentence says
SICK = {
    "Ratio off 1": (updates(1, **{"train/ratio_max_dev_first": 0.35}), "a ratio is 0.350 off 1"),
    "Steps skipped": (
        [*updates(3), update(4, **{"train/skipped_steps": 2.0})],
        "2 steps of the last 10 updates were skipped",
    ),
    "Hardly any success": (updates(5, **{"rollout/success_rate": 0.04}), "4.0% of the episodes with noise"),
    "Noise too large": (
        [evaluation(0, 0.9), *updates(3, **{"rollout/success_rate": 0.3})],
        "30% with it, 90% without, around policy 0",
    ),
    "Gripper flickers": (updates(5, **{"rollout/gripper_flip_rate": 0.031}), "3.1% of its commands"),
    "Updates end early": (
        updates(10, **{"train/kl_stop": 1.0, "train/minibatches": 2.0}),
        "ended 10 of 10 updates after their first steps",
    ),
    "Trust region unused": (
        updates(10, **{"train/clip_fraction": 0.001, "train/approx_kl": 4e-5}),
        "clip fraction 0.10% and KL 4.0e-05, mean of 10 updates",
    ),
    "Value function useless": (updates(10, **{"train/explained_variance": -0.2}), "explained variance -0.20"),
    "Groups dropped": (updates(5, **{"train/groups_kept": 0.25}), "25% are kept"),
    "Evaluation fell": (
        [evaluation(0, 0.5), evaluation(20, 0.62), evaluation(40, 0.5)],
        "50% of policy 40, 12 points below the 62% of policy 20",
    ),
}


def test_a_run_that_is_well_gets_no_warning():
    assert review(WELL) == []


def test_every_symptom_has_an_example():
    assert SICK.keys() == SYMPTOMS.keys()


@pytest.mark.parametrize("section", SICK)
def test_a_symptom_is_told_alone_in_one_sentence_with_numbers_that_ends_in_its_section(section):
    records, words = SICK[section]
    warnings = found(records)
    assert list(warnings) == [section]
    assert words in warnings[section]
    assert warnings[section].endswith(f"; see docs/tuning.md, {section}")
    assert "\n" not in warnings[section]


NOT_YET = {
    "a ratio as float32 has it": updates(30, **{"train/ratio_max_dev_first": 0.01}),
    "few updates": updates(4, **{"rollout/success_rate": 0.0}),
    "clipping without KL": updates(30, **{"train/clip_fraction": 0.005, "train/approx_kl": 0.0}),
    "KL without clipping": updates(30, **{"train/clip_fraction": 0.0, "train/approx_kl": 0.001}),
    # compared with the weights that it comes from, the only minibatch says nothing
    "one minibatch": updates(
        30, **{"train/minibatches": 1.0, "train/clip_fraction": 0.0, "train/approx_kl": 0.0}
    ),
    "warm-up": updates(
        30,
        **{
            "train/policy_grad_norm": 0.0,
            "train/clip_fraction": 0.0,
            "train/approx_kl": 0.0,
            "train/explained_variance": -1.0,
        },
    ),
    "a value function better than none in most updates": [
        update(i, **{"train/explained_variance": -3.0 if i % 5 == 0 else 0.1}) for i in range(1, 31)
    ],
    "a value function of returns that do not vary": updates(30, **{"train/explained_variance": None}),
    "noise that costs a bit": [evaluation(0, 0.7), *updates(10)],
    "noise in a policy that hardly succeeds": [
        evaluation(0, 0.09),
        *updates(4, **{"rollout/success_rate": 0.04}),
    ],
    "an evaluation long ago": [evaluation(0, 0.9), *updates(30)[10:]],
    "late stops": updates(30, **{"train/kl_stop": 1.0, "train/minibatches": 3.0}),
    "two minibatches and no stop": updates(30, **{"train/minibatches": 2.0}),
    "few early stops": [
        update(i, **({"train/kl_stop": 1.0, "train/minibatches": 2.0} if i % 2 else {})) for i in range(1, 31)
    ],
    "half of the groups": updates(30, **{"train/groups_kept": 0.5}),
    "a gripper that flips at times": updates(30, **{"rollout/gripper_flip_rate": 0.02}),
    "a fall of 5 points": [evaluation(0, 0.55), evaluation(10, 0.5)],
    "a fall by chance": [evaluation(0, 0.6, episodes=50), evaluation(10, 0.5, episodes=50)],
    "a fall and a recovery": [evaluation(0, 0.6), evaluation(10, 0.4), evaluation(20, 0.58)],
    "steps skipped long ago": [
        update(1),
        *[update(i, **{"train/skipped_steps": 3.0}) for i in range(2, 31)],
    ],
    "an update without a sample": [
        {k: v for k, v in u.items() if not k.startswith("train/")} for u in updates(30)
    ],
    "no records of the kind": [{"iteration": 1, "policy_version": 0}],
}


@pytest.mark.parametrize("records", NOT_YET.values(), ids=NOT_YET)
def test_what_is_short_of_a_symptom_gets_no_warning(records):
    assert found(records) == {}


def test_skipped_steps_are_counted_over_a_resume_that_starts_from_0():
    counts = [0, 2, 2, 0, 1]
    records = [update(i + 1, **{"train/skipped_steps": float(n)}) for i, n in enumerate(counts)]
    assert "3 steps of the last 10 updates" in found(records)["Steps skipped"]


def test_a_loss_that_is_not_finite_does_not_hide_the_rest():
    records = updates(10, **{"train/explained_variance": -0.2, "train/policy_grad_norm": None})
    assert list(found(records)) == ["Value function useless"]


def test_a_warning_is_given_when_it_appears_and_again_only_after_a_while():
    watch, given = Watch(), []
    for record in updates(60, **{"train/ratio_max_dev_first": 0.5}):
        given += [record["iteration"] for _ in watch.news(record)]
    assert given == [1, 1 + REPEAT_EVERY, 1 + 2 * REPEAT_EVERY]


def test_a_warning_that_comes_and_goes_is_not_given_more_often():
    watch, given = Watch(), []
    for i in range(1, REPEAT_EVERY + 1):
        given += watch.news(update(i, **{"train/ratio_max_dev_first": 0.5 * (i % 2)}))
    assert len(given) == 1


def test_each_warning_has_its_own_clock():
    watch = Watch()
    first = [watch.news(u) for u in updates(5, **{"rollout/success_rate": 0.0})][-1]
    second = watch.news(update(6, **{"rollout/success_rate": 0.0, "train/ratio_max_dev_first": 0.5}))
    assert [text.rpartition(", ")[2] for text in (*first, *second)] == ["Hardly any success", "Ratio off 1"]


def test_a_review_tells_each_warning_once_with_the_updates_at_which_it_held():
    sick = {"train/ratio_max_dev_first": 0.5}
    records = [update(i, **(sick if i in (4, 7) else {})) for i in range(1, 12)]
    records += [update(12, **{"train/skipped_steps": 1.0})]
    ratio, skipped = review(records)
    assert ratio.startswith("update 4 to 7: the learner does not find the actor's probabilities")
    assert skipped.startswith("update 12: 1 steps")


def sections(text: str) -> dict[str, str]:
    """Return the sections of the documentation's part on warnings: heading -> text."""
    assert "\n## Warnings\n" in text
    part = text.partition("\n## Warnings\n")[2].partition("\n## ")[0]
    _, *pieces = re.split(r"^### (.*)$", part, flags=re.MULTILINE)
    return dict(zip(pieces[::2], pieces[1::2], strict=True))


def test_every_warning_has_a_section_and_every_section_a_warning():
    assert sections(TUNING).keys() == SYMPTOMS.keys()


@pytest.mark.parametrize("section", SYMPTOMS)
def test_a_section_says_what_to_do(section):
    assert re.search(r"`(algorithm|policy|eval|env)[\w.]*`|`lerobot-", sections(TUNING)[section])


def test_ratios_of_an_older_policy_are_no_fault():
    older = {"train/ratio_max_dev_first": 0.35, "rollout/staleness": 0.5}
    assert "Ratio off 1" not in found(updates(1, **older))
    assert "Ratio off 1" in found(updates(1, **older | {"rollout/staleness": 0.0}))
