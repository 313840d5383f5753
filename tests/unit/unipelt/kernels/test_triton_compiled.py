"""The Triton kernels compile for an A100 and an H100: no spills, at most 99 KB of shared memory.

The launch functions choose block sizes and warps as on a GPU, and Triton specialises as it would.
"""

import dataclasses
import pathlib
import re
import subprocess
from typing import Any

import pytest
import torch
import triton
from triton.runtime import driver

from scaleup.unipelt.kernels import triton_merge, triton_narrow
from scaleup.unipelt.kernels.target import merge_refusal
from tests.utils.kernel_cases import MERGE_SIZES, NARROW_SIZES, Merge, Narrow
from tests.utils.triton_driver import AbsentGpu

CUOBJDUMP = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MOST_SHARED = 99 * 1024  # bytes that every GPU of compute capability 8 or 9 has for a program
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def compiled(monkeypatch, tmp_path):
    """Replace launches by compilation; the kernels that were compiled, with what they use."""
    gpu, kernels = AbsentGpu(), []

    def compile_only(
        kernel: Any,
        programs: int,
        tensors: tuple[Any, ...],
        numbers: tuple[Any, ...],
        constants: tuple[Any, ...],
        warps: int,
        registers: int | None = None,
    ) -> None:
        arguments = *tensors, *numbers, *constants
        options = dict(num_warps=warps, num_stages=1, maxnreg=registers)
        for gpu.capability in (80, 90):
            built = kernel.warmup(*arguments, grid=(programs,), **options)
            path = tmp_path / f"{len(kernels)}.cubin"
            path.write_bytes(built.asm["cubin"])
            usage = subprocess.run(
                [CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True
            ).stdout
            # ptxas keeps spilled registers on the stack, which is unused otherwise.
            stack = int(re.search(r"STACK:(\d+)", usage)[1])
            name = f"{kernel.__name__} for sm_{gpu.capability}, {constants}"
            kernels.append((name, stack, built.metadata.shared, built.asm["ptx"]))

    monkeypatch.setattr(driver, "_active", gpu)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for module in (triton_merge, triton_narrow):
        monkeypatch.setattr(module, "launch", compile_only)
    return kernels


def assert_fit(kernels: list[Any]) -> None:
    assert kernels
    for name, stack, shared, _ in kernels:
        assert stack == 0, f"{name}: spills registers"
        assert shared <= MOST_SHARED, f"{name}: {shared} bytes of shared memory"


def run_merge(case: Merge, dtype: torch.dtype) -> None:
    x = case.inputs(dtype)
    first = [x[name] for name in ("query", "out", "lse", "prefix", "gate")]
    last = [x["scale"], x["keep"], x["dropout"]]
    triton_merge.merge_forward(*first, *last)
    triton_merge.merge_backward(*first, x["grad_out"], x["grad_query"], *last)


def run_narrow(case: Narrow, dtype: torch.dtype) -> None:
    x = case.inputs(dtype)
    first = [x[name] for name in ("z", "bias", "scales", "mask")]
    _, gates = triton_narrow.narrow_forward(*first, case.selected, *case.options, case.v_width)
    triton_narrow.narrow_backward(
        *(*first, gates, x["grads_v"], x["grad_gate"], x["grad_bias"]),
        *(case.selected, case.handed_out, *case.options),
    )


@pytest.mark.parametrize("size", MERGE_SIZES)
def test_merge_kernels_fit_at_the_sizes_of_the_design(size, compiled):
    # Fewer examples and queries need less memory here, and the same kernels.
    case = MERGE_SIZES[size]
    run_merge(dataclasses.replace(case, batch=min(case.batch, 16)), bf16)
    assert_fit(compiled)
    assert all("mma" in ptx for *_, ptx in compiled), "a product does without tensor cores"


@pytest.mark.parametrize("size", NARROW_SIZES)
def test_narrow_kernels_fit_at_the_sizes_of_the_design(size, compiled):
    run_narrow(NARROW_SIZES[size], bf16)
    assert_fit(compiled)
    # Rows of z and v are read 16 bytes at a time, although their widths are no multiples of 16.
    assert all("ld.global.v4" in ptx or "ld.global.L1" in ptx for *_, ptx in compiled)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [bf16, fp16, fp32], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Merge(4, 12, 12, 128, 64, 10, "token", 0.1),
        Merge(2, 4, 1, 128, 64, 64, "head", 0.1),
        Merge(2, 4, 1, 128, 80, 20, "example"),
        Merge(2, 4, 1, 128, 128, 64, "token", 0.1),
        Merge(2, 4, 1, 128, 256, 10, "token", 0.1),
        Merge(2, 4, 1, 128, 256, 32, "token"),
        Merge(2, 4, 1, 128, 16, 64, "token", 0.1),
        Merge(2, 4, 1, 128, 16, 100),
        Merge(4, 4, 1, 1, 64, 10, "token"),
    ],
    ids=str,
)
def test_merge_kernels_fit_at_all_sizes(case, dtype, compiled):
    if merge_refusal(dtype, case.size) is not None:
        pytest.skip("the kernels refuse this size")
    run_merge(case, dtype)
    assert_fit(compiled)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [bf16, fp16, fp32], ids=str)
@pytest.mark.parametrize("batch", [4, 200])
@pytest.mark.parametrize(
    "case",
    [
        Narrow(1, 600, 48, 1, 56, 56, torch.int64, True, "gelu", True, grads=(56,)),
        Narrow(1, 600, 48, 1, 56, 56, torch.bool, False, "silu", True, grads=(56,)),
        Narrow(1, 600, 64, 4, 72, 72, torch.float32, True, "tanh", True, grads=(40, 32), heads=12),
        Narrow(1, 600, 256, 1, 264, 264, torch.int64, True, "gelu", True, grads=(264,)),
        Narrow(1, 600, 512, 1, 520, 520, torch.int64, True, "silu", True, grads=(520,)),
        Narrow(1, 600, 8, 2, 16, 8, torch.bool, True, grads=(8,), heads=16),
        Narrow(1, 600, 64, 1, 72, 64, torch.int64, True, grads=(32, 32), heads=12),
        Narrow(1, 600, 64, 2, 72, 64, torch.int64, True, grads=(32, 32), heads=12),
        Narrow(1, 600, 0, 2, 8, 8, torch.bool, True, heads=16),
        Narrow(1, 600, 6, 1, 7, 6, grads=(6,)),
        Narrow(1, 600, 20, 4, 64, 20, None, True, grads=(20,), heads=4),
        Narrow(1, 1, 16, 2, 24, 16, None, True, grads=(8, 8), heads=32),
    ],
    ids=str,
)
def test_narrow_kernels_fit_at_all_sizes(case, batch, dtype, compiled):
    run_narrow(dataclasses.replace(case, batch=batch), dtype)
    assert_fit(compiled)
