"""Learners and actors as real processes, and what goes wrong between and in them; the ledger tells what came of it.

Whatever happens, every episode is trained on once, with its own policy version, and the updates are, to the last bit,
those of a run to which nothing happened.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from lerobot.transport import services_pb2, services_pb2_grpc

from lerobot_pirl.ledger import LEDGER_FILE
from lerobot_pirl.transport import LearnerClient, LearnerServer
from lerobot_pirl.transport.pieces import from_pieces
from lerobot_pirl.transport.server import ACTOR_KEY
from lerobot_pirl.wire import Message, WireError, decode, encode
from tests.comparison import metrics_differences
from tests.forks import ForkedRun, Nursery
from tests.fuzzing import to_piece
from tests.smoke import free_port
from tests.terminals import SMALL, Terminal, end_well, running
from tests.test_ledger import read_ledger

e2e = pytest.mark.e2e

EPISODES, UPDATES = 4, 4
# with one environment per actor all batches have one row, and round alike whoever collects
OPTIONS = (
    *(option for option in SMALL if "n_envs" not in option),
    "--algorithm.n_envs=1",
    "--algorithm.critic_warmup_iterations=0",
)
BOUNDED, ENDLESS = f"--steps={UPDATES}", "--steps=100000"
# the shortest that the options allow
IMPATIENT = "--algorithm.wire.peer_timeout_s=3"


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


def make_run(folder: Path, nursery: Nursery) -> ForkedRun:
    run = ForkedRun(folder, nursery)
    run.options = OPTIONS
    return run


@pytest.fixture
def run(nursery, tmp_path) -> Iterator[ForkedRun]:
    with running(make_run(tmp_path, nursery)) as run:
        yield run


@pytest.fixture(scope="module")
def undisturbed(nursery, tmp_path_factory) -> list[dict]:
    """The log of a run to which nothing happens."""
    with running(make_run(tmp_path_factory.mktemp("undisturbed"), nursery)) as run:
        end_well(*run.start_both(BOUNDED))
        assert_exact(run, [])
        return run.metrics()


# --- what came of a run ---------------------------------------------------------------------------------------


def ledger_lines(run: ForkedRun, state: str) -> list[dict]:
    lines = map(json.loads, (run.output_dir / LEDGER_FILE).read_text().splitlines())
    return [line for line in lines if line["state"] == state]


def refusals(run: ForkedRun) -> str:
    return "\n".join(line["reason"] for line in ledger_lines(run, "refused"))


def assert_exact(run: ForkedRun, expected: list[dict]) -> None:
    """See that every episode was trained on once, in the update of its version, and that the updates are the expected."""
    records = run.metrics()
    done = [record["iteration"] for record in records]
    assert done == list(range(1, len(done) + 1)) and len(done) >= UPDATES
    found = read_ledger(run.output_dir / LEDGER_FILE)
    assert {iteration: sorted(trained) for iteration, trained in found.items()} == {
        iteration: list(range((iteration - 1) * EPISODES, iteration * EPISODES)) for iteration in done
    }
    assert all(acted == k - 1 for k, trained in found.items() for _, acted in trained.values())
    assert [record["episodes"] for record in records] == [EPISODES * k for k in done]
    assert metrics_differences(expected, records[: len(expected)]) == []


def since(terminal: Terminal, length: int, pattern: str) -> str:
    """Wait for a pattern in what a process prints after so many characters; return these and all up to the match."""
    return terminal.wait_for(rf"(?s)(?<=\A.{{{length}}}).*?{pattern}")


def go_on(learner: Terminal, updates: int = 2) -> int:
    """Wait for so many more updates; return the number of the last."""
    done = [int(number) for number in re.findall(r"update (\d+)/", learner.text())]
    last = max([0, *done]) + updates
    learner.wait_for(rf"update {last}/")
    return last


def finish(run: ForkedRun, learner: Terminal, *actors: Terminal) -> None:
    """Let an endless run do as many updates as are compared, and end it."""
    learner.wait_for(rf"update {UPDATES}/")
    learner.interrupt()
    assert [terminal.status() for terminal in (learner, *actors)] == [130, *[1] * len(actors)]
    for terminal in (learner, *actors):
        assert "Traceback" not in terminal.text()


# --- processes that stop and go on, die, or hang --------------------------------------------------------------


@e2e
@pytest.mark.parametrize(
    ("options", "noticed"),
    [
        ((IMPATIENT,), r"actor \w+ left"),
        (
            ("--algorithm.wire.share_timeout_s=5", "--algorithm.wire.peer_timeout_s=600"),
            "its actor delivered nothing for 5 s",
        ),
    ],
    ids=["peer_timeout_s", "share_timeout_s"],
)
def test_what_a_stopped_actor_held_is_collected_by_another_and_it_takes_part_again(
    run, undisturbed, options, noticed
):
    learner, stopped = run.start_both(ENDLESS, *options)
    identity = learner.wait_for(r"(?<=actor )\w+(?= takes part)")
    stopped.wait_for("policy version 1 applied")
    os.kill(stopped.process.pid, signal.SIGSTOP)
    since(learner, len(learner.text()), noticed)
    other = run.start("actor", ENDLESS, *options)
    other.wait_for(r"policy version \d+ applied")
    before = go_on(learner)
    os.kill(stopped.process.pid, signal.SIGCONT)
    other.kill()
    # nobody else is left to collect
    after = go_on(learner)
    finish(run, learner, stopped)
    assert_exact(run, undisturbed)
    assert any(line["actor"] == identity for line in ledger_lines(run, "returned"))
    collectors = {
        k: {actor for actor, _ in trained.values()}
        for k, trained in read_ledger(run.output_dir / LEDGER_FILE).items()
    }
    assert identity not in collectors[before] and collectors[after] == {identity}


@e2e
def test_an_actor_notices_that_its_learner_is_stopped_and_both_go_on(run, undisturbed):
    learner, actor = run.start_both(ENDLESS, IMPATIENT)
    actor.wait_for("policy version 1 applied")
    os.kill(learner.process.pid, signal.SIGSTOP)
    actor.wait_for(r"lost the learner \(\w+\); waiting for it")
    os.kill(learner.process.pid, signal.SIGCONT)
    go_on(learner)
    finish(run, learner, actor)
    assert_exact(run, undisturbed)


@e2e
def test_a_killed_learner_comes_back_to_the_actor_that_waits_and_no_other_takes_its_port(run, undisturbed):
    learner, patient = run.start_both(ENDLESS, "--save_freq=1")
    patient.wait_for("policy version 2 applied")
    second = run.start("learner", f"--output_dir={run.folder / 'other'}")
    assert second.status() == 1
    assert f"port {run.port} on 127.0.0.1 is taken" in second.text()
    assert not (run.folder / "other").exists()

    learner.kill()
    patient.wait_for(f"waiting for the learner at 127.0.0.1:{run.port}")
    impatient = run.start("actor", "--algorithm.wire.connect_timeout_s=1")
    assert impatient.status() == 1
    assert f"no learner at 127.0.0.1:{run.port} for" in impatient.text()

    known = len(patient.text())
    resumed = run.resume("learner", f"--steps={run.last_step() + UPDATES}")
    end_well(resumed, patient)
    assert_exact(run, undisturbed)
    assert len(ledger_lines(run, "resumed")) == 1
    # asked, judged and served like a new one
    assert "takes part" in resumed.text()
    assert "applied" in patient.text()[known:]
    for terminal in (second, impatient, resumed, patient):
        assert "Traceback" not in terminal.text()


def children(pid: int) -> list[int]:
    """Return the processes that a process has started and that are there."""
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(each) for path in found for each in path.read_text().split()]


def worker_of(actor: Terminal) -> int:
    """Return the process of an actor's only environment, which its fork server has started."""
    (worker,) = [each for child in children(actor.process.pid) for each in children(child)]
    return worker


@e2e
@pytest.mark.slow
def test_an_environment_worker_that_dies_or_hangs_ends_its_actor_and_others_collect_what_it_held(
    run, undisturbed
):
    learner = run.start("learner", ENDLESS)
    # the time is also that to start the worker in
    workers = ("--algorithm.async_envs=true", "--algorithm.env_timeout_s=40")
    dying, hanging = (run.start("actor", ENDLESS, *workers) for _ in range(2))
    for actor in (dying, hanging):
        actor.wait_for(r"policy version \d+ applied")
    os.kill(worker_of(hanging), signal.SIGSTOP)
    os.kill(worker_of(dying), signal.SIGKILL)
    well = run.start("actor", ENDLESS)
    assert (dying.status(), hanging.status()) == (1, 1)
    assert re.search(r"environment worker number 0 \(pid \d+, exit status -9\) of 1 died", dying.text())
    assert re.search(r"worker number 0 \(pid \d+, at task 0\) of 1 has not answered for 40 s", hanging.text())
    assert "Traceback" not in dying.text() + hanging.text()
    go_on(learner)
    finish(run, learner, well)
    assert_exact(run, undisturbed)


# --- the network ----------------------------------------------------------------------------------------------


class Network:
    """Two machines and the router between them, each a network namespace of this one.

    Attributes:
        names: of the namespaces, by role.
        learner: the address of the learner's machine.
    """

    learner = "10.77.1.2"

    def __init__(self) -> None:
        self.names = {role: f"pirl-{role}-{os.getpid()}" for role in ("router", "learner", "actor")}

    def open(self) -> None:
        for name in self.names.values():
            self._ip("netns", "add", name)
            self._ip("-n", name, "link", "set", "lo", "up")
        router = self.names["router"]
        for subnet, role in enumerate(("learner", "actor"), 1):
            name, address = self.names[role], f"10.77.{subnet}"
            peer = ("type", "veth", "peer", "name", role, "netns", router)
            self._ip("link", "add", "name", "uplink", "netns", name, *peer)
            for place, device, host in ((name, "uplink", 2), (router, role, 1)):
                self._ip("-n", place, "address", "add", f"{address}.{host}/24", "dev", device)
                self._ip("-n", place, "link", "set", device, "up")
            self._ip("-n", name, "route", "add", "default", "via", f"{address}.1")
        self.forward(True)

    def forward(self, on: bool) -> None:
        """Let packets through, or drop all without a word to anybody."""
        command = f"echo {int(on)} > /proc/sys/net/ipv4/ip_forward"
        self._ip("netns", "exec", self.names["router"], "sh", "-c", command)

    def close(self) -> None:
        for name in self.names.values():
            with contextlib.suppress(subprocess.CalledProcessError):
                self._ip("netns", "delete", name)

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def network() -> Iterator[Network]:
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and `ip` of iproute2")
    network = Network()
    try:
        network.open()
    except subprocess.CalledProcessError as error:
        network.close()
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    yield network
    network.close()


@e2e
def test_a_network_that_is_cut_is_noticed_at_both_ends_and_restored_the_run_goes_on(
    run, network, undisturbed, tmp_path
):
    token = tmp_path / "token"
    token.write_text("of sixteen bytes or more")
    token.chmod(0o600)
    options = (ENDLESS, IMPATIENT, f"--algorithm.wire.host={network.learner}")
    options += (f"--algorithm.wire.token_file={token}",)
    learner, actor = (
        run.start(role, *options, namespace=network.names[role]) for role in ("learner", "actor")
    )
    actor.wait_for("policy version 1 applied")
    network.forward(False)
    actor.wait_for(r"lost the learner \(\w+\); waiting for it")
    learner.wait_for(r"actor \w+ left")
    network.forward(True)
    go_on(learner)
    finish(run, learner, actor)
    assert_exact(run, undisturbed)


def test_an_actor_says_once_a_minute_that_it_waits(monkeypatch):
    now, waits = [0.0], []
    clock = SimpleNamespace(
        monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + 20 * seconds)
    )
    monkeypatch.setattr("lerobot_pirl.transport.client.time", clock)
    client = LearnerClient("127.0.0.1", free_port(), connect_timeout=200, on_wait=waits.append)
    with pytest.raises(ConnectionError, match="no learner at .* for 210 s"):
        client.connect()
    client.close()
    assert waits == [0, 60, 120, 180]


# --- messages -------------------------------------------------------------------------------------------------


class Middleman(services_pb2_grpc.LearnerServiceServicer):
    """Stands between a learner and an actor, and hands on what the actor sends with a fault.

    Attributes:
        port: where it waits for the actor.
        kept: messages that a fault keeps for later.
        marked: what a fault has spoilt before.
    """

    def __init__(self, learner_port: int, fault: "Fault") -> None:
        self._channel = grpc.insecure_channel(f"127.0.0.1:{learner_port}")
        self.learner = services_pb2_grpc.LearnerServiceStub(self._channel)
        self._fault, self.kept, self.marked = fault, [], set()
        self._server = grpc.server(ThreadPoolExecutor(8))
        services_pb2_grpc.add_LearnerServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def Ready(self, request, context):  # noqa: N802
        return self.learner.Ready(request, timeout=10)

    def StreamParameters(self, request, context):  # noqa: N802
        stream = self.learner.StreamParameters(request, metadata=_sender(context))
        context.add_callback(stream.cancel)
        yield from stream

    def SendInteractions(self, request_iterator, context):  # noqa: N802
        return self.learner.SendInteractions(request_iterator, timeout=60, metadata=_sender(context))

    def SendTransitions(self, request_iterator, context):  # noqa: N802
        messages = [decode(data) for data in from_pieces(request_iterator)]
        if not self._fault(self, messages, _sender(context)):
            context.abort(grpc.StatusCode.UNAVAILABLE, "the connection was lost")
        return services_pb2.Empty()

    def deliver(self, messages: list[Message], sender: list) -> bool:
        """Hand on some messages in a call for each."""
        for message in messages:
            pieces = (to_piece("BEGIN", encode(message)), to_piece("END", b""))
            self.learner.SendTransitions(iter(pieces), timeout=60, metadata=sender)
        return True

    def is_first(self, message: Message) -> bool:
        """Mark a message's policy version; return whether it was marked for the first time."""
        version = message.header["policy_version"]
        known = version in self.marked
        self.marked.add(version)
        return not known

    def close(self) -> None:
        self._server.stop(grace=None)
        self._channel.close()


# (middleman, messages of a call, who sent them) -> whether the actor hears that they were delivered
Fault = Callable[[Middleman, list[Message], list], bool]


def _sender(context: grpc.ServicerContext) -> list[tuple[str, str]]:
    return [(ACTOR_KEY, dict(context.invocation_metadata())[ACTOR_KEY])]


def half(middleman: Middleman, messages: list[Message], sender: list) -> bool:
    """Of every version's first call half a message arrives: once the call ends there, once the connection does."""
    if not middleman.is_first(messages[0]):
        return middleman.deliver(messages, sender)
    data, under_way = encode(messages[0]), threading.Event()
    begin = to_piece("BEGIN", data[: len(data) // 2])
    with contextlib.suppress(grpc.RpcError):
        middleman.learner.SendTransitions(iter([begin]), timeout=60, metadata=sender)

    def left_alone() -> Iterator:
        yield begin
        under_way.set()
        # gRPC asks for more in a thread of its own
        cancelled.wait(60)

    cancelled = threading.Event()
    call = middleman.learner.SendTransitions.future(left_alone(), timeout=60, metadata=sender)
    under_way.wait(60)
    call.cancel()
    cancelled.set()
    return False


def answer_lost(middleman: Middleman, messages: list[Message], sender: list) -> bool:
    """Of every version's first call the answer is lost, so that the actor sends everything once more."""
    middleman.deliver(messages, sender)
    return not middleman.is_first(messages[0])


def backwards(middleman: Middleman, messages: list[Message], sender: list) -> bool:
    """The episodes of an iteration arrive in the reverse order."""
    middleman.kept += messages
    if len(middleman.kept) == EPISODES:
        middleman.deliver(middleman.kept[::-1], sender)
        middleman.kept = []
    return True


def late(middleman: Middleman, messages: list[Message], sender: list) -> bool:
    """The first message of every call arrives once more, behind the next call's, also that of the next version."""
    middleman.deliver(messages + middleman.kept, sender)
    middleman.kept = messages[:1]
    return True


def not_a_number(middleman: Middleman, messages: list[Message], sender: list) -> bool:
    """The first episode of every version comes with a NaN, and is asked for again before the actor has its answer."""
    first, *others = messages
    if middleman.is_first(first):
        middleman.deliver([_with_log_prob(first, float("nan"))], sender)
        time.sleep(1)
        return middleman.deliver(others, sender)
    return middleman.deliver(messages, sender)


def absurd(middleman: Middleman, messages: list[Message], sender: list) -> bool:
    """The first episode of version 1 says that it was all but impossible: numbers, but no gradient comes of them."""
    first, *others = messages
    if middleman.is_first(first) and first.header["policy_version"] == 1:
        first = _with_log_prob(first, -1e30)
    return middleman.deliver([first, *others], sender)


def _with_log_prob(message: Message, value: float) -> Message:
    log_prob = message.tensors["log_prob"].clone().fill_(value)
    return replace(message, tensors=message.tensors | {"log_prob": log_prob})


def train_through(run: ForkedRun, fault: Fault) -> Terminal:
    """Let an actor train with its learner through a middleman to the end; return the learner."""
    learner = run.start("learner", BOUNDED)
    learner.wait_for("listening on")
    middleman = Middleman(run.port, fault)
    try:
        # who collects does not know better
        run.port = middleman.port
        actor = run.start("actor", BOUNDED)
        end_well(learner, actor)
    finally:
        middleman.close()
    assert "Traceback" not in learner.text() + actor.text()
    return learner


@e2e
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (half, None),
        (answer_lost, r"episode \d+ was delivered before|policy version \d, which is over"),
        (backwards, None),
        (late, r"episode \d+ belongs to policy version \d, which is over"),
        (not_a_number, "log_prob holds a number that is not finite"),
    ],
)
def test_messages_that_come_by_halves_twice_out_of_order_late_or_spoilt_leave_no_trace(
    run, undisturbed, fault, reason
):
    learner = train_through(run, fault)
    assert_exact(run, undisturbed)
    if reason is None:
        assert refusals(run) == ""
    else:
        assert len(re.findall(reason, refusals(run))) >= UPDATES - 1
    if fault is half:
        assert learner.text().count("without its end") >= UPDATES


@e2e
def test_a_gradient_that_is_no_number_changes_no_weight_and_the_run_goes_on(run, undisturbed):
    learner = train_through(run, absurd)
    assert_exact(run, undisturbed[:1])
    records = run.metrics()
    assert [record["train/skipped_steps"] for record in records] == [0, 1, 1, 1]
    assert "1 steps of the last" in learner.text()
    # the policy that collects next is the one that is learned from next
    assert all(record["train/ratio_max_dev_first"] < 1e-3 for record in records[2:])
    assert all(record["train/policy_grad_norm"] > 0 for record in records[2:])


def test_a_wish_for_episodes_that_finds_the_learner_busy_is_repeated(monkeypatch):
    monkeypatch.setattr("lerobot_pirl.transport.server.FULL_S", 0.1)
    server = LearnerServer("127.0.0.1", 0, max_rollouts=1)
    client = LearnerClient("127.0.0.1", server.port, connect_timeout=10)
    client.connect()
    client.send(Message("rollout", {"policy_version": 0}))
    asking = threading.Thread(target=client.ask, args=("a session", 1))
    asking.start()
    # long enough to be refused
    asking.join(1)
    assert [server.receive(timeout=10).kind for _ in range(2)] == ["rollout", "ask"]
    client.close()
    server.close()


def test_a_message_without_its_end_is_refused():
    data = encode(Message("rollout", {"policy_version": 0}))
    with pytest.raises(WireError, match=f"left after {len(data) - 1} bytes, without its end"):
        list(from_pieces([to_piece("BEGIN", data[:-1])]))
