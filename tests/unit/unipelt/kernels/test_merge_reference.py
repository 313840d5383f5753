"""The merge formulas against plain autograd: dropout of the prefix's weights, autocast, opcheck."""

import pytest
import torch

from scaleup.unipelt.kernels import ops

SCALE, DROPOUT = 0.3, 0.4


def tensors(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Return queries, a prefix, a gate per example, and a mask of weights to keep."""
    torch.manual_seed(0)
    query_BHTE, prefix = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 3, 8)
    gate_BHT = torch.rand(2, 1, 1).expand(2, 4, 5)
    keep_BHTL = torch.rand(2, 4, 5, 3) < 1 - DROPOUT
    return [query_BHTE.to(dtype), prefix.to(dtype), gate_BHT.to(dtype), keep_BHTL]


def plain(query, prefix, gate, keep):
    """Attend to the prefix alone."""
    keys_HLE, values_HLE = prefix.repeat_interleave(2, dim=1)
    gate_BHT1 = gate.unsqueeze(-1)
    weights_BHTL = (query @ keys_HLE.transpose(1, 2) * SCALE * gate_BHT1).softmax(dim=-1)
    return (weights_BHTL * keep / (1 - DROPOUT) * gate_BHT1) @ values_HLE


def merged(query, prefix, gate, keep):
    out, lse = torch.full_like(query, torch.nan), query.new_full(query.shape[:3], torch.inf)
    ops.merge_forward(query, out, lse, prefix, gate, SCALE, keep, DROPOUT)
    return out, lse


def test_dropped_weights_of_the_prefix_count_in_the_softmax_but_not_in_its_output():
    query, prefix, gate, keep = tensors()
    leaves = [x.clone().requires_grad_() for x in (query, prefix, gate)]
    expected = plain(*leaves, keep)
    grad_out = torch.randn_like(query)
    expected.backward(grad_out)
    out, lse = merged(query, prefix, gate, keep)
    assert torch.allclose(out, expected, rtol=0, atol=1e-14)
    grad_query = torch.zeros_like(query)
    parts, grad_gate = ops.merge_backward(
        query, out, lse, prefix, gate, grad_out, grad_query, SCALE, keep, DROPOUT
    )
    grad_prefix = parts.sum(dim=0).unflatten(1, (2, 2)).sum(dim=2)
    for computed, leaf in zip((grad_query, grad_prefix, grad_gate), leaves):
        assert torch.allclose(computed, leaf.grad, rtol=0, atol=1e-13)


def test_autocast_does_not_reach_the_formulas():
    query, prefix, gate, keep = tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = merged(query, prefix, gate, keep)
    assert torch.allclose(out, plain(query, prefix, gate, keep), rtol=0, atol=1e-6)


@pytest.mark.parametrize("with_dropout", [False, True])
def test_merge_operations_pass_opcheck(with_dropout):
    query, prefix, gate, keep = tensors(torch.float32)
    out, lse = merged(query, prefix, gate, keep)
    last = (SCALE, keep, DROPOUT) if with_dropout else (SCALE,)
    torch.library.opcheck(
        ops._merge_forward, (query, out.clone(), lse.clone(), prefix, gate, *last)
    )
    gradients = (torch.randn_like(query), torch.zeros_like(query))
    torch.library.opcheck(ops._merge_backward, (query, out, lse, prefix, gate, *gradients, *last))
