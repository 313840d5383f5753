"""The processes of a run: how many there are, how they talk, and which machine they are on.

    world = start(deepspeed=True)         first in every process, before TrainingArguments is made

Accelerate and DeepSpeed each guess these things from the environment, and on CPU they guess wrong
without a message: `accelerate launch --num_processes 2` starts one process, `cpu=True` drops
DeepSpeed, and without a backend every rank believes that it is alone.
"""

import ctypes
import dataclasses
import datetime
import itertools
import os
import pathlib
import secrets
import signal
import socket
import time
from typing import Any

import torch
import torch.distributed
from accelerate import PartialState
from torch.distributed import TCPStore
from torch.distributed.device_mesh import DeviceMesh

from scaleup.backbone import fsdp
from scaleup.errors import ConfigError
from scaleup.settings.presets import HPZ, read_deepspeed
from scaleup.settings.schema import TrainSettings
from scaleup.training import build_locks, interfaces, startup, watchdog

PR_SET_PDEATHSIG = 1


@dataclasses.dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    deepspeed: bool
    # All processes, through gloo on the CPU; None if there is only one.
    group: torch.distributed.ProcessGroup | None = None
    per_host: int = 1  # processes on each host; 0 if hosts differ

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def local_main(self) -> bool:
        """Return whether this is the first process of its host."""
        return self.local_rank == 0

    def writes(self, shared: bool) -> bool:
        """Return whether this process writes the output folder, which all hosts may share."""
        return self.main if shared else self.local_main


def die_with_launcher(parent: int) -> None:
    """Ask for SIGTERM when the launcher, process `parent`, ends (Linux only).

    `accelerate launch` does not forward SIGTERM, so its processes would train on unnoticed. A
    process that no launcher started is left alone: it may outlive its shell.
    """
    if not {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys():
        return
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before the call
            os.kill(os.getpid(), signal.SIGTERM)


def check_launcher() -> None:
    """Correct what `accelerate launch` does on a machine without GPUs.

    There it starts a single process, whatever `--num_processes` says, and gives it one thread. It
    sets MASTER_ADDR only if it was asked for several processes. It cannot be told whether one
    thread was chosen, so this takes all cores. To train with one thread, start the script with
    python. Several processes are refused with the command to use instead.
    """
    started_alone = "ACCELERATE_MIXED_PRECISION" in os.environ and "LOCAL_RANK" not in os.environ
    if not started_alone or torch.cuda.is_available():
        return
    if "MASTER_ADDR" in os.environ:
        raise ConfigError(
            "accelerate launch starts several processes only with GPUs; without GPUs use"
            " NPROC=2 launch/torchrun.sh CONFIG"
        )
    if os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(os.cpu_count() or 1)


def start(deepspeed: bool, timeout_s: int = 1800) -> World:
    """Join the other processes. Call this once, before transformers' TrainingArguments is made.

    On CPU the processes talk through gloo. The process group is made here, and Accelerate is told
    to use it. On GPUs they talk through NCCL, and through gloo for what must not wait for a GPU:
    that group is made here too, because a network that gloo cannot use must show before the model
    is loaded. With several processes the watchdog starts here.

    Raises:
        RunError: the processes cannot connect to each other.
    """
    limit_s = watchdog.limit_from_environment()
    if not torch.distributed.is_initialized():  # else an earlier run of this process has met them
        startup.watch(limit_s)
    launched = "LOCAL_RANK" in os.environ
    if deepspeed and not launched:  # DeepSpeed needs a process group even for one process
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
        launched = True
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed guesses, with a warning
    if deepspeed:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    options: dict[str, Any] = {}
    timeout = datetime.timedelta(seconds=timeout_s)
    if launched:
        options = {"timeout": timeout}
        options |= {} if cuda else {"backend": "gloo"}
    if deepspeed:  # compiles before the processes have met
        build_locks.wait_for_builds()
    with interfaces.named_in_errors():
        # Several CPU processes need cpu=True. DeepSpeed would be dropped with it.
        state = PartialState(cpu=not cuda and not deepspeed, **options)
        group = None
        if state.num_processes > 1:
            group = torch.distributed.new_group(backend="gloo", timeout=timeout)
    if not cuda:
        state.device = torch.device("cpu")  # torch.load rejects Accelerate's cpu:1
    world = World(
        rank=state.process_index,
        local_rank=state.local_process_index,
        size=state.num_processes,
        device=state.device,
        deepspeed=deepspeed,
        group=group,
    )
    if world.size == 1:
        return world
    _start_watchdog(world, limit_s)
    counts = set(gather(world, int(os.environ.get("LOCAL_WORLD_SIZE", world.size))))
    return dataclasses.replace(world, per_host=counts.pop() if len(counts) == 1 else 0)


def _start_watchdog(world: World, limit_s: float) -> None:
    watchdog.stop()  # an earlier run in this process may have left one
    # Rank 0's limit holds for all ranks. The token separates this start from earlier ones in the
    # same store.
    answers = gather(world, (limit_s, secrets.token_hex(8), socket.gethostname()))
    limit_s, token, _ = answers[0]
    if limit_s:
        dog = watchdog.Watchdog(world.rank, [host for _, _, host in answers], token, limit_s)
        torch.distributed.barrier()
        watchdog.begin(dog)
    startup.met()


def leave() -> None:
    """End the watchdog and the process group, if there are any. Every rank calls this at its end.

    A thread that is inside torch's store or gloo when the interpreter ends would abort the process
    (SIGABRT, "terminate called without an active exception") after all work is done.
    """
    watchdog.stop()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def host_problems(train: TrainSettings, world: World) -> list[str]:
    """Return why the processes and hosts of this run cannot do what its settings ask for."""
    if train.use_cpu and world.device.type != "cpu":
        advice = "hide it with CUDA_VISIBLE_DEVICES= instead"
        return [f"train.use_cpu: a run takes the GPU if there is one; {advice}"]
    if train.fsdp is not None and world.size == 1:
        problem = "there is one process, and it shards weights among several"
        return [f"train.fsdp: {problem}; start more (NPROC=2 launch/torchrun.sh), or leave it out"]
    equal = world.per_host > 0 and world.size % world.per_host == 0
    name, instead = "train.fsdp: hybrid", "full"
    if train.fsdp != "hybrid":
        zero = read_deepspeed(train.deepspeed)["zero_optimization"] if train.deepspeed else {}
        if HPZ not in zero:
            return []
        name, instead = f"train.deepspeed: {train.deepspeed}", "zero3"
    if not equal:
        return [f"{name} needs the same number of processes on every host; use {instead}"]
    if world.per_host == 1 and world.size > 1:
        return [f"{name} shares weights within a host, which has one process here; use {instead}"]
    return []


def mesh(train: TrainSettings, world: World) -> DeviceMesh | None:
    """Return the processes among which FSDP shards weights, or None. Every rank must call this."""
    if train.fsdp is None:
        return None
    return fsdp.make_mesh(train.fsdp, world.device.type, world.size, world.per_host)


def gather(world: World, value: Any) -> list[Any]:
    """Return the small, picklable values of all processes by rank. Every rank must call this."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(values, value)
    return values


_meetings = itertools.count()


def wait_for_all(world: World, interval_s: float = 0.2) -> None:
    """Wait until every process has called this, for as long as that takes.

    A collective would time out, for example while one host prepares millions of examples. If a
    process is gone meanwhile, the watchdog ends this one. Every rank must call this.
    """
    if world.size == 1:
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, wait_for_workers=False)
    # The store of torchrun's agent outlives the processes that it starts again.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"scaleup-meeting/{start}/{next(_meetings)}"
    store.add(key, 1)
    while store.add(key, 0) < world.size:
        time.sleep(interval_s)


def hosts(world: World) -> list[tuple[str, str]]:
    """Return host name and device of every rank. Every rank must call this."""
    device = world.device.type
    if device == "cuda":
        device = f"{world.device} ({torch.cuda.get_device_name(world.device)})"
    return gather(world, (socket.gethostname(), device))


def shares_folder(world: World, path: pathlib.Path, wait_s: float = 5.0) -> bool:
    """Return whether `path` is one folder for all processes (True) or one per host (False).

    The first process of each host leaves a file in the folder, which is made if it is missing.
    Then every process looks which of these files it sees, for up to `wait_s` seconds, because
    network file systems show new files late. Every rank must call this. All get the same answer,
    or a ConfigError if only some hosts or some processes of a host share the folder.
    """
    if world.size == 1:
        return True
    probe = f".probe-{secrets.token_hex(8)}"
    if world.local_main:
        path.mkdir(parents=True, exist_ok=True)
        (path / probe).touch()
    probes = gather(world, probe if world.local_main else None)
    expected = {name for name in probes if name}
    deadline = time.monotonic() + wait_s
    while (seen := expected & _names(path)) != expected and time.monotonic() < deadline:
        time.sleep(0.2)
    views = gather(world, seen)
    if world.local_main:
        (path / probe).unlink()
    if all(view == expected for view in views):
        return True
    probe_of_host = None
    for view, name in zip(views, probes):  # the ranks of one host follow one another
        probe_of_host = name or probe_of_host
        if view != {probe_of_host}:
            advice = "give a folder that all hosts share, or one that no two hosts share"
            problem = f"{path} is shared by some processes only"
            raise ConfigError(f"train.output_dir: {problem}; {advice}")
    return False


def _names(path: pathlib.Path) -> set[str]:
    """List a folder anew. A look for a single name may be answered from a cache."""
    try:
        return set(os.listdir(path))
    except FileNotFoundError:
        return set()


def copy_from_first(
    world: World, folder: pathlib.Path, pattern: str = "*", chunk: int = 1 << 26
) -> None:
    """Copy files of rank 0's `folder` to every other host, in pieces of `chunk` bytes.

    This is for hosts without a shared folder, where only rank 0 can write something. Subfolders are
    left out. Every rank must call this.
    """
    paths = sorted(path for path in folder.glob(pattern) if path.is_file()) if world.main else []
    if world.local_main:
        folder.mkdir(parents=True, exist_ok=True)
    for name, size in gather(world, [(path.name, path.stat().st_size) for path in paths])[0]:
        target = folder / name if world.local_main else pathlib.Path(os.devnull)
        file: Any
        with target.open("rb" if world.main else "wb") as file:
            for start in range(0, size, chunk):
                data = torch.empty(min(chunk, size - start), dtype=torch.uint8)
                if world.main:
                    file.readinto(data.numpy())
                data = data.to(world.device)
                torch.distributed.broadcast(data, 0)
                if not world.main:
                    file.write(data.cpu().numpy())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
