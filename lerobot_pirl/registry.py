"""Entry points -> recipes, policy adapters and checkpoint validators, ours and third parties' alike."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import importlib_metadata
from importlib_metadata import EntryPoint

from lerobot_pirl.startup.hook import SUPPORTED_LEROBOT, lerobot_supported

RECIPES = "lerobot_pirl.recipes"
POLICY_ADAPTERS = "lerobot_pirl.policy_adapters"
CHECKPOINT_VALIDATORS = "lerobot_pirl.checkpoint_validators"
GROUPS = (RECIPES, POLICY_ADAPTERS, CHECKPOINT_VALIDATORS)


class RegistryError(RuntimeError):
    """An entry point is unknown, broken or declared twice, or LeRobot is a version we do not know."""


@dataclass(frozen=True)
class Recipe:
    """Who runs learner and actor for a config that says ``"recipe": name``.

    Attributes:
        name: the recipe's name.
        config_class: subclass of LeRobot's ``TrainRLServerPipelineConfig`` with a field ``recipe``.
        learner: ``module:function`` called with the parsed config; returns the exit status.
        actor: the same for the actor.
    """

    name: str
    config_class: type
    learner: str
    actor: str


def _origin(entry: EntryPoint) -> str:
    try:
        return f"{entry.dist.name} {entry.dist.version}"
    except Exception:
        return "a distribution without metadata"


def find(group: str) -> list[EntryPoint]:
    """Return a group's entry points, by name and then distribution; nothing is imported."""
    found = {
        (entry.name, _origin(entry), entry.value): entry
        for entry in importlib_metadata.entry_points(group=group)
    }
    return [found[key] for key in sorted(found)]


def _find_one(group: str, name: str) -> EntryPoint:
    entries = find(group)
    chosen = [entry for entry in entries if entry.name == name]
    if len(chosen) > 1:
        by = " and ".join(f"{_origin(entry)} ({entry.value})" for entry in chosen)
        raise RegistryError(f"'{name}' in {group} is declared by {by}; uninstall all but one of them")
    if not chosen:
        known = ", ".join(f"'{entry.name}' (from {_origin(entry)})" for entry in entries)
        what = group.rpartition(".")[2].rstrip("s").replace("_", " ")
        raise RegistryError(f"unknown {what} '{name}'; known are {known or 'none'}")
    return chosen[0]


def load(group: str, name: str) -> Any:
    """Import and return one entry point's object; the others are left alone, broken or not.

    Raises:
        RegistryError: for an unknown name, listing the known ones; for one that two distributions declare; for one
            that cannot be imported.
    """
    entry = _find_one(group, name)
    try:
        return entry.load()
    except Exception as error:
        raise RegistryError(
            f"the entry point {name} = {entry.value} of {_origin(entry)} in {group} cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error


def recipe(name: str) -> Recipe:
    """Return a recipe; raises RegistryError also when the entry point is no :class:`Recipe`."""
    loaded = load(RECIPES, name)
    if not isinstance(loaded, Recipe):
        entry = _find_one(RECIPES, name)
        raise RegistryError(
            f"the entry point {name} = {entry.value} of {_origin(entry)} is a {type(loaded).__name__} instead of "
            "a lerobot_pirl.registry.Recipe"
        )
    return loaded


def policy_adapter(policy_type: str) -> type:
    """Return the adapter class of a LeRobot policy type."""
    return load(POLICY_ADAPTERS, policy_type)


def checkpoint_validator(name: str) -> Callable[[dict, dict, str, str], None]:
    """Return a recipe's validator of checkpoint and peer metadata."""
    return load(CHECKPOINT_VALIDATORS, name)


def describe() -> list[tuple[str, str, str, str]]:
    """Return (group, name, value, distribution) of every entry point in our groups."""
    return [(group, entry.name, entry.value, _origin(entry)) for group in GROUPS for entry in find(group)]


def check_lerobot_version() -> None:
    """Raise RegistryError when LeRobot is not a version this package knows."""
    try:
        version = importlib_metadata.version("lerobot")
    except importlib_metadata.PackageNotFoundError:
        version = "of an unknown version"
    if not lerobot_supported(version):
        raise RegistryError(
            f"lerobot {version} is installed, but this lerobot-pirl knows {SUPPORTED_LEROBOT}; "
            "install a version in that range"
        )
