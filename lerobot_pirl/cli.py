"""The command ``lerobot-pirl``; every subcommand imports what it needs when it runs."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from lerobot_pirl import __version__

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def _doctor(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Check this machine and, with --config_path, a run config."""
    parser.add_argument(
        "--config_path",
        metavar="FILE",
        help="also check that this run config parses, validates and finds what it names",
    )

    def run(args: argparse.Namespace) -> int:
        from lerobot_pirl import doctor

        return doctor.run(args.config_path)

    return run


def _plot(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Draw the curves of runs into their folders and warn of what looks wrong."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a run")
    parser.add_argument(
        "--together",
        metavar="FILE",
        help="also draw the mean success of all runs, with its 95 %% interval, into this PNG",
    )

    def run(args: argparse.Namespace) -> int:
        from lerobot_pirl.health import review
        from lerobot_pirl.plots import plot_run, plot_together, read_metrics, summary

        good = []
        for folder in args.runs:
            try:
                print(f"{folder}: {summary(folder)}; {plot_run(folder)}")
                for warning in review(read_metrics(folder)):
                    print(f"  {warning}")
                good.append(folder)
            except (ValueError, OSError) as error:
                print(error, file=sys.stderr)
        if args.together and good:
            try:
                print(f"{len(good)} runs together: {plot_together(good, args.together)}")
            except (ValueError, OSError) as error:
                print(f"{args.together} cannot be written: {error}", file=sys.stderr)
                return EXIT_FAILED
        return EXIT_FAILED if len(good) < len(args.runs) else 0

    return run


def _prepare(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Copy an X-VLA that lerobot-train trained on a dataset to one that acts in LeRobot's LIBERO environments."""
    parser.add_argument("source", metavar="SOURCE", type=Path, help="its pretrained_model folder")
    parser.add_argument("target", metavar="TARGET", type=Path, help="the folder to write; it must not exist")

    def run(args: argparse.Namespace) -> int:
        from lerobot_pirl.prepare import prepare

        try:
            changes = prepare(args.source, args.target)
        except (ValueError, OSError) as error:
            print(error, file=sys.stderr)
            return EXIT_FAILED
        for change in changes:
            print(change)
        print(f"{args.target} is written")
        return 0

    return run


# name -> function that adds the subcommand's arguments and returns what runs it; its docstring is the help
SUBCOMMANDS: dict[str, Callable[[argparse.ArgumentParser], Callable[[argparse.Namespace], int]]] = {
    "doctor": _doctor,
    "plot": _plot,
    "prepare": _prepare,
}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog="lerobot-pirl",
        description="Tools around piRL runs; the runs themselves are started with LeRobot's learner and actor.",
    )
    parser.add_argument("--version", action="version", version=f"lerobot-pirl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, add in SUBCOMMANDS.items():
        command = commands.add_parser(name, help=add.__doc__, description=add.__doc__)
        command.set_defaults(run=add(command))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    args = make_parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # whoever read has seen enough, as `head` does; the interpreter would complain when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
