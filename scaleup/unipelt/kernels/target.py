"""The device that kernels are chosen for: that of a tensor, unless a plan names another."""

import contextlib
from collections.abc import Iterator

import torch

_planned: list[str] = []


def target_device(tensor: torch.Tensor) -> str:
    """Return the type of the device for which to choose a kernel."""
    return _planned[-1] if _planned else tensor.device.type


@contextlib.contextmanager
def planned_for(device: str) -> Iterator[None]:
    """Choose kernels as on another type of device, for a memory plan that runs without data."""
    _planned.append(device)
    try:
        yield
    finally:
        _planned.pop()
