"""The device that kernels are chosen for: that of a tensor, unless a plan names another."""

import contextlib
import threading
from collections.abc import Iterator

import torch

_thread = threading.local()  # another thread may run a model meanwhile


def target_device(tensor: torch.Tensor) -> str:
    """Return the type of the device for which to choose a kernel."""
    planned: str | None = getattr(_thread, "planned", None)
    return planned or tensor.device.type


@contextlib.contextmanager
def planned_for(device: str) -> Iterator[None]:
    """Choose kernels as on another type of device, for a memory plan that runs without data."""
    before = getattr(_thread, "planned", None)
    _thread.planned = device
    try:
        yield
    finally:
        _thread.planned = before
