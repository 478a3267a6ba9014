"""Several processes train one policy under ``accelerate launch``: what they tell each other, and their sums.

The first process talks to actors, writes all files and decides; the others take their share of every minibatch's rows.
What they add up is the same in all of them, so their weights stay equal. JSON and plain tensors travel, nothing else.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lerobot_pirl.rollout import Rollout

logger = logging.getLogger(__name__)

# how long one process waits for another: longer than a start or a checkpoint takes
TIMEOUT = timedelta(minutes=10)
_WAIT, _UPDATE, _END = "wait", "update", "end"


def launched() -> tuple[int, int]:
    """Return this process's rank and the number of processes, as a launcher set them; (0, 1) without one.

    Raises:
        ValueError: when the environment holds something else than numbers.
    """
    found = [os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")]
    if not all(each.isdecimal() for each in found):
        raise ValueError(
            f"the environment has RANK={found[0]!r} and WORLD_SIZE={found[1]!r} instead of numbers; unset them, or start "
            "with accelerate launch"
        )
    rank, size = map(int, found)
    return (rank, size) if "RANK" in os.environ and size > 1 else (0, 1)


@dataclass(frozen=True)
class World:
    """The processes that train together. The sums and broadcasts of one that is alone do nothing.

    Any of them raises ConnectionError when another process has ended, or does not answer for :data:`TIMEOUT`.

    Attributes:
        rank: of this process; 0 is the first.
        size: number of processes.
        group: all of them, for tensors on the CPU.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    def share(self, rows: Tensor) -> tuple[Tensor, float]:
        """Return this process's part of the rows ``[B]``, and what it counts: 1.

        Where there are fewer rows than processes, one without a row repeats the first, which counts 0: so it has the
        same gradients and names to add as the others.
        """
        if self.rank < len(rows):
            return rows.tensor_split(self.size)[self.rank], 1.0
        return rows[:1], 0.0

    def join(self, values: Tensor, num_rows: int) -> Tensor:
        """Return what all processes found for their shares of the rows, in the rows' order, ``[B, ...]`` on the CPU."""
        if self.size == 1:
            return values
        whole = values.new_zeros(num_rows, *values.shape[1:])
        if self.rank < num_rows:
            whole.tensor_split(self.size)[self.rank].copy_(values)
        self._sum(whole)
        return whole

    def add(self, numbers: dict[str, float]) -> dict[str, float]:
        """Return the sums over all processes of numbers that all have under the same names."""
        if self.size == 1:
            return numbers
        values = torch.tensor(list(numbers.values()), dtype=torch.float64)
        self._sum(values)
        return dict(zip(numbers, values.tolist(), strict=True))

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their sums over all processes."""
        if self.size == 1:
            return
        with self._reaching():
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
                work.wait()

    def align(self, *states: dict[str, Tensor]) -> None:
        """Wait until all processes are here, and give them the first one's values of these tensors, in place."""
        if self.size == 1:
            return
        with self._reaching(), torch.no_grad():
            dist.barrier(group=self.group)
            for tensor in [tensor for state in states for tensor in state.values()]:
                dist.broadcast(tensor, src=0)

    def keep_waiting(self) -> None:
        """Tell the others that there is nothing to do yet, but that this process is alive."""
        self._tell(_WAIT)

    def update(self, rollout: Rollout) -> None:
        """Tell the others what to learn from."""
        header, tensors = rollout.to_tensors()
        self._tell(_UPDATE, header, tensors)

    def end(self) -> None:
        """Let the others go; whether they are still there does not matter."""
        with suppress(ConnectionError):
            self._tell(_END)

    def hear(self) -> Rollout | None:
        """Wait for what the first process tells: the next rollout to learn from, or None at the end."""
        while True:
            length = torch.zeros(1, dtype=torch.int64)
            self._broadcast(length)
            text = torch.empty(int(length), dtype=torch.uint8)
            self._broadcast(text)
            told = json.loads(text.numpy().tobytes())
            if told["word"] == _END:
                return None
            if told["word"] == _UPDATE:
                break
        tensors = {
            name: torch.empty(shape, dtype=getattr(torch, dtype))
            for name, (dtype, shape) in told["tensors"].items()
        }
        for tensor in tensors.values():
            self._broadcast(tensor)
        return Rollout.from_tensors(told["header"], tensors)

    def _tell(self, word: str, header: dict | None = None, tensors: dict[str, Tensor] | None = None) -> None:
        if self.size == 1:
            return
        values = {name: value.contiguous() for name, value in (tensors or {}).items()}
        kinds = {
            name: (str(value.dtype).removeprefix("torch."), list(value.shape))
            for name, value in values.items()
        }
        told = json.dumps({"word": word, "header": header, "tensors": kinds}).encode()
        text = torch.frombuffer(bytearray(told), dtype=torch.uint8)
        for tensor in (torch.tensor([len(text)]), text, *values.values()):
            self._broadcast(tensor)

    def _broadcast(self, tensor: Tensor) -> None:
        if tensor.numel():
            with self._reaching():
                # bytes, because not every backend knows every type
                dist.broadcast(tensor.flatten().view(torch.uint8), src=0, group=self.group)

    def _sum(self, tensor: Tensor) -> None:
        if tensor.numel():
            with self._reaching():
                dist.all_reduce(tensor, group=self.group)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ConnectionError(
                f"process {self.rank} of the learner's {self.size} cannot reach another one, which has ended or hangs "
                f"({reason}); see what that one says, and resume the run"
            ) from error


ALONE = World()


def join_world(device: str) -> World:
    """Return the world that this process was launched in, once all its processes are there.

    Args:
        device: the policy's; of several GPUs of one machine, every process makes one its own.

    Raises:
        ValueError: when several processes cannot train on the device, or accelerate is not installed.
    """
    _, size = launched()
    if size == 1:
        if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
            logger.warning(
                "accelerate launch started one process only; for several give it --multi_gpu, on CPUs too"
            )
        return ALONE
    if device not in ("cpu", "cuda"):
        raise ValueError(
            f"policy.device={device!r} with {size} processes; set it to 'cuda', of which every process takes one, or to "
            "'cpu'"
        )
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ValueError(
            f"{size} processes train together with accelerate; install it with pip install 'lerobot[accelerate-dep]' "
            f"({error})"
        ) from error
    state = PartialState(cpu=device == "cpu", timeout=TIMEOUT)
    logger.info("%d processes train together; the first one's id is %d", size, os.getpid())
    return World(state.process_index, state.num_processes, dist.new_group(backend="gloo", timeout=TIMEOUT))
