"""From a command line to an exit status: what learner and actor share."""

import logging
import signal
import subprocess
import sys
import types

import pytest

from lerobot_pirl import launch, registry
from lerobot_pirl.launch import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REFUSED, RunError
from lerobot_pirl.registry import Recipe
from tests.toy import CONFIGS

CONFIG = f"--config_path={CONFIGS / 'pirl_tabletop.json'}"


@pytest.fixture
def start(monkeypatch, caplog):
    """Run a recipe's learner that is the given function; returns (exit status, log)."""
    handler, loggers = signal.getsignal(signal.SIGTERM), logging.getLogger().handlers[:]
    # the log's set-up would take pytest's handler away
    monkeypatch.setattr(launch, "_init_logging", lambda role: None)
    caplog.set_level(logging.INFO)

    def start(run, *argv: str, reference: str = "stand_in:run") -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["learner", CONFIG, *argv])
        monkeypatch.setitem(sys.modules, "stand_in", types.SimpleNamespace(run=run))
        known = registry.recipe("pi-rl")
        recipe = Recipe(known.name, known.config_class, learner=reference, actor=reference)
        monkeypatch.setattr(registry, "recipe", lambda name: recipe)
        caplog.clear()
        return launch.main("learner"), caplog.text

    yield start
    signal.signal(signal.SIGTERM, handler)
    logging.getLogger().handlers[:] = loggers


def failing(error: BaseException):
    def run(cfg):
        raise error

    return run


def test_the_recipe_runs_with_the_parsed_config_and_its_status_is_the_exit_status(start):
    seen = []
    assert start(lambda cfg: seen.append(cfg.seed), "--seed=7")[0] == 0
    assert seen == [7]
    status, log = start(lambda cfg: 5)
    assert status == 5
    assert "running recipe pi-rl in place of lerobot.rl.learner (LEROBOT_PIRL_DISABLE=1 to stop)" in log


@pytest.mark.parametrize("error", [RunError("the port is taken"), ConnectionError("no learner at x")])
def test_what_a_user_can_mend_is_a_sentence(start, error):
    status, log = start(failing(error))
    assert status == EXIT_FAILED
    assert str(error) in log
    assert "Traceback" not in log


def test_a_defect_keeps_its_traceback(start):
    status, log = start(failing(ValueError("shapes differ")))
    assert status == EXIT_FAILED
    assert "Traceback" in log
    assert "shapes differ" in log


def test_an_interrupt_has_its_own_status(start):
    assert start(failing(KeyboardInterrupt()))[0] == EXIT_INTERRUPTED


@pytest.mark.parametrize("error", [ValueError("a"), OSError("a"), RuntimeError("a")])
def test_setting_up_turns_refusals_into_sentences(error):
    with pytest.raises(RunError, match="a"), launch.user_errors():
        raise error


def test_setting_up_lets_defects_and_interrupts_through():
    for error in (TypeError("a"), KeyboardInterrupt()):
        with pytest.raises(type(error)), launch.user_errors():
            raise error


@pytest.mark.parametrize("reference", ["no_such_module:run", "stand_in:absent"])
def test_a_recipe_whose_learner_is_not_there_is_named(start, reference):
    status, log = start(lambda cfg: 0, reference=reference)
    assert status == EXIT_REFUSED
    assert f"the learner of recipe 'pi-rl', '{reference}', cannot be loaded" in log
    assert "Traceback" not in log


def test_a_command_line_without_a_recipe_says_how_to_select_one(monkeypatch, start, caplog, tmp_path):
    (tmp_path / "plain.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["learner", f"--config_path={tmp_path / 'plain.json'}"])
    assert launch.main("learner") == EXIT_REFUSED
    assert 'no recipe is selected; add "recipe": "pi-rl" to the config file' in caplog.text


@pytest.mark.parametrize(
    "interrupt", [signal.default_int_handler, signal.SIG_IGN], ids=["terminal", "script"]
)
def test_a_service_managers_stop_is_a_ctrl_c(start, monkeypatch, interrupt):
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        start(lambda cfg: 0)
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_exit_status_survives_whoever_read_the_output():
    script = (
        "import sys\nfrom lerobot_pirl.launch import exit_process\n"
        "sys.stderr = None\nsys.stdout.write('x')\nsys.stdout.close()\nexit_process(130)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 130
