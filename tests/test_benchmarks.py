"""The benchmarks of speed: that they run at a small size and count what they say; no time is judged."""

import argparse
import json
import signal

import numpy as np
import pytest
import torch

from benchmarks import (
    actors,
    encode_sample,
    fuzz,
    idle,
    iteration,
    memory,
    payload,
    push,
    scaling,
    sizes,
    startup_run,
    table,
    update,
)
from benchmarks import (
    all as all_benchmarks,
)
from benchmarks.gpu import xvla
from benchmarks.ratios import Ratio, report
from lerobot_pirl.envs.chunk import ChunkEnv


@pytest.fixture(scope="module")
def algorithm():
    return sizes.make_algorithm(sizes.make_config("tiny", minibatch_size=16, micro_batch_size=8))


def test_a_made_rollout_is_one_that_an_update_learns_from_with_ratios_of_one(algorithm):
    rollout = sizes.make_rollout(algorithm.adapter, 16, batch_size=8)
    rollout.check()
    assert len(rollout) == 16 and rollout.success.tolist() == [False, True]
    stats = algorithm.update(iter([rollout])).to_log_dict()
    assert stats["ratio_max_dev_first"] < 1e-3


def test_the_sizes_grow():
    counts = [
        sum(p.numel() for p in sizes.make_adapter(sizes.make_config(name)).policy.parameters())
        for name in ("tiny", "mid")
    ]
    assert 1e6 < counts[0] < 3e6 and 3e7 < counts[1] < 4e7


def test_a_decision_is_measured_five_times_at_least(algorithm):
    ratio = encode_sample.compare(algorithm.adapter, "tiny", 2, 0.0)
    assert len(ratio.ours) == len(ratio.theirs) == 5
    assert all(seconds > 0 for seconds in ratio.ours + ratio.theirs)


def test_a_sample_of_an_update_counts_once_per_epoch(monkeypatch):
    monkeypatch.setattr(update, "timed", lambda call, *args: (call(*args), 1.0))
    ratio = update.compare("tiny", 8, 8, rounds=1, rows=16)
    epochs = sizes.make_config("tiny").algorithm.n_epochs
    assert epochs > 1
    assert (ratio.ours, ratio.theirs) == ([16.0 * epochs], [16.0])


def test_an_update_and_the_network_alone_are_measured_without_leaving_gradients():
    ratio = update.compare("tiny", 8, 8, rounds=1, rows=16)
    assert len(ratio.ours) == 1 and ratio.median > 0


def test_the_network_alone_gets_gradients_and_keeps_none(algorithm):
    rollout = sizes.make_rollout(algorithm.adapter, 8, batch_size=8)
    batches = update.bare_batches(algorithm, rollout, 3)
    assert [len(batch["x_t"]) for batch in batches] == [3, 3, 2]
    seen = []
    parameter = next(iter(algorithm.trainable_parameters().values()))
    hook = parameter.register_hook(lambda gradient: seen.append(gradient))
    update.bare(algorithm, batches)
    hook.remove()
    assert len(seen) == 3 and parameter.grad is None


def test_the_bytes_of_a_chunk_are_those_that_a_message_grows_by():
    adapter = sizes.make_adapter(sizes.make_config("tiny"))
    one, two = (payload.message_bytes(sizes.make_rollout(adapter, rows, 8)) for rows in (16, 32))
    # two more episodes, 33 bytes each, and a final row of features
    features = sum(value[0].nbytes for value in sizes.make_rollout(adapter, 8, 8).features.values())
    assert two - one == pytest.approx(16 * payload.chunk_bytes("tiny", 4) + features + 2 * 33, abs=64)


def test_payloads_are_counted():
    tiny, real, stock = payload.compare(pixels=32, episodes=2)
    assert tiny.theirs[0] >= payload.frame_bytes(32) / payload.CHUNK
    # two observations of float32 a step, of which neighbours share one
    assert stock.theirs[0] == pytest.approx(4 * payload.frame_bytes(32), rel=0.2)
    assert tiny.ours == stock.ours and real.ours[0] > tiny.ours[0]


@pytest.mark.skipif(not memory._RESET.exists(), reason="only Linux forgets a process's peak of memory")
def test_the_peak_of_memory_is_that_of_the_block():
    with memory.peak() as held:
        np.ones(64 * 2**20, np.uint8).sum()
    with memory.peak() as nothing:
        pass
    assert held.extra == pytest.approx(64 * 2**20, rel=0.2)
    assert nothing.extra < 4 * 2**20


@pytest.mark.slow
def test_a_push_arrives_in_the_other_process_and_is_measured():
    ratios = push.against_tcp(4, rounds=1)
    assert "raw TCP" in ratios[0].name and all(len(ratio.ours) == 1 for ratio in ratios)
    assert len(push.against_lerobot(0.005, rounds=1).ours) == 1


@pytest.mark.slow
def test_a_waiting_learner_is_measured_and_ended():
    ratios = idle.compare(rounds=1, seconds=0.1, episodes=1)
    assert [len(ratio.ours) for ratio in ratios] == [1, 1]
    # how long was waited
    assert ratios[0].theirs[0] > 0.1


def test_collection_and_update_are_measured_alone_with_their_threads():
    before = torch.get_num_threads()
    options = ["--algorithm.episodes_per_iteration=2", "--algorithm.n_envs=2"]
    assert all(seconds > 0 for seconds in iteration.alone(options, threads=1, repeats=1))
    assert torch.get_num_threads() == before


@pytest.mark.e2e
@pytest.mark.slow
def test_whole_runs_are_measured():
    options = ["--algorithm.episodes_per_iteration=2", "--algorithm.n_envs=2"]
    assert iteration.whole(options, steps=3, threads=1) > 0
    assert startup_run.first_step() > 0


@pytest.mark.e2e
@pytest.mark.slow
def test_a_run_that_fails_says_why():
    with pytest.raises(SystemExit, match=r"lerobot_pirl\.learner[\s\S]*failed:[\s\S]*no_such_option"):
        iteration.whole(["--algorithm.no_such_option=1"], steps=1, threads=1)


def test_the_first_step_is_noted_once(monkeypatch, tmp_path):
    from benchmarks import first_step

    monkeypatch.setattr(ChunkEnv, "step", lambda env, actions: actions)
    first_step.note(tmp_path / "stamp")
    assert ChunkEnv.step(None, 7) == 7
    stamp = (tmp_path / "stamp").read_text()
    assert float(stamp) > 0
    ChunkEnv.step(None, 8)
    assert (tmp_path / "stamp").read_text() == stamp


def test_every_axis_is_another_config_and_becomes_a_plot(monkeypatch, tmp_path):
    for axis, (_, values) in scaling.AXES.items():
        first, last = (scaling.config(axis, value) for value in (values[0], values[-1]))
        assert (first.algorithm, first.policy.hidden_size) != (last.algorithm, last.policy.hidden_size), axis
    monkeypatch.setitem(scaling.AXES, "steps", ("K", [2, 3]))
    monkeypatch.setattr(scaling, "EPISODES", 2)
    monkeypatch.setattr(scaling, "ENVS", 2)
    result = scaling.measure(["steps"], 1, tmp_path)
    assert [set(each) for each in result["steps"]["seconds"]] == [{"collection", "update"}] * 2
    assert (tmp_path / "scaling_steps.png").read_bytes().startswith(b"\x89PNG")


def test_the_script_for_a_gpu_runs_on_a_cpu(monkeypatch):
    monkeypatch.setattr(xvla, "ROWS", 8)
    options = argparse.Namespace(
        **{"size": "tiny", "device": "cpu", "dtype": "float32", "compile": False},
        **{"batches": [2], "micro_batches": [4, 8], "rounds": 1},
    )
    ratios, held = xvla.measure(options)
    assert [len(ratio.ours) for ratio in ratios] == [1, 1, 1]
    assert held == {}


def test_actors_that_sleep_share_an_iteration(monkeypatch):
    for name, value in {"COUNTS": (1, 2), "EPISODES": 6}.items():
        monkeypatch.setattr(actors, name, value)
    said: list[str] = []
    result = actors.measure(1, 0.02, said.append)
    assert set(result["of_linear"]) == {"1", "2"} and result["of_linear"]["1"] == 1.0
    assert result["median_s"]["1"] > 6 * actors.CHUNKS_PER_EPISODE * 0.02
    assert [line.partition(":")[0] for line in said[:2]] == ["1 actors", "2 actors"]


@pytest.mark.filterwarnings("ignore")
def test_a_learner_under_attack_goes_on_training(tmp_path):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        part = fuzz.streams(40, seed=0, folder=tmp_path)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert sum(part.outcomes.values()) == 40 and not set(part.outcomes) & set(fuzz.HUNG)
    assert part.outcomes["INVALID_ARGUMENT"] > 20


def ratio(**options) -> Ratio:
    one = Ratio(**{"name": "ours to theirs", "unit": "s", "target": 0.5, "at_least": False} | options)
    one.add(1.0, 4.0)
    return one


def test_the_table_shows_every_result_with_its_target_and_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.ratios.RESULTS", tmp_path)
    report([ratio(), ratio(target=0.2), ratio(target=0.2, at_least=True)], "idle", {}, write=True)
    text = table.table(tmp_path)
    assert text.count("\n| `idle` | ours to theirs | 1 s | 4 s | 0.25 | ") == 3
    assert "| <= 0.5 | met |" in text and "| <= 0.2 | missed |" in text and "| >= 0.2 | met |" in text
    assert text.count("not measured") == len(table.NAMES) - 1
    assert "Measured on" in text and json.loads((tmp_path / "idle.json").read_text())["machine"]["cpus"] > 0
    page = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    assert table.replaced(page, "new") == f"before\n{table.BEGIN}\n\nnew\n\n{table.END}\nafter\n"
    with pytest.raises(ValueError, match="has no lines"):
        table.replaced("nothing", "new")


def test_the_page_has_a_place_for_the_table():
    page = table.PAGE.read_text()
    assert table.replaced(page, "x") != page


def test_all_benchmarks_are_run_and_one_that_fails_is_told(monkeypatch, capsys):
    commands = []

    def run(command):
        commands.append(command[2])
        return argparse.Namespace(returncode=int("idle" in command[2]))

    monkeypatch.setattr(all_benchmarks.subprocess, "run", run)
    monkeypatch.setattr(all_benchmarks.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["all"])
    assert all_benchmarks.main() == 1
    assert commands == [f"benchmarks.{name}" for name in table.NAMES if name not in all_benchmarks.LIBERO]
    printed = capsys.readouterr().out
    assert "failed: idle" in printed and "rollout_libero: left out, LIBERO is not installed" in printed
    monkeypatch.setattr("sys.argv", ["all", "push"])
    assert all_benchmarks.main() == 0
    monkeypatch.setattr("sys.argv", ["all", "psuh"])
    with pytest.raises(SystemExit):
        all_benchmarks.main()
    assert "unknown benchmark psuh" in capsys.readouterr().err
