"""Log-sum-exp attention as an operation for compilers."""

import sys

import pytest
import torch

from scaleup.unipelt.kernels import Visible, additive_mask, lse_attention

# The package has a function of the module's name.
module = sys.modules[lse_attention.__module__]
SCALE = 0.25


def tensors() -> list[torch.Tensor]:
    """Return query, key, value, prefix and a gate per head and query."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 7, h, 16).transpose(1, 2) for h in (4, 2, 2))
    gate = torch.rand(2, 1, 7).expand(2, 4, 7)
    return [query, key, value, torch.randn(2, 2, 3, 16), gate]


def masks() -> list[Visible]:
    allowed = torch.rand(2, 1, 7, 7) > 0.5
    lengths = torch.tensor([[0, 5, 14], [0, 5, 14]], dtype=torch.int32)
    return [
        Visible(causal=True),
        Visible(additive_mask(allowed, torch.float32)),
        Visible(causal=True, lengths=lengths, longest=(7, 7), window=3),
    ]


def arguments(visible: Visible, gate: bool) -> list[torch.Tensor | None]:
    leaves = [x.detach().requires_grad_() for x in tensors()]
    if visible.lengths is not None:
        leaves[:3] = [
            x.detach().transpose(1, 2).reshape(1, 14, -1, 16).transpose(1, 2).requires_grad_()
            for x in leaves[:3]
        ]
        leaves[4] = torch.rand(1, 4, 14).requires_grad_()
    return leaves if gate else [*leaves[:4], None]


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize("kind", range(3), ids=["causal", "mask", "texts"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_operations_pass_opcheck(kind, gate, dropout):
    visible = masks()[kind]
    inputs, rest = arguments(visible, gate), (*visible, SCALE, dropout)
    torch.library.opcheck(module._operation, (*inputs, *rest))
    out, *others = (x.detach() for x in module._operation(*inputs, *rest))
    inputs = [None if x is None else x.detach() for x in inputs]
    torch.library.opcheck(
        module._operation_backward,
        (torch.randn_like(out), *inputs, visible.mask, out, *others, *rest[1:]),
    )


@pytest.mark.parametrize("kind", range(2), ids=["causal", "mask"])
def test_a_compiled_call_is_one_graph_and_gives_the_same(kind):
    visible = masks()[kind]

    def function(query, key, value, prefix, gate):
        gate = torch.sigmoid(gate)
        return lse_attention(query * 1.0, key, value, prefix, gate, visible, SCALE, 0.0).tanh()

    results = []
    for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        leaves = [x.detach().requires_grad_() for x in tensors()]
        out = call(*leaves)
        out.square().sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    for compiled, eager in zip(*results):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5)
