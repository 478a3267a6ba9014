"""Hostile input at length: mutated messages, streams into a learner that trains, configs.

Decoders and configs are called in this process. The streams go over gRPC, between those of an honest actor, to a learner
that must go on training; some are left half way. A defect ends the run with its traceback and the seed. Memory is the
process's resident set, measured ten times a part.

    python -m benchmarks.fuzz [--messages 1000000] [--streams 10000] [--configs 2000] [--seed 0] [--output FILE]
"""

import argparse
import contextlib
import copy
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc
from lerobot.transport import services_pb2_grpc

from lerobot_pirl.actor import Actor
from lerobot_pirl.learner import Learner
from tests.fuzzing import (
    good_messages,
    mutate_config,
    mutate_message,
    mutate_stream,
    option_names,
    swallow,
    talk,
)
from tests.smoke import versions
from tests.test_algorithm import make_rollout
from tests.test_bad_configs import BASES, complaint, decode, verdict
from tests.test_learner import episodes_of
from tests.toy import tiny_config

RESULT = Path(__file__).parent / "results" / "fuzz.json"
MIB = 2**20
# what the allocator may keep from a part's first tenth to its end
ALLOWED_GROWTH_MIB = 64.0
# how a call ends that a learner does not answer, or that it fails at
HUNG = ("DEADLINE_EXCEEDED", "UNKNOWN", "INTERNAL", "UNAVAILABLE")


@dataclass
class Part:
    """What one part did and saw.

    Attributes:
        outcomes: how many inputs came to what.
        resident_mib: of the process, after every tenth of the inputs.
        notes: what else there is to say.
    """

    inputs: int
    seconds: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict)
    resident_mib: list[float] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def growth_mib(self) -> float:
        """Growth of the resident set from the first tenth on."""
        return max(self.resident_mib) - self.resident_mib[0]


def resident_mib() -> float:
    """Return the resident set of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def repeat(count: int, step: Callable[[int], str]) -> Part:
    """Call ``step`` so many times and count what it returns."""
    part, started = Part(count), time.perf_counter()
    for i in range(count):
        outcome = step(i)
        part.outcomes[outcome] = part.outcomes.get(outcome, 0) + 1
        if (i + 1) % max(1, count // 10) == 0:
            part.resident_mib.append(resident_mib())
    part.seconds = time.perf_counter() - started
    return part


def decoders(count: int, seed: int) -> Part:
    """Put mutated messages through the decoders."""
    rng, good = random.Random(seed), good_messages()

    def step(i: int) -> str:
        data = mutate_message(rng, rng.choice(good), rng.choice(good))
        return swallow(data, list(mutate_stream(rng, data)))

    return repeat(count, step)


def configs(count: int, seed: int) -> Part:
    """Validate mutated configs, in an empty folder that must stay so; raises what is no sentence about an option."""
    rng, names = random.Random(seed), option_names(decode(BASES[0]))

    def step(i: int) -> str:
        raw, touched = mutate_config(rng, rng.choice(BASES), names)
        message = verdict(raw)
        if why := complaint(message, touched):
            raise AssertionError(f"config {i} of seed {seed}: the refusal {why}: {touched} {message!r}")
        return "refused" if message else "valid"

    with tempfile.TemporaryDirectory() as folder:
        before = os.getcwd()
        os.chdir(folder)
        try:
            part = repeat(count, step)
            part.notes["left behind"] = os.listdir(folder)
        finally:
            os.chdir(before)
    return part


def attack(learner: Learner, count: int, seed: int) -> Part:
    """Send mutated streams to a learner that runs in another thread, as a stranger who knows what it wants."""
    rng = random.Random(seed)
    (rollout, *_) = episodes_of(make_rollout(learner.adapter))
    channel = grpc.insecure_channel(f"127.0.0.1:{learner.server.port}")
    stub = services_pb2_grpc.LearnerServiceStub(channel)
    good: list[bytes] = []

    def step(i: int) -> str:
        if i % 20 == 0:
            version = rollout.policy_version = learner.version
            per_iteration = learner.cfg.algorithm.episodes_per_iteration
            address = {
                "policy_version": version,
                "session": learner.session,
                "config_hash": learner.metadata.config_hash,
                "number": version * per_iteration + rng.randrange(per_iteration),
            }
            good[:] = good_messages(address, rollout)
        return talk(rng, stub, mutate_message(rng, rng.choice(good), rng.choice(good)))

    part = repeat(count, step)
    channel.close()
    return part


def wait_for_update(learner: Learner, version: int) -> int:
    """Wait until a learner has done so many updates; return them, or raise TimeoutError after ten minutes."""
    deadline = time.monotonic() + 600
    while learner.version < version:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the learner still has {learner.version} updates instead of {version}")
        time.sleep(0.1)
    return learner.version


def streams(count: int, seed: int, folder: Path) -> Part:
    """Let a learner and an actor train while a stranger sends mutated streams."""
    cfg = tiny_config(
        episodes_per_iteration=4, n_envs=2, max_episode_steps=8, minibatch_size=8, micro_batch_size=8
    )
    cfg.output_dir, cfg.steps, cfg.save_freq, cfg.log_freq = folder / "run", 10**6, 0, 0
    cfg.algorithm.wire.port = 0
    learner = Learner(cfg)
    honest = copy.deepcopy(cfg)
    honest.algorithm.wire.port = learner.server.port
    parts: list[Part] = []

    def besiege() -> None:
        try:
            before = wait_for_update(learner, 1)
            part = attack(learner, count, seed)
            part.notes["updates meanwhile"] = learner.version - before
            # an update that was under way may be of episodes from before
            wait_for_update(learner, learner.version + 2)
            parts.append(part)
        finally:
            learner.interrupts.requested = True

    def collect() -> None:
        actor = Actor(honest)
        try:
            actor.run()
        finally:
            actor.close()

    threads = [threading.Thread(target=work, daemon=True) for work in (besiege, collect)]
    for thread in threads:
        thread.start()
    with contextlib.suppress(KeyboardInterrupt):
        learner.run()
    for thread in threads:
        thread.join(60)
    if not parts:
        raise AssertionError(f"the learner did not survive {count} streams of seed {seed}")
    return parts[0]


def main() -> None:
    """Run all parts and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--configs", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    report: dict[str, Any] = {"seed": arguments.seed, "versions": versions()}
    with tempfile.TemporaryDirectory() as folder:
        every = {
            "messages": lambda count: decoders(count, arguments.seed),
            "configs": lambda count: configs(count, arguments.seed),
            "streams": lambda count: streams(count, arguments.seed, Path(folder)),
        }
        for name, run in every.items():
            if count := getattr(arguments, name):
                part = run(count)
                report[name] = asdict(part) | {"growth_mib": part.growth_mib}
                print(f"{name}: {json.dumps(report[name])}", flush=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    grown = [name for name in every if report.get(name, {}).get("growth_mib", 0) > ALLOWED_GROWTH_MIB]
    hung = [name for name in HUNG if report.get("streams", {}).get("outcomes", {}).get(name)]
    if hung:
        raise SystemExit(f"streams ended with {', '.join(hung)}")
    if left := report.get("configs", {}).get("notes", {}).get("left behind"):
        raise SystemExit(f"configs left behind {', '.join(left)}")
    if grown:
        raise SystemExit(f"memory grew by more than {ALLOWED_GROWTH_MIB} MiB in: {', '.join(grown)}")


if __name__ == "__main__":
    main()
