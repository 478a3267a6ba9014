"""Several actors and one learner over real gRPC: what they train on, whoever delivers it and whoever dies."""

import copy
import json
import logging
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lerobot_pirl.actor import Actor
from lerobot_pirl.build import make_algorithm
from lerobot_pirl.collector import Collector, episode_specs
from lerobot_pirl.envs import make_chunk_envs, num_init_states, task_ids
from lerobot_pirl.learner import Learner
from lerobot_pirl.ledger import EVALUATION, LEDGER_FILE
from lerobot_pirl.options import VALUE_OPTIONS, PiRLConfig
from lerobot_pirl.parallel import ALONE
from lerobot_pirl.policies.base import chain_log_prob
from lerobot_pirl.transport import server as server_module
from lerobot_pirl.transport.server import keepalive
from lerobot_pirl.weights import replaced
from lerobot_pirl.wire import Message
from tests.comparison import metrics_differences
from tests.forks import ForkedRun, Nursery
from tests.terminals import end_well, running
from tests.test_ledger import read_ledger
from tests.toy import tiny_config

pytestmark = pytest.mark.filterwarnings("ignore")
EPISODES, STEPS = 6, 2


def run_config(folder: Path, **algorithm):
    """Return the config of a short run; with one environment per actor all batches have one row, and round alike."""
    options = {"episodes_per_iteration": EPISODES, "n_envs": 1, "max_episode_steps": 8, "minibatch_size": 8}
    options |= {"micro_batch_size": 8, "critic_warmup_iterations": 0} | algorithm
    cfg = copy.deepcopy(tiny_config(**options))
    cfg.output_dir, cfg.steps, cfg.save_freq, cfg.env_eval_videos = folder, STEPS, 1, False
    cfg.algorithm.value_hidden_dims = (16,)
    cfg.algorithm.wire.port, cfg.algorithm.wire.rollout_timeout_s = 0, 120.0
    return cfg


@contextmanager
def learning(cfg) -> Iterator[Learner]:
    """Give a learner and take its signal handlers back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    learner = Learner(cfg)
    try:
        yield learner
    finally:
        learner.server.close()
        learner.lock.close()
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Hand(threading.Thread):
    """An actor in a thread of its own; an error ends it as a crash ends a process."""

    def __init__(self, learner: Learner, **wire) -> None:
        super().__init__(daemon=True)
        cfg = copy.deepcopy(learner.cfg)
        cfg.algorithm.wire.port = learner.server.port
        for name, value in wire.items():
            setattr(cfg.algorithm.wire, name, value)
        self.actor = Actor(cfg)
        self.id = self.actor.client.actor
        self.status: int | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.status = self.actor.run()
        except Exception as error:
            self.error = error
        finally:
            self.actor.close()


def train(learner: Learner, hands: list[Hand]) -> None:
    """Run a learner to its end with some actors that are all there when it begins."""
    for hand in hands:
        hand.start()
    learner.run()
    for hand in hands:
        hand.join(30)
        assert not hand.is_alive()


def before_sending(hand: Hand, do: Callable[[int], None]) -> None:
    """Let something happen whenever an actor has ended an episode; it gets the count."""
    send, count = hand.actor._send, 0

    def counted(tally, episode) -> None:
        nonlocal count
        count += 1
        do(count)
        send(tally, episode)

    hand.actor._send = counted


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in learner.algorithm.get_weights().items()}


def assert_whole(folder: Path, steps: int = STEPS) -> set[str]:
    """See that a run was trained on every episode once, with the version it belongs to; return who collected."""
    found = read_ledger(folder / LEDGER_FILE)
    numbers = {iteration: sorted(trained) for iteration, trained in found.items()}
    assert numbers == {k: list(range((k - 1) * EPISODES, k * EPISODES)) for k in range(1, steps + 1)}
    assert all(acted == k - 1 for k, trained in found.items() for _, acted in trained.values())
    return {actor for trained in found.values() for actor, _ in trained.values()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folder and final weights of the run that one actor collects for, with evaluations."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    cfg = run_config(folder)
    cfg.env_eval_freq, cfg.eval.n_episodes, cfg.allow_zero_baseline = 2, 2, True
    with learning(cfg) as learner:
        hand = Hand(learner)
        train(learner, [hand])
        assert assert_whole(folder) == {hand.id}
        return folder, weights(learner)


def same_run(folder: Path):
    cfg = run_config(folder)
    cfg.env_eval_freq, cfg.eval.n_episodes, cfg.allow_zero_baseline = 2, 2, True
    return cfg


def assert_same(alone, folder: Path, learner: Learner) -> None:
    expected_folder, expected = alone
    found = weights(learner)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert metrics_differences(records(expected_folder), records(folder)) == []


def test_three_actors_train_what_one_trains_bit_for_bit(alone, tmp_path):
    cfg = same_run(tmp_path / "run")
    with learning(cfg) as learner:
        hands = [Hand(learner) for _ in range(3)]
        train(learner, hands)
        assert len(assert_whole(cfg.output_dir)) > 1
        assert_same(alone, cfg.output_dir, learner)
        assert [hand.status for hand in hands] == [0, 0, 0]
        assert all(record.get("rollout/episodes_dropped", 0) == 0 for record in records(cfg.output_dir))


def test_over_the_wire_a_run_trains_what_one_process_trains_bit_for_bit(alone, tmp_path):
    cfg = same_run(tmp_path / "run")
    algorithm = make_algorithm(cfg, ALONE)
    envs = make_chunk_envs(cfg.env, 1, cfg.algorithm.n_action_steps, cfg.algorithm.max_episode_steps)
    collector = Collector(envs, algorithm.adapter, cfg.algorithm.last_step_prob, cfg.seed)
    states = {task: num_init_states(cfg.env, task) for task in task_ids(cfg.env)}
    for version in range(STEPS):
        rollout = collector.collect(episode_specs(states, version * EPISODES, EPISODES), version)
        algorithm.update(iter([rollout]))
    found = algorithm.get_weights()
    assert all(torch.equal(found[name], value) for name, value in alone[1].items())


def test_what_an_actor_that_crashes_held_is_collected_by_others_and_one_that_joins_late_takes_part(
    alone, tmp_path, caplog
):
    cfg = same_run(tmp_path / "run")
    with learning(cfg) as learner:
        first, second, late = (Hand(learner) for _ in range(3))

        def crash(count: int) -> None:
            if count == 2:
                raise RuntimeError("a crash")

        before_sending(first, crash)
        # the late one is there from the second policy on
        publish = learner.publish
        learner.publish = lambda: (publish(), late.start() if learner.version == 1 else None)
        with caplog.at_level(logging.INFO):
            train(learner, [first, second])
        late.join(30)
        assert str(first.error) == "a crash"
        assert f"actor {first.id} left" in caplog.text
        assert_whole(cfg.output_dir)
        assert_same(alone, cfg.output_dir, learner)
        assert (second.status, late.status) == (0, 0)
    lines = [json.loads(line) for line in (cfg.output_dir / LEDGER_FILE).read_text().splitlines()]
    assert [line["actor"] for line in lines if line["state"] == "returned"] == [first.id]


def test_what_an_actor_that_hangs_held_is_collected_by_others_and_what_it_sends_late_is_refused(
    alone, tmp_path, caplog
):
    cfg = same_run(tmp_path / "run")
    cfg.env_eval_freq = 0
    cfg.algorithm.wire.share_timeout_s = 2.0
    with learning(cfg) as learner:
        slow, quick = Hand(learner), Hand(learner)
        goes_on = threading.Event()
        before_sending(slow, lambda count: goes_on.wait(60) if count == 1 else None)
        # it wakes up when the iteration is over that it belongs to, and before the run is
        publish = learner.publish

        def publish_and_wake() -> None:
            publish()
            if learner.version == 1:
                goes_on.set()
                deadline = time.monotonic() + 30
                while not learner.ledger.unused and time.monotonic() < deadline:
                    time.sleep(0.01)

        learner.publish = publish_and_wake
        train(learner, [slow, quick])
        assert "its actor delivered nothing for 2 s" in caplog.text
        assert "belongs to policy version 0, which is over" in caplog.text
        assert_whole(cfg.output_dir)
        found = weights(learner)
        assert all(torch.equal(found[name], value) for name, value in alone[1].items())
        assert (slow.status, quick.status) == (0, 0)


def test_an_actor_that_hung_and_gives_up_what_is_over_is_handed_episodes_again(tmp_path):
    cfg = run_config(tmp_path / "run")
    cfg.algorithm.wire.share_timeout_s = 2.0
    with learning(cfg) as learner:
        slow, quick = Hand(learner), Hand(learner)
        goes_on = threading.Event()
        progress = slow.actor.collector.on_progress
        slow.actor.collector.on_progress = lambda *numbers: (goes_on.wait(60), progress(*numbers))

        def crash(count: int) -> None:
            if count > EPISODES:
                raise RuntimeError("a crash")

        before_sending(quick, crash)
        publish = learner.publish

        def publish_and_wake() -> None:
            publish()
            deadline = time.monotonic() + 30
            while learner.version == 1 and not slow.actor.client.news and time.monotonic() < deadline:
                time.sleep(0.01)
            if learner.version == 1:
                goes_on.set()

        learner.publish = publish_and_wake
        train(learner, [slow, quick])
        assert_whole(cfg.output_dir)
        assert str(quick.error) == "a crash"
        assert slow.id in {actor for actor, _ in read_ledger(cfg.output_dir / LEDGER_FILE)[2].values()}


def test_messages_that_come_twice_are_refused_and_logged_and_the_run_goes_on(alone, tmp_path, caplog):
    cfg = same_run(tmp_path / "run")
    with learning(cfg) as learner:
        hands = [Hand(learner) for _ in range(2)]
        for hand in hands:
            post = hand.actor.client.post
            hand.actor.client.post = lambda message, post=post: (post(message), post(message))
        train(learner, hands)
        assert_whole(cfg.output_dir)
        found = weights(learner)
        assert all(torch.equal(found[name], value) for name, value in alone[1].items())
    refused = [
        json.loads(line)["reason"]
        for line in (cfg.output_dir / LEDGER_FILE).read_text().splitlines()
        if '"refused"' in line
    ]
    assert len(refused) >= EPISODES
    assert all("was delivered before" in each or "which is over" in each for each in refused)
    assert caplog.text.count("refused one rollout") == len(refused)
    assert "refused one evaluation" in caplog.text


def test_what_cannot_be_used_is_collected_again_by_the_same_actor(alone, tmp_path, caplog):
    cfg = same_run(tmp_path / "run")
    with learning(cfg) as learner:
        hand = Hand(learner)
        client, post, spoilt = hand.actor.client, hand.actor.client.post, []

        def spoil_the_first(message) -> None:
            if message.kind == "rollout" and not spoilt:
                spoilt.append(message.header["number"])
                tensors = message.tensors | {"log_prob": message.tensors["log_prob"] * torch.nan}
                message = Message(message.kind, message.header, tensors)
            post(message)

        receive, on_sent, delivered = hand.actor._receive, client.on_sent, queue.SimpleQueue()

        def receive_and_hear_late(share) -> None:
            # it is asked again before it knows that it has delivered
            receive(share)
            while spoilt and spoilt[0] in share.header.get("numbers", []) and not delivered.empty():
                on_sent(delivered.get())

        hand.actor._receive, client.on_sent, client.post = (
            receive_and_hear_late,
            delivered.put,
            spoil_the_first,
        )
        train(learner, [hand])
        assert "log_prob holds a number that is not finite" in caplog.text
        assert assert_whole(cfg.output_dir) == {hand.id}
        found = weights(learner)
        assert all(torch.equal(found[name], value) for name, value in alone[1].items())


def test_what_is_handed_out_again_is_done_once_and_a_former_learner_takes_nothing_off_the_list(tmp_path):
    with learning(run_config(tmp_path / "run")) as learner:
        actor = Hand(learner).actor
        actor.session, actor.version = "present", 0
        evaluate = Message("share", {"session": "present", "policy_version": 0, "evaluate": 2})
        for _ in range(2):
            actor._receive(evaluate)
        assert actor.evaluations == [2]
        actor._receive(Message("share", {"session": "present", "refused": [EVALUATION]}))
        actor._receive(evaluate)
        assert actor.evaluations == [2, 2]
        actor.held.add(5)
        actor._note_sent(Message("rollout", {"session": "former", "number": 5}))
        assert 5 in actor.held
        actor._note_sent(Message("rollout", {"session": "present", "number": 5}))
        assert 5 not in actor.held
        actor.close()


def test_groups_that_several_actors_collect_are_whole(tmp_path):
    no_value_function = {name: getattr(PiRLConfig(), name) for name in VALUE_OPTIONS}
    cfg = run_config(tmp_path / "run", advantage="grpo", group_size=3, **no_value_function)
    with learning(cfg) as learner:
        train(learner, [Hand(learner) for _ in range(3)])
        assert len(assert_whole(cfg.output_dir)) > 1
        assert learner.version == STEPS


def stop_after_an_update(learner: Learner, num_actors: int) -> None:
    """Run a learner until it is interrupted while it waits for its second iteration; it leaves a checkpoint."""
    check = learner.inbox.check_interrupts

    def stop() -> None:
        if learner.version == 1:
            raise KeyboardInterrupt
        check()

    learner.inbox.check_interrupts = stop
    with pytest.raises(KeyboardInterrupt):
        train(learner, [Hand(learner) for _ in range(num_actors)])


def resumed(cfg):
    """Return the config that goes on from the checkpoint of the first update."""
    cfg.resume, cfg.checkpoint_path = True, cfg.output_dir / "checkpoints" / "000001"
    cfg.policy.pretrained_path = cfg.checkpoint_path / "pretrained_model"
    return cfg


def test_a_resumed_run_goes_on_with_other_actors_and_in_the_same_ledger(alone, tmp_path):
    folder = tmp_path / "run"
    with learning(same_run(folder)) as learner:
        stop_after_an_update(learner, 2)
    with learning(resumed(same_run(folder))) as learner:
        train(learner, [Hand(learner) for _ in range(2)])
        assert_whole(folder)
        found = weights(learner)
        assert all(torch.equal(found[name], value) for name, value in alone[1].items())
    lines = [json.loads(line) for line in (folder / LEDGER_FILE).read_text().splitlines()]
    assert [line["iteration"] for line in lines if line["state"] == "resumed"] == [1]


def test_a_resume_with_one_actor_is_exact_with_several_environments_too(tmp_path):
    with learning(run_config(tmp_path / "whole", n_envs=4)) as learner:
        train(learner, [Hand(learner)])
        expected = weights(learner)
    with learning(run_config(tmp_path / "run", n_envs=4)) as learner:
        stop_after_an_update(learner, 1)
    with learning(resumed(run_config(tmp_path / "run", n_envs=4))) as learner:
        train(learner, [Hand(learner)])
        found = weights(learner)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert metrics_differences(records(tmp_path / "whole"), records(tmp_path / "run")) == []


def test_actors_collect_during_an_update_and_the_ratio_is_that_to_the_version_that_acted(tmp_path):
    """An update is not begun before the next iteration is in, so all but the first are one version old."""
    annealed = {"noise_anneal_iterations": 4, "noise_anneal_to": 0.5}
    cfg = run_config(tmp_path / "run", max_staleness=1, learning_rate=1e-3, target_kl=None, **annealed)
    cfg.steps = 3
    with learning(cfg) as learner:
        algorithm, versions = learner.algorithm, []
        update = algorithm.update

        def late_update(batches):
            versions.append(weights(learner))
            rollout = next(batches)
            coming = learner.version + 1
            deadline = time.monotonic() + 60
            while coming < cfg.steps and learner.ledger.missing(coming) and time.monotonic() < deadline:
                time.sleep(0.01)
            found = []
            for candidate in (versions[-1], versions[max(0, learner.version - 1)]):
                with replaced(algorithm.trainable_parameters(), candidate), torch.no_grad():
                    stored = (rollout.features, rollout.chain, rollout.step_index, rollout.gripper)
                    scale = cfg.algorithm.noise_scale(learner.version)
                    found.append(chain_log_prob(learner.adapter, *stored, noise_scale=scale)[0])
            present, acted = found
            torch.testing.assert_close(acted, rollout.log_prob, rtol=0, atol=1e-3)
            assert learner.version == 0 or not torch.allclose(present, rollout.log_prob, rtol=0, atol=1e-3)
            return update(iter([rollout]))

        algorithm.update = late_update
        train(learner, [Hand(learner) for _ in range(2)])
    assert [record["rollout/staleness"] for record in records(cfg.output_dir)] == [0, 1, 1]
    assert records(cfg.output_dir)[2]["train/ratio_max_dev_first"] > 0.001
    found = read_ledger(cfg.output_dir / LEDGER_FILE)
    assert {k: sorted(trained) for k, trained in found.items()} == {
        k: list(range((k - 1) * EPISODES, k * EPISODES)) for k in (1, 2, 3)
    }
    assert [{acted for _, acted in found[k].values()} for k in (1, 2, 3)] == [{0}, {0}, {1}]


def test_an_evaluation_that_is_handed_over_during_a_collection_is_made(tmp_path):
    """With staleness, an actor collects for the next iteration when it is asked to evaluate the present version."""
    cfg = run_config(tmp_path / "run", max_staleness=1)
    cfg.steps, cfg.env_eval_freq, cfg.eval.n_episodes, cfg.allow_zero_baseline = 4, 1, 2, True
    cfg.algorithm.wire.rollout_timeout_s = 30.0
    with learning(cfg) as learner:
        hand = Hand(learner)
        handed, receive = [], hand.actor._receive
        start = hand.actor.collector.explore

        def explore(*args) -> None:
            hand.actor._receive = lambda share: (handed.append("evaluate" in share.header), receive(share))
            start(*args)
            hand.actor._receive = receive

        hand.actor.collector.explore = explore
        client = hand.actor.client

        def wait_for_news(count: int) -> None:
            # the weights of the first update come while the next iteration is collected
            deadline = time.monotonic() + 60
            while count == EPISODES + 1 and not client.news and time.monotonic() < deadline:
                time.sleep(0.01)

        before_sending(hand, wait_for_news)
        train(learner, [hand])
    assert [record["iteration"] for record in records(cfg.output_dir) if "eval/success_rate" in record] == [
        0,
        1,
        2,
        3,
        4,
    ]
    # or this test shows nothing
    assert any(handed)


def test_the_time_after_which_a_silent_peer_is_gone_reaches_both_ends(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(
        server_module, "keepalive", lambda seconds: given.append(seconds) or keepalive(seconds)
    )
    cfg = run_config(tmp_path / "run")
    cfg.algorithm.wire.peer_timeout_s = 7.0
    with learning(cfg) as learner:
        hand = Hand(learner)
        assert given == [7.0]
        assert hand.actor.client._options == keepalive(7.0)
        hand.actor.close()


@pytest.mark.e2e
def test_an_actor_process_that_is_killed_in_the_middle_costs_nothing_and_comes_back(tmp_path):
    nursery = Nursery()
    options = ("--steps=4", "--algorithm.episodes_per_iteration=12", "--algorithm.n_envs=1", "--save_freq=0")
    try:
        with running(ForkedRun(tmp_path, nursery)) as run:
            learner = run.start("learner", *options)
            first, second = (run.start("actor", *options) for _ in range(2))
            first.wait_for("policy version 1 applied")
            first.kill()
            learner.wait_for("actor .* left")
            again = run.start("actor", *options)
            end_well(learner, second, again)
            assert len(run.metrics()) == 4
            found = read_ledger(run.output_dir / LEDGER_FILE)
            numbers = {k: sorted(trained) for k, trained in found.items()}
            assert numbers == {k: list(range((k - 1) * 12, k * 12)) for k in range(1, 5)}
            assert all(acted == k - 1 for k, trained in found.items() for _, acted in trained.values())
            assert "Traceback" not in learner.text() + second.text() + again.text()
    finally:
        nursery.close()
