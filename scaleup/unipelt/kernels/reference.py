"""The four kernels of the fast path as plain PyTorch formulas.

    merge_forward, merge_backward      join a prefix to the output of a fused attention
    narrow_forward, narrow_backward    everything narrow at a site: gates, pooling, gated products

They define what the Triton kernels compute, run where there is no GPU, and are what the tests
compare with. `ops.py` chooses between the two.

Merging is exact (Milakov and Gimelshein 2018; Dao et al. 2022): from the output o₁ and the
log-sum-exp λ₁ of an attention over the real keys, and the scores s = scale · g q·P_Kᵀ of a prefix,

    λ = log(exp λ₁ + Σ exp s)        o = exp(λ₁ − λ) o₁ + z exp(s − λ) (g P_V)

Dropout leaves λ as it is, so z, which is 0 or 1 / (1 − dropout), enters only there: the fused
attention has dropped weights of the real keys in o₁, and a mask `keep` says which weights of the
prefix remain. Together that is dropout of all weights.

Shapes: B examples, H heads, G key-value heads, T queries or tokens, E head size, L prefix length,
M = B·T, R narrow columns, N gates, C = R + N, W ≥ C columns of z, V columns of v.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

ACTIVATIONS = ("none", "relu", "gelu", "silu", "tanh")


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _heads(prefix: torch.Tensor, heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return the prefix's keys and values [H, L, E] of every query head."""
    return prefix.to(dtype).repeat_interleave(heads // prefix.shape[1], dim=1).unbind()


def _by_head(x_BHT: torch.Tensor) -> torch.Tensor:
    """Return [H, M, ·]: one product per head is faster than one per example."""
    return x_BHT.transpose(0, 1).flatten(1, 2)


def _by_example(x_HM: torch.Tensor, batch: int) -> torch.Tensor:
    """Undo `_by_head`."""
    return x_HM.unflatten(1, (batch, -1)).transpose(0, 1)


def _real(lse_BHT: torch.Tensor, queries: int, dtype: torch.dtype) -> torch.Tensor:
    """Return λ₁ of the queries. Fused kernels mark queries without keys by +inf."""
    lse_BHT = lse_BHT[..., :queries].to(dtype)
    return torch.where(lse_BHT == torch.inf, -torch.inf, lse_BHT)


def _full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep autocast from computing the products of a kernel in fewer bits."""

    @functools.wraps(function)
    def call(query: torch.Tensor, *args: Any) -> Any:
        with torch.autocast(query.device.type, enabled=False):
            return function(query, *args)

    return call


@_full_precision
def merge_forward(
    query_BHTE: torch.Tensor,
    out_BHTE: torch.Tensor,
    lse_BHT: torch.Tensor,
    prefix: torch.Tensor,
    gate_BHT: torch.Tensor | None,
    scale: float,
    keep_BHTL: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> None:
    """Join the prefix to an attention over the real keys, in place.

    Args:
        query_BHTE: queries.
        out_BHTE: o₁, overwritten with o.
        lse_BHT: λ₁ in float32 (float64 for float64 queries), overwritten with λ. It may have more
            columns than queries.
        prefix: keys and values [2, G, L, E].
        gate_BHT: g in float32 (or float64), possibly expanded over heads and queries; None for 1.
        scale: factor of the scores.
        keep_BHTL: boolean, which weights of the prefix dropout keeps; None for all of them.
        dropout: its probability; the weights that are kept are divided by 1 − dropout.
    """
    dtype, (batch, heads, queries) = wide_dtype(query_BHTE), query_BHTE.shape[:3]
    keys_HLE, values_HLE = _heads(prefix, heads, dtype)
    scores_HML = torch.bmm(_by_head(query_BHTE.to(dtype)), keys_HLE.transpose(1, 2)).mul_(scale)
    gate_HM1 = None if gate_BHT is None else _by_head(gate_BHT.to(dtype)).unsqueeze(-1)
    if gate_HM1 is not None:
        scores_HML *= gate_HM1
    before_HM = _by_head(_real(lse_BHT, queries, dtype))
    merged_HM = torch.logaddexp(before_HM, scores_HML.logsumexp(dim=-1))
    weights_HML = scores_HML.sub_(merged_HM.unsqueeze(-1)).exp_()
    if gate_HM1 is not None:
        weights_HML *= gate_HM1
    if keep_BHTL is not None:
        weights_HML *= _by_head(keep_BHTL.to(dtype)) / (1 - dropout)
    kept_HM1 = (before_HM - merged_HM).exp_().unsqueeze(-1)
    # A query without keys has no o₁: some kernels return NaN there.
    real_HME = torch.where(kept_HM1 > 0, kept_HM1 * _by_head(out_BHTE.to(dtype)), 0.0)
    out_BHTE.copy_(_by_example(real_HME.baddbmm_(weights_HML, values_HLE), batch))
    lse_BHT[..., :queries] = _by_example(merged_HM, batch)


@_full_precision
def merge_backward(
    query_BHTE: torch.Tensor,
    out_BHTE: torch.Tensor,
    lse_BHT: torch.Tensor,
    prefix: torch.Tensor,
    gate_BHT: torch.Tensor | None,
    grad_out_BHTE: torch.Tensor,
    grad_query_BHTE: torch.Tensor,
    scale: float,
    keep_BHTL: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients that the prefix adds to those of the fused attention.

    The fused attention's own backward pass, called with the merged o and λ, returns the exact
    gradients of the real keys and values and its part of the queries' gradient.

    Args:
        query_BHTE, prefix, gate_BHT, scale, keep_BHTL, dropout: as in the forward pass.
        out_BHTE, lse_BHT: the merged o and λ.
        grad_out_BHTE: gradient of o.
        grad_query_BHTE: gradient of the queries, to which the prefix's part is added in place.

    Returns:
        Parts [P, 2, H, L, E] whose sum over P is the gradient of the prefix of each query head, in
        float32 (or float64), and the gradient [B, H, T] of the gate, without elements if there is
        no gate.
    """
    dtype, (batch, heads, queries) = wide_dtype(query_BHTE), query_BHTE.shape[:3]
    keys_HLE, values_HLE = _heads(prefix, heads, dtype)
    query_HME, grad_HME = _by_head(query_BHTE.to(dtype)), _by_head(grad_out_BHTE.to(dtype))
    gate_HM1 = 1.0 if gate_BHT is None else _by_head(gate_BHT.to(dtype)).unsqueeze(-1)
    lse_HM1 = _by_head(lse_BHT[..., :queries].to(dtype)).unsqueeze(-1)
    delta_HM1 = (grad_HME * _by_head(out_BHTE.to(dtype))).sum(dim=-1, keepdim=True)
    raw_HML = torch.bmm(query_HME, keys_HLE.transpose(1, 2)).mul_(scale)
    weights_HML = (raw_HML * gate_HM1).sub_(lse_HM1).exp_()
    seen_HML = torch.bmm(grad_HME, values_HLE.transpose(1, 2))
    shares_HML = weights_HML * gate_HM1
    if keep_BHTL is not None:
        kept_HML = _by_head(keep_BHTL.to(dtype)) / (1 - dropout)
        seen_HML *= kept_HML
        shares_HML *= kept_HML
    grad_scores_HML = weights_HML * (seen_HML * gate_HM1 - delta_HM1)
    grad_raw_HML = grad_scores_HML * gate_HM1 * scale
    added_BHTE = _by_example(torch.bmm(grad_raw_HML, keys_HLE), batch)
    grad_query_BHTE.add_(added_BHTE.to(grad_query_BHTE.dtype))
    grad_prefix = torch.stack(
        [
            torch.bmm(grad_raw_HML.transpose(1, 2), query_HME),
            torch.bmm(shares_HML.transpose(1, 2), grad_HME),
        ]
    ).unsqueeze(0)
    if gate_BHT is None:
        return grad_prefix, raw_HML.new_empty(0)
    grad_gate_HM = (grad_scores_HML * raw_HML + weights_HML * seen_HML).sum(dim=-1)
    return grad_prefix, _by_example(grad_gate_HM, batch).contiguous()


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    assert activation in ACTIVATIONS, activation
    if activation == "none":
        return x
    return torch.tanh(x) if activation == "tanh" else getattr(nn.functional, activation)(x)


def _slope(x: torch.Tensor, activation: str) -> torch.Tensor:
    """Return the derivative of the activation at x."""
    if activation == "none":
        return torch.ones_like(x)
    if activation == "relu":
        return (x > 0).to(x.dtype)
    if activation == "tanh":
        return 1 - torch.tanh(x).square()
    if activation == "silu":
        s = torch.sigmoid(x)
        return s * (1 + x * (1 - s))
    assert activation == "gelu", activation
    density = torch.exp(-0.5 * x.square()) * (2 * math.pi) ** -0.5
    return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * density


def _parts(
    z_BTW: torch.Tensor,
    bias_C: torch.Tensor,
    mask_BT: torch.Tensor | None,
    gates: int,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split z.

    Returns:
        The narrow columns with their biases [B, T, R], the gates of each token [B, T, N], 1 at real
        tokens [B, T, 1], and the number of real tokens that each mean is over [B, T or 1, 1].
    """
    dtype, columns = wide_dtype(z_BTW), bias_C.shape[0]
    x_BTC = z_BTW[..., :columns].to(dtype) + bias_C
    tokens_BT = z_BTW.new_ones(z_BTW.shape[:2]) if mask_BT is None else mask_BT
    real_BT1 = (tokens_BT != 0).to(dtype).unsqueeze(2)
    count = real_BT1.cumsum(dim=1) if causal else real_BT1.sum(dim=1, keepdim=True)
    narrow_BTR, logits_BTN = x_BTC.split_with_sizes([columns - gates, gates], dim=-1)
    return narrow_BTR, logits_BTN.sigmoid(), real_BT1, count.clamp(min=1)


def narrow_forward(
    z_BTW: torch.Tensor,
    bias_C: torch.Tensor,
    scales_N: torch.Tensor,
    mask_BT: torch.Tensor | None,
    selected: int,
    causal: bool,
    activation: str,
    ones_column: bool,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gates of a site and its gated narrow columns.

        g = scale · pool(sigmoid(z_gates + b))        v = g_selected · [act(z_narrow + b), 1, 0 …]

    Args:
        z_BTW: x [W_narrow; W_gates]ᵀ. Columns from C on are padding.
        bias_C: biases in float32 (or float64), 0 where a column has none. C and N give R.
        scales_N: constants that multiply the gates.
        mask_BT: not 0 at real tokens, any dtype; None if all tokens count.
        selected: the gate that multiplies the narrow columns.
        causal: mean over the real tokens so far, instead of over all real tokens.
        activation: one of ACTIVATIONS.
        ones_column: whether column R of v is the gate itself, for the bias of a projection of v.
        width: V; the columns that remain are 0.

    Returns:
        v [B, T, V] in the dtype of z, and g [B, T, N] (causal) or [B, 1, N] in float32 (float64).
    """
    narrow_BTR, g_BTN, real_BT1, count = _parts(z_BTW, bias_C, mask_BT, scales_N.shape[0], causal)
    real_BTN = g_BTN * real_BT1
    totals = real_BTN.cumsum(dim=1) if causal else real_BTN.sum(dim=1, keepdim=True)
    gates = totals / count * scales_N
    chosen, rank = gates[..., selected : selected + 1], narrow_BTR.shape[2]
    v_BTV = narrow_BTR.new_zeros(*z_BTW.shape[:2], width)
    v_BTV[..., :rank] = activate(narrow_BTR, activation) * chosen
    if ones_column:
        v_BTV[..., rank : rank + 1] = chosen
    return v_BTV.to(z_BTW.dtype), gates


def narrow_backward(
    z_BTW: torch.Tensor,
    bias_C: torch.Tensor,
    scales_N: torch.Tensor,
    mask_BT: torch.Tensor | None,
    gates: torch.Tensor,
    grads_v: list[torch.Tensor],
    grad_gate_BHT: torch.Tensor | None,
    grad_bias_BC: torch.Tensor,
    selected: int,
    handed_out: int,
    causal: bool,
    activation: str,
    ones_column: bool,
) -> torch.Tensor:
    """Compute the gradient of z, and add the gradient of the biases of each example in place.

    Args:
        z_BTW, bias_C, scales_N, mask_BT, selected, causal, activation, ones_column: as in the
            forward pass.
        gates: g, the second result of the forward pass.
        grads_v: gradients of consecutive columns of v from column 0 on, each [B, T, ·] or
            [B·T, ·]. Columns that they do not cover have no gradient.
        grad_gate_BHT: gradient of the gate `handed_out` for each head and query. It is summed over
            the heads, and over the tokens if the gate is one per example. None if there is none.
        grad_bias_BC: a buffer to add to, in float32 (or float64).
        handed_out: the gate to which grad_gate_BHT belongs.

    Returns:
        The gradient of z, in its dtype; 0 in the padding columns.
    """
    dtype, (batch, tokens, width) = wide_dtype(z_BTW), z_BTW.shape
    narrow_BTR, g_BTN, real_BT1, count = _parts(z_BTW, bias_C, mask_BT, scales_N.shape[0], causal)
    rank = narrow_BTR.shape[2]
    parts = [part.reshape(batch, tokens, -1).to(dtype) for part in grads_v]
    grad_v = torch.cat([*parts, narrow_BTR.new_zeros(batch, tokens, rank + 1)], dim=-1)
    grad_act_BTR = grad_v[..., :rank]
    grad_narrow_BTR = grad_act_BTR * gates[..., selected : selected + 1]
    grad_narrow_BTR = grad_narrow_BTR * _slope(narrow_BTR, activation)

    grad_gates_BTN = torch.zeros_like(g_BTN)  # of the pooled gate that each token uses
    grad_gates_BTN[..., selected] = (grad_act_BTR * activate(narrow_BTR, activation)).sum(dim=-1)
    if ones_column:
        grad_gates_BTN[..., selected] += grad_v[..., rank]
    if grad_gate_BHT is not None:
        grad_gates_BTN[..., handed_out] += grad_gate_BHT.to(dtype).sum(dim=1)
    grad_gates_BTN = grad_gates_BTN * scales_N / count
    # A token's own gate enters the means of all later tokens, or of all tokens.
    if causal:
        grad_gates_BTN = grad_gates_BTN.flip(1).cumsum(dim=1).flip(1)
    else:
        grad_gates_BTN = grad_gates_BTN.sum(dim=1, keepdim=True)
    grad_logits_BTN = grad_gates_BTN * real_BT1 * g_BTN * (1 - g_BTN)
    grad_BTC = torch.cat([grad_narrow_BTR, grad_logits_BTN], dim=-1)
    grad_bias_BC.add_(grad_BTC.sum(dim=1))
    return nn.functional.pad(grad_BTC, (0, width - grad_BTC.shape[2])).to(z_BTW.dtype)
