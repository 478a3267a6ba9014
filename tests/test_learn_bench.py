"""The learning benchmark: its configs are valid and agree with its evaluations, its report says what was measured."""

import json
import shlex
import sys

import pytest

from benchmarks import learn
from lerobot_pirl import ppo, registry
from lerobot_pirl.parsing import parse_config

RUNS = {run.name: run for suite in learn.SUITES for run in learn.all_runs(suite)}


@pytest.mark.parametrize("kind", sorted({(run.task, run.kind) for run in RUNS.values()}))
def test_runs_train_on_what_is_evaluated(monkeypatch, kind):
    task, name = kind
    run = RUNS[f"{task}-{name}-1"]
    recipe = registry.recipe("pi-rl").config_class
    monkeypatch.setattr(sys, "argv", ["learner", *run.options, "--seed=1"])
    cfg = parse_config(recipe)
    cfg.validate(check_output_dir=False)
    monkeypatch.setattr(sys, "argv", ["learner", *run.options, *learn.TASKS[task].env])
    evaluated = parse_config(recipe).env
    # a limit of the algorithm's own holds in the environment too
    cfg.env.episode_length = cfg.algorithm.max_episode_steps or cfg.env.episode_length
    assert cfg.env == evaluated
    assert cfg.algorithm.variant == ("flow_noise" if name == "flow_noise" else "flow_sde")
    assert (cfg.algorithm.learning_rate == 0) == (name == "rate_zero")
    assert (cfg.algorithm.advantage == "grpo") == (name == "grpo")
    assert (cfg.algorithm.gripper == "exclude") == (task == "reach" or name in ("exclude", "noise_off"))


def test_every_kind_of_run_has_every_seed_and_a_name_in_the_table():
    tabletop = learn.all_runs("tabletop")
    for run in tabletop:
        assert run.kind in learn.ANNOTATIONS
        assert {f"{run.task}-{run.kind}-{seed}" for seed in learn.SEEDS} <= set(RUNS)
    assert len({run.name for run in tabletop}) == len(tabletop) == 3 * (2 * 2 + 5)


def test_shuffling_gives_every_advantage_to_some_chunk(monkeypatch):
    import torch

    monkeypatch.setattr(ppo, "normalize_advantages", ppo.normalize_advantages)
    advantages = torch.arange(100.0)
    normalized = ppo.normalize_advantages(advantages)
    learn.shuffle_advantages()
    shuffled = ppo.normalize_advantages(advantages)
    assert not torch.equal(shuffled, normalized)
    torch.testing.assert_close(shuffled.sort().values, normalized)


class Commands(learn.Bench):
    """Writes down commands in place of running them; ``prepare`` and evaluations leave what they would."""

    commands = {}

    def command(self, name, words):
        words = [str(word) for word in words]
        self.commands[name] = " ".join(words)
        if name.endswith("-prepare"):
            (self.folder / "start" / name.removesuffix("-prepare")).mkdir(parents=True)
        if name.endswith("-eval"):
            folder = self.folder / "evaluations" / name.removesuffix("-eval")
            folder.mkdir(parents=True)
            (folder / "eval_info.json").write_text('{"overall": {"pc_success": 37.5}}')


def test_a_commands_log_begins_with_it_and_a_failure_tells_its_last_words(tmp_path):
    bench = learn.Bench(tmp_path)
    bench.command("one", [sys.executable, "-c", "print('its output')"])
    line = f"python -c {shlex.quote("print('its output')")}"
    assert (tmp_path / "one.log").read_text() == f"$ {line}\nits output\n"
    assert bench.commands == {"one": line}
    with pytest.raises(RuntimeError, match=r"two exits with status 3, .*two\.log ends with: last words"):
        bench.command("two", [sys.executable, "-c", "print('last words'); raise SystemExit(3)"])
    assert bench.commands.keys() == {"one", "two"} and bench.commands["two"].startswith("python -c ")


def test_a_starting_policy_is_recorded_trained_and_prepared_once(tmp_path):
    bench = Commands(tmp_path)
    bench.commands.clear()
    start = bench.start(learn.TASKS["pickup"])
    assert list(bench.commands) == ["pickup-record", "pickup-train", "pickup-prepare"]
    assert str(start) in bench.commands["pickup-prepare"]
    bench.commands.clear()
    assert bench.start(learn.TASKS["pickup"]) == start
    assert bench.commands == {}


def test_success_is_measured_by_lerobot_within_the_step_limit_on_fixed_and_on_other_states(tmp_path):
    bench = Commands(tmp_path)
    bench.commands.clear()
    assert bench.measure("x", "pickup", tmp_path) == {"success": 0.375, "success_elsewhere": 0.375}
    fixed, elsewhere = bench.commands["x-eval"], bench.commands["x-elsewhere-eval"]
    for command in (fixed, elsewhere):
        assert "lerobot-eval" in command and "--eval.n_episodes=200" in command
        assert "--env.task=pickup" in command and "--env.episode_length=15" in command
    assert "init_states" not in fixed and "--env.init_states=false" in elsewhere
    bench.commands.clear()
    bench.measure("x", "pickup", tmp_path)
    assert bench.commands == {}


def test_progress_tells_the_update_and_the_last_evaluations(tmp_path):
    assert learn.progress(tmp_path) == "no update yet"
    records = [{"iteration": 0, "eval/success_rate": 0.25}, {"iteration": 7, "rollout/success_rate": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert learn.progress(tmp_path) == "update 7, success without noise 25%"


def test_a_side_that_fails_is_told_of_once_the_other_has_ended_and_progress_comes_no_faster(
    tmp_path, monkeypatch
):
    shown = []
    monkeypatch.setattr(learn, "REPORT_EVERY_S", 0.05)
    monkeypatch.setattr(learn, "show", shown.append)
    bench = learn.Bench(tmp_path)
    run = learn.Run("reach", "flow_sde", 1, learner=("-c", "raise SystemExit('no port')"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\n[ $1 = -m ] && exec sleep 0.5\necho no port; exit 2\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(RuntimeError, match="reach-flow_sde-1-learner exits with status 2, .*no port"):
        bench.run_both(run, [])
    assert 1 <= len(shown) < 100
    assert set(shown) == {"reach-flow_sde-1: no update yet"}


def result(seed: int, success: float, seconds: float) -> dict:
    run = {"task": "pickup", "kind": "flow_sde", "seed": seed, "seconds": seconds}
    return run | {"success": success, "success_elsewhere": success - 0.05}


def test_the_table_has_means_intervals_and_the_worst_seed():
    starts = {"pickup": {"success": 0.4, "success_elsewhere": 0.35}}
    results = [result(1, 0.96, 300), result(2, 0.98, 600), result(3, 1.0, 420)]
    rows = learn.summarize(starts, results)
    assert len(rows) == 1 and rows[0]["seeds"] == [1, 2, 3]
    assert rows[0]["lowest"] == 0.96 and rows[0]["minutes"] == 10
    line = learn.table(rows).splitlines()[-1]
    # Student's t with two degrees of freedom: 4.303 * 0.02 / sqrt(3)
    for part in ("Flow-SDE", "40.0%", "98.0 ± 5.0 %", "96.0%", "35.0%", "93.0 ± 5.0 %", "| 10 |"):
        assert part in line
