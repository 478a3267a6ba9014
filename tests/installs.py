"""Fake distributions, a stub LeRobot and throw-away environments for tests of how the plugin gets in."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

REPO = Path(__file__).parent.parent
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
UV = shutil.which("uv")

_UPSTREAM = """
import sys

def main():
    print("upstream", __name__, sys.argv[1:])

if __name__ == "__main__":
    main()
"""

# Stands in for our heavy mains unless STUB_MAINS=0: says who runs.
_SITECUSTOMIZE = """
import os, sys, types

def make(role):
    def main():
        print("ours", role, sys.argv[1:])
    return main

for role in ("learner", "actor") if os.environ.get("STUB_MAINS") != "0" else ():
    module = types.ModuleType(f"lerobot_pirl.{role}")
    module.main = make(role)
    sys.modules[module.__name__] = module
"""


def write_files(folder: Path, files: dict[str, str]) -> Path:
    """Write text files by their relative paths; return the folder."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def fake_distribution(folder: Path, name: str, version: str, groups: dict[str, dict[str, str]]) -> Path:
    """Write the metadata of an installed distribution with these entry points into ``folder``."""
    lines = []
    for group, entries in groups.items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    return write_files(
        folder, {f"{info}/METADATA": metadata, f"{info}/entry_points.txt": "\n".join(lines) + "\n"}
    )


def stub_lerobot(folder: Path, version: str = "0.6.1") -> Path:
    """Write a LeRobot whose commands print who runs, and light mains of ours; return the folder."""
    fake_distribution(folder, "lerobot", version, {})
    files = dict.fromkeys(("lerobot/__init__.py", "lerobot/rl/__init__.py"), "")
    commands = ("lerobot/rl/learner.py", "lerobot/rl/actor.py", "lerobot/scripts/lerobot_train.py")
    files |= dict.fromkeys(commands, _UPSTREAM)
    files["lerobot-train"] = "from lerobot.scripts.lerobot_train import main\nmain()\n"
    files["sitecustomize.py"] = _SITECUSTOMIZE
    return write_files(folder, files)


def run(*command: object, cwd: Path, timeout: float = 120, **env: str) -> subprocess.CompletedProcess:
    """Run a command from ``cwd`` without this process's Python settings; never raises on its exit status."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LEROBOT"))}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def check_run(*command: object, cwd: Path, timeout: float = 120, **env: str) -> str:
    """Run a command that must succeed; return its standard output."""
    result = run(*command, cwd=cwd, timeout=timeout, **env)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def make_venv(folder: Path) -> Path:
    """Create an empty environment of this interpreter; return its Python."""
    check_run(sys.executable, "-m", "venv", "--without-pip", "--symlinks", folder, cwd=folder.parent)
    return folder / "bin" / "python"


def site_packages(python: Path) -> Path:
    """Return the site-packages folder of an environment made by :func:`make_venv`."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return python.parent.parent / "lib" / version / "site-packages"


def _tool(*command: object) -> None:
    # from the repository, whose .python-version a pyenv shim of uv needs
    check_run(*command, cwd=REPO, timeout=300)


def build_wheel(source: Path, out: Path) -> Path:
    """Build the wheel of a project into ``out``; return its path."""
    if UV:
        _tool(UV, "build", "--wheel", "--quiet", "--python", sys.executable, "--out-dir", out, source)
    else:
        _tool(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, source)
    (wheel,) = out.glob("*.whl")
    return wheel


def install(python: Path, *requirements: object) -> None:
    """Install into an environment, without dependencies."""
    if UV:
        _tool(UV, "pip", "install", "--quiet", "--python", python, "--no-deps", *requirements)
    else:
        pip = (sys.executable, "-m", "pip", "--python", python)
        _tool(*pip, "install", "--quiet", "--no-deps", "--disable-pip-version-check", *requirements)


def uninstall(python: Path, name: str) -> None:
    """Uninstall a distribution from an environment."""
    if UV:
        _tool(UV, "pip", "uninstall", "--quiet", "--python", python, name)
    else:
        _tool(sys.executable, "-m", "pip", "--python", python, "uninstall", "--quiet", "--yes", name)


def link_dependencies(target: Path) -> None:
    """Fill ``target`` with links to everything in the running site-packages but this plugin."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in SITE_PACKAGES.iterdir():
        if not entry.name.startswith(("lerobot_pirl", "_editable_impl_lerobot_pirl")):
            (target / entry.name).symlink_to(entry)
