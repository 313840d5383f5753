"""The registered operations: opcheck, and tensors without data."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from scaleup.unipelt.kernels import ops
from tests.utils.kernel_cases import Merge, Narrow

NARROWS = [
    Narrow(2, 5, 6, 2, 8, 8, torch.bool, True, "none", False, 1, 0, (3, 3), 2),
    Narrow(2, 5, 7, 1, 8, 8, None, False, "gelu", True, grads=(8,)),
]


def narrow_arguments(case: Narrow, x: dict) -> tuple[tuple, tuple]:
    """Return the arguments of both narrow operations."""
    first = x["z"], x["bias"], x["scales"], x["mask"]
    gates = torch.rand(case.batch, case.tokens if case.causal else 1, case.gates)
    gradients = gates, x["grads_v"], x["grad_gate"], x["grad_bias"]
    return (
        (*first, case.selected, *case.options, case.v_width),
        (*first, *gradients, case.selected, case.handed_out, *case.options),
    )


@pytest.mark.parametrize("case", NARROWS, ids=str)
def test_narrow_operations_pass_opcheck(case):
    forward, backward = narrow_arguments(case, case.inputs(torch.float32))
    torch.library.opcheck(ops._narrow_forward, forward)
    torch.library.opcheck(ops._narrow_backward, backward)


def test_tensors_of_a_gpu_without_data_take_the_registered_operations():
    """A memory plan has such tensors, which no kernel can read."""
    case = Merge(2, 4, 2, 5, 16, 3, "token")
    x = case.inputs(torch.bfloat16)
    narrow = NARROWS[0].inputs(torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
            return FakeTensor(mode, tensor.to("meta"), torch.device("cuda:0"))

        tensors = [on_gpu(x[name]) for name in ("query", "out", "lse", "prefix", "gate")]
        assert tensors[0].is_cuda
        ops.merge_forward(*tensors, x["scale"])
        gradients = on_gpu(x["grad_out"]), on_gpu(x["grad_query"])
        parts, grad_gate = ops.merge_backward(*tensors, *gradients, x["scale"])
        assert parts.shape == (1, 2, 4, 3, 16) and parts.is_cuda
        assert grad_gate.shape == (2, 4, 5) and grad_gate.dtype == torch.float32
        z, bias, scales = (on_gpu(narrow[name]) for name in ("z", "bias", "scales"))
        v, gates = ops.narrow_forward(z, bias, scales, None, 0, True, "none", False, 8)
        assert v.shape == (2, 5, 8) and gates.shape == (2, 5, 2)
