"""Triton kernels that join a prefix to the output of a fused attention, one launch each.

`reference.py` has the formulas, the meaning of the arguments and the legend of shapes. A program
handles one head of one example: a block of queries forwards, several blocks one after another
backwards. Longer prefixes are joined in pieces, because merging one piece after another is exact.
"""

# The types of a kernel's arguments are Triton's.
# mypy: disable-error-code="no-untyped-def"

import torch

from .target import merge_refusal
from .triton_launch import launch, power_of_2, tl, triton

# A program keeps both gradients of its piece of the prefix, [L, E], in registers. Products in
# float32 need many more registers, because tensor cores do not compute them exactly.
MOST_ELEMENTS, MOST_ELEMENTS_FLOAT32, MOST_KEYS = 8192, 2048, 64
# About three programs backwards for each multiprocessor of an A100 or H100. More of them would
# write more parts of the prefix's gradient, fewer would leave multiprocessors idle.
PROGRAMS, MOST_STEPS = 384, 16

SIZES = ("queries", "heads", "repeats", "length")
STRIDES = ("g_b", "g_h", "g_t", "k_b", "k_h", "k_t")


@triton.jit(do_not_specialize=[*SIZES, *STRIDES, "blocks"])
def forward_kernel(
    query,
    out,
    lse,
    prefix,
    gate,
    keep,
    scale,
    keep_factor,
    queries,
    heads,
    repeats,
    length,
    blocks,
    q_b,
    q_h,
    q_t,
    o_b,
    o_h,
    o_t,
    l_b,
    l_h,
    l_t,
    p_s,
    p_g,
    p_l,
    g_b,
    g_h,
    g_t,
    k_b,
    k_h,
    k_t,
    SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Join the prefix to `out` and `lse` in place, for one block of queries of one head."""
    program = tl.program_id(0)
    row = program // blocks
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    t0 = ((program % blocks) * BLOCK_T).to(tl.int64)
    t, i, e = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_E)
    is_query = t < queries - t0
    inside = is_query[:, None] & (e < SIZE)[None, :]
    keys_inside = (i < length)[:, None] & (e < SIZE)[None, :]
    dtype = query.dtype.element_ty
    places = prefix + (h // repeats) * p_g + i[:, None] * p_l + e[None, :]
    keys = tl.load(places, mask=keys_inside, other=0.0).to(dtype)
    values = tl.load(places + p_s, mask=keys_inside, other=0.0).to(dtype)

    x = tl.load(
        query + (b * q_b + h * q_h + t0 * q_t) + t[:, None] * q_t + e[None, :],
        mask=inside,
        other=0.0,
    )
    scores = tl.dot(x, tl.trans(keys), input_precision="ieee") * scale
    factor = tl.full([BLOCK_T], 1.0, tl.float32)
    if gate is not None:
        factor = tl.load(
            gate + (b * g_b + h * g_h + t0 * g_t) + t * g_t, mask=is_query, other=0.0
        ).to(tl.float32)
        scores = scores * factor[:, None]
    scores = tl.where((i < length)[None, :], scores, float("-inf"))
    lse_places = lse + (b * l_b + h * l_h + t0 * l_t) + t * l_t
    before = tl.load(lse_places, mask=is_query, other=0.0)
    before = tl.where(before == float("inf"), float("-inf"), before)  # queries without keys
    top = tl.maximum(tl.max(scores, 1), before)
    weights = tl.exp(scores - top[:, None])
    kept = tl.exp(before - top)
    total = tl.sum(weights, 1) + kept
    kept = kept / total
    weights = weights * (factor / total)[:, None]
    if keep is not None:
        is_kept = tl.load(
            keep + (b * k_b + h * k_h + t0 * k_t) + t[:, None] * k_t + i[None, :],
            mask=is_query[:, None] & (i < length)[None, :],
            other=0,
        )
        weights = weights * (is_kept.to(tl.float32) * keep_factor)
    out_places = out + (b * o_b + h * o_h + t0 * o_t) + t[:, None] * o_t + e[None, :]
    real = tl.load(out_places, mask=inside, other=0.0).to(tl.float32) * kept[:, None]
    # A query without keys has no o₁: some kernels return NaN there.
    real = tl.where((kept > 0)[:, None], real, 0.0)
    merged = real + tl.dot(weights.to(dtype), values, input_precision="ieee")
    tl.debug_barrier()  # all threads have read what is overwritten now
    tl.store(out_places, merged.to(out.dtype.element_ty), mask=inside)
    tl.store(lse_places, top + tl.log(total), mask=is_query)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES, "total", "splits"])
def backward_kernel(
    query,
    out,
    lse,
    prefix,
    gate,
    keep,
    grad_out,
    grad_query,
    parts,
    grad_gate,
    scale,
    keep_factor,
    queries,
    heads,
    repeats,
    length,
    total,
    splits,
    q_b,
    q_h,
    q_t,
    o_b,
    o_h,
    o_t,
    l_b,
    l_h,
    l_t,
    p_s,
    p_g,
    p_l,
    g_b,
    g_h,
    g_t,
    k_b,
    k_h,
    k_t,
    d_b,
    d_h,
    d_t,
    n_b,
    n_h,
    n_t,
    SIZE: tl.constexpr,
    ADD: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Compute the gradients of one head for STEPS blocks of queries.

    `parts` is [B · splits, 2, H, total, E] and `grad_gate` [B, H, T]; ADD adds to the latter.
    """
    program = tl.program_id(0)
    split = program % splits
    row = program // splits
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    i, e = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_E)
    is_key = (i < length)[None, :]
    keys_inside = (i < length)[:, None] & (e < SIZE)[None, :]
    dtype = query.dtype.element_ty
    places = prefix + (h // repeats) * p_g + i[:, None] * p_l + e[None, :]
    keys = tl.load(places, mask=keys_inside, other=0.0).to(dtype)
    values = tl.load(places + p_s, mask=keys_inside, other=0.0).to(dtype)
    grad_keys = tl.zeros([BLOCK_L, BLOCK_E], tl.float32)
    grad_values = tl.zeros([BLOCK_L, BLOCK_E], tl.float32)
    for step in range(STEPS):
        t0 = ((split * STEPS + step) * BLOCK_T).to(tl.int64)
        t = tl.arange(0, BLOCK_T)
        is_query = t < queries - t0
        inside = is_query[:, None] & (e < SIZE)[None, :]
        x = tl.load(
            query + (b * q_b + h * q_h + t0 * q_t) + t[:, None] * q_t + e[None, :],
            mask=inside,
            other=0.0,
        )
        grad = tl.load(
            grad_out + (b * d_b + h * d_h + t0 * d_t) + t[:, None] * d_t + e[None, :],
            mask=inside,
            other=0.0,
        )
        merged = tl.load(
            out + (b * o_b + h * o_h + t0 * o_t) + t[:, None] * o_t + e[None, :],
            mask=inside,
            other=0.0,
        )
        delta = tl.sum(grad.to(tl.float32) * merged.to(tl.float32), 1)
        # +inf makes the weights of queries beyond the last one 0.
        level = tl.load(
            lse + (b * l_b + h * l_h + t0 * l_t) + t * l_t, mask=is_query, other=float("inf")
        )
        factor = tl.full([BLOCK_T], 1.0, tl.float32)
        if gate is not None:
            factor = tl.load(
                gate + (b * g_b + h * g_h + t0 * g_t) + t * g_t, mask=is_query, other=0.0
            ).to(tl.float32)
        raw = tl.dot(x, tl.trans(keys), input_precision="ieee") * scale
        weights = tl.where(is_key, tl.exp(raw * factor[:, None] - level[:, None]), 0.0)
        seen = tl.dot(grad.to(dtype), tl.trans(values), input_precision="ieee")
        shares = weights * factor[:, None]
        if keep is not None:
            is_kept = tl.load(
                keep + (b * k_b + h * k_h + t0 * k_t) + t[:, None] * k_t + i[None, :],
                mask=is_query[:, None] & is_key,
                other=0,
            )
            keep_weights = is_kept.to(tl.float32) * keep_factor
            seen = seen * keep_weights
            shares = shares * keep_weights
        grad_scores = weights * (seen * factor[:, None] - delta[:, None])
        grad_raw = (grad_scores * (factor * scale)[:, None]).to(dtype)
        query_places = grad_query + (b * n_b + h * n_h + t0 * n_t) + t[:, None] * n_t + e[None, :]
        added = tl.dot(grad_raw, keys, input_precision="ieee")
        added += tl.load(query_places, mask=inside, other=0.0).to(tl.float32)
        tl.store(query_places, added.to(grad_query.dtype.element_ty), mask=inside)
        grad_keys += tl.dot(tl.trans(grad_raw), x, input_precision="ieee")
        grad_values += tl.dot(tl.trans(shares.to(dtype)), grad.to(dtype), input_precision="ieee")
        if gate is not None:
            of_gate = tl.sum(grad_scores * raw + weights * seen, 1)
            gate_places = grad_gate + (b * heads + h) * queries + t0 + t
            if ADD:
                of_gate += tl.load(gate_places, mask=is_query, other=0.0)
            tl.store(gate_places, of_gate, mask=is_query)
    part = (b * splits + split) * 2 * heads + h
    places = parts + part * total * SIZE + i[:, None] * SIZE + e[None, :]
    tl.store(places, grad_keys, mask=keys_inside)
    tl.store(places + heads.to(tl.int64) * total * SIZE, grad_values, mask=keys_inside)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return x with neighbouring elements in its last dimension, copied only if it has not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _checked(
    query: torch.Tensor, prefix: torch.Tensor, **changed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries and prefix in a layout that the kernels can read.

    Raises:
        ValueError: where the kernels cannot work.
    """
    reason = merge_refusal(query.dtype, query.shape[3])
    if reason is None:
        for name, tensor in changed.items():
            if tensor.stride(-1) != 1:
                reason = f"{name} is changed in place and must have stride 1 in its last dimension"
    if reason is not None:
        raise ValueError(f"SCALEUP_KERNELS: the Triton kernel of a prefix cannot run: {reason}")
    return _rows(query), _rows(prefix)


def _expansion(tensor: torch.Tensor | None) -> tuple[int, ...]:
    """Return the strides of examples, heads and queries."""
    return (0, 0, 0) if tensor is None else tensor.stride()[:3]


def _piece(query: torch.Tensor, length: int, block_e: int) -> int:
    """Return the number of keys of the prefix that one launch handles."""
    most = MOST_ELEMENTS_FLOAT32 if query.dtype == torch.float32 else MOST_ELEMENTS
    return power_of_2(length, 16, max(min(most // block_e, MOST_KEYS), 16))


def merge_forward(
    query: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    prefix: torch.Tensor,
    gate: torch.Tensor | None,
    scale: float,
    keep: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> None:
    """Join the prefix to `out` and `lse` in place; see `reference.merge_forward`.

    Raises:
        ValueError: where the kernel cannot work.
    """
    query, prefix = _checked(query, prefix, out=out)
    keep = None if keep is None else _rows(keep)
    batch, heads, queries, size = query.shape
    block_e = power_of_2(size, 16)
    block_l = _piece(query, prefix.shape[2], block_e)
    most = 16 if query.dtype == torch.float32 else 64 if block_e <= 128 else 32
    block_t = power_of_2(queries, 16, most)
    blocks = -(-queries // block_t)
    strides = (
        *query.stride()[:3],
        *out.stride()[:3],
        *lse.stride(),
        *prefix.stride()[:3],
        *_expansion(gate),
        *_expansion(keep),
    )
    factors = float(scale), 1 / (1 - dropout)
    sizes = queries, heads, heads // prefix.shape[1]
    constants = size, block_t, block_l, block_e
    for first in range(0, prefix.shape[2], block_l):
        piece = prefix[:, :, first : first + block_l] if prefix.shape[2] > block_l else prefix
        keep_piece = keep if keep is None or piece is prefix else keep[..., first:]
        launch(
            forward_kernel,
            batch * heads * blocks,
            (query, out, lse, piece, gate, keep_piece),
            (*factors, *sizes, piece.shape[2], blocks, *strides),
            constants,
            8 if query.dtype == torch.float32 and block_e > 128 else 4,
        )


def merge_backward(
    query: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    prefix: torch.Tensor,
    gate: torch.Tensor | None,
    grad_out: torch.Tensor,
    grad_query: torch.Tensor,
    scale: float,
    keep: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients that the prefix adds; see `reference.merge_backward`.

    Raises:
        ValueError: where the kernel cannot work.
    """
    query, prefix = _checked(query, prefix, grad_query=grad_query)
    out, grad_out = _rows(out), _rows(grad_out)
    keep = None if keep is None else _rows(keep)
    (batch, heads, queries, size), length = query.shape, prefix.shape[2]
    block_e = power_of_2(size, 16)
    block_l = _piece(query, length, block_e)
    wide = query.dtype == torch.float32
    block_t = power_of_2(queries, 16, 16 if wide else 32)
    blocks = -(-queries // block_t)
    steps = min(max(batch * heads * blocks // PROGRAMS, 1), blocks, MOST_STEPS)
    splits = -(-blocks // steps)
    parts = query.new_empty(batch * splits, 2, heads, length, size, dtype=torch.float32)
    shape = (0,) if gate is None else (batch, heads, queries)
    grad_gate = query.new_empty(shape, dtype=torch.float32)
    strides = (
        *query.stride()[:3],
        *out.stride()[:3],
        *lse.stride(),
        *prefix.stride()[:3],
        *_expansion(gate),
        *_expansion(keep),
        *grad_out.stride()[:3],
        *grad_query.stride()[:3],
    )
    factors = float(scale), 1 / (1 - dropout)
    sizes = queries, heads, heads // prefix.shape[1]
    for first in range(0, length, block_l):
        piece = prefix[:, :, first : first + block_l] if length > block_l else prefix
        keep_piece = keep if keep is None or piece is prefix else keep[..., first:]
        of_gate = None if gate is None else grad_gate
        launch(
            backward_kernel,
            batch * heads * splits,
            (query, out, lse, piece, gate, keep_piece, grad_out, grad_query)
            + (parts[:, :, :, first:], of_gate),
            (*factors, *sizes, piece.shape[2], length, splits, *strides),
            (size, first > 0, steps, block_t, block_l, block_e),
            8 if wide or block_l * block_e > 4096 else 4,
        )
    return parts, grad_gate
