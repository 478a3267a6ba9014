"""Entry points -> recipes, policy adapters and checkpoint validators, ours and third parties' alike."""

import json
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


@dataclass(frozen=True)
class CheckpointValidator:
    """Judges whether learner, actor and checkpoint belong together, by their metadata.

    Attributes:
        validate: called with (my metadata, their metadata, my label, their label), both JSON objects; raises
            :class:`lerobot_pirl.metadata.MetadataMismatch` to refuse.
        fields: called with (run config, policy adapter); returns a dictionary of JSON values, without NaN and
            infinity, that the metadata carry besides, under ``<validator's name>.<field>``.
    """

    validate: Callable[[dict[str, Any], dict[str, Any], str, str], None]
    fields: Callable[[Any, Any], dict[str, Any]] | None = None


_TYPES = {RECIPES: Recipe, CHECKPOINT_VALIDATORS: CheckpointValidator}


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
            that cannot be imported or is of another type than its group holds.
    """
    entry = _find_one(group, name)
    where = f"the entry point {name} = {entry.value} of {_origin(entry)}"
    try:
        loaded = entry.load()
    except Exception as error:
        raise RegistryError(
            f"{where} in {group} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    wanted = _TYPES.get(group)
    if wanted and not isinstance(loaded, wanted):
        raise RegistryError(
            f"{where} is a {type(loaded).__name__} instead of a {wanted.__module__}.{wanted.__qualname__}"
        )
    return loaded


def recipe(name: str) -> Recipe:
    """Return a recipe."""
    return load(RECIPES, name)


def policy_adapter(policy_type: str) -> type:
    """Return the adapter class of a LeRobot policy type."""
    return load(POLICY_ADAPTERS, policy_type)


def checkpoint_validators(recipe: str) -> dict[str, CheckpointValidator]:
    """Return a recipe's validators by name: the one of its own name, then all called ``<recipe>.<something>``.

    Raises:
        RegistryError: when the recipe has none, or one of them is broken or declared twice.
    """
    additional = {entry.name for entry in find(CHECKPOINT_VALIDATORS) if entry.name.startswith(f"{recipe}.")}
    return {name: load(CHECKPOINT_VALIDATORS, name) for name in (recipe, *sorted(additional))}


def validator_error(name: str, problem: str, error: Exception | None = None) -> RegistryError:
    """Return the error of a validator that does not do what it should, with who declares it."""
    origins = sorted({_origin(entry) for entry in find(CHECKPOINT_VALIDATORS) if entry.name == name})
    reason = f" ({type(error).__name__}: {' '.join(str(error).split())})" if error else ""
    who = f"validator {name!r} of {' and '.join(origins) or 'an unknown distribution'}"
    return RegistryError(f"{who} {problem}{reason}; correct or uninstall it")


def validator_fields(recipe: str, cfg: Any, adapter: Any) -> dict[str, Any]:
    """Return what a recipe's validators add to the metadata, by full name, as it is when read from JSON.

    Raises:
        RegistryError: when one of them fails or returns something else than JSON values by name.
    """
    found: dict[str, Any] = {}
    for name, validator in checkpoint_validators(recipe).items():
        try:
            values = validator.fields(cfg, adapter) if validator.fields else {}
        except Exception as error:
            raise validator_error(name, "cannot tell its fields", error) from error
        if not isinstance(values, dict):
            raise validator_error(name, f"returns its fields as a {type(values).__name__} instead of a dict")
        for key, value in values.items():
            try:
                found[f"{name}.{key}"] = json.loads(json.dumps(value, allow_nan=False))
            except (TypeError, ValueError, RecursionError) as error:
                raise validator_error(name, f"returns no JSON value as its field {key!r}", error) from error
    return found


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
