"""Attention over few keys on a CPU, a prefix among them, as batched products of matrices.

    softmax(scaling · [g Q P_Kᵀ, Q Kᵀ] + mask) · [g P_V; V]          g: one gate per example, or one per query

Joining a prefix to keys and values copies both, and torch's fused attention for CPUs then takes the copies apart again, block by block. With few keys
the same copies are what a batched product reads, and those run at the speed of large products. So this is the way up to as many keys as it is the
quicker one (docs/performance.md): 64 against the fused kernel; more where that one cannot be used as it is, because of dropout between softmax and
values or a gate per query. The weights [B, H, T, S] are kept for the backward pass.

Shapes: B examples, T queries, S keys and the prefix's, H heads, E head size, L prefix length, N = B·H.
"""

import torch

from scaleup.unipelt.kernels.narrow import Written

MOST_KEYS, MOST_KEYS_BESIDE_SLOW = 64, 192  # those of the prefix among them


def is_short(
    query_BHTE: torch.Tensor,
    key_BHSE: torch.Tensor,
    value_BHSE: torch.Tensor,
    mask: torch.Tensor | None,
    length: int,
    dropout: float,
    per_query: bool,
) -> bool:
    """Whether `attend` is the way for these queries, keys and values behind a prefix. Not where something else than these needs a gradient."""
    plain = all(
        x.device.type == "cpu" and x.dtype == torch.float32
        for x in (query_BHTE, key_BHSE, value_BHSE)
    )
    if (
        not plain
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or (mask is not None and mask.requires_grad)
    ):
        return False
    few = key_BHSE.shape[2] + length <= (
        MOST_KEYS_BESIDE_SLOW if per_query or dropout else MOST_KEYS
    )
    return (
        few
        and dropout < 1
        and query_BHTE.shape[2] > 1
        and query_BHTE.shape[:2] == key_BHSE.shape[:2]
    )


def _joined(
    own_HLE: torch.Tensor, gate_B1: torch.Tensor | None, rest_BHSE: torch.Tensor
) -> torch.Tensor:
    """[N, S, E]: the prefix, scaled by each example's gate if there is one, and the keys or values behind it."""
    batch, heads, keys, size = rest_BHSE.shape
    out_BHSE = rest_BHSE.new_empty(batch, heads, own_HLE.shape[1] + keys, size)
    front_BHLE, back_BHSE = out_BHSE.split_with_sizes([own_HLE.shape[1], keys], dim=2)
    front_BHLE.copy_(own_HLE) if gate_B1 is None else torch.mul(
        own_HLE, gate_B1[..., None, None], out=front_BHLE
    )
    back_BHSE.copy_(rest_BHSE)
    return out_BHSE.view(batch * heads, -1, size)


def _transposed(x_NSE: torch.Tensor) -> torch.Tensor:
    """[N, E, S], copied: a batch of small products with a transposed right side takes three times as long."""
    return x_NSE.transpose(1, 2).contiguous()


def _by_tokens(x_BHTE: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """`factor` · x, laid out as [B, T, H, E]: where the heads come from, [B, T, H·E] is then seen without a copy."""
    batch, heads, tokens, size = x_BHTE.shape
    return torch.mul(
        x_BHTE, factor, out=x_BHTE.new_empty(batch, tokens, heads, size).transpose(1, 2)
    )


def _dropped(
    weights_NTS: torch.Tensor, kept_NTS: torch.Tensor | None, dropout: float
) -> torch.Tensor:
    """After dropout; a copy that may be written to."""
    return (
        weights_NTS.clone()
        if kept_NTS is None
        else (weights_NTS * kept_NTS).mul_(1 / (1 - dropout))
    )


class _Attend(Written):
    """A gate per example scales the prefix; a gate per query scales its scores and weights."""

    @staticmethod
    def forward(
        ctx, query_BHTE, key_BHSE, value_BHSE, own, gate_BT, mask, scaling: float, dropout: float
    ) -> torch.Tensor:
        """[B, T, H, E]. own: keys and values of the prefix, [2, H, L, E]; gate_BT: [B, 1] or [B, T]; mask: as sdpa takes it, or None."""
        batch, heads, queries, size = query_BHTE.shape
        length, per_query = own.shape[2], gate_BT.shape[1] > 1
        scaled_NTE = torch.mul(
            query_BHTE, scaling, out=query_BHTE.new_empty(query_BHTE.shape)
        ).view(-1, queries, size)
        keys_NSE, values_NSE = (
            _joined(part, None if per_query else gate_BT, rest)
            for part, rest in zip(own, (key_BHSE, value_BHSE))
        )
        scores_BHTS = torch.bmm(scaled_NTE, _transposed(keys_NSE)).view(batch, heads, queries, -1)
        raw_BHTL = scores_BHTS[..., :length].clone() if per_query else None
        if per_query:
            scores_BHTS[..., :length] *= gate_BT[:, None, :, None]
        if mask is not None:
            scores_BHTS.masked_fill_(
                mask.logical_not(), -torch.inf
            ) if mask.dtype == torch.bool else scores_BHTS.add_(mask)
        weights_NTS = torch.softmax(scores_BHTS, dim=-1).view(batch * heads, queries, -1)
        kept_NTS = (
            torch.empty_like(weights_NTS, dtype=torch.bool).bernoulli_(1 - dropout)
            if dropout
            else None
        )
        shares_NTS = (
            _dropped(weights_NTS, kept_NTS, dropout) if per_query or dropout else weights_NTS
        )
        if per_query:
            shares_NTS.view(scores_BHTS.shape)[..., :length] *= gate_BT[:, None, :, None]
        ctx.save_for_backward(
            scaled_NTE, keys_NSE, values_NSE, weights_NTS, kept_NTS, raw_BHTL, own, gate_BT
        )
        ctx.scaling, ctx.dropout = scaling, dropout
        return torch.bmm(shares_NTS, values_NSE).view(query_BHTE.shape).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx, grad_BTHE: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of query, key, value, the prefix and its gate. Raises RuntimeError where gradients of these are asked for."""
        if (
            torch.is_grad_enabled()
        ):  # torch's once_differentiable would notice some of those, not all
            raise RuntimeError(
                "attention with a prefix has no second derivatives on a CPU; load the model with attn_implementation='eager'"
            )
        scaled_NTE, keys_NSE, values_NSE, weights_NTS, kept_NTS, raw_BHTL, own, gate_BT = (
            ctx.saved_tensors
        )
        batch, queries, heads, size = grad_BTHE.shape
        length, per_query = own.shape[2], raw_BHTL is not None
        need_query, need_key, need_value, need_own, need_gate = ctx.needs_input_grad[:5]
        grad_gate = None

        def front(x_NTS: torch.Tensor) -> torch.Tensor:
            return x_NTS.view(batch, heads, queries, -1)[..., :length]

        grad_NTE = grad_BTHE.transpose(1, 2).reshape(-1, queries, size)
        shares_NTS = (
            _dropped(weights_NTS, kept_NTS, ctx.dropout)
            if per_query or ctx.dropout
            else weights_NTS
        )
        both_NTS = torch.bmm(grad_NTE, _transposed(values_NSE)).mul_(
            shares_NTS
        )  # weights times their gradients
        if per_query:
            grad_gate = front(both_NTS).sum(dim=(1, 3))
            for gated_NTS in (both_NTS, shares_NTS):
                front(gated_NTS).mul_(gate_BT[:, None, :, None])
        grad_values_BHSE = torch.bmm(shares_NTS.transpose(1, 2), grad_NTE).view(
            batch, heads, -1, size
        )
        grad_scores_NTS = both_NTS.addcmul_(
            weights_NTS, both_NTS.sum(dim=-1, keepdim=True), value=-1
        )
        if per_query:
            grad_gate += (front(grad_scores_NTS) * raw_BHTL).sum(dim=(1, 3))
            front(grad_scores_NTS).mul_(gate_BT[:, None, :, None])
        grad_query_NTE = torch.bmm(grad_scores_NTS, keys_NSE) if need_query else None
        grad_keys_BHSE = torch.bmm(grad_scores_NTS.transpose(1, 2), scaled_NTE).view(
            batch, heads, -1, size
        )
        grad_own = torch.stack(
            [part[:, :, :length] for part in (grad_keys_BHSE, grad_values_BHSE)], dim=1
        )
        if per_query:
            grad_own = grad_own.sum(dim=0)
        else:  # as products: own [P], its gradient of each example [B, P]
            grad_gate = (grad_own.view(batch, -1) @ own.reshape(-1, 1)) if need_gate else None
            grad_own = (
                (gate_BT.t() @ grad_own.view(batch, -1)).view(own.shape) if need_own else None
            )
        return (
            _by_tokens(grad_query_NTE.view(batch, heads, queries, size), ctx.scaling)
            if need_query
            else None,
            _by_tokens(grad_keys_BHSE[:, :, length:]) if need_key else None,
            _by_tokens(grad_values_BHSE[:, :, length:]) if need_value else None,
            grad_own,
            grad_gate,
            None,
            None,
            None,
        )


def attend(
    query_BHTE: torch.Tensor,
    key_BHSE: torch.Tensor,
    value_BHSE: torch.Tensor,
    own: torch.Tensor,
    gate: torch.Tensor | float,
    mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """[B, T, H, E]. own: the prefix's keys and values [2, H, L, E]; gate: [B, 1 or T, 1] or a constant; mask: boolean or additive, over all S keys."""
    batch = query_BHTE.shape[0]
    gate_BT = (
        gate.squeeze(2).to(query_BHTE.dtype).expand(batch, -1)
        if isinstance(gate, torch.Tensor)
        else query_BHTE.new_full((batch, 1), gate)
    )
    return _Attend.run(
        query_BHTE, key_BHSE, value_BHSE, own.to(query_BHTE.dtype), gate_BT, mask, scaling, dropout
    )
