"""Saves that are killed at one file-system operation after the other, each in a fork of a process that built a run.

    python -m tests.kills FOLDER [--everywhere] [--report FILE]

FOLDER is an empty one. It prints what it saw as JSON, or a summary into FILE. With --everywhere a save is killed before
and after every operation, but for writes into buffers, of which there are thousands, at every hundredth. It has one
thread, or it could not fork.
"""

import argparse
import gc
import json
import os
import shutil
import signal
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMER, NEW, NEXT = 1, 2, 3
# what decides which folder a name leads to: killed before and after each of them
NAMES = {"rename", "replace", "symlink"}
# file by file in hidden folders: killed after each
TREES = {"link", "unlink", "rmdir"}
# what else changes something: killed at some of each kind
CONTENTS = {"mkdir", "open", "write", "flush", "close", "__exit__", "truncate", "fsync", "chmod", "utime"}
READS = {
    "stat",
    "lstat",
    "fstat",
    "scandir",
    "readlink",
    "fspath",
    "listxattr",
    "text_encoding",
    "readable",
} | {*("readinto", "read", "readline", "seek", "tell", "is_dir", "is_symlink", "getcwd", "getpid")}


def operation(function: Any) -> str | None:
    """Return the name of a function that has to do with files; None for any other."""
    owner = function.__module__ or type(function.__self__).__module__
    if owner in ("posix", "_io") or owner.startswith("safetensors"):
        return function.__name__
    return None


@dataclass
class Scene:
    """One kind of save.

    Attributes:
        prepare: makes the checkpoints that are there before.
        save: makes the new one.
        contents: kills at each kind of operation on contents.
        trees: every so many-th operation on trees is one to be killed at.
    """

    prepare: Callable[["Stage"], None]
    save: Callable[["Stage"], None]
    contents: int = 1
    trees: int = 1


@dataclass
class Outcome:
    """What was seen in a scene: the operations of a whole save, where it was killed and what was found then."""

    operations: list[str]
    kills: list[str] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Stage:
    """A run whose saves carry a generation, in the counters and in all trained weights."""

    def __init__(self, folder: Path) -> None:
        from tests.test_checkpoint import new_run

        self.run = new_run(folder / "run")
        self.run.update(seed=0)
        self.checkpoints = folder / "run" / "checkpoints"
        self.before = folder / "before"

    def parameters(self) -> list[Any]:
        algorithm = self.run.algorithm
        return [*algorithm.trainable_parameters().values(), *algorithm.value_head.parameters()]

    def save(self, step: int, generation: int, best: int, keep: int | None = None) -> None:
        for parameter in self.parameters():
            parameter.detach().fill_(generation)
        self.run.cfg.keep_last_n = keep
        self.run.save(step, episodes=generation, best_version=best)

    def load(self, name: str) -> tuple[int, Any]:
        """Load what a link leads to; return its generation and its counters."""
        folder = self.checkpoints / name
        progress = self.run.load(folder)
        found = {value for parameter in self.parameters() for value in parameter.detach().unique().tolist()}
        if found != {progress.episodes}:
            raise ValueError(f"{name} has counters of {progress.episodes} and weights of {sorted(found)}")
        return progress.episodes, progress

    def steps_before(self) -> list[str]:
        return [path.name for path in self.before.glob("[0-9]*")]

    def put_back(self) -> None:
        shutil.rmtree(self.checkpoints)
        shutil.copytree(self.before, self.checkpoints, symlinks=True)


def traced(save: Callable[[], None]) -> list[tuple[str, str]]:
    """Return beginning and end of every operation of a save."""
    seen = []

    def note(frame: Any, event: str, function: Any) -> None:
        if event.startswith("c_") and (name := operation(function)):
            seen.append(("before" if event == "c_call" else "after", name))

    sys.setprofile(note)
    try:
        save()
    finally:
        sys.setprofile(None)
    return seen


def killed(save: Callable[[], None], place: int) -> bool:
    """Fork, save, and kill the fork at a place of what :func:`traced` returns; return whether it was."""
    pid = os.fork()
    if pid == 0:
        left = place

        def kill(frame: Any, event: str, function: Any) -> None:
            nonlocal left
            if event.startswith("c_") and operation(function):
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        try:
            sys.setprofile(kill)
            save()
        finally:
            os._exit(70)
    return os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


def places(seen: list[tuple[str, str]], scene: Scene, everywhere: bool) -> list[int]:
    """Return where to kill."""
    if everywhere:
        writes = [place for place, (_, name) in enumerate(seen) if name == "write"]
        others = [place for place, (_, name) in enumerate(seen) if name not in READS | {"write"}]
        return sorted(others + writes[::100])
    chosen: list[int] = []
    kinds: dict[tuple[str, str], list[int]] = defaultdict(list)
    for place, (when, name) in enumerate(seen):
        if name in NAMES:
            chosen.append(place)
        elif name not in READS:
            kinds[when, name].append(place)
    for (when, name), found in kinds.items():
        if name in TREES:
            chosen += found[:: scene.trees] if when == "after" else []
        else:
            chosen += found[:: -(-len(found) // scene.contents)]
    return sorted(chosen)


def problem(stage: Stage, outcome: Outcome) -> str | None:
    """Return what is wrong with what a killed save left, or None."""
    from lerobot_pirl import folders

    try:
        folders.verify(stage.checkpoints / folders.BEST)
        generation, progress = stage.load(folders.LAST)
        outcome.generations.append(generation)
        stage.save(9, NEXT, progress.best_version, stage.run.cfg.keep_last_n)
        names = sorted(path.name for path in stage.checkpoints.iterdir())
        for name in names:
            folders.verify(stage.checkpoints / name)
        links = {name: os.readlink(stage.checkpoints / name) for name in (folders.LAST, folders.BEST)}
        expected = {folders.LAST: "000009", folders.BEST: f"{progress.best_version:06d}"}
        lost = [] if stage.run.cfg.keep_last_n else sorted(set(stage.steps_before()) - set(names))
        if links != expected or lost or any(name.startswith(".") for name in names):
            return f"after the next save there are {names} and links {links}, and {lost} are lost"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def play(stage: Stage, scene: Scene, everywhere: bool = False) -> Outcome:
    """Kill a scene's save in many places, or everywhere."""
    started = time.monotonic()
    shutil.rmtree(stage.checkpoints, ignore_errors=True)
    shutil.rmtree(stage.before, ignore_errors=True)
    scene.prepare(stage)
    shutil.copytree(stage.checkpoints, stage.before, symlinks=True)

    def save() -> None:
        scene.save(stage)

    seen = traced(save)
    outcome = Outcome(sorted({name for _, name in seen}))
    for place in places(seen, scene, everywhere):
        stage.put_back()
        when, name = seen[place]
        outcome.kills.append(name)
        wrong = problem(stage, outcome) if killed(save, place) else "was not killed"
        if wrong:
            outcome.problems.append(f"killed {when} operation {place}, {name}: {wrong}")
    outcome.seconds = round(time.monotonic() - started, 1)
    return outcome


def two_checkpoints(stage: Stage) -> None:
    """Leave two checkpoints, and links to the second alone."""
    stage.save(1, FORMER, best=1)
    stage.save(2, FORMER, best=2)


def replaced_and_killed(stage: Stage) -> None:
    """Leave what is there when the former checkpoint has lost its name and the new one has not got it."""
    stage.save(2, FORMER, best=2)
    shutil.copytree(stage.checkpoints, stage.before, symlinks=True)
    seen = traced(lambda: stage.save(2, NEW, best=2))
    stage.put_back()
    shutil.rmtree(stage.before)
    if not killed(lambda: stage.save(2, NEW, best=2), seen.index(("after", "rename"))):
        raise RuntimeError("the replacement was not killed")


SCENES = {
    "a second checkpoint": Scene(
        lambda stage: stage.save(1, FORMER, best=1), lambda stage: stage.save(2, NEW, best=1), contents=3
    ),
    "a checkpoint of the same step": Scene(
        lambda stage: stage.save(2, FORMER, best=2), lambda stage: stage.save(2, NEW, best=2)
    ),
    "an earlier step that no link leads to": Scene(
        two_checkpoints, lambda stage: stage.save(1, NEW, best=2), contents=3, trees=3
    ),
    "one that is kept alone": Scene(
        lambda stage: stage.save(2, FORMER, best=2), lambda stage: stage.save(3, NEW, best=3, keep=1)
    ),
    "the same step after a replacement that was killed": Scene(
        replaced_and_killed, lambda stage: stage.save(2, NEW, best=2), trees=5
    ),
}


def main() -> None:
    """Play all scenes and tell the outcomes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--everywhere", action="store_true")
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # a fork of a process with threads
    warnings.filterwarnings("error", category=DeprecationWarning, message=".*fork")
    stage = Stage(args.folder)
    # what is never collected is not copied into every fork
    gc.disable()
    gc.freeze()
    outcomes = {}
    for name, scene in SCENES.items():
        outcomes[name] = asdict(play(stage, scene, args.everywhere))
        sys.stderr.write(f"{name}: {len(outcomes[name]['kills'])} kills, {outcomes[name]['problems']}\n")
    if args.report is None:
        json.dump(outcomes, sys.stdout)
        return
    summary = {
        name: {
            "kills": len(outcome["kills"]),
            "kills_by_operation": dict(Counter(outcome["kills"]).most_common()),
            "problems": outcome["problems"],
            "seconds": outcome["seconds"],
        }
        for name, outcome in outcomes.items()
    }
    args.report.write_text(json.dumps(summary, indent=2) + "\n")
    sys.exit(any(outcome["problems"] for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
