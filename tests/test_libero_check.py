"""What must be in place before LIBERO is imported, and the sentences that say what is missing."""

import importlib
import os
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from lerobot.envs.configs import LiberoEnv as LiberoConfig

from lerobot_pirl.envs import check
from lerobot_pirl.policies.xvla import XVLAAdapter
from tests.toy import tiny_config

CONFIG_KEYS = {"benchmark_root", "bddl_files", "init_states", "datasets", "assets"}


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """A machine on which LIBERO is usable: a package that must not be imported, assets and a GL library.

    Its config file is not written yet. Returns the package's inner folder.
    """
    package = tmp_path / "site" / "libero" / "libero"
    for folder in ("bddl_files", "init_files"):
        (package / folder).mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('LIBERO was imported')")
    (package.parent / "__init__.py").write_text("")
    fill_assets(tmp_path / "home" / ".cache" / "libero" / "assets")
    monkeypatch.syspath_prepend(package.parent.parent)
    for name in [name for name in sys.modules if name.split(".")[0] == "libero"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("LIBERO_CONFIG_PATH", "MUJOCO_GL", "LP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that the variable's old value comes back after the test
        monkeypatch.delenv(name)
    monkeypatch.setattr(check, "_library_found", lambda name: True)
    monkeypatch.setattr(sys, "platform", "linux")
    return package


def fill_assets(folder: Path, names=check.ASSET_FOLDERS) -> None:
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "mesh.obj").write_text("")


def refusal(call=check.prepare_libero) -> str:
    """The sentence with which the call is refused."""
    with pytest.raises(RuntimeError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    return message


# --- all is well ----------------------------------------------------------------------------------------------


def test_usable_machine_is_prepared_without_importing_libero(machine):
    check.prepare_libero()
    check.prepare_libero()
    assert os.environ["MUJOCO_GL"] == "egl"
    assert os.environ["LP_NUM_THREADS"] == "1"
    assert "libero" not in sys.modules


def test_the_users_own_settings_stay(machine, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setenv("LP_NUM_THREADS", "4")
    check.prepare_libero()
    assert (os.environ["MUJOCO_GL"], os.environ["LP_NUM_THREADS"]) == ("osmesa", "4")


# --- the package ----------------------------------------------------------------------------------------------


def test_missing_package_is_one_sentence(machine, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = refusal()
    assert "the LIBERO package is not installed" in message
    assert 'pip install "lerobot-pirl[libero]"' in message
    assert check.check_libero() == [("LIBERO package", False, message)]


# --- the config file ------------------------------------------------------------------------------------------


def test_config_file_is_written_where_libero_reads_it(machine, monkeypatch, tmp_path):
    assert check.config_file() == tmp_path / "home" / ".libero" / "config.yaml"
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path / "elsewhere"))
    check.prepare_libero()
    paths = yaml.safe_load((tmp_path / "elsewhere" / "config.yaml").read_text())
    assert set(paths) == CONFIG_KEYS
    assert paths["bddl_files"] == str(machine / "bddl_files")
    assert paths["init_states"] == str(machine / "init_files")
    assert not (tmp_path / "home" / ".libero").exists()


def test_config_file_that_is_there_stays_as_it_is(machine):
    check.prepare_libero()
    target = check.config_file()
    own = target.read_text() + "# my own\n"
    target.write_text(own)
    check.prepare_libero()
    assert target.read_text() == own


def test_several_processes_may_write_the_config_file_at_once(machine):
    """Threads stand in for them: whoever comes last, the file is whole and nothing else is left."""
    start = threading.Barrier(8)
    failures = []

    def write() -> None:
        start.wait()
        try:
            check.write_libero_config(machine)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    check.check_libero_config()
    assert list(check.config_file().parent.iterdir()) == [check.config_file()]


def test_config_folder_that_cannot_be_written_is_one_sentence(machine, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path / "file" / "folder"))
    message = refusal()
    assert f"{tmp_path / 'file' / 'folder' / 'config.yaml'} cannot be written" in message
    assert "LIBERO_CONFIG_PATH" in message


@pytest.mark.parametrize("key", ["benchmark_root", "bddl_files", "init_states"])
def test_config_file_that_points_nowhere_is_one_sentence(machine, key):
    check.prepare_libero()
    paths = yaml.safe_load(check.config_file().read_text())
    check.config_file().write_text(yaml.safe_dump(paths | {key: "/gone"}))
    message = refusal()
    assert f"{check.config_file()} has {key}='/gone', which is no folder" in message
    assert "delete the file" in message


@pytest.mark.parametrize("content", ["", "just text", "benchmark_root: [unclosed", "{}"])
def test_config_file_that_holds_nothing_usable_is_one_sentence(machine, content):
    check.config_file().parent.mkdir(parents=True)
    check.config_file().write_text(content)
    assert f"{check.config_file()} has benchmark_root=None, which is no folder" in refusal()


# --- the assets -----------------------------------------------------------------------------------------------


def test_missing_assets_are_one_sentence_that_names_what_is_missing(machine, tmp_path):
    folder = check.assets_dir()
    assert folder == tmp_path / "home" / ".cache" / "libero" / "assets"
    (folder / "scenes" / "mesh.obj").unlink()
    (folder / "textures" / "mesh.obj").unlink()
    (folder / "textures").rmdir()
    message = refusal()
    assert f"assets are missing in {folder} (absent or empty: scenes, textures)" in message
    assert check.ASSETS_REPO in message


def test_assets_inside_the_package_are_the_ones_that_count(machine):
    fill_assets(machine / "assets", check.ASSET_FOLDERS[:2])
    assert check.assets_dir() == machine / "assets"
    assert "stable_hope_objects" in refusal()


@pytest.mark.parametrize("offline", ["1", "true", "ON"])
def test_nothing_is_downloaded_offline_or_when_forbidden(machine, monkeypatch, tmp_path, offline):
    (tmp_path / "home" / ".cache" / "libero" / "assets").rename(tmp_path / "gone")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda **options: pytest.fail("downloads"))
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    assert "assets are missing" in refusal()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert "assets are missing" in refusal(lambda: check.prepare_libero(allow_download=False))


def test_missing_assets_are_downloaded_to_where_libero_looks(machine, monkeypatch, tmp_path):
    (tmp_path / "home" / ".cache" / "libero" / "assets").rename(tmp_path / "gone")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    asked = []

    def download(*, repo_id: str, repo_type: str, local_dir: Path) -> None:
        asked.append((repo_id, repo_type))
        fill_assets(Path(local_dir))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    check.prepare_libero()
    assert asked == [(check.ASSETS_REPO, "dataset")]
    assert not check.missing_assets(check.assets_dir())


def test_download_that_fails_or_falls_short_is_one_sentence(machine, monkeypatch, tmp_path):
    (tmp_path / "home" / ".cache" / "libero" / "assets").rename(tmp_path / "gone")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    def fail(**options) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = refusal()
    assert "assets are missing" in message
    assert "no route to host" in message
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda **options: None)
    assert "assets are missing" in refusal()


# --- GL -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "library", "package"), [("egl", "libEGL", "libegl1"), ("osmesa", "libOSMesa", "libosmesa6")]
)
def test_missing_gl_library_is_one_sentence(machine, monkeypatch, backend, library, package):
    asked = []
    monkeypatch.setattr(check, "_library_found", lambda name: asked.append(name))
    monkeypatch.setenv("MUJOCO_GL", backend)
    message = refusal()
    assert f"MUJOCO_GL is '{backend}' but the library {library} is missing" in message
    assert f"apt-get install {package}" in message
    assert f"lib{asked[0]}" == library


def test_gl_library_is_not_looked_for_where_the_system_brings_it(machine, monkeypatch):
    monkeypatch.setattr(check, "_library_found", lambda name: False)
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    check.prepare_libero()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("MUJOCO_GL", "egl")
    check.prepare_libero()


def test_a_library_that_no_loader_knows_is_not_found():
    assert not check._library_found("surely-not-a-library")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("raise SystemExit('no display')", "exit status 1: no display"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "exit status -11: no message"),
    ],
    ids=["an error", "a crash"],
)
def test_frame_that_does_not_come_is_one_sentence(machine, monkeypatch, script, words):
    monkeypatch.setattr(check, "GL_CHECK_SCRIPT", script)
    message = refusal(check.rendered_frame)
    assert f"MuJoCo rendered no frame with MUJOCO_GL=egl ({words})" in message
    assert "apt-get install libegl1" in message


def test_frame_that_takes_forever_is_one_sentence(machine, monkeypatch):
    monkeypatch.setattr(check, "GL_CHECK_TIMEOUT_S", 0.2)
    monkeypatch.setattr(check, "GL_CHECK_SCRIPT", "while True: pass")
    assert "no frame within 0.2 s" in refusal(check.rendered_frame)


# --- the report -----------------------------------------------------------------------------------------------


def test_report_on_a_usable_machine_is_good_and_changes_nothing(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(check, "GL_CHECK_SCRIPT", "pass")
    rows = check.check_libero()
    assert [name for name, _, _ in rows] == [
        "LIBERO package",
        "LIBERO config file",
        "LIBERO assets",
        "GL rendering",
    ]
    assert all(well for _, well, _ in rows)
    assert "written at first use" in rows[1][2]
    assert "MUJOCO_GL=egl" in rows[3][2]
    assert not check.config_file().exists()
    assert "MUJOCO_GL" not in os.environ
    check.prepare_libero()
    assert check.check_libero()[1] == ("LIBERO config file", True, str(check.config_file()))


def test_report_names_all_that_is_wrong_and_never_raises(machine, monkeypatch):
    monkeypatch.setattr(check, "GL_CHECK_SCRIPT", "raise SystemExit('no display')")
    check.config_file().parent.mkdir(parents=True)
    check.config_file().write_text("")
    (check.assets_dir() / "scenes" / "mesh.obj").unlink()
    rows = check.check_libero()
    assert [well for _, well, _ in rows] == [True, False, False, False]
    assert all(
        words in row[2] for words, row in zip(("no folder", "scenes", "no display"), rows[1:], strict=True)
    )


# --- control mode ---------------------------------------------------------------------------------------------


def test_relative_control_is_refused_for_xvla():
    """LeRobot's LIBERO config is relative unless told otherwise, and X-VLA's actions are absolute poses."""
    cfg = tiny_config()
    cfg.env = LiberoConfig()
    with pytest.raises(ValueError, match="env.control_mode='relative' .* set env.control_mode to 'absolute'"):
        XVLAAdapter.validate(cfg)
    cfg.env.control_mode = "absolute"
    XVLAAdapter.validate(cfg)
