"""A run's numbers: what is written, what a resume keeps, and the pictures drawn of them."""

import json
from types import SimpleNamespace

import pytest

from lerobot_pirl import cli
from lerobot_pirl.metrics import MetricsLog, iteration_line
from lerobot_pirl.plots import moving_average, plot_run, read_metrics, sparkline, summary


def record(iteration: int, success: float = 0.5) -> dict:
    numbers = ("train/approx_kl", "train/clip_fraction", "train/explained_variance", "rollout/reward_mean")
    times = [f"time/{name}_s" for name in ("env", "inference", "update", "transfer", "iteration")]
    return {
        "iteration": iteration,
        "policy_version": iteration - 1,
        "rollout/success_rate": success,
        **dict.fromkeys((*numbers, *times), 0.25),
    }


def log_of(folder, iterations_done: int = 0) -> MetricsLog:
    wandb = SimpleNamespace(enable=False, project=None)
    return MetricsLog(SimpleNamespace(output_dir=folder, wandb=wandb), iterations_done)


def write_run(folder, rates) -> None:
    log = log_of(folder)
    for iteration, rate in enumerate(rates, 1):
        log.write(record(iteration, rate))
    log.close()


def test_a_record_is_a_line_and_what_is_not_finite_is_null(tmp_path):
    log = log_of(tmp_path / "run")
    log.write(record(1) | {"train/explained_variance": float("nan"), "train/ratio_max": float("inf")})
    (line,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == record(1) | {"train/explained_variance": None, "train/ratio_max": None}


def test_a_resume_drops_what_it_does_again_and_half_a_line(tmp_path):
    write_run(tmp_path, [0.1, 0.2, 0.3, 0.4])
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"iteration": 2, "cut sh')
    log = log_of(tmp_path, iterations_done=2)
    assert [r["iteration"] for r in read_metrics(tmp_path)] == [1, 2]
    log.write(record(3, 0.9))
    assert [r["rollout/success_rate"] for r in read_metrics(tmp_path)] == [0.1, 0.2, 0.9]


def test_a_log_that_needs_no_change_is_left_alone(tmp_path):
    write_run(tmp_path, [0.1, 0.2])
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    log_of(tmp_path, iterations_done=2)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before


def test_the_status_line_tells_progress_success_versions_and_the_time_split():
    line = iteration_line(record(7, 0.625), steps=9)
    for part in (
        "update 7/9",
        "policy 6",
        "success 62%",
        "reward 0.25",
        "KL 0.2500",
        "env 0.2",
        "transfer 0.2",
    ):
        assert part in line


def test_moving_average_starts_with_what_is_there():
    assert moving_average([0.0, 1.0, 2.0, 6.0], 2) == [0.0, 0.5, 1.5, 4.0]
    assert moving_average([3.0], 1) == [3.0]


def test_sparkline_shows_the_range_and_stays_narrow():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert len(sparkline([0.5] * 1000)) <= 60


def test_summary_compares_the_first_and_the_last_tenth(tmp_path):
    write_run(tmp_path, [0.1, 0.1, *[0.5] * 16, 0.9, 0.9])
    text = summary(tmp_path)
    assert text.startswith("success 10% ▁▁▅")
    assert text.endswith("█ 90% over 20 updates")


def test_wandb_gets_numbers_and_checkpoints_and_is_ended(tmp_path, monkeypatch):
    seen = []

    class FakeLogger:
        def __init__(self, cfg):
            self._wandb = SimpleNamespace(finish=lambda: seen.append("finished"))
            self.log_policy = seen.append
            self.log_dict = lambda numbers, step: seen.append((numbers["iteration"], len(numbers), step))

    monkeypatch.setattr("lerobot.common.wandb_utils.WandBLogger", FakeLogger)
    wandb = SimpleNamespace(enable=True, project="piRL")
    log = MetricsLog(SimpleNamespace(output_dir=tmp_path, wandb=wandb), 0)
    log.write(record(1) | {"train/explained_variance": float("nan")})
    log.log_checkpoint(tmp_path)
    log.close()
    assert seen == [(1, len(record(1)) - 1, 1), tmp_path, "finished"]


@pytest.mark.parametrize("count", [1, 25])
def test_curves_are_drawn_as_png(tmp_path, count):
    write_run(tmp_path, [i / count for i in range(count)])
    path = plot_run(tmp_path)
    assert path == tmp_path / "learning_curve.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_command_draws_every_run_and_names_the_one_it_cannot(tmp_path, capsys):
    for name in ("a", "b"):
        write_run(tmp_path / name, [0.2, 0.4])
    assert cli.main(["plot", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert (tmp_path / "a/learning_curve.png").exists()
    assert capsys.readouterr().out.count("over 2 updates") == 2
    assert cli.main(["plot", str(tmp_path / "none"), str(tmp_path / "a")]) == 1
    captured = capsys.readouterr()
    assert "metrics.jsonl is missing" in captured.err
    assert "over 2 updates" in captured.out


@pytest.mark.parametrize(("text", "words"), [("", "is empty"), ('{"iteration": 1}\n{"it', "line 2 of")])
def test_a_log_that_cannot_be_read_is_named(tmp_path, text, words):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_metrics(tmp_path)
