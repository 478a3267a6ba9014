"""How collection scales with actors: one learner, 1, 2, 4 and 8 actors on the tabletop whose environments sleep as well.

An environment that sleeps stands for a simulator that has a core of its own: what is measured is the plugin's protocol,
not this machine's cores. All actors are threads of one process with a policy that costs nothing; the learner hands out
episodes, receives them over gRPC and makes no update. The numbers of actors take turns, so that a busy machine slows all
alike; a ratio is the median of a number's iterations against the median of one actor's in the same run.

    python -m benchmarks.actors [--rounds 3] [--step_ms 200] [--write]
"""

import argparse
import json
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from lerobot_pirl.collector import Collector, next_of
from lerobot_pirl.envs import TabletopEnv, make_chunk_envs
from lerobot_pirl.episodes import Episode, EpisodeSpec, assemble
from lerobot_pirl.inbox import Inbox
from lerobot_pirl.ledger import Ledger
from lerobot_pirl.transport import LearnerClient, LearnerServer
from lerobot_pirl.wire import Message

RESULT = Path(__file__).parent / "results" / "actors.json"
COUNTS = (1, 2, 4, 8)
TARGET = 0.9
CHUNK, CHUNKS_PER_EPISODE, EPISODES = 2, 5, 64
PIXELS, ACTION_DIM = 16, 7
ADDRESS = {"config_hash": "benchmark", "session": "benchmark"}


class SleepyEnvs(gym.vector.VectorWrapper):
    """One environment of the tabletop that sleeps in every chunk and runs out of time after a few of them."""

    def __init__(self, step_s: float) -> None:
        task = TabletopEnv(observation_height=PIXELS, observation_width=PIXELS)
        super().__init__(make_chunk_envs(task, 1, CHUNK, CHUNK * CHUNKS_PER_EPISODE))
        self.step_s = step_s

    def set_attr(self, name: str, values: list) -> None:
        """Pass on what a collector sets."""
        self.env.set_attr(name, values)

    def step(self, actions: np.ndarray) -> tuple:
        """Sleep, and step."""
        time.sleep(self.step_s)
        return self.env.step(actions)


class NoPolicy:
    """An adapter whose network costs nothing; it never moves."""

    n_action_steps = CHUNK
    gripper_index = gripper_temperature = processors = None
    noise_std = torch.full((2, CHUNK, 3), 0.01)

    def prepare_observation(self, observation: dict, tasks: list[str]) -> np.ndarray:
        """Return where the gripper is."""
        return observation["robot_state"]["eef"]["pos"]

    def encode(self, batch: np.ndarray) -> dict[str, Tensor]:
        """Return that as features."""
        return {"x": torch.from_numpy(batch)}

    def predict_x0(self, features: dict, x_t: Tensor, t: Tensor) -> Tensor:
        """Predict no motion."""
        return torch.zeros_like(x_t)

    def execute(self, x_0: Tensor, gripper: None) -> Tensor:
        """Return a chunk as it is."""
        return x_0

    def environment_actions(self, actions: Tensor) -> Tensor:
        """Return a chunk of the environment's actions."""
        return torch.zeros(*actions.shape[:2], ACTION_DIM)


class SleepyActor(threading.Thread):
    """What an actor does, without a policy's weights."""

    def __init__(self, port: int, step_s: float) -> None:
        super().__init__(daemon=True)
        self.client = LearnerClient("127.0.0.1", port, 10.0)
        self.collector = Collector(SleepyEnvs(step_s), NoPolicy(), 0.5, 0)
        self.waiting: list[EpisodeSpec] = []
        self.version = 0

    def run(self) -> None:
        """Collect until the learner ends."""
        while (message := self.client.next_message()).kind != "end":
            if message.kind == "weights":
                if message.header["policy_version"] == 0:
                    self.client.ask(ADDRESS["session"], 1)
                self.version = message.header["policy_version"]
            else:
                self._receive(message)
                self.collector.explore(self._next, 1.0, self._send)
        self.client.close()

    def _receive(self, share: Message) -> None:
        self.waiting += [EpisodeSpec(number, 0, 0) for number in share.header["numbers"]]

    def _next(self, previous: Episode | None) -> Episode | None:
        for share in self.client.pop_shares():
            self._receive(share)
        if not self.waiting:
            return None
        return self.collector.episode(self.waiting.pop(next_of(self.waiting, previous)), self.version)

    def _send(self, episode: Episode) -> None:
        header, tensors = assemble([episode], self.version).to_tensors()
        self.client.post(Message("rollout", header | ADDRESS | {"number": episode.spec.number}, tensors))


class Group:
    """A learner's end and so many actors."""

    def __init__(self, count: int, step_s: float) -> None:
        self.server = LearnerServer("127.0.0.1", 0)
        self.ledger = Ledger(EPISODES)
        self.inbox = Inbox(self.server, self.ledger, ADDRESS, 600.0, 600.0, lambda: None)
        self.version = 0
        self.actors = [SleepyActor(self.server.port, step_s) for _ in range(count)]
        for actor in self.actors:
            actor.client.connect()
            actor.start()
        self.publish()
        while len(self.ledger.peers) < count:
            time.sleep(0.05)

    def publish(self) -> None:
        """Offer a version without weights."""
        header = {"session": ADDRESS["session"], "policy_version": self.version}
        self.server.publish(Message("weights", header))

    def iterate(self) -> float:
        """Return the seconds of an iteration, from its publication to its last episode."""
        started = time.perf_counter()
        self.publish()
        self.inbox.open(self.version, self.version + 1, 0)
        self.inbox.rollout(self.version)
        seconds = time.perf_counter() - started
        self.ledger.train(self.version)
        self.version += 1
        return seconds

    def close(self) -> None:
        """End the actors."""
        self.server.end(ok=True)


def measure(rounds: int, step_s: float, tell: Callable[[str], None]) -> dict[str, object]:
    """Return medians and ratios of all numbers of actors."""
    groups = {count: Group(count, step_s) for count in COUNTS}
    seconds: dict[int, list[float]] = {count: [] for count in COUNTS}
    for _ in range(rounds):
        for count, group in groups.items():
            seconds[count].append(group.iterate())
    for group in groups.values():
        group.close()
    medians = {count: statistics.median(values) for count, values in seconds.items()}
    efficiency = {count: medians[1] / (count * medians[count]) for count in COUNTS}
    for count in COUNTS:
        tell(
            f"{count} actors: {medians[count]:7.2f} s for {EPISODES} episodes, {medians[1] / medians[count]:5.2f} times as "
            f"fast as one, {efficiency[count]:.2f} of linear (target {TARGET})"
        )
    ideal = EPISODES * CHUNKS_PER_EPISODE * step_s
    tell(f"one actor sleeps {ideal:.2f} s of its {medians[1]:.2f} s")
    return {
        "episodes": EPISODES,
        "step_s": step_s,
        "rounds": rounds,
        "median_s": {str(count): round(value, 3) for count, value in medians.items()},
        "of_linear": {str(count): round(value, 3) for count, value in efficiency.items()},
        "target": TARGET,
        "machine": {"python": platform.python_version(), "system": platform.system()},
    }


def main() -> int:
    """Measure, print, and write the result if asked to; returns 1 when a number of actors misses the target."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="iterations of every number of actors")
    parser.add_argument(
        "--step_ms", type=float, default=200.0, help="what a chunk sleeps; LIBERO's, on one core, takes 300"
    )
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(args.rounds, args.step_ms / 1000, partial(print, flush=True))
    if args.write:
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    return int(min(result["of_linear"].values()) < TARGET)


if __name__ == "__main__":
    sys.exit(main())
