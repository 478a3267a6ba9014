"""From a command line to a running recipe: what the learner's and the actor's ``main`` share."""

import contextlib
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from lerobot.configs import parser

from lerobot_pirl import parallel, registry
from lerobot_pirl.parsing import parse_config, read_config_file
from lerobot_pirl.startup.hook import selected_recipe

logger = logging.getLogger("lerobot_pirl")

EXIT_REFUSED = 2
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


class RunError(RuntimeError):
    """A run cannot start or go on; the message tells the user why and what to do."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn what is wrong with config, environment or machine into a RunError; for what precedes the loop.

    Inside the loop the same exceptions are defects, and keep their tracebacks.
    """
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        raise RunError(str(error)) from error


def _init_logging(role: str, level: int = logging.INFO) -> None:
    logging.basicConfig(
        level=level,
        format=f"%(asctime)s [{role.upper()}] %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    for noisy in ("httpx", "httpcore", "transformers", "urllib3", "OpenGL", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # nothing here decodes video; without FFmpeg LeRobot prints 200 lines about it
    logging.getLogger("lerobot.utils.import_utils").addFilter(lambda record: "torchcodec" not in record.msg)


def _load_run(recipe: registry.Recipe, role: str) -> Callable[[Any], int | None]:
    """Return the function that a recipe names for a role.

    Raises:
        RunError: when there is none; the package that brought the recipe is to blame.
    """
    reference = getattr(recipe, role)
    module, _, function = reference.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise RunError(
            f"the {role} of recipe '{recipe.name}', {reference!r}, cannot be loaded: "
            f"{type(error).__name__}: {error}; update the package that brings the recipe"
        ) from error


def main(role: str) -> int:
    """Run the recipe that the command line selects; return the exit status.

    Args:
        role: ``learner`` or ``actor``.
    """
    _init_logging(role)
    # Ctrl-C and a service manager's SIGTERM end a run in the same orderly way, also where a script's `&` ignores the former
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        rank, _ = parallel.launched() if role == "learner" else (0, 1)
        if rank:
            _init_logging(f"{role} {rank}", logging.WARNING)
        registry.check_lerobot_version()
        name = selected_recipe(sys.argv)
        if name is None:
            if not {"--help", "-h"} & set(sys.argv):
                # a file that cannot be read selects nothing
                read_config_file(parser.parse_arg("config_path"))
                raise RunError(
                    'no recipe is selected; add "recipe": "pi-rl" to the config file or --recipe=pi-rl to the command'
                )
            name = "pi-rl"
        recipe = registry.recipe(name)
        cfg = parse_config(recipe.config_class)
        run = _load_run(recipe, role)
    except (ValueError, OSError, RuntimeError) as error:
        logger.error("%s", error)
        return EXIT_REFUSED
    logger.info(
        "lerobot-pirl: running recipe %s in place of lerobot.rl.%s (LEROBOT_PIRL_DISABLE=1 to stop)",
        name,
        role,
    )
    try:
        return run(cfg) or 0
    except KeyboardInterrupt:
        logger.warning("interrupted")
        return EXIT_INTERRUPTED
    except (RunError, ConnectionError) as error:
        logger.error("%s", error)
        logger.debug("where it happened", exc_info=True)
        return EXIT_FAILED
    except Exception:
        logger.exception("the %s failed", role)
        return EXIT_FAILED


class Interrupts:
    """Turns Ctrl-C into a flag, so that an update is finished and a checkpoint holds a whole iteration."""

    def __init__(self) -> None:
        """Take over SIGINT and SIGTERM."""
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        logger.warning("stopping after the running update; interrupt again to leave it unfinished")

    def check(self) -> None:
        """Raise KeyboardInterrupt when an interrupt has come in."""
        if self.requested:
            raise KeyboardInterrupt


def exit_process(status: int) -> None:
    """Leave at once with ``status``; interpreter teardown may wait for foreign threads or GL contexts."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        # whoever read it may be gone
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)
