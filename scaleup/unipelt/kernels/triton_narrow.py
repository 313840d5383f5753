"""Triton kernels for everything narrow at a site, one launch each.

`reference.py` has the formulas, the meaning of the arguments and the legend of shapes. Forwards,
the tokens of an example are divided among several programs if there are few examples; each of them
reads the few gate columns of the tokens that its means need. Backwards, one program handles one
example and walks back through the tokens, so it can add to the gradient of the biases without
atomics and in a fixed order.
"""

import torch

from .target import narrow_refusal
from .triton_launch import launch, power_of_2
from .triton_narrow_kernels import backward_kernel, forward_kernel

PROGRAMS = 264  # two for each of the 132 multiprocessors of an H100
ELEMENTS = 16  # of a block for each thread backwards; registers suffice for so many
MOST_TAIL = 32  # columns of z behind the narrow ones that the kernel itself fills


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return x as [B · T, ·] with dense rows, copied only if there is no such view."""
    rows = x.flatten(0, 1) if x.dim() == 3 else x
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _expanded(mask: torch.Tensor | None, z: torch.Tensor) -> torch.Tensor | None:
    """Return a mask as [B, T], because the kernels read one value for each token.

    Raises:
        RuntimeError: if it cannot be broadcast to that shape.
    """
    return mask if mask is None or mask.shape == z.shape[:2] else mask.expand(z.shape[:2])


def _checked(
    z: torch.Tensor, bias: torch.Tensor, scales: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the rows of z, the biases and the scales in a layout that the kernels can read.

    Raises:
        ValueError: where the kernels cannot work.
    """
    reason = narrow_refusal(z.dtype, bias.shape[0] - scales.shape[0], activation)
    if reason is not None:
        raise ValueError(f"SCALEUP_KERNELS: the Triton kernel of narrow maps cannot run: {reason}")
    return _rows(z), bias.contiguous(), scales.contiguous()


def narrow_forward(
    z: torch.Tensor,
    bias: torch.Tensor,
    scales: torch.Tensor,
    mask: torch.Tensor | None,
    selected: int,
    causal: bool,
    activation: str,
    ones_column: bool,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gated narrow columns and the gates; see `reference.narrow_forward`.

    Raises:
        ValueError: where the kernel cannot work.
    """
    rows, bias, scales = _checked(z, bias, scales, activation)
    mask = _expanded(mask, z)
    (batch, tokens), count = z.shape[:2], scales.shape[0]
    v = z.new_empty(batch, tokens, width)
    gates = z.new_empty(batch, tokens if causal else 1, count, dtype=torch.float32)
    block_c = power_of_2(width, 16, 64)
    block_t = power_of_2(tokens, 16, 128 if block_c < 64 else 64)
    # Each program reads the gates of other tokens again, so there are no more than are useful.
    splits = max(min(-(-tokens // block_t), PROGRAMS // max(batch, 1)), 1)
    chunk = max(-(-tokens // (splits * block_t)), 1) * block_t
    splits = max(-(-tokens // chunk), 1)
    launch(
        forward_kernel,
        batch * splits,
        (rows, bias, scales, mask, v, gates),
        (tokens, chunk, splits, *((0, 0) if mask is None else mask.stride())),
        (
            *(bias.shape[0] - count, count, rows.stride(0), width),
            *(selected, causal, activation, ones_column),
            *(power_of_2(tokens, 16, 512), block_t, block_c, power_of_2(count)),
        ),
        4,
    )
    return v, gates


def narrow_backward(
    z: torch.Tensor,
    bias: torch.Tensor,
    scales: torch.Tensor,
    mask: torch.Tensor | None,
    gates: torch.Tensor,
    grads_v: list[torch.Tensor],
    grad_gate: torch.Tensor | None,
    grad_bias: torch.Tensor,
    selected: int,
    handed_out: int,
    causal: bool,
    activation: str,
    ones_column: bool,
) -> torch.Tensor:
    """Compute the gradient of z and add that of the biases; see `reference.narrow_backward`.

    Raises:
        ValueError: where the kernel cannot work.
    """
    rows, bias, scales = _checked(z, bias, scales, activation)
    if grad_bias.stride(-1) != 1:
        raise ValueError("SCALEUP_KERNELS: grad_bias must have stride 1 in its last dimension")
    mask = _expanded(mask, z)
    (batch, tokens, width), count = z.shape, scales.shape[0]
    rank, gates = bias.shape[0] - count, gates.contiguous()
    parts = [_rows(grad) for grad in grads_v]
    if len(parts) > 2:
        parts = [torch.cat(parts, dim=1)]
    first, second = (*parts, None, None)[:2]
    tail = width - rank
    if tail > MOST_TAIL:
        grad_z, tail = z.new_zeros(z.shape), count
    else:
        grad_z = z.new_empty(z.shape)
    block_c = power_of_2(rank, 16)
    # Few examples take larger blocks and more warps, because one program walks through each. The
    # registers suffice only where a single gate multiplies few columns and no heads use it.
    small = count == 1 and second is None and grad_gate is None and block_c <= 64
    few = batch < PROGRAMS // 2 and small and z.element_size() == 2
    block_t = power_of_2(tokens, 8, min((8192 if few else 4096) // block_c, 256))
    warps = min(max(block_t * block_c // (32 * ELEMENTS), 4), 16)
    heads = 0 if grad_gate is None else grad_gate.shape[1]
    launch(
        backward_kernel,
        batch,
        (rows, bias, scales, mask, gates, first, second, grad_gate, grad_bias, grad_z),
        (
            *(tokens, heads, *((0, 0) if mask is None else mask.stride())),
            *((0, 0, 0) if grad_gate is None else grad_gate.stride()),
            grad_bias.stride(0),
        ),
        (
            *(rank, count, width, rows.stride(0), tail),
            *((0, 0) if first is None else (first.shape[1], first.stride(0))),
            *((0, 0) if second is None else (second.shape[1], second.stride(0))),
            *(selected, handed_out, causal, activation, ones_column),
            *(block_t, block_c, power_of_2(tail), power_of_2(heads, 1, 16)),
        ),
        warps,
        min(65536 // (32 * warps), 255),  # all that a multiprocessor has
    )
    return grad_z
