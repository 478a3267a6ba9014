"""What a user wrote, in a config file and on a command line -> a config; a mistake becomes one sentence."""

import argparse
import contextlib
import functools
import io
import json
import operator
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from draccus import cfgparsing
from draccus.utils import DecodingError, ParsingError
from huggingface_hub.constants import CONFIG_NAME
from lerobot.configs import PreTrainedConfig, parser
from lerobot.configs.train import TRAIN_CONFIG_NAME

from lerobot_pirl import folders
from lerobot_pirl.rules import refusal

SUFFIXES = (".json", ".yaml", ".yml")
HELP = "--help lists the options"
# longer ones are what somebody wrote for a value
_LONGEST_WORD = 300
# draccus's words for what its cause tells better
_WORDY = ("Could not decode the value into any", "Failed when parsing value", "Couldn't instantiate class")


def parse_config(config_class: type) -> Any:
    """Parse ``sys.argv`` the way LeRobot does: config file, overrides, ``--help``, ``policy.path``.

    Raises:
        ValueError: one sentence on the first thing that is wrong.
    """

    def keep(cfg: Any) -> Any:
        return cfg

    keep.__annotations__ = {"cfg": config_class}
    if {"--help", "-h"} & set(sys.argv):
        # LeRobot's help shows the options of chosen types alone
        sys.argv = [*sys.argv, *getattr(config_class, "HELP_ARGUMENTS", ())]
    content = read_config_file(parser.parse_arg("config_path"))
    policy = content.get("policy")
    if isinstance(policy, dict) and parser.PATH_KEY in policy and not parser.parse_arg("policy.path"):
        # only beside a path on the command line does LeRobot take overrides from there
        sys.argv = [*sys.argv, f"--policy.path={policy[parser.PATH_KEY]}"]
    with _one_sentence():
        return parser.wrap()(keep)()


@contextlib.contextmanager
def _one_sentence(prefix: str = "") -> Iterator[None]:
    """Turn what argparse, draccus and LeRobot's parser do about a mistake into a ValueError.

    Argparse prints pages of usage before the line that matters, and leaves the interpreter.
    """
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            yield
    except SystemExit as left:
        if not left.code:
            raise
        reason = stderr.getvalue().rpartition("error: ")[2].replace(" --", f" --{prefix}")
        raise ValueError(f"{_line(reason)}; {HELP}") from left
    except ParsingError as error:
        raise ValueError(f"{prefix}{sentence(error)}") from error
    except (argparse.ArgumentError, parser.PluginLoadError) as error:
        raise ValueError(_line(error)) from error
    sys.stderr.write(stderr.getvalue())


def read_config_file(name: str | None) -> dict[str, Any]:
    """Return what a ``config_path`` holds; nothing for what may be on the Hub.

    Raises:
        ValueError: one sentence that names the file, when it cannot be read or holds no options.
    """
    path = None if name is None else _local_config(name)
    if path is None:
        return {}
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"config_path={path} is of no known type; its name must end in {', '.join(SUFFIXES)}"
        )
    try:
        with path.open(encoding="utf-8") as file:
            content = cfgparsing.load_config(file, file=path)
    except (OSError, ParsingError) as error:
        raise ValueError(f"config_path={path} cannot be read: {_line(error.__cause__ or error)}") from error
    if not isinstance(content, dict):
        what = "nothing" if content is None else f"a {type(content).__name__}"
        raise ValueError(f"config_path={path} holds {what}; it must hold options by name")
    return content


def _local_config(name: str) -> Path | None:
    path = Path(name) / TRAIN_CONFIG_NAME if Path(name).is_dir() else Path(name)
    if path.is_file():
        return path
    if path.suffix in SUFFIXES or not _may_be_on_hub(name):
        raise ValueError(f"config_path={name} is wrong: there is no file {path}{_other_checkpoints(path)}")
    return None


def _other_checkpoints(path: Path) -> str:
    """Return in words what to resume instead of a checkpoint that is not there."""
    checkpoint = path.parent.parent
    others = [
        each.name for each in folders.complete(checkpoint.parent) if each.resolve() != checkpoint.resolve()
    ]
    if not others:
        return ""
    target = folders.link_target(checkpoint.parent, checkpoint.name)
    dangling = (
        f", because the link {checkpoint} leads to {target}" if target and not checkpoint.exists() else ""
    )
    return f"{dangling}; complete checkpoints in {checkpoint.parent} are {', '.join(others)}"


_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def _may_be_on_hub(name: str) -> bool:
    # in a folder that is here, it is a folder that is missing
    return _HUB_NAME.fullmatch(name) is not None and not Path(name).parent.exists()


def read_policy_config(path: str) -> PreTrainedConfig:
    """Return the config of a saved policy with the overrides given beside ``policy.path``.

    Raises:
        ValueError: one sentence, when there is no such policy or an override does not fit it.
    """
    if not Path(path).is_dir() and not _may_be_on_hub(path):
        beside = (
            f"; the folder {Path(path).parent} is here, so the Hub is not asked"
            if _HUB_NAME.fullmatch(path)
            else ""
        )
        raise ValueError(f"policy.path={path} is no folder here and no name of a policy on the Hub{beside}")
    if Path(path).is_dir() and not (Path(path) / CONFIG_NAME).is_file():
        raise ValueError(f"policy.path={path} holds no {CONFIG_NAME}; name a pretrained_model folder")
    overrides = _file_overrides() + (parser.get_cli_overrides("policy") or [])
    with _one_sentence("policy."):
        try:
            config = PreTrainedConfig.from_pretrained(path, cli_overrides=overrides)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"policy.path={path} cannot be read; name a pretrained_model folder or a policy on the Hub "
                f"({_line(error)})"
            ) from error
    config.pretrained_path = Path(path)
    return config


def _file_overrides() -> list[str]:
    """Return the config file's options beside ``policy.path`` as arguments.

    LeRobot drops those that are lists or null; here they count.
    """
    arguments = parser.get_yaml_overrides("policy")
    options = read_config_file(parser.parse_arg("config_path")).get("policy")
    if not isinstance(options, dict) or parser.PATH_KEY not in options:
        return arguments
    dropped = {key: value for key, value in options.items() if value is None or isinstance(value, list)}
    for key, value in options.items():
        if inner := _dropped_inside(value):
            raise ValueError(
                f"policy.{key} of the config file holds {inner}, which LeRobot drops beside policy.path; change it in the "
                "policy's own config.json"
            )
    return arguments + [f"--{key}={json.dumps(value)}" for key, value in dropped.items()]


def _dropped_inside(value: Any) -> str | None:
    """Return what LeRobot leaves out of an option that is an object: some names, lists, null, what is empty."""
    if not isinstance(value, dict):
        return None
    for name, inner in value.items():
        if name in ("type", parser.PATH_KEY) or inner in (None, {}) or isinstance(inner, list):
            return f"{name!r}: {json.dumps(inner)}"
        if found := _dropped_inside(inner):
            return found
    return None


def check_types(cls: type, raw: Mapping[str, Any], allowed: Mapping[str, str], prefix: str = "") -> None:
    """Refuse what draccus would convert to something nobody meant: true to 1, "256" to (2, 5, 6).

    Args:
        cls: dataclass that ``raw`` will become.
        raw: decoded JSON or YAML.
        allowed: what an option may be, in words, by full name.
        prefix: of the full names, empty or with a dot at its end.

    Raises:
        ValueError: one sentence with the option's full name, its value and what it must be.
    """
    for name, hint in typing.get_type_hints(cls).items():
        if name not in raw:
            continue
        value, full_name = raw[name], f"{prefix}{name}"
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        kinds = typing.get_args(hint) if union else (hint,)
        if value is None and type(None) in kinds:
            continue
        wanted = _wanted(kinds, value)
        if wanted:
            raise refusal(full_name, value, allowed.get(full_name, wanted))
        if is_dataclass(hint):
            check_types(hint, value, allowed, f"{full_name}.")


def _wanted(kinds: tuple[Any, ...], value: Any) -> str | None:
    """Return in words what a value of one of ``kinds`` looks like if ``value`` cannot be one, else None."""
    if any(is_dataclass(kind) for kind in kinds):
        return None if isinstance(value, dict) else "options by name"
    if any(typing.get_origin(kind) is tuple for kind in kinds):
        is_list = isinstance(value, list | tuple)
        return None if is_list and not any(isinstance(item, bool) for item in value) else "a list of numbers"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
    wanted = " or ".join(word for kind, word in words.items() if kind in kinds)
    number_is_flag = isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds)
    # draccus makes the text '[]' of an empty list
    is_group = isinstance(value, list | dict) and all(kind in words or kind is type(None) for kind in kinds)
    return wanted if number_is_flag or is_group or (value is None and wanted) else None


def sentence(
    error: ParsingError, raw: Mapping[str, Any] | None = None, allowed: Mapping[str, str] | None = None
) -> str:
    """Return in one line, with the option's full name, what draccus spreads over a chain of exceptions.

    Args:
        error: what draccus raised.
        raw, allowed: what was to be decoded, and in words what its options may be, by full name.
    """
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    path = max((tuple(e.key_path) for e in chain if isinstance(e, DecodingError)), key=len, default=())
    # an item of a list is told by the whole list
    for parts in (path, path[:-1]):
        name = ".".join(parts)
        if allowed and name in allowed:
            return str(refusal(name, functools.reduce(operator.getitem, parts, raw), allowed[name]))
    messages = [getattr(e, "message", None) or str(e) for e in chain]
    message = _line(next((m for m in messages if not m.startswith(_WORDY)), messages[-1]))
    name = ".".join(path)
    if message.startswith("The fields `"):
        unknown = [".".join((*path, field)) or "''" for field in re.findall("`([^`]*)`", message)]
        return f"unknown option {', '.join(unknown)}; {HELP}"
    if choice := re.match("Couldn't find a choice class for ('.*?') in ", message):
        return f"{name}.type={choice[1]} is unknown; {HELP}"
    return message if not name or message.startswith(name) else f"{name}: {message}"


def _line(text: object) -> str:
    """Return a text on one line, values of any length cut short."""
    return " ".join(word if len(word) <= _LONGEST_WORD else f"{word[:100]}..." for word in str(text).split())
