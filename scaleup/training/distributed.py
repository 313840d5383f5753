"""The processes of a run: how many there are, how they talk, what machine they are on.

    world = start(deepspeed=True)         first thing in every process, before TrainingArguments exists

Accelerate and DeepSpeed each guess this from the environment, and on CPU they guess wrong silently: `accelerate launch
--num_processes 2` starts one process, `cpu=True` drops DeepSpeed, and without a backend every rank believes it is alone.
"""

import ctypes
import dataclasses
import datetime
import os
import pathlib
import platform
import resource
import secrets
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch
import torch.distributed
from accelerate import PartialState
from accelerate.commands.launch import launch_command_parser

from scaleup.errors import ConfigError
from scaleup.training import watchdog

PR_SET_PDEATHSIG = 1
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "deepspeed",
    "bitsandbytes",
    "datasets",
    "safetensors",
    "numpy",
)


@dataclasses.dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    deepspeed: bool

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def local_main(self) -> bool:
        """The first process of its host."""
        return self.local_rank == 0

    def writes(self, shared: bool) -> bool:
        """Whether this process writes the files of its output folder: one does for each folder. `shared`: all hosts see one."""
        return self.main if shared else self.local_main


@dataclasses.dataclass(frozen=True)
class Launcher:
    """What `accelerate launch` was asked for when it is our parent and started a single process."""

    processes: int
    machines: int
    threads_chosen: bool


def launcher() -> Launcher | None:
    """The `accelerate launch` that started this process alone, or None.

    Without several GPUs Accelerate starts a single process whatever `--num_processes` says, and gives it one thread. It
    leaves neither number behind, so both come from its command line and environment.
    """
    if (
        "RANK" in os.environ
        or "LOCAL_RANK" in os.environ
        or "ACCELERATE_MIXED_PRECISION" not in os.environ
    ):
        return None
    try:
        parent = psutil.Process(os.getppid())
        command, variables = parent.cmdline(), parent.environ()
    except psutil.Error:
        return None
    starts = [
        i
        for i, word in enumerate(command)
        if pathlib.Path(word).name in ("accelerate", "accelerate-launch", "launch.py")
    ]
    if not starts:
        return None
    words = command[starts[0] + 1 :]
    known, _ = launch_command_parser().parse_known_args(
        words[1:] if words[:1] == ["launch"] else words
    )
    threads_chosen = known.num_cpu_threads_per_process is not None or "OMP_NUM_THREADS" in variables
    return Launcher(known.num_processes or 1, known.num_machines or 1, threads_chosen)


def die_with_launcher(parent: int) -> None:
    """From here on the end of the `accelerate launch` or torchrun that started this process is a SIGTERM to it: Accelerate passes none
    on to what it started, which would train on, unseen. A shell's end is none of ours. `parent`: the process we were started by.
    """
    try:
        command = psutil.Process(parent).cmdline()
    except psutil.Error:
        return
    if any(
        pathlib.Path(word).name
        in ("accelerate", "accelerate-launch", "torchrun", "launch.py", "torch.distributed.run")
        for word in command[:4]
    ):
        prctl = getattr(
            ctypes.CDLL(None), "prctl", None
        )  # Linux only; elsewhere a launcher's end goes unnoticed
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it ended before we asked
                os.kill(os.getpid(), signal.SIGTERM)


def respawn(script: str, arguments: list[str]) -> None:
    """Mends what Accelerate does to CPU runs: becomes `torchrun` with the processes that were asked for, or takes all cores.

    Returns if one process is right. Raises ConfigError for several machines: Accelerate gave this process no rank.
    """
    found = launcher()
    if found is None or torch.cuda.is_available():
        return
    if found.machines > 1:
        raise ConfigError(
            "accelerate launch starts several machines only with GPUs; on CPU start launch/train.py with torchrun"
        )
    threads = max(1, (os.cpu_count() or 1) // found.processes)
    if found.processes == 1:
        if not found.threads_chosen:
            torch.set_num_threads(threads)
        return
    if not found.threads_chosen:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    port = os.environ.get("MASTER_PORT", "29500")
    os.environ.setdefault(
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300"
    )  # s; what is told to stop saves first
    signals = "--signals_to_handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    command = [
        "torch.distributed.run",
        f"--nproc_per_node={found.processes}",
        f"--master_port={port}",
        signals,
        script,
        *arguments,
    ]
    os.execv(sys.executable, [sys.executable, "-m", *command])


def start(deepspeed: bool, timeout_s: int = 1800) -> World:
    """Joins the other processes. Call once, before transformers' TrainingArguments is made.

    On CPU: gloo; the process group is configured here and Accelerate is told to use it. On GPUs: NCCL. With several processes
    the watchdog runs from here on. Raises ConfigError for a bad SCALEUP_WATCHDOG_S.
    """
    limit_s = watchdog.limit_from_environment()
    launched = "LOCAL_RANK" in os.environ
    if deepspeed and not launched:  # DeepSpeed wants a process group even for one process
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
        launched = True
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # DeepSpeed warns while it finds out by itself
    if deepspeed:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    options = {"timeout": datetime.timedelta(seconds=timeout_s)} if launched else {}
    if not cuda and launched:
        options["backend"] = "gloo"
    # MULTI_CPU needs cpu=True, DeepSpeed on CPU needs it False (it would be dropped).
    state = PartialState(cpu=not cuda and not deepspeed, **options)
    if not cuda:
        state.device = torch.device(
            "cpu"
        )  # Accelerate numbers it, and torch.load does not know cpu:1
    world = World(
        state.process_index, state.local_process_index, state.num_processes, state.device, deepspeed
    )
    if world.size > 1:
        _start_watchdog(world, limit_s)
    return world


def _start_watchdog(world: World, limit_s: float) -> None:
    watchdog.stop()  # of an earlier run in this process
    # Rank 0's limit holds for all. The token keeps this start apart from an earlier one in the same store.
    told = gather(world, (limit_s, secrets.token_hex(8), socket.gethostname()))
    limit_s, token, _ = told[0]
    if limit_s:
        made = watchdog.prepare(world.rank, [host for _, _, host in told], token, limit_s)
        torch.distributed.barrier()
        watchdog.begin(made)


def leave() -> None:
    """Ends the watchdog and the process group, if there are any, on every rank at the end of a run.

    Threads that are inside torch's store or gloo when the interpreter ends abort the process (SIGABRT, "terminate called
    without an active exception"), after everything is done.
    """
    watchdog.stop()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def gather(world: World, value: Any) -> list[Any]:
    """Every process's value, in the order of ranks, on every process. Small picklable things. A barrier too."""
    if world.size == 1:
        return [value]
    values = [None] * world.size
    torch.distributed.all_gather_object(values, value)
    return values


def hosts(world: World) -> list[tuple[str, str]]:
    """Host name and device of every rank, by rank. Every rank has to call it."""
    device = (
        f"{world.device} ({torch.cuda.get_device_name(world.device)})"
        if world.device.type == "cuda"
        else world.device.type
    )
    return gather(world, (socket.gethostname(), device))


def shares_folder(world: World, path: pathlib.Path, wait_s: float = 5.0) -> bool:
    """Whether `path` is one folder for all processes (True), or one for each host (False). Makes the folder where it is missing.

    The first process of each host leaves a file there and every process looks which ones it sees, for `wait_s` seconds, as
    network file systems show new files late. Every rank has to call it; all get the same answer. Raises ConfigError where only
    some of the hosts share the folder, or the processes of one host do not, and OSError where it cannot be written.
    """
    if world.size == 1:
        return True
    mine = f".probe-{secrets.token_hex(8)}"
    if world.local_main:
        path.mkdir(parents=True, exist_ok=True)
        (path / mine).touch()
    told = gather(world, (socket.gethostname(), mine if world.local_main else None))
    left = {name for _, name in told if name}
    deadline = time.monotonic() + wait_s
    seen = left & _names(path)
    while seen != left and time.monotonic() < deadline:
        time.sleep(0.2)
        seen = left & _names(path)
    views = gather(world, seen)
    if world.local_main:
        (path / mine).unlink()
    if all(view == left for view in views):
        return True
    leader = None
    for rank, (_, name) in enumerate(told):  # ranks of one host follow one another
        leader = name or leader
        if views[rank] != {leader}:
            raise ConfigError(
                f"train.output_dir: {path} is shared by some processes only; give a folder that all hosts share, or none"
            )
    return False


def _names(path: pathlib.Path) -> set[str]:
    try:
        return set(
            os.listdir(path)
        )  # reads the folder anew, where a look for one name may be answered from a cache
    except FileNotFoundError:
        return set()


def copy_from_first(
    world: World, folder: pathlib.Path, pattern: str = "*", chunk: int = 64 * 2**20
) -> None:
    """The files of rank 0's `folder` into the `folder` of every other host, over the network, `chunk` bytes at a time.

    For hosts that share no folder, where only rank 0 could write something. Subfolders are left out. Every rank has to call it.
    """
    files = (
        sorted((p.name, p.stat().st_size) for p in folder.glob(pattern) if p.is_file())
        if world.main
        else []
    )
    if world.local_main:
        folder.mkdir(parents=True, exist_ok=True)
    for name, size in gather(world, files)[0]:
        with (
            (folder / name).open("rb" if world.main else "wb")
            if world.local_main
            else open(os.devnull, "wb") as file
        ):
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


def environment(world: World) -> dict[str, object]:
    """What a reader needs to know of the machine to believe a number: versions, devices, threads, commit."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    device = (
        torch.cuda.get_device_name(world.device)
        if world.device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": f"{world.device.type}: {device}",
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The checkout's commit, with + if it has changes; None outside a checkout."""
    here = pathlib.Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def peak_memory_mib(world: World) -> float:
    """Most memory this process has held: GPU tensors, or resident memory on CPU. MiB."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
