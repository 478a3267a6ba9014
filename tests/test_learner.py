"""The learner's loop in one process, with rollouts handed to it instead of sent."""

import copy
import json
import logging
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from lerobot_pirl import checkpoint, folders, metrics, saving
from lerobot_pirl import learner as learner_module
from lerobot_pirl.evaluate import Evaluation
from lerobot_pirl.launch import RunError
from lerobot_pirl.learner import Learner
from lerobot_pirl.restore import CheckpointError
from lerobot_pirl.wire import Message, decode
from tests.test_algorithm import make_rollout
from tests.toy import tiny_config

pytestmark = pytest.mark.filterwarnings("ignore")
EPISODES = 3


@pytest.fixture
def learner(tmp_path):
    cfg = copy.deepcopy(
        tiny_config(
            critic_warmup_iterations=0, minibatch_size=4, micro_batch_size=4, episodes_per_iteration=EPISODES
        )
    )
    cfg.output_dir, cfg.steps, cfg.save_freq = tmp_path / "run", 2, 0
    cfg.algorithm.wire.port, cfg.algorithm.wire.rollout_timeout_s = 0, 0.6
    cfg.algorithm.value_hidden_dims = (16,)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    learner = Learner(cfg)
    yield learner
    learner.server.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def deliver(learner: Learner, version: int | None = None, **header) -> None:
    """Hand over a rollout as an actor would send it."""
    rollout = make_rollout(learner.adapter)
    rollout.policy_version = learner.version if version is None else version
    values, tensors = rollout.to_tensors()
    values |= {"config_hash": learner.metadata.config_hash, "session": learner.session} | header
    learner.server._service.inbox.put(Message("rollout", values, tensors))


def checkpoints(learner: Learner) -> list[str]:
    folder = learner.cfg.output_dir / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_an_iteration_updates_publishes_and_logs(learner):
    deliver(learner)
    before = {name: value.clone() for name, value in learner.algorithm.get_weights().items()}
    learner.iterate()
    after = learner.algorithm.get_weights()
    assert learner.version == 1
    assert any(not torch.equal(before[name], after[name]) for name in before)
    published = decode(learner.server._service.published)
    assert published.header["policy_version"] == 1
    assert published.header["collect"] is True
    assert all(torch.equal(published.tensors[name], after[name]) for name in after)
    (record,) = [json.loads(line) for line in learner.metrics.path.read_text().splitlines()]
    assert (record["iteration"], record["policy_version"], record["episodes"]) == (1, 0, EPISODES)
    assert record["rollout/success_rate"] == pytest.approx(1 / EPISODES)
    parts = sum(record[f"time/{name}_s"] for name in ("env", "inference", "update", "transfer"))
    assert parts <= record["time/iteration_s"] + 1e-6


def test_an_iteration_logs_how_far_it_moved_what_the_policy_does(learner):
    deliver(learner)
    learner.iterate()
    # nothing moves without a step
    learner.algorithm.config.learning_rate = 0.0
    learner.algorithm.make_optimizers_and_scheduler()
    deliver(learner)
    learner.iterate()
    moved, still = [record["train/action_change_mm"] for record in records(learner)]
    assert moved > 1e-3
    assert still == 0.0


def test_episodes_that_are_not_used_are_counted_once(learner):
    deliver(learner, session="former")
    deliver(learner)
    learner.iterate()
    deliver(learner)
    learner.iterate()
    assert [record["rollout/episodes_dropped"] for record in records(learner)] == [EPISODES, 0]


def test_rollouts_that_came_with_an_evaluation_and_too_late_are_counted(learner):
    learner.cfg.env_eval_freq = 1
    for _ in range(2):
        deliver(learner)
    evaluated(learner, [True])
    learner.evaluate()
    learner.iterate()
    deliver(learner)
    evaluated(learner, [True])
    learner.evaluate()
    learner.iterate()
    counted = [r["rollout/episodes_dropped"] for r in records(learner) if "episodes" in r]
    assert counted == [0, EPISODES]


# what goes wrong, in words


SENTENCE = "a ratio is 0.500 off 1; see docs/tuning.md, Ratio off 1"


@pytest.fixture
def sick(learner, monkeypatch):
    """A learner of which every update finds other probabilities than the actor's."""
    update = learner.algorithm.update

    def off(batches):
        stats = update(batches)
        stats.extra["ratio_max_dev_first"] = 0.5
        return stats

    monkeypatch.setattr(learner.algorithm, "update", off)
    return learner


def test_what_looks_wrong_is_told_once_and_at_the_end_with_its_updates(sick, caplog):
    for version in range(2):
        deliver(sick, version=version)
    with caplog.at_level(logging.WARNING):
        sick.run()
    told = [r.message for r in caplog.records if SENTENCE in r.message]
    assert told == [
        f"the learner does not find the actor's probabilities: before the first step {SENTENCE}",
        f"update 1 to 2: the learner does not find the actor's probabilities: before the first step {SENTENCE}",
    ]


def test_an_evaluation_that_fell_is_told(learner, caplog):
    learner.cfg.env_eval_freq = 1
    evaluated(learner, [True] * 16)
    learner.evaluate()
    deliver(learner)
    learner.iterate()
    evaluated(learner, [True, False] * 8)
    with caplog.at_level(logging.WARNING):
        learner.evaluate()
    assert "50% of policy 1, 50 points below the 100% of policy 0" in caplog.text
    assert [r["eval/episodes"] for r in records(learner) if "eval/episodes" in r] == [16, 16]


def test_a_resume_remembers_what_was_told_before(sick, caplog):
    deliver(sick)
    sick.iterate()
    sick.saver.save()
    sick.lock.close()
    sick.server.close()
    cfg = copy.deepcopy(sick.cfg)
    cfg.resume, cfg.checkpoint_path = True, cfg.output_dir / "checkpoints" / "000001"
    cfg.policy.pretrained_path = cfg.checkpoint_path / "pretrained_model"
    caplog.clear()
    again = Learner(cfg)
    again.server.close()
    with caplog.at_level(logging.WARNING):
        again._warn(records(sick)[0] | {"iteration": 2})
    assert SENTENCE not in caplog.text
    with caplog.at_level(logging.WARNING):
        again._warn(records(sick)[0] | {"iteration": 30})
    assert SENTENCE in caplog.text


def test_every_number_that_the_documentation_explains_is_logged(learner):
    tuning = (Path(__file__).parent.parent / "docs/tuning.md").read_text()
    named = set(re.findall(r"`((?:train|rollout|eval|time)/\w+)`", tuning))
    learner.cfg.env_eval_freq = 1
    evaluated(learner, [True])
    learner.evaluate()
    deliver(learner)
    learner.iterate()
    logged = {name for record in records(learner) for name in record}
    # other kinds of runs have these
    others = {"groups_kept", "kl_to_start", "entropy", "noise_std_position_step0"}
    assert named - logged == {f"train/{name}" for name in others}
    assert len(named) > 20


def test_the_last_weights_are_not_to_be_collected_with(learner):
    for _ in range(2):
        deliver(learner)
        learner.iterate()
    assert decode(learner.server._service.published).header["collect"] is False


@pytest.mark.parametrize("header", [{"config_hash": "x"}, {"session": "former"}, {"policy_version": 1}])
def test_a_rollout_made_for_other_weights_is_left_out(learner, header, caplog):
    deliver(learner, **header)
    deliver(learner)
    rollout = learner.receive()
    assert len(rollout.episode_lengths) == EPISODES
    name, value = next(iter(header.items()))
    assert f"refused one rollout: its {name} is {value}" in caplog.text


def test_rollouts_for_others_do_not_keep_a_learner_alive(learner):
    for _ in range(4):
        deliver(learner, session="former")
    with pytest.raises(RunError, match=r"no rollout for 1 s with 0 actors connected"):
        learner.receive()


def test_a_refusal_is_told_and_the_learner_waits_on(learner, caplog):
    learner.server._service.inbox.put(Message("refusal", {"reason": "gamma differs"}))
    deliver(learner)
    learner.receive()
    assert "an actor refused this learner and left:\ngamma differs" in caplog.text


def test_a_rollout_that_cannot_be_used_ends_the_run_with_its_reason_and_a_checkpoint(learner):
    rollout = make_rollout(learner.adapter)
    rollout.chain[0, 0, 0, 0] = torch.nan
    header, tensors = rollout.to_tensors()
    header |= {"config_hash": learner.metadata.config_hash, "session": learner.session}
    learner.server._service.inbox.put(Message("rollout", header, tensors))
    with pytest.raises(RunError, match=r"rollout of policy version 0 is refused: .*chain"):
        learner.run()
    assert checkpoints(learner) == ["000000", "last"]
    assert "chain" in decode(learner.server._service.last_words).header["reason"]


def test_an_interrupt_while_waiting_leaves_a_checkpoint(learner):
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        learner.run()
    assert checkpoints(learner) == ["000000", "last"]
    assert decode(learner.server._service.last_words).header == {
        "ok": False,
        "reason": "the learner was interrupted",
    }


def test_one_interrupt_during_an_update_waits_for_its_end(learner, monkeypatch):
    update = learner.algorithm.update

    def interrupted(batches):
        signal.raise_signal(signal.SIGINT)
        return update(batches)

    monkeypatch.setattr(learner.algorithm, "update", interrupted)
    deliver(learner)
    with pytest.raises(KeyboardInterrupt):
        learner.run()
    assert checkpoints(learner) == ["000001", "last"]


def test_a_second_interrupt_leaves_the_half_made_update_out(learner, monkeypatch, caplog):
    step = learner.algorithm._step

    def interrupted(record):
        norms = step(record)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return norms

    monkeypatch.setattr(learner.algorithm, "_step", interrupted)
    deliver(learner)
    with pytest.raises(KeyboardInterrupt):
        learner.run()
    assert checkpoints(learner) == []
    assert "the unfinished update is lost" in caplog.text


def test_without_save_checkpoint_nothing_is_saved(learner):
    learner.cfg.save_checkpoint = False
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        learner.run()
    assert checkpoints(learner) == []


def test_curves_that_cannot_be_drawn_do_not_fail_a_run(learner, monkeypatch, caplog):
    monkeypatch.setattr(learner_module, "plot_run", lambda folder: 1 / 0)
    deliver(learner)
    deliver(learner, version=1)
    with caplog.at_level(logging.WARNING):
        learner.run()
    assert learner.version == 2
    assert "no curves were drawn: division by zero" in caplog.text
    assert checkpoints(learner) == ["000002", "last"]


# evaluation


def evaluated(learner: Learner, success: list[bool], version: int | None = None) -> None:
    """Hand over an evaluation as an actor would send it."""
    count = learner.cfg.eval.n_episodes = len(success)
    evaluation = Evaluation(
        success=torch.tensor(success),
        rewards=torch.tensor(success).float(),
        env_steps=torch.full((count,), 7),
        task_id=torch.arange(count) % 2,
        init_state_id=torch.arange(count),
        seconds=0.5,
    )
    values, tensors = evaluation.to_tensors()
    values |= {
        "config_hash": learner.metadata.config_hash,
        "session": learner.session,
        "policy_version": learner.version if version is None else version,
    }
    learner.server._service.inbox.put(Message("evaluation", values, tensors))


def records(learner: Learner) -> list[dict]:
    return [json.loads(line) for line in learner.metrics.path.read_text().splitlines()]


def test_evaluations_are_asked_for_logged_and_the_best_policy_is_saved(learner):
    learner.cfg.env_eval_freq, learner.cfg.eval.n_episodes, learner.cfg.steps = 2, 4, 4
    outcomes = {0: [True, False, False, False], 2: [True, True, False, True], 4: [True, True, False, False]}
    asked = []
    publish = learner.publish

    def publish_and_answer() -> None:
        publish()
        header = decode(learner.server._service.published).header
        asked.append((header["policy_version"], header["evaluate"]))
        if header["evaluate"]:
            evaluated(learner, outcomes[learner.version])
        if header["collect"]:
            deliver(learner)

    learner.publish = publish_and_answer
    learner.run()
    assert asked == [(0, 4), (1, 0), (2, 4), (3, 0), (4, 4)]
    found = [(r["iteration"], r["eval/success_rate"]) for r in records(learner) if "eval/success_rate" in r]
    assert found == [(0, 0.25), (2, 0.75), (4, 0.5)]
    assert records(learner)[0]["eval/success_rate_task0"] == 0.5
    assert learner.progress.best_version == 2
    assert checkpoints(learner) == ["000000", "000002", "000004", "best", "last"]
    folder = learner.cfg.output_dir / "checkpoints"
    assert (os.readlink(folder / "best"), os.readlink(folder / "last")) == ("000002", "000004")


def test_a_rollout_that_comes_before_the_evaluation_is_kept(learner):
    learner.cfg.env_eval_freq = 1
    deliver(learner)
    evaluated(learner, [True])
    learner.evaluate()
    learner.iterate()
    assert [record["iteration"] for record in records(learner)] == [0, 1]


def test_an_evaluation_of_another_version_is_left_out(learner, caplog):
    learner.cfg.env_eval_freq, learner.cfg.allow_zero_baseline = 1, True
    evaluated(learner, [True], version=3)
    evaluated(learner, [False])
    learner.evaluate()
    assert records(learner)[0]["eval/success_rate"] == 0.0
    assert "refused one evaluation: its policy_version is 3, here 0" in caplog.text


def test_a_version_is_evaluated_once(learner):
    learner.cfg.env_eval_freq = 1
    evaluated(learner, [True])
    learner.evaluate()
    learner.evaluate()
    learner.publish()
    assert decode(learner.server._service.published).header["evaluate"] == 0


@pytest.mark.parametrize("success", [True, False])
def test_an_evaluation_that_comes_after_the_checkpoint_of_its_version_is_put_into_it(learner, success):
    learner.cfg.env_eval_freq, learner.cfg.allow_zero_baseline = 1, True
    learner.progress.best_version, learner.progress.best_success_rate = 0, 0.5
    learner.saver.save()
    evaluated(learner, [success])
    learner.evaluate()
    state = learner.cfg.output_dir / "checkpoints" / "last" / "training_state" / "training_step.json"
    assert json.loads(state.read_text())["evaluated_version"] == 0
    assert json.loads(state.read_text())["best_success_rate"] == (1.0 if success else 0.5)


def test_a_learner_that_gets_no_evaluation_gives_up_with_a_sentence(learner):
    learner.cfg.env_eval_freq = 1
    with pytest.raises(RunError, match="no evaluation for 1 s with 0 actors"):
        learner.evaluate()


def test_a_policy_that_never_succeeds_is_not_trained(learner):
    learner.cfg.env_eval_freq = 1
    evaluated(learner, [False, False])
    with pytest.raises(RunError, match="none of 2 episodes without noise") as caught:
        learner.run()
    for word in (
        "control_mode",
        "processors",
        "domain_id",
        "tokenizer",
        "lerobot-eval",
        "allow_zero_baseline",
    ):
        assert word in str(caught.value)
    assert learner.version == 0
    assert decode(learner.server._service.last_words).header["ok"] is False


def test_it_is_trained_if_the_user_says_so(learner):
    learner.cfg.env_eval_freq, learner.cfg.allow_zero_baseline, learner.cfg.steps = 5, True, 1
    evaluated(learner, [False])
    deliver(learner)
    learner.run()
    assert learner.version == 1


def test_a_run_ends_when_its_best_policy_is_old(learner):
    learner.cfg.env_eval_freq, learner.cfg.early_stop_patience, learner.cfg.steps = 1, 2, 9
    outcomes = {0: [True, False], 1: [True, True], 2: [True, False], 3: [True, False]}
    publish = learner.publish

    def publish_and_answer() -> None:
        publish()
        evaluated(learner, outcomes[learner.version])
        deliver(learner)

    learner.publish = publish_and_answer
    learner.run()
    assert learner.version == 3
    assert decode(learner.server._service.last_words).header == {
        "ok": True,
        "reason": "3 updates are done; policy 1 is the best for 2 evaluations",
    }
    assert learner._is_stale
    learner.progress.evaluated_version = 2
    assert not learner._is_stale


def test_a_resume_does_not_get_around_a_policy_that_never_succeeds(learner):
    learner.cfg.env_eval_freq = 1
    learner.progress.evaluated_version = learner.progress.best_version = 0
    with pytest.raises(RunError, match="succeeded in none of"):
        learner.run()
    assert learner.version == 0


def test_an_evaluation_of_another_number_of_episodes_is_refused(learner):
    learner.cfg.env_eval_freq = 1
    evaluated(learner, [True])
    learner.cfg.eval.n_episodes = 4
    with pytest.raises(RunError, match=r"evaluated 1 episodes instead of eval.n_episodes=4"):
        learner.evaluate()


def test_an_interrupt_after_an_update_finds_counters_and_log_complete(learner, monkeypatch):
    publish = learner.publish

    def interrupted() -> None:
        if learner.version == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        publish()

    monkeypatch.setattr(learner, "publish", interrupted)
    deliver(learner)
    with pytest.raises(KeyboardInterrupt):
        learner.run()
    state = learner.cfg.output_dir / "checkpoints" / "000001" / "training_state" / "training_step.json"
    assert json.loads(state.read_text())["episodes"] == EPISODES
    assert [record["iteration"] for record in records(learner)] == [1]


def test_two_learners_do_not_share_an_output_folder(learner):
    with pytest.raises(OSError, match=f"another learner .* trains in {learner.cfg.output_dir}"):
        folders.lock(learner.cfg.output_dir)


# a disk that refuses


@pytest.fixture
def full_disk(learner, monkeypatch):
    """Let saving fail until the list of what it tried is as long as the test wants it."""
    tries, save = [], checkpoint.save
    limit = {"failures": 1}

    def save_or_fail(*args):
        tries.append(learner.version)
        if len(tries) <= limit["failures"]:
            raise CheckpointError("the checkpoint cannot be written (OSError: No space left on device)")
        return save(*args)

    monkeypatch.setattr(checkpoint, "save", save_or_fail)
    monkeypatch.setattr(saving, "RETRY_SAVING_S", 0)
    return limit, tries


def test_a_checkpoint_that_cannot_be_written_is_tried_again_after_the_next_update(learner, full_disk, caplog):
    _, tries = full_disk
    learner.cfg.steps, learner.cfg.save_freq = 3, 1
    for version in range(3):
        deliver(learner, version=version)
    learner.run()
    assert tries == [1, 2, 3]
    assert checkpoints(learner) == ["000002", "000003", "last"]
    assert "No space left on device); version None is the last one saved; free space" in caplog.text
    assert "Traceback" not in caplog.text


def test_the_last_checkpoint_is_waited_for(learner, full_disk):
    limit, tries = full_disk
    limit["failures"] = 4
    for version in range(2):
        deliver(learner, version=version)
    learner.run()
    assert tries == [2, 2, 2, 2, 2]
    assert checkpoints(learner) == ["000002", "last"]


def test_a_best_policy_that_could_not_be_saved_is_not_the_best(learner, full_disk):
    learner.cfg.env_eval_freq, learner.cfg.steps, learner.cfg.save_freq = 1, 3, 0
    limit, _ = full_disk
    limit["failures"] = 0
    outcomes = {0: [True, False, False, False], 1: [True] * 4, 2: [True, True, False, False], 3: [False] * 4}
    learner.cfg.eval.n_episodes = 4
    publish = learner.publish

    def publish_and_answer() -> None:
        publish()
        evaluated(learner, outcomes[learner.version])
        deliver(learner)
        # the disk is full while policy 1 is the best
        limit["failures"] = 10**9 if learner.version == 1 else 0

    learner.publish = publish_and_answer
    learner.run()
    assert (learner.progress.best_version, learner.progress.best_success_rate) == (2, 0.5)
    assert checkpoints(learner) == ["000000", "000002", "000003", "best", "last"]
    assert os.readlink(learner.cfg.output_dir / "checkpoints" / "best") == "000002"


def test_the_last_lines_of_the_log_are_waited_for_too(learner, monkeypatch):
    append, tries = metrics._append, []

    def refuse_twice_at_the_end(path: Path, data: bytes) -> None:
        if learner.version == 2 and len(tries) < 2:
            tries.append(data)
            raise OSError(28, "No space left on device")
        append(path, data)

    monkeypatch.setattr(metrics, "_append", refuse_twice_at_the_end)
    monkeypatch.setattr(saving, "RETRY_SAVING_S", 0)
    for version in range(2):
        deliver(learner, version=version)
    learner.run()
    assert len(tries) == 2
    assert [record["iteration"] for record in records(learner)] == [1, 2]
    assert checkpoints(learner) == ["000002", "last"]


def test_one_interrupt_ends_the_wait_for_a_last_checkpoint(learner, full_disk, monkeypatch):
    limit, tries = full_disk
    limit["failures"] = 10**9
    monkeypatch.setattr(saving.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGINT))
    for version in range(2):
        deliver(learner, version=version)
    with pytest.raises(KeyboardInterrupt):
        learner.run()
    assert tries == [2]
    assert checkpoints(learner) == []
    assert decode(learner.server._service.last_words).header == {
        "ok": False,
        "reason": "the learner was interrupted before its last checkpoint could be written",
    }
