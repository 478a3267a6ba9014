"""Folders that are complete or not there: atomic writes, what killed processes left, links, pruning, digests."""

import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lerobot_pirl import folders

LINKS = (folders.LAST, folders.BEST)


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def make(folder: Path, text: str = "text", links: tuple[str, ...] = ()) -> Path:
    """Make a complete folder and let links lead to it."""
    with folders.new_folder(folder) as partial:
        (partial / "inside").mkdir()
        (partial / "inside" / "file").write_text(text)
    for name in links:
        folders.point(name, folder)
    return folder


def text_of(folder: Path) -> str:
    folders.verify(folder)
    return (folder / "inside" / "file").read_text()


def names(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


def links(parent: Path) -> dict[str, str]:
    return {name: os.readlink(parent / name) for name in LINKS if (parent / name).is_symlink()}


def refuse(*args, **kwargs):
    raise OSError(28, "No space left on device")


# one learner in a folder


HOLDER = """
import sys
from pathlib import Path
from lerobot_pirl import folders
handle = folders.lock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A second process that has the folder."""
    command = [sys.executable, "-c", HOLDER, tmp_path / "run"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        yield process
        process.kill()


def test_a_folder_is_refused_while_another_process_has_it_and_free_when_that_was_killed(holder, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(OSError) as caught:
        folders.lock(folder)
    assert str(caught.value) == (
        f"another learner (pid {holder.pid}) trains in {folder}; stop it or choose another output_dir"
    )
    assert (folder / folders.LOCK_FILE).read_text() == str(holder.pid)
    holder.kill()
    holder.wait()
    with folders.lock(folder):
        assert (folder / folders.LOCK_FILE).read_text() == str(os.getpid())


def test_a_process_that_has_not_told_its_number_yet_is_unknown(holder, tmp_path):
    (tmp_path / "run" / folders.LOCK_FILE).write_text("")
    with pytest.raises(OSError, match=r"another learner \(pid unknown\) trains in"):
        folders.lock(tmp_path / "run")


def test_the_folder_is_made_with_its_parents(tmp_path):
    with folders.lock(tmp_path / "some" / "where"):
        assert (tmp_path / "some" / "where").is_dir()


def test_a_folder_that_cannot_be_made_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught:
        folders.lock(tmp_path / "file" / "run")
    text = str(caught.value)
    assert text.startswith(f"output_dir={tmp_path}/file/run cannot be created (NotADirectoryError: ")
    assert text.endswith("); choose another one")
    assert "\n" not in text


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_has_none(number, tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with folders.lock(tmp_path), folders.lock(tmp_path):
        pass


def test_a_system_without_locks_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "fcntl", None)
    with folders.lock(tmp_path), folders.lock(tmp_path):
        pass


# a new folder


def test_a_folder_is_seen_when_it_is_whole(parent):
    with folders.new_folder(parent / "000001") as partial:
        (partial / "file").touch()
        assert [path for path in parent.iterdir() if not path.name.startswith(".")] == []
        assert folders.complete(parent) == []
    assert names(parent) == ["000001"]
    assert folders.complete(parent) == [parent / "000001"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_a_block_that_fails_leaves_nothing(error, parent):
    make(parent / "000001", "former", LINKS)
    with pytest.raises(error), folders.new_folder(parent / "000001") as partial:
        (partial / "file").touch()
        raise error
    assert names(parent) == ["000001", "best", "last"]
    assert text_of(parent / "last") == text_of(parent / "best") == "former"


# every call of a replacement of a folder that is linked, and of none that is
CALLS = {
    "digest": (folders, "write_digests", (1,)),
    "flush": (os, "fsync", (1, 3, 6, 10)),
    "copy": (shutil, "copytree", (1,)),
    "symlink": (os, "symlink", (1, 2)),
    "link's rename": (os, "replace", (1, 2)),
    "rename": (os, "rename", (1, 2)),
}


@pytest.mark.parametrize(
    ("what", "nth"), [(what, nth) for what, (_, _, calls) in CALLS.items() for nth in calls]
)
def test_a_replacement_that_fails_anywhere_leaves_the_former_folder_under_its_name(
    what, nth, parent, monkeypatch
):
    make(parent / "000001", "former", LINKS)
    owner, name, _ = CALLS[what]
    function, calls = getattr(owner, name), []

    def refused_once(*args, **kwargs):
        calls.append(name)
        return refuse() if len(calls) == nth else function(*args, **kwargs)

    monkeypatch.setattr(owner, name, refused_once)
    with pytest.raises(OSError, match="No space left"):
        make(parent / "000001", "new")
    assert text_of(parent / "last") == text_of(parent / "best") == text_of(parent / "000001") == "former"
    assert names(parent) == ["000001", "best", "last"]
    assert links(parent) == {"last": "000001", "best": "000001"}


def test_a_folder_that_links_lead_to_is_replaced_and_they_with_it(parent):
    make(parent / "000001", "former", LINKS)
    inode = (parent / "000001" / "inside" / "file").stat().st_ino
    make(parent / "000001", "new")
    assert text_of(parent / "last") == text_of(parent / "best") == "new"
    assert names(parent) == ["000001", "best", "last"]
    assert (parent / "000001" / "inside" / "file").stat().st_ino != inode


@pytest.mark.parametrize("name", LINKS)
def test_links_to_a_whole_folder_at_every_step_of_a_replacement(name, parent, monkeypatch):
    make(parent / "000001", "former", (name,))
    seen = []

    def watched(function):
        def call(*args, **kwargs):
            seen.append(text_of(parent / name))
            result = function(*args, **kwargs)
            seen.append(text_of(parent / name))
            return result

        return call

    for function in ("mkdir", "rename", "replace", "symlink", "unlink", "link", "rmdir", "fsync"):
        monkeypatch.setattr(os, function, watched(getattr(os, function)))
    make(parent / "000001", "new")
    assert seen == sorted(seen)
    assert set(seen) == {"former", "new"}


def test_without_hard_links_a_folder_is_replaced_too(parent, monkeypatch):
    monkeypatch.setattr(os, "link", refuse)
    make(parent / "000001", "former", LINKS)
    make(parent / "000001", "new")
    assert text_of(parent / "last") == "new"
    assert names(parent) == ["000001", "best", "last"]


def test_a_folder_that_no_link_leads_to_is_replaced(parent):
    make(parent / "000001", "other", LINKS)
    make(parent / "000002", "former")
    make(parent / "000002", "new")
    assert text_of(parent / "000002") == "new"
    assert links(parent) == {"last": "000001", "best": "000001"}
    assert names(parent) == ["000001", "000002", "best", "last"]


@pytest.mark.parametrize("nth", [1, 2])
def test_a_failed_replacement_of_a_folder_that_no_link_leads_to_leaves_it_as_it_was(nth, parent, monkeypatch):
    make(parent / "000001", "former")
    make(parent / "000002", "other", LINKS)
    rename, calls = os.rename, []

    def refused_once(*args, **kwargs):
        calls.append(args)
        return refuse() if len(calls) == nth else rename(*args, **kwargs)

    monkeypatch.setattr(os, "rename", refused_once)
    with pytest.raises(OSError, match="No space left"):
        make(parent / "000001", "new")
    assert text_of(parent / "000001") == "former"
    assert names(parent) == ["000001", "000002", "best", "last"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_flush_folders_is_written_all_the_same(number, parent, monkeypatch):
    flush, flushed = os.fsync, []

    def files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flushed.append(flush(descriptor))

    monkeypatch.setattr(os, "fsync", files_only)
    make(parent / "000001", links=LINKS)
    assert text_of(parent / "last") == "text"
    assert len(flushed) == len([path for path in (parent / "000001").rglob("*") if path.is_file()])


@pytest.mark.parametrize(
    ("number", "is_folder"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)]
)
def test_another_failure_to_flush_fails(number, is_folder, parent, monkeypatch):
    def failing(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == is_folder:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match=os.strerror(number)):
        make(parent / "000001")
    assert folders.complete(parent) == []


@pytest.fixture
def flushed(monkeypatch) -> list[int]:
    """The inodes of what was flushed."""
    inodes, flush = [], os.fsync

    def noted(descriptor):
        inodes.append(os.fstat(descriptor).st_ino)
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    return inodes


def test_a_link_is_flushed_before_what_it_led_to_may_be_pruned(flushed, tmp_path):
    folder = make(tmp_path / "000001")
    flushed.clear()
    folders.point(folders.LAST, folder)
    assert tmp_path.stat().st_ino in flushed


def test_the_folders_around_a_first_one_are_flushed_after_they_were_made(flushed, tmp_path):
    make(tmp_path / "some" / "checkpoints" / "000001")
    around = [tmp_path, tmp_path / "some", tmp_path / "some" / "checkpoints"]
    assert {path.stat().st_ino for path in around} <= set(flushed)
    flushed.clear()
    make(tmp_path / "some" / "checkpoints" / "000002")
    assert not {path.stat().st_ino for path in around[:2]} & set(flushed)


def test_a_folder_that_may_be_written_but_not_read_takes_new_folders(tmp_path, monkeypatch):
    open_any = os.open

    def open_readable(path, *args, **kwargs):
        if path == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return open_any(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_readable)
    make(tmp_path / "checkpoints" / "000001")
    assert text_of(tmp_path / "checkpoints" / "000001") == "text"


def test_a_folder_that_is_locked_is_flushed_when_it_was_made(flushed, tmp_path):
    with folders.lock(tmp_path / "some" / "run"):
        assert {tmp_path.stat().st_ino, (tmp_path / "some").stat().st_ino} <= set(flushed)


# what a killed process left


def test_leftovers_are_removed_and_other_hidden_folders_are_not(parent):
    leftovers = (".000001.partial", ".000002.former", ".000003.removed", "..000004.gone.removed")
    for name in (*leftovers, ".mine", ".last.copied1"):
        (parent / name / "inside").mkdir(parents=True)
    for name in LINKS:
        (parent / f".{name}.new").symlink_to("nowhere")
    make(parent / "000001")
    assert names(parent) == [".last.copied1", ".mine", "000001"]


def killed_between_renames(parent: Path) -> None:
    """Leave what is there when the former folder is away and the new one does not have its name yet."""
    make(parent / "000001", "former", LINKS)
    former = parent / ".000001.former"
    shutil.copytree(parent / "000001", former)
    shutil.copytree(parent / "000001", parent / ".000001.partial")
    (parent / "000001").rename(parent / ".000001.gone")
    for name in LINKS:
        folders.point(name, former)


def killed_after_renames(parent: Path) -> None:
    """Leave what is there when the new folder has its name and the links do not know yet."""
    make(parent / "000001", "former", LINKS)
    former = parent / ".000001.former"
    shutil.copytree(parent / "000001", former)
    make(parent / "000001", "new")
    shutil.copytree(parent / "000001", former)
    for name in LINKS:
        folders.point(name, former)


@pytest.mark.parametrize(
    ("kill", "expected"), [(killed_between_renames, "former"), (killed_after_renames, "new")]
)
def test_a_killed_replacement_is_put_right_by_the_next_folder(kill, expected, parent):
    kill(parent)
    make(parent / "000002")
    assert text_of(parent / "000001") == expected
    assert links(parent) == {"last": "000001", "best": "000001"}
    assert names(parent) == ["000001", "000002", "best", "last"]


@pytest.mark.parametrize("kill", [killed_between_renames, killed_after_renames])
def test_what_a_killed_replacement_left_can_be_replaced(kill, parent):
    kill(parent)
    make(parent / "000001", "newest")
    assert text_of(parent / "last") == text_of(parent / "best") == "newest"
    assert names(parent) == ["000001", "best", "last"]


def test_a_folder_that_a_killed_replacement_took_away_comes_back(parent):
    make(parent / "000001", "former").rename(parent / ".000001.gone")
    (parent / ".000001.partial").mkdir()
    make(parent / "000002", links=LINKS)
    assert text_of(parent / "000001") == "former"
    assert names(parent) == ["000001", "000002", "best", "last"]


def test_what_was_replaced_does_not_come_back(parent):
    make(parent / "000001", "former").rename(parent / ".000001.gone")
    shutil.copytree(parent / ".000001.gone", parent / "000001")
    (parent / "000001" / "mine").touch()
    make(parent / "000002")
    assert (parent / "000001" / "mine").exists()
    assert names(parent) == ["000001", "000002"]


def test_a_hidden_folder_that_a_link_leads_to_is_kept_while_nothing_has_its_name(parent):
    make(parent / "000001", "former").rename(parent / ".000001.former")
    (parent / "last").symlink_to(".000001.former")
    make(parent / "000002")
    assert text_of(parent / "last") == "former"
    folders.point("last", parent / "000002")
    make(parent / "000003")
    assert names(parent) == ["000002", "000003", "last"]


def test_a_hidden_copy_that_is_gone_is_no_obstacle(parent):
    make(parent / "000001", links=LINKS)
    for name in LINKS:
        folders.point(name, parent / ".000001.former")
    make(parent / "000002", links=LINKS)
    assert links(parent) == {"last": "000002", "best": "000002"}


# links


def test_a_link_is_relative_and_replaced_in_one_step(parent, monkeypatch):
    make(parent / "000001", "first", ("last",))
    make(parent / "000002", "second")
    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(OSError, match="No space left"):
        folders.point("last", parent / "000002")
    monkeypatch.undo()
    assert links(parent) == {"last": "000001"}
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        folders.point("last", parent / "000002")
    monkeypatch.undo()
    assert links(parent) == {"last": "000001"}
    folders.point("last", parent / "000002")
    assert links(parent) == {"last": "000002"}
    assert names(parent) == ["000001", "000002", "last"]


def test_folders_in_the_links_places_of_a_copied_run_are_put_aside(parent, tmp_path):
    make(parent / "000001", "first", LINKS)
    copy = tmp_path / "copy"
    for name in ("again", "and again"):
        if copy.exists():
            (copy / "last").unlink()
            shutil.copytree(copy / "000001", copy / "last")
        else:
            shutil.copytree(parent, copy, symlinks=False)
        make(copy / "000002", name, LINKS)
        assert text_of(copy / "last") == text_of(copy / "best") == name
    assert links(copy) == {"last": "000002", "best": "000002"}
    hidden = [".best.copied1", ".last.copied1", ".last.copied2"]
    assert names(copy) == [*hidden, "000001", "000002", "best", "last"]
    assert {text_of(copy / name) for name in hidden} == {"first"}


def test_the_target_of_what_is_no_link_is_none(parent):
    make(parent / "000001")
    assert folders.link_target(parent, "000001") is None
    assert folders.link_target(parent, "last") is None


# what is complete


def test_complete_folders_come_in_the_order_of_their_steps(parent):
    for name in ("1000000", "000010", "000009", "999999"):
        make(parent / name)
    assert [path.name for path in folders.complete(parent)] == ["000009", "000010", "999999", "1000000"]


def test_hidden_linked_unfinished_and_foreign_folders_are_not_complete_steps(parent):
    make(parent / "000002", links=LINKS)
    for name in (".000003.partial", "000002.mine", "00002-copy", "mine"):
        shutil.copytree(parent / "000002", parent / name)
    (parent / "000004").mkdir()
    (parent / "000005").touch()
    (parent / "000006").symlink_to("000002")
    assert folders.complete(parent) == [parent / "000002"]
    assert folders.complete(parent / "nowhere") == []


# pruning


@pytest.mark.parametrize(
    ("keep", "expected"),
    [(1, [5]), (2, [4, 5]), (4, [2, 3, 4, 5]), (5, [1, 2, 3, 4, 5]), (9, [1, 2, 3, 4, 5])],
)
def test_the_newest_are_kept(keep, expected, parent):
    made = [make(parent / f"{step:06d}") for step in (1, 2, 3, 4, 5)]
    removed = folders.prune(made[-1], keep)
    kept = [parent / f"{step:06d}" for step in expected]
    assert folders.complete(parent) == kept
    assert removed == [path for path in made if path not in kept]
    assert names(parent) == [path.name for path in kept]


@pytest.mark.parametrize("name", LINKS)
def test_what_a_link_leads_to_is_kept_besides(name, parent):
    made = [make(parent / f"{step:06d}") for step in (1, 2, 3, 4)]
    folders.point(name, made[0])
    folders.prune(made[-1], 1)
    assert folders.complete(parent) == [made[0], made[3]]
    assert text_of(parent / name) == "text"


def test_later_steps_of_a_branch_that_was_left_go_first(parent):
    made = [make(parent / f"{step:06d}") for step in (1, 2, 5, 6)]
    newest = make(parent / "000003", links=("last",))
    assert folders.prune(newest, 4) == [made[2]]
    assert folders.prune(newest, 3) == [made[3]]
    assert folders.prune(newest, 2) == [made[0]]
    assert folders.complete(parent) == [made[1], newest]


def test_steps_with_more_digits_are_later(parent):
    old, new = make(parent / "999999"), make(parent / "1000000")
    assert folders.prune(new, 1) == [old]


def test_a_copy_by_hand_is_not_pruned(parent):
    make(parent / "000001")
    shutil.copytree(parent / "000001", parent / "000001-mine")
    newest = make(parent / "000002")
    folders.prune(newest, 1)
    assert names(parent) == ["000001-mine", "000002"]


def test_pruning_that_fails_half_way_leaves_no_half_folder_under_its_name(parent, monkeypatch):
    make(parent / "000001")
    newest = make(parent / "000002")
    monkeypatch.setattr(os, "rmdir", refuse)
    with pytest.raises(OSError, match="No space left"):
        folders.prune(newest, 1)
    monkeypatch.undo()
    assert folders.complete(parent) == [newest]
    # neither does what was left come back
    make(parent / "000003")
    assert names(parent) == ["000002", "000003"]


# digests


@pytest.fixture
def folder(parent) -> Path:
    return make(parent / "000001")


def refusal(folder: Path, part: str = "") -> str:
    with pytest.raises(ValueError) as caught:
        folders.verify(folder, part)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_file_has_a_digest(folder):
    folders.verify(folder)
    assert list(json.loads((folder / folders.DIGESTS_FILE).read_text())) == ["inside/file"]


def test_one_folder_is_looked_at_through_a_link_that_moves_on_meanwhile(parent, monkeypatch):
    make(parent / "000001", "first", ("last",))
    make(parent / "000002", "second")
    load = json.loads

    def load_and_move(text):
        folders.point("last", parent / "000002")
        return load(text)

    monkeypatch.setattr(json, "loads", load_and_move)
    folders.verify(parent / "last")
    assert links(parent) == {"last": "000002"}


def test_a_missing_file_is_named(folder):
    (folder / "inside" / "file").unlink()
    assert refusal(folder) == f"{folder}/inside/file is missing"


def test_a_changed_file_is_named_with_both_digests(folder):
    (folder / "inside" / "file").write_text("texT")
    assert f"{folder}/inside/file is not as it was saved: its SHA-256 is 89c0e45fc632" in (
        text := refusal(folder)
    )
    assert "pirl_digests.json says 982d9e3eb996" in text


def test_a_file_that_cannot_be_read_is_named(folder, monkeypatch):
    def unreadable(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(folders, "_digest", unreadable)
    assert f"{folder}/inside/file cannot be read (OSError: [Errno 5]" in refusal(folder)


@pytest.mark.parametrize("damaged", ["", "{", "[]", "null", '"text"', "\udcff"])
def test_digests_that_cannot_be_read_are_named(damaged, folder):
    (folder / folders.DIGESTS_FILE).write_bytes(damaged.encode(errors="surrogateescape"))
    assert f"{folder / folders.DIGESTS_FILE} cannot be read (" in refusal(folder)


def test_digests_that_are_not_there_are_named(folder):
    (folder / folders.DIGESTS_FILE).unlink()
    assert f"{folder / folders.DIGESTS_FILE} cannot be read (FileNotFoundError" in refusal(folder)


def test_digests_of_nothing_prove_nothing(folder):
    (folder / folders.DIGESTS_FILE).write_text("{}")
    assert refusal(folder) == f"{folder / folders.DIGESTS_FILE} lists no file of {folder}"
    assert "lists no file of" in refusal(folder, "elsewhere/")


def test_a_part_is_looked_at_alone(parent):
    with folders.new_folder(parent / "000001") as partial:
        for name in ("one", "other"):
            (partial / name).mkdir()
            (partial / name / "file").write_text(name)
    (parent / "000001" / "one" / "file").write_text("")
    folders.verify(parent / "000001", "other/")
    assert "one/file is not as it was saved" in refusal(parent / "000001", "one/")
