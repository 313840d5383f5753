"""The result files of `scaleup bench`: JSON with the settings, the machine and the rows."""

import os
import pathlib
from typing import Any

import torch

from scaleup import io
from scaleup.errors import ConfigError
from scaleup.machine import device_name, versions


def check(path: pathlib.Path | None) -> None:
    """Create the folder of the file that --output names, and raise ConfigError if that fails."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        io.check_output(path)
    except OSError as error:
        raise _not_writable(path, error) from None


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return what the file records of the machine."""
    return {
        **versions("torch"),
        "threads": torch.get_num_threads(),
        "cpu": device_name("cpu"),
        "cores": os.cpu_count(),
        "gpu": device_name("cuda") if device == "cuda" else None,
    }


def write(
    path: pathlib.Path | None, settings: dict[str, Any], rows: dict[str, Any], device: str = "cpu"
) -> None:
    """Write the file if there is an --output. `settings` may hold paths under output and only."""
    if path is None:
        return
    settings = {name: value for name, value in settings.items() if name not in ("output", "only")}
    try:
        io.write_json(path, {"settings": settings, "machine": machine(device), "rows": rows})
    except OSError as error:
        raise _not_writable(path, error) from None


def _not_writable(path: pathlib.Path, error: OSError) -> ConfigError:
    return ConfigError(f"--output: {path} cannot be written: {error.strerror}")
