"""Runs in place of ``lerobot-train`` when a recipe is selected: says which commands to use instead."""

import shlex
import sys


def main() -> None:
    """Name the two commands and leave with status 2."""
    arguments = " ".join(shlex.quote(argument) for argument in sys.argv[1:])
    sys.stderr.write(
        "lerobot-train cannot run a recipe: online RL needs a learner and an actor. Use, in two terminals:\n"
        f"  python -m lerobot.rl.learner {arguments}\n"
        f"  python -m lerobot.rl.actor {arguments}\n"
    )
    sys.exit(2)


if __name__ == "__main__":
    main()
