"""Which kernels to use: the device that they are chosen for, and SCALEUP_KERNELS.

auto        (default) Triton kernels on CUDA; on a CPU whatever is faster there
off         the plain formulas everywhere
reference   the path of CUDA on any device, each kernel as a plain formula
"""

import contextlib
import os
import threading
from collections.abc import Iterator

import torch
from torch.utils._triton import has_triton_package

from .reference import ACTIVATIONS

VARIABLE = "SCALEUP_KERNELS"
MODES = ("auto", "off", "reference")
HAS_TRITON = has_triton_package()  # once, because compilers cannot trace the search for it
# What the Triton kernels can do.
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_HEAD_SIZE, MOST_COLUMNS = 256, 512
_thread = threading.local()  # another thread may run a model meanwhile


def mode() -> str:
    """Return the value of SCALEUP_KERNELS. An empty one counts as not set.

    Raises:
        ValueError: for an unknown value.
    """
    value = os.environ.get(VARIABLE) or "auto"
    if value not in MODES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(MODES)}; got {value!r}")
    return value


def fast_path(tensor: torch.Tensor) -> bool:
    """Return whether a tensor takes the fast path of CUDA.

    A memory plan for a GPU assumes that Triton, which comes with torch there, is installed. The
    kernels cannot compute in float64.
    """
    value = mode()
    if value != "auto" or target_device(tensor) != "cuda":
        return value == "reference"
    has_triton = HAS_TRITON or tensor.device.type != "cuda"
    return has_triton and tensor.dtype != torch.float64


def merge_refusal(dtype: torch.dtype, head_size: int) -> str | None:
    """Return why the Triton kernels of a prefix cannot run for such queries, or None."""
    if dtype not in TRITON_DTYPES:
        return f"queries are {dtype}; it takes bfloat16, float16 and float32"
    # Exact products in float32 do without tensor cores and need more registers.
    most = MOST_HEAD_SIZE // 2 if dtype == torch.float32 else MOST_HEAD_SIZE
    if head_size > most:
        return f"heads have {head_size} columns; it takes at most {most} in {dtype}"
    return None


def narrow_refusal(dtype: torch.dtype, columns: int, activation: str) -> str | None:
    """Return why the Triton kernels of narrow maps cannot run, or None."""
    if dtype not in TRITON_DTYPES:
        return f"the input is {dtype}; it takes bfloat16, float16 and float32"
    if columns > MOST_COLUMNS:
        return f"the narrow maps have {columns} columns; it takes at most {MOST_COLUMNS}"
    if activation not in ACTIVATIONS:
        return f"the activation is {activation}; it takes {', '.join(ACTIVATIONS)}"
    return None


def target_device(tensor: torch.Tensor) -> str:
    """Return the type of the device for which to choose a kernel: that of a tensor by default."""
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
