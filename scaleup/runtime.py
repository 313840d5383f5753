"""The processes of a run: how many there are, how they talk, what machine they are on.

    world = start(deepspeed=True)         first thing in every process, before TrainingArguments exists

Accelerate and DeepSpeed each guess this from the environment, and on CPU they guess wrong silently: `accelerate launch
--num_processes 2` starts one process, `cpu=True` drops DeepSpeed, and without a backend every rank believes it is alone.
"""

import dataclasses
import datetime
import os
import pathlib
import platform
import resource
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch
from accelerate import PartialState
from accelerate.commands.launch import launch_command_parser

from scaleup.yamlfile import ConfigError

PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "datasets", "safetensors", "numpy")


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
    if "RANK" in os.environ or "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return None
    try:
        parent = psutil.Process(os.getppid())
        command, variables = parent.cmdline(), parent.environ()
    except psutil.Error:
        return None
    starts = [i for i, word in enumerate(command) if pathlib.Path(word).name in ("accelerate", "accelerate-launch", "launch.py")]
    if not starts:
        return None
    words = command[starts[0] + 1 :]
    known, _ = launch_command_parser().parse_known_args(words[1:] if words[:1] == ["launch"] else words)
    threads_chosen = known.num_cpu_threads_per_process is not None or "OMP_NUM_THREADS" in variables
    return Launcher(known.num_processes or 1, known.num_machines or 1, threads_chosen)


def respawn(script: str, arguments: list[str]) -> None:
    """Mends what Accelerate does to CPU runs: becomes `torchrun` with the processes that were asked for, or takes all cores.

    Returns if one process is right. Raises ConfigError for several machines: Accelerate gave this process no rank.
    """
    found = launcher()
    if found is None or torch.cuda.is_available():
        return
    if found.machines > 1:
        raise ConfigError("accelerate launch starts several machines only with GPUs; on CPU start launch/train.py with torchrun")
    threads = max(1, (os.cpu_count() or 1) // found.processes)
    if found.processes == 1:
        if not found.threads_chosen:
            torch.set_num_threads(threads)
        return
    if not found.threads_chosen:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    port = os.environ.get("MASTER_PORT", "29500")
    command = ["torch.distributed.run", f"--nproc_per_node={found.processes}", f"--master_port={port}", script, *arguments]
    os.execv(sys.executable, [sys.executable, "-m", *command])


def start(deepspeed: bool, timeout_s: int = 1800) -> World:
    """Joins the other processes. Call once, before transformers' TrainingArguments is made.

    On CPU: gloo; the process group is configured here and Accelerate is told to use it. On GPUs: NCCL.
    """
    launched = "LOCAL_RANK" in os.environ
    if deepspeed and not launched:  # DeepSpeed wants a process group even for one process
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
        launched = True
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns while it finds out by itself
    if deepspeed:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    options = {"timeout": datetime.timedelta(seconds=timeout_s)} if launched else {}
    if not cuda and launched:
        options["backend"] = "gloo"
    # MULTI_CPU needs cpu=True, DeepSpeed on CPU needs it False (it would be dropped).
    state = PartialState(cpu=not cuda and not deepspeed, **options)
    if not cuda:
        state.device = torch.device("cpu")  # Accelerate numbers it, and torch.load does not know cpu:1
    return World(state.process_index, state.local_process_index, state.num_processes, state.device, deepspeed)


def gather(world: World, value: object) -> list[object]:
    """Every process's value, in the order of ranks, on every process. A barrier too."""
    if world.size == 1:
        return [value]
    values: list[object] = [None] * world.size
    torch.distributed.all_gather_object(values, value)
    return values


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

    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.processor() or platform.machine()
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
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def peak_memory_mib(world: World) -> float:
    """Most memory this process has held: GPU tensors, or resident memory on CPU. MiB."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
