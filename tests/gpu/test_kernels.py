"""The Triton kernels on a GPU: `pytest -m gpu tests/gpu/test_kernels.py`.

Most of the time, a minute or two, is compilation.

They equal the formulas at the sizes that DESIGN measures, whether Python starts them directly, a
registered operation does, or a CUDA graph replays them.
"""

import pytest
import torch

from scaleup.unipelt.kernels import ops
from tests.utils.kernel_cases import (
    MERGE_SIZES,
    NARROW_SIZES,
    Merge,
    Narrow,
    compare_merge,
    compare_narrow,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
both_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


class Registered:
    """The registered operations, which compiled graphs call."""

    merge_forward = staticmethod(ops._merge_forward)
    merge_backward = staticmethod(ops._merge_backward)
    narrow_forward = staticmethod(ops._narrow_forward)
    narrow_backward = staticmethod(ops._narrow_backward)


@both_dtypes
@pytest.mark.parametrize("size", MERGE_SIZES)
def test_a_prefix_is_merged_as_by_the_formula(size, dtype):
    case = MERGE_SIZES[size]
    for kernels in (ops, ops, Registered):  # the second time without Triton's launcher
        compare_merge(kernels, case.inputs(dtype, "cuda"), dtype)


@both_dtypes
@pytest.mark.parametrize("size", NARROW_SIZES)
def test_narrow_maps_equal_the_formula(size, dtype):
    case = NARROW_SIZES[size]
    for kernels in (ops, ops, Registered):
        compare_narrow(kernels, case, case.inputs(dtype, "cuda"), dtype)


@pytest.mark.parametrize(
    "case",
    [
        Merge(2, 4, 2, 100, 24, 70, "head", 0.1),
        Merge(2, 4, 1, 50, 128, 40, "token"),
        Merge(3, 4, 4, 1, 64, 10, "token"),
    ],
    ids=str,
)
@both_dtypes
def test_unusual_sizes_are_merged(case, dtype):
    compare_merge(ops, case.inputs(dtype, "cuda"), dtype)


def test_a_head_of_256_is_merged():
    case = Merge(2, 4, 1, 50, 256, 40, "token", 0.1)
    compare_merge(ops, case.inputs(torch.bfloat16, "cuda"), torch.bfloat16)


@pytest.mark.parametrize(
    "case",
    [
        Narrow(2, 150, 300, 1, 304, 304, torch.bool, True, "gelu", True, grads=(304,)),
        Narrow(2, 150, 20, 4, 64, 20, torch.bool, True, "silu", grads=(10, 5), heads=3),
        Narrow(3, 700, 48, 1, 56, 56, torch.float32, False, "tanh", True, grads=(56,)),
        Narrow(2, 40, 0, 2, 8, 8, torch.bool, True, heads=2),
    ],
    ids=str,
)
@both_dtypes
def test_unusual_sizes_are_narrow(case, dtype):
    compare_narrow(ops, case, case.inputs(dtype, "cuda"), dtype)


def test_the_registered_operation_returns_the_shapes_that_compilers_expect():
    x = MERGE_SIZES["llama"].inputs(torch.bfloat16, "cuda")
    arguments = (
        *(x[name] for name in ("query", "out", "lse", "prefix", "gate", "grad_out")),
        *(x["grad_query"], x["scale"], x["keep"], x["dropout"]),
    )
    for result, expected in zip(
        ops._merge_backward(*arguments), ops.fake_merge_backward(*arguments), strict=True
    ):
        assert result.shape == expected.shape and result.stride() == expected.stride()


def test_results_are_the_same_each_time():
    case = NARROW_SIZES["llama"]

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        x = case.inputs(torch.bfloat16, "cuda")
        _, gates = ops.narrow_forward(
            *(x["z"], x["bias"], x["scales"], x["mask"], case.selected),
            *(*case.options, case.v_width),
        )
        grad_z = ops.narrow_backward(
            *(x["z"], x["bias"], x["scales"], x["mask"], gates, x["grads_v"], x["grad_gate"]),
            *(x["grad_bias"], case.selected, case.handed_out, *case.options),
        )
        return grad_z, x["grad_bias"]

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


def test_a_cuda_graph_replays_the_kernels():
    case = NARROW_SIZES["bert-16"]
    x = case.inputs(torch.bfloat16, "cuda")
    arguments = x["bias"], x["scales"], x["mask"], case.selected, *case.options, case.v_width
    for _ in range(2):
        ops.narrow_forward(x["z"], *arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        v, gates = ops.narrow_forward(x["z"], *arguments)
    x["z"].copy_(torch.randn_like(x["z"]))
    graph.replay()
    expected_v, expected_gates = ops.narrow_forward(x["z"], *arguments)
    assert torch.equal(v, expected_v) and torch.equal(gates, expected_gates)
