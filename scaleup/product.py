"""Products of small linear layers that are added to something large, without a large tensor in between.

    result + gate · (W v + b)  =  addmm(result, [gate v, gate], [W, b]ᵀ)

At the sizes of a backbone the time of these sums is the time of reading and writing [B, T, D]; the arithmetic is nothing beside it. The gate
scales the narrow side, whose gradient is a narrow product too.

Shapes: B examples, T tokens, D wide, R narrow.
"""

import types

import torch
from torch import nn


def _plain(linear: nn.Module, wide: torch.Tensor, narrow: torch.Tensor) -> bool:
    """Whether `linear` is torch's own, all types are one, and nothing converts them on the way. Under ZeRO-3 DeepSpeed replaces torch's linear
    function, gathers weights around a layer's call, and gives views that must not be changed."""
    own = type(linear) is nn.Linear and isinstance(nn.functional.linear, types.BuiltinFunctionType)
    return own and wide.dtype == narrow.dtype == linear.weight.dtype and wide.is_contiguous() and not torch.is_autocast_enabled(wide.device.type)


def add_product(result_BTD: torch.Tensor, narrow_BTR: torch.Tensor, linear: nn.Module, projection: nn.Module) -> torch.Tensor:
    """result + W v, without a bias; `result` is the output of the frozen `projection`.

    Without gradients in place where types allow: a linear layer does not need its output again. With them that would be slower: the output is a
    view, and a change of a view has autograd copy every gradient. Quantised layers return views that must not be changed.
    """
    if type(projection) is not nn.Linear or not _plain(linear, result_BTD, narrow_BTR):
        return result_BTD + linear(narrow_BTR)
    rows, narrow, weight_RD = result_BTD.flatten(0, -2), narrow_BTR.flatten(0, -2), linear.weight.t()
    if torch.is_grad_enabled():
        return torch.addmm(rows, narrow, weight_RD).view_as(result_BTD)
    rows.addmm_(narrow, weight_RD)
    return result_BTD


def add_gated(z_BTD: torch.Tensor, narrow_BTR: torch.Tensor, linear: nn.Linear, gate: torch.Tensor | float, own: bool) -> torch.Tensor:
    """z + gate · (W v + b); gate [B, 1 or T, 1] or a constant. `own`: nobody else reads z, so that it may be written to outside of training."""
    if not _plain(linear, z_BTD, narrow_BTR):
        wide_BTD = linear(narrow_BTR).to(z_BTD.dtype)
        return z_BTD.add(wide_BTD, alpha=gate) if isinstance(gate, float) else torch.addcmul(z_BTD, wide_BTD, gate.to(z_BTD.dtype))
    if isinstance(gate, float):
        gated_BTR, ones_BT1 = gate * narrow_BTR if gate != 1.0 else narrow_BTR, narrow_BTR.new_full((*narrow_BTR.shape[:-1], 1), gate)
    else:
        gate = gate.to(narrow_BTR.dtype)
        gated_BTR, ones_BT1 = gate * narrow_BTR, gate.expand(*narrow_BTR.shape[:-1], 1)
    weight_DR1 = torch.cat([linear.weight, linear.bias.unsqueeze(1)], dim=1)
    rows = torch.cat([gated_BTR, ones_BT1], dim=-1).flatten(0, -2)
    if own and not torch.is_grad_enabled():
        z_BTD.flatten(0, -2).addmm_(rows, weight_DR1.t())
        return z_BTD
    return torch.addmm(z_BTD.flatten(0, -2), rows, weight_DR1.t()).view_as(z_BTD)
