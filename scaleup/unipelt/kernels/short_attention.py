"""Attention over few keys on a CPU, including a prefix, as batched matrix products.

    softmax(scaling · [g Q P_Kᵀ, Q Kᵀ] + mask) · [g P_V; V]    g: one gate per example, or per query

Joining a prefix to keys and values copies both, and torch's fused attention for CPUs then copies
them again, block by block. With few keys, batched products read the first copies and are faster
(docs/performance.md): up to 64 keys against the fused kernel, and up to more where the fused kernel
cannot be used as it is, because of dropout or a gate per query; for the latter, lse_attention is
faster with more keys than that. The weights [B, H, T, S] are kept for the backward pass.

Shapes: B examples, T queries, S keys including the prefix's, H heads, E head size, L prefix length,
N = B·H.
"""

from typing import Any

import torch

from .narrow import HandWritten
from .target import mode, target_device

# Including those of the prefix.
MOST_KEYS, MOST_KEYS_PER_QUERY, MOST_KEYS_WITHOUT_FUSED = 64, 96, 192


def is_short(
    query_BHTE: torch.Tensor,
    key_BHSE: torch.Tensor,
    value_BHSE: torch.Tensor,
    mask: torch.Tensor | None,
    length: int,
    dropout: float,
    per_query: bool,
) -> bool:
    """Return whether `attend` is the fastest way and gives every gradient that is needed.

    Args:
        query_BHTE, key_BHSE, value_BHSE: of the attention, without the prefix.
        mask: as for `attend`.
        length: of the prefix.
        dropout: probability.
        per_query: whether there is one gate per query instead of one per example.
    """
    if query_BHTE.shape[2] == 1 or query_BHTE.shape[:2] != key_BHSE.shape[:2]:
        return False
    inputs = (query_BHTE, key_BHSE, value_BHSE)
    plain = all(target_device(x) == "cpu" and x.dtype == torch.float32 for x in inputs)
    if not plain or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    if mask is not None and mask.requires_grad:
        return False
    most = MOST_KEYS_WITHOUT_FUSED if per_query or dropout else MOST_KEYS
    if per_query and not dropout and mode() == "auto":
        most = MOST_KEYS_PER_QUERY
    return key_BHSE.shape[2] + length <= most and dropout < 1


def attend(
    query_BHTE: torch.Tensor,
    key_BHSE: torch.Tensor,
    value_BHSE: torch.Tensor,
    prefix: torch.Tensor,
    gate: torch.Tensor | float,
    mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """Compute the attention.

    Args:
        query_BHTE, key_BHSE, value_BHSE: of the attention, without the prefix.
        prefix: keys and values of the prefix, [2, H, L, E].
        gate: [B, 1 or T, 1] or a constant.
        mask: boolean or additive over all S keys, or None.
        scaling: the factor of q·k.
        dropout: probability.

    Returns:
        [B, T, H, E].
    """
    batch = query_BHTE.shape[0]
    if isinstance(gate, torch.Tensor):
        gate_BT = gate.squeeze(2).to(query_BHTE.dtype).expand(batch, -1)
    else:
        gate_BT = query_BHTE.new_full((batch, 1), gate)
    prefix = prefix.to(query_BHTE.dtype)
    return _Attend.run(query_BHTE, key_BHSE, value_BHSE, prefix, gate_BT, mask, scaling, dropout)


class _Attend(HandWritten):
    """A gate per example scales the prefix; a gate per query scales its scores and weights."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BHTE: torch.Tensor,
        key_BHSE: torch.Tensor,
        value_BHSE: torch.Tensor,
        prefix: torch.Tensor,
        gate_BT: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        dropout: float,
    ) -> torch.Tensor:
        batch, heads, queries, size = query_BHTE.shape
        length, per_query = prefix.shape[2], gate_BT.shape[1] > 1
        scaled = torch.mul(query_BHTE, scaling, out=query_BHTE.new_empty(query_BHTE.shape))
        scaled_NTE = scaled.view(-1, queries, size)
        gate = None if per_query else gate_BT
        keys_NSE = _joined(prefix[0], gate, key_BHSE)
        values_NSE = _joined(prefix[1], gate, value_BHSE)
        scores_BHTS = torch.bmm(scaled_NTE, _transposed(keys_NSE)).view(batch, heads, queries, -1)
        raw_BHTL = scores_BHTS[..., :length].clone() if per_query else None
        if per_query:
            scores_BHTS[..., :length] *= gate_BT[:, None, :, None]
        if mask is not None and mask.dtype == torch.bool:
            scores_BHTS.masked_fill_(mask.logical_not(), -torch.inf)
        elif mask is not None:
            scores_BHTS.add_(mask)
        weights_NTS = torch.softmax(scores_BHTS, dim=-1).view(batch * heads, queries, -1)
        kept_NTS = None
        if dropout:
            kept_NTS = torch.empty_like(weights_NTS, dtype=torch.bool).bernoulli_(1 - dropout)
        shares_NTS = weights_NTS
        if per_query or dropout:
            shares_NTS = _dropped(weights_NTS, kept_NTS, dropout)
        if per_query:
            shares_NTS.view(scores_BHTS.shape)[..., :length] *= gate_BT[:, None, :, None]
        ctx.save_for_backward(
            scaled_NTE, keys_NSE, values_NSE, weights_NTS, kept_NTS, raw_BHTL, prefix, gate_BT
        )
        ctx.scaling, ctx.dropout = scaling, dropout
        out_BHTE = torch.bmm(shares_NTS, values_NSE).view(query_BHTE.shape)
        return out_BHTE.transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, grad_BTHE: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of query, key, value, the prefix and its gate.

        Raises:
            RuntimeError: where second derivatives are asked for.
        """
        HandWritten.refuse_second_derivatives()
        scaled_NTE, keys_NSE, values_NSE, weights_NTS, *rest = ctx.saved_tensors
        kept_NTS, raw_BHTL, prefix, gate_BT = rest
        batch, queries, heads, size = grad_BTHE.shape
        length, per_query = prefix.shape[2], raw_BHTL is not None
        need_query, need_key, need_value, need_prefix, need_gate = ctx.needs_input_grad[:5]
        grad_gate = None

        def front(x_NTS: torch.Tensor) -> torch.Tensor:
            return x_NTS.view(batch, heads, queries, -1)[..., :length]

        grad_NTE = grad_BTHE.transpose(1, 2).reshape(-1, queries, size)
        shares_NTS = weights_NTS
        if per_query or ctx.dropout:
            shares_NTS = _dropped(weights_NTS, kept_NTS, ctx.dropout)
        # The weights times their gradients.
        both_NTS = torch.bmm(grad_NTE, _transposed(values_NSE)).mul_(shares_NTS)
        if per_query:
            grad_gate = front(both_NTS).sum(dim=(1, 3))
            for gated_NTS in (both_NTS, shares_NTS):
                front(gated_NTS).mul_(gate_BT[:, None, :, None])
        grad_values = torch.bmm(shares_NTS.transpose(1, 2), grad_NTE)
        grad_values_BHSE = grad_values.view(batch, heads, -1, size)
        total_NT1 = both_NTS.sum(dim=-1, keepdim=True)
        grad_scores_NTS = both_NTS.addcmul_(weights_NTS, total_NT1, value=-1)
        if per_query:
            grad_gate += (front(grad_scores_NTS) * raw_BHTL).sum(dim=(1, 3))
            front(grad_scores_NTS).mul_(gate_BT[:, None, :, None])
        grad_query = None
        if need_query:
            grad_query_NTE = torch.bmm(grad_scores_NTS, keys_NSE)
            grad_query = _by_tokens(grad_query_NTE.view(batch, heads, queries, size), ctx.scaling)
        grad_keys = torch.bmm(grad_scores_NTS.transpose(1, 2), scaled_NTE)
        grad_keys_BHSE = grad_keys.view(batch, heads, -1, size)
        grad_parts = torch.stack(
            [part[:, :, :length] for part in (grad_keys_BHSE, grad_values_BHSE)], 1
        )
        if per_query:
            grad_prefix: torch.Tensor | None = grad_parts.sum(dim=0)
        else:  # as matrix products: the prefix [P], its gradient for each example [B, P]
            of_examples_BP = grad_parts.view(batch, -1)
            grad_gate = of_examples_BP @ prefix.reshape(-1, 1) if need_gate else None
            grad_prefix = (gate_BT.t() @ of_examples_BP).view(prefix.shape) if need_prefix else None
        grad_key = _by_tokens(grad_keys_BHSE[:, :, length:]) if need_key else None
        grad_value = _by_tokens(grad_values_BHSE[:, :, length:]) if need_value else None
        return grad_query, grad_key, grad_value, grad_prefix, grad_gate, None, None, None


def _joined(
    prefix_HLE: torch.Tensor, gate_B1: torch.Tensor | None, rest_BHSE: torch.Tensor
) -> torch.Tensor:
    """Put the prefix, scaled by each example's gate if there is one, in front; [N, S, E]."""
    batch, heads, keys, size = rest_BHSE.shape
    length = prefix_HLE.shape[1]
    out_BHSE = rest_BHSE.new_empty(batch, heads, length + keys, size)
    front_BHLE, back_BHSE = out_BHSE.split_with_sizes([length, keys], dim=2)
    if gate_B1 is None:
        front_BHLE.copy_(prefix_HLE)
    else:
        torch.mul(prefix_HLE, gate_B1[..., None, None], out=front_BHLE)
    back_BHSE.copy_(rest_BHSE)
    return out_BHSE.view(batch * heads, -1, size)


def _transposed(x_NSE: torch.Tensor) -> torch.Tensor:
    """Return a copy [N, E, S]. Batched products with a transposed side take 3 times as long."""
    return x_NSE.transpose(1, 2).contiguous()


def _by_tokens(x_BHTE: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """Return factor · x, stored as [B, T, H, E], so that [B, T, H·E] is a view of it."""
    batch, heads, tokens, size = x_BHTE.shape
    out = x_BHTE.new_empty(batch, tokens, heads, size).transpose(1, 2)
    return torch.mul(x_BHTE, factor, out=out)


def _dropped(
    weights_NTS: torch.Tensor, kept_NTS: torch.Tensor | None, dropout: float
) -> torch.Tensor:
    """Return a copy of the weights after dropout, which may be overwritten."""
    if kept_NTS is None:
        return weights_NTS.clone()
    return (weights_NTS * kept_NTS).mul_(1 / (1 - dropout))
