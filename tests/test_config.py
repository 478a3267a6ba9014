"""The configuration: what may be written, where, and what is said about everything else."""

import ast
import copy
import dataclasses
import inspect
import json
import logging
import math
import subprocess
import sys
import types
import typing
from pathlib import Path

import draccus
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lerobot.configs import PreTrainedConfig, parser
from lerobot.configs.default import EvalConfig, PeftConfig
from lerobot.optim import AdamWConfig
from lerobot.rl.train_rl import TrainRLServerPipelineConfig

from lerobot_pirl import config, launch, metadata, registry, rules
from lerobot_pirl.config import PiRLTrainConfig
from lerobot_pirl.inert import INERT
from lerobot_pirl.metadata import config_hash
from lerobot_pirl.options import PiRLConfig, WireConfig
from tests.toy import CONFIGS, read_json

TABLETOP = CONFIGS / "pirl_tabletop.json"
ALGORITHM = {each.name: each for each in dataclasses.fields(PiRLConfig)}
WIRE = {each.name: each for each in dataclasses.fields(WireConfig)}


@pytest.fixture(autouse=True)
def nothing_left_over(monkeypatch):
    """LeRobot's parser keeps what it found beside `policy.path` in its module."""
    monkeypatch.setattr(parser, "_config_path_args", {})
    monkeypatch.setattr(parser, "_config_yaml_overrides", {})
    monkeypatch.setattr(sys, "argv", ["learner"])


@pytest.fixture
def parse(monkeypatch):
    """Return a function that parses a command line as the learner does."""

    def parse_arguments(*arguments: object) -> PiRLTrainConfig:
        monkeypatch.setattr(sys, "argv", ["learner", *map(str, arguments)])
        return launch.parse_config(PiRLTrainConfig)

    return parse_arguments


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a file and returns its path."""

    def write_file(name: str, content: object) -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write_file


@pytest.fixture
def saved_policy(tmp_path) -> Path:
    """Return the folder of a tiny saved policy's config."""
    folder = tmp_path / "pretrained_model"
    cfg = decode(read_json(CONFIGS / "pirl_libero10_smoke.json"))
    cfg.policy.save_pretrained(folder)
    return folder


def base(**changes) -> dict:
    """Return the tabletop config with some of its top-level options replaced."""
    return read_json(TABLETOP) | {"output_dir": "outputs/never_written"} | changes


def with_algorithm(**options) -> dict:
    return base(algorithm={"type": "pi-rl"} | options)


def decode(raw: dict) -> PiRLTrainConfig:
    """Decode without a command line, which takes a thousand times as long."""
    return draccus.decode(PiRLTrainConfig, copy.deepcopy(raw))


def refusal(action, *arguments, error=ValueError) -> str:
    """Return the one sentence with which an action refuses."""
    with pytest.raises(error) as caught:
        action(*arguments)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def refused(raw: dict) -> str:
    """Return why a config is refused, when it is decoded or when it is validated."""
    return refusal(lambda: decode(raw).validate())


# --- where options come from ---------------------------------------------------------------------


def test_a_yaml_file_says_the_same_as_a_json_file(parse, write):
    text = yaml.safe_dump(base()).replace("5.0e-06", "5e-6")
    assert "5e-6" in text  # a float to us, a string to YAML 1.1
    from_yaml = parse(f"--config_path={write('run.yaml', text)}")
    from_json = parse(f"--config_path={TABLETOP}")
    assert from_yaml.algorithm == from_json.algorithm
    assert config_hash(from_yaml) == config_hash(from_json)


def test_the_command_line_overrules_the_file(parse):
    cfg = parse(
        f"--config_path={TABLETOP}",
        "--algorithm.num_denoising_steps=7",
        *("--algorithm.wire.port", 50052),
        "--algorithm.target_kl=null",
        "--algorithm.value_hidden_dims=[32,16]",
        "--steps=9",
        "--env.task=pickup",
        "--policy.depth=2",
    )
    assert cfg.algorithm.num_denoising_steps == 7
    assert cfg.algorithm.wire.port == 50052
    assert cfg.algorithm.target_kl is None
    assert cfg.algorithm.value_hidden_dims == (32, 16)
    assert (cfg.steps, cfg.env.task, cfg.policy.depth) == (9, "pickup", 2)
    assert cfg.algorithm.n_epochs == read_json(TABLETOP)["algorithm"]["n_epochs"]
    cfg.validate(check_output_dir=False)


def test_a_run_needs_no_file(parse):
    cfg = parse("--recipe=pi-rl", "--env.type=tabletop", "--policy.type=xvla", "--algorithm.gamma=0.5")
    assert cfg.algorithm == PiRLConfig(gamma=0.5)
    assert cfg.env.type == "tabletop"


def test_help_lists_every_option_of_the_recipe_with_its_comment(parse, capsys):
    with pytest.raises(SystemExit) as left:
        parse("--help")
    assert left.value.code == 0
    text = capsys.readouterr().out
    options = text.split()
    squeezed = "".join(options)
    for cls, prefix in (
        (PiRLConfig, "--algorithm."),
        (WireConfig, "--algorithm.wire."),
        (PiRLTrainConfig, "--"),
    ):
        for name, comment in comments(cls).items():
            assert any(word == f"{prefix}{name}" for word in options) or name == "wire", name
            assert "".join(comment.split()) in squeezed, name


def comments(cls: type) -> dict[str, str]:
    """Return the comment above every field that a class declares itself, empty where there is none."""
    lines = inspect.getsource(cls).splitlines()
    body = ast.parse(inspect.cleandoc("\n".join(lines))).body[0].body
    found = {}
    for node in body:
        if not isinstance(node, ast.AnnAssign) or "ClassVar" in ast.unparse(node.annotation):
            continue
        above = lines[node.lineno - 2].strip()
        found[node.target.id] = above.removeprefix("#").strip() if above.startswith("#") else ""
    return found


@pytest.mark.parametrize("cls", [PiRLConfig, WireConfig, PiRLTrainConfig])
def test_every_field_is_explained_where_it_is_declared(cls):
    found = comments(cls)
    upstream = {each.name for each in dataclasses.fields(TrainRLServerPipelineConfig)}
    declared = {each.name for each in dataclasses.fields(cls)} - (
        upstream - {"dataset", "env_eval_freq", "log_freq"}
    )
    assert set(found) == declared
    for name, comment in found.items():
        assert len(comment.split()) >= 3, f"{cls.__name__}.{name} has no comment above it"
        assert comment.endswith("."), f"the comment above {cls.__name__}.{name} is no sentence"


# --- the policy ----------------------------------------------------------------------------------


def test_a_policy_path_in_the_file_takes_the_options_beside_it(parse, write, saved_policy):
    policy = {
        **{"path": str(saved_policy), "dtype": "bfloat16", "push_to_hub": False, "tokenizer_max_length": 12},
        **{"resize_imgs_with_padding": [32, 32], "repo_id": None},
    }
    cfg = parse(f"--config_path={write('run.json', base(policy=policy))}", "--policy.tokenizer_max_length=13")
    cfg.validate()
    assert cfg.policy.pretrained_path == saved_policy
    assert cfg.policy.dtype == "bfloat16"
    assert cfg.policy.tokenizer_max_length == 13
    assert cfg.policy.hidden_size == 128
    # LeRobot drops lists
    assert tuple(cfg.policy.resize_imgs_with_padding) == (32, 32)


@pytest.mark.parametrize(
    ("options", "held"),
    [
        ({"input_features": {"observation.state": {"type": "STATE", "shape": [8]}}}, "'type': \"STATE\""),
        ({"florence_config": {"text_config": {"bad": [1]}}}, "'bad': [1]"),
    ],
)
def test_an_option_beside_a_policy_path_that_lerobot_would_drop_is_refused(
    parse, write, saved_policy, options, held
):
    policy = {"path": str(saved_policy), "push_to_hub": False} | options
    with pytest.raises((ValueError, SystemExit)) as caught:
        parse(f"--config_path={write('run.json', base(policy=policy))}").validate()
    assert f"policy.{next(iter(options))} of the config file holds {held}, which LeRobot drops" in str(
        caught.value
    )


def test_a_name_whose_organisation_is_a_folder_here_says_so(at_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lerobot").mkdir()
    message = refusal(lambda: at_path("lerobot/xvla").validate())
    assert message.endswith("; the folder lerobot is here, so the Hub is not asked")
    assert refusal(lambda: at_path("missing").validate()).endswith("no name of a policy on the Hub")


def test_a_policy_path_on_the_command_line_takes_the_options_beside_it(parse, saved_policy):
    cfg = parse(
        f"--config_path={TABLETOP}",
        f"--policy.path={saved_policy}",
        "--policy.resize_imgs_with_padding=[48,48]",
    )
    cfg.output_dir = None
    cfg.validate()
    assert cfg.policy.pretrained_path == saved_policy
    assert cfg.policy.chunk_size == 10
    assert tuple(cfg.policy.resize_imgs_with_padding) == (48, 48)


@pytest.fixture
def at_path(monkeypatch):
    """Return a function that validates the tabletop config with a policy at a path."""

    def validate(path: object, *arguments: str) -> PiRLTrainConfig:
        monkeypatch.setattr(sys, "argv", ["learner", f"--policy.path={path}", *arguments])
        cfg = decode(base(policy=None))
        cfg.validate()
        return cfg

    return validate


@pytest.mark.parametrize("path", ["/no/such/folder", "no/such/folder", "./none", "tests/none", "none/.."])
def test_a_policy_path_that_is_nowhere_is_refused_without_asking_the_hub(at_path, monkeypatch, path):
    monkeypatch.setattr(PreTrainedConfig, "from_pretrained", lambda *a, **k: pytest.fail("asked the Hub"))
    assert refusal(at_path, path).startswith(f"policy.path={path} is no folder here")


def test_a_policy_path_without_a_policy_is_refused(at_path, tmp_path):
    assert refusal(at_path, tmp_path).startswith(f"policy.path={tmp_path} holds no config.json")


def test_a_policy_that_the_hub_does_not_give_is_refused(at_path, monkeypatch):
    def fail(**kwargs):
        raise OSError("no\nroute to the Hub")

    monkeypatch.setattr("lerobot.configs.policies.hf_hub_download", fail)
    message = refusal(at_path, "someone/xvla")
    assert message.startswith("policy.path=someone/xvla cannot be read")
    assert "no route to the Hub" in message


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--policy.chunk_size=abc", "policy.chunk_size: Couldn't parse 'abc' into an int"),
        ("--policy.nonsense=1", "unrecognized arguments: --policy.nonsense=1"),
        ("--policy.action_mode=ee7d", "policy."),
    ],
)
def test_an_override_that_does_not_fit_the_saved_policy_is_refused(at_path, saved_policy, argument, expected):
    if "action_mode" in argument:
        cfg = at_path(saved_policy, argument)
        expected = "policy.action_mode='ee7d'"
        message = refusal(registry.policy_adapter("xvla").validate, cfg)
    else:
        message = refusal(at_path, saved_policy, argument)
    assert message.startswith(expected)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (None, "policy is missing"),
        ({"push_to_hub": True, "repo_id": "someone/xvla"}, "policy.push_to_hub=True does nothing"),
        ({"push_to_hub": True}, "policy.push_to_hub=True does nothing"),
        ({"nonsense": 1}, "unknown option policy.nonsense"),
        ({"depth": "many"}, "policy.depth: Couldn't parse 'many' into an int"),
        ({"type": "nonsense"}, "policy.type='nonsense' is unknown"),
        ("xvla", "policy='xvla' is not allowed"),
    ],
)
def test_a_policy_that_cannot_train_here_is_refused(policy, expected):
    if isinstance(policy, dict):
        policy = read_json(TABLETOP)["policy"] | policy
    assert refused(base(policy=policy)).startswith(expected)


# --- every option of the algorithm ---------------------------------------------------------------

NOT_A_NUMBER = [True, "0.5", None, [0.5], {}, math.nan, math.inf, -math.inf]
NOT_AN_INTEGER = [True, False, 2.0, 2.5, "2", None, [2], math.nan, math.inf, 10**12, 10**400, -1]
NOT_POSITIVE = [*NOT_A_NUMBER, 0, 0.0, -0.1, 10**400]
NOT_A_FRACTION = [*NOT_A_NUMBER, -0.1, 1.1, 10**400]
NOT_A_FLAG = [0, 1, "true", None, [True]]
NOT_A_COEFFICIENT = [*NOT_A_NUMBER, -0.1, 10**400]
NOT_A_STD_RANGE = [
    (),
    (0.01,),
    (0.01, 0.02, 0.03),
    (0, 0.1),
    (0.1, 11),
    (0.1, True),
    (None, 0.1),
    "ab",
    0.1,
    None,
]
NOT_WIDTHS = [
    (),
    (0,),
    (64, -1),
    (64, 1.5),
    (True,),
    (64,) * 17,
    (16385,),
    (10**12,),
    ("64",),
    "64",
    64,
    None,
]
NOT_A_FILE = ["", "a\0b", 1, True, ["x"]]
NOT_A_NAME = ["", "nonsense", None, 1, True, ["exclude"]]


def but_null(values: list) -> list:
    return [value for value in values if value is not None]


# option -> (one allowed value besides the default, the values at its limits, values that are refused)
VALUES = {
    "variant": ("flow_noise", ["flow_sde"], [*NOT_A_NAME, "flow_ode", "FLOW_SDE"]),
    "num_denoising_steps": (4, [2, 1000], [*NOT_AN_INTEGER, 0, 1, 1001]),
    "n_action_steps": (5, [1, 1000], [*NOT_AN_INTEGER, 0, 1001]),
    "noise_level": (0.5, [1e-6, 10], [*NOT_POSITIVE, 1e-7, 11]),
    "last_step_std_position": (0.01, [1e-6, 10], [*NOT_POSITIVE, 1e-7, 11]),
    "last_step_std_rotation": (0.05, [0, 1e-6, 10], [*NOT_A_COEFFICIENT, 1e-7, 11]),
    "last_step_prob": (0.7, [1e-9, 1], [*NOT_A_FRACTION, 0]),
    "noise_std_position": ((0.001, 0.01), [(1e-6, 10), (0.001, 0.0011)], NOT_A_STD_RANGE),
    "noise_std_rotation": ((0.02, 0.1), [(1e-6, 10), (0.01, 0.011)], NOT_A_STD_RANGE),
    "noise_head_hidden_dims": ((32,), [(1,), (16384,) * 16], NOT_WIDTHS),
    "entropy_coef": (0.01, [0, 1e9], NOT_A_COEFFICIENT),
    "noise_anneal_iterations": (20, [1, 10**6], NOT_AN_INTEGER),
    "noise_anneal_to": (0.7, [1e-3, 1], [*but_null(NOT_A_FRACTION), 0]),
    "gripper": ("bernoulli_last", ["exclude"], [*NOT_A_NAME, "gaussian_last"]),
    "gripper_temperature": (0.7, [0.01, 100, None], [*but_null(NOT_POSITIVE), 0.001, 101]),
    "episodes_per_iteration": (80, [1, 10**6], [*NOT_AN_INTEGER, 0]),
    "max_staleness": (1, [0, 8], [*NOT_AN_INTEGER, 9]),
    "n_envs": (8, [1, 1024], [*NOT_AN_INTEGER, 0, 1025]),
    "async_envs": (True, [False], NOT_A_FLAG),
    "env_timeout_s": (60.0, [1, 86400], [*NOT_POSITIVE, 0.5, 86401]),
    "max_episode_steps": (520, [1, 10**6, None], [*but_null(NOT_AN_INTEGER), 0]),
    "advantage": ("grpo", ["gae"], [*NOT_A_NAME, "reinforce"]),
    "group_size": (4, [2, 1024, None], [*but_null(NOT_AN_INTEGER), 0, 1, 1025]),
    "group_filter": (
        [0.1, 0.9],
        [[0, 1], [0.5, 0.5], None],
        [0.5, "0.1", [0.1], [0.1, 0.5, 0.9], [-0.1, 0.5], [0.5, 1.1], [True, 1], [None, 1]],
    ),
    "gamma": (0.9, [0, 1], NOT_A_FRACTION),
    "gae_lambda": (0.9, [0, 1], NOT_A_FRACTION),
    "bootstrap_truncation": (False, [True], NOT_A_FLAG),
    "loss_aggregation": ("episode", ["token"], NOT_A_NAME),
    "normalize_advantage": (False, [True], NOT_A_FLAG),
    "step_loss_weight": ("none", ["inv_sensitivity"], NOT_A_NAME),
    "clip_range": (0.1, [1e-9, 0.999], [*NOT_A_FRACTION, 0, 1]),
    "dual_clip": (5.0, [1.001, 1e9, None], [*but_null(NOT_POSITIVE), 1, 1.0]),
    "clip_range_vf": (0.4, [1e-9, 1e9, None], but_null(NOT_POSITIVE)),
    "huber_delta": (1.0, [1e-9, 1e9], NOT_POSITIVE),
    "n_epochs": (2, [1, 1000], [*NOT_AN_INTEGER, 0, 1001]),
    "minibatch_size": (256, [32, 10**6], [*NOT_AN_INTEGER, 0]),
    "micro_batch_size": (16, [1, 512], [*NOT_AN_INTEGER, 0]),
    "target_kl": (0.1, [1e-9, 1e9, None], but_null(NOT_POSITIVE)),
    "kl_coef": (0.01, [0, 1e9], NOT_A_COEFFICIENT),
    "critic_warmup_iterations": (1, [0, 10**6], NOT_AN_INTEGER),
    "learning_rate": (1e-5, [0, 1], NOT_A_FRACTION),
    "value_learning_rate": (1e-3, [0, 1], NOT_A_FRACTION),
    "betas": (
        (0.8, 0.9),
        [(0, 0), (0.999, 0.9999)],
        [(), (0.9,), (0.9, 0.9, 0.9), (0.9, 1), (-0.1, 0.9), (0.9, math.nan), (0.9, True), (0.9, None), "ab", 0.9, None],
    ),
    "weight_decay": (0.1, [0, 1], NOT_A_FRACTION),
    "grad_clip_norm": (2.0, [1e-9, 1e9], NOT_POSITIVE),
    "value_hidden_dims": (
        (64,),
        [(1,), (16384,) * 16],
        NOT_WIDTHS,
    ),
    "wire": (None, [], [None, 3, "127.0.0.1:50051", {}]),
}  # fmt: skip
# what an option needs beside it to do something
BESIDE = {
    "gripper_temperature": {"gripper": "bernoulli_last"},
    "noise_anneal_iterations": {"noise_anneal_to": 0.5},
    "group_size": {"advantage": "grpo", "episodes_per_iteration": 1024},
    "group_filter": {"advantage": "grpo"},
    "noise_anneal_to": {"noise_anneal_iterations": 10},
    "noise_std_position": {"variant": "flow_noise"},
    "noise_std_rotation": {"variant": "flow_noise"},
    "noise_head_hidden_dims": {"variant": "flow_noise"},
    "entropy_coef": {"variant": "flow_noise"},
    "env_timeout_s": {"async_envs": True},
    "tls_cert": {"tls_key": "a/key.pem"},
    "tls_key": {"tls_cert": "a/cert.pem"},
}
WIRE_VALUES = {
    "host": (
        "localhost",
        ["127.0.0.1", "127.0.1.1", "::1"],
        ["", ".", "no..host", "a b", "127.0.0.1:50051", "unix:/x", "h\n", "x" * 254, None, 1, True],
    ),
    "port": (50052, [0, 65535], [*NOT_AN_INTEGER, 65536]),
    "connect_timeout_s": (1.0, [0.001, 10**6], NOT_POSITIVE),
    "rollout_timeout_s": (1.0, [0.001, 10**6], NOT_POSITIVE),
    "share_timeout_s": (1.0, [0.001, 10**6], NOT_POSITIVE),
    "peer_timeout_s": (5.0, [3, 3600], [*NOT_POSITIVE, 2.9, 3601]),
    "token_file": ("a/token", ["x", None], NOT_A_FILE),
    "tls_cert": ("a/cert.pem", ["x"], NOT_A_FILE),
    "tls_key": ("a/key.pem", ["x"], NOT_A_FILE),
}


# options that may be any text, or nearly; a command line gives 5 for what a file would write as "5"
FREE_TEXTS = ("host", "token_file", "tls_cert", "tls_key")


def test_the_tables_name_every_option():
    assert set(VALUES) == set(ALGORITHM)
    assert set(WIRE_VALUES) == set(WIRE)
    assert set(config.ALGORITHM_RULES) == set(ALGORITHM) - {"wire"}
    assert set(config.WIRE_RULES) == set(WIRE)


def built(name: str, value: object) -> PiRLConfig:
    """Return options with one replaced, and whatever that one needs beside it."""
    if name in WIRE_VALUES:
        return PiRLConfig(wire=WireConfig(**BESIDE.get(name, {}), **{name: value}))
    return PiRLConfig(**BESIDE.get(name, {}), **{name: value})


ALL_VALUES = VALUES | WIRE_VALUES


ALLOWED = {
    name: ([] if other is None else [other]) + limits for name, (other, limits, _) in ALL_VALUES.items()
}


@pytest.mark.parametrize("name", [name for name, values in ALLOWED.items() if values])
def test_allowed_values_of_an_option_pass(name):
    for value in ALLOWED[name]:
        options = built(name, value)
        options.validate()


@pytest.mark.parametrize("name", ALL_VALUES)
def test_other_values_of_an_option_are_refused_with_its_full_name_and_what_is_allowed(name):
    rule = (config.ALGORITHM_RULES | config.WIRE_RULES).get(name)
    full_name = f"algorithm.{'wire.' if name in WIRE else ''}{name}"
    for value in ALL_VALUES[name][2]:
        message = refusal(built(name, value).validate)
        shown = repr(value) if len(repr(value)) <= 100 else f"{repr(value)[:100]}..."
        assert message.startswith(f"{full_name}={shown} is not allowed; it must be "), message
        assert message.endswith(rule.allowed if rule else "options by name")


# what JSON and YAML can hold instead of a value of a type
RAW_INSTEAD_OF = {
    int: [True, False, 1.5, "many", None, [], [2], {}, {"a": 1}, "1e3"],
    float: [True, "much", "", None, [], [0.5], {}, "nan", "inf", "-inf", "1e999"],
    bool: [0, 1, "yes", "True", None, [], {}],
    str: [0, True, None, [], {}, "nonsense"],
    tuple: ["12", "", 12, None, {}, {"0": 1}, [True, 0.9], [[1], [2]], [None, 0.9], ["a", "b"]],
    dict: [None, 3, "text", [], [{}], True],
}


@pytest.mark.parametrize("name", ALL_VALUES)
def test_what_a_file_holds_instead_of_a_value_is_refused_before_it_is_converted(name):
    cls, prefix = (WireConfig, "wire.") if name in WIRE else (PiRLConfig, "")
    hint = typing.get_type_hints(cls)[name]
    optional = isinstance(hint, types.UnionType)
    kind = typing.get_args(hint)[0] if optional else hint
    kind = typing.get_origin(kind) or kind
    for value in RAW_INSTEAD_OF[dict if dataclasses.is_dataclass(kind) else kind]:
        if value is None and optional or name in FREE_TEXTS and value in ("nonsense", 0, True):
            continue
        options = {"wire": {name: value}} if prefix else {name: value}
        message = refused(with_algorithm(**options))
        assert message.startswith(f"algorithm.{prefix}{name}="), message
        assert " is not allowed; it must be " in message


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(name=st.sampled_from(sorted(VALUES)), value=JSON_VALUES)
@settings(max_examples=200, deadline=None)
def test_whatever_a_file_holds_either_passes_or_is_refused_by_name(name, value):
    raw = with_algorithm(gripper="bernoulli_last") if name == "gripper_temperature" else with_algorithm()
    raw["algorithm"][name] = value
    try:
        decode(raw).validate()
    except ValueError as error:
        assert f"algorithm.{name}" in str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"gripper": "exclude", "gripper_temperature": 0.5},
            "algorithm.gripper_temperature=0.5 does nothing with algorithm.gripper='exclude'",
        ),
        (
            {"group_size": 4},
            "algorithm.group_size=4 does nothing with algorithm.advantage='gae'",
        ),
        (
            {"advantage": "grpo", "gae_lambda": 0.9},
            "algorithm.gae_lambda=0.9 does nothing with algorithm.advantage='grpo'",
        ),
        (
            {"entropy_coef": 0.01},
            "algorithm.entropy_coef=0.01 does nothing with algorithm.variant='flow_sde'; remove it or change",
        ),
        (
            {"env_timeout_s": 60.0},
            "algorithm.env_timeout_s=60.0 does nothing with algorithm.async_envs=False; remove it or change",
        ),
        (
            {"noise_std_position": [0.001, 0.01]},
            "algorithm.noise_std_position=(0.001, 0.01) does nothing with algorithm.variant='flow_sde'",
        ),
        (
            {"variant": "flow_noise", "last_step_std_position": 0.08},
            "algorithm.last_step_std_position=0.08 does nothing with algorithm.variant='flow_noise'",
        ),
        (
            {"variant": "flow_noise", "step_loss_weight": "none"},
            "algorithm.step_loss_weight='none' does nothing with algorithm.variant='flow_noise'",
        ),
        (
            {"variant": "flow_noise", "noise_std_rotation": [0.05, 0.05]},
            "algorithm.noise_std_rotation=[0.05, 0.05] leaves the noise nothing to learn",
        ),
        (
            {"advantage": "grpo", "group_size": 5, "episodes_per_iteration": 64},
            "algorithm.episodes_per_iteration=64 is no multiple of the group size 5",
        ),
        (
            {"advantage": "grpo", "group_filter": [0.9, 0.1]},
            "algorithm.group_filter=[0.9, 0.1] is empty",
        ),
        (
            {"noise_anneal_to": 0.5},
            "algorithm.noise_anneal_iterations=0 and algorithm.noise_anneal_to=0.5 do nothing without each other",
        ),
        (
            {"noise_anneal_iterations": 4, "noise_anneal_to": 1e-4},
            "algorithm.noise_anneal_to=0.0001 shrinks algorithm.last_step_std_position=0.005 below 1e-06",
        ),
        (
            {"variant": "flow_noise", "noise_anneal_iterations": 4, "noise_anneal_to": 1e-4},
            "algorithm.noise_anneal_to=0.0001 shrinks algorithm.noise_std_position=(0.002, 0.008) below 1e-06",
        ),
        (
            {"micro_batch_size": 64, "minibatch_size": 32},
            "algorithm.micro_batch_size=64 exceeds algorithm.minibatch_size=32",
        ),
        ({"nonsense": 1, "more": 2}, "unknown option algorithm.nonsense, algorithm.more"),
        ({"wire": {"hots": "localhost"}}, "unknown option algorithm.wire.hots"),
        ({"wire": {"host": "0.0.0.0"}}, "algorithm.wire.host='0.0.0.0' is no loopback address"),
        ({"wire": {"host": "::"}}, "algorithm.wire.host='::' is no loopback address"),
        (
            {"wire": {"host": "localhost.example"}},
            "algorithm.wire.host='localhost.example' is no loopback address",
        ),
        (
            {"wire": {"tls_cert": "c.pem"}},
            "algorithm.wire.tls_cert='c.pem' and algorithm.wire.tls_key=None do nothing without each other",
        ),
        (
            {"wire": {"host": "10.0.0.2", "tls_key": "k.pem"}},
            "algorithm.wire.tls_cert=None and algorithm.wire.tls_key='k.pem' do nothing without each other",
        ),
        ({"type": "sac"}, "recipe='pi-rl' and algorithm.type='sac' disagree"),
        ({"type": "nonsense"}, "recipe='pi-rl' and algorithm.type='nonsense' disagree"),
        ({"type": None}, "recipe='pi-rl' and algorithm.type=None disagree"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, expected):
    assert refused(with_algorithm(**options)).startswith(expected)


@pytest.mark.parametrize("options", [{"token_file": "t"}, {"tls_cert": "c.pem", "tls_key": "k.pem"}])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.2", "learner.example"])
def test_an_address_that_others_reach_passes_with_a_token_or_tls_and_is_left_out_of_the_hash(host, options):
    raw = with_algorithm(wire={"host": host} | options)
    assert valid_hash(raw) == valid_hash(with_algorithm())


@pytest.mark.parametrize("algorithm", [[1], "pi-rl", 3, True, []])
def test_an_algorithm_that_is_no_group_of_options_is_refused(algorithm):
    assert refused(base(algorithm=algorithm)).startswith(f"algorithm={algorithm!r} is not allowed")


def test_a_value_of_any_length_makes_a_short_sentence():
    assert len(refused(with_algorithm(value_hidden_dims=[10**9] * 10**4))) < 300


def test_the_defaults_are_those_of_a_single_gpu_run():
    """Defaults for X-VLA on one GPU; `max_episode_steps` is the environment's own."""
    values = {name: getattr(PiRLConfig(), name) for name in ALGORITHM if name != "wire"}
    assert values == {
        **{"variant": "flow_sde", "num_denoising_steps": 5, "n_action_steps": 10, "noise_level": 0.3},
        **{"last_step_std_position": 0.005, "last_step_std_rotation": 0.03, "last_step_prob": 0.5},
        **{"noise_std_position": (0.002, 0.008), "noise_std_rotation": (0.01, 0.05)},
        **{"noise_head_hidden_dims": (128, 64), "entropy_coef": 0.005, "kl_coef": 0.0},
        **{"noise_anneal_iterations": 0, "noise_anneal_to": None},
        **{"gripper": "exclude", "gripper_temperature": None, "step_loss_weight": "inv_sensitivity"},
        **{"episodes_per_iteration": 64, "n_envs": 16, "async_envs": False, "max_episode_steps": None},
        **{"env_timeout_s": 600.0, "max_staleness": 0},
        **{"advantage": "gae", "group_size": None, "group_filter": None},
        **{"gamma": 0.99, "gae_lambda": 0.95, "bootstrap_truncation": True, "normalize_advantage": True},
        **{"loss_aggregation": "token", "clip_range": 0.2, "dual_clip": 3.0, "clip_range_vf": 0.2},
        **{"huber_delta": 10.0, "n_epochs": 1, "minibatch_size": 512, "micro_batch_size": 32},
        **{"target_kl": 0.02, "critic_warmup_iterations": 3, "learning_rate": 2e-6},
        **{"value_learning_rate": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.01, "grad_clip_norm": 1.0},
        **{"value_hidden_dims": (512, 256, 128)},
    }


# --- the run config ------------------------------------------------------------------------------

# LeRobot's options that work under the recipe
USED = {
    *("env", "policy", "output_dir", "job_name", "resume", "seed", "steps", "log_freq", "save_checkpoint"),
    *("save_freq", "wandb", "checkpoint_path", "algorithm", "scheduler", "env_eval_freq"),
}
# a value of every option that would do nothing, by full name
WITHOUT_EFFECT = {
    "dataset": {"repo_id": "someone/data"},
    "reward_model": object(),
    "cudnn_deterministic": True,
    "num_workers": 8,
    "batch_size": 64,
    "prefetch_factor": 2,
    "persistent_workers": False,
    "dataloader_multiprocessing_context": None,
    "eval_steps": 5,
    "max_eval_samples": 5,
    "tolerance_s": 1e-3,
    "use_policy_training_preset": False,
    "optimizer": AdamWConfig(),
    "eval.batch_size": 7,
    "eval.use_async_envs": False,
    "eval.recording": True,
    "peft": PeftConfig(),
    "job.target": "a100-large",
    "job.detach": True,
    "save_checkpoint_to_hub": True,
    "sample_weighting": object(),
    "rename_map": {"a": "b"},
    "mixer": "other",
    "online_ratio": 0.9,
}


def test_every_option_of_lerobot_either_works_or_is_refused():
    upstream = {each.name for each in dataclasses.fields(TrainRLServerPipelineConfig)}
    assert set(INERT) | USED == upstream
    assert not set(INERT) & USED
    assert {name.partition(".")[0] for name in WITHOUT_EFFECT} == set(INERT)


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_an_option_of_lerobot_that_would_do_nothing_is_refused(name):
    cfg = decode(base())
    group, _, leaf = name.partition(".")
    setattr(getattr(cfg, group) if leaf else cfg, leaf or group, WITHOUT_EFFECT[name])
    message = refusal(cfg.validate)
    assert message.startswith(
        f"{name}={rules.shown(WITHOUT_EFFECT[name])} does nothing under recipe 'pi-rl'; "
    )
    assert message.endswith(INERT[group])


@pytest.mark.parametrize(
    "changes", [{"eval": {"n_episodes": 7}}, {"job": {"target": "local"}}, {"dataset": None}]
)
def test_options_that_say_what_happens_anyway_pass(changes):
    decode(base(**changes)).validate()


@pytest.mark.parametrize("cores", [1, 2, 64])
def test_a_number_of_evaluation_episodes_passes_on_every_machine(monkeypatch, cores):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    for episodes in (1, 7, 50, 500):
        cfg = decode(base(eval={"n_episodes": episodes}))
        cfg.validate()
        assert cfg.eval.n_episodes == episodes
    assert refused(base(eval={"batch_size": 5})).startswith("eval.batch_size=5 does nothing")


def test_a_run_config_of_a_checkpoint_passes_on_a_machine_with_another_number_of_cores(monkeypatch):
    cfg = decode(base())
    cfg.validate()
    written = json.loads(json.dumps(draccus.encode(cfg)))
    assert written["num_workers"] == 4  # the defaults are spelled out
    assert written["optimizer"] is written["scheduler"] is written["dataset"] is None
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    again = decode(written)
    assert again.eval.batch_size == EvalConfig().batch_size == 44
    again.validate()
    again.validate()
    assert config_hash(again) == config_hash(cfg)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"recipe": None}, "recipe=None does not fit this config"),
        ({"recipe": "other"}, "recipe='other' does not fit this config"),
        ({"env": None}, "env is missing"),
        ({"env": {"type": "pusht"}}, "env.type='pusht' is not allowed; it must be one of 'tabletop', 'libero'"),
        ({"env": {"type": "nonsense"}}, "env.type='nonsense' is unknown"),
        ({"env": {"type": "tabletop", "task": "fly"}}, "env.task"),
        ({"env": {"task": "reach"}}, "env: Expected a dict with a 'type' key"),
        ({"env": [1]}, "env=[1] is not allowed"),
        ({"dataset": {"repo_id": "someone/data"}}, "dataset={'repo_id': 'someone/data'} does nothing"),
        ({"dataset": "someone/data"}, "dataset"),
        ({"nonsense": 1}, "unknown option nonsense"),
        ({"eval": {"recording_repo_id": "someone/data"}}, "eval.recording_repo_id"),
        ({"eval": None}, "eval=None is not allowed"),
        ({"resume": "yes"}, "resume: Couldn't parse 'yes' into a bool"),
        ({"save_checkpoint": None}, "save_checkpoint=None is not allowed; it must be true or false"),
        ({"wandb": {"enable": 3}}, "wandb.enable: Couldn't parse '3' into a bool"),
        ({"wandb": {"nonsense": 3}}, "unknown option wandb.nonsense"),
        *(({"steps": value}, f"steps={value!r} is not allowed; it must be an integer from 1")
          for value in (0, -1, None, True, 1.5, "many", 10**10)),
        *(({"seed": value}, f"seed={value!r} is not allowed; it must be an integer from 0")
          for value in (-1, None, True, 1.5, "x", 2**32)),
        *(({"save_freq": value}, f"save_freq={value!r} is not allowed") for value in (None, True, 0.5, "x")),
        *(({"log_freq": value}, f"log_freq={value!r} is not allowed") for value in (None, True, 0.5, "x")),
    ],
)  # fmt: skip
def test_a_run_option_that_is_wrong_is_refused_by_name(changes, expected):
    assert refused(base(**changes)).startswith(expected)


@pytest.mark.parametrize("algorithm", [None, {}, {"type": "pi-rl"}])
def test_a_recipe_without_algorithm_means_its_defaults(algorithm):
    raw = base(algorithm=algorithm)
    if algorithm is None:
        raw.pop("algorithm")
    cfg = decode(raw)
    cfg.validate()
    assert cfg.algorithm == PiRLConfig()


def test_a_type_is_not_needed_beside_options_of_the_algorithm():
    assert decode(base(algorithm={"gamma": 0.5})).algorithm == PiRLConfig(gamma=0.5)


def test_an_existing_output_folder_is_refused_to_the_learner_alone(tmp_path):
    raw = base(output_dir=str(tmp_path))
    decode(raw).validate(check_output_dir=False)
    message = refusal(decode(raw).validate, error=FileExistsError)
    assert message.startswith(f"output_dir={tmp_path} exists already")
    assert "--resume=true" in message


def test_names_that_are_left_out_are_lerobots():
    cfg = decode(base(output_dir=None, job_name=None))
    cfg.validate()
    assert cfg.job_name == "tabletop_xvla"
    assert cfg.output_dir.parts[:2] == ("outputs", "train")
    assert cfg.output_dir.name.endswith("_tabletop_xvla")
    assert not cfg.output_dir.exists()


@pytest.fixture
def resume(monkeypatch):
    """Return a function that validates a run resumed from a config file."""

    def validate(path: object, *arguments: str) -> PiRLTrainConfig:
        monkeypatch.setattr(sys, "argv", ["learner", f"--config_path={path}", "--resume=true", *arguments])
        cfg = decode(base(resume=True))
        cfg.validate()
        return cfg

    return validate


@pytest.fixture
def checkpoint(tmp_path):
    """The files of a checkpoint that a config looks for; returns its pretrained_model folder."""
    folder = tmp_path / "checkpoints" / "000003" / "pretrained_model"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    (folder / "train_config.json").touch()
    (folder.parent / "training_state").mkdir()
    (folder.parent / "training_state" / "pirl_metadata.json").touch()
    return folder


def test_a_resume_takes_policy_and_output_folder_from_the_checkpoint(resume, checkpoint, tmp_path):
    for path in (checkpoint, checkpoint / "train_config.json"):
        cfg = resume(path)
        assert cfg.policy.pretrained_path == checkpoint
        assert cfg.checkpoint_path == checkpoint.parent
        assert cfg.output_dir == tmp_path


def test_a_run_goes_on_where_it_lies_whatever_the_working_folder_is(
    resume, checkpoint, tmp_path, monkeypatch
):
    checkpoints = checkpoint.parent.parent
    (checkpoints / "last").symlink_to("000003")
    for folder, path in (
        (tmp_path, "checkpoints/last/pretrained_model/train_config.json"),
        (checkpoints, "last/pretrained_model/train_config.json"),
        (checkpoint, "train_config.json"),
        (checkpoint, "."),
    ):
        monkeypatch.chdir(folder)
        cfg = resume(path)
        assert cfg.output_dir == tmp_path
        # not through the link, which may lead elsewhere a moment later
        assert cfg.checkpoint_path == checkpoint.parent
        assert cfg.policy.pretrained_path == checkpoint


def test_a_checkpoint_outside_a_run_needs_an_output_folder(resume, checkpoint, tmp_path):
    (tmp_path / "backup").mkdir()
    copied = checkpoint.parent.rename(tmp_path / "backup" / "two") / "pretrained_model"
    assert refusal(resume, copied).startswith(
        f"{copied.parent} does not lie in the folder 'checkpoints' of a run; say with --output_dir"
    )
    resume(copied, "--output_dir=elsewhere")


def test_an_output_folder_on_the_command_line_wins_over_the_checkpoints(resume, checkpoint, tmp_path):
    # the parser has set what the command line says; here it is the config's own
    cfg = resume(checkpoint, f"--output_dir={base()['output_dir']}")
    assert str(cfg.output_dir) == base()["output_dir"] != str(tmp_path)


def test_a_resume_into_the_folder_of_another_run_is_refused_to_the_learner_alone(
    resume, checkpoint, tmp_path_factory
):
    other = tmp_path_factory.mktemp("other")
    cfg = resume(checkpoint, f"--output_dir={other}")
    # the parser has set what the command line says
    cfg.output_dir = other
    cfg._name_outputs(check_output_dir=True)
    # one that was stopped before its first checkpoint is begun again
    (other / "metrics.jsonl").touch()
    cfg._name_outputs(check_output_dir=True)
    state = other / "checkpoints" / "000002" / "training_state"
    state.mkdir(parents=True)
    (state / "pirl_digests.json").write_text("{}")
    cfg._name_outputs(check_output_dir=False)
    message = refusal(cfg._name_outputs, True, error=FileExistsError)
    assert message.startswith(
        f"output_dir={other} holds another run than {checkpoint.parent.parent.parent}, with which"
    )
    assert f"--config_path={other}/checkpoints/last/pretrained_model/train_config.json" in message
    # its own folder by another name, and one whose checkpoints lie elsewhere
    (other / "link").symlink_to(checkpoint.parent.parent.parent)
    (other / "run").mkdir()
    (other / "run" / "checkpoints").symlink_to(checkpoint.parent.parent)
    for own in ("link", "run"):
        cfg.output_dir = other / own
        cfg._name_outputs(check_output_dir=True)


def test_groups_of_episodes_that_begin_anywhere_are_refused(tmp_path):
    raw = base(algorithm={"advantage": "grpo"}, output_dir=str(tmp_path / "run"))
    decode(raw).validate()
    raw["env"] = raw["env"] | {"init_states": False}
    assert refusal(decode(raw).validate).startswith(
        "env.init_states=False lets every episode of a group begin elsewhere"
    )


def test_a_checkpoint_of_stock_lerobot_is_refused_as_a_resume_with_the_way_to_use_it(resume, checkpoint):
    metadata = checkpoint.parent / "training_state" / "pirl_metadata.json"
    metadata.unlink()
    message = refusal(resume, checkpoint)
    assert f"no checkpoint to resume of recipe 'pi-rl', {metadata} is missing" in message
    assert f"--policy.path={checkpoint} instead of --resume=true" in message


def test_a_dangling_last_is_refused_with_what_there_is(parse, checkpoint):
    folder = checkpoint.parent.parent
    (checkpoint.parent / "training_state" / "pirl_digests.json").touch()
    (folder / "000001").mkdir()
    (folder / "last").symlink_to("000004")
    missing = folder / "last" / "pretrained_model" / "train_config.json"
    message = refusal(parse, f"--config_path={missing}")
    assert message == (
        f"config_path={missing} is wrong: there is no file {missing}, because the link {folder}/last leads to 000004; "
        f"complete checkpoints in {folder} are 000003"
    )
    # a link that leads to a checkpoint without its config is not what is wrong
    (folder / "last").unlink()
    (folder / "last").symlink_to("000003")
    (checkpoint / "train_config.json").unlink()
    assert refusal(parse, f"--config_path={missing}") == (
        f"config_path={missing} is wrong: there is no file {missing}"
    )
    missing = folder / "000005" / "pretrained_model" / "train_config.json"
    message = refusal(parse, f"--config_path={missing}")
    assert message.endswith(f"there is no file {missing}; complete checkpoints in {folder} are 000003")


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ({"type": "cosine_decay_with_warmup", "num_warmup_steps": 0, "num_decay_steps": 0, "peak_lr": 1.0,
          "decay_lr": 0.1}, "ZeroDivisionError"),
        ({"type": "cosine_decay_with_warmup", "num_warmup_steps": 3, "num_decay_steps": 0, "peak_lr": 1.0,
          "decay_lr": 0.1}, "ZeroDivisionError"),
        ({"type": "diffuser", "name": "cosine"}, "'diffuser' cannot be built"),
        ({"type": "nonsense"}, "scheduler.type='nonsense' is unknown"),
        ({"type": "constant_with_warmup", "num_warmup_steps": "many"}, "scheduler.num_warmup_steps"),
    ],
)  # fmt: skip
def test_a_schedule_that_cannot_be_made_is_refused(scheduler, words):
    assert words in refused(base(scheduler=scheduler))


def test_the_number_of_updates_counts_in_the_hash_of_a_scheduled_run_alone():
    schedule = {"type": "constant_with_warmup", "num_warmup_steps": 2}
    assert valid_hash(base(steps=5)) == valid_hash(base(steps=6))
    assert valid_hash(base(steps=5, scheduler=schedule)) != valid_hash(base(steps=6, scheduler=schedule))


def test_patience_needs_evaluations():
    assert refused(base(early_stop_patience=3)).startswith(
        "early_stop_patience=3 does nothing without evaluations"
    )
    decode(base(early_stop_patience=3, env_eval_freq=5)).validate()


def test_accepted_changes_belong_to_a_resume():
    message = refused(base(accept_changes="algorithm.gamma"))
    assert message.startswith("accept_changes='algorithm.gamma' does nothing without resume=true")


def test_a_resume_of_what_is_no_checkpoint_is_refused(resume, saved_policy):
    assert "is no checkpoint to resume" in refusal(resume, TABLETOP)
    assert "policy.path=" in refusal(resume, TABLETOP, f"--policy.path={saved_policy}")


def test_a_resume_without_a_config_file_is_refused():
    assert "config_path" in refused(base(resume=True))


# --- what the user sees --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("broken.json", '{"recipe": "pi-rl",', "cannot be read: Expecting property name"),
        ("empty.json", "", "cannot be read: Expecting value"),
        ("list.json", "[1]", "holds a list"),
        ("null.json", "null", "holds nothing"),
        ("broken.yaml", "a: [1\nb: 2", "cannot be read: while parsing a flow sequence"),
        ("empty.yaml", "", "holds nothing"),
        ("list.yml", "- 1", "holds a list"),
        ("binary.json", "\x00\x01", "cannot be read: "),
        ("run.toml", 'recipe = "pi-rl"', "its name must end in .json, .yaml, .yml"),
    ],
)
@pytest.mark.parametrize("arguments", [[], ["--recipe=pi-rl"]], ids=["file alone", "recipe given"])
def test_a_file_that_holds_no_config_is_named_and_ends_the_command_with_2(
    monkeypatch, caplog, write, name, content, expected, arguments
):
    message = refused_command(monkeypatch, caplog, f"--config_path={write(name, content)}", *arguments)
    assert message.startswith("config_path=")
    assert name in message
    assert expected in message


@pytest.mark.parametrize("path", ["none.json", "no/such/none.yaml", "no/such/folder", "/none"])
def test_a_file_that_is_nowhere_is_named_and_ends_the_command_with_2(monkeypatch, caplog, path):
    assert refused_command(monkeypatch, caplog, f"--config_path={path}").startswith(f"config_path={path}")


def test_a_folder_without_a_run_config_is_refused(monkeypatch, caplog, tmp_path):
    message = refused_command(monkeypatch, caplog, f"--config_path={tmp_path}", "--recipe=pi-rl")
    assert message == f"config_path={tmp_path} is wrong: there is no file {tmp_path / 'train_config.json'}"


def test_a_file_without_a_recipe_is_told_so(monkeypatch, caplog, write):
    message = refused_command(monkeypatch, caplog, f"--config_path={write('run.json', {'steps': 3})}")
    assert message.startswith("no recipe is selected")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--algorithm.gamma=abc", "algorithm.gamma='abc' is not allowed; it must be a number in [0, 1]"),
        (
            "--algorithm.nonsense=1",
            "unrecognized arguments: --algorithm.nonsense=1; --help lists the options",
        ),
        ("--policy.type=xvla --policy.path=x", "Cannot specify both --policy.path and --policy.type"),
        ("--env.discover_packages_path=no.such.module", "Failed to load plugin 'no.such.module'"),
    ],
)
def test_a_wrong_argument_ends_the_command_with_2(monkeypatch, caplog, capsys, argument, expected):
    message = refused_command(monkeypatch, caplog, f"--config_path={TABLETOP}", *argument.split())
    assert message.startswith(expected)
    assert "usage" not in capsys.readouterr().err


def refused_command(monkeypatch, caplog, *arguments: str) -> str:
    """Return the one line that the learner's command logs before it leaves with status 2."""
    monkeypatch.setattr(sys, "argv", ["learner", *arguments])
    monkeypatch.setattr(launch, "_init_logging", lambda role: None)
    monkeypatch.setattr("signal.signal", lambda *a: None)
    with caplog.at_level(logging.INFO):
        assert launch.main("learner") == launch.EXIT_REFUSED
    assert len(caplog.records) == 1
    record = caplog.records[0]
    assert record.levelno == logging.ERROR
    assert record.exc_info is None
    assert "\n" not in record.getMessage()
    return record.getMessage()


def test_a_refused_command_leaves_one_line_and_nothing_else(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lerobot_pirl.learner", f"--config_path={TABLETOP}"),
            *("--output_dir=run", "--algorithm.num_denoising_steps=1"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if "ERROR" in line]
    assert len(errors) == 1
    assert errors[0].endswith(
        "algorithm.num_denoising_steps=1 is not allowed; it must be an integer from 2 to 1000"
    )
    assert list(tmp_path.iterdir()) == []


# --- the hash ------------------------------------------------------------------------------------

# how and where a process runs; learner and actor may differ in them
PER_PROCESS = {"n_envs", "async_envs", "env_timeout_s", "wire"}
# what is learned, and from what
CRITICAL = {
    *("variant", "num_denoising_steps", "n_action_steps", "noise_level", "last_step_std_position"),
    *("last_step_std_rotation", "last_step_prob", "gripper", "gripper_temperature", "episodes_per_iteration"),
    *(
        "max_staleness",
        "max_episode_steps",
        "gamma",
        "gae_lambda",
        "bootstrap_truncation",
        "loss_aggregation",
    ),
    *("noise_std_position", "noise_std_rotation", "noise_head_hidden_dims", "entropy_coef", "kl_coef"),
    *("noise_anneal_iterations", "noise_anneal_to", "advantage", "group_size", "group_filter"),
    *("normalize_advantage", "step_loss_weight", "clip_range", "dual_clip", "clip_range_vf", "huber_delta"),
    *("n_epochs", "minibatch_size", "micro_batch_size", "target_kl", "critic_warmup_iterations"),
    *("learning_rate", "value_learning_rate", "betas", "weight_decay", "grad_clip_norm", "value_hidden_dims"),
}


def valid_hash(raw: dict) -> str:
    cfg = decode(raw)
    cfg.validate()
    return config_hash(cfg)


def test_every_option_of_the_algorithm_either_counts_in_the_hash_or_is_per_process():
    assert set(ALGORITHM) == PER_PROCESS | CRITICAL
    assert not PER_PROCESS & CRITICAL
    cfg = decode(base())
    assert set(metadata.critical_config(cfg)["algorithm"]) == CRITICAL


@pytest.mark.parametrize("name", sorted(CRITICAL))
def test_a_change_of_what_is_learned_changes_the_hash(name):
    value, (before, *_), _ = VALUES[name]
    assert value != before
    hashes = {valid_hash(with_algorithm(**BESIDE.get(name, {}) | {name: each})) for each in (before, value)}
    assert len(hashes) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"env": {"type": "tabletop", "task": "pickup"}},
        {"policy": {"depth": 2}},
        {"policy": {"dtype": "bfloat16"}},
    ],
)
def test_a_change_of_seed_task_or_network_changes_the_hash(changes):
    changes = copy.deepcopy(changes)
    if "policy" in changes:
        changes["policy"] = read_json(TABLETOP)["policy"] | changes["policy"]
    assert valid_hash(base(**changes)) != valid_hash(base())


def test_the_gripper_temperature_counts_the_same_left_out_or_written():
    left_out = valid_hash(with_algorithm(gripper="bernoulli_last"))
    assert left_out == valid_hash(with_algorithm(gripper="bernoulli_last", gripper_temperature=0.5))
    assert left_out != valid_hash(with_algorithm())


def shuffled(draw, value):
    """Return a JSON value with the keys of its objects in another order."""
    if isinstance(value, dict):
        keys = draw(st.permutations(list(value)))
        return {key: shuffled(draw, value[key]) for key in keys}
    return value


@st.composite
def rewritten(draw) -> str:
    """Return the tabletop config's text, written differently but meaning the same."""
    raw = base(algorithm=read_json(TABLETOP)["algorithm"])
    defaults = draccus.encode(PiRLConfig())
    for name in draw(st.sets(st.sampled_from(sorted(set(ALGORITHM) - set(raw["algorithm"]))))):
        raw["algorithm"][name] = defaults[name]
    raw["algorithm"] |= draw(
        st.fixed_dictionaries(
            {},
            optional={
                "n_envs": st.integers(1, 64),
                "async_envs": st.booleans(),
                "wire": st.fixed_dictionaries(
                    {}, optional={"port": st.integers(1, 65535), "connect_timeout_s": st.integers(1, 99)}
                ),
            },
        )
    )
    raw |= draw(
        st.fixed_dictionaries(
            {},
            optional={
                "output_dir": st.sampled_from(["outputs/a", "outputs/b"]),
                "log_freq": st.integers(0, 99),
                "steps": st.integers(1, 10**6),
                "save_freq": st.integers(0, 99),
                "job_name": st.sampled_from(["a", "b"]),
                "wandb": st.just({"project": "other"}),
            },
        )
    )
    raw["policy"]["device"] = draw(st.sampled_from(["cpu", "cuda"]))
    # an option that LeRobot does not convert
    raw["policy"]["florence_config"]["vision_config"]["drop_path_rate"] = draw(st.sampled_from([0, 0.0]))
    text = json.dumps(shuffled(draw, raw))
    rate = json.dumps(raw["algorithm"]["learning_rate"])
    other = draw(st.sampled_from([rate, "0.000005", "5e-6", "5E-06", "0.5e-5", "50e-7"]))
    return text.replace(f'"learning_rate": {rate}', f'"learning_rate": {other}')


@given(text=rewritten())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_hash_does_not_depend_on_how_a_config_is_written_or_where_it_runs(text):
    assert valid_hash(json.loads(text)) == valid_hash(base())


# --- the shipped configs -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pirl_tabletop.json", "pirl_libero10_smoke.json"])
def test_a_shipped_config_is_valid(name):
    cfg = decode(read_json(CONFIGS / name))
    cfg.validate(check_output_dir=False)
    registry.policy_adapter(cfg.policy.type).validate(cfg)


def test_the_shipped_config_of_the_real_policy_has_the_defaults_of_a_single_gpu_run(parse, saved_policy):
    path = CONFIGS / "pirl_libero10_xvla.json"
    assert read_json(path)["policy"]["path"] == "lerobot/xvla-libero"
    cfg = parse(f"--config_path={path}", f"--policy.path={saved_policy}")
    cfg.validate(check_output_dir=False)
    registry.policy_adapter("xvla").validate(cfg)
    assert cfg.policy.dtype == "bfloat16"
    assert (cfg.env.task, cfg.env.control_mode, cfg.env.task_ids) == ("libero_10", "absolute", None)
    expected = PiRLConfig(max_episode_steps=520, episodes_per_iteration=80, n_envs=10, async_envs=True)
    assert cfg.algorithm == expected
    # ten tasks, alike often
    assert cfg.algorithm.episodes_per_iteration % 10 == 0


def test_all_shipped_configs_are_tested():
    names = {"pirl_tabletop.json", "pirl_libero10_smoke.json", "pirl_libero10_xvla.json"}
    assert {path.name for path in CONFIGS.iterdir()} == names
