"""Products with a narrow side, as the gates, LoRA and the adapter have them, near the cost of reading what is wide.

    narrow   x [W₁; W₂; …]ᵀ             what reads one input, at once; two or three columns are computed as (W xᵀ)ᵀ, up to four times as fast in BLAS
    add      result + W v, + g b        a gate scales the narrow side: v is g times what was narrow, whose gradient is a narrow product too
    few      x Wᵀ + b                   of few rows and a wide W, as the prefix's MLP has them: also as (W xᵀ + b)ᵀ

At the sizes of a backbone these take the time of reading and writing [B, T, D]; the arithmetic is nothing beside it. Gradients are written
out, because autograd's own copy [B, T, D] for each, multiply in the slow direction, and take a step of their own for every view
(docs/performance.md). Under autocast the products are of its type, and weights that are joined are cast as one: on a GPU a step of a small model
is as long as the list of its kernels.

Shapes: B examples, T tokens, M = B·T, D wide, R narrow.
"""

import types
from typing import Any

import torch
from torch import nn

FEW_ROWS = 32  # from here on x Wᵀ is the faster way
FEW_COLUMNS = 4  # the same


class NoGradients:
    """In the place of autograd's context where no gradient is wanted."""

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        """Keeps nothing."""


class HandWritten(torch.autograd.Function):
    """One whose gradients are written out. `run` is `apply`, without autograd's bookkeeping where no gradient is wanted."""

    @classmethod
    def run(cls, *args: object) -> Any:
        return cls.apply(*args) if torch.is_grad_enabled() else cls.forward(NoGradients(), *args)


def _computes(wide: torch.Tensor, *linears: nn.Module) -> torch.dtype | None:
    """The type of the products: autocast's, or the one that all have. None where each must be called by itself: not all are torch's own layers, types
    differ, or a compiler is at work, which fuses the formulas by itself. Under ZeRO-3 DeepSpeed replaces torch's linear function, gathers weights
    around a layer's call, and gives views that must not be changed."""
    if (
        torch.compiler.is_compiling()
        or not isinstance(nn.functional.linear, types.BuiltinFunctionType)
        or not wide.is_contiguous()
    ):
        return None
    given, kind = wide.dtype, wide.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    allowed = (given,) if autocast is None else (autocast, torch.float32)
    for linear in linears:
        if not isinstance(linear, nn.Linear) or linear.weight.dtype not in allowed:
            return None
    return given if autocast is None else autocast if given in allowed else None


def _narrow(x_MD: torch.Tensor, weight_DR: torch.Tensor) -> torch.Tensor:
    """x W, [M, R]."""
    if weight_DR.shape[1] < FEW_COLUMNS:
        return (weight_DR.t() @ x_MD.t()).t()
    # On a CPU a copy of the small one costs less than to read it across, 0.9 of the time at 2,048 rows.
    return x_MD @ (weight_DR.contiguous() if x_MD.device.type == "cpu" else weight_DR)


class _Narrow(HandWritten):
    @staticmethod
    def forward(
        ctx, x_BTD: torch.Tensor, dtype: torch.dtype, groups: list[int], *weights_RD: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        x_MD, rest, joined, found = x_BTD.flatten(0, -2).to(dtype), list(weights_RD), [], []
        ctx.shape, ctx.sizes, ctx.types = x_BTD.shape, [], (x_BTD.dtype, weights_RD[0].dtype)
        for count in groups:
            group, rest = rest[:count], rest[count:]
            joined.append((torch.cat(group) if count > 1 else group[0]).to(dtype))
            ctx.sizes.append([len(weight_RD) for weight_RD in group])
            found.append(_narrow(x_MD, joined[-1].t()).unflatten(0, ctx.shape[:-1]))
        ctx.save_for_backward(x_MD, *joined)
        return tuple(found)

    @staticmethod
    def backward(ctx, *grads_BTR: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x_MD, *joined), grad_MD, grad_weights = ctx.saved_tensors, None, []
        for grad_BTR, weight_RD, sizes in zip(grads_BTR, joined, ctx.sizes):
            grad_MR = grad_BTR.flatten(0, -2)
            if ctx.needs_input_grad[0]:
                grad_MD = (
                    grad_MR @ weight_RD if grad_MD is None else grad_MD.addmm_(grad_MR, weight_RD)
                )
            grad_weights += (grad_MR.t() @ x_MD).to(ctx.types[1]).split_with_sizes(sizes)
        return (
            None if grad_MD is None else grad_MD.to(ctx.types[0]).view(ctx.shape),
            None,
            None,
            *grad_weights,
        )


def narrow_products(x_BTD: torch.Tensor, *groups: list[nn.Linear]) -> list[torch.Tensor] | None:
    """For each group of linear layers x [W₁; W₂; …]ᵀ, [B, T, R of all of them], without biases. None where each must be called by itself."""
    linears = [linear for group in groups for linear in group]
    dtype = _computes(x_BTD, *linears)
    if dtype is None or len({linear.weight.dtype for linear in linears}) > 1:
        return None
    return list(
        _Narrow.run(
            x_BTD, dtype, [len(group) for group in groups], *(linear.weight for linear in linears)
        )
    )


class _FewRows(HandWritten):
    @staticmethod
    def forward(
        ctx, x_LD: torch.Tensor, weight_RD: torch.Tensor, bias_R: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x_LD, weight_RD)
        return torch.addmm(bias_R.unsqueeze(1), weight_RD, x_LD.t()).t()

    @staticmethod
    def backward(ctx, grad_LR: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x_LD, weight_RD = ctx.saved_tensors
        return grad_LR @ weight_RD, grad_LR.t() @ x_LD, grad_LR.sum(dim=0)


def few_rows(x_LD: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    """x Wᵀ + b, [L, R], of L rows."""
    x_LD = x_LD.contiguous()
    if (
        len(x_LD) >= FEW_ROWS
        or x_LD.device.type != "cpu"
        or not x_LD.dtype == linear.weight.dtype == _computes(x_LD, linear)
    ):
        return linear(x_LD)
    return _FewRows.run(x_LD, linear.weight, linear.bias)


class _Add(HandWritten):
    @staticmethod
    def forward(
        ctx, result_BTD, v_BTR, gate_BT1, weight_DR, bias_D, in_place: bool
    ) -> torch.Tensor:
        """result + W v + gate · b, [B, T, D], in the type of `result`; the product in that of v. gate_BT1, bias_D: None for no bias."""
        dtype, ctx.type, ctx.shapes = (
            v_BTR.dtype,
            weight_DR.dtype,
            (v_BTR.shape, None if gate_BT1 is None else gate_BT1.shape),
        )
        v_MR, weight_DR = v_BTR.flatten(0, -2), weight_DR.to(dtype)
        gate_M1 = None if bias_D is None else gate_BT1.expand(*v_BTR.shape[:-1], 1).reshape(-1, 1)
        bias_D = None if bias_D is None else bias_D.to(dtype)
        ctx.save_for_backward(v_MR, gate_M1, weight_DR, bias_D)
        same = result_BTD.dtype == dtype
        if in_place and same:
            # Behind autograd's back, which would copy every gradient of a changed view; whoever had saved `result` finds its version changed.
            out_BTD = result_BTD.detach()
            out_MD = out_BTD.view(-1, out_BTD.shape[-1]).addmm_(v_MR, weight_DR.t())
        else:
            out_MD = (
                torch.addmm(result_BTD.flatten(0, -2), v_MR, weight_DR.t())
                if same
                else v_MR @ weight_DR.t()
            )
            out_BTD = out_MD.view_as(result_BTD)
        if bias_D is not None:
            out_MD.addmm_(gate_M1, bias_D.unsqueeze(0))
        return out_BTD if same else result_BTD + out_BTD

    @staticmethod
    def backward(ctx, grad_BTD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of result, v, gate, W and b."""
        (v_MR, gate_M1, weight_DR, bias_D), (shape, gate_shape), grad_gate, grad_bias = (
            ctx.saved_tensors,
            ctx.shapes,
            None,
            None,
        )
        grad_MD = grad_BTD.flatten(0, -2).to(v_MR.dtype)
        if bias_D is not None:
            grad_gate = (
                (grad_MD @ bias_D).view(*shape[:-1], 1).sum_to_size(gate_shape)
                if ctx.needs_input_grad[2]
                else None
            )
            grad_bias = (gate_M1.t() @ grad_MD).squeeze(0).to(ctx.type)
        # The other way round BLAS is slower; a weight takes its gradient without a copy only if that is laid out as itself.
        grad_weight = (v_MR.t() @ grad_MD).t().to(ctx.type, memory_format=torch.contiguous_format)
        return (
            grad_BTD,
            _narrow(grad_MD, weight_DR).view(shape),
            grad_gate,
            grad_weight,
            grad_bias,
            None,
        )


def scaled(gate: torch.Tensor | float, narrow_BTR: torch.Tensor) -> torch.Tensor:
    """gate · narrow, in the type of `narrow`; gate [B, 1 or T, 1] or a constant."""
    return (gate.to(narrow_BTR.dtype) if isinstance(gate, torch.Tensor) else gate) * narrow_BTR


def add_lora(
    result_BTD: torch.Tensor, v_BTR: torch.Tensor, linear: nn.Module, projection: nn.Module
) -> torch.Tensor:
    """result + W v; `result` is the output of the frozen `projection`, which does not need it again: it is written to.

    Not where the projection is quantised: its output may be a view that must not be changed.
    """
    if (
        type(projection) is not nn.Linear
        or v_BTR.dtype != result_BTD.dtype
        or _computes(result_BTD, linear) != v_BTR.dtype
    ):
        return result_BTD + linear(v_BTR)
    return _Add.run(result_BTD, v_BTR, None, linear.weight, None, True)


def add_gated(
    z_BTD: torch.Tensor,
    narrow_BTR: torch.Tensor,
    gate: torch.Tensor | float,
    linear: nn.Linear,
    own: bool,
) -> torch.Tensor:
    """z + gate · (W v + b); gate [B, 1 or T, 1] or a constant. `own`: nobody else reads z, so that it may be written to outside of training."""
    dtype = narrow_BTR.dtype
    if _computes(z_BTD, linear) != dtype:
        wide_BTD = linear(narrow_BTR).to(z_BTD.dtype)
        return (
            z_BTD.add(wide_BTD, alpha=gate)
            if isinstance(gate, float)
            else torch.addcmul(z_BTD, wide_BTD, gate.to(z_BTD.dtype))
        )
    gate_BT1 = (
        gate.to(dtype) if isinstance(gate, torch.Tensor) else narrow_BTR.new_full((1, 1, 1), gate)
    )
    return _Add.run(
        z_BTD,
        gate_BT1 * narrow_BTR,
        gate_BT1,
        linear.weight,
        linear.bias,
        own and not torch.is_grad_enabled(),
    )
