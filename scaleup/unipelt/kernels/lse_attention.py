"""Attention with a prefix: a fused kernel over the real keys, and the prefix joined to its output.

    softmax(scale · [g q·P_Kᵀ, q·Kᵀ] + [0, mask]) · [g P_V; V]

Real keys keep the kernel that they have without a prefix, with its own mask, and keys and values
are not copied. Both parts of the softmax are joined by their log-sum-exp (`reference.py`). The
backward pass calls the fused kernel's own with the joined output and log-sum-exp, from which the
kernel computes the weights and gradients of the whole softmax, as in ring attention.

Dropout drops weights of the whole softmax: the fused kernel those of the real keys, and a mask of
L weights per head and query, drawn for each call, those of the prefix.

Shapes: B examples, H heads, G key-value heads, T queries, S keys, E head size, L prefix length.
"""

from typing import Any

import torch
from torch.library import custom_op

from . import fused_attention, ops
from .fused_attention import Dropped, Visible
from .narrow import HandWritten
from .ops import LIBRARY
from .reference import wide_dtype
from .target import mode, target_device

Tensor = torch.Tensor
Joined = tuple[Tensor, Tensor, Tensor | None, Dropped]  # output, log-sum-exp, kept weights


def lse_attention(
    query_BHTE: Tensor,
    key_BGSE: Tensor,
    value_BGSE: Tensor,
    prefix: Tensor | None,
    gate: Tensor | float,
    visible: Visible,
    scale: float,
    dropout: float,
) -> Tensor:
    """Compute the attention. `fused_attention.kernel_for` must have a kernel for it.

    Args:
        query_BHTE, key_BGSE, value_BGSE: of the attention, without the prefix.
        prefix: keys and values of the prefix, [2, G, L, E], or None.
        gate: [B, 1 or T, 1], or [B, H, T] with equal heads, or a constant.
        visible: which real keys a query sees.
        scale: factor of the scores.
        dropout: probability.

    Returns:
        [B, T, H, E].
    """
    batch, heads, queries = query_BHTE.shape[:3]
    gate_BHT = per_query(gate, query_BHTE) if isinstance(gate, Tensor) else None
    query, key, value = query_BHTE, key_BGSE, value_BGSE
    if visible.lengths is not None:
        query, key, value = (one_row(x) for x in (query, key, value))
        if gate_BHT is not None:
            gate_BHT = gate_BHT[:, :1].reshape(1, 1, -1).expand(1, heads, -1)
    # The kernels assume dense heads, and that for CPUs does not look whether they are.
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    if prefix is None:  # torch differentiates its own kernels
        out = fused_attention.forward(query, key, value, visible, scale, dropout)[0].transpose(1, 2)
    else:
        if not isinstance(gate, Tensor) and gate != 1.0:
            prefix = prefix * gate
        tensors = query, key, value, prefix, gate_BHT
        if torch.compiler.is_compiling():
            out = _operation(*tensors, *visible, scale, dropout)[0]
        else:
            out = _LseAttention.run(*tensors, visible, scale, dropout)
    return out if visible.lengths is None else out.view(batch, queries, heads, -1)


def is_fast_on_cpu(query_BHTE: Tensor, per_query: bool, dropout: float) -> bool:
    """Return whether this is the fastest way on a CPU for more keys than short_attention takes.

    Args:
        query_BHTE: queries.
        per_query: whether there is one gate per query. A gate per example can scale keys and
            values, which is faster there.
        dropout: probability.
    """
    return per_query and not dropout and target_device(query_BHTE) == "cpu" and mode() == "auto"


def per_query(gate: Tensor, query_BHTE: Tensor) -> Tensor:
    """Return a gate [B, 1 or T, 1] or [B, H, T] as [B, H, T] in float32 (or float64)."""
    batch, heads, queries = query_BHTE.shape[:3]
    if gate.shape[1:] != (heads, queries):
        gate = gate.transpose(1, 2)
    return gate.to(wide_dtype(query_BHTE)).expand(batch, heads, queries)


def one_row(x_BHTE: Tensor) -> Tensor:
    """Join the rows of a batch to [1, H, B·T, E]."""
    return x_BHTE.transpose(1, 2).flatten(0, 1).unsqueeze(0).transpose(1, 2)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Tensor,
    gate: Tensor | None,
    visible: Visible,
    scale: float,
    dropout: float,
) -> Joined:
    out, lse, dropped = fused_attention.forward(query, key, value, visible, scale, dropout)
    keep = None
    if dropout:
        shape = (*query.shape[:3], prefix.shape[2])
        keep = torch.empty(shape, dtype=torch.bool, device=query.device).bernoulli_(1 - dropout)
    ops.merge_forward(query, out, lse, prefix, gate, scale, keep, dropout)
    return out, lse, keep, dropped


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Tensor,
    gate: Tensor | None,
    joined: Joined,
    visible: Visible,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value, prefix and gate from that of [B, H, T, E]."""
    out, lse, keep, dropped = joined
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()  # that of a sum is not dense
    grad_query, grad_key, grad_value = fused_attention.backward(
        grad, query, key, value, out, lse, dropped, visible, scale, dropout
    )
    parts, grad_gate = ops.merge_backward(
        query, out, lse, prefix, gate, grad, grad_query, scale, keep, dropout
    )
    grad_prefix = parts.unflatten(2, (prefix.shape[1], -1)).sum(dim=(0, 3)).to(prefix.dtype)
    return grad_query, grad_key, grad_value, grad_prefix, grad_gate


class _LseAttention(HandWritten):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix: Tensor,
        gate: Tensor | None,
        visible: Visible,
        scale: float,
        dropout: float,
    ) -> Tensor:
        out, lse, keep, dropped = _forward(query, key, value, prefix, gate, visible, scale, dropout)
        ctx.save_for_backward(
            query, key, value, prefix, gate, visible.mask, out, lse, keep, *dropped
        )
        ctx.arguments = visible._replace(mask=None), scale, dropout
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad_BTHE: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients.

        Raises:
            RuntimeError: where second derivatives are asked for.
        """
        if torch.is_grad_enabled():  # torch's once_differentiable misses some of these cases
            raise RuntimeError(
                "attention with a prefix has no second derivatives; leave out create_graph=True"
            )
        query, key, value, prefix, gate, mask, out, lse, keep, *dropped = ctx.saved_tensors
        visible, scale, dropout = ctx.arguments
        grads = _backward(
            grad_BTHE.transpose(1, 2),
            query,
            key,
            value,
            prefix,
            gate,
            (out, lse, keep, Dropped(*dropped)),
            visible._replace(mask=mask),
            scale,
            dropout,
        )
        return *grads[:4], None if gate is None else grads[4], None, None, None


# The same for compilers. Operations return tensors, so that empty ones stand for None.


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


def _or_none(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.shape != (0,) else None


@custom_op(f"{LIBRARY}::lse_attention", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _operation(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Tensor,
    gate: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    lengths: Tensor | None,
    longest: list[int],
    window: int | None,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    visible = Visible(mask, causal, lengths, (longest[0], longest[1]), window)
    out, lse, keep, dropped = _forward(query, key, value, prefix, gate, visible, scale, dropout)
    keep, first, second = (_or_empty(x, query) for x in (keep, *dropped))
    return out.transpose(1, 2), lse, keep, first, second


@custom_op(f"{LIBRARY}::lse_attention_backward", mutates_args=())
def _operation_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Tensor,
    gate: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    keep: Tensor,
    first: Tensor,
    second: Tensor,
    causal: bool,
    lengths: Tensor | None,
    longest: list[int],
    window: int | None,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    visible = Visible(mask, causal, lengths, (longest[0], longest[1]), window)
    joined = (out.transpose(1, 2), lse, _or_none(keep), Dropped(_or_none(first), _or_none(second)))
    return _backward(
        grad.transpose(1, 2), query, key, value, prefix, gate, joined, visible, scale, dropout
    )


@_operation.register_fake
def _(query, key, value, prefix, gate, mask, causal, lengths, longest, window, scale, dropout):  # type: ignore[no-untyped-def]
    visible = Visible(mask, causal, lengths, tuple(longest), window)
    out, lse, dropped = fused_attention.forward(query, key, value, visible, scale, dropout)
    shape = (*query.shape[:3], prefix.shape[2]) if dropout else (0,)
    keep = query.new_empty(shape, dtype=torch.bool if dropout else query.dtype)
    return out.transpose(1, 2), lse, keep, *(_or_empty(x, query) for x in dropped)


@_operation_backward.register_fake
def _(grad, query, key, value, prefix, gate, *args):  # type: ignore[no-untyped-def]
    mask, out, lse, _, first, second, causal, lengths, longest, window, scale, dropout = args
    visible = Visible(mask, causal, lengths, tuple(longest), window)
    dropped = Dropped(_or_none(first), _or_none(second))
    grad, out = grad.transpose(1, 2), out.transpose(1, 2)
    grads = fused_attention.backward(
        grad, query, key, value, out, lse, dropped, visible, scale, dropout
    )
    dtype = wide_dtype(query)
    shape = (0,) if gate is None else gate.shape
    return *grads, prefix.new_empty(prefix.shape), query.new_empty(shape, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, prefix, gate, mask, causal, lengths, *rest = inputs
    ctx.save_for_backward(query, key, value, prefix, gate, mask, *output, lengths)
    ctx.arguments = causal, rest
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _operation_gradients(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    *tensors, lengths = ctx.saved_tensors
    causal, rest = ctx.arguments
    grads = _operation_backward(grad, *tensors, causal, lengths, *rest)
    return *grads[:4], None if tensors[4] is None else grads[4], *(None,) * 7


_operation.register_autograd(_operation_gradients, setup_context=_setup_context)
