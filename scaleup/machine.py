"""The software and the machine that a result was made with, for the records beside results."""

import pathlib
import platform
import resource
import subprocess
from importlib import metadata

import torch

PACKAGES = "torch transformers peft accelerate deepspeed bitsandbytes datasets safetensors numpy"


def versions(names: str = PACKAGES) -> dict[str, str | None]:
    """Return the version of each package named in `names`, or None if it is not installed."""
    installed: dict[str, str | None] = dict.fromkeys(names.split())
    for name in installed:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def device_name(device: str | torch.device) -> str:
    """Return the model name of the processor or GPU that `device` stands for."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def environment(device: torch.device, processes: int) -> dict[str, object]:
    """Return the content of a run's environment.json."""
    return {
        "python": platform.python_version(),
        "packages": versions(),
        "platform": platform.platform(),
        "device": f"{device.type}: {device_name(device)}",
        "processes": processes,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Return the commit of the checkout, with + if it has changes. None outside a checkout."""
    folder = str(pathlib.Path(__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def peak_memory_mib(device: torch.device) -> float:
    """Return the most memory in MiB that this process has held: of the GPU, or of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
