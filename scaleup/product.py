"""Products with a narrow side, as the gates, LoRA and the adapter have them, near the cost of reading what is wide.

    narrow   x Wᵀ                            few columns: computed as (W xᵀ)ᵀ, which BLAS does up to four times as fast
    add      result + W v                    written over `result`, the output of a frozen linear layer
    add      z + gate · (W v + b)            the gate scales the narrow side, whose gradient is a narrow product too

At the sizes of a backbone these take the time of reading and writing [B, T, D]; the arithmetic is nothing beside it. Gradients are written
out, because autograd's own copy [B, T, D] for each and multiply in the slow direction (docs/performance.md).

Shapes: B examples, T tokens, M = B·T, D wide, R narrow.
"""

import types

import torch
from torch import nn


def _plain(linear: nn.Module, wide: torch.Tensor) -> bool:
    """Whether `linear` is torch's own, types are one, and nothing converts or compiles on the way. Under ZeRO-3 DeepSpeed replaces torch's linear
    function, gathers weights around a layer's call, and gives views that must not be changed. A compiler fuses the formulas by itself."""
    own = isinstance(linear, nn.Linear) and isinstance(nn.functional.linear, types.BuiltinFunctionType) and not torch.compiler.is_compiling()
    return own and wide.dtype == linear.weight.dtype and wide.is_contiguous() and not torch.is_autocast_enabled(wide.device.type)


class _Narrow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MD: torch.Tensor, weight_RD: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_MD, weight_RD)
        return (weight_RD @ x_MD.t()).t()

    @staticmethod
    def backward(ctx, grad_MR: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_MD, weight_RD = ctx.saved_tensors
        return (grad_MR @ weight_RD if ctx.needs_input_grad[0] else None, grad_MR.t() @ x_MD if ctx.needs_input_grad[1] else None)


def narrow_products(x_BTD: torch.Tensor, linears: list[nn.Linear]) -> list[torch.Tensor] | None:
    """x Wᵀ, [B, T, R], of each linear layer, without biases, as one product; None where each must be called by itself."""
    if not all(_plain(linear, x_BTD) for linear in linears):
        return None
    weight_RD = torch.cat([linear.weight for linear in linears]) if len(linears) > 1 else linears[0].weight
    joined_BTR = _Narrow.apply(x_BTD.flatten(0, -2), weight_RD).unflatten(0, x_BTD.shape[:-1])
    return list(joined_BTR.split([linear.out_features for linear in linears], dim=-1))


class _AddProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, wide_MD: torch.Tensor, narrow_MR: torch.Tensor, weight_DR: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(narrow_MR, weight_DR)
        # Behind autograd's back, which would copy every gradient of a changed view; whoever had saved `wide` finds its version changed.
        return wide_MD.detach().addmm_(narrow_MR, weight_DR.t())

    @staticmethod
    def backward(ctx, grad_MD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        narrow_MR, weight_DR = ctx.saved_tensors
        return (
            grad_MD,
            grad_MD @ weight_DR if ctx.needs_input_grad[1] else None,
            (narrow_MR.t() @ grad_MD).t() if ctx.needs_input_grad[2] else None,
        )


def add_product(result_BTD: torch.Tensor, narrow_BTR: torch.Tensor, linear: nn.Module, projection: nn.Module) -> torch.Tensor:
    """result + W v, without a bias; `result` is the output of the frozen `projection`, which does not need it again: it is written to.

    Not where the projection is quantised: its output may be a view that must not be changed.
    """
    if type(projection) is not nn.Linear or narrow_BTR.dtype != result_BTD.dtype or not _plain(linear, result_BTD):
        return result_BTD + linear(narrow_BTR)
    rows = _AddProduct.apply(result_BTD.flatten(0, -2), narrow_BTR.flatten(0, -2), linear.weight)
    return rows.view_as(result_BTD)


class _AddGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_BTD, narrow_BTR, weight_DR, bias_D, gate_BT1, in_place: bool) -> torch.Tensor:
        gated_MR, gate_M1 = (gate_BT1 * narrow_BTR).flatten(0, -2), gate_BT1.expand(*narrow_BTR.shape[:-1], 1).reshape(-1, 1)
        ctx.save_for_backward(narrow_BTR, gated_MR, weight_DR, bias_D, gate_BT1, gate_M1)
        z_MD = z_BTD.flatten(0, -2)
        out_MD = z_MD.addmm_(gated_MR, weight_DR.t()) if in_place else torch.addmm(z_MD, gated_MR, weight_DR.t())
        return out_MD.addmm_(gate_M1, bias_D.unsqueeze(0)).view_as(z_BTD)

    @staticmethod
    def backward(ctx, grad_BTD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        narrow_BTR, gated_MR, weight_DR, bias_D, gate_BT1, gate_M1 = ctx.saved_tensors
        grad_MD = grad_BTD.flatten(0, -2)
        grad_gated_BTR = (grad_MD @ weight_DR).view_as(narrow_BTR)
        grad_gate = None
        if ctx.needs_input_grad[4]:
            per_token_BT1 = (grad_gated_BTR * narrow_BTR).sum(-1, keepdim=True) + (grad_MD @ bias_D).view_as(narrow_BTR[..., :1])
            grad_gate = per_token_BT1.sum_to_size(gate_BT1.shape)
        grad_weight, grad_bias = (gated_MR.t() @ grad_MD).t(), (gate_M1.t() @ grad_MD).squeeze(0)
        return grad_BTD, gate_BT1 * grad_gated_BTR, grad_weight, grad_bias, grad_gate, None


def add_gated(z_BTD: torch.Tensor, narrow_BTR: torch.Tensor, linear: nn.Linear, gate: torch.Tensor | float, own: bool) -> torch.Tensor:
    """z + gate · (W v + b); gate [B, 1 or T, 1] or a constant. `own`: nobody else reads z, so that it may be written to outside of training."""
    if narrow_BTR.dtype != z_BTD.dtype or not _plain(linear, z_BTD):
        wide_BTD = linear(narrow_BTR).to(z_BTD.dtype)
        return z_BTD.add(wide_BTD, alpha=gate) if isinstance(gate, float) else torch.addcmul(z_BTD, wide_BTD, gate.to(z_BTD.dtype))
    gate_BT1 = gate.to(narrow_BTR.dtype) if isinstance(gate, torch.Tensor) else narrow_BTR.new_full((1, 1, 1), gate)
    return _AddGated.apply(z_BTD, narrow_BTR, linear.weight, linear.bias, gate_BT1, own and not torch.is_grad_enabled())
