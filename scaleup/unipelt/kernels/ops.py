"""The kernels of the fast path as torch operations: Triton on CUDA, plain formulas elsewhere.

As registered operations they can be traced, compiled and counted: one call each, as each is one
launch on a GPU. On CUDA outside of a compiler, the functions here start the Triton kernels
directly, because a registered operation costs the host several times as much as a launch.

`reference.py` says what each of them computes. Shapes are those of its legend.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch.library import CustomOpDef, custom_op

from . import reference
from .reference import wide_dtype
from .target import mode

# Each exported folder registers its own operations, because one process may load several.
LIBRARY = "scaleup"
if not __name__.startswith("scaleup."):
    LIBRARY = f"scaleup_{hashlib.sha256(__name__.encode()).hexdigest()[:8]}"
Tensor = torch.Tensor


@custom_op(f"{LIBRARY}::merge_forward", mutates_args=("out", "lse"))
def _merge_forward(
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    prefix: Tensor,
    gate: Tensor | None,
    scale: float,
    keep: Tensor | None = None,
    dropout: float = 0.0,
) -> None:
    reference.merge_forward(query, out, lse, prefix, gate, scale, keep, dropout)


@custom_op(f"{LIBRARY}::merge_backward", mutates_args=("grad_query",))
def _merge_backward(
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    prefix: Tensor,
    gate: Tensor | None,
    grad_out: Tensor,
    grad_query: Tensor,
    scale: float,
    keep: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    return reference.merge_backward(
        query, out, lse, prefix, gate, grad_out, grad_query, scale, keep, dropout
    )


@custom_op(f"{LIBRARY}::narrow_forward", mutates_args=())
def _narrow_forward(
    z: Tensor,
    bias: Tensor,
    scales: Tensor,
    mask: Tensor | None,
    selected: int,
    causal: bool,
    activation: str,
    ones_column: bool,
    width: int,
) -> tuple[Tensor, Tensor]:
    return reference.narrow_forward(
        z, bias, scales, mask, selected, causal, activation, ones_column, width
    )


@custom_op(f"{LIBRARY}::narrow_backward", mutates_args=("grad_bias",))
def _narrow_backward(
    z: Tensor,
    bias: Tensor,
    scales: Tensor,
    mask: Tensor | None,
    gates: Tensor,
    grads_v: list[Tensor],
    grad_gate: Tensor | None,
    grad_bias: Tensor,
    selected: int,
    handed_out: int,
    causal: bool,
    activation: str,
    ones_column: bool,
) -> Tensor:
    return reference.narrow_backward(
        z,
        bias,
        scales,
        mask,
        gates,
        grads_v,
        grad_gate,
        grad_bias,
        selected,
        handed_out,
        causal,
        activation,
        ones_column,
    )


@_merge_forward.register_fake
def fake_merge_forward(query, out, lse, prefix, gate, scale, keep=None, dropout=0.0):  # type: ignore[no-untyped-def]
    return None


@_merge_backward.register_fake
def fake_merge_backward(query, out, lse, prefix, gate, *args, **kwargs):  # type: ignore[no-untyped-def]
    dtype = wide_dtype(query)
    (batch, heads, queries, size), length = query.shape, prefix.shape[2]
    parts = query.new_empty(1, 2, heads, length, size, dtype=dtype)
    shape = (0,) if gate is None else (batch, heads, queries)
    return parts, query.new_empty(shape, dtype=dtype)


@_narrow_forward.register_fake
def fake_narrow_forward(z, bias, scales, mask, selected, causal, activation, ones_column, width):  # type: ignore[no-untyped-def]
    batch, tokens = z.shape[:2]
    gates = z.new_empty(batch, tokens if causal else 1, scales.shape[0], dtype=wide_dtype(z))
    return z.new_empty(batch, tokens, width), gates


@_narrow_backward.register_fake
def fake_narrow_backward(z, *args):  # type: ignore[no-untyped-def]
    return torch.empty_like(z)


@functools.cache
def _launchers() -> dict[str, Callable[..., Any]]:
    """Return the functions that start the Triton kernels.

    Raises:
        ImportError: without Triton.
    """
    # Imported late, because a machine without a GPU may not have Triton.
    from .triton_merge import merge_backward, merge_forward
    from .triton_narrow import narrow_backward, narrow_forward

    return {
        "merge_forward": merge_forward,
        "merge_backward": merge_backward,
        "narrow_forward": narrow_forward,
        "narrow_backward": narrow_backward,
    }


def _on_cuda(name: str, operation: CustomOpDef) -> Callable[..., Any]:
    """Make Triton the implementation of an operation on CUDA.

    Returns:
        A function with the operation's arguments that starts the kernel directly where it can.
    """
    formula = getattr(reference, name)

    @operation.register_kernel("cuda")
    def compiled(*args: Any) -> Any:
        """Run as part of a compiled graph."""
        if mode() == "reference":
            return formula(*args)
        results = _launchers()[name](*args)
        if name == "merge_backward":
            # The number of parts depends on the sizes, but a compiler must know it.
            parts, grad_gate = results
            return parts.sum(dim=0, keepdim=True), grad_gate
        return results

    def call(first: Tensor, *args: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or not first.is_cuda
            or type(first) is not Tensor  # a tensor without data, of a memory plan
            or mode() == "reference"
        ):
            return operation(first, *args)
        return _launchers()[name](first, *args)

    return call


merge_forward = _on_cuda("merge_forward", _merge_forward)
merge_backward = _on_cuda("merge_backward", _merge_backward)
narrow_forward = _on_cuda("narrow_forward", _narrow_forward)
narrow_backward = _on_cuda("narrow_backward", _narrow_backward)
