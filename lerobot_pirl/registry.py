"""Entry points -> recipes, policy adapters and checkpoint validators, ours and third parties' alike."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import importlib_metadata
from importlib_metadata import EntryPoint

RECIPES = "lerobot_pirl.recipes"
POLICY_ADAPTERS = "lerobot_pirl.policy_adapters"
CHECKPOINT_VALIDATORS = "lerobot_pirl.checkpoint_validators"
GROUPS = (RECIPES, POLICY_ADAPTERS, CHECKPOINT_VALIDATORS)
SUPPORTED_LEROBOT = "lerobot >= 0.6.1, < 0.7"


class RegistryError(RuntimeError):
    """An entry point is unknown, broken or there twice."""


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
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown distribution"


def find(group: str) -> dict[str, EntryPoint]:
    """Return a group's entry points by name; nothing is imported.

    Raises:
        RegistryError: when two distributions declare one name.
    """
    found: dict[str, EntryPoint] = {}
    for entry in importlib_metadata.entry_points(group=group):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value or _origin(other) != _origin(entry):
            raise RegistryError(
                f"'{entry.name}' is declared twice in {group}: by {_origin(other)} ({other.value}) and by "
                f"{_origin(entry)} ({entry.value}); uninstall one of them"
            )
    return found


def load(group: str, name: str) -> Any:
    """Import and return one entry point's object; the others are left alone.

    Raises:
        RegistryError: for an unknown name, listing the known ones; for one that cannot be imported.
    """
    entries = find(group)
    if name not in entries:
        known = ", ".join(f"'{known}' (from {_origin(entry)})" for known, entry in sorted(entries.items()))
        what = group.rpartition(".")[2].rstrip("s").replace("_", " ")
        raise RegistryError(f"unknown {what} '{name}'; known are {known or 'none'}")
    entry = entries[name]
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
        entry = find(RECIPES)[name]
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
    return [
        (group, name, entry.value, _origin(entry)) for group in GROUPS for name, entry in find(group).items()
    ]


def check_lerobot_version() -> None:
    """Raise RegistryError when LeRobot is not a version this package knows."""
    from lerobot_pirl.startup.hook import lerobot_supported

    version = importlib_metadata.version("lerobot")
    if not lerobot_supported(version):
        raise RegistryError(
            f"lerobot {version} is installed, but this lerobot-pirl knows {SUPPORTED_LEROBOT}; "
            "install a version in that range"
        )
