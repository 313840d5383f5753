"""Measure what lies between the processes: bandwidths, delays and differences of their clocks."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from scaleup.training import interfaces
from scaleup.training.distributed import World
from scaleup.training.doctor.steps import Meeting

# Bytes to measure with. A larger size is left out if it would take longer than LONG_S.
SIZES = tuple(2**power for power in (18, 21, 24, 26, 28))
LONG_S, REPEATS = 1.0, 3
ROUNDS = 10  # questions to another clock


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A collective as it was measured; `seconds` are those of the slowest process."""

    size: int  # bytes of the whole tensor
    seconds: float

    def time(self, size: int) -> float:
        """Return the seconds for another size at the same speed."""
        return size * self.seconds / self.size


def join(meeting: Meeting) -> None:
    """Make the default process group, with gloo, as a run makes one for its votes."""
    place = meeting.place
    limit = timedelta(seconds=meeting.limit_s)
    with interfaces.named_in_errors():
        dist.init_process_group(
            "gloo",
            store=meeting.connection("gloo"),
            rank=place.rank,
            world_size=place.size,
            timeout=limit,
        )
    dist.barrier()


def join_gpus(world: World, limit_s: float) -> dist.ProcessGroup:
    """Make a group with NCCL, and use it once, because NCCL connects at its first use."""
    group = dist.new_group(backend="nccl", timeout=timedelta(seconds=limit_s))
    assert group is not None
    dist.all_reduce(torch.zeros(1, device=world.device), group=group)
    torch.cuda.synchronize(world.device)
    return group


def _slowest(seconds: float) -> float:
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value)


def _collective(name: str, size: int, world: World, group: Any) -> Callable[[], object]:
    """Return a function that moves a tensor of `size` bytes, or about as many."""
    count = size // 4 // world.size
    data = torch.zeros(count * world.size, device=world.device)
    if name == "all-reduce":
        return lambda: dist.all_reduce(data, group=group)
    if name == "broadcast":
        return lambda: dist.broadcast(data, 0, group=group)
    part = torch.zeros(count, device=world.device)
    return lambda: dist.all_gather_into_tensor(data, part, group=group)


def measure(name: str, world: World, group: Any) -> Transfer:
    """Measure all-reduce, broadcast or all-gather. All processes must call this.

    Args:
        group: the group that training uses: NCCL's, or None for gloo.
    """
    previous: Transfer | None = None
    for size in SIZES:
        if previous is not None and previous.time(size) * (REPEATS + 1) > LONG_S:
            break
        move = _collective(name, size, world, group)
        move()
        times = []
        for _ in range(REPEATS):
            _wait_for(world.device)
            dist.barrier()
            begin = time.perf_counter()
            move()
            _wait_for(world.device)
            times.append(time.perf_counter() - begin)
        previous = Transfer(size, _slowest(statistics.median(times)))
    assert previous is not None
    return previous


def measure_vote() -> float:
    """Return the seconds of the vote that follows each training step: one number, through gloo."""
    times, number = [], torch.tensor(0)
    for _ in range(ROUNDS):
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(number, dist.ReduceOp.MAX)
        times.append(time.perf_counter() - begin)
    return _slowest(statistics.median(times))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock_differences(world: World, hosts: list[str]) -> dict[str, tuple[float, float]]:
    """Return by how many seconds the clock of each other host is ahead of rank 0's, and the error.

    Rank 0 asks one process of each host for its time, several times. The answer that comes back
    first counts. It was given between question and answer, so its error is half of that time.
    Every process must call this; only rank 0 gets the result.
    """
    differences = {}
    for host in dict.fromkeys(hosts):
        rank = hosts.index(host)
        if world.main and host != hosts[0]:
            differences[host] = min((_ask(rank) for _ in range(ROUNDS)), key=lambda pair: pair[1])
        elif world.rank == rank and rank:
            for _ in range(ROUNDS):
                _answer()
    return differences


def _ask(rank: int) -> tuple[float, float]:
    answer = torch.zeros(1, dtype=torch.float64)
    begin = time.time()
    dist.send(answer, rank)
    dist.recv(answer, rank)
    end = time.time()
    return answer.item() - (begin + end) / 2, (end - begin) / 2


def _answer() -> None:
    question = torch.zeros(1, dtype=torch.float64)
    dist.recv(question, 0)
    question.fill_(time.time())
    dist.send(question, 0)
