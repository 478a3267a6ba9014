"""What must agree between learner, actor and checkpoint, and how a difference is told."""

import copy
import json
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import draccus
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.optim.schedulers import (
    ConstantWithWarmupSchedulerConfig,
    CosineAnnealingWithWarmupSchedulerConfig,
    CosineDecayWithWarmupSchedulerConfig,
)
from torch import nn

from lerobot_pirl import registry
from lerobot_pirl.config import PiRLTrainConfig
from lerobot_pirl.metadata import (
    NEVER_ACCEPTED,
    Metadata,
    MetadataMismatch,
    accept_changes,
    config_hash,
    critical_config,
    flat_options,
    judge,
    make_metadata,
    one_line,
    validate_metadata,
)
from lerobot_pirl.options import PiRLConfig, WireConfig
from lerobot_pirl.parsing import read_config_file
from tests.installs import fake_distribution, write_files
from tests.toy import CONFIGS, tiny_config

CONFIG = CONFIGS / "pirl_tabletop.json"
VALUES = {
    "format_version": 1,
    "recipe": "pi-rl",
    "variant": "flow_sde",
    "config_path": "configs/a.json",
    "config_hash": "1" * 64,
    "policy_type": "xvla",
    "policy_features": "{}",
    "action_mode": "ee6d",
    "num_denoising_steps": 5,
    "n_action_steps": 10,
    "encoder_digest": "2" * 64,
    "tokenizer_digest": "3" * 64,
    "processors_digest": "4" * 64,
    "package_version": "0.1.0",
    "lerobot_version": "0.6.1",
    "run_id": "a-run",
    "config": {"seed": 1, "algorithm": {"gamma": 0.99, "betas": [0.9, 0.95]}},
    "history": [],
}
METADATA = Metadata(**VALUES)
SHOWN_ONLY = ("config_path", "run_id", "config", "history")
JUDGED = [name for name in VALUES if name not in SHOWN_ONLY]


def changed(name: str) -> Metadata:
    value = getattr(METADATA, name)
    if isinstance(value, dict):
        return replace(METADATA, **{name: value | {"seed": 2}})
    if isinstance(value, list):
        return replace(METADATA, **{name: [*value, {"version": 3, "changes": {"seed": [0, 1]}}]})
    return replace(METADATA, **{name: value + 1 if isinstance(value, int) else f"other-{value}"})


def mismatch(actor: dict, learner: dict) -> list[str]:
    """Return the lines of what the actor says about the learner."""
    with pytest.raises(MetadataMismatch) as caught:
        validate_metadata(actor, learner, "actor", "learner")
    return str(caught.value).splitlines()


def test_equal_metadata_pass():
    validate_metadata(METADATA.to_dict(), json.loads(json.dumps(METADATA.to_dict())), "actor", "learner")


@pytest.mark.parametrize("name", SHOWN_ONLY)
def test_what_differs_between_machines_by_nature_is_not_judged(name):
    validate_metadata(METADATA.to_dict(), changed(name).to_dict(), "actor", "learner")
    without = {key: value for key, value in METADATA.to_dict().items() if key != name}
    validate_metadata(METADATA.to_dict(), without, "actor", "learner")


@pytest.mark.parametrize("name", JUDGED)
def test_a_difference_is_a_table_with_both_values_and_what_to_do(name):
    mine, theirs = METADATA.to_dict(), changed(name).to_dict()
    title, head, row, config_row, remedy = mismatch(mine, theirs)
    assert title == f"metadata of learner and actor differ in {name}:"
    assert head.split() == ["field", "learner", "actor"]
    assert row.split() == [name, str(theirs[name]), str(mine[name])]
    assert config_row.split() == ["config_path", "configs/a.json", "configs/a.json"]
    assert remedy.startswith("What to do: ")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("config_hash", "give both sides the same config file and overrides."),
        ("num_denoising_steps", "give both sides the same config file and overrides."),
        ("package_version", "install the same lerobot-pirl on both sides."),
        ("format_version", "install the same lerobot-pirl on both sides."),
        ("lerobot_version", "install the same lerobot on both sides."),
    ],
)
def test_the_remedy_fits_the_field(name, remedy):
    assert mismatch(METADATA.to_dict(), changed(name).to_dict())[-1] == f"What to do: {remedy}"


def test_other_frozen_weights_are_not_blamed_on_the_config():
    remedy = mismatch(METADATA.to_dict(), changed("encoder_digest").to_dict())[-1]
    assert "pretrained weights" in remedy
    assert "config file" not in remedy


def test_other_processors_are_not_blamed_on_the_config():
    remedy = mismatch(METADATA.to_dict(), changed("processors_digest").to_dict())[-1]
    assert "policy_preprocessor.json" in remedy
    assert "config file" not in remedy


def test_several_differences_are_told_at_once_with_every_remedy_once():
    theirs = METADATA.to_dict() | {"config_hash": "3", "n_action_steps": 7, "lerobot_version": "0.6.2"}
    theirs["config_path"] = "elsewhere/b.json"
    lines = mismatch(METADATA.to_dict(), theirs)
    assert lines[0] == "metadata of learner and actor differ in config_hash, n_action_steps, lerobot_version:"
    rows = [line.split() for line in lines[2:-1]]
    assert rows == [
        ["config_hash", "3", "1" * 64],
        ["n_action_steps", "7", "10"],
        ["lerobot_version", "0.6.2", "0.6.1"],
        ["config_path", "elsewhere/b.json", "configs/a.json"],
    ]
    assert lines[-1] == (
        "What to do: give both sides the same config file and overrides; install the same lerobot on both sides."
    )


def test_another_config_is_told_option_by_option():
    config = {"seed": 1, "algorithm": {"gamma": 0.9, "betas": [0.9, 0.95], "dual_clip": 3}, "env": {}}
    theirs = replace(METADATA, config=config, config_hash="3" * 64)
    lines = mismatch(METADATA.to_dict(), json.loads(json.dumps(theirs.to_dict())))
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:-1]}
    assert rows["algorithm.gamma"] == ["0.9", "0.99"]
    assert rows["algorithm.dual_clip"] == ["3", "-"]
    assert rows["env"] == ["{}", "-"]
    assert set(rows) == {"config_hash", "config_path", "algorithm.gamma", "algorithm.dual_clip", "env"}


def test_the_line_for_the_log_leaves_the_config_out():
    shown = json.loads(one_line(METADATA.to_dict()))
    assert shown == {key: value for key, value in METADATA.to_dict().items() if key != "config"}


def test_the_columns_of_the_table_are_aligned():
    lines = mismatch(METADATA.to_dict(), changed("config_hash").to_dict())
    head = lines[1]
    for line in lines[2:-1]:
        assert line[head.index("learner") - 1] == line[head.index("actor") - 1] == " "
        assert " " not in (line[head.index("learner")], line[head.index("actor")])


@pytest.mark.parametrize("value", ["new", None])
def test_a_field_that_one_side_does_not_know_is_a_difference_of_versions(value):
    extra = METADATA.to_dict() | {"noise": value}
    for mine, theirs, row in [
        (METADATA.to_dict(), extra, ["noise", str(value), "-"]),
        (extra, METADATA.to_dict(), ["noise", "-", str(value)]),
    ]:
        lines = mismatch(mine, theirs)
        assert lines[2].split() == row
        assert lines[-1] == "What to do: install the same lerobot-pirl on both sides."


def test_a_peer_without_metadata_differs_in_everything_that_is_judged():
    title = mismatch(METADATA.to_dict(), {})[0]
    assert title == f"metadata of learner and actor differ in {', '.join(JUDGED)}:"


def test_additional_fields_stand_beside_the_others_and_are_judged_by_their_full_name():
    metadata = replace(METADATA, additional={"pi-rl.lab.gravity": 9.81, "pi-rl.lab.floor": None})
    assert metadata.to_dict() == VALUES | {"pi-rl.lab.gravity": 9.81, "pi-rl.lab.floor": None}
    lines = mismatch(metadata.to_dict(), metadata.to_dict() | {"pi-rl.lab.gravity": 1.62})
    assert lines[0] == "metadata of learner and actor differ in pi-rl.lab.gravity:"
    assert lines[2].split() == ["pi-rl.lab.gravity", "1.62", "9.81"]
    assert lines[-1] == "What to do: make validator 'pi-rl.lab' find the same on both sides."
    without = {name: value for name, value in metadata.to_dict().items() if name != "pi-rl.lab.gravity"}
    for mine, theirs in [(metadata.to_dict(), without), (without, metadata.to_dict())]:
        remedy = mismatch(mine, theirs)[-1]
        assert remedy == "What to do: install the same package with validator 'pi-rl.lab' on both sides."


# changes that the user accepts

THEIRS = VALUES | {
    "config_hash": "old",
    "n_action_steps": 9,
    "config": {"seed": 1, "algorithm": {"gamma": 0.9, "betas": [0.9, 0.95], "former": 3}},
}
MINE = VALUES | {
    "config": {"seed": 1, "algorithm": {"gamma": 0.99, "betas": [0.9, 0.95]}, "env": {"fps": 20}}
}
OPTIONS = {"algorithm.gamma": [0.9, 0.99], "algorithm.former": [3, None], "env.fps": [None, 20]}


def test_accepted_fields_and_options_become_this_runs_and_are_listed_with_both_values():
    before = copy.deepcopy((MINE, THEIRS))
    accepted, changes = accept_changes(MINE, THEIRS, ["n_action_steps", "algorithm.gamma"])
    assert changes == {"n_action_steps": [9, 10], "algorithm.gamma": [0.9, 0.99]}
    assert accepted["n_action_steps"] == 10
    assert flat_options(accepted["config"])["algorithm.gamma"] == 0.99
    assert flat_options(accepted["config"])["algorithm.former"] == 3
    assert before == (MINE, THEIRS)


def test_the_configs_hash_follows_once_no_option_is_left_that_differs():
    for left_out in OPTIONS:
        accepted, _ = accept_changes(MINE, THEIRS, [name for name in OPTIONS if name != left_out])
        assert accepted["config_hash"] == "old"
        rows = mismatch(MINE, accepted)
        assert any(row.startswith(f"{left_out} ") for row in rows)
        assert not any(row.startswith(f"{name} ") for name in OPTIONS if name != left_out for row in rows)
    accepted, changes = accept_changes(MINE, THEIRS, OPTIONS)
    assert accepted["config_hash"] == MINE["config_hash"]
    # an option that one side lacks has no value there
    assert changes == OPTIONS
    assert mismatch(MINE, accepted)[0] == "metadata of learner and actor differ in n_action_steps:"
    accepted, _ = accept_changes(MINE, THEIRS, [*OPTIONS, "n_action_steps"])
    validate_metadata(MINE, accepted, "actor", "learner")


def test_a_hash_that_differs_by_itself_is_accepted_by_no_name():
    """Equal options with another hash are not what they say they are."""
    forged = MINE | {"config_hash": "forged", "n_action_steps": 9}
    accepted, changes = accept_changes(MINE, forged, ["n_action_steps"])
    assert (accepted["config_hash"], changes) == ("forged", {"n_action_steps": [9, 10]})


def test_a_field_that_one_side_lacks_can_be_accepted():
    lab = {"pi-rl.lab.gravity": 9.81}
    for mine, theirs, change in [(MINE | lab, MINE, [None, 9.81]), (MINE, MINE | lab, [9.81, None])]:
        accepted, changes = accept_changes(mine, theirs, ["pi-rl.lab.gravity"])
        assert changes == {"pi-rl.lab.gravity": change}
        validate_metadata(mine, accepted, "actor", "learner")


@pytest.mark.parametrize("name", ["seed", "variant", "algorithm.betas"])
def test_a_name_that_does_not_differ_is_refused(name):
    with pytest.raises(
        ValueError, match=f"^accept_changes='{name}' is the same on both sides .*; remove it$"
    ):
        accept_changes(MINE, THEIRS, ["n_action_steps", name])


def test_a_change_that_was_accepted_before_is_told_to_be_part_of_the_run():
    accepted, _ = accept_changes(MINE, THEIRS, ["algorithm.gamma"])
    again = accepted | {"config": THEIRS["config"] | {"algorithm": MINE["config"]["algorithm"]}}
    with pytest.raises(ValueError, match="what an earlier resume accepted is part of the run by now"):
        accept_changes(MINE, again, ["algorithm.gamma"])


def test_naming_nothing_changes_nothing_and_a_name_counts_once():
    assert accept_changes(MINE, MINE, []) == ({**MINE, "config": flat_options(MINE["config"])}, {})
    twice = accept_changes(MINE, THEIRS, ["n_action_steps", "n_action_steps"])
    assert twice == accept_changes(MINE, THEIRS, ["n_action_steps"])


def refused_name(name: str) -> str:
    """Return what is said about a name that cannot be accepted."""
    with pytest.raises(ValueError, match="^accept_changes=") as caught:
        accept_changes(MINE, THEIRS, [name])
    before, _, advice = str(caught.value).partition(" is not allowed; ")
    assert before == f"accept_changes={name!r}"
    return advice


@pytest.mark.parametrize(
    "name", [*NEVER_ACCEPTED, *SHOWN_ONLY, "additional", "algorithm", "algorithm.gamma.x", "mma", "nope", ""]
)
def test_a_name_that_no_table_shows_or_no_flag_can_change_is_refused(name):
    advice = refused_name(name)
    assert advice.startswith("it must name fields or options of the table")
    assert advice.endswith(NEVER_ACCEPTED[-1])


def test_the_hash_of_a_config_is_accepted_by_the_names_of_its_options():
    assert refused_name("config_hash") == "it follows from the options; name those that differ"


def test_the_last_part_of_one_options_name_is_completed_and_one_of_several_is_not():
    assert refused_name("gamma") == "name the option in full: algorithm.gamma"
    # of the checkpoint alone
    assert refused_name("former") == "name the option in full: algorithm.former"
    twice = MINE | {"config": MINE["config"] | {"policy": {"gamma": 1}}}
    with pytest.raises(ValueError, match="it must name fields or options of the table"):
        accept_changes(twice, THEIRS, ["gamma"])


def test_a_recipe_is_not_accepted_by_the_option_of_that_name():
    theirs = THEIRS | {"config": THEIRS["config"] | {"recipe": "other"}}
    with pytest.raises(ValueError, match="accept_changes='recipe' is not allowed"):
        accept_changes(MINE, theirs, ["recipe"])


# the hash of a config


@pytest.fixture(scope="module")
def base() -> PiRLTrainConfig:
    return PiRLTrainConfig.from_pretrained(CONFIG, cli_args=[])


def hash_with(base: PiRLTrainConfig, name: str, value: object) -> str:
    """Return the hash of the config with one field replaced."""
    cfg = copy.deepcopy(base)
    *parents, last = name.split(".")
    owner = cfg
    for parent in parents:
        owner = getattr(owner, parent)
    assert hasattr(owner, last)
    setattr(owner, last, value)
    return config_hash(cfg)


def test_an_integer_and_the_same_number_as_a_float_are_one_config(base):
    one = hash_with(base, "algorithm.gae_lambda", 1)
    assert one == hash_with(base, "algorithm.gae_lambda", 1.0)
    assert one != hash_with(base, "algorithm.gae_lambda", 0.5)
    assert hash_with(base, "algorithm.betas", [0, 0.5]) == hash_with(base, "algorithm.betas", (0.0, 0.5))


def test_a_list_in_another_order_is_another_config(base):
    assert hash_with(base, "algorithm.betas", (0.9, 0.5)) != hash_with(base, "algorithm.betas", (0.5, 0.9))


def test_fields_in_another_order_and_spelled_out_defaults_are_the_same_config(base, tmp_path):
    config = json.loads(CONFIG.read_text())
    default = PiRLConfig()
    for name in ("dual_clip", "huber_delta"):
        assert name not in config["algorithm"]
        config["algorithm"][name] = getattr(default, name)
    for name, value in reversed(list(config.items())):
        del config[name]
        config[name] = dict(reversed(value.items())) if isinstance(value, dict) else value
    path = tmp_path / "run.json"
    path.write_text(json.dumps(config))
    assert config_hash(PiRLTrainConfig.from_pretrained(path, cli_args=[])) == config_hash(base)


PER_PROCESS = {
    "algorithm.wire": WireConfig(host="localhost", port=1234),
    "algorithm.n_envs": 3,
    "algorithm.async_envs": True,
    "algorithm.env_timeout_s": 60.0,
    "policy.device": "cuda",
    "policy.pretrained_path": "elsewhere",
    "policy.repo_id": "me/policy",
    "policy.tokenizer_name": "elsewhere",
    "env.max_parallel_tasks": 3,
    "env.disable_env_checker": False,
    "steps": 7,
    "output_dir": "outputs/elsewhere",
    "job_name": "other",
    "save_freq": 5,
    "log_freq": 5,
    "resume": True,
}
CRITICAL = {
    "seed": 1,
    "algorithm.learning_rate": 0.5,
    "algorithm.n_action_steps": 3,
    "algorithm.num_denoising_steps": 7,
    "algorithm.episodes_per_iteration": 3,
    "algorithm.bootstrap_truncation": False,
    "policy.hidden_size": 64,
    "policy.dtype": "bfloat16",
    "env.task": "pickup",
}


@pytest.mark.parametrize("name", PER_PROCESS)
def test_where_and_how_fast_a_run_goes_is_not_in_the_hash(name, base):
    assert hash_with(base, name, PER_PROCESS[name]) == config_hash(base)


@pytest.mark.parametrize("name", CRITICAL)
def test_what_is_learned_is_in_the_hash(name, base):
    assert hash_with(base, name, CRITICAL[name]) != config_hash(base)


@pytest.mark.parametrize("name", ["policy.num_denoising_steps", "policy.n_action_steps"])
def test_what_the_recipe_overrules_in_the_policys_config_is_not_in_the_hash(name, base):
    assert hash_with(base, name, 2) == config_hash(base)


def other(value: Any) -> Any:
    """Return another value of a kind."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case NormalizationMode():
            return next(mode for mode in NormalizationMode if mode != value)
        case PolicyFeature():
            return PolicyFeature(FeatureType.STATE, (*value.shape, 1))
        case dict() if value:
            return value | {next(iter(value)): other(next(iter(value.values())))}
        case dict():
            return {"added": "added"}
        case list() | tuple():
            return type(value)([*value, *value[-1:]])
        case None:
            return 3
        case _:
            return f"{value}-other"


def fields_of(cfg: PiRLTrainConfig, group: str) -> set[str]:
    return {each.name for each in fields(getattr(cfg, group))}


def test_every_option_of_policy_and_environment_counts_but_for_those_of_a_process(base):
    """What draccus encodes as a string or leaves out must not hide a change of it."""
    reference = config_hash(base)
    for group in ("policy", "env"):
        counted = set(critical_config(base)[group])
        for name in fields_of(base, group):
            hashed = hash_with(base, f"{group}.{name}", other(getattr(getattr(base, group), name)))
            assert (hashed != reference) == (name in counted), f"{group}.{name}"


def test_the_options_of_policy_and_environment_that_do_not_count(base):
    left_out = fields_of(base, "policy") - set(critical_config(base)["policy"])
    supervised = {name for name in left_out if name.startswith(("optimizer_", "scheduler_"))}
    assert supervised
    assert left_out - supervised == {
        *("device", "push_to_hub", "repo_id", "private", "tags", "license", "use_peft"),
        *("pretrained_path", "pretrained_revision", "tokenizer_name"),
        *("num_denoising_steps", "n_action_steps", "freeze_vision_encoder", "freeze_language_encoder"),
    }
    left_out = fields_of(base, "env") - set(critical_config(base)["env"])
    assert left_out == {"max_parallel_tasks", "disable_env_checker"}


def test_every_option_of_a_schedule_counts_and_so_does_its_kind(base):
    schedule = CosineDecayWithWarmupSchedulerConfig(
        num_warmup_steps=1, num_decay_steps=10, peak_lr=1e-5, decay_lr=1e-6
    )
    # two with the same options
    kinds = (ConstantWithWarmupSchedulerConfig, CosineAnnealingWithWarmupSchedulerConfig)
    schedules = [None, schedule, *(kind(num_warmup_steps=1) for kind in kinds)]
    schedules += [
        replace(schedule, **{each.name: other(getattr(schedule, each.name))}) for each in fields(schedule)
    ]
    hashes = {hash_with(base, "scheduler", each) for each in schedules}
    assert len(hashes) == len(schedules) == 8


def spellings(number: float) -> list[str]:
    """Return ways to write a number; PyYAML takes those without a point for a text."""
    texts = {repr(number), f"{number:.12f}", f"{number:.1e}", f"{number:.1E}", f"{number:.0e}"}
    return sorted(text for text in texts if float(text) == number)


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_json_and_yaml_in_any_spelling_are_one_config(data, base, tmp_path):
    raw = json.loads(CONFIG.read_text())
    raw["algorithm"] |= {"learning_rate": 1e-4, "gamma": 0.5, "gae_lambda": 1.0, "betas": [0.5, 0.9]}
    expected = config_hash(draccus.decode(PiRLTrainConfig, copy.deepcopy(raw)))
    assert expected != config_hash(base)

    def write(value: Any) -> str:
        if isinstance(value, list):
            return f"[{', '.join(map(write, value))}]"
        return data.draw(st.sampled_from(spellings(value))) if isinstance(value, float) else json.dumps(value)

    suffix = data.draw(st.sampled_from(["json", "yaml", "yml"]))
    keys = data.draw(st.permutations(list(raw["algorithm"])))
    algorithm = {key: write(raw["algorithm"].pop(key)) for key in keys}
    path = tmp_path / f"run.{suffix}"
    if suffix == "json":
        options = ", ".join(f'"{key}": {text}' for key, text in algorithm.items())
        path.write_text(json.dumps(raw).replace('"algorithm": {}', f'"algorithm": {{{options}}}'))
    else:
        options = "".join(f"  {key}: {text}\n" for key, text in algorithm.items())
        del raw["algorithm"]
        path.write_text(f"algorithm:\n{options}{yaml.safe_dump(raw, sort_keys=data.draw(st.booleans()))}")
    assert config_hash(draccus.decode(PiRLTrainConfig, read_config_file(str(path)))) == expected


def test_pyyaml_takes_a_number_without_a_point_for_a_text():
    """The reason for a test of spellings."""
    assert [yaml.safe_load(text) for text in ("1e-4", "1.0e-4", "0.0001")] == ["1e-4", 1e-4, 1e-4]


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3).requires_grad_(False)


def adapter_without_steps() -> SimpleNamespace:
    pipeline = SimpleNamespace(steps=[])
    processors = SimpleNamespace(policy_pre=pipeline, policy_post=pipeline)
    return SimpleNamespace(policy=Frozen(), processors=processors)


def test_metadata_describe_the_run():
    cfg = tiny_config()
    metadata = make_metadata(cfg, adapter_without_steps(), None, "run-1")
    assert metadata.config_path == "(command line)"
    assert metadata.config_hash == config_hash(cfg)
    assert (metadata.num_denoising_steps, metadata.n_action_steps) == (4, 4)
    assert json.loads(metadata.policy_features)["action"] == ["ACTION", [7]]
    assert json.loads(json.dumps(metadata.to_dict())) == metadata.to_dict()


def described() -> Metadata:
    torch.manual_seed(0)
    return make_metadata(tiny_config(), adapter_without_steps(), None, "run-1")


def test_a_package_that_is_installed_on_one_side_only_is_a_difference(tmp_path, monkeypatch):
    without = described()
    source = "from lerobot_pirl.registry import CheckpointValidator\n"
    source += (
        "VALIDATOR = CheckpointValidator(print, lambda cfg, adapter: {'gravity': 10.0, 'seed': cfg.seed})\n"
    )
    write_files(tmp_path, {"lab_of_metadata.py": source})
    entry = {registry.CHECKPOINT_VALIDATORS: {"pi-rl.lab": "lab_of_metadata:VALIDATOR"}}
    fake_distribution(tmp_path, "lab", "1.2", entry)
    monkeypatch.syspath_prepend(tmp_path)
    with_lab = described()
    assert with_lab.additional == {"pi-rl.lab.gravity": 10, "pi-rl.lab.seed": 1000}
    assert (without.additional, replace(with_lab, additional={})) == ({}, without)
    for mine, theirs, row in [(without, with_lab, ["10", "-"]), (with_lab, without, ["-", "10"])]:
        lines = mismatch(mine.to_dict(), theirs.to_dict())
        assert lines[0] == "metadata of learner and actor differ in pi-rl.lab.gravity, pi-rl.lab.seed:"
        assert lines[2].split() == ["pi-rl.lab.gravity", *row]
        assert "validator 'pi-rl.lab'" in lines[-1]


# validators that fail


def validators(monkeypatch, **validator) -> None:
    lab = registry.CheckpointValidator(**{"validate": print} | validator)
    monkeypatch.setattr(registry, "checkpoint_validators", lambda recipe: {"pi-rl.lab": lab})


def test_a_validators_own_refusal_is_passed_on(monkeypatch):
    def refuse(mine, theirs, my_label, their_label):
        raise MetadataMismatch(f"no {their_label} for this {my_label}", ["pi-rl.lab.gravity"])

    validators(monkeypatch, validate=refuse)
    with pytest.raises(MetadataMismatch, match="^no checkpoint for this run$") as caught:
        judge(VALUES, VALUES, "run", "checkpoint")
    assert caught.value.names == ("pi-rl.lab.gravity",)


def test_a_validator_that_fails_to_judge_is_named(monkeypatch):
    def fail(mine, theirs, my_label, their_label):
        return theirs["pi-rl.lab.gravity"]

    validators(monkeypatch, validate=fail)
    with pytest.raises(registry.RegistryError) as caught:
        judge(VALUES, VALUES, "actor", "learner")
    assert str(caught.value) == (
        "validator 'pi-rl.lab' of an unknown distribution cannot judge the metadata of learner and actor "
        "(KeyError: 'pi-rl.lab.gravity'); correct or uninstall it"
    )


def test_a_field_looks_in_this_process_as_it_is_read_by_another(monkeypatch):
    values = {"sizes": (1, 2.0), "names": {1: "one"}, "none": None}
    validators(monkeypatch, fields=lambda cfg, adapter: values)
    additional = described().additional
    assert additional == {
        "pi-rl.lab.sizes": [1, 2],
        "pi-rl.lab.names": {"1": "one"},
        "pi-rl.lab.none": None,
    }
    assert json.loads(json.dumps(additional)) == additional
