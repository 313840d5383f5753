"""What one machine has room for: places for runs (cores, a GPU each), memory that is left, memory that a run will need."""

import dataclasses
import os
import pathlib

import psutil
import torch

from scaleup import backbone, precision
from scaleup.arguments import deepspeed_file
from scaleup.config import Settings
from scaleup.memory import estimate

# Python, libraries and activations beside the states, until a run of the kind has been measured. MiniLM on CPU takes 1.0 GiB of it.
OVERHEAD = 2 * 2**30


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of one run. cores: empty on systems that do not pin processes. gpu: as CUDA_VISIBLE_DEVICES names it."""

    cores: tuple[int, ...]
    gpu: str | None


def slots(jobs: int | None, threads: int) -> list[Slot]:
    """The places of this machine: the cores this process may use in groups of `threads` (what is left over stays free), one for
    each GPU where there are any, at most `jobs`; at least one."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    count = max(1, (len(cores) or os.cpu_count() or 1) // threads)
    gpus = torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")[:gpus]
    count = min(count, jobs or count, gpus or count)
    return [Slot(tuple(cores[i * threads : (i + 1) * threads]), names[i] if gpus else None) for i in range(count)]


def available_bytes() -> int:
    """Memory that may still be taken: the machine's, or its container's where that is less."""
    found = psutil.virtual_memory().available
    limit, used = pathlib.Path("/sys/fs/cgroup/memory.max"), pathlib.Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()) != "max":
        found = min(found, int(text) - int(used.read_text(encoding="ascii")))
    return found


def resident_bytes(pid: int) -> int:
    """What a process has in memory; 0 once it is gone."""
    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def needed_bytes(settings: Settings) -> int:
    """Of a run on this machine before any was measured: its states by scaleup.memory, and OVERHEAD.

    Raises ConfigError if the model's config cannot be loaded.
    """
    half = precision.half_dtype(settings, has_bf16=torch.cuda.is_available())  # asking the GPU itself would take its memory
    file = deepspeed_file(settings.train.deepspeed)
    config = backbone.load_config(settings.model)
    states = estimate(settings, config, precision.frozen_dtype(settings, half), file, 1, half if file else None)
    return OVERHEAD + max(states.load, states.resident + states.gathered + states.gradients + states.host)
