"""A driver that lets Triton compile, and pretend to launch, for a GPU that is not there."""

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class AbsentGpu(DriverBase):
    """Stands for one GPU of each compute capability, which is also its device number.

    Launches are recorded instead of made.
    """

    def __init__(self) -> None:
        self.capability = 90
        self.launches: list[tuple[Any, ...]] = []
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> None:
        return None

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    @staticmethod
    def is_active() -> bool:
        return True

    # What Triton asks of `utils` before it launches a kernel.
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 99 * 1024}

    def load_binary(self, *args: Any) -> tuple[Any, ...]:
        module, function, registers, spills, most_threads = None, "function", 0, 0, 1024
        return module, function, registers, spills, most_threads

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Return what launches a kernel: grid, stream, function, metadata, 3 hooks, arguments."""

        def record(*args: Any) -> None:
            self.launches.append((source.fn.__name__, args[:6], args[9:]))

        return record
