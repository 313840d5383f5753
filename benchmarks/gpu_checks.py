"""Check the kernels of the fast path on a GPU against plain formulas.

    python -m benchmarks.gpu_checks --output results/bench/gpu/checks.json

kernels: each kernel against its reference in float64 on the same inputs. attention: output and
gradients of attention with a prefix against autograd in float64. models: loss and gradients
of small models in float32 and bfloat16 against those with SCALEUP_KERNELS=off in float32. host:
microseconds that the host needs for one call. The exit code is 1 if an error is above its limit.
"""

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.cases import argument_parser, write_result
from scaleup.experiments import batches, call_counts, variants
from scaleup.unipelt.kernels import Visible, additive_mask, lse_attention, ops, reference
from scaleup.unipelt.kernels.target import VARIABLE

# dtype of the inputs → largest error of a kernel, relative to the largest value of the result
KERNEL_LIMITS = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# dtype of autocast → largest error of a model's gradients, relative to their norm
MODEL_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
# batch, heads, key-value heads, queries, head size, prefix length
MERGES = ((2, 12, 12, 128, 64, 10), (1, 32, 8, 200, 128, 10), (3, 4, 2, 17, 16, 3))
# batch, heads, key-value heads, tokens, head size; mask; gate
ATTENTIONS = (
    ((2, 12, 12, 128, 64), "no mask", "per example"),
    ((2, 12, 12, 128, 64), "padding", "per example"),
    ((1, 32, 8, 512, 128), "causal", "per token"),
    ((2, 8, 2, 100, 64), "padding", "per token"),
    ((2, 4, 4, 33, 64), "causal", "ungated"),
)
PREFIX = 10
# batch, tokens, narrow columns, gates
SITES = ((2, 128, 16, 2), (1, 2048, 48, 1), (3, 17, 5, 3))
CALLS = 2000

Result = dict[str, Any]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest expected value."""
    largest = expected.abs().max().clamp(min=1e-30)
    return ((actual.double() - expected).abs().max() / largest).item()


def _wide(values: list[Any]) -> list[Any]:
    """Return the arguments with tensors in float64. The copies may be overwritten."""

    def convert(x: Any) -> Any:
        if isinstance(x, list):
            return _wide(x)
        return x.to(torch.float64, copy=True) if isinstance(x, torch.Tensor) else x

    return [convert(x) for x in values]


def _compare(name: str, arguments: list[Any], changed: tuple[int, ...]) -> float:
    """Run a kernel and its reference; return the largest error of results and changed arguments."""
    wide = _wide(arguments)
    expected = getattr(reference, name)(*wide)
    actual = getattr(ops, name)(*arguments)
    pairs = [(arguments[i], wide[i]) for i in changed]
    if isinstance(actual, torch.Tensor):
        actual, expected = [actual], [expected]
    pairs += zip(actual or (), expected or ())
    # The gradient of a prefix comes in parts [P, 2, H, L, E], whose number may differ.
    pairs = [(a.sum(0), e.sum(0)) if a.dim() == 5 else (a, e) for a, e in pairs]
    return max(relative_error(a, e) for a, e in pairs if e.numel())


def merge_error(shape: tuple[int, ...], gated: str, dtype: torch.dtype, device: str) -> float:
    """Check the pair of kernels that joins a prefix to the output of an attention."""
    batch, heads, kv_heads, queries, size, length = shape
    new = torch.Generator(device).manual_seed(0)

    def random(*sizes: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*sizes, generator=new, device=device, dtype=torch.float32).to(dtype)

    query, out, grad_out, grad_query = (random(batch, heads, queries, size) for _ in range(4))
    lse = random(batch, heads, queries, dtype=torch.float32)
    prefix, gate = random(2, kv_heads, length, size), None
    if gated != "ungated":
        tokens = queries if gated == "per token" else 1
        gate = random(batch, 1, tokens, dtype=torch.float32).sigmoid()
        gate = gate.expand(batch, heads, queries)
    error = _compare("merge_forward", [query, out, lse, prefix, gate, size**-0.5], (1, 2))
    arguments = [query, out, lse, prefix, gate, grad_out, grad_query, size**-0.5]
    return max(error, _compare("merge_backward", arguments, (6,)))


def narrow_error(
    shape: tuple[int, ...], activation: str, causal: bool, dtype: torch.dtype, device: str
) -> float:
    """Check the pair of kernels for everything narrow at a site."""
    batch, tokens, rank, gates = shape
    columns, new = rank + gates, torch.Generator(device).manual_seed(0)
    width = -(-columns // 16) * 16

    def random(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*sizes, generator=new, device=device).to(dtype)

    z, bias = random(batch, tokens, width, dtype=dtype), random(columns)
    mask = (random(batch, tokens) > -1).to(dtype)
    mask[:, 0] = 1
    scales = torch.ones(gates, device=device)
    fixed = [z, bias, scales, mask]
    ones_column, v_width = activation == "relu", -(-(rank + 1) // 8) * 8
    settings = [0, causal, activation, ones_column, v_width]
    error = _compare("narrow_forward", [*fixed, *settings], ())
    pooled = ops.narrow_forward(*fixed, *settings)[1]
    grads_v = [random(batch, tokens, rank + ones_column, dtype=dtype)]
    grad_gate, grad_bias = random(batch, 4, tokens), torch.zeros(batch, columns, device=device)
    arguments = [*fixed, pooled, grads_v, grad_gate, grad_bias]
    arguments += [0, gates - 1, causal, activation, ones_column]
    return max(error, _compare("narrow_backward", arguments, (7,)))


def kernel_results(device: str) -> Iterator[tuple[str, Result]]:
    """Check every kernel in every dtype."""
    for dtype, limit in KERNEL_LIMITS.items():
        kind = str(dtype).removeprefix("torch.")
        for shape, gated in itertools.product(MERGES, ("ungated", "per example", "per token")):
            name = f"merge, {kind}, {'x'.join(map(str, shape))}, {gated}"
            yield name, {"error": merge_error(shape, gated, dtype, device), "limit": limit}
        for shape, (activation, causal) in itertools.product(
            SITES, (("none", False), ("none", True), ("relu", False), ("gelu", True))
        ):
            order = "causal" if causal else "all tokens"
            name = f"narrow, {kind}, {'x'.join(map(str, shape))}, {activation}, {order}"
            error = narrow_error(shape, activation, causal, dtype, device)
            yield name, {"error": error, "limit": limit}


def plain_attention(
    query_BHTE: torch.Tensor,
    key_BGSE: torch.Tensor,
    value_BGSE: torch.Tensor,
    prefix: torch.Tensor,
    gate_BT1: torch.Tensor | float,
    hidden: torch.Tensor | None,
) -> torch.Tensor:
    """Compute attention with a prefix [2, G, L, E] as one softmax over all keys, [B, T, H, E]."""
    groups = query_BHTE.shape[1] // key_BGSE.shape[1]
    scaled_BHTE = query_BHTE * query_BHTE.shape[3] ** -0.5
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (key_BGSE, value_BGSE))
    prefix_keys, prefix_values = prefix.repeat_interleave(groups, dim=1).unbind()
    scores_BHTS = scaled_BHTE @ keys.transpose(2, 3)
    if hidden is not None:
        scores_BHTS = scores_BHTS.masked_fill(hidden, -torch.inf)
    gate = gate_BT1.unsqueeze(1) if isinstance(gate_BT1, torch.Tensor) else gate_BT1
    prefix_scores = scaled_BHTE @ prefix_keys.transpose(1, 2) * gate
    weights = torch.cat([prefix_scores, scores_BHTS], dim=-1).softmax(dim=-1)
    length = prefix.shape[2]
    out = weights[..., :length] * gate @ prefix_values + weights[..., length:] @ values
    return out.transpose(1, 2)


def attention_error(
    shape: tuple[int, ...], mask: str, gated: str, dtype: torch.dtype, device: str
) -> float:
    """Check the output of attention and the gradients of all inputs."""
    batch, heads, kv_heads, tokens, size = shape
    new = torch.Generator(device).manual_seed(0)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=new, device=device).to(dtype)

    inputs = [random(batch, heads, tokens, size)]
    inputs += [random(batch, kv_heads, tokens, size) for _ in range(2)]
    inputs.append(random(2, kv_heads, PREFIX, size))
    if gated != "ungated":
        inputs.append(random(batch, tokens if gated == "per token" else 1, 1).sigmoid())
    hidden, visible = None, Visible(causal=mask == "causal")
    if mask == "causal":
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu(1)
    elif mask == "padding":
        lengths = torch.linspace(tokens // 2, tokens, batch, device=device).long()
        hidden = (torch.arange(tokens, device=device) >= lengths[:, None])[:, None, None]
        visible = Visible(mask=additive_mask(~hidden, dtype))
    grad = random(batch, tokens, heads, size)

    def results(values: list[torch.Tensor], function: Callable) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in values]
        gate = leaves[4:] or [1.0]
        out = function(*leaves[:4], *gate)
        return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    actual = results(
        inputs, lambda q, k, v, p, g: lse_attention(q, k, v, p, g, visible, size**-0.5, 0.0)
    )
    expected = results(_wide(inputs), lambda q, k, v, p, g: plain_attention(q, k, v, p, g, hidden))
    return max(relative_error(a, e) for a, e in zip(actual, expected))


def attention_results(device: str) -> Iterator[tuple[str, Result]]:
    """Check attention with a prefix in every dtype."""
    for dtype, limit in KERNEL_LIMITS.items():
        for shape, mask, gated in ATTENTIONS:
            kind = str(dtype).removeprefix("torch.")
            name = f"attention, {kind}, {'x'.join(map(str, shape))}, {mask}, {gated}"
            error = attention_error(shape, mask, gated, dtype, device)
            yield name, {"error": error, "limit": limit}


@contextlib.contextmanager
def _kernels(mode: str) -> Iterator[None]:
    before = os.environ.get(VARIABLE, "auto")
    os.environ[VARIABLE] = mode
    try:
        yield
    finally:
        os.environ[VARIABLE] = before


def gradients(
    family: str, padded: bool, mode: str, dtype: torch.dtype, device: str
) -> tuple[float, torch.Tensor]:
    """Return loss and gradients, in one vector in float64, of a small APL model."""
    model: Any = call_counts.narrow_model(family, 2, torch.float32)
    model = variants.add_unipelt(model, variants.FLAT).to(device).train()
    lengths = batches.half_padding_lengths(4, 16) if padded else [16] * 4
    batch = batches.random_batch(lengths, 16, call_counts.VOCABULARY)
    batch = {name: x.to(device) for name, x in batches.with_labels(batch, model).items()}
    half = dtype != torch.float32
    with _kernels(mode), torch.autocast(device, torch.bfloat16, enabled=half):
        loss = model(**batch).loss
        loss.backward()
    parts = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(parts)


def model_results(device: str) -> Iterator[tuple[str, Result]]:
    """Check the gradients of small models of every family."""
    fast = "auto" if device == "cuda" else "reference"
    for family, padded in itertools.product(call_counts.FAMILIES, (False, True)):
        loss, expected = gradients(family, padded, "off", torch.float32, device)
        for dtype, limit in MODEL_LIMITS.items():
            fast_loss, actual = gradients(family, padded, fast, dtype, device)
            error = ((actual - expected).norm() / expected.norm()).item()
            name = f"model, {str(dtype).removeprefix('torch.')}, {family}"
            difference = abs(fast_loss - loss)
            yield (
                f"{name}, {'padded' if padded else 'full'}",
                {"error": error, "limit": limit, "loss_difference": difference},
            )


def host_results(device: str) -> Iterator[tuple[str, Result]]:
    """Time the host while it issues calls that the device works off more quickly."""
    x = torch.ones(8, 8, device=device)
    z, bias, scales = torch.ones(1, 16, 32, device=device), x.new_zeros(18), x.new_ones(2)
    calls: dict[str, Callable[[], object]] = {
        "add_": lambda: x.add_(1),
        "mm": lambda: x @ x,
        "narrow_forward": lambda: ops.narrow_forward(
            z, bias, scales, None, 0, False, "none", False, 16
        ),
    }
    for name, call in calls.items():
        for _ in range(10):
            call()
        _synchronize(device)
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        seconds = time.perf_counter() - begin
        _synchronize(device)
        yield f"host, {name}", {"us_per_call": round(1e6 * seconds / CALLS, 2)}


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> int:
    """Run all checks, and write the file after each of them; return 1 if one fails."""
    parser = argument_parser(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    results: dict[str, Result] = {}
    failed = 0
    for check in (kernel_results, attention_results, model_results, host_results):
        for name, result in check(options.device):
            results[name] = result
            write_result(options.output, results)
            bad = not result.get("error", 0.0) <= result.get("limit", 0.0)  # NaN is bad as well
            failed += bad
            numbers = ", ".join(f"{key} {value:.3g}" for key, value in result.items())
            print(f"{'FAILED  ' if bad else ''}{name}: {numbers}", flush=True)
    print(f"{failed} of {len(results)} checks failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
