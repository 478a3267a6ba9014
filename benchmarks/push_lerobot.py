"""A push of weights as LeRobot makes it, between two processes: its service, its queues, its conversions."""

import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import torch
from lerobot.rl.learner_service import LearnerService
from lerobot.rl.queue import get_last_item_from_queue
from lerobot.transport import services_pb2, services_pb2_grpc
from lerobot.transport.utils import (
    bytes_to_state_dict,
    grpc_channel_options,
    receive_bytes_in_chunks,
    state_to_bytes,
)
from torch import multiprocessing as torch_multiprocessing
from torch import nn

# its MAX_WORKERS
_THREADS = 3
_WIDTH = 1024


def make_policy(num_parameters: int) -> nn.Module:
    """Return layers with so many parameters, about, and a small one."""
    layers = [nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(max(1, num_parameters // _WIDTH**2))]
    return nn.Sequential(*layers, nn.Linear(_WIDTH, 7))


def act(pipe: Any, num_parameters: int, port: int) -> None:
    """Be the actor: load what comes into a policy and answer with the time at which it was there."""
    torch.set_num_threads(1)
    policy = make_policy(num_parameters)
    channel = grpc.insecure_channel(f"127.0.0.1:{port}", grpc_channel_options())
    stream = services_pb2_grpc.LearnerServiceStub(channel).StreamParameters(services_pb2.Empty())
    received, over = torch_multiprocessing.Queue(), threading.Event()
    threading.Thread(target=receive_bytes_in_chunks, args=(stream, received, over), daemon=True).start()
    pipe.send("ready")
    while not pipe.poll():
        content = get_last_item_from_queue(received, block=True, timeout=0.01)
        if content is not None:
            policy.load_state_dict(bytes_to_state_dict(content))
            pipe.send(time.perf_counter())
    over.set()
    channel.close()


class Pair:
    """This process as LeRobot's learner, and its actor; leave it to end both."""

    def __init__(self, num_parameters: int) -> None:
        self.policy = make_policy(num_parameters)
        self.over, self.parameters = threading.Event(), torch_multiprocessing.Queue()
        service = LearnerService(
            self.over, self.parameters, 0, torch_multiprocessing.Queue(), torch_multiprocessing.Queue()
        )
        self.server = grpc.server(ThreadPoolExecutor(_THREADS), options=grpc_channel_options())
        services_pb2_grpc.add_LearnerServiceServicer_to_server(service, self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=act, args=(other, num_parameters, port))
        self.process.start()
        self.pipe.recv()

    def __enter__(self) -> "Pair":
        return self

    def push(self) -> float:
        """Return the seconds of a push, until the actor's policy has it."""
        started = time.perf_counter()
        self.parameters.put(state_to_bytes(self.policy.state_dict()))
        return self.pipe.recv() - started

    def __exit__(self, *_: object) -> None:
        self.pipe.send("stop")
        self.over.set()
        self.process.join(30)
        self.server.stop(None)
