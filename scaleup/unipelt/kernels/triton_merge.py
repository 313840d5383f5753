"""Triton kernels that join a prefix to the output of a fused attention, one launch each.

`reference.py` has the formulas, the meaning of the arguments and the legend of shapes. A program
handles one head of one example: a block of queries forwards, several blocks one after another
backwards. Longer prefixes are joined in pieces, because merging one piece after another is exact.
"""

import torch

from .target import merge_refusal
from .triton_launch import launch, power_of_2
from .triton_merge_kernels import backward_kernel, forward_kernel

# A program keeps both gradients of its piece of the prefix, [L, E], in registers. Products in
# float32 need many more registers, because tensor cores do not compute them exactly.
MOST_ELEMENTS, MOST_ELEMENTS_FLOAT32, MOST_KEYS = 4096, 2048, 32
# About three programs backwards for each multiprocessor of an A100 or H100. More of them would
# write more parts of the prefix's gradient, fewer would leave multiprocessors idle.
PROGRAMS, MOST_STEPS = 384, 16


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return x with stride 1 in its last dimension, copied only if it has another."""
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
            4,
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
            + (parts[:, :, :, first:] if first else parts, of_gate),
            (*factors, *sizes, piece.shape[2], length, splits, steps, *strides),
            (size, first > 0, block_t, block_l, block_e),
            8 if wide or block_l * block_e > 2048 else 4,
            255 if wide else None,
        )
    return parts, grad_gate
