"""The start-up hook: when it steps in, when it stays out, and that it can do no harm.

What happens at interpreter start is tested in fresh interpreters, most of them with a stub LeRobot in place of the
real one (``tests/installs.py``); the stub's commands print ``upstream``, our mains print ``ours``.
"""

import json
import os
import sys
from pathlib import Path

import pytest

from lerobot_pirl.startup import hook
from tests.installs import REPO, SITE_PACKAGES, check_run, run, stub_lerobot, write_files

LEARNER, ACTOR, TRAIN = "lerobot.rl.learner", "lerobot.rl.actor", "lerobot.scripts.lerobot_train"
PTH = REPO / "lerobot_pirl" / "startup" / "lerobot_pirl.pth"
OURS = {"lerobot_pirl", "lerobot_pirl.startup", "lerobot_pirl.startup.hook"}


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A folder with the stub LeRobot and configs with and without a recipe."""
    configs = {
        "recipe.json": '{"recipe": "pi-rl"}',
        "recipe.yaml": "recipe: pi-rl\nseed: 1\n",
        "recipe.yml": "recipe: pi-rl\n",
        "checkpoint/train_config.json": '{"recipe": "pi-rl"}',
        "plain.json": '{"policy": {"type": "sac"}}',
        "null.json": '{"recipe": null}',
        "number.json": '{"recipe": 5}',
        "empty.json": '{"recipe": ""}',
        "list.json": '["recipe"]',
        "broken.json": '{"recipe": "pi-rl"',
        "broken.yaml": "recipe: [pi-rl",
        "binary.json": "\udcff",
    }
    folder = tmp_path / "stub"
    folder.mkdir()
    for name, text in configs.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    return stub_lerobot(folder)


def start(stub: Path, *arguments: object, **env: str):
    """Run the interpreter from a folder without this package, with the stub first on its path."""
    result = run(sys.executable, *arguments, cwd=stub, PYTHONPATH=str(stub), **env)
    assert result.returncode == 0, result.stderr
    return result


# which recipe a command line selects


@pytest.mark.parametrize(
    "arguments",
    [
        ["--recipe=pi-rl"],
        ["--recipe", "pi-rl"],
        ["--recipe=pi-rl", "--config_path=plain.json"],
        ["--config_path=recipe.json"],
        ["--config_path", "recipe.json"],
        ["--config_path=recipe.yaml"],
        ["--config_path=recipe.yml"],
        ["--config_path=checkpoint"],
        ["--config_path=checkpoint/train_config.json"],
        ["--steps=3", "--config_path=recipe.json", "--resume=true"],
        ["--config_path=recipe.json", "--recipe="],
    ],
)
def test_a_recipe_is_selected_by_the_command_line_or_the_config(stub, monkeypatch, arguments):
    monkeypatch.chdir(stub)
    assert hook.selected_recipe(["python", "-m", LEARNER, *arguments]) == "pi-rl"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--recipe"],
        ["--recipe", "--steps=3"],
        ["--config_path"],
        ["--config_path="],
        ["--config_path=plain.json"],
        ["--config_path=null.json"],
        ["--config_path=number.json"],
        ["--config_path=empty.json"],
        ["--config_path=list.json"],
        ["--config_path=broken.json"],
        ["--config_path=broken.yaml"],
        ["--config_path=binary.json"],
        ["--config_path=missing.json"],
        ["--config_path=somebody/a-model-on-the-hub"],
        ["--config_path=lerobot"],
        ["--config_path=\0"],
        ["--recipes=pi-rl", "--algorithm.recipe=pi-rl", "recipe=pi-rl"],
    ],
)
def test_nothing_is_selected_by_anything_else(stub, monkeypatch, arguments):
    monkeypatch.chdir(stub)
    assert hook.selected_recipe(["python", "-m", LEARNER, *arguments]) is None


@pytest.fixture
def run_with_a_lost_config(tmp_path):
    """A run whose newest checkpoint has lost its config; returns the name of the config."""
    state = tmp_path / "checkpoints" / "000002" / "training_state"
    state.mkdir(parents=True)
    (state / "pirl_metadata.json").write_text('{"recipe": "pi-rl"}')
    (tmp_path / "checkpoints" / "last").symlink_to("000004")
    return tmp_path / "checkpoints" / "last" / "pretrained_model" / "train_config.json"


def test_a_checkpoint_without_its_config_is_this_packages_to_refuse(run_with_a_lost_config):
    for path in (run_with_a_lost_config, run_with_a_lost_config.parent):
        assert hook.selected_recipe([f"--config_path={path}", "--resume=true"]) == "pi-rl"


@pytest.mark.parametrize("content", ["", "{", "null", "\x00"])
def test_a_checkpoint_with_a_damaged_config_is_too(run_with_a_lost_config, content):
    step = run_with_a_lost_config.parent.parent.parent / "000002" / "pretrained_model"
    step.mkdir()
    (step / "train_config.json").write_text(content)
    assert hook.selected_recipe([f"--config_path={step}/train_config.json"]) == "pi-rl"


@pytest.mark.parametrize("metadata", ["", "[]", "{}", '{"recipe": 3}'])
def test_metadata_that_name_no_recipe_select_nothing(run_with_a_lost_config, metadata):
    state = run_with_a_lost_config.parent.parent.parent / "000002" / "training_state"
    (state / "pirl_metadata.json").write_text(metadata)
    assert hook.selected_recipe([f"--config_path={run_with_a_lost_config}"]) is None


def test_a_lost_config_of_another_run_is_lerobots(run_with_a_lost_config):
    state = run_with_a_lost_config.parent.parent.parent / "000002" / "training_state"
    (state / "pirl_metadata.json").unlink()
    assert hook.selected_recipe([f"--config_path={run_with_a_lost_config}"]) is None


def test_the_command_line_wins_over_the_config(stub, monkeypatch):
    monkeypatch.chdir(stub)
    assert hook.selected_recipe(["--config_path=recipe.json", "--recipe=other"]) == "other"


def test_a_config_that_may_not_be_opened_selects_nothing(stub, monkeypatch):
    monkeypatch.chdir(stub)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert hook.selected_recipe(["--config_path=recipe.json"]) is None


def test_a_pipe_is_left_for_lerobot_to_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    opened = []
    monkeypatch.setattr("builtins.open", lambda *args, **kwargs: opened.append(args))
    assert hook.selected_recipe([f"--config_path={tmp_path / 'pipe'}"]) is None
    assert opened == []


# which LeRobot versions are known


@pytest.mark.parametrize(
    ("version", "known"),
    [
        *[(version, True) for version in ("0.6.1", "0.6.2", "0.6.9", "0.6.10", "0.6.1.post1", "0.6.1+cu128")],
        *[(version, True) for version in ("0.6.2rc1", "0.6.2.dev0", "0.6.10a1", "0.6.1.1")],
        *[(version, False) for version in ("0.6.1rc1", "0.6.1a1", "0.6.1b2", "0.6.1.dev3", "0.6.1.rc1")],
        *[
            (version, False)
            for version in ("0.6.0", "0.6.0rc1", "0.6.0+cu128", "0.6.0.post2", "0.6", "0.5.9")
        ],
        *[(version, False) for version in ("0.7.0", "0.7.0rc1", "1.6.1", "10.6.1", "0.60.1", "0.61")],
        *[(version, False) for version in ("", "garbage", "0.6.x", "0.6.", "v0.6.1", "unknown", "0.6.-1")],
    ],
)
def test_the_lerobot_versions_it_knows(version, known):
    assert hook.lerobot_supported(version) is known


# which command lines it looks at


@pytest.mark.parametrize(
    ("argv", "runs"),
    [
        (["python", "-m", LEARNER], True),
        (["python", "-u", "-m", LEARNER, "--recipe=pi-rl"], True),
        (["python", "-um", LEARNER], True),
        (["python", f"-m{LEARNER}"], True),
        (["python", "-m", "cProfile", "-o", "out", "-m", LEARNER], True),
        (["python", "-m", "coverage", "run", "--branch", "-m", LEARNER], True),
        (["/env/bin/python", "/env/bin/torchrun", "--nproc-per-node=1", "-m", LEARNER], True),
        (["python", "-m", ACTOR], False),
        (["python", "-m", "lerobot.rl.learner_service"], False),
        (["python", "-c", f"import {LEARNER}"], False),
        (["python", "-c", "pass", LEARNER], False),
        (["python", "--m", LEARNER], False),
        (["python", "team", LEARNER], False),
        ([LEARNER], False),
        ([], False),
    ],
)
def test_the_module_must_be_the_one_that_is_run(argv, runs):
    assert hook._command_runs(LEARNER, argv) is runs


@pytest.mark.parametrize(
    ("script", "runs"),
    [
        ("/env/bin/lerobot-train", True),
        ("lerobot-train", True),
        ("lerobot-train.exe", True),
        ("lerobot-train.EXE", True),
        ("/env/bin/lerobot-train-tokenizer", False),
        ("/env/bin/lerobot-eval", False),
        ("/home/me/lerobot-train/run.py", False),
        ("", False),
    ],
)
def test_the_trainers_script_is_known_by_its_name(monkeypatch, script, runs):
    monkeypatch.setattr(sys, "argv", [script, "--recipe=pi-rl"])
    assert hook._command_runs(TRAIN, ["python", script]) is runs
    assert not hook._command_runs(LEARNER, ["python", script])


@pytest.mark.parametrize(
    ("argv", "concerned"),
    [
        (["python", "-m", LEARNER], True),
        (["python", "-m", ACTOR], True),
        (["python", f"-m{ACTOR}"], True),
        (["python", "-m", TRAIN], True),
        (["python", "/env/bin/lerobot-train"], True),
        (["python.exe", "C:\\env\\Scripts\\lerobot-train.exe"], True),
        (["python", "-m", "lerobot.scripts.lerobot_eval"], False),
        (["python", "/env/bin/lerobot-eval"], False),
        (["python", "-c", "pass"], False),
        ([], False),
    ],
)
def test_the_start_up_line_and_install_look_at_the_same_commands(monkeypatch, argv, concerned):
    monkeypatch.setattr(sys, "orig_argv", argv)
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.delenv(hook.DISABLE, raising=False)
    hook.install()
    assert sys.meta_path == [hook.Redirect] * concerned
    sys.meta_path.clear()
    called = []
    monkeypatch.setattr(hook, "install", lambda: called.append(True))
    exec(PTH.read_text(), {}, {})  # as site does, with separate globals and locals
    assert called == [True] * concerned


def test_installing_twice_puts_one_finder_first(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", LEARNER])
    monkeypatch.setattr(sys, "meta_path", ["another"])
    monkeypatch.delenv(hook.DISABLE, raising=False)
    hook.install()
    hook.install()
    assert sys.meta_path == [hook.Redirect, "another"]


def test_the_start_up_files_name_the_function_that_installs():
    start_line = PTH.with_suffix(".start").read_text()
    assert start_line == "lerobot_pirl.startup.hook:install\n"
    assert PTH.read_text().startswith("import sys; ")
    assert PTH.read_text().count("\n") == 1


def test_the_installed_start_up_line_is_this_one():
    assert (SITE_PACKAGES / PTH.name).read_text() == PTH.read_text(), "reinstall the package"


# fresh interpreters: who runs


@pytest.mark.parametrize("config", ["recipe.json", "recipe.yaml", "checkpoint"])
@pytest.mark.parametrize("role", ["learner", "actor"])
def test_the_unchanged_command_runs_the_recipe(stub, role, config):
    result = start(stub, "-m", f"lerobot.rl.{role}", "--config_path", config)
    assert result.stdout == f"ours {role} ['--config_path', '{config}']\n"
    assert result.stderr == ""


@pytest.mark.parametrize(
    "command",
    [
        ["-u", "-m", LEARNER],
        ["-um", LEARNER],
        [f"-m{LEARNER}"],
        ["-m", "cProfile", "-o", "profile", "-m", LEARNER],
        ["-m", "runner", "run", "--branch", "-m", LEARNER],
    ],
)
def test_the_command_is_recognised_however_it_is_run(stub, command):
    # runs a module the way coverage, debugpy and torchrun's workers do
    runner = """
import runpy, sys
sys.argv = sys.argv[sys.argv.index("-m") + 1 :]
runpy.run_module(sys.argv[0], run_name="__main__")
"""
    write_files(stub, {"runner.py": runner})
    assert start(stub, *command, "--recipe=pi-rl").stdout == "ours learner ['--recipe=pi-rl']\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--config_path=plain.json"],
        ["--config_path=null.json"],
        ["--config_path=broken.json"],
        ["--config_path=somebody/a-model-on-the-hub"],
    ],
)
def test_without_a_recipe_lerobots_own_command_runs(stub, arguments):
    result = start(stub, "-m", LEARNER, *arguments)
    assert result.stdout == f"upstream __main__ {arguments}\n"
    assert result.stderr == ""


def test_the_switch_turns_it_off(stub):
    result = start(stub, "-m", LEARNER, "--recipe=pi-rl", LEROBOT_PIRL_DISABLE="1")
    assert result.stdout == "upstream __main__ ['--recipe=pi-rl']\n"
    assert result.stderr == ""


def test_importing_the_module_is_not_running_it(stub):
    code = f"import {LEARNER} as m; m.main()"
    assert start(stub, "-c", code, "--recipe=pi-rl").stdout == f"upstream {LEARNER} ['--recipe=pi-rl']\n"


def test_the_finder_answers_once(stub):
    code = f"""
import sys
from importlib.util import find_spec
from lerobot_pirl.startup.hook import Redirect
print(sys.meta_path.count(Redirect))
print(find_spec("{LEARNER}").origin)
print(find_spec("{LEARNER}").origin)
print(sys.meta_path.count(Redirect))
"""
    lines = start(stub, "-c", code, "-m", LEARNER, "--recipe=pi-rl").stdout.split()
    assert lines[0] == "1" and lines[3] == "0"
    assert lines[1].endswith("learner_main.py") and "lerobot_pirl" in lines[1]
    assert lines[2] == str(stub / "lerobot" / "rl" / "learner.py")


def test_the_finder_leaves_every_other_module_alone(stub):
    code = f"""
import lerobot.rl.actor, lerobot.scripts.lerobot_train, json.tool
from lerobot_pirl.startup.hook import Redirect
print(lerobot.rl.actor.main.__module__, lerobot.scripts.lerobot_train.main.__module__)
print([Redirect.find_spec(name) for name in ("lerobot", "lerobot.rl", "{ACTOR}", "{TRAIN}", "numpy", "")])
"""
    out = start(stub, "-c", code, "-m", LEARNER, "--recipe=pi-rl").stdout.splitlines()
    assert out == [f"{ACTOR} {TRAIN}", str([None] * 6)]


@pytest.mark.parametrize("version", ["0.6.0", "0.7.0", "1.0"])
def test_with_an_unknown_lerobot_it_says_which_it_knows_and_stays_out(stub, version):
    (stub / "lerobot-0.6.1.dist-info").rename(stub / f"lerobot-{version}.dist-info")
    metadata = stub / f"lerobot-{version}.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("0.6.1", version))
    result = start(stub, "-m", LEARNER, "--recipe=pi-rl")
    assert result.stdout == "upstream __main__ ['--recipe=pi-rl']\n"
    assert result.stderr == (
        f"lerobot-pirl stays out and LeRobot runs as it is: lerobot {version} is installed, but this version knows "
        "lerobot >= 0.6.1, < 0.7; install one of those\n"
    )
    assert start(stub, "-m", LEARNER).stderr == ""


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_worker_processes_of_a_redirected_run_work(stub, method):
    worker = f"""
import multiprocessing, sys

def report(queue):
    main = sys.modules.get("__mp_main__", sys.modules["__main__"])
    queue.put([main.__file__, "lerobot.rl" in sys.modules, "lerobot_pirl.startup.hook" in sys.modules])

def start():
    context = multiprocessing.get_context("{method}")
    queue = context.Queue()
    process = context.Process(target=report, args=(queue,))
    process.start()
    print(*queue.get(timeout=60))
    process.join(60)
    print(process.exitcode)
"""
    write_files(stub, {"worker.py": worker})
    with (stub / "sitecustomize.py").open("a") as file:
        file.write("\ndef main():\n    import worker\n    worker.start()\nmodule.main = main\n")
    out = start(stub, "-m", ACTOR, "--recipe=pi-rl").stdout.split()
    assert out[0].endswith("actor_main.py")
    # a worker that is not forked does not import LeRobot's actor to find its main module
    assert out[1:3] == (["True", "True"] if method == "fork" else ["False", "False"])
    assert out[3] == "0"


# fresh interpreters: what it costs, and that it can do no harm


def modules_of(stub: Path, *arguments: str) -> set[str]:
    code = "import sys; print(*sys.modules)"
    return set(check_run(sys.executable, "-c", code, *arguments, cwd=stub).split())


def test_an_unrelated_interpreter_imports_nothing_of_it(stub):
    assert not {name for name in modules_of(stub) if name.startswith("lerobot")}


def test_a_concerned_interpreter_imports_the_hook_and_no_more(stub):
    added = modules_of(stub, "-m", LEARNER, "--recipe=pi-rl") - modules_of(stub)
    assert added == OURS


def test_deciding_takes_the_standard_library_alone(stub):
    code = f"""
import sys
before = set(sys.modules)
from lerobot_pirl.startup.hook import Redirect
assert Redirect.find_spec("{LEARNER}") is not None
print(*sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} - sys.stdlib_module_names))
"""
    arguments = ["-m", LEARNER, "--config_path=recipe.json"]
    assert start(stub, "-c", code, *arguments).stdout == "\n"


def test_an_error_in_the_finder_leaves_lerobot_running(stub):
    with (stub / "sitecustomize.py").open("a") as file:
        file.write(
            "\nfrom lerobot_pirl.startup import hook\n"
            "def fail(argv):\n    raise ZeroDivisionError('oops')\n"
            "hook.selected_recipe = fail\n"
        )
    result = start(stub, "-m", LEARNER, "--recipe=pi-rl")
    assert result.stdout == "upstream __main__ ['--recipe=pi-rl']\n"
    assert result.stderr == "lerobot-pirl stays out and LeRobot runs as it is: ZeroDivisionError: oops\n"


def test_an_error_is_survived_without_a_standard_error_stream(stub, monkeypatch):
    def fail(argv):
        raise ZeroDivisionError

    monkeypatch.setattr(hook, "selected_recipe", fail)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", LEARNER])
    monkeypatch.setattr(sys, "stderr", None)
    assert hook.Redirect.find_spec(LEARNER) is None


def test_a_lerobot_without_metadata_is_left_alone(stub, monkeypatch, capsys):
    def version(name):
        raise ModuleNotFoundError(f"No package metadata was found for {name}")

    monkeypatch.setattr("importlib.metadata.version", version)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", LEARNER, "--recipe=pi-rl"])
    monkeypatch.setattr(sys, "meta_path", [hook.Redirect, *sys.meta_path])
    assert hook.Redirect.find_spec(LEARNER) is None
    assert "No package metadata was found for lerobot" in capsys.readouterr().err


def test_a_package_that_cannot_be_imported_stops_no_interpreter(stub):
    write_files(stub, {"lerobot_pirl/__init__.py": "raise RuntimeError('half uninstalled')\n"})
    result = start(stub, "-m", LEARNER, "--config_path=plain.json")
    assert result.stdout == "upstream __main__ ['--config_path=plain.json']\n"
    assert "half uninstalled" in result.stderr
    assert start(stub, "-c", "pass").stderr == ""


# lerobot-train


TRAIN_ANSWER = """\
lerobot-train cannot run a recipe: online RL needs a learner and an actor. Use, in two terminals:
  python -m lerobot.rl.learner --config_path 'my config.json' --steps=3
  python -m lerobot.rl.actor --config_path 'my config.json' --steps=3
"""


def lerobot_train() -> list[list[str]]:
    """Both ways to start the trainer of the running environment."""
    return [["-m", TRAIN], [str(Path(sys.executable).parent / "lerobot-train")]]


@pytest.mark.parametrize("way", ["module", "script"])
def test_lerobot_train_names_the_two_commands_to_use_instead(tmp_path, way):
    (tmp_path / "my config.json").write_text(json.dumps({"recipe": "pi-rl"}))
    command = lerobot_train()[way == "script"]
    result = run(sys.executable, *command, "--config_path", "my config.json", "--steps=3", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", TRAIN_ANSWER)


@pytest.mark.parametrize("command", [["-m", TRAIN], ["lerobot-train"], ["-X", "dev", "lerobot-train"]])
def test_lerobot_train_without_a_recipe_is_lerobots(stub, command):
    result = start(stub, *command, "--config_path=plain.json")
    name = "__main__" if command == ["-m", TRAIN] else TRAIN
    assert result.stdout == f"upstream {name} ['--config_path=plain.json']\n"


@pytest.mark.parametrize("script", ["lerobot-train", "lerobot-train.exe"])
def test_lerobot_trains_script_is_redirected_under_interpreter_options(stub, script):
    (stub / script).write_text((stub / "lerobot-train").read_text())
    result = run(sys.executable, "-X", "dev", "-u", script, "--recipe=pi-rl", cwd=stub, PYTHONPATH=str(stub))
    assert result.returncode == 2
    assert "  python -m lerobot.rl.learner --recipe=pi-rl\n" in result.stderr


# the real commands


@pytest.mark.slow
@pytest.mark.parametrize("role", ["learner", "actor"])
def test_the_real_command_shows_the_recipes_options(tmp_path, role):
    arguments = ["--recipe=pi-rl", "--algorithm.type=pi-rl", "--help"]
    out = check_run(sys.executable, "-m", f"lerobot.rl.{role}", *arguments, cwd=tmp_path, timeout=300)
    for option in ("--recipe", "--algorithm.num_denoising_steps", "--algorithm.wire.port"):
        assert f"  {option} " in out, out
