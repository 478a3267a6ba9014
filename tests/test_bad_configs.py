"""Mutated configs: each is valid, or refused with one sentence that names the option, and nothing is left behind."""

import contextlib
import copy
import json
import math
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import draccus
import pytest
from lerobot.configs import parser

from lerobot_pirl import launch, registry
from lerobot_pirl.config import PiRLTrainConfig
from tests.fuzzing import mutate_config, option_names, put
from tests.toy import CONFIGS, read_json

# what `launch` turns into a line in the log
REFUSALS = (ValueError, OSError, RuntimeError)
HANGS_AFTER_S = 120


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    """Raise TimeoutError, which is no refusal here, when what is inside does not come back."""

    def give_up(number: int, frame: Any) -> None:
        raise SystemExit(f"hangs for {HANGS_AFTER_S} s")

    former = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(HANGS_AFTER_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def decode(raw: dict[str, Any]) -> PiRLTrainConfig:
    """Decode without a command line, which takes a thousand times as long."""
    return draccus.decode(PiRLTrainConfig, copy.deepcopy(raw))


def parse(raw: dict[str, Any]) -> PiRLTrainConfig:
    """Decode as the commands do: from a file that the command line names."""
    Path("bad.json").write_text(json.dumps(raw))
    sys.argv = ["learner", "--config_path=bad.json"]
    return launch.parse_config(PiRLTrainConfig)


def verdict(raw: dict[str, Any], read=decode) -> str:
    """Return the sentence with which a config is refused, "" when it is valid; anything else comes out of here."""
    try:
        with no_hang():
            cfg = read(raw)
            cfg.validate()
            registry.policy_adapter(cfg.policy.type).validate(cfg)
    except REFUSALS as refused:
        return str(refused) or repr(refused)
    return ""


def complaint(message: str, touched: list[str]) -> str:
    """Return what is wrong with a refusal, "" when nothing is."""
    if not message:
        return ""
    if "\n" in message or len(message) > 700:
        return "is no one sentence"
    # an option that lacks its group's type is told by the group
    names = {name for each in touched for name in (each, each.rpartition(".")[2], each.partition(".")[0])}
    names |= {"''"} if "" in names else set()
    # one or two letters stand in any sentence
    names = {name for name in names if len(name) > 2 or name == "''"}
    return "" if any(name in message for name in names) else "names nothing that is wrong"


BASES = [read_json(CONFIGS / name) for name in ("pirl_tabletop.json", "pirl_libero10_smoke.json")]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(parser, "_config_path_args", {})
    monkeypatch.setattr(parser, "_config_yaml_overrides", {})
    monkeypatch.setattr(sys, "argv", ["learner"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def names() -> list[str]:
    return option_names(decode(BASES[0]))


def test_three_hundred_mutated_configs_are_valid_or_refused_by_name(names, in_an_empty_folder):
    rng = random.Random(0)
    wrong, refused = [], 0
    for _ in range(300):
        raw, touched = mutate_config(rng, rng.choice(BASES), names)
        message = verdict(raw)
        refused += bool(message)
        if why := complaint(message, touched):
            wrong.append((why, touched, message))
    assert wrong == []
    # neither is the test of no use
    assert 100 < refused < 300
    assert list(in_an_empty_folder.iterdir()) == []


def test_a_command_line_says_the_same_as_the_decoder(names, in_an_empty_folder):
    rng = random.Random(1)
    for _ in range(4):
        raw, touched = mutate_config(rng, BASES[0], names)
        message = verdict(raw, parse)
        assert complaint(message, touched) == "", (touched, message)
        assert bool(message) == bool(verdict(raw))
    assert [path.name for path in in_an_empty_folder.iterdir()] == ["bad.json"]


def test_a_refusal_that_is_no_sentence_or_names_nothing_is_noticed():
    assert complaint("two\nlines about seed", ["seed"]) == "is no one sentence"
    assert complaint("x" * 701, ["x"]) == "is no one sentence"
    assert complaint("something is wrong", ["algorithm.gamma"]) == "names nothing that is wrong"
    assert complaint("gamma=3 is wrong", ["algorithm.gamma"]) == ""
    with pytest.raises(TypeError):
        verdict({}, lambda raw: math.sqrt("a traceback"))


LONG = "x" * 5000
FOUND = {
    "null for a size": ({"policy.hidden_size": None}, "policy.hidden_size=None is not allowed; it must be an integer"),
    "null for a number": ({"policy.mlp_ratio": None}, "policy.mlp_ratio=None is not allowed; it must be a number"),
    "a flag for a size": ({"policy.depth": True}, "policy.depth=True is not allowed; it must be an integer"),
    "null in the environment": ({"env.fps": None}, "env.fps=None is not allowed; it must be an integer"),
    "a type that is a list": ({"policy.type": ["xvla"]}, "policy"),
    "a long text for a size": ({"policy.num_heads": LONG}, "policy.num_heads: Couldn't parse 'xxx"),
    "a long text for a flag": ({"wandb.enable": LONG}, "wandb.enable: Couldn't parse 'xxx"),
    "a long device": ({"policy.device": LONG}, "policy: Unknown device xxx"),
    "a long recipe": ({"recipe": LONG}, "recipe='xxx"),
    "a long type": ({"algorithm.type": LONG}, "recipe='pi-rl' and algorithm.type='xxx"),
    "a long folder": ({"output_dir": LONG}, "output_dir='xxx"),
    "a folder with a NUL": ({"output_dir": "a\0b"}, "output_dir='a\\x00b' is not allowed; it must be the name of a folder"),
    "a long name": ({"job_name": LONG}, "job_name='xxx"),
    "an option without a name": ({"": 1}, "unknown option ''; "),
    "a resume of nothing": ({"resume": True}, "resume=True needs a config_path; name the train_config.json"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "expected"), FOUND.values(), ids=FOUND)
def test_what_mutations_found_is_refused_with_a_sentence_that_names_it(options, expected):
    raw = copy.deepcopy(BASES[0])
    for name, value in options.items():
        put(raw, name, value)
    message = verdict(raw)
    assert message.startswith(expected), message
    assert complaint(message, list(options)) == ""
