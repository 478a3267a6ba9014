"""The command ``lerobot-pirl``: its options, and doctor's table on machines that lack something."""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import site
import socket
import subprocess
import sys
import venv
from pathlib import Path
from types import SimpleNamespace

import importlib_metadata
import pytest

from lerobot_pirl import __version__, cli, doctor, registry
from lerobot_pirl.doctor import FAIL, OK, WARN, Check
from lerobot_pirl.options import WireConfig
from lerobot_pirl.policies.xvla_processors import PACKAGED_TOKENIZER, resolve_tokenizer
from tests.toy import CONFIGS, read_json, tiny_config

pytestmark = pytest.mark.filterwarnings("ignore")

TABLETOP = CONFIGS / "pirl_tabletop.json"
needs_libero_package = pytest.mark.skipif(
    importlib.util.find_spec("libero") is None, reason="hf-libero is not installed"
)


def table(output: str) -> dict[str, tuple[str, str]]:
    """Return doctor's rows (result, detail) by name; a row that is no row fails."""
    head, *rows, summary = output.splitlines()
    result_at, detail_at = head.index("result"), head.index("detail")
    assert head.split() == ["check", "result", "detail"]
    assert f"{len(rows)} checks" in summary
    result = {
        row[:result_at].strip(): (row[result_at:detail_at].strip(), row[detail_at:].strip()) for row in rows
    }
    assert len(result) == len(rows)
    assert {status for status, _ in result.values()} <= {OK, WARN, FAIL}
    return result


def one(checks) -> Check:
    (check,) = checks
    assert "\n" not in check.detail
    return check


# the command


def test_help_and_version_import_neither_torch_nor_lerobot():
    script = (
        "import sys, contextlib\nfrom lerobot_pirl.cli import main\n"
        "for option in ('--help', '--version'):\n"
        "    with contextlib.suppress(SystemExit): main([option])\n"
        "print({'torch', 'lerobot', 'transformers', 'numpy', 'importlib_metadata'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "doctor" in done.stdout
    assert f"lerobot-pirl {__version__}" in done.stdout
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("argv", [[], ["docter"], ["doctor", "config.json"], ["doctor", "--config_path"]])
def test_a_command_line_that_is_wrong_is_told_with_the_usage(argv, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(argv)
    assert left.value.code == 2
    assert "usage: lerobot-pirl" in capsys.readouterr().err


def test_every_subcommand_explains_itself(capsys):
    for name, add in cli.SUBCOMMANDS.items():
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        assert add.__doc__ in " ".join(capsys.readouterr().out.split())


def test_an_interrupt_ends_without_a_traceback(monkeypatch):
    def interrupt(config_path: str | None) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupt)
    assert cli.main(["doctor"]) == 130


def test_a_reader_that_leaves_early_gets_no_traceback():
    command = [sys.executable, "-m", "lerobot_pirl.cli", "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("check")
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == cli.EXIT_FAILED


# the table


@pytest.fixture(scope="module")
def report() -> tuple[int, dict[str, tuple[str, str]]]:
    """Doctor's exit status and rows on this machine with the tabletop config."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = cli.main(["doctor", "--config_path", str(TABLETOP)])
    return status, table(output.getvalue())


def test_this_machine_is_well(report):
    status, rows = report
    assert [name for name, (result, _) in rows.items() if result == FAIL] == []
    assert status == 0


def test_versions_are_the_installed_ones(report):
    rows = report[1]
    for name in ("lerobot-pirl", "torch", "grpcio", "safetensors"):
        assert rows[name] == (OK, importlib_metadata.version(name))
    lerobot = importlib_metadata.version("lerobot")
    assert rows["lerobot"] == (OK, f"{lerobot} (supported: {registry.SUPPORTED_LEROBOT})")
    assert rows["python"][1].startswith(f"{sys.version_info[0]}.{sys.version_info[1]}.")
    assert rows["device"][1].startswith(("cpu", "cuda ("))


def test_every_entry_point_is_there_with_its_distribution(report):
    rows = report[1]
    ours = f"from lerobot-pirl {importlib_metadata.version('lerobot-pirl')}"
    assert rows["recipe pi-rl"] == (OK, f"lerobot_pirl.config:RECIPE {ours}")
    assert rows["policy adapter xvla"][1].endswith(ours)
    assert rows["checkpoint validator pi-rl"][1].endswith(ours)


def test_hook_tokenizer_config_libero_and_port_are_there(report):
    rows = report[1]
    assert rows["start-up hook"][1].endswith("learner_main.py")
    assert PACKAGED_TOKENIZER in rows["tokenizer"][1]
    assert rows["config"] == (OK, f"{TABLETOP}: recipe pi-rl, policy xvla, environment tabletop")
    assert "LIBERO package" in rows
    assert "port 50051" in rows


@pytest.mark.parametrize(
    ("results", "status", "summary"),
    [
        ([OK, OK], 0, "2 checks, 0 warnings, 0 failed"),
        ([OK, WARN], 0, "2 checks, 1 warnings, 0 failed"),
        ([FAIL, OK, WARN], 1, "3 checks, 1 warnings, 1 failed"),
    ],
)
def test_the_exit_status_is_that_of_the_worst_row(results, status, summary, monkeypatch, capsys):
    checks = [Check(f"check {i}", result, "detail") for i, result in enumerate(results)]
    monkeypatch.setattr(doctor, "diagnose", lambda config_path: iter(checks))
    assert cli.main(["doctor"]) == status
    assert capsys.readouterr().out.splitlines()[-1] == summary


@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(3), OSError(2, "no such\nfile")])
def test_what_a_check_raises_becomes_a_row_after_those_before(error):
    def broken():
        yield Check("first", OK, "")
        raise error

    first, second = doctor._guarded("broken", broken)
    assert first.name == "first"
    assert (second.name, second.status) == ("broken", FAIL)
    assert second.detail.startswith(type(error).__name__)
    assert "\n" not in second.detail


# start-up hook


def test_switched_off_is_a_warning_and_the_hook_is_checked_all_the_same(monkeypatch):
    monkeypatch.setenv("LEROBOT_PIRL_DISABLE", "1")
    off, hook = doctor.check_hook()
    assert (off.name, off.status) == ("LEROBOT_PIRL_DISABLE", WARN)
    assert "unset it" in off.detail
    assert hook.status == OK


def test_a_value_that_does_not_switch_off_is_told(monkeypatch):
    monkeypatch.setenv("LEROBOT_PIRL_DISABLE", "yes")
    off, hook = doctor.check_hook()
    assert off.status == WARN
    assert "'yes': without effect" in off.detail
    assert hook.status == OK


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> str:
    """An interpreter of a virtual environment without this package."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True, with_pip=False)
    return str(folder / "bin" / "python")


def test_an_interpreter_that_is_not_redirected_fails_with_the_remedies(bare_python, monkeypatch):
    monkeypatch.setattr(sys, "executable", bare_python)
    check = one(doctor.check_hook())
    assert check.status == FAIL
    assert "lerobot_pirl.pth has no effect" in check.detail
    assert "reinstall lerobot-pirl" in check.detail
    assert "lerobot-pirl-learner and lerobot-pirl-actor" in check.detail


def test_a_missing_pth_file_is_told_with_the_folders(bare_python, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", bare_python)
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(tmp_path)])
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(tmp_path / "user"))
    check = one(doctor.check_hook())
    assert check.status == FAIL
    assert f"lerobot_pirl.pth is in none of {tmp_path}, {tmp_path / 'user'}" in check.detail


# entry points


def add_distribution(folder: Path, name: str, entry_points: str) -> None:
    """Lay out an installed distribution as far as its metadata go."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)


def test_broken_entry_points_of_others_are_named(tmp_path, monkeypatch):
    add_distribution(
        tmp_path,
        "broken-dist",
        "[lerobot_pirl.recipes]\nlost = nowhere.to.be.found:RECIPE\nodd = json:dumps\n"
        "[lerobot_pirl.checkpoint_validators]\npi-rl = json:loads\n",
    )
    monkeypatch.syspath_prepend(tmp_path)
    checks = {check.name: check for check in doctor.check_entry_points()}
    assert checks["recipe pi-rl"].status == checks["policy adapter xvla"].status == OK
    for name, words in {
        "recipe lost": ("ModuleNotFoundError", "nowhere", "broken-dist 1.0", "uninstall"),
        "recipe odd": ("broken-dist 1.0", "instead of a lerobot_pirl.registry.Recipe"),
        "checkpoint validator pi-rl": ("broken-dist 1.0", "lerobot-pirl", "uninstall all but one"),
    }.items():
        assert checks[name].status == FAIL
        assert [word for word in words if word not in checks[name].detail] == []


def test_an_entry_point_of_ours_that_no_distribution_declares_fails(monkeypatch):
    monkeypatch.setattr(registry, "describe", lambda: [])
    checks = list(doctor.check_entry_points())
    assert [check.status for check in checks] == [FAIL] * 3
    assert all("reinstall lerobot-pirl" in check.detail for check in checks)


# config


def write_config(folder: Path, **changes) -> Path:
    config = read_json(TABLETOP)
    for name, value in changes.items():
        part, _, field = name.rpartition("__")
        (config[part] if part else config)[field] = value
    path = folder / "run.json"
    path.write_text(json.dumps(config))
    return path


def refused(path: Path) -> str:
    argv = list(sys.argv)
    cfg, check = doctor.check_config(str(path))
    assert cfg is None
    assert (check.name, check.status) == ("config", FAIL)
    assert "\n" not in check.detail
    assert sys.argv == argv
    return check.detail


def test_a_config_is_validated_without_touching_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    existing = tmp_path / "outputs" / "pirl_tabletop"
    existing.mkdir(parents=True)
    path = write_config(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    cfg, check = doctor.check_config(str(path))
    assert check.status == OK
    assert cfg.algorithm.type == "pi-rl"
    shutil.rmtree(existing.parent)
    assert doctor.check_config(str(path))[1].status == OK
    assert sorted(tmp_path.rglob("*")) == [path]
    assert before == [existing.parent, existing, path]


def test_a_config_that_is_not_there_is_named(tmp_path):
    assert str(tmp_path / "nowhere.json") in refused(tmp_path / "nowhere.json")


def test_a_config_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("{'recipe': 1")
    assert str(path) in refused(path)


def test_a_config_without_a_recipe_gets_the_line_to_add(tmp_path):
    assert 'add "recipe": "pi-rl"' in refused(write_config(tmp_path, recipe=None))


def test_a_config_of_an_unknown_recipe_gets_the_known_ones(tmp_path):
    text = refused(write_config(tmp_path, recipe="pi-lr"))
    assert "unknown recipe 'pi-lr'" in text
    assert "'pi-rl'" in text


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("algorithm__clip_rnage", 0.2, ["algorithm.clip_rnage"]),
        ("algorithm__clip_range", 2, ["algorithm.clip_range", "2", "(0, 1)"]),
        ("algorithm__n_action_steps", 99, ["algorithm.n_action_steps=99", "lower"]),
        ("env__type", "libro", ["env.type='libro'"]),
        ("policy__action_mode", "auto", ["policy.action_mode='auto'", "'ee6d'"]),
    ],
)
def test_a_config_with_a_mistake_fails_with_the_option(name, value, words, tmp_path):
    text = refused(write_config(tmp_path, **{name: value}))
    assert [word for word in words if word not in text] == []


# tokenizer


def test_the_configs_own_tokenizer_is_tried_besides_the_packaged_one(tmp_path):
    cfg = tiny_config()
    cfg.policy.tokenizer_name = str(shutil.copytree(resolve_tokenizer(PACKAGED_TOKENIZER), tmp_path / "own"))
    packaged, own = doctor.check_tokenizers(cfg)
    assert (packaged.status, own.status) == (OK, OK)
    assert own.detail.startswith(cfg.policy.tokenizer_name)
    assert own.detail.rpartition(", ")[2] == packaged.detail.rpartition(", ")[2]


def test_a_tokenizer_that_cannot_be_loaded_fails_with_the_option(tmp_path):
    cfg = tiny_config()
    cfg.policy.tokenizer_name = str(tmp_path)
    packaged, own = doctor.check_tokenizers(cfg)
    assert packaged.status == OK
    assert (own.name, own.status) == ("policy.tokenizer_name", FAIL)
    assert str(tmp_path) in own.detail
    assert "name a folder in policy.tokenizer_name" in own.detail
    assert "\n" not in own.detail


def test_a_damaged_package_fails_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr("lerobot_pirl.policies.xvla_processors.resolve_tokenizer", lambda name: str(tmp_path))
    check = one(doctor.check_tokenizers(None))
    assert check.status == FAIL
    assert "reinstall lerobot-pirl" in check.detail


# LIBERO


def libero_config() -> SimpleNamespace:
    return SimpleNamespace(env=SimpleNamespace(type="libero"))


def test_without_libero_there_is_a_hint_and_a_failure_only_for_a_config_that_needs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "libero", None)
    for cfg in (None, tiny_config()):
        check = one(doctor.check_libero(cfg))
        assert check.status == WARN
        assert check.detail == "not installed; optional: pip install 'lerobot-pirl[libero]'"
    check = one(doctor.check_libero(libero_config()))
    assert check.status == FAIL
    assert "lerobot-pirl[libero]" in check.detail


@needs_libero_package
def test_missing_assets_fail_only_a_config_that_needs_them(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LIBERO_CONFIG_PATH", raising=False)
    monkeypatch.setattr("lerobot_pirl.envs.check.rendered_frame", lambda: "not looked at here")
    for cfg, status in ((None, WARN), (libero_config(), FAIL)):
        rows = {check.name: check for check in doctor.check_libero(cfg)}
        assert rows["LIBERO package"].status == OK
        assert rows["LIBERO assets"].status == status
        assert str(tmp_path) in rows["LIBERO assets"].detail
    assert list(tmp_path.iterdir()) == []


# port


def port_config(**wire) -> SimpleNamespace:
    return SimpleNamespace(algorithm=SimpleNamespace(wire=WireConfig(**wire)))


def test_a_port_where_somebody_listens_is_a_warning():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        taken = one(doctor.check_port(port_config(port=port)))
        assert (taken.name, taken.status) == (f"port {port}", WARN)
        assert "a learner may be running there" in taken.detail
        assert "algorithm.wire.port" in taken.detail
        assert one(doctor.check_port(port_config(port=port, host="localhost"))).status == WARN
    assert one(doctor.check_port(port_config(port=port))).status == OK


def test_a_port_that_a_connection_has_just_left_is_free():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            accepted, _ = listener.accept()
            # the end that closes first keeps the address for a while
            accepted.close()
    assert one(doctor.check_port(port_config(port=port))).status == OK


def test_another_machines_address_is_right_for_an_actor():
    # 192.0.2.0/24 belongs to nobody
    found = one(doctor.check_port(port_config(host="192.0.2.1", token_file=__file__)))
    assert found.status == WARN
    assert "192.0.2.1 is no address of this machine; right for an actor" in found.detail


def test_the_default_port_is_looked_at_without_a_config():
    assert one(doctor.check_port(None)).name == "port 50051"


def test_port_zero_is_any_free_port():
    assert one(doctor.check_port(port_config(port=0))).status == OK


@pytest.mark.parametrize(
    ("host", "word"),
    [("192.0.2.1", "no loopback address"), ("no..host", "no known host")],
)
def test_a_host_that_a_learner_cannot_use_fails(host, word):
    check = one(doctor.check_port(port_config(port=50051, host=host)))
    assert check.status == FAIL
    assert word in check.detail
    assert f"algorithm.wire.host={host!r}" in check.detail


def test_a_token_that_cannot_be_read_fails_and_one_that_can_lets_a_learner_listen_to_others(tmp_path):
    token = tmp_path / "token"
    missing = one(doctor.check_port(port_config(port=0, host="0.0.0.0", token_file=str(token))))
    assert missing.status == FAIL
    assert "algorithm.wire.token_file=" in missing.detail
    token.write_text("x" * 32)
    assert one(doctor.check_port(port_config(port=0, host="0.0.0.0", token_file=str(token)))).status == OK


# everything at once


@pytest.mark.slow
def test_a_machine_in_a_bad_state_gets_a_table_and_no_question(tmp_path):
    """The real command: broken plugins, one that asks, one that quits, no assets, a taken port, switched off."""
    plugins, home = tmp_path / "plugins", tmp_path / "home"
    home.mkdir()
    add_distribution(
        plugins,
        "bad-plugins",
        "[lerobot_pirl.recipes]\nasks = asking:RECIPE\nquits = quitting:RECIPE\n"
        "[lerobot_pirl.policy_adapters]\nlost = nowhere:Adapter\n",
    )
    (plugins / "asking.py").write_text("input('Do you want to go on? ')\n")
    (plugins / "quitting.py").write_text("raise SystemExit(0)\n")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        config = read_json(CONFIGS / "pirl_libero10_smoke.json")
        config["algorithm"]["wire"] = {"port": port}
        (tmp_path / "run.json").write_text(json.dumps(config))
        command = [Path(sys.executable).with_name("lerobot-pirl"), "doctor", "--config_path", "run.json"]
        environment = {
            **{name: value for name, value in os.environ.items() if name != "LIBERO_CONFIG_PATH"},
            **{"PYTHONPATH": str(plugins), "HOME": str(home), "LEROBOT_PIRL_DISABLE": "1"},
        }
        with subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            # stdin stays open and silent: whoever asks waits for ever
            output, errors = process.stdout.read(), process.stderr.read()
    assert process.returncode == 1
    assert errors == ""
    assert "Traceback" not in output
    rows = table(output)
    results = {name: result for name, (result, _) in rows.items()}
    assert results["recipe asks"] == results["recipe quits"] == results["policy adapter lost"] == FAIL
    assert "EOFError" in rows["recipe asks"][1]
    assert "bad-plugins 1.0" in rows["policy adapter lost"][1]
    assert results["LEROBOT_PIRL_DISABLE"] == results[f"port {port}"] == WARN
    assert FAIL in [result for name, result in results.items() if name.startswith("LIBERO")]
    for name in ("lerobot", "start-up hook", "recipe pi-rl", "policy adapter xvla", "config", "tokenizer"):
        assert results[name] == OK
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "plugins", "run.json"]
