"""The built distribution: what is in it, what it does once installed, and that nothing stays behind."""

import configparser
import email
import subprocess
import zipfile
from pathlib import Path

import pytest

import lerobot_pirl
from tests.installs import (
    REPO,
    build_wheel,
    check_run,
    install,
    make_venv,
    run,
    site_packages,
    stub_lerobot,
    uninstall,
    write_files,
)

pytestmark = pytest.mark.slow

LEARNER = "lerobot.rl.learner"
STARTUP_FILES = ["lerobot_pirl.pth", "lerobot_pirl.start"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this repository."""
    return build_wheel(REPO, tmp_path_factory.mktemp("build") / "dist")


@pytest.fixture(scope="module")
def archive(wheel: Path) -> zipfile.ZipFile:
    """The wheel, opened."""
    return zipfile.ZipFile(wheel)


@pytest.fixture(scope="module", params=["wheel", "editable"])
def python(request, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with nothing but this package, installed either way, and a stub LeRobot."""
    python = make_venv(tmp_path_factory.mktemp(request.param) / "env")
    install(python, *requirement(request.param, wheel))
    stub_lerobot(site_packages(python))
    return python


def requirement(kind: str, wheel: Path) -> list[object]:
    return [wheel] if kind == "wheel" else ["--editable", REPO]


def information(archive: zipfile.ZipFile, name: str) -> str:
    return archive.read(f"lerobot_pirl-{lerobot_pirl.__version__}.dist-info/{name}").decode()


def start(python: Path, tmp_path: Path, *arguments: object, **env: str) -> subprocess.CompletedProcess:
    result = run(python, *arguments, cwd=tmp_path, **env)
    assert result.returncode == 0, result.stderr
    return result


# what is in it


def test_the_wheel_holds_the_package_and_the_two_start_up_files(archive):
    files = [path for path in (REPO / "lerobot_pirl").rglob("*") if path.is_file()]
    sources = {path.relative_to(REPO).as_posix() for path in files if path.suffix != ".pyc"}
    moved = {f"lerobot_pirl/startup/{name}" for name in STARTUP_FILES}
    names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == sources - moved | set(STARTUP_FILES)
    assert {"lerobot_pirl/py.typed", "lerobot_pirl/tokenizer/tokenizer.json"} <= names
    for name in STARTUP_FILES:
        assert archive.read(name) == (REPO / "lerobot_pirl" / "startup" / name).read_bytes()


def test_uninstalling_knows_of_the_start_up_files(archive):
    recorded = {line.partition(",")[0] for line in information(archive, "RECORD").splitlines()}
    assert set(STARTUP_FILES) <= recorded


def test_the_wheel_is_for_any_platform(wheel, archive):
    assert wheel.name == f"lerobot_pirl-{lerobot_pirl.__version__}-py3-none-any.whl"
    assert "Root-Is-Purelib: true" in information(archive, "WHEEL")


def test_the_metadata_names_what_it_needs(archive):
    metadata = email.message_from_string(information(archive, "METADATA"))
    assert metadata["Name"] == "lerobot-pirl"
    assert metadata["Version"] == lerobot_pirl.__version__
    assert metadata["Requires-Python"] == ">=3.12"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == {"libero", "tensorboard", "test"}
    requirements = metadata.get_all("Requires-Dist")
    (lerobot,) = [line for line in requirements if line.startswith("lerobot[") and "extra ==" not in line]
    assert lerobot.endswith("<0.7,>=0.6.1")
    extra = [line for line in requirements if "extra == 'libero'" in line]
    assert any(line.startswith("lerobot[libero,training]") for line in extra)
    assert any(line.startswith("mujoco") for line in extra)
    needed = {line.partition("[")[0] for line in requirements if "extra ==" not in line}
    assert {"lerobot", "torch", "draccus", "grpcio", "safetensors", "importlib-metadata"} <= needed


def test_every_entry_point_names_a_module_of_the_wheel(archive):
    parser = configparser.ConfigParser(delimiters=["="])
    parser.optionxform = str
    parser.read_string(information(archive, "entry_points.txt"))
    assert {group: set(parser[group]) for group in parser.sections()} == {
        "console_scripts": {"lerobot-pirl", "lerobot-pirl-learner", "lerobot-pirl-actor"},
        "lerobot_pirl.recipes": {"pi-rl"},
        "lerobot_pirl.policy_adapters": {"xvla"},
        "lerobot_pirl.checkpoint_validators": {"pi-rl"},
    }
    modules = {value.partition(":")[0] for group in parser.sections() for value in parser[group].values()}
    files = {module.replace(".", "/") + ".py" for module in modules}
    assert files <= set(archive.namelist())


# what it does once installed


def test_it_is_the_installed_package_that_is_tested(python, tmp_path):
    code = "import lerobot_pirl, sys; print(lerobot_pirl.__file__, 'torch' in sys.modules)"
    file, torch = start(python, tmp_path, "-c", code).stdout.split()
    expected = REPO if "editable" in str(python) else site_packages(python)
    assert (Path(file), torch) == (expected / "lerobot_pirl" / "__init__.py", "False")
    assert run(python, "-c", "import torch", cwd=tmp_path).returncode == 1


def test_the_finder_is_installed_once_and_only_where_it_is_needed(python, tmp_path):
    code = "import sys; print([entry.__name__ for entry in sys.meta_path if 'Redirect' in str(entry)])"
    assert start(python, tmp_path, "-c", code, "-m", LEARNER).stdout == "['Redirect']\n"
    assert start(python, tmp_path, "-c", code).stdout == "[]\n"


@pytest.mark.parametrize("role", ["learner", "actor"])
def test_the_unchanged_command_runs_the_recipe(python, tmp_path, role):
    write_files(tmp_path, {"run.json": '{"recipe": "pi-rl"}'})
    command = ("-m", f"lerobot.rl.{role}", "--config_path=run.json")
    assert start(python, tmp_path, *command).stdout == f"ours {role} ['--config_path=run.json']\n"


@pytest.mark.parametrize("role", ["learner", "actor"])
def test_the_explicit_command_runs_the_recipe(python, tmp_path, role):
    script = python.parent / f"lerobot-pirl-{role}"
    assert check_run(script, "--recipe=pi-rl", cwd=tmp_path) == f"ours {role} ['--recipe=pi-rl']\n"


def test_the_redirect_ends_in_our_own_learner(python, tmp_path):
    # without the stub's light mains it is our learner that misses the rest of LeRobot
    result = run(python, "-m", LEARNER, "--recipe=pi-rl", cwd=tmp_path, STUB_MAINS="0")
    assert result.returncode == 1
    assert "learner_main.py" in result.stderr
    assert str(Path("lerobot_pirl") / "learner.py") in result.stderr
    assert "ModuleNotFoundError" in result.stderr


def test_lerobot_train_names_the_commands_to_use(python, tmp_path):
    script = site_packages(python) / "lerobot-train"
    result = run(python, script, "--recipe=pi-rl", cwd=tmp_path)
    assert result.returncode == 2
    assert "python -m lerobot.rl.learner --recipe=pi-rl\n" in result.stderr


def test_without_a_recipe_lerobot_runs(python, tmp_path):
    assert start(python, tmp_path, "-m", LEARNER).stdout == "upstream __main__ []\n"


@pytest.mark.parametrize(
    ("options", "env", "who"),
    [
        (["-I"], {}, "ours learner"),
        (["-E"], {}, "ours learner"),
        (["-s"], {}, "ours learner"),
        (["-S"], {"PYTHONPATH": "SITE"}, "upstream __main__"),
        ([], {"LEROBOT_PIRL_DISABLE": "1"}, "upstream __main__"),
    ],
)
def test_interpreter_options_and_the_switch(python, tmp_path, options, env, who):
    env = {key: value.replace("SITE", str(site_packages(python))) for key, value in env.items()}
    result = start(python, tmp_path, *options, "-m", LEARNER, "--recipe=pi-rl", **env)
    assert result.stdout == f"{who} ['--recipe=pi-rl']\n"
    assert result.stderr == ""


def test_spawned_children_start_and_find_the_package(python, tmp_path):
    worker = """
import multiprocessing, sys

def report(queue):
    import lerobot_pirl
    queue.put(["ours", lerobot_pirl.__version__, "lerobot_pirl.startup.hook" in sys.modules])

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=report, args=(queue,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        print(*queue.get(timeout=60))
    for process in processes:
        process.join(60)
        print(process.exitcode)
"""
    write_files(tmp_path, {"worker.py": worker})
    out = start(python, tmp_path, "worker.py").stdout.splitlines()
    assert out == [f"ours {lerobot_pirl.__version__} False"] * 2 + ["0"] * 2


def test_other_programs_see_the_same_interpreter_as_without_it(python, tmp_path):
    code = (
        "import sys; print([m for m in sys.modules if m[0] != '_'], sys.meta_path, sys.path_hooks, sys.argv)"
    )
    code = code.replace("sys.meta_path", "[str(finder).partition(' at ')[0] for finder in sys.meta_path]")
    code = code.replace("sys.path_hooks", "len(sys.path_hooks)")
    bare = make_venv(tmp_path / "bare")
    stub_lerobot(site_packages(bare))
    arguments = ("-c", code, "--recipe=pi-rl", "lerobot.scripts.lerobot_eval")
    assert start(python, tmp_path, *arguments).stdout == start(bare, tmp_path, *arguments).stdout


# nothing stays behind


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_uninstalling_leaves_nothing(wheel, tmp_path, kind):
    python = make_venv(tmp_path / "env")
    stub_lerobot(site_packages(python))
    command = ("-m", LEARNER, "--recipe=pi-rl")
    env = {"PYTHONDONTWRITEBYTECODE": "1"}

    def files() -> list[Path]:
        found = sorted([*python.parent.iterdir(), *site_packages(python).rglob("*")])
        return [path for path in found if "sitecustomize" not in path.name and path.name != "__pycache__"]

    before = files()
    install(python, *requirement(kind, wheel))
    assert site_packages(python) / "lerobot_pirl.pth" in files()
    assert start(python, tmp_path, *command, **env).stdout == "ours learner ['--recipe=pi-rl']\n"
    uninstall(python, "lerobot-pirl")
    assert files() == before
    result = start(python, tmp_path, *command, **env)
    assert (result.stdout, result.stderr) == ("upstream __main__ ['--recipe=pi-rl']\n", "")
    assert run(python, "-c", "import lerobot_pirl", cwd=tmp_path).returncode == 1
