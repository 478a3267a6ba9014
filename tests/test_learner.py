"""The learner's loop in one process, with rollouts handed to it instead of sent."""

import copy
import json
import logging
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lerobot_pirl import checkpoint, folders, ledger, metrics, saving
from lerobot_pirl import learner as learner_module
from lerobot_pirl.evaluate import Evaluation
from lerobot_pirl.inbox import MAX_USELESS
from lerobot_pirl.launch import RunError
from lerobot_pirl.learner import Learner
from lerobot_pirl.ledger import LEDGER_FILE
from lerobot_pirl.restore import CheckpointError
from lerobot_pirl.rollout import Rollout
from lerobot_pirl.transport.server import _Stream
from lerobot_pirl.wire import Message, decode
from tests.test_algorithm import make_rollout
from tests.test_ledger import read_ledger
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


def episodes_of(rollout: Rollout) -> list[Rollout]:
    """Return a rollout per episode."""
    lengths = rollout.episode_lengths.tolist()
    rows = dict.fromkeys(("chain", "step_index", "gripper", "log_prob", "rewards", "terminated"))
    per_row = {name: getattr(rollout, name).split(lengths) for name in rows}
    features = {name: value.split(lengths) for name, value in rollout.features.items()}
    ends = iter(range(len(lengths)))
    found = []
    for i in range(len(lengths)):
        finals = slice(0, 0) if per_row["terminated"][i][-1] else slice(end := next(ends), end + 1)
        per_episode = ("episode_lengths", "task_id", "init_state_id", "success", "env_steps")
        found.append(
            Rollout(
                policy_version=rollout.policy_version,
                features={name: value[i] for name, value in features.items()},
                final_features={name: value[finals] for name, value in rollout.final_features.items()},
                **{name: value[i] for name, value in per_row.items()},
                **{name: getattr(rollout, name)[i : i + 1] for name in per_episode},
            )
        )
    return found


def deliver(learner: Learner, version: int | None = None, **header) -> None:
    """Hand over the episodes of a version as an actor would send them."""
    if not learner.ledger.opened:
        learner.publish()
    version = learner.version if version is None else version
    for i, rollout in enumerate(episodes_of(make_rollout(learner.adapter))):
        rollout.policy_version = version
        values, tensors = rollout.to_tensors()
        values |= learner.inbox.address | {"number": version * EPISODES + i, "actor": "a"} | header
        learner.server._service.inbox.put(Message("rollout", values, tensors))


def join(learner: Learner) -> None:
    """Let actor "a" take part, as its stream and its wish for episodes do."""
    learner.server._service.streams["a"] = _Stream()
    header = {"session": learner.session, "slots": EPISODES, "actor": "a"}
    learner.server._service.inbox.put(Message("ask", header))


def answer(learner: Learner, then=lambda: None) -> None:
    """Let whatever the learner asks for be delivered at once."""
    publish = learner.publish

    def publish_and_answer() -> None:
        publish()
        if learner.version < learner.cfg.steps:
            deliver(learner)
        then()

    learner.publish = publish_and_answer


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
    published = decode(b"".join(learner.server._service.published.parts))
    assert published.header["policy_version"] == 1
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
    deliver(learner)
    evaluated(learner, [True])
    learner.evaluate()
    learner.iterate()
    deliver(learner, version=0)
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
    answer(sick)
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
        assert learner.ledger.opened == EPISODES * (learner.version + 1) or not learner.version
        deliver(learner)
        learner.iterate()
    assert learner.ledger.opened == EPISODES * 2
    assert learner.ledger.waiting == []


OTHERS = [
    ({"config_hash": "x"}, "its config_hash is 'x', here "),
    ({"session": "former"}, "its session is 'former', here "),
    ({"policy_version": 1}, "episode 0 was collected with policy version 1 instead of 0"),
    ({"policy_version": None}, "episode 0 of policy version None was never asked for"),
    ({"number": EPISODES}, f"episode {EPISODES} of policy version 0 was never asked for"),
    ({"number": -1}, "episode -1 of policy version 0 was never asked for"),
    ({"number": "0"}, "episode '0' of policy version 0 was never asked for"),
    ({"number": True}, "episode True of policy version 0 was never asked for"),
]


@pytest.mark.parametrize(("header", "reason"), OTHERS, ids=[str(header) for header, _ in OTHERS])
def test_a_rollout_made_for_other_weights_is_left_out(learner, header, reason, caplog):
    deliver(learner, **header)
    deliver(learner)
    rollout = learner.receive()
    assert len(rollout.episode_lengths) == EPISODES
    assert caplog.text.count("refused one rollout of actor a: ") == EPISODES
    assert f"refused one rollout of actor a: {reason}" in caplog.text
    assert learner.ledger.pop_unused() == EPISODES


def test_a_rollout_that_comes_twice_or_in_any_order_counts_once_in_its_place(learner, caplog):
    learner.publish()
    queue, put = learner.server._service.inbox, []
    learner.server._service.inbox = SimpleNamespace(put=put.append)
    deliver(learner)
    learner.server._service.inbox = queue
    for message in [*reversed(put), *put]:
        queue.put(message)
    rollout = learner.receive()
    assert rollout.episode_lengths.tolist() == [3, 2, 4]
    assert torch.equal(rollout.chain, make_rollout(learner.adapter).chain)
    deadline = time.monotonic() + 10
    while learner.ledger.unused < EPISODES and time.monotonic() < deadline:
        time.sleep(0.01)
    assert caplog.text.count("was delivered before") == EPISODES


def test_an_update_reads_the_same_whoever_delivered_what_in_whatever_order(learner):
    learner.publish()
    message_queue, put = learner.server._service.inbox, []
    learner.server._service.inbox = SimpleNamespace(put=put.append)
    deliver(learner)
    learner.server._service.inbox = message_queue
    for i, message in enumerate(reversed(put)):
        stats = {"collect_s": 0.5 - 0.1 * i, "env_s": 0.1 * i, "gripper_flips": 1.0}
        message.header.update(actor=f"actor {i}", stats=stats)
        message_queue.put(message)
    rollout, whole = learner.receive(), make_rollout(learner.adapter)
    _, expected = whole.to_tensors()
    _, found = rollout.to_tensors()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # the seconds of the actor that took longest, not the sum of those that collect at once
    assert rollout.stats == {
        "collect_s": 0.5,
        "env_s": 0.0,
        "inference_s": 0.0,
        "gripper_flips": 3.0,
        "staleness": 0.0,
    }


def test_rollouts_for_others_do_not_keep_a_learner_alive(learner):
    for _ in range(4):
        deliver(learner, session="former")
    with pytest.raises(RunError, match=r"no rollout for 1 s with 0 actors connected"):
        learner.receive()


@pytest.mark.parametrize("slots", [0, 1025, 10**400, True, "2", None])
def test_a_wish_for_no_possible_number_of_environments_is_ignored(learner, slots):
    learner.publish()
    header = {"session": learner.session, "slots": slots, "actor": "a"}
    learner.server._service.inbox.put(Message("ask", header))
    deliver(learner)
    learner.receive()
    assert learner.ledger.peers == {}


def test_a_refusal_is_told_and_the_learner_waits_on(learner, caplog):
    learner.server._service.inbox.put(Message("refusal", {"reason": "gamma differs"}))
    deliver(learner)
    learner.receive()
    assert "an actor refused this learner and left:\ngamma differs" in caplog.text


def broken(learner: Learner) -> Message:
    rollout = episodes_of(make_rollout(learner.adapter))[0]
    rollout.chain[0, 0, 0, 0] = torch.nan
    header, tensors = rollout.to_tensors()
    header |= learner.inbox.address | {"number": 0, "actor": "a"}
    return Message("rollout", header, tensors)


def test_a_rollout_that_cannot_be_used_is_refused_and_comes_again(learner, caplog):
    learner.publish()
    learner.server._service.inbox.put(broken(learner))
    deliver(learner)
    learner.iterate()
    assert learner.version == 1
    assert "refused one rollout of actor a: rollout: chain holds a number that is not finite" in caplog.text
    assert records(learner)[0]["rollout/episodes_dropped"] == 1


def test_one_that_cannot_be_used_again_and_again_ends_the_run_with_its_reason_and_a_checkpoint(learner):
    learner.publish()
    join(learner)
    for _ in range(MAX_USELESS):
        learner.server._service.inbox.put(broken(learner))
    with pytest.raises(RunError, match=r"rollout of policy version 0 is refused for the 3rd time: .*chain"):
        learner.run()
    assert checkpoints(learner) == ["000000", "last"]
    assert "chain" in decode(learner.server._service.last_words).header["reason"]


def test_what_a_stranger_sends_never_ends_the_run(learner, caplog):
    learner.publish()
    for _ in range(MAX_USELESS + 1):
        learner.server._service.inbox.put(broken(learner))
    deliver(learner)
    learner.iterate()
    assert learner.version == 1
    assert caplog.text.count("refused one rollout of actor a") == MAX_USELESS + 1


def test_a_rollout_that_the_policy_cannot_have_made_is_refused(learner, caplog):
    learner.publish()
    message = broken(learner)
    message.tensors["chain"] = message.tensors["chain"].nan_to_num()[:, :, :-1]
    learner.server._service.inbox.put(message)
    deliver(learner)
    learner.receive()
    assert "refused one rollout of actor a: rollout: chain has rows of shape" in caplog.text


def test_a_rollout_whose_features_are_not_shaped_as_the_others_is_refused(learner):
    message = broken(learner)
    message.tensors["chain"] = message.tensors["chain"].nan_to_num()
    learner.inbox._decode(message)
    for group in ("features", "final_features"):
        views = message.tensors[f"{group}.aux_visual_inputs"]
        longer = message.tensors | {f"{group}.aux_visual_inputs": torch.cat([views, views], dim=1)}
        with pytest.raises(
            ValueError, match="features have rows of shapes .*; start all actors with the same config"
        ):
            learner.inbox._decode(Message("rollout", message.header, longer))


def test_episodes_that_were_learned_from_are_not_kept(learner):
    deliver(learner)
    learner.iterate()
    assert (learner.inbox._rollouts, learner.ledger.delivered) == ({}, {})


@pytest.fixture
def clock(learner, monkeypatch) -> list[float]:
    """The inbox's clock, which stands still."""
    now = [0.0]
    monkeypatch.setattr("lerobot_pirl.inbox.time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def one_by_one(learner: Learner) -> list[Message]:
    """Return the first version's episodes as actor "a" sends them."""
    found = []
    for number, rollout in enumerate(episodes_of(make_rollout(learner.adapter))):
        header, tensors = rollout.to_tensors()
        header |= learner.inbox.address | {"number": number, "actor": "a"}
        found.append(Message("rollout", header, tensors))
    return found


def until(learner: Learner, holds) -> None:
    with learner.inbox._changed:
        assert learner.inbox._changed.wait_for(holds, 30)


def test_an_actor_that_delivers_keeps_its_share_however_long_all_of_it_takes(learner, clock):
    learner.publish()
    join(learner)
    until(learner, lambda: "a" in learner.ledger.peers)
    for message in one_by_one(learner):
        number = message.header["number"]
        clock[0] += 0.9 * learner.inbox.share_timeout_s
        learner.server._service.inbox.put(message)
        until(learner, lambda number=number: number in learner.ledger.delivered)
    assert learner.ledger.lines == []
    assert not learner.ledger.peers["a"].overdue


def test_a_learner_waits_on_as_long_as_episodes_come(learner, clock):
    coming = one_by_one(learner)
    learner.publish()

    def deliver_one() -> None:
        clock[0] += 0.9 * learner.inbox.timeout_s
        learner.server._service.inbox.put(coming.pop(0))
        until(learner, lambda: len(learner.ledger.delivered) == EPISODES - len(coming))

    learner.inbox.check_interrupts = deliver_one
    assert len(learner.receive().episode_lengths) == EPISODES
    assert clock[0] > 2 * learner.inbox.timeout_s


def test_weights_are_withdrawn_before_an_update_changes_them(learner, monkeypatch):
    offered, update = [], learner.algorithm.update

    def updated(batches):
        offered.append(learner.server._service.published)
        return update(batches)

    monkeypatch.setattr(learner.algorithm, "update", updated)
    deliver(learner)
    learner.iterate()
    assert offered == [None]


@pytest.mark.parametrize("name", ["task_id", "init_state_id"])
def test_an_episode_that_began_elsewhere_than_its_group_is_refused_before_the_update(learner, name):
    learner.inbox.group_size = 2
    message = broken(learner)
    message.tensors["chain"] = message.tensors["chain"].nan_to_num()
    learner.inbox._rollouts[0] = learner.inbox._decode(message)
    moved = message.tensors | {name: message.tensors[name] + 1}
    for number, tensors in ((1, message.tensors), (2, moved)):
        learner.inbox._decode(Message("rollout", message.header | {"number": number}, tensors))
    with pytest.raises(ValueError, match=f"rollout: {name} of episode 1 is 1, of episode 0, .*, 0; start"):
        learner.inbox._decode(Message("rollout", message.header | {"number": 1}, moved))


def test_the_first_episode_tells_what_all_will_take_and_whether_it_is_there(learner, caplog, monkeypatch):
    learner.inbox.max_rows = 10
    with caplog.at_level(logging.INFO):
        deliver(learner)
        rollout = learner.receive()
    assert caplog.text.count("the episodes of an iteration take") == 1
    assert "of the learner's memory if all have 10 chunks, and as much again for the update" in caplog.text
    caplog.clear()
    monkeypatch.setattr("lerobot_pirl.memory.available_bytes", lambda: 1000)
    learner.inbox._plan_memory(rollout)
    assert caplog.records[0].levelno == logging.WARNING
    learner.inbox._rollouts |= dict(enumerate(episodes_of(rollout)))
    with pytest.raises(
        RunError, match="episodes of an iteration hold .* more than the 0.000954 MiB that are free; lower"
    ):
        learner.receive()


def test_an_error_of_any_kind_outside_an_update_leaves_a_checkpoint(learner, monkeypatch):
    def fail() -> None:
        raise RuntimeError("odd")

    monkeypatch.setattr(learner, "_check_baseline", fail)
    with pytest.raises(RuntimeError, match="odd"):
        learner.run()
    assert checkpoints(learner) == ["000000", "last"]
    assert decode(learner.server._service.last_words).header["reason"] == "the learner failed"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_waiting_leaves_a_checkpoint(learner, number):
    signal.raise_signal(number)
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
    answer(learner)
    with caplog.at_level(logging.WARNING):
        learner.run()
    assert learner.version == 2
    assert "no curves were drawn: division by zero" in caplog.text
    assert checkpoints(learner) == ["000002", "last"]


# evaluation


def evaluated(
    learner: Learner, success: list[bool], version: int | None = None, of: int | None = None
) -> None:
    """Hand over an evaluation as an actor would send it, of the number of episodes that is asked for or another."""
    count = len(success)
    learner.cfg.eval.n_episodes = of or count
    evaluation = Evaluation(
        success=torch.tensor(success),
        rewards=torch.tensor(success).float(),
        env_steps=torch.full((count,), 7),
        task_id=torch.arange(count) % 2,
        init_state_id=torch.arange(count),
        seconds=0.5,
    )
    values, tensors = evaluation.to_tensors()
    version = learner.version if version is None else version
    values |= learner.inbox.address | {"policy_version": version, "actor": "a"}
    learner.publish()
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
        num_evaluations = learner.inbox._num_evaluations
        asked.append((learner.version, num_evaluations))
        if num_evaluations:
            learner.publish = publish
            evaluated(learner, outcomes[learner.version])
            learner.publish = publish_and_answer
        if learner.version < learner.cfg.steps:
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
    assert "refused one evaluation of actor a: its policy_version is 3, here 0" in caplog.text


def test_a_version_is_evaluated_once(learner):
    learner.cfg.env_eval_freq = 1
    evaluated(learner, [True])
    learner.evaluate()
    learner.evaluate()
    learner.publish()
    assert learner.inbox._num_evaluations == 0


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
        learner.publish = publish
        evaluated(learner, outcomes[learner.version])
        learner.publish = publish_and_answer
        if learner.version < learner.cfg.steps:
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
    join(learner)
    for _ in range(MAX_USELESS):
        evaluated(learner, [True], of=4)
    with pytest.raises(RunError, match=r"3rd time: .*evaluated 1 episodes instead of eval.n_episodes=4"):
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
    answer(learner)
    learner.run()
    assert tries == [1, 2, 3]
    assert checkpoints(learner) == ["000002", "000003", "last"]
    assert "No space left on device); version None is the last one saved; free space" in caplog.text
    assert "Traceback" not in caplog.text


def test_the_last_checkpoint_is_waited_for(learner, full_disk):
    limit, tries = full_disk
    limit["failures"] = 4
    answer(learner)
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
        learner.publish = publish
        evaluated(learner, outcomes[learner.version])
        learner.publish = publish_and_answer
        if learner.version < learner.cfg.steps:
            deliver(learner)
        # the disk is full while policy 1 is the best
        limit["failures"] = 10**9 if learner.version == 1 else 0

    learner.publish = publish_and_answer
    learner.run()
    assert (learner.progress.best_version, learner.progress.best_success_rate) == (2, 0.5)
    assert checkpoints(learner) == ["000000", "000002", "000003", "best", "last"]
    assert os.readlink(learner.cfg.output_dir / "checkpoints" / "best") == "000002"


def test_the_last_lines_of_the_log_are_waited_for_too(learner, monkeypatch):
    append, tries = metrics.append_lines, []

    def refuse_twice_at_the_end(path: Path, data: bytes) -> None:
        if learner.version == 2 and len(tries) < 2:
            tries.append(data)
            raise OSError(28, "No space left on device")
        append(path, data)

    monkeypatch.setattr(metrics, "append_lines", refuse_twice_at_the_end)
    monkeypatch.setattr(saving, "RETRY_SAVING_S", 0)
    answer(learner)
    learner.run()
    assert len(tries) == 2
    assert [record["iteration"] for record in records(learner)] == [1, 2]
    assert checkpoints(learner) == ["000002", "last"]


def test_a_checkpoint_waits_for_the_ledger_s_lines_of_its_updates(learner, monkeypatch, caplog):
    def refuse(path: Path, data: bytes) -> None:
        raise OSError(f"{path} cannot be written (No space left on device)")

    monkeypatch.setattr(ledger, "append_lines", refuse)
    deliver(learner)
    learner.iterate()
    assert f"{LEDGER_FILE} cannot be written (No space left on device); its lines are kept" in caplog.text
    assert not learner.saver.save()
    assert checkpoints(learner) == []
    monkeypatch.undo()
    assert learner.saver.save()
    assert list(read_ledger(learner.cfg.output_dir / LEDGER_FILE)) == [1]


def test_one_interrupt_ends_the_wait_for_a_last_checkpoint(learner, full_disk, monkeypatch):
    limit, tries = full_disk
    limit["failures"] = 10**9
    monkeypatch.setattr(saving.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGINT))
    answer(learner)
    with pytest.raises(KeyboardInterrupt):
        learner.run()
    assert tries == [2]
    assert checkpoints(learner) == []
    assert decode(learner.server._service.last_words).header == {
        "ok": False,
        "reason": "the learner was interrupted before its last checkpoint could be written",
    }
