"""A run's numbers: what is written, what a resume keeps, and the pictures drawn of them."""

import errno
import json
import logging
import math
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from lerobot_pirl import cli
from lerobot_pirl.launch import parse_config
from lerobot_pirl.learner import Learner
from lerobot_pirl.metrics import MetricsLog, iteration_line
from lerobot_pirl.plots import (
    mean_and_interval,
    moving_average,
    plot_run,
    plot_together,
    read_metrics,
    sparkline,
    summary,
    wilson_interval,
)
from tests.test_checkpoint import new_run


def record(iteration: int, success: float = 0.5) -> dict:
    numbers = ("train/approx_kl", "train/clip_fraction", "train/explained_variance", "rollout/reward_mean")
    times = [f"time/{name}_s" for name in ("env", "inference", "update", "transfer", "iteration")]
    return {
        "iteration": iteration,
        "policy_version": iteration - 1,
        "rollout/success_rate": success,
        **dict.fromkeys((*numbers, *times), 0.25),
    }


def evaluation(iteration: int, success: float) -> dict:
    return {
        "iteration": iteration,
        "policy_version": iteration,
        "eval/success_rate": success,
        "time/eval_s": 0.5,
    }


def log_of(
    folder, iterations_done: int = 0, evaluated_version: int = -1, tensorboard: bool = False
) -> MetricsLog:
    wandb = SimpleNamespace(enable=False, project=None)
    cfg = SimpleNamespace(output_dir=folder, wandb=wandb, tensorboard=tensorboard)
    return MetricsLog(cfg, iterations_done, evaluated_version)


def write_run(folder, rates, evaluations: dict[int, float] | None = None) -> None:
    """Write a log with these success rates, and those of evaluations by the number of updates before them."""
    log, evaluations = log_of(folder), evaluations or {}
    for iteration, rate in enumerate([None, *rates]):
        if iteration:
            log.write(record(iteration, rate))
        if iteration in evaluations:
            log.write(evaluation(iteration, evaluations[iteration]))
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


def kept_aside(folder: Path, iteration: int) -> list[tuple[int, float]]:
    """Return iteration and success of the lines that a resume after an update put aside."""
    lines = (folder / f"metrics.before-{iteration}.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["iteration"], r.get("rollout/success_rate", r.get("eval/success_rate"))) for r in records]


def test_what_a_resume_drops_is_kept_beside_the_log_and_said(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_run(tmp_path, [0.1, 0.2, 0.3], {3: 0.7})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "cut sh')
    log = log_of(tmp_path, iterations_done=1)
    assert kept_aside(tmp_path, 1) == [(2, 0.2), (3, 0.3), (3, 0.7)]
    (line,) = [r.message for r in caplog.records]
    assert line.startswith(f"3 lines of {tmp_path}/metrics.jsonl, ")
    assert line.endswith("kept in metrics.before-1.jsonl")
    log.write(record(2, 0.9))
    log_of(tmp_path, iterations_done=1)
    assert kept_aside(tmp_path, 1) == [(2, 0.2), (3, 0.3), (3, 0.7), (2, 0.9)]
    assert [r["iteration"] for r in read_metrics(tmp_path)] == [1]


def test_half_a_line_alone_is_not_kept_aside(tmp_path):
    write_run(tmp_path, [0.1])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 100)
    log_of(tmp_path, iterations_done=1)
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    assert [r["iteration"] for r in read_metrics(tmp_path)] == [1]


DAMAGE = {
    "NUL": b"\0" * 40,
    "garbage": b"\xff\xfe{",
    "empty": b"",
    "cut": b'{"iteration": 2, "rol',
    "no iteration": b'{"loss": 1}',
    "iteration of another type": b'{"iteration": "2"}',
    "no object": b"[2]",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_line_is_named_by_a_resume_and_a_plot_and_the_log_left_as_it_is(tmp_path, damage):
    write_run(tmp_path, [0.1, 0.2, 0.3])
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"".join(line + b"\n" for line in [lines[0], damage, lines[2]]))
    before = path.read_bytes()
    for read in (lambda: log_of(tmp_path, iterations_done=1), lambda: read_metrics(tmp_path)):
        with pytest.raises(ValueError, match="^line 2 of") as caught:
            read()
        assert str(caught.value) == (
            f"line 2 of {path} is no JSON object with an iteration; remove the line and try again"
        )
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_log_that_needs_no_change_is_left_alone(tmp_path):
    write_run(tmp_path, [0.1, 0.2])
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    log_of(tmp_path, iterations_done=2)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before


def test_a_resume_keeps_the_evaluations_of_its_checkpoint_and_drops_those_it_does_again(tmp_path):
    write_run(tmp_path, [0.1, 0.2, 0.3], {0: 0.0, 2: 0.5, 3: 0.6})
    log_of(tmp_path, iterations_done=2, evaluated_version=0)
    kept = [(r["iteration"], "eval/success_rate" in r) for r in read_metrics(tmp_path)]
    assert kept == [(0, True), (1, False), (2, False)]


# --- a full disk ---------------------------------------------------------------------------------


@contextmanager
def size_limit(size: int) -> Iterator[None]:
    """Let no file grow beyond ``size`` bytes: as on a disk that is full, a write falls short and the next one fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("room", [0, 1, 100], ids=["none", "a byte", "some"])
def test_what_a_full_disk_refuses_is_kept_and_written_later_in_whole_lines(tmp_path, caplog, room):
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    log, path = log_of(tmp_path), tmp_path / "metrics.jsonl"
    log.write(record(1))
    whole = path.read_bytes()
    with size_limit(len(whole) + room):
        log.write(record(2))
        assert path.read_bytes() == whole
        log.write(evaluation(2, 0.5))
        assert path.read_bytes() == whole
    assert [r.message.startswith(f"{path} cannot be written") for r in caplog.records] == [True, True]
    log.write(record(3))
    expected = [record(1), record(2), evaluation(2, 0.5), record(3)]
    assert read_metrics(tmp_path) == expected
    log.write(record(4))
    assert read_metrics(tmp_path) == [*expected, record(4)]


def test_a_line_is_on_the_disk_before_its_writing_is_over(tmp_path, monkeypatch):
    synced = []

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((path.name, path.read_bytes().count(b"\n")))

    monkeypatch.setattr(os, "fsync", fsync)
    log = log_of(tmp_path)
    for iteration in (1, 2):
        log.write(record(iteration))
    assert synced == [("metrics.jsonl", 1), ("metrics.jsonl", 2)]
    log_of(tmp_path, iterations_done=1)
    assert synced[2:] == [("metrics.before-1.jsonl", 1), ("metrics.new", 1)]


def test_what_could_not_be_flushed_is_not_taken_for_written(tmp_path, monkeypatch):
    log, path = log_of(tmp_path), tmp_path / "metrics.jsonl"

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        log.write(record(1))
        assert path.read_bytes() == b""
        with pytest.raises(OSError, match=f"^{path} cannot be written .*Input/output error"):
            log.flush()
    log.flush()
    assert read_metrics(tmp_path) == [record(1)]


def test_the_end_writes_what_is_left(tmp_path):
    log = log_of(tmp_path)
    with size_limit(0):
        log.write(record(1))
    log.close()
    assert read_metrics(tmp_path) == [record(1)]


def test_the_end_says_what_is_lost(tmp_path, caplog):
    log = log_of(tmp_path)
    with size_limit(0):
        log.write(record(1))
        log.write(record(2))
        caplog.clear()
        log.close()
    (line,) = [r.message for r in caplog.records]
    assert line.startswith(f"{tmp_path}/metrics.jsonl cannot be written (")
    assert line.endswith("; 2 of its lines are lost")


def test_a_folder_that_is_gone_for_a_while_costs_no_record(tmp_path):
    log = log_of(tmp_path / "run")
    os.rename(tmp_path / "run", tmp_path / "elsewhere")
    log.write(record(1))
    os.rename(tmp_path / "elsewhere", tmp_path / "run")
    log.write(record(2))
    assert [r["iteration"] for r in read_metrics(tmp_path / "run")] == [1, 2]


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
            self._wandb = SimpleNamespace(
                finish=lambda: seen.append("finished"),
                define_metric=lambda names, step_metric: seen.append((names, step_metric)),
            )
            self.log_policy = seen.append
            self.log_dict = lambda numbers, custom_step_key: seen.append(
                (numbers[custom_step_key], len(numbers), custom_step_key)
            )

    monkeypatch.setattr("lerobot.common.wandb_utils.WandBLogger", FakeLogger)
    wandb = SimpleNamespace(enable=True, project="piRL")
    log = MetricsLog(SimpleNamespace(output_dir=tmp_path, wandb=wandb, tensorboard=False), 0)
    log.write(record(1) | {"train/explained_variance": float("nan")})
    log.log_checkpoint(tmp_path)
    log.close()
    assert seen == [
        ("train/*", "train/iteration"),
        (1, len(record(1)) - 1, "iteration"),
        tmp_path,
        "finished",
    ]


@pytest.mark.parametrize("call", ["log_dict", "log_policy"])
def test_a_wandb_that_fails_costs_nothing_but_itself(tmp_path, monkeypatch, caplog, call):
    class FailingLogger:
        def __init__(self, cfg):
            self._wandb = SimpleNamespace(
                finish=lambda: pytest.fail("it is not asked again"),
                define_metric=lambda *args, **kwargs: None,
            )

        def fail(self, *args, **kwargs):
            raise ConnectionResetError("Connection lost")

        log_dict = log_policy = fail

    monkeypatch.setattr("lerobot.common.wandb_utils.WandBLogger", FailingLogger)
    wandb = SimpleNamespace(enable=True, project="piRL")
    log = MetricsLog(SimpleNamespace(output_dir=tmp_path, wandb=wandb, tensorboard=False), 0)
    if call == "log_policy":
        log.log_checkpoint(tmp_path)
    for number in (1, 2):
        log.write(record(number))
    log.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert caplog.text.count("wandb ends here (ConnectionResetError: Connection lost); the numbers in") == 1


def test_a_wandb_that_does_not_start_is_refused_with_a_sentence(tmp_path, monkeypatch):
    def refuse(cfg):
        raise type("UsageError", (Exception,), {})("No API key configured")

    monkeypatch.setattr("lerobot.common.wandb_utils.WandBLogger", refuse)
    cfg = SimpleNamespace(
        output_dir=tmp_path,
        wandb=SimpleNamespace(enable=True, project="piRL"),
        tensorboard=False,
        resume=False,
    )
    with pytest.raises(ValueError, match="wandb does not start .UsageError: No API key configured.; log in"):
        MetricsLog(cfg, 0)


def test_what_would_refuse_a_log_is_found_before_anything_is_written(tmp_path, monkeypatch):
    off = SimpleNamespace(enable=False, project=None)
    cfg = SimpleNamespace(output_dir=tmp_path / "run", wandb=off, tensorboard=False)
    MetricsLog.check(cfg)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="tensorboard"):
        MetricsLog.check(SimpleNamespace(**vars(cfg) | {"tensorboard": True}))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb.enable=True needs a wandb"):
        MetricsLog.check(
            SimpleNamespace(**vars(cfg) | {"wandb": SimpleNamespace(enable=True, project="piRL")})
        )
    assert not cfg.output_dir.exists()
    cfg.output_dir.mkdir()
    (cfg.output_dir / "metrics.jsonl").write_text("nothing\n")
    with pytest.raises(ValueError, match="line 1 of"):
        MetricsLog.check(cfg)


class FakeWandb:
    """As much of wandb as LeRobot's logger needs; remembers how it was started."""

    def __init__(self) -> None:
        self.starts: list[dict] = []
        self.run = SimpleNamespace(id="the-run", get_url=lambda: "nowhere")

    def init(self, **arguments) -> None:
        self.starts.append(arguments)

    def define_metric(self, names: str, step_metric: str) -> None:
        assert (names, step_metric) == ("train/*", "train/iteration")

    def finish(self) -> None:
        pass


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_SILENT", "True")
    return fake


@pytest.fixture
def resumed_learner(monkeypatch) -> Iterator[Callable[..., Learner]]:
    """Return a function that makes a learner as the command does when it resumes a checkpoint."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    learners = []

    def resume(folder: Path, *arguments: str) -> Learner:
        config = f"--config_path={folder}/pretrained_model/train_config.json"
        options = ("--algorithm.wire.port=0", *arguments)
        monkeypatch.setattr(sys, "argv", ["learner", config, "--resume=true", *options])
        cfg = parse_config(type(new_run(folder).cfg))
        cfg.validate()
        learners.append(Learner(cfg))
        return learners[-1]

    yield resume
    for learner in learners:
        learner.server.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_goes_on_in_its_wandb_run_with_the_config_it_goes_on_with(
    tmp_path, wandb, resumed_learner
):
    run = new_run(tmp_path / "run")
    run.cfg.wandb.enable, run.cfg.wandb.project = True, "piRL"
    MetricsLog(run.cfg, 0)
    assert (wandb.starts[0]["id"], wandb.starts[0]["resume"]) == (None, None)
    run.update(seed=1)
    learner = resumed_learner(run.save(), "--algorithm.gamma=0.5", "--accept_changes=algorithm.gamma")
    _, start = wandb.starts
    assert (start["id"], start["resume"], start["dir"]) == ("the-run", "must", tmp_path / "run")
    assert start["config"] == learner.cfg.to_dict()
    assert (start["config"]["algorithm"]["gamma"], start["config"]["resume"]) == (0.5, True)
    # told to the next checkpoint as well: an accepted change is no longer one
    assert start["config"]["accept_changes"] == ""


def saved_without_wandb(folder: Path) -> Path:
    run = new_run(folder)
    run.update(seed=1)
    return run.save()


WANDB_ON = ("--wandb.enable=true", "--wandb.project=piRL")


@pytest.mark.filterwarnings("ignore")
def test_wandb_turned_on_by_a_resume_says_what_to_do(tmp_path, wandb, resumed_learner):
    with pytest.raises(
        ValueError, match="^wandb.enable=True cannot go on .* previous WandB run ID"
    ) as caught:
        resumed_learner(saved_without_wandb(tmp_path / "run"), *WANDB_ON)
    assert "--wandb.run_id=..., or leave wandb off with --wandb.enable=false" in str(caught.value)
    assert wandb.starts == []


@pytest.mark.filterwarnings("ignore")
def test_wandb_turned_on_by_a_resume_goes_on_in_the_run_that_is_named(tmp_path, wandb, resumed_learner):
    resumed_learner(saved_without_wandb(tmp_path / "run"), *WANDB_ON, "--wandb.run_id=named")
    assert [start["id"] for start in wandb.starts] == ["named"]


# --- TensorBoard ---------------------------------------------------------------------------------


def board_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard shows of a run: (step, value) by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {
        name: [(event.step, round(event.value, 4)) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def log_on_board(folder: Path, rates: dict[int, float], evaluations: dict[int, float], **resumed) -> None:
    log = log_of(folder, tensorboard=True, **resumed)
    for iteration in sorted(rates.keys() | evaluations):
        if iteration in rates:
            log.write(record(iteration, rates[iteration]))
        if iteration in evaluations:
            log.write(evaluation(iteration, evaluations[iteration]))
    log.close()


def test_tensorboard_gets_every_number_but_those_that_are_not_finite(tmp_path):
    log = log_of(tmp_path, tensorboard=True)
    log.write(record(1) | {"train/explained_variance": float("nan")})
    # not only when the run ends
    shown = board_of(tmp_path)
    log.close()
    assert shown.keys() == record(1).keys() - {"iteration", "train/explained_variance"}
    assert shown["rollout/success_rate"] == [(1, 0.5)]
    assert shown["policy_version"] == [(1, 0.0)]


def test_without_the_option_tensorboard_gets_nothing(tmp_path):
    write_run(tmp_path, [0.1])
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_resume_goes_on_in_the_same_tensorboard_folder_and_shows_no_step_twice(tmp_path):
    log_on_board(tmp_path, {1: 0.1, 2: 0.2, 3: 0.3}, {0: 0.0, 2: 0.5, 3: 0.6})
    # the evaluation of policy 2 came after the checkpoint
    log_on_board(tmp_path, {3: 0.7, 4: 0.8}, {2: 0.4}, iterations_done=2, evaluated_version=0)
    shown = board_of(tmp_path)
    assert shown["rollout/success_rate"] == [(1, 0.1), (2, 0.2), (3, 0.7), (4, 0.8)]
    assert shown["eval/success_rate"] == [(0, 0.0), (2, 0.4)]


def test_a_resume_keeps_the_last_evaluation_on_the_board(tmp_path):
    log_on_board(tmp_path, {1: 0.1, 2: 0.2}, {0: 0.0, 2: 0.5})
    log_on_board(tmp_path, {3: 0.7}, {}, iterations_done=2, evaluated_version=2)
    assert board_of(tmp_path)["eval/success_rate"] == [(0, 0.0), (2, 0.5)]


def test_tensorboard_turned_on_by_a_resume_shows_the_run_from_its_start(tmp_path):
    write_run(tmp_path, [0.1, 0.2, 0.3], {0: 0.0})
    log_on_board(tmp_path, {3: 0.9}, {}, iterations_done=2, evaluated_version=0)
    assert board_of(tmp_path)["rollout/success_rate"] == [(1, 0.1), (2, 0.2), (3, 0.9)]
    assert board_of(tmp_path)["eval/success_rate"] == [(0, 0.0)]


def test_a_missing_tensorboard_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="^tensorboard=True needs the package tensorboard") as caught:
        log_of(tmp_path / "run", tensorboard=True)
    assert "pip install 'lerobot-pirl[tensorboard]', or set tensorboard to false" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_tensorboard_that_cannot_write_ends_and_the_log_goes_on(tmp_path, monkeypatch, caplog):
    log = log_of(tmp_path, tensorboard=True)
    log.write(record(1))
    with monkeypatch.context() as patch:
        patch.setattr(log.board, "flush", lambda: (_ for _ in ()).throw(OSError("No space left on device")))
        log.write(record(2))
    log.write(record(3))
    log.close()
    (line,) = [r.message for r in caplog.records]
    assert line.startswith("TensorBoard's numbers end here (No space left on device)")
    assert [r["iteration"] for r in read_metrics(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("count", [1, 25])
def test_curves_are_drawn_as_png(tmp_path, count):
    write_run(tmp_path, [i / count for i in range(count)])
    path = plot_run(tmp_path)
    assert path == tmp_path / "learning_curve.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def drawn(monkeypatch) -> list:
    """Return the figures that will be drawn; none is written, which takes most of the time."""
    from matplotlib import figure, pyplot

    figures: list = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **options: None)
    monkeypatch.setattr(pyplot, "close", figures.append)
    return figures


def test_evaluations_are_drawn_where_they_were_made_and_do_not_disturb_the_rest(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    rates, evaluations = [0.1, 0.2, 0.6, 0.7], {0: 0.0, 2: 0.25, 4: 1.0}
    write_run(tmp_path / "with", rates, evaluations)
    write_run(tmp_path / "without", rates)
    assert summary(tmp_path / "with") == summary(tmp_path / "without")
    for name in ("with", "without"):
        plot_run(tmp_path / name)
    lines = [
        {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines}
        for figure in figures
    ]
    assert lines[0].pop("without noise") == ([0, 2, 4], [0.0, 25.0, 100.0])
    assert lines[0] == lines[1]
    assert lines[0]["with noise, per iteration"] == ([1, 2, 3, 4], [100 * rate for rate in rates])


def test_denoising_steps_have_curves_of_their_own(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    steps = {"train/approx_kl_step0": 0.1, "train/approx_kl_step10": 0.4, "train/approx_kl_step2": 0.2}
    lines = [json.dumps(record(i) | steps) for i in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    plot_run(tmp_path)
    curves = {line.get_label(): list(line.get_ydata()) for line in figures[0].axes[1].lines}
    assert list(curves) == ["step 0", "step 2", "step 10", "all"]
    assert curves["step 10"] == [0.4, 0.4]


def test_runs_together_have_a_mean_and_an_interval(tmp_path, monkeypatch, capsys):
    figures = drawn(monkeypatch)
    folders = []
    for name, rates in {"a": [0.2, 0.4, 0.9], "b": [0.4, 0.4], "c": [0.6, 0.4]}.items():
        write_run(tmp_path / name, rates, {0: rates[0]})
        folders.append(str(tmp_path / name))
    path = tmp_path / "together.png"
    assert cli.main(["plot", *folders, "--together", str(path)]) == 0
    assert f"3 runs together: {path}" in capsys.readouterr().out
    noisy, evaluated = figures[-1].axes
    mean = {line.get_label(): line for line in noisy.lines}["mean of 3 runs, 95 % interval"]
    # one run goes on alone: its curve does, the mean does not
    assert (list(mean.get_xdata()), list(mean.get_ydata())) == ([1, 2], pytest.approx([40, 40]))
    assert list(noisy.lines[0].get_ydata()) == pytest.approx([20, 40, 90])
    # the standard deviation of 20, 40, 60 is 20
    low, high = noisy.collections[0].get_datalim(noisy.transData).intervaly
    half = 4.303 * 20 / math.sqrt(3)
    assert (low, high) == pytest.approx((40 - half, 40 + half), abs=0.1)
    assert list(evaluated.lines[-1].get_ydata()) == pytest.approx([40])


def test_runs_without_evaluations_have_one_picture_together(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    for name in ("a", "b"):
        write_run(tmp_path / name, [0.2, 0.4])
    plot_together([tmp_path / "a", tmp_path / "b"], tmp_path / "together.png")
    (axes,) = figures[-1].axes
    assert axes.get_title() == "Success with noise"


def test_a_run_without_evaluations_does_not_hide_the_mean_of_the_others(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    for name, evaluations in {"a": {0: 0.2, 2: 0.6}, "b": {0: 0.4, 2: 0.4}, "c": {}}.items():
        write_run(tmp_path / name, [0.2, 0.4], evaluations)
    plot_together([tmp_path / name for name in "abc"], tmp_path / "together.png")
    mean = figures[-1].axes[1].lines[-1]
    assert mean.get_label() == "mean of 2 runs, 95 % interval"
    assert list(mean.get_ydata()) == pytest.approx([30, 50])


def test_long_runs_are_smoothed_together(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    for name in ("a", "b"):
        write_run(tmp_path / name, [0.2, 0.4] * 20)
    plot_together([tmp_path / "a", tmp_path / "b"], tmp_path / "together.png")
    (axes,) = figures[-1].axes
    assert axes.get_title() == "Success with noise, mean of 2 updates"
    assert list(axes.lines[-1].get_ydata())[1:] == pytest.approx([30] * 39)


def test_the_interval_of_a_mean_is_wide_for_few_runs_and_none_for_one():
    assert mean_and_interval([3.0]) == (3.0, 0.0)
    assert mean_and_interval([1.0, 3.0]) == (2.0, pytest.approx(12.706))
    # 2.086 for 21 values, from a table of Student's t
    values = [1.0, 3.0] * 10 + [2.0]
    assert mean_and_interval(values) == (2.0, pytest.approx(2.086 / math.sqrt(21), rel=1e-3))


def test_the_interval_of_an_evaluation_is_wilsons():
    assert wilson_interval(0.8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)
    assert wilson_interval(0.0, 20) == pytest.approx((0.0, 0.161), abs=1e-3)
    assert wilson_interval(1.0, 20) == pytest.approx((0.839, 1.0), abs=1e-3)


def test_the_picture_of_a_run_shows_its_health(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    health = {
        "train/ratio_max": 3.0,
        "train/ratio_max_dev_first": 0.0,
        "train/action_change_mm": 0.7,
        "train/policy_grad_norm": 5.0,
        "train/value_grad_norm": 0.5,
    }
    lines = [json.dumps(record(i) | health) for i in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    plot_run(tmp_path)
    shown = {
        axes.get_title(): {line.get_label(): line.get_ydata()[0] for line in axes.lines}
        for axes in figures[0].axes
    }
    assert list(shown["Largest deviation of the ratio from 1"].values()) == [2.0, 1e-6]
    assert 0.7 in shown["Move of executed positions, per update"].values()
    assert shown["Gradient norm before clipping"] == {"policy": 5.0, "value": 0.5}
    assert 0.25 in shown["Explained variance of the value function"].values()


def test_a_run_of_groups_shows_how_many_it_learns_from(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    numbers = record(1) | {"train/groups_kept": 0.75}
    del numbers["train/explained_variance"]
    (tmp_path / "metrics.jsonl").write_text(json.dumps(numbers) + "\n")
    plot_run(tmp_path)
    (axes,) = [axes for axes in figures[0].axes if axes.get_title() == "Share of groups learned from"]
    assert list(axes.lines[0].get_ydata()) == [0.75]


def test_a_picture_that_cannot_be_written_is_named(tmp_path, capsys):
    write_run(tmp_path / "a", [0.2, 0.4])
    assert cli.main(["plot", str(tmp_path / "a"), "--together", str(tmp_path / "none" / "x.png")]) == 1
    assert f"{tmp_path}/none/x.png cannot be written" in capsys.readouterr().err


def test_a_run_that_was_only_evaluated_has_no_curve(tmp_path):
    write_run(tmp_path, [], {0: 0.5})
    with pytest.raises(ValueError, match="has not finished an iteration yet"):
        summary(tmp_path)


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


def test_plot_command_says_what_looks_wrong(tmp_path, capsys):
    log = log_of(tmp_path)
    log.write(record(1) | {"train/ratio_max_dev_first": 0.5})
    log.write(record(2))
    assert cli.main(["plot", str(tmp_path)]) == 0
    _, warning = capsys.readouterr().out.splitlines()
    assert warning.startswith("  update 1: the learner does not find the actor's probabilities")
    assert warning.endswith("; see docs/tuning.md, Ratio off 1")


@pytest.mark.parametrize(("text", "words"), [("", "is empty"), ('{"iteration": 1}\n{"it', "line 2 of")])
def test_a_log_that_cannot_be_read_is_named(tmp_path, text, words):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_metrics(tmp_path)
