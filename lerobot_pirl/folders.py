"""Folders that are complete or not there: atomic writes, links, digests of files, pruning; standard library only."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:
    # Windows: there is no lock
    fcntl = None

LAST, BEST = "last", "best"
# what has digests is complete: they are written last, into a folder that is renamed when it is complete
DIGESTS_FILE = Path("training_state/pirl_digests.json")
METADATA_FILE = Path("training_state/pirl_metadata.json")
LOCK_FILE = ".learner.lock"
# what is gone was replaced and comes back if nothing has its name; what is removed never does
_PARTIAL, _FORMER, _GONE, _REMOVED = "partial", "former", "gone", "removed"


def lock(folder: Path) -> BinaryIO:
    """Make an output folder the one of this process for as long as it keeps what is returned; make it if need be.

    The system frees the folder of a process that ended, however it ended. A file system without locks has none.

    Raises:
        OSError: one sentence, when another process has the folder or it cannot be made or written.
    """
    try:
        _make(folder)
        # unbuffered: the number of this process is a courtesy, not to be written later
        file = (folder / LOCK_FILE).open("ab+", buffering=0)
    except OSError as error:
        reason = f"{type(error).__name__}: {error}"
        raise OSError(f"output_dir={folder} cannot be created ({reason}); choose another one") from error
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        pid = file.read().decode(errors="replace").strip() or "unknown"
        file.close()
        raise OSError(
            f"another learner (pid {pid}) trains in {folder}; stop it or choose another output_dir"
        ) from error
    except OSError:
        # a file system without locks
        pass
    with contextlib.suppress(OSError):
        file.truncate(0)
        file.write(str(os.getpid()).encode())
    return file


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Give an empty hidden folder; when the block ends, it appears under its final name, whole.

    A failure removes it. A folder of the same name is replaced; ``last`` and ``best`` lead to a whole folder at
    every instant.
    """
    parent = final.parent
    partial = _hidden(final, _PARTIAL)
    _clean_up(parent)
    try:
        _make(parent)
        partial.mkdir()
        yield partial
        write_digests(partial)
        _sync_tree(partial)
        _put(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        # what cannot be put back now is put back by the next call
        with contextlib.suppress(OSError):
            _clean_up(parent)
        raise


def _hidden(folder: Path, role: str) -> Path:
    return folder.with_name(f".{folder.name}.{role}")


def _make(folder: Path) -> None:
    """Make a folder and those that it lies in, for good."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        # who may write into a folder may not always read it
        with contextlib.suppress(PermissionError):
            _sync(each.parent)


def _sync(*paths: Path) -> None:
    """Flush files and folders to the disk, so that a rename cannot outrun the data."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # some network file systems cannot flush a folder
            if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
                raise
        finally:
            os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    _sync(*folder.rglob("*"), folder)


def _put(partial: Path, final: Path) -> None:
    parent = final.parent
    if final.exists():
        # for the instant in which nobody has the name, links lead to a copy
        linked = [name for name in (LAST, BEST) if link_target(parent, name) == final.name]
        if linked:
            _copy(final, _hidden(final, _FORMER))
        for name in linked:
            point(name, _hidden(final, _FORMER))
        final.rename(_hidden(final, _GONE))
    partial.rename(final)
    _sync(parent)
    _clean_up(parent)


def _copy(folder: Path, target: Path) -> None:
    shutil.copytree(folder, target, copy_function=_hard_link)
    _sync_tree(target)


def _hard_link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        # a file system without hard links
        shutil.copy2(source, target)


def _clean_up(parent: Path) -> None:
    """Give folders and links what a killed process took from them, and remove what it left behind."""
    for gone, folder in _leftovers(parent, _GONE):
        replaced = (parent / folder).exists()
        gone.rename(_hidden(gone, _REMOVED) if replaced else parent / folder)
    for name in (LAST, BEST):
        _fresh_link(parent, name).unlink(missing_ok=True)
        for former, folder in _leftovers(parent, _FORMER):
            if link_target(parent, name) == former.name and (parent / folder).exists():
                point(name, parent / folder)
    linked = {link_target(parent, name) for name in (LAST, BEST)}
    for role in (_PARTIAL, _FORMER, _REMOVED):
        for leftover, _ in _leftovers(parent, role):
            if leftover.name not in linked:
                shutil.rmtree(leftover, ignore_errors=True)


def _leftovers(parent: Path, role: str) -> list[tuple[Path, str]]:
    """Return the hidden folders of a role, each with the name of the folder that it belongs to."""
    return [(path, path.name[1 : -len(role) - 1]) for path in parent.glob(f".*.{role}")]


def _fresh_link(parent: Path, name: str) -> Path:
    return parent / f".{name}.new"


def link_target(parent: Path, name: str) -> str | None:
    """Return the name that a link in ``parent`` holds, or None where there is no such link."""
    try:
        return os.readlink(parent / name)
    except OSError:
        return None


def point(name: str, folder: Path) -> None:
    """Let the link ``name`` beside ``folder`` lead to it, in one step; it is relative and survives a move."""
    fresh = _fresh_link(folder.parent, name)
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(folder.name)
    _put_aside(folder.with_name(name))
    fresh.replace(folder.with_name(name))
    _sync(folder.parent)


def _put_aside(link: Path) -> None:
    """Hide the folder that is in a link's place in a copy of a run that followed links; it is the user's."""
    if link.is_dir() and not link.is_symlink():
        names = (link.with_name(f".{link.name}.copied{number}") for number in itertools.count(1))
        link.rename(next(name for name in names if not name.exists()))


def complete(parent: Path) -> list[Path]:
    """Return the complete folders in ``parent`` in the order of their steps, which are their names.

    A folder of another name is somebody's copy.
    """
    found = [
        path
        for path in parent.glob("[0-9]*")
        if path.name.isdecimal() and not path.is_symlink() and (path / DIGESTS_FILE).is_file()
    ]
    return sorted(found, key=_by_step)


def _by_step(folder: Path) -> tuple[int, str]:
    return len(folder.name), folder.name


def prune(newest: Path, keep: int) -> list[Path]:
    """Remove all but the ``keep`` newest folders beside ``newest``, itself included; never what a link leads to.

    Returns:
        The folders that were removed.
    """
    parent = newest.parent
    kept = {newest.name, link_target(parent, LAST), link_target(parent, BEST)}
    # a run that went back to an earlier step has left later ones behind: these go first
    others = sorted(
        (path for path in complete(parent) if path != newest),
        key=lambda path: (_by_step(path) < _by_step(newest), _by_step(path)),
    )
    doomed = [path for path in others[: max(0, len(others) - (keep - 1))] if path.name not in kept]
    for path in doomed:
        removed = _hidden(path, _REMOVED)
        path.rename(removed)
        shutil.rmtree(removed)
    return doomed


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def write_digests(folder: Path) -> None:
    """Write the SHA-256 of every file in a folder into it."""
    digests = {path.relative_to(folder).as_posix(): _digest(path) for path in _files(folder)}
    (folder / DIGESTS_FILE).parent.mkdir(exist_ok=True)
    (folder / DIGESTS_FILE).write_text(json.dumps(digests, indent=2) + "\n")


def verify(folder: Path, part: str = "") -> None:
    """Compare the files of a folder, or of one ``part`` of it, with their digests.

    Raises:
        ValueError: one sentence that names the first file that is missing, unreadable or not as it was written.
    """
    # of one folder, also when a link to it moves on meanwhile
    folder = Path(os.path.realpath(folder))
    path = folder / DIGESTS_FILE
    try:
        digests = json.loads(path.read_text())
        chosen = {name: str(digest) for name, digest in digests.items() if name.startswith(part)}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    if not chosen:
        raise ValueError(f"{path} lists no file of {folder / part}")
    for name, expected in chosen.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        try:
            found = _digest(file)
        except OSError as error:
            raise ValueError(f"{file} cannot be read ({type(error).__name__}: {error})") from error
        if found != expected:
            raise ValueError(
                f"{file} is not as it was saved: its SHA-256 is {found[:12]}..., {path.name} says {expected[:12]}..."
            )
