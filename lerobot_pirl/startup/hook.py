"""Redirect LeRobot's learner, actor and trainer to this package when the run selects a recipe.

The start-up line in ``lerobot_pirl.pth`` calls :func:`install` only in an interpreter whose command line names one
of the commands below. The finder answers once, for the ``-m`` module or the console script, and only if the config
or the command line selects a recipe. Standard library only, and nothing here may stop an interpreter.
"""

import os
import sys
from importlib.util import spec_from_file_location

_HERE = os.path.dirname(os.path.abspath(__file__))
TARGETS = {
    "lerobot.rl.learner": os.path.join(_HERE, "learner_main.py"),
    "lerobot.rl.actor": os.path.join(_HERE, "actor_main.py"),
    "lerobot.scripts.lerobot_train": os.path.join(_HERE, "train_main.py"),
}
DISABLE = "LEROBOT_PIRL_DISABLE"


def lerobot_supported(version: str) -> bool:
    """Return whether ``version`` is in ``>= 0.6.1, < 0.7``."""
    parts = version.split(".")
    try:
        return parts[:2] == ["0", "6"] and int("".join(filter(str.isdigit, parts[2]))) >= 1
    except (IndexError, ValueError):
        return False


def _argument(argv: list[str], name: str) -> str | None:
    for i, argument in enumerate(argv):
        if argument.startswith(f"--{name}="):
            return argument.partition("=")[2]
        if argument == f"--{name}" and i + 1 < len(argv) and not argv[i + 1].startswith("--"):
            return argv[i + 1]
    return None


def _read_config(path: str) -> dict:
    if os.path.isdir(path):
        path = os.path.join(path, "train_config.json")
    with open(path, encoding="utf-8") as file:
        if path.endswith((".yaml", ".yml")):
            import yaml

            config = yaml.safe_load(file)
        else:
            import json

            config = json.load(file)
    return config if isinstance(config, dict) else {}


def selected_recipe(argv: list[str]) -> str | None:
    """Return the recipe that a command line or its config file selects, else None; never raises.

    A config that cannot be read here, such as one on a hub, selects nothing: ``--recipe`` still does.
    """
    name = _argument(argv, "recipe")
    if name:
        return name
    path = _argument(argv, "config_path")
    try:
        recipe = _read_config(path).get("recipe") if path else None
    except Exception:
        return None
    return recipe if isinstance(recipe, str) and recipe else None


def _command_runs(fullname: str, argv: list[str]) -> bool:
    if ("-m", fullname) in zip(argv, argv[1:], strict=False):
        return True
    script = os.path.basename(argv[1]) if len(argv) > 1 else ""
    return fullname == "lerobot.scripts.lerobot_train" and script in ("lerobot-train", "lerobot-train.exe")


def _version_known() -> bool:
    from importlib.metadata import version

    found = version("lerobot")
    if not lerobot_supported(found):
        sys.stderr.write(
            f"lerobot-pirl: lerobot {found} is not a version it knows (>= 0.6.1, < 0.7); LeRobot runs without it\n"
        )
        return False
    return True


class Redirect:
    """The finder: a meta path entry that answers at most once."""

    @staticmethod
    def find_spec(fullname: str, path: object = None, target: object = None) -> object:
        """Return the spec of our stand-in, or None for everything that is not ours."""
        if fullname not in TARGETS:
            return None
        try:
            argv = sys.orig_argv
            if not (_command_runs(fullname, argv) and selected_recipe(argv) and _version_known()):
                return None
            # later imports of the module get upstream's
            sys.meta_path.remove(Redirect)
            return spec_from_file_location(fullname, TARGETS[fullname])
        except Exception:
            return None


def install() -> None:
    """Put the finder first on ``sys.meta_path``, once; does nothing when switched off."""
    if os.environ.get(DISABLE) == "1" or Redirect in sys.meta_path:
        return
    sys.meta_path.insert(0, Redirect)
