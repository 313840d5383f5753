"""Every Triton kernel, run by Triton's interpreter, equals its formula.

`test_triton_interpreted.py` runs this file in a process of its own, because Triton decides at its
import whether it interprets.
"""

import pytest
import torch
import triton

from scaleup.unipelt.kernels import triton_merge, triton_narrow
from tests.utils.kernel_cases import Merge, Narrow, compare_merge, compare_narrow

assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set"
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])

MERGES = {
    "a gate for each token, grouped heads": Merge(2, 4, 2, 37, 16, 10, "token"),
    "a gate for each example, a head of 24": Merge(1, 2, 2, 40, 24, 17, "example"),
    "no gate, one query": Merge(2, 2, 1, 1, 16, 3),
    "a gate for each head, dropout": Merge(1, 3, 3, 33, 64, 5, "head", 0.3),
    "a single key, dropout, no gate": Merge(2, 2, 2, 5, 16, 1, dropout=0.5),
    "a prefix in pieces": Merge(1, 2, 1, 20, 16, 70, "token", 0.2),
    "a wide head, a prefix in pieces": Merge(1, 1, 1, 18, 100, 40, "example", 0.2),
}
NARROWS = {
    "attention, all tokens": Narrow(2, 37, 16, 2, 24, 16, selected=1, grads=(8, 8), heads=5),
    "attention, masked": Narrow(
        2, 37, 16, 2, 24, 16, torch.bool, selected=1, grads=(8, 8), heads=20
    ),
    "attention, causal": Narrow(
        2, 150, 16, 2, 24, 24, causal=True, selected=1, grads=(8, 8), heads=5
    ),
    "attention, causal and masked": Narrow(
        3, 70, 16, 2, 18, 16, torch.int64, True, selected=1, grads=(8, 8), heads=4
    ),
    "a block": Narrow(3, 140, 48, 1, 56, 56, torch.float32, False, "relu", True, grads=(56,)),
    "a causal block": Narrow(1, 300, 48, 1, 56, 56, torch.int32, True, "gelu", True, grads=(49,)),
    "silu": Narrow(1, 20, 5, 1, 8, 8, None, False, "silu", True, grads=(8,)),
    "tanh": Narrow(1, 20, 5, 1, 8, 8, None, True, "tanh", True, grads=(3, 3)),
    "many columns": Narrow(1, 37, 300, 1, 304, 304, torch.uint8, True, "gelu", True, grads=(304,)),
    "four gates, padding": Narrow(
        2, 17, 20, 4, 64, 40, torch.bool, True, selected=2, handed_out=3, grads=(10, 5), heads=3
    ),
    "three gradients": Narrow(2, 9, 12, 3, 16, 12, selected=1, handed_out=2, grads=(4, 4, 4)),
    "no gradient of v": Narrow(2, 9, 12, 2, 16, 12, heads=2),
    "gates only": Narrow(2, 40, 0, 2, 8, 8, torch.bool, True, handed_out=1, heads=2),
    "one token": Narrow(3, 1, 16, 2, 24, 16, None, True, selected=1, grads=(8, 8), heads=2),
}


@both_dtypes
@pytest.mark.parametrize("name", MERGES)
def test_a_prefix_is_merged_as_by_the_formula(name, dtype):
    compare_merge(triton_merge, MERGES[name].inputs(dtype), dtype)


def test_a_head_of_256_is_merged():
    case = Merge(1, 1, 1, 18, 256, 20, "token", 0.2)
    compare_merge(triton_merge, case.inputs(torch.float16), torch.float16)


def test_one_program_handles_several_blocks_of_queries(monkeypatch):
    monkeypatch.setattr(triton_merge, "PROGRAMS", 1)
    monkeypatch.setattr(triton_merge, "MOST_STEPS", 2)
    case = Merge(2, 2, 2, 70, 16, 4, "token")
    compare_merge(triton_merge, case.inputs(torch.float32), torch.float32)


def test_tensors_in_unusual_layouts_are_merged():
    inputs = Merge(2, 4, 2, 6, 16, 5, "head").inputs(torch.float32)
    inputs["grad_out"] = torch.randn(()).expand(2, 4, 6, 16)
    inputs["query"] = inputs["query"].transpose(2, 3).contiguous().transpose(2, 3)
    inputs["gate"] = inputs["gate"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["prefix"] = inputs["prefix"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["lse"] = inputs["lse"].transpose(0, 1).contiguous().transpose(0, 1)
    compare_merge(triton_merge, inputs, torch.float32)


@both_dtypes
@pytest.mark.parametrize("name", NARROWS)
def test_narrow_maps_equal_the_formula(name, dtype):
    case = NARROWS[name]
    compare_narrow(triton_narrow, case, case.inputs(dtype), dtype)


def test_tensors_in_unusual_layouts_are_narrow():
    case = Narrow(2, 9, 6, 2, 8, 8, torch.bool, True, grads=(3, 3), heads=2)
    inputs = case.inputs(torch.float32)
    inputs["z"] = torch.randn(9, 2, 12).transpose(0, 1)[..., :8]
    inputs["mask"] = inputs["mask"][:1].expand(2, 9)
    inputs["grads_v"] = [torch.randn(2, 9, 6)[..., :3], torch.randn(()).expand(2, 9, 3)]
    inputs["grad_gate"] = torch.randn(2, 1, 1).expand(2, 2, 9)
    compare_narrow(triton_narrow, case, inputs, torch.float32)


@pytest.mark.parametrize("causal", [False, True])
def test_several_programs_share_the_tokens_of_an_example(causal):
    case = Narrow(1, 300, 48, 2, 56, 56, torch.bool, causal, "relu", True, 1, 0, (56,))
    compare_narrow(triton_narrow, case, case.inputs(torch.float32), torch.float32)


def test_a_mask_of_one_row_belongs_to_all_examples():
    case = Narrow(3, 20, 16, 2, 24, 16, torch.int64, True, selected=1, grads=(8, 8), heads=4)
    inputs = case.inputs(torch.float32)
    # Behind the row lie values that no token may read.
    memory = torch.cat([inputs["mask"][:1], torch.zeros_like(inputs["mask"])])
    compare_narrow(triton_narrow, case, inputs | {"mask": memory[:1]}, torch.float32)
    with pytest.raises(RuntimeError, match="expanded size"):
        compare_narrow(triton_narrow, case, inputs | {"mask": memory[:, :9]}, torch.float32)
