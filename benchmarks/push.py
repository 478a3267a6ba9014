"""How long new weights take from the learner's memory into the actor's policy, and how much memory that takes.

Learner and actor are two processes on loopback. These ways take turns:

- ours: publish, stream, receive, check and copy into the policy;
- raw TCP: as many bytes from one process's memory into the other's, no more;
- bare gRPC: as many bytes in a stream of pieces of our size, without messages, checks and a policy;
- LeRobot's own service, queue and conversions with the parameters of the whole policy, where ours sends those that
  train, rounded to bfloat16 as the policy reads them: the share of them is the real X-VLA's, at ``--scale`` of its size.

    python -m benchmarks.push [--megabytes 100 600] [--rounds 5] [--scale 0.2] [--write]
"""

import argparse
import multiprocessing
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import torch

from benchmarks import push_lerobot
from benchmarks.memory import peak
from benchmarks.push_lerobot import make_policy
from benchmarks.ratios import Ratio, report
from lerobot_pirl.transport import LearnerClient, LearnerServer
from lerobot_pirl.transport.pieces import PIECE_BYTES
from lerobot_pirl.weights import load_weights, trainable_parameters
from lerobot_pirl.wire import Message

TARGET, SENDER, RECEIVER, LEROBOT = 0.7, 0.1, 1.3, 1 / 40
# numbers in the real X-VLA, and those of them that train
PARAMETERS, TRAINABLE = 879_500_000, 308_800_000
SERVICE, METHOD = "bare", "read"


class Actor:
    """The other process: does what it is told, and answers when it is done."""

    def __init__(self, pipe: Any, num_parameters: int, port: int, bare_port: int) -> None:
        torch.set_num_threads(1)
        self.pipe, self.policy = pipe, make_policy(num_parameters)
        self.client = LearnerClient("127.0.0.1", port, 60.0)
        self.client.connect()
        self.read = grpc.insecure_channel(f"127.0.0.1:{bare_port}").unary_stream(f"/{SERVICE}/{METHOD}")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.buffer = torch.zeros(sum(p.nbytes for p in self.policy.parameters()), dtype=torch.uint8)
        pipe.send(self.listener.getsockname()[1])
        self.socket, _ = self.listener.accept()

    def serve(self) -> None:
        """Answer with the time at which the weights were there and the memory that they took, until told to stop."""
        # before the first push: what is kept for the next one counts in every one
        before = None
        while (what := self.pipe.recv()) != "stop":
            with peak(before if what == "ours" else None) as memory:
                if what == "ours":
                    before = memory.before
                self.pipe.send("ready")
                getattr(self, what)()
                now = time.perf_counter()
            self.pipe.send((now, memory.extra))
        self.client.close()

    def ours(self) -> None:
        """Take what is published."""
        message = self.client.next_message()
        load_weights(self.policy, message.tensors)
        message.tensors.clear()

    def tcp(self) -> None:
        """Take as many bytes."""
        view, got = memoryview(self.buffer.numpy()), 0
        while got < len(view):
            got += self.socket.recv_into(view[got:])

    def grpc(self) -> None:
        """Take as many bytes of a stream."""
        view, got = memoryview(self.buffer.numpy()), 0
        for piece in self.read(b""):
            view[got : got + len(piece)] = piece
            got += len(piece)


def act(pipe: Any, *parameters_and_ports: int) -> None:
    """Be the other process."""
    Actor(pipe, *parameters_and_ports).serve()


def bare_server(payload: np.ndarray) -> tuple[grpc.Server, int]:
    """Return a server that streams bytes to whoever asks, and its port."""

    def read(request: bytes, context: grpc.ServicerContext) -> Any:
        for start in range(0, len(payload), PIECE_BYTES):
            yield payload[start : start + PIECE_BYTES].tobytes()

    server = grpc.server(ThreadPoolExecutor(1))
    handlers = {METHOD: grpc.unary_stream_rpc_method_handler(read)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, port


class Pair:
    """This process as the learner, and its actor; with ``rounded``, weights travel in bfloat16, as of a bfloat16 policy."""

    def __init__(self, num_parameters: int, rounded: bool = False) -> None:
        self.rounded = rounded
        self.server = LearnerServer("127.0.0.1", 0)
        self.weights = {
            name: p.detach() for name, p in trainable_parameters(make_policy(num_parameters)).items()
        }
        self.num_bytes = sum(value.nbytes for value in self.weights.values())
        # not zeros: those would be one page of memory, over and over
        self.payload = torch.ones(self.num_bytes, dtype=torch.uint8).numpy()
        self.bare, bare_port = bare_server(self.payload)
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=act, args=(other, num_parameters, self.server.port, bare_port))
        self.process.start()
        self.socket = socket.create_connection(("127.0.0.1", self.pipe.recv()))
        self.version = 0

    def _measure(self, what: str, send: Any) -> tuple[float, int | None, int | None]:
        """Return the seconds that a way takes, and the memory that it takes here and there."""
        self.pipe.send(what)
        self.pipe.recv()
        with peak() as memory:
            started = time.perf_counter()
            send()
            # both processes read the same clock
            done, theirs = self.pipe.recv()
        return done - started, memory.extra, theirs

    def ours(self) -> tuple[float, int | None, int | None]:
        """Push weights as the learner does after an update, which changes all of them."""
        self.server.withdraw()
        for value in self.weights.values():
            value.add_(1)
        self.version += 1
        header = {"policy_version": self.version, "session": "x"}

        def publish() -> None:
            weights = {k: v.bfloat16() if self.rounded else v for k, v in self.weights.items()}
            self.server.publish(Message("weights", header, weights))

        return self._measure("ours", publish)

    def tcp(self) -> float:
        """Send as many bytes."""
        return self._measure("tcp", lambda: self.socket.sendall(self.payload))[0]

    def grpc(self) -> float:
        """Let the actor ask for as many bytes."""
        return self._measure("grpc", lambda: None)[0]

    def close(self) -> None:
        """Stop the actor."""
        self.pipe.send("stop")
        self.process.join(30)
        self.server.close()
        self.bare.stop(None)


def against_tcp(megabytes: int, rounds: int) -> list[Ratio]:
    """Measure a push of so many megabytes; the first round does not count."""
    speed = Ratio(f"push of {megabytes} MB to raw TCP", "MB/s", TARGET)
    bare = Ratio(f"push of {megabytes} MB to a bare gRPC stream", "MB/s", TARGET)
    sender = Ratio(f"extra memory of the sender of {megabytes} MB to these", "MB", SENDER, at_least=False)
    receiver = Ratio(
        f"extra memory of the receiver of {megabytes} MB to these", "MB", RECEIVER, at_least=False
    )
    pair = Pair(megabytes * 10**6 // 4)
    size = pair.num_bytes / 1e6
    try:
        for number in range(rounds + 1):
            tcp, grpc_alone = pair.tcp(), pair.grpc()
            ours, here, there = pair.ours()
            if number > 0:
                speed.add(size / ours, size / tcp)
                bare.add(size / ours, size / grpc_alone)
                for ratio, extra in ((sender, here), (receiver, there)):
                    if extra is not None:
                        ratio.add(extra / 1e6, size)
    finally:
        pair.close()
    return [speed, bare, *(ratio for ratio in (sender, receiver) if ratio.ours)]


def against_lerobot(scale: float, rounds: int) -> Ratio:
    """Measure the push of a policy with the real one's share of parameters that train."""
    ratio = Ratio(
        f"push of X-VLA at {scale:g} of its size, what trains, to LeRobot's way", "s", LEROBOT, at_least=False
    )
    pair = Pair(round(scale * TRAINABLE), rounded=True)
    try:
        with push_lerobot.Pair(round(scale * PARAMETERS)) as stock:
            for number in range(rounds + 1):
                theirs = stock.push()
                ours, _, _ = pair.ours()
                if number > 0:
                    ratio.add(ours, theirs)
    finally:
        pair.close()
    return ratio


def main() -> None:
    """Measure, print and, if asked to, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 600])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=0.2, help="of the real policy, for LeRobot's way")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/push.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ratios = [ratio for size in options.megabytes for ratio in against_tcp(size, options.rounds)]
    ratios.append(against_lerobot(options.scale, min(3, options.rounds)))
    report(ratios, "push", {"scale": options.scale}, options.write)


if __name__ == "__main__":
    main()
