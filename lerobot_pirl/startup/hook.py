"""Redirect LeRobot's learner, actor and trainer to this package when the run selects a recipe.

The start-up line in ``lerobot_pirl.pth`` calls :func:`install` only in an interpreter whose command line names one
of the commands below. The finder answers once, for the ``-m`` module or the console script, and only if the config
or the command line selects a recipe. Standard library only, and nothing here may stop an interpreter.
"""

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
TARGETS = {
    "lerobot.rl.learner": os.path.join(_HERE, "learner_main.py"),
    "lerobot.rl.actor": os.path.join(_HERE, "actor_main.py"),
    "lerobot.scripts.lerobot_train": os.path.join(_HERE, "train_main.py"),
}
TRAIN_SCRIPT = "lerobot-train"
DISABLE = "LEROBOT_PIRL_DISABLE"
SUPPORTED_LEROBOT = "lerobot >= 0.6.1, < 0.7"


def lerobot_supported(version: str) -> bool:
    """Return whether ``version`` is in ``>= 0.6.1, < 0.7``; candidates of 0.6.1 come before it."""
    import re

    match = re.fullmatch(r"0\.6\.(\d+)(.*)", version)
    if match is None:
        return False
    patch, early = int(match[1]), re.match(r"[._-]?(a|b|c|rc|alpha|beta|pre|dev)", match[2])
    return patch > 1 or (patch == 1 and not early)


def _argument(argv: list[str], name: str) -> str | None:
    for i, argument in enumerate(argv):
        if argument.startswith(f"--{name}="):
            return argument.partition("=")[2]
        if argument == f"--{name}" and i + 1 < len(argv) and not argv[i + 1].startswith("--"):
            return argv[i + 1]
    return None


def _read_config(path: str) -> object:
    """Return what a config file holds, None where there is no such file; raises whatever its reader does."""
    if os.path.isdir(path):
        path = os.path.join(path, "train_config.json")
    # LeRobot takes any other path for a hub id; reading a pipe would leave it nothing
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        if path.endswith((".yaml", ".yml")):
            import yaml

            return yaml.safe_load(file)
        import json

        return json.load(file)


def _recipe_of_run(path: str) -> object:
    """Return the recipe of the run a checkpoint's config belongs to, by its checkpoints' metadata.

    A damaged or missing config of a checkpoint is this package's to refuse: LeRobot would look for it on a hub.
    """
    import json

    folder = os.path.dirname(path) if path.endswith("train_config.json") else path.rstrip("/")
    if os.path.basename(folder) != "pretrained_model":
        return None
    checkpoints = os.path.dirname(os.path.dirname(folder))
    for name in sorted(os.listdir(checkpoints)):
        metadata = os.path.join(checkpoints, name, "training_state", "pirl_metadata.json")
        if os.path.isfile(metadata):
            with open(metadata, encoding="utf-8") as file:
                return json.load(file).get("recipe")
    return None


def selected_recipe(argv: list[str]) -> str | None:
    """Return the recipe that a command line or its config file selects, else None; never raises.

    A config that cannot be read here, such as one on a hub, selects nothing, unless it is a checkpoint's: ``--recipe``
    still does.
    """
    name = _argument(argv, "recipe")
    path = _argument(argv, "config_path")
    if name or not path:
        return name or None
    try:
        config = _read_config(path)
    except Exception:
        config = None
    try:
        recipe = _recipe_of_run(path) if config is None else config.get("recipe")
    except Exception:
        return None
    return recipe if isinstance(recipe, str) and recipe else None


def _is_module_option(argument: str) -> bool:
    """Whether the next argument is a module to run: ``-m``, or at the end of a cluster such as ``-um``."""
    return argument.startswith("-") and not argument.startswith("--") and argument.endswith("m")


def _command_runs(fullname: str, argv: list[str]) -> bool:
    """Return whether the command line runs this module.

    The pair is looked for anywhere: ``cProfile -m``, ``coverage run -m`` and ``torchrun -m`` have it further on.
    """
    pairs = zip(argv, argv[1:], strict=False)
    if any(following == fullname and _is_module_option(argument) for argument, following in pairs):
        return True
    if f"-m{fullname}" in argv:
        return True
    script = os.path.basename(sys.argv[0]).lower().removesuffix(".exe")
    return fullname == "lerobot.scripts.lerobot_train" and script == TRAIN_SCRIPT


def _stays_out(reason: object) -> None:
    import contextlib

    # stderr may be closed, or None under pythonw
    with contextlib.suppress(Exception):
        sys.stderr.write(f"lerobot-pirl stays out and LeRobot runs as it is: {reason}\n")


def _version_known() -> bool:
    from importlib.metadata import version

    found = version("lerobot")
    if not lerobot_supported(found):
        _stays_out(
            f"lerobot {found} is installed, but this version knows {SUPPORTED_LEROBOT}; install one of those"
        )
        return False
    return True


def _stand_in(fullname: str) -> object:
    argv = sys.orig_argv
    if not (_command_runs(fullname, argv) and selected_recipe(argv)):
        return None
    # one answer: later imports of the module get LeRobot's own
    sys.meta_path.remove(Redirect)
    if not _version_known():
        return None
    from importlib.util import spec_from_file_location

    return spec_from_file_location(fullname, TARGETS[fullname])


class Redirect:
    """The finder: a meta path entry that answers at most once."""

    @staticmethod
    def find_spec(fullname: str, path: object = None, target: object = None) -> object:
        """Return the spec of our stand-in, or None for everything that is not ours."""
        if fullname not in TARGETS:
            return None
        try:
            return _stand_in(fullname)
        except Exception as error:
            _stays_out(f"{type(error).__name__}: {error}")
            return None


def _concerned(argv: list[str]) -> bool:
    """Return whether a command line names one of the targets; ``lerobot_pirl.pth`` asks the same."""
    return any(name in argument for argument in argv for name in (*TARGETS, TRAIN_SCRIPT))


def install() -> None:
    """Put the finder first on ``sys.meta_path``, once; does nothing when switched off or not concerned."""
    if os.environ.get(DISABLE) == "1" or Redirect in sys.meta_path or not _concerned(sys.orig_argv):
        return
    sys.meta_path.insert(0, Redirect)
