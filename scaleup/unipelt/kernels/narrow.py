"""Products with a narrow side, as gates, LoRA and the adapter have them.

    narrow_products   x [W₁; W₂; …]ᵀ for linear maps that read one input, as one product
    add_lora          result + W v
    add_gated         z + g (W v + b); the gate scales the narrow side
    few_rows          x Wᵀ + b for few rows and a wide W, as in the prefix MLP

At the sizes of a backbone, these products take the time of reading and writing [B, T, D]; their
arithmetic is negligible. Gradients are written out, because those of autograd copy [B, T, D] for
each product, multiply in the slow direction and take a step for every view (docs/performance.md).
Under autocast, products are computed in its dtype, and weights that are joined are cast as one,
because on a GPU the number of kernels decides how long a step of a small model takes.

Shapes: B examples, T tokens, M = B·T, D wide, R narrow, L rows.
"""

import types
from typing import Any

import torch
from torch import nn

# Below these numbers BLAS computes (W xᵀ)ᵀ up to four times as fast as x Wᵀ.
FEW_ROWS = 32
FEW_COLUMNS = 4


class NoGradients:
    """A context for `forward` where no gradient is wanted."""

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        """Do nothing."""


class HandWritten(torch.autograd.Function):
    """A function with explicit gradients."""

    @classmethod
    def run(cls, *args: object) -> Any:
        """Return `apply(*args)`, without the work of autograd where no gradient is wanted."""
        return cls.apply(*args) if torch.is_grad_enabled() else cls.forward(NoGradients(), *args)


def _computes(wide: torch.Tensor, *linears: nn.Module) -> torch.dtype | None:
    """Return the dtype of the products, or None if each layer must be called by itself.

    Products are in autocast's dtype, or in the one that input and weights share. Layers are called
    by themselves if some are not torch's own, if dtypes differ, or if a compiler is at work, which
    fuses the plain formulas. The same holds under ZeRO-3, where DeepSpeed replaces torch's linear
    function: it gathers weights around a layer's call and returns views that must not be changed.
    """
    if (
        torch.compiler.is_compiling()
        or not isinstance(nn.functional.linear, types.BuiltinFunctionType)
        or not wide.is_contiguous()
    ):
        return None
    dtype, kind = wide.dtype, wide.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    allowed = (dtype,) if autocast is None else (autocast, torch.float32)
    for linear in linears:
        if not isinstance(linear, nn.Linear) or linear.weight.dtype not in allowed:
            return None
    if autocast is None:
        return dtype
    return autocast if dtype in allowed else None


def _narrow(x_MD: torch.Tensor, weight_DR: torch.Tensor) -> torch.Tensor:
    """Return x W, [M, R]."""
    if weight_DR.shape[1] < FEW_COLUMNS:
        return (weight_DR.t() @ x_MD.t()).t()
    # On a CPU, copying the small matrix takes less time than reading it across.
    return x_MD @ (weight_DR.contiguous() if x_MD.device.type == "cpu" else weight_DR)


class _Narrow(HandWritten):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTD: torch.Tensor,
        dtype: torch.dtype,
        groups: list[int],
        *weights_RD: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        x_MD, rest = x_BTD.flatten(0, -2).to(dtype), list(weights_RD)
        joined, products = [], []
        ctx.shape, ctx.sizes, ctx.types = x_BTD.shape, [], (x_BTD.dtype, weights_RD[0].dtype)
        for count in groups:
            group, rest = rest[:count], rest[count:]
            joined.append((torch.cat(group) if count > 1 else group[0]).to(dtype))
            ctx.sizes.append([len(weight_RD) for weight_RD in group])
            products.append(_narrow(x_MD, joined[-1].t()).unflatten(0, ctx.shape[:-1]))
        ctx.save_for_backward(x_MD, *joined)
        return tuple(products)

    @staticmethod
    def backward(ctx: Any, *grads_BTR: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
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
    """Compute the linear maps of one input, without biases.

    Args:
        x_BTD: input.
        groups: linear layers; each group becomes one product.

    Returns:
        x [W₁; W₂; …]ᵀ for each group, [B, T, R of all its layers], or None if the layers must be
        called by themselves.
    """
    linears = [linear for group in groups for linear in group]
    dtype = _computes(x_BTD, *linears)
    if dtype is None or len({linear.weight.dtype for linear in linears}) > 1:
        return None
    counts = [len(group) for group in groups]
    return list(_Narrow.run(x_BTD, dtype, counts, *(linear.weight for linear in linears)))


class _FewRows(HandWritten):
    @staticmethod
    def forward(
        ctx: Any, x_LD: torch.Tensor, weight_RD: torch.Tensor, bias_R: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x_LD, weight_RD)
        return torch.addmm(bias_R.unsqueeze(1), weight_RD, x_LD.t()).t()

    @staticmethod
    def backward(ctx: Any, grad_LR: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x_LD, weight_RD = ctx.saved_tensors
        return grad_LR @ weight_RD, grad_LR.t() @ x_LD, grad_LR.sum(dim=0)


def few_rows(x_LD: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    """Return x Wᵀ + b, [L, R]."""
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
        ctx: Any,
        result_BTD: torch.Tensor,
        v_BTR: torch.Tensor,
        gate_BT1: torch.Tensor | None,
        weight_DR: torch.Tensor,
        bias_D: torch.Tensor | None,
        in_place: bool,
    ) -> torch.Tensor:
        """Return result + W v + gate · b, [B, T, D], in the dtype of `result`.

        Args:
            gate_BT1, bias_D: None if there is no bias.
            in_place: whether `result` may be written to.
        """
        dtype, ctx.type = v_BTR.dtype, weight_DR.dtype
        ctx.shapes = (v_BTR.shape, None if gate_BT1 is None else gate_BT1.shape)
        v_MR, weight_DR = v_BTR.flatten(0, -2), weight_DR.to(dtype)
        gate_M1 = None
        if bias_D is not None and gate_BT1 is not None:
            gate_M1 = gate_BT1.expand(*v_BTR.shape[:-1], 1).reshape(-1, 1)
            bias_D = bias_D.to(dtype)
        ctx.save_for_backward(v_MR, gate_M1, weight_DR, bias_D)
        same = result_BTD.dtype == dtype
        if in_place and same:
            # Detached, because autograd would copy every gradient of a changed view. The version of
            # `result` still changes, so a function that has saved it raises an error.
            out_BTD = result_BTD.detach()
            out_MD = out_BTD.view(-1, out_BTD.shape[-1]).addmm_(v_MR, weight_DR.t())
        else:
            if same:
                out_MD = torch.addmm(result_BTD.flatten(0, -2), v_MR, weight_DR.t())
            else:
                out_MD = v_MR @ weight_DR.t()
            out_BTD = out_MD.view_as(result_BTD)
        if bias_D is not None and gate_M1 is not None:
            out_MD.addmm_(gate_M1, bias_D.unsqueeze(0))
        return out_BTD if same else result_BTD + out_BTD

    @staticmethod
    def backward(ctx: Any, grad_BTD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of result, v, gate, W and b."""
        v_MR, gate_M1, weight_DR, bias_D = ctx.saved_tensors
        shape, gate_shape = ctx.shapes
        grad_gate = grad_bias = None
        grad_MD = grad_BTD.flatten(0, -2).to(v_MR.dtype)
        if bias_D is not None:
            if ctx.needs_input_grad[2]:
                grad_gate = (grad_MD @ bias_D).view(*shape[:-1], 1).sum_to_size(gate_shape)
            grad_bias = (gate_M1.t() @ grad_MD).squeeze(0).to(ctx.type)
        # The opposite order is slower in BLAS. A weight takes its gradient without a copy only if
        # both have the same layout.
        grad_weight = (v_MR.t() @ grad_MD).t().to(ctx.type, memory_format=torch.contiguous_format)
        grad_v = _narrow(grad_MD, weight_DR).view(shape)
        return grad_BTD, grad_v, grad_gate, grad_weight, grad_bias, None


def scaled(gate: torch.Tensor | float, narrow_BTR: torch.Tensor) -> torch.Tensor:
    """Return gate · narrow in the dtype of `narrow`; the gate is [B, 1 or T, 1] or a constant."""
    return (gate.to(narrow_BTR.dtype) if isinstance(gate, torch.Tensor) else gate) * narrow_BTR


def add_lora(
    result_BTD: torch.Tensor, v_BTR: torch.Tensor, linear: nn.Module, projection: nn.Module
) -> torch.Tensor:
    """Return result + W v, written into `result` if possible.

    Args:
        result_BTD: output of the frozen projection, which does not need it for its gradient. That
            of a quantised projection may be a view that must not be changed, so it is left as it
            is.
        v_BTR: the gated low-rank product.
        linear: the layer with W.
        projection: the frozen projection.
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
    """Return z + gate · (W v + b).

    Args:
        z_BTD: the value to add to.
        narrow_BTR: v.
        gate: [B, 1 or T, 1] or a constant.
        linear: the layer with W and b.
        own: whether nothing else reads z, so that it may be written to outside of training.
    """
    dtype = narrow_BTR.dtype
    if _computes(z_BTD, linear) != dtype:
        wide_BTD = linear(narrow_BTR).to(z_BTD.dtype)
        if isinstance(gate, torch.Tensor):
            return torch.addcmul(z_BTD, wide_BTD, gate.to(z_BTD.dtype))
        return z_BTD.add(wide_BTD, alpha=gate)
    if isinstance(gate, torch.Tensor):
        gate_BT1 = gate.to(dtype)
    else:
        gate_BT1 = narrow_BTR.new_full((1, 1, 1), gate)
    v_BTR, in_place = gate_BT1 * narrow_BTR, own and not torch.is_grad_enabled()
    return _Add.run(z_BTD, v_BTR, gate_BT1, linear.weight, linear.bias, in_place)
