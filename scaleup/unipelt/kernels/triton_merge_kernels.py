"""Triton kernels that join a prefix to the output of a fused attention; see triton_merge.py.

Names of strides: q is the query, o the output, l the log-sum-exp, p the prefix, g the gate, k the
mask of weights to keep, d the gradient of the output, and n the gradient of the query; b, h and t
are examples, heads and queries.
"""

# The types of a kernel's arguments are Triton's.
# mypy: disable-error-code="no-untyped-def"

from .triton_launch import tl, triton

# Another number of these is not a reason to compile again.
SIZES = ("queries", "heads", "repeats", "length")
STRIDES = ("g_b", "g_h", "g_t", "k_b", "k_h", "k_t")


@triton.jit(do_not_specialize=[*SIZES, *STRIDES, "blocks"])
def forward_kernel(
    query, out, lse, prefix, gate, keep, scale, keep_factor, queries, heads, repeats, length,
    blocks,
    q_b, q_h, q_t, o_b, o_h, o_t, l_b, l_h, l_t, p_s, p_g, p_l, g_b, g_h, g_t, k_b, k_h, k_t,
    SIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
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


@triton.jit(do_not_specialize=[*SIZES, *STRIDES, "total", "splits", "steps"])
def backward_kernel(
    query, out, lse, prefix, gate, keep, grad_out, grad_query, parts, grad_gate, scale,
    keep_factor, queries, heads, repeats, length, total, splits, steps,
    q_b, q_h, q_t, o_b, o_h, o_t, l_b, l_h, l_t, p_s, p_g, p_l, g_b, g_h, g_t, k_b, k_h, k_t,
    d_b, d_h, d_t, n_b, n_h, n_t,
    SIZE: tl.constexpr, ADD: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one head for `steps` blocks of queries.

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
    for step in range(steps):
        t0 = ((split * steps + step) * BLOCK_T).to(tl.int64)
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
