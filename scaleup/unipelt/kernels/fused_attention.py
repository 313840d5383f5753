"""Torch's fused attention kernels, with the log-sum-exp of the scores that they compute.

    "flash"      CUDA, half precision, without a mask: grouped heads, several texts per row
    "efficient"  CUDA, with an additive mask or in float32
    "cpu"        CPU: grouped heads, an additive mask
    "formula"    CPU with dropout, which the CPU kernel does not have

This is the only file that calls these private operations of torch. A test compares their schemas
with those for which the calls are written.

Shapes: B examples, H heads, G key-value heads, T queries, S keys, E head size, N texts.
"""

from typing import Any, NamedTuple

import torch

from .reference import wide_dtype
from .target import merge_refusal, target_device

aten = torch.ops.aten
Tensor = torch.Tensor
HALF = (torch.float16, torch.bfloat16)
LARGEST_FLASH_HEAD, LARGEST_EVERYWHERE = 256, 192  # some chips lack the memory for larger heads
# Masks hide keys by finite values, because with −inf the CPU kernel returns a log-sum-exp of 0 for
# queries without keys.
HIDDEN = {torch.float16: -3e4}
MASK_ALIGNMENT = 16  # keys: CUDA's kernel needs mask rows that begin at multiples of it


class Visible(NamedTuple):
    """Which keys a query sees.

    Attributes:
        mask: result of `additive_mask`, which can be broadcast to [B, H, T, S], or None.
        causal: whether queries do not see later keys. Without `lengths`, the first query and the
            first key have the same position.
        lengths: int32 [2, N + 1], the cumulative lengths of the texts in queries and in keys, if
            all rows are joined to one long row (B = 1). The last query and the last key of a text
            have the same position.
        longest: the most queries and the most keys of a text.
        window: number of keys that a query sees in each direction, itself included; None for all.
    """

    mask: Tensor | None = None
    causal: bool = False
    lengths: Tensor | None = None
    longest: tuple[int, int] = (0, 0)
    window: int | None = None


class Dropped(NamedTuple):
    """What the backward pass of a kernel needs about dropout. Its meaning depends on the kernel."""

    first: Tensor | None = None
    second: Tensor | None = None


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a boolean or additive mask as the kernels need it: finite and aligned.

    Args:
        mask: [·, ·, ·, S].
        dtype: that of the queries.
    """
    keys = mask.shape[-1]
    shape = (*mask.shape[:-1], keys + -keys % MASK_ALIGNMENT)
    lowest = HIDDEN.get(dtype, -1e30)
    hidden = torch.full(shape, lowest, dtype=dtype, device=mask.device)[..., :keys]
    if mask.dtype == torch.bool:
        return hidden.masked_fill_(mask, 0.0)
    return hidden.copy_(mask).clamp_(min=lowest)


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def kernel_for(query: Tensor, key: Tensor, visible: Visible, dropout: float) -> str | None:
    """Return the kernel for an attention, None if there is none.

    Args:
        query, key: [B, H, T, E] and [B, G, S, E].
        visible: which keys a query sees.
        dropout: probability.
    """
    if target_device(query) != "cuda":
        return "formula" if dropout else "cpu"
    size = query.shape[3]
    if size % 8 or merge_refusal(query.dtype, size) is not None:
        return None
    # Without lengths, a causal flash kernel would align the last query with the last key.
    aligned = visible.lengths is not None or not visible.causal or query.shape[2] == key.shape[2]
    flash = visible.mask is None and aligned and size <= LARGEST_FLASH_HEAD and query.dtype in HALF
    if flash and query.device.type == "cuda":
        major, minor = _capability(query.device)
        flash = major >= 8 and (size <= LARGEST_EVERYWHERE or minor == 0)
    if flash:
        return "flash"
    return None if visible.lengths is not None or visible.window is not None else "efficient"


def forward(
    query: Tensor, key: Tensor, value: Tensor, visible: Visible, scale: float, dropout: float
) -> tuple[Tensor, Tensor, Dropped]:
    """Compute an attention and the log-sum-exp of its scores.

    Args:
        query, key, value: [B, H, T, E], [B, G, S, E] and [B, G, S, E] of one dtype.
        visible: which keys a query sees.
        scale: factor of the scores.
        dropout: probability.

    Returns:
        The output [B, H, T, E]; the log-sum-exp [B, H, ≥ T] before dropout, in float32 (float64 for
        float64); what `backward` needs about dropout.
    """
    kernel = kernel_for(query, key, visible, dropout)
    if kernel == "flash":
        out, lse, first, second, _ = aten._flash_attention_forward(
            *(_by_tokens(x, visible) for x in (query, key, value)),
            *_texts(query, key, visible),
            dropout,
            visible.causal,
            False,
            scale=scale,
            **_window(visible),
        )
        return _by_heads(out, visible), _by_rows(lse, visible), Dropped(first, second)
    if kernel == "efficient":
        out, lse, first, second = aten._scaled_dot_product_efficient_attention(
            query,
            *(_repeated(x, query) for x in (key, value)),
            _expanded(visible.mask, query, key),
            True,
            dropout,
            visible.causal,
            scale=scale,
        )
        return out, lse, Dropped(first, second)
    mask, causal = _written_out(query, key, visible)
    if kernel == "formula":
        return _formula_forward(query, key, value, mask, causal, scale, dropout)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scale
    )
    return out, lse, Dropped()


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    dropped: Dropped,
    visible: Visible,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of queries, keys and values.

    Args:
        grad: gradient of the output, [B, H, T, E], whose last dimension is dense.
        out, lse, dropped: results of `forward`. Where other keys have joined the softmax since,
            their output and log-sum-exp must have been merged into `out` and `lse`.
        query, key, value, visible, scale, dropout: as in the forward pass.
    """
    kernel = kernel_for(query, key, visible, dropout)
    if kernel == "flash":
        tensors = (_by_tokens(x, visible) for x in (grad, query, key, value, out))
        grads = aten._flash_attention_backward(
            *tensors,
            lse if visible.lengths is None else lse.squeeze(0),
            *_texts(query, key, visible),
            dropout,
            visible.causal,
            *dropped,
            scale=scale,
            **_window(visible),
        )
        query, key, value = (_by_heads(x, visible) for x in grads)
        return query, key, value
    if kernel == "efficient":
        grad_query, *wide, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad,
            query,
            *(_repeated(x, query) for x in (key, value)),
            _expanded(visible.mask, query, key),
            out,
            lse,
            *dropped,
            dropout,
            [True, True, True, False],
            visible.causal,
            scale=scale,
        )
        grad_key, grad_value = (_summed(x, key) for x in wide)
        return grad_query, grad_key, grad_value
    mask, causal = _written_out(query, key, visible)
    if kernel == "formula":
        assert dropped.first is not None
        return _formula_backward(
            grad, query, key, value, out, lse, dropped.first, mask, causal, scale, dropout
        )
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, lse, 0.0, causal, attn_mask=mask, scale=scale
    )
    return tuple(grads)


def _by_tokens(x: Tensor, visible: Visible) -> Tensor:
    """Return [B, T, H, E], or [T, H, E] of one long row, as flash attention takes it."""
    x = x.transpose(1, 2)
    return x if visible.lengths is None else x.squeeze(0)


def _by_heads(x: Tensor, visible: Visible) -> Tensor:
    """Undo `_by_tokens`."""
    return _by_rows(x, visible).transpose(1, 2)


def _by_rows(x: Tensor, visible: Visible) -> Tensor:
    return x if visible.lengths is None else x.unsqueeze(0)


def _texts(query: Tensor, key: Tensor, visible: Visible) -> tuple[Any, ...]:
    """Return the cumulative lengths of the texts and the longest ones, as arguments of flash."""
    if visible.lengths is None:
        return None, None, query.shape[2], key.shape[2]
    return *visible.lengths.unbind(), *visible.longest


def _window(visible: Visible) -> dict[str, int]:
    if visible.window is None:
        return {}
    behind = visible.window - 1
    return {"window_size_left": behind, "window_size_right": 0 if visible.causal else behind}


def _repeated(x_BGSE: Tensor, query: Tensor) -> Tensor:
    """Return one key-value head per head, for "efficient", which knows no grouped heads."""
    groups = query.shape[1] // x_BGSE.shape[1]
    return x_BGSE if groups == 1 else x_BGSE.repeat_interleave(groups, dim=1)


def _summed(grad_BHSE: Tensor, x_BGSE: Tensor) -> Tensor:
    """Return the gradient of grouped heads."""
    if grad_BHSE.shape[1] == x_BGSE.shape[1]:
        return grad_BHSE
    return grad_BHSE.unflatten(1, (x_BGSE.shape[1], -1)).sum(dim=2)


def _expanded(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    return None if mask is None else mask.expand(*query.shape[:3], key.shape[2])


def _written_out(query: Tensor, key: Tensor, visible: Visible) -> tuple[Tensor | None, bool]:
    """Write texts and windows as a mask [1, 1, T, S], because the CPU kernel does not have them."""
    if visible.lengths is None and visible.window is None:
        return visible.mask, visible.causal
    queries, keys = query.shape[2], key.shape[2]
    text_T, at_T, text_S, at_S = *_places(queries, None), *_places(keys, None)
    if visible.lengths is not None:
        (text_T, at_T), (text_S, at_S) = map(_places, (queries, keys), visible.lengths)
    ahead_TS = at_S - at_T.unsqueeze(1)
    seen_TS = text_S == text_T.unsqueeze(1)
    if visible.causal:
        seen_TS &= ahead_TS <= 0
    if visible.window is not None:
        seen_TS &= ahead_TS.abs() < visible.window
    return additive_mask(seen_TS[None, None], query.dtype), False


def _places(tokens: int, ends: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the text of each token, and its position counted from the end of the text."""
    at = torch.arange(tokens)
    if ends is None:
        return torch.zeros_like(at), at - tokens
    text = torch.searchsorted(ends[1:].contiguous(), at.to(ends.dtype), right=True)
    return text, at - ends[1:][text]


def _formula_scores(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    scores = query @ _repeated(key, query).transpose(2, 3) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(diagonal=1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores if mask is None else scores + mask


def _formula_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Dropped]:
    """Compute softmax(scores) V with dropout of the weights [B, H, T, S]."""
    wide = wide_dtype(query)
    with torch.autocast(query.device.type, enabled=False):
        scores = _formula_scores(query.to(wide), key.to(wide), mask, causal, scale)
        lse = scores.logsumexp(dim=-1)
        keep = torch.empty_like(scores, dtype=torch.bool).bernoulli_(1 - dropout)
        weights = (scores - lse.unsqueeze(-1)).exp() * keep / (1 - dropout)
        out = (weights @ _repeated(value, query).to(wide)).to(query.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse, Dropped(keep)


def _formula_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    keep: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(query)
    with torch.autocast(query.device.type, enabled=False):
        grad, wide_query, wide_key = (x.to(wide) for x in (grad, query, key))
        scores = _formula_scores(wide_query, wide_key, mask, causal, scale)
        weights, kept = (scores - lse.unsqueeze(-1)).exp(), keep.to(wide) / (1 - dropout)
        delta = (grad * out.to(wide)).sum(dim=-1, keepdim=True)
        seen = grad @ _repeated(value, query).to(wide).transpose(2, 3) * kept
        grad_scores = weights * (seen - delta) * scale
        grad_query = grad_scores @ _repeated(wide_key, query)
        grad_key = _summed(grad_scores.transpose(2, 3) @ wide_query, key)
        grad_value = _summed((weights * kept).transpose(2, 3) @ grad, value)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)
