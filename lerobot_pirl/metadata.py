"""What says which learner, actor and checkpoint belong together."""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import draccus
import importlib_metadata

from lerobot_pirl import registry
from lerobot_pirl.digests import (
    canonical,
    frozen_digest,
    json_digest,
    processors_digest,
    tokenizer_digest,
)

FORMAT_VERSION = 2
# never judged: two machines mount a config in different places, a peer has no run id and no history, and the
# config is judged by its hash
SHOWN_ONLY = ("config_path", "run_id", "config", "history")
# no flag turns a checkpoint into one of another recipe, policy or format
NEVER_ACCEPTED = ("format_version", "recipe", "policy_type")
# per-process settings, which change where and how fast a run goes but not what it computes
_PROCESS_ALGORITHM = ("wire", "n_envs", "async_envs", "env_timeout_s")
_PROCESS_ENV = ("max_parallel_tasks", "disable_env_checker")
_PROCESS_POLICY = (
    *("device", "push_to_hub", "repo_id", "private", "tags", "license"),
    *("pretrained_path", "pretrained_revision", "tokenizer_name", "use_peft"),
)
# fields of the policy's config that the recipe overrules, and those of supervised training
_OVERRULED_POLICY = re.compile(
    "num_denoising_steps|n_action_steps|freeze_(vision|language)_encoder|(optimizer|scheduler)_.*"
)
_SAME_CONFIG = "give both sides the same config file and overrides"
_SAME_PACKAGE = "install the same lerobot-pirl on both sides"
_REMEDIES = {
    "format_version": _SAME_PACKAGE,
    "package_version": _SAME_PACKAGE,
    "lerobot_version": "install the same lerobot on both sides",
    "tokenizer_digest": (
        "give both sides the same tokenizer in policy.tokenizer_name or policy.path, and the same tokenizers package"
    ),
    "processors_digest": (
        "give both sides the same policy_preprocessor.json and policy_postprocessor.json, with their "
        ".safetensors, beside the weights in policy.path"
    ),
    "encoder_digest": (
        "load the same pretrained weights on both sides (without any: the same seed, policy.device and torch)"
    ),
}


class MetadataMismatch(RuntimeError):
    """Two processes, or a run and its checkpoint, do not belong together.

    Attributes:
        names: fields and options that differ, by full name.
    """

    def __init__(self, message: str, names: Iterable[str] = ()) -> None:
        """Keep the message for the user and what it is about."""
        super().__init__(message)
        self.names = tuple(names)


@dataclass(frozen=True)
class Metadata:
    """What has to agree between learner, actor and checkpoint.

    Attributes:
        config: what ``config_hash`` is made of.
        history: changes that the user accepted when resuming, each with the ``version`` it was resumed at and
            ``changes``, ``{name: [before, after]}``.
        additional: what other packages' validators add, by full name.
    """

    format_version: int
    recipe: str
    variant: str
    config_path: str
    config_hash: str
    policy_type: str
    policy_features: str
    action_mode: str
    num_denoising_steps: int
    n_action_steps: int
    encoder_digest: str
    tokenizer_digest: str
    processors_digest: str
    package_version: str
    lerobot_version: str
    run_id: str
    config: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    additional: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object, as it is saved, sent and compared; additional fields stand beside the others."""
        return {name: value for name, value in asdict(self).items() if name != "additional"} | self.additional


def one_line(metadata: dict[str, Any]) -> str:
    """Return metadata but for the config as JSON, for a log."""
    return json.dumps({name: value for name, value in metadata.items() if name != "config"})


def critical_config(cfg: Any) -> dict[str, Any]:
    """Return the part of a run config that decides what is learned."""
    algorithm = draccus.encode(cfg.algorithm)
    policy = draccus.encode(cfg.policy)
    env = draccus.encode(cfg.env)
    for options, names in ((algorithm, _PROCESS_ALGORITHM), (env, _PROCESS_ENV)):
        for name in names:
            options.pop(name, None)
    policy = {
        name: value
        for name, value in policy.items()
        if name not in _PROCESS_POLICY and not _OVERRULED_POLICY.fullmatch(name)
    }
    # LeRobot fits a schedule into the number of updates, which is what `steps` counts
    schedule = cfg.scheduler and {"type": cfg.scheduler.type, "steps": cfg.steps} | draccus.encode(
        cfg.scheduler
    )
    return {
        "recipe": cfg.recipe,
        "seed": cfg.seed,
        "scheduler": schedule,
        "algorithm": algorithm,
        "policy": {"type": cfg.policy.type} | policy,
        "env": {"type": cfg.env.type} | env,
    }


def config_hash(cfg: Any) -> str:
    """Return a SHA-256 over the canonical JSON of :func:`critical_config`."""
    return json_digest(critical_config(cfg))


def make_metadata(cfg: Any, adapter: Any, config_path: str | None, run_id: str) -> Metadata:
    """Describe this process's run; call it once the adapter has set up the policy."""
    features = {
        name: [feature.type.value, list(feature.shape)]
        for name, feature in sorted({**cfg.policy.input_features, **cfg.policy.output_features}.items())
    }
    processors = adapter.processors
    return Metadata(
        format_version=FORMAT_VERSION,
        recipe=cfg.recipe,
        variant=cfg.algorithm.variant,
        config_path=str(config_path or "(command line)"),
        config_hash=config_hash(cfg),
        policy_type=cfg.policy.type,
        policy_features=json.dumps(features),
        action_mode=getattr(cfg.policy, "action_mode", ""),
        num_denoising_steps=cfg.algorithm.num_denoising_steps,
        n_action_steps=cfg.algorithm.n_action_steps,
        encoder_digest=frozen_digest(adapter.policy),
        tokenizer_digest=tokenizer_digest(processors.policy_pre.steps),
        processors_digest=processors_digest(processors.policy_pre, processors.policy_post),
        package_version=importlib_metadata.version("lerobot-pirl"),
        lerobot_version=importlib_metadata.version("lerobot"),
        run_id=run_id,
        config=canonical(critical_config(cfg)),
        additional=canonical(registry.validator_fields(cfg.recipe, cfg, adapter)),
    )


def flat_options(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return a nested config as options by their full names."""
    if not isinstance(config, dict) or not config:
        return {prefix: config}
    return {
        name: value
        for key, item in config.items()
        for name, value in flat_options(item, f"{prefix}.{key}" if prefix else key).items()
    }


def _differing(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Return the keys under which two dictionaries differ; a key that one lacks is a difference."""
    absent = object()
    return [name for name in mine | theirs if mine.get(name, absent) != theirs.get(name, absent)]


def _judged(metadata: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if name not in SHOWN_ONLY}


def validate_metadata(mine: dict[str, Any], theirs: dict[str, Any], my_label: str, their_label: str) -> None:
    """Compare two metadata dictionaries strictly, field by field.

    Raises:
        MetadataMismatch: with a table of the fields that differ and what to do.
    """
    differing = _differing(_judged(mine), _judged(theirs))
    if not differing:
        return
    rows = [("field", their_label, my_label)]
    rows += [
        (name, str(theirs.get(name, "-")), str(mine.get(name, "-"))) for name in (*differing, "config_path")
    ]
    options: list[str] = []
    if mine.get("config") and theirs.get("config"):
        ours, others = flat_options(mine["config"]), flat_options(theirs["config"])
        options = _differing(ours, others)
        rows += [
            (name, *(json.dumps(side[name]) if name in side else "-" for side in (others, ours)))
            for name in options
        ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    remedies = [_remedy(name, name in mine and name in theirs) for name in differing]
    raise MetadataMismatch(
        f"metadata of {their_label} and {my_label} differ in {', '.join(differing)}:\n"
        + "\n".join(line.rstrip() for line in lines)
        + f"\nWhat to do: {'; '.join(dict.fromkeys(remedies))}.",
        [name for name in differing if name != "config_hash"] + options,
    )


def _remedy(name: str, known_to_both: bool) -> str:
    if "." in name:
        validator = f"validator {name.rpartition('.')[0]!r}"
        if known_to_both:
            return f"make {validator} find the same on both sides"
        return f"install the same package with {validator} on both sides"
    # a field that one side does not know was written by another version of this package
    return _REMEDIES.get(name, _SAME_CONFIG) if known_to_both else _SAME_PACKAGE


def accept_changes(
    mine: dict[str, Any], theirs: dict[str, Any], accepted: Iterable[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take over the fields and options that the user names from my metadata into theirs.

    The config's hash follows when no option is left that differs.

    Returns:
        their metadata after that, and ``{name: [theirs, mine]}`` of what was different.

    Raises:
        ValueError: for a name that there is not, that no flag can change or that does not differ.
    """
    fields, options = dict(theirs), flat_options(theirs.get("config") or {})
    my_options = flat_options(mine["config"])
    other_options = options != my_options
    changes: dict[str, Any] = {}
    for name in dict.fromkeys(accepted):
        sides = (options, my_options) if name in options | my_options else (fields, mine)
        if name not in _judged(sides[0] | sides[1]) or name in ("config_hash", *NEVER_ACCEPTED):
            raise ValueError(f"accept_changes={name!r} is not allowed; {_advice(name, options | my_options)}")
        if name not in _differing(*sides):
            raise ValueError(
                f"accept_changes={name!r} is the same on both sides (what an earlier resume accepted is part "
                "of the run by now); remove it"
            )
        changes[name] = [side.get(name) for side in sides]
        sides[0].pop(name, None)
        sides[0].update({name: sides[1][name]} if name in sides[1] else {})
    fields["config"] = options
    if other_options and options == my_options:
        fields["config_hash"] = mine["config_hash"]
    # null and left out differ in the hash, but not for who reads the history
    return fields, {name: [before, after] for name, (before, after) in changes.items() if before != after}


def _advice(name: str, options: Iterable[str]) -> str:
    """Return what to do about a name that cannot be accepted."""
    if name == "config_hash":
        return "it follows from the options; name those that differ"
    meant = [option for option in options if option.endswith(f".{name}")] if name else []
    if len(meant) == 1 and name not in NEVER_ACCEPTED:
        return f"name the option in full: {meant[0]}"
    return (
        "it must name fields or options of the table that a refused resume prints, but none of "
        + ", ".join(NEVER_ACCEPTED)
    )


def judge(mine: dict[str, Any], theirs: dict[str, Any], my_label: str, their_label: str) -> None:
    """Ask every validator of the recipe, this package's and others'.

    Raises:
        MetadataMismatch: from the first one that refuses.
        RegistryError: when one fails in another way.
    """
    for name, validator in registry.checkpoint_validators(mine["recipe"]).items():
        try:
            validator.validate(mine, theirs, my_label, their_label)
        except MetadataMismatch:
            raise
        except Exception as error:
            problem = f"cannot judge the metadata of {their_label} and {my_label}"
            raise registry.validator_error(name, problem, error) from error


VALIDATOR = registry.CheckpointValidator(validate=validate_metadata)
