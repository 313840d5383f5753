"""Log-sum-exp attention against plain autograd, for every kind of mask and gate."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scaleup.unipelt.kernels import Visible, additive_mask, lse_attention, planned_for

L, SCALE, DROPOUT = 10, 0.2, 0.3
# Examples, heads, key-value heads, queries, keys, head size.
SIZES = ((2, 4, 4, 37, 37, 16), (3, 6, 2, 40, 40, 32), (2, 4, 2, 1, 50, 32), (2, 4, 2, 5, 44, 16))
GATES = ("none", "constant", "example", "token", "head")
MASKS = ("none", "causal", "padding", "left padding", "additive", "window", "bias")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}


def plain(query, key, value, prefix, gate, allowed, bias=None, keep=None) -> torch.Tensor:
    """Return the attention [B, T, H, E] from one softmax over the prefix and the real keys."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    prefix_key, prefix_value = prefix.repeat_interleave(groups, dim=1)
    gate = gate.unsqueeze(1) if isinstance(gate, torch.Tensor) else gate
    of_prefix = query @ prefix_key.transpose(1, 2) * SCALE * gate
    scores = query @ key.transpose(2, 3) * SCALE + (0 if bias is None else bias)
    scores = scores.masked_fill(allowed.logical_not(), -torch.inf)
    weights = torch.cat([of_prefix, scores], dim=-1).softmax(dim=-1)
    if keep is not None:
        weights = weights * keep / (1 - DROPOUT)
    length = prefix.shape[2]
    out = (weights[..., :length] * gate) @ prefix_value + weights[..., length:] @ value
    return out.transpose(1, 2)


def tensors(sizes, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Return query, key, value and prefix."""
    torch.manual_seed(0)
    examples, heads, kv_heads, queries, keys, size = sizes
    shapes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    qkv = [torch.randn(examples, *shape, size, dtype=dtype).transpose(1, 2) for shape in shapes]
    return [*qkv, torch.randn(2, kv_heads, L, size, dtype=dtype)]


def visibility(kind: str, sizes, dtype) -> tuple[Visible, torch.Tensor, torch.Tensor | None]:
    """Return what the kernel gets, a boolean mask of the same meaning, and a position bias."""
    examples, heads, _, queries, keys, _ = sizes
    allowed = torch.ones(examples, 1, queries, keys, dtype=torch.bool)
    causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    at = torch.arange(keys)
    if kind == "none":
        return Visible(), allowed, None
    if kind == "causal":
        return Visible(causal=True), allowed.tril(), None
    if kind == "bias":
        bias = torch.randn(1, heads, queries, keys, dtype=dtype)
        return Visible(additive_mask(bias, dtype)), allowed, bias
    if kind == "padding":
        allowed = (at < torch.randint(1, keys, (examples, 1)))[:, None, None]
    elif kind == "window":
        allowed &= causal & causal.logical_not().roll(-4, dims=0)
    else:  # the first queries of the first example see no key
        padding = torch.tensor([3, *torch.randint(0, 3, (examples - 1,))])
        allowed = (at >= padding[:, None])[:, None, None] & causal
    mask = allowed
    if kind == "additive":
        mask = torch.zeros(allowed.shape, dtype=dtype)
        mask.masked_fill_(allowed.logical_not(), torch.finfo(dtype).min)
    return Visible(additive_mask(mask, dtype)), allowed, None


def gate_of(kind: str, sizes, dtype) -> tuple[Any, Any, torch.Tensor | None]:
    """Return a gate for the kernel, for `plain`, and the leaf that they are made of."""
    if kind in ("none", "constant"):
        constant = 1.0 if kind == "none" else 0.7
        return constant, constant, None
    examples, heads, _, queries, _, _ = sizes
    leaf = torch.rand(examples, 1 if kind == "example" else queries, 1, dtype=dtype)
    leaf.requires_grad_()
    by_head = leaf.transpose(1, 2).expand(examples, heads, queries)
    return by_head if kind == "head" else leaf, leaf, leaf


def relative(computed, expected) -> float:
    return float((computed - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=["heads", "groups", "one query", "cache"])
def test_the_output_and_all_gradients_are_those_of_plain_autograd(sizes, dtype):
    for gate_kind in GATES:
        for mask_kind in MASKS:
            if mask_kind == "causal" and sizes[3] != sizes[4]:
                continue
            leaves = [x.requires_grad_() for x in tensors(sizes, dtype)]
            gate, plain_gate, leaf = gate_of(gate_kind, sizes, dtype)
            visible, allowed, bias = visibility(mask_kind, sizes, dtype)
            expected = plain(*leaves, plain_gate, allowed, bias)
            out = lse_attention(*leaves, gate, visible, SCALE, 0.0)
            weight = torch.randn_like(expected)
            leaves += [] if leaf is None else [leaf]
            wanted = torch.autograd.grad(expected, leaves, weight)
            grads = torch.autograd.grad(out, leaves, weight)
            errors = [relative(*pair) for pair in zip((out, *grads), (expected, *wanted))]
            assert max(errors) < TOLERANCE[dtype], (gate_kind, mask_kind, errors)


def test_half_precision_hides_keys_too():
    sizes = SIZES[1]
    for dtype in (torch.bfloat16, torch.float16):
        query, key, value, prefix = tensors(sizes, torch.float32)
        visible, allowed, _ = visibility("left padding", sizes, dtype)
        expected = plain(query, key, value, prefix, 0.5, allowed)
        out = lse_attention(
            *(x.to(dtype) for x in (query, key, value)), prefix, 0.5, visible, SCALE, 0.0
        )
        assert out.dtype == dtype and relative(out.float(), expected) < 2e-2


@pytest.mark.parametrize("mask_kind", ["causal", "left padding"])
@pytest.mark.parametrize("gate_kind", ["none", "token"])
def test_dropout_drops_weights_of_the_whole_softmax(gate_kind, mask_kind):
    sizes = SIZES[1]
    leaves = [x.requires_grad_() for x in tensors(sizes)]
    gate, plain_gate, leaf = gate_of(gate_kind, sizes, torch.float64)
    visible, allowed, _ = visibility(mask_kind, sizes, torch.float64)
    out = lse_attention(*leaves, gate, visible, SCALE, DROPOUT)
    keep = torch.cat(
        [x for x in out.grad_fn.saved_tensors if x is not None and x.dtype == torch.bool], -1
    )
    assert keep.shape[-1] == L + sizes[4]
    for part in (keep[..., :L], keep[..., L:]):
        spread = (DROPOUT * (1 - DROPOUT) / part.numel()) ** 0.5
        assert abs(part.double().mean() - (1 - DROPOUT)) < 5 * spread
    expected = plain(*leaves, plain_gate, allowed, keep=keep)
    leaves += [] if leaf is None else [leaf]
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, weight)
    grads = torch.autograd.grad(out, leaves, weight)
    for pair in zip((out, *grads), (expected, *wanted)):
        assert relative(*pair) < 1e-12


def test_second_derivatives_are_refused():
    leaves = [x.requires_grad_() for x in tensors(SIZES[0])]
    loss = lse_attention(*leaves, 1.0, Visible(), SCALE, 0.0).square().sum()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, leaves, create_graph=True)


def test_a_backward_pass_may_be_repeated():
    leaves = [x.requires_grad_() for x in tensors(SIZES[0])]
    loss = lse_attention(*leaves, 1.0, Visible(causal=True), SCALE, 0.0).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for before, after in zip(first, torch.autograd.grad(loss, leaves)):
        assert torch.equal(before, after)


class Record(TorchDispatchMode):
    """Record the operations, and the shapes of what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func.name().removeprefix("aten::"))
        self.shapes += [tuple(x.shape) for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        return out


def recorded(sizes, visible: Visible, dtype: torch.dtype, dropout: float = 0.0) -> Record:
    """Record forward and backward pass as on CUDA, where no tensor holds data."""
    with FakeTensorMode(), planned_for("cuda"):
        examples, heads, kv_heads, queries, keys, size = sizes
        shapes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
        qkv = [
            torch.empty(examples, *shape, size, dtype=dtype).transpose(1, 2).requires_grad_()
            for shape in shapes
        ]
        prefix = torch.empty(2, kv_heads, L, size).requires_grad_()
        gate = torch.empty(examples, queries, 1, dtype=dtype).requires_grad_()
        if visible.mask is not None:
            visible = visible._replace(mask=torch.empty(visible.mask.shape, dtype=dtype))
        with Record() as record:
            out = lse_attention(*qkv, prefix, gate, visible, SCALE, dropout)
            out.sum().backward()
    for leaf in (*qkv, prefix, gate):
        assert leaf.grad.shape == leaf.shape and leaf.grad.dtype == leaf.dtype
    return record


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_on_cuda_the_flash_kernel_makes_nothing_of_the_size_of_the_scores(dropout):
    examples, heads, _, queries, keys, size = sizes = (2, 8, 2, 512, 512, 64)
    record = recorded(sizes, Visible(causal=True), torch.bfloat16, dropout)
    assert {"_flash_attention_forward", "_flash_attention_backward"} <= record.names
    assert not any("efficient" in name for name in record.names)
    assert all(
        torch.Size(shape).numel() <= examples * heads * queries * size for shape in record.shapes
    )
    assert not any(
        shape[-1:] in ((size + L,), (keys + L,)) or keys + L in shape for shape in record.shapes
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_cuda_a_mask_gets_no_columns_for_the_prefix(dtype):
    sizes = (2, 8, 2, 128, 100, 64)
    mask = torch.zeros(2, 1, 1, 100)
    record = recorded(sizes, Visible(mask=mask), dtype)
    assert {
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_efficient_attention_backward",
    } <= record.names
    assert not any(100 + L in shape or 64 + L in shape for shape in record.shapes)


def test_on_cuda_a_causal_attention_over_more_keys_than_queries_is_not_aligned_at_the_end():
    record = recorded((1, 2, 2, 8, 16, 16), Visible(causal=True), torch.bfloat16)
    assert "_scaled_dot_product_efficient_attention" in record.names
