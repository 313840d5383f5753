"""Triton kernels for everything narrow at a site; see triton_narrow.py."""

# The types of a kernel's arguments are Triton's.
# mypy: disable-error-code="no-untyped-def"

from .triton_launch import tl, triton


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "tanh":
        x = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    return x


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """Return the derivative of the activation at x."""
    if ACTIVATION == "relu":
        x = tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        density = tl.exp(-0.5 * x * x) * 0.3989422804014327
        x = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "silu":
        s = tl.sigmoid(x)
        x = s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "tanh":
        y = 2.0 * tl.sigmoid(2.0 * x) - 1.0
        x = 1.0 - y * y
    else:
        x = tl.full(x.shape, 1.0, tl.float32)
    return x


@triton.jit
def real_tokens(mask, b, t, tokens, mask_b, mask_t):
    """Return 1 at real tokens, where the mask is not 0. There are none beyond the last one."""
    if mask is None:
        real = (t < tokens).to(tl.float32)
    else:
        places = mask + b * mask_b + t.to(tl.int64) * mask_t
        real = (tl.load(places, mask=t < tokens, other=0) != 0).to(tl.float32)
    return real


@triton.jit
def token_gates(rows, t, inside, n, gate_bias, GATES: tl.constexpr, WIDTH: tl.constexpr):
    """Return the sigmoids of the gate columns, which start at `rows`."""
    logits = tl.load(
        rows + t[:, None] * WIDTH + n[None, :],
        mask=inside[:, None] & (n < GATES)[None, :],
        other=0.0,
    )
    return tl.sigmoid(logits.to(tl.float32) + gate_bias[None, :])


@triton.jit(do_not_specialize=["tokens", "chunk", "splits", "mask_b", "mask_t"])
def forward_kernel(
    z, bias, scales, mask, v, gates, tokens, chunk, splits, mask_b, mask_t,
    RANK: tl.constexpr, GATES: tl.constexpr, Z_ROW: tl.constexpr, V_WIDTH: tl.constexpr,
    SELECTED: tl.constexpr, CAUSAL: tl.constexpr, ACTIVATION: tl.constexpr, ONES: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute v and the gates of one chunk of tokens of one example."""
    program = tl.program_id(0)
    b = (program // splits).to(tl.int64)
    start = (program % splits) * chunk
    stop = tl.minimum(start + chunk, tokens)
    n = tl.arange(0, BLOCK_N)
    gate_bias = tl.load(bias + RANK + n, mask=n < GATES, other=0.0).to(tl.float32)
    factors = tl.load(scales + n, mask=n < GATES, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    count = 0.0
    pooled = tokens
    if CAUSAL:
        pooled = start
    for t0 in range(0, pooled, BLOCK_P):
        t = tl.arange(0, BLOCK_P)
        inside = t < pooled - t0
        real = real_tokens(mask, b, t0 + t, pooled, mask_b, mask_t)
        rows = z + (b * tokens + t0) * Z_ROW + RANK
        s = token_gates(rows, t, inside, n, gate_bias, GATES, Z_ROW)
        total += tl.sum(s * real[:, None], 0)
        count += tl.sum(real)
    mean = total / tl.maximum(count, 1.0) * factors
    if not CAUSAL:
        is_first = (n < GATES) & (start == 0)
        tl.store(gates + b * GATES + n, mean, mask=is_first)
    for t0 in range(start, stop, BLOCK_T):
        t = tl.arange(0, BLOCK_T)
        inside = t < tokens - t0
        row = b * tokens + t0
        if CAUSAL:
            real = real_tokens(mask, b, t0 + t, tokens, mask_b, mask_t)
            s = token_gates(z + row * Z_ROW + RANK, t, inside, n, gate_bias, GATES, Z_ROW)
            s = s * real[:, None]
            seen = tl.cumsum(real, 0) + count
            means = (tl.cumsum(s, 0) + total[None, :]) / tl.maximum(seen, 1.0)[:, None]
            means = means * factors[None, :]
            tl.store(
                gates + row * GATES + t[:, None] * GATES + n[None, :],
                means,
                mask=inside[:, None] & (n < GATES)[None, :],
            )
            total += tl.sum(s, 0)
            count += tl.sum(real)
            chosen = tl.sum(tl.where((n == SELECTED)[None, :], means, 0.0), 1)
        else:
            chosen = tl.full([BLOCK_T], 0.0, tl.float32)
            chosen += tl.sum(tl.where(n == SELECTED, mean, 0.0))
        for c0 in range(0, V_WIDTH, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            narrow_bias = tl.load(bias + c, mask=c < RANK, other=0.0).to(tl.float32)
            x = tl.load(
                z + row * Z_ROW + t[:, None] * Z_ROW + c[None, :],
                mask=inside[:, None] & (c < RANK)[None, :],
                other=0.0,
            )
            x = activate(x.to(tl.float32) + narrow_bias[None, :], ACTIVATION)
            # Every activation is 0 at 0, so columns beyond the narrow ones are 0.
            if ONES:
                x = tl.where((c == RANK)[None, :], 1.0, x)
            tl.store(
                v + row * V_WIDTH + t[:, None] * V_WIDTH + c[None, :],
                (x * chosen[:, None]).to(v.dtype.element_ty),
                mask=inside[:, None] & (c < V_WIDTH)[None, :],
            )


@triton.jit
def narrow_columns(
    z, narrow_bias, first, second, grad_z, row, t, inside, chosen,
    RANK: tl.constexpr, WIDTH: tl.constexpr, Z_ROW: tl.constexpr, FIRST: tl.constexpr,
    FIRST_ROW: tl.constexpr, SECOND: tl.constexpr, SECOND_ROW: tl.constexpr,
    ACTIVATION: tl.constexpr, ONES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store the gradient of the narrow columns of a block of tokens.

    Returns:
        The gradient of the gate of each token [BLOCK_T], and that of the biases [BLOCK_C].
    """
    c = tl.arange(0, BLOCK_C)
    grad_v = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    if FIRST > 0:
        grad_v += tl.load(
            first + row * FIRST_ROW + t[:, None] * FIRST_ROW + c[None, :],
            mask=inside[:, None] & ((c < FIRST) & (c < RANK))[None, :],
            other=0.0,
        ).to(tl.float32)
    if SECOND > 0:
        is_second = (c >= FIRST) & (c < FIRST + SECOND) & (c < RANK)
        grad_v += tl.load(
            second + row * SECOND_ROW + t[:, None] * SECOND_ROW + (c - FIRST)[None, :],
            mask=inside[:, None] & is_second[None, :],
            other=0.0,
        ).to(tl.float32)
    places = z + row * Z_ROW + t[:, None] * Z_ROW + c[None, :]
    is_narrow = inside[:, None] & (c < RANK)[None, :]
    x = tl.load(places, mask=is_narrow, other=0.0).to(tl.float32) + narrow_bias[None, :]
    of_gate = tl.sum(grad_v * activate(x, ACTIVATION), 1)
    if ONES:
        if RANK < FIRST:
            of_gate += tl.load(
                first + row * FIRST_ROW + t * FIRST_ROW + RANK, mask=inside, other=0.0
            ).to(tl.float32)
        elif RANK < FIRST + SECOND:
            of_gate += tl.load(
                second + row * SECOND_ROW + t * SECOND_ROW + (RANK - FIRST), mask=inside, other=0.0
            ).to(tl.float32)
    grad = grad_v * chosen[:, None] * slope(x, ACTIVATION)
    tl.store(
        grad_z + row * WIDTH + t[:, None] * WIDTH + c[None, :],
        grad.to(grad_z.dtype.element_ty),
        mask=is_narrow,
    )
    return of_gate, tl.sum(grad, 0)


@triton.jit
def of_heads(grad_gate, heads, t, inside, g_h, g_t, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr):
    """Return the sum over the heads of the gradient of a gate, for each of some tokens."""
    total = tl.zeros([BLOCK_T], tl.float32)
    for h0 in range(0, heads, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        values = tl.load(
            grad_gate + h[:, None].to(tl.int64) * g_h + t[None, :].to(tl.int64) * g_t,
            mask=(h < heads)[:, None] & inside[None, :],
            other=0.0,
        )
        total += tl.sum(values.to(tl.float32), 0)
    return total


@triton.jit
def store_tail(
    grad_z, grad, row, t, inside, n, RANK: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr
):
    """Store the gradient of the gate columns, and zeros behind them."""
    tl.store(
        grad_z + row * WIDTH + RANK + t[:, None] * WIDTH + n[None, :],
        grad.to(grad_z.dtype.element_ty),
        mask=inside[:, None] & (n < TAIL)[None, :],
    )


@triton.jit(do_not_specialize=["tokens", "heads", "mask_b", "mask_t", "g_b", "g_h", "bias_b"])
def backward_kernel(
    z, bias, scales, mask, gates, first, second, grad_gate, grad_bias, grad_z, tokens, heads,
    mask_b, mask_t,
    g_b, g_h, g_t,
    bias_b,
    RANK: tl.constexpr, GATES: tl.constexpr, WIDTH: tl.constexpr, Z_ROW: tl.constexpr,
    TAIL: tl.constexpr, FIRST: tl.constexpr, FIRST_ROW: tl.constexpr, SECOND: tl.constexpr,
    SECOND_ROW: tl.constexpr, SELECTED: tl.constexpr, HANDED_OUT: tl.constexpr,
    CAUSAL: tl.constexpr, ACTIVATION: tl.constexpr, ONES: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of z of one example, and add that of the biases."""
    b = tl.program_id(0).to(tl.int64)
    c, n = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N)
    narrow_bias = tl.load(bias + c, mask=c < RANK, other=0.0).to(tl.float32)
    gate_bias = tl.load(bias + RANK + n, mask=n < GATES, other=0.0).to(tl.float32)
    factors = tl.load(scales + n, mask=n < GATES, other=0.0).to(tl.float32)
    bias_narrow = tl.zeros([BLOCK_C], tl.float32)
    bias_gates = tl.zeros([BLOCK_N], tl.float32)
    if grad_gate is not None:
        grad_gate += b * g_b
    count = 0.0
    if mask is None:
        count += tokens
    else:
        for t0 in range(0, tokens, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            count += tl.sum(real_tokens(mask, b, t, tokens, mask_b, mask_t))
    # Sums over the tokens after a block, if causal, or over all tokens.
    after = tl.zeros([BLOCK_N], tl.float32)
    later = 0.0
    chosen = tl.full([BLOCK_T], 0.0, tl.float32)
    if not CAUSAL:
        chosen += tl.load(gates + b * GATES + SELECTED)
    blocks = tl.cdiv(tokens, BLOCK_T)
    for step in range(0, blocks):
        t0 = (blocks - 1 - step) * BLOCK_T
        t = tl.arange(0, BLOCK_T)
        inside = t < tokens - t0
        row = b * tokens + t0
        if CAUSAL:
            chosen = tl.load(gates + row * GATES + t * GATES + SELECTED, mask=inside, other=0.0)
        grad = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        of_gate, of_bias = narrow_columns(
            z,
            narrow_bias,
            first,
            second,
            grad_z,
            row,
            t,
            inside,
            chosen,
            RANK,
            WIDTH,
            Z_ROW,
            FIRST,
            FIRST_ROW,
            SECOND,
            SECOND_ROW,
            ACTIVATION,
            ONES,
            BLOCK_T,
            BLOCK_C,
        )
        bias_narrow += of_bias
        grad += tl.where((n == SELECTED)[None, :], of_gate[:, None], 0.0)
        if grad_gate is not None:
            handed = of_heads(grad_gate, heads, t0 + t, inside, g_h, g_t, BLOCK_T, BLOCK_H)
            grad += tl.where((n == HANDED_OUT)[None, :], handed[:, None], 0.0)
        if CAUSAL:
            real = real_tokens(mask, b, t0 + t, tokens, mask_b, mask_t)
            seen = count - later - (tl.sum(real) - tl.cumsum(real, 0))
            grad = grad * factors[None, :] / tl.maximum(seen, 1.0)[:, None]
            s = token_gates(z + row * Z_ROW + RANK, t, inside, n, gate_bias, GATES, Z_ROW)
            # The gate of a token enters the means of all later tokens.
            from_here = tl.cumsum(grad, 0, reverse=True) + after[None, :]
            logits = from_here * real[:, None] * s * (1.0 - s)
            bias_gates += tl.sum(logits, 0)
            store_tail(grad_z, logits, row, t, inside, n, RANK, WIDTH, TAIL)
            later += tl.sum(real)
        after += tl.sum(grad, 0)
    if not CAUSAL:
        after = after * factors / tl.maximum(count, 1.0)
        for t0 in range(0, tokens, BLOCK_T):
            t = tl.arange(0, BLOCK_T)
            inside = t < tokens - t0
            row = b * tokens + t0
            real = real_tokens(mask, b, t0 + t, tokens, mask_b, mask_t)
            s = token_gates(z + row * Z_ROW + RANK, t, inside, n, gate_bias, GATES, Z_ROW)
            logits = after[None, :] * real[:, None] * s * (1.0 - s)
            bias_gates += tl.sum(logits, 0)
            store_tail(grad_z, logits, row, t, inside, n, RANK, WIDTH, TAIL)
    places = grad_bias + b * bias_b + c
    tl.store(places, tl.load(places, mask=c < RANK, other=0.0) + bias_narrow, mask=c < RANK)
    places = grad_bias + b * bias_b + RANK + n
    tl.store(places, tl.load(places, mask=n < GATES, other=0.0) + bias_gates, mask=n < GATES)
