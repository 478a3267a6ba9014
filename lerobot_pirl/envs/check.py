"""Is LIBERO usable on this machine? What must be in place before its import, and what ``doctor`` reports."""

import ctypes
import ctypes.util
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import yaml

logger = logging.getLogger(__name__)

ASSETS_REPO = "lerobot/libero-assets"
ASSET_FOLDERS = (
    "articulated_objects",
    "scenes",
    "stable_hope_objects",
    "stable_scanned_objects",
    "textures",
    "turbosquid_objects",
)
GL_PACKAGES = {"egl": "libegl1 libgl1 libgles2", "osmesa": "libosmesa6"}
GL_LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}
GL_CHECK_TIMEOUT_S = 120
GL_CHECK_SCRIPT = """
import mujoco
scene = '<mujoco><worldbody><light pos="0 0 2"/><geom type="sphere" size=".3" rgba="1 0 0 1"/></worldbody></mujoco>'
model = mujoco.MjModel.from_xml_string(scene)
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 32, 32)
renderer.update_scene(data)
frame = renderer.render()
if frame.max() == frame.min():
    raise SystemExit("the rendered frame is blank")
"""


def prepare_libero(allow_download: bool = True) -> None:
    """Put in place what hf-libero needs, before anything imports it. Safe to call again and in every process.

    Writes hf-libero's config file if there is none (its import would ask on stdin), defaults ``MUJOCO_GL`` to
    ``egl`` on Linux and ``LP_NUM_THREADS`` to 1 (several software renderers on one machine would fight for the
    cores), and fetches the assets from the Hub if they are nowhere.

    Args:
        allow_download: fetch missing assets from the Hub; otherwise they are an error.

    Raises:
        RuntimeError: when the package, the assets or the GL library is missing, or the config file points nowhere.
    """
    package = libero_package_dir()
    os.environ.setdefault("LP_NUM_THREADS", "1")
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    write_libero_config(package)
    check_libero_config()
    if missing_assets(assets_dir()):
        if not allow_download or os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
            raise RuntimeError(_assets_message())
        download_assets()
    check_gl_library()


def check_libero() -> list[tuple[str, bool, str]]:
    """Return rows (what, is it well, detail) on package, config file, assets and GL; changes and raises nothing."""
    rows = [_row("LIBERO package", lambda: str(libero_package_dir()))]
    if not rows[0][1]:
        return rows
    rows.append(_row("LIBERO config file", _config_detail))
    rows.append(_row("LIBERO assets", _assets_detail))
    rows.append(_row("GL rendering", rendered_frame))
    return rows


def libero_package_dir() -> Path:
    """Return hf-libero's inner package folder, found without importing it.

    Raises:
        RuntimeError: when it is not installed.
    """
    spec = importlib.util.find_spec("libero")
    for parent in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(parent) / "libero"
        if (folder / "__init__.py").is_file():
            return folder
    raise RuntimeError(
        "the LIBERO package is not installed but env.type is 'libero'; pip install \"lerobot-pirl[libero]\""
    )


def config_file() -> Path:
    """Return hf-libero's config file: ``$LIBERO_CONFIG_PATH/config.yaml``, by default ``~/.libero/config.yaml``."""
    return Path(os.environ.get("LIBERO_CONFIG_PATH", os.path.expanduser("~/.libero"))) / "config.yaml"


def write_libero_config(package: Path) -> None:
    """Write hf-libero's default config file unless there is one; two processes may do it at once.

    Raises:
        RuntimeError: when the folder cannot be written to.
    """
    target = config_file()
    if target.exists():
        return
    paths = {
        "benchmark_root": str(package),
        "bddl_files": str(package / "bddl_files"),
        "init_states": str(package / "init_files"),
        "datasets": str(package.parent / "datasets"),
        "assets": str(package / "assets"),
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, suffix=".yaml", delete=False) as handle:
            yaml.safe_dump(paths, handle)
        os.replace(handle.name, target)
    except OSError as error:
        raise RuntimeError(
            f"LIBERO's config file {target} cannot be written ({error.strerror}); point LIBERO_CONFIG_PATH at a "
            "folder that can"
        ) from error
    logger.info("wrote LIBERO's config file %s", target)


def check_libero_config() -> None:
    """See that the config file's folders exist.

    Raises:
        RuntimeError: when one does not, as after a virtual environment was moved or deleted.
    """
    try:
        content = yaml.safe_load(config_file().read_text())
    except yaml.YAMLError:
        content = None
    paths = content if isinstance(content, dict) else {}
    for key in ("benchmark_root", "bddl_files", "init_states"):
        if key not in paths or not Path(str(paths[key])).is_dir():
            raise RuntimeError(
                f"LIBERO's config file {config_file()} has {key}={paths.get(key)!r}, which is no folder; delete the "
                "file and it is written anew, or point LIBERO_CONFIG_PATH at another folder"
            )


def assets_dir() -> Path:
    """Return where hf-libero takes its meshes from: its package if they are there, else ``~/.cache/libero/assets``."""
    packaged = libero_package_dir() / "assets"
    return packaged if packaged.exists() else Path(os.path.expanduser("~")) / ".cache" / "libero" / "assets"


def missing_assets(folder: Path) -> list[str]:
    """Return the asset subfolders that are absent or empty in ``folder``."""
    return [name for name in ASSET_FOLDERS if not any((folder / name).glob("*"))]


def download_assets() -> None:
    """Fetch the assets from the Hub to where hf-libero looks for them.

    Raises:
        RuntimeError: when the Hub cannot be reached or the copy is incomplete.
    """
    from huggingface_hub import snapshot_download

    folder = assets_dir()
    logger.info("downloading LIBERO's assets from the dataset %s on the Hub to %s", ASSETS_REPO, folder)
    try:
        snapshot_download(repo_id=ASSETS_REPO, repo_type="dataset", local_dir=folder)
    except Exception as error:
        raise RuntimeError(f"{_assets_message()} (the download failed: {error})") from error
    if missing_assets(folder):
        raise RuntimeError(_assets_message())


def check_gl_library() -> None:
    """See that the library behind ``MUJOCO_GL`` can be found (Linux only: other systems bring theirs).

    Raises:
        RuntimeError: when it cannot.
    """
    backend = os.environ.get("MUJOCO_GL", "").lower()
    if sys.platform != "linux" or backend not in GL_LIBRARIES or _library_found(GL_LIBRARIES[backend]):
        return
    raise RuntimeError(
        f"MUJOCO_GL is {backend!r} but the library lib{GL_LIBRARIES[backend]} is missing; {_gl_remedy(backend)}"
    )


def rendered_frame() -> str:
    """Render a sphere with MuJoCo in a process of its own, since a broken driver can crash the process.

    Returns:
        A sentence on the backend that worked.

    Raises:
        RuntimeError: when no frame came back.
    """
    backend = os.environ.get("MUJOCO_GL") or ("egl" if sys.platform == "linux" else "")
    environment = {**os.environ, **({"MUJOCO_GL": backend} if backend else {})}
    command = [sys.executable, "-c", GL_CHECK_SCRIPT]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=GL_CHECK_TIMEOUT_S, check=False
        )
        failure = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]
        status = done.returncode
    except subprocess.TimeoutExpired:
        failure, status = f"no frame within {GL_CHECK_TIMEOUT_S} s", 1
    if status != 0:
        raise RuntimeError(
            f"MuJoCo rendered no frame with MUJOCO_GL={backend or 'unset'} (exit status {status}: {failure}); "
            f"{_gl_remedy(backend)}"
        )
    return f"rendered a frame with MUJOCO_GL={backend or 'the default'}"


def _library_found(name: str) -> bool:
    if ctypes.util.find_library(name):
        return True
    try:
        ctypes.CDLL(f"lib{name}.so.1")
    except OSError:
        return False
    return True


def _gl_remedy(backend: str) -> str:
    install = f"apt-get install {GL_PACKAGES.get(backend, GL_PACKAGES['egl'])}"
    if backend == "osmesa":
        return install
    return f"{install}, or apt-get install {GL_PACKAGES['osmesa']} and set MUJOCO_GL=osmesa"


def _assets_message() -> str:
    folder = assets_dir()
    return (
        f"LIBERO's assets are missing in {folder} (absent or empty: {', '.join(missing_assets(folder))}); download "
        f"the dataset {ASSETS_REPO} from the Hugging Face Hub and put it there, or link that folder to a copy"
    )


def _config_detail() -> str:
    if not config_file().exists():
        return f"{config_file()} is not there yet; it is written at first use"
    check_libero_config()
    return str(config_file())


def _assets_detail() -> str:
    if missing_assets(assets_dir()):
        raise RuntimeError(_assets_message())
    return str(assets_dir())


def _row(name: str, detail: Callable[[], str]) -> tuple[str, bool, str]:
    try:
        return name, True, detail()
    except Exception as error:
        return name, False, str(error)
