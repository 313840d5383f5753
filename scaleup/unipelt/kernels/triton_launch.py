"""Start Triton kernels with little work for the host.

Triton's own launcher inspects every argument of every launch, which costs the host 9 to 26 µs. Here
a kernel that was compiled for the same dtypes, sizes and strides is called directly.
"""

from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "SCALEUP_KERNELS: Triton is not installed; install the package triton in the version that "
        "this build of torch was made for, or set SCALEUP_KERNELS=off"
    ) from error

__all__ = ["launch", "power_of_2", "tl", "triton"]

MOST_COMPILED = 4096  # each length of a batch is an entry of its own
_compiled: dict[tuple[Any, ...], Callable[..., None]] = {}


def power_of_2(number: int, least: int = 1, most: int = 1 << 30) -> int:
    """Return the smallest power of 2 that is not below `number`, within the bounds."""
    return min(max(1 << max(number - 1, 0).bit_length(), least), most)


def launch(
    kernel: Any,
    programs: int,
    tensors: tuple[torch.Tensor | None, ...],
    numbers: tuple[int | float, ...],
    constants: tuple[Any, ...],
    warps: int,
    registers: int | None = None,
) -> None:
    """Start a kernel whose parameters are tensors, numbers and constants, in this order.

    Args:
        kernel: function decorated by `triton.jit`.
        programs: number of its programs.
        tensors: tensors or None, the first one on the device of all of them.
        numbers: sizes, strides and factors.
        constants: values of the parameters of type `tl.constexpr`.
        warps: warps of 32 threads for each program.
        registers: most registers of a thread. Without a limit, the assembler may keep a few values
            in memory, so that more programs run at once.
    """
    first = tensors[0]
    assert first is not None
    if not programs:  # there is no example or no token
        return None
    device = first.get_device()
    if device >= 0 and device != torch.cuda.current_device():
        # Triton uses the current device, which need not be the one of a model that is spread out.
        with torch.cuda.device(device):
            return launch(kernel, programs, tensors, numbers, constants, warps, registers)
    # Compiled code may assume that an address is a multiple of 16.
    places = [None if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in tensors]
    key = (kernel, device, numbers, constants, warps, *places)
    if (start := _compiled.get(key)) is not None:
        start(programs, device, *tensors, *numbers, *constants)
        return None
    limit = {} if registers is None else {"maxnreg": registers}
    compiled = kernel[(programs,)](
        *tensors, *numbers, *constants, num_warps=warps, num_stages=1, **limit
    )
    if compiled is not None:  # Triton's interpreter compiles nothing
        if len(_compiled) >= MOST_COMPILED:
            _compiled.clear()
        _compiled[key] = _starter(compiled)
    return None


def _starter(compiled: Any) -> Callable[..., None]:
    """Return a function of programs, device and arguments that starts a compiled kernel."""
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    stream_of = triton.runtime.driver.active.get_current_stream

    def start(programs: int, device: int, *arguments: Any) -> None:
        # The last three are the hooks of a profiler, which would cost as much as the launch.
        stream = stream_of(device)
        run(programs, 1, 1, stream, function, metadata, None, None, None, *arguments)

    return start
