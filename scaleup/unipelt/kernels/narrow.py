"""Matrix products with one narrow side, which cost about as much as reading the wide side.

    narrow_products    x [W₁; W₂; …]ᵀ     all maps of one input as one product
    add_lora           result + W v       v is multiplied by the gate before it gets wide
    add_gated          z + g (W v + b)
    few_rows           x Wᵀ + b           few rows and a wide W, as in the MLP of the prefix

At the sizes of a backbone these products take the time of reading and writing [B, T, D]; their
arithmetic is negligible. The gradients are written out, because autograd's would copy [B, T, D] for
each product, multiply in the slow direction and add one operation per view (docs/performance.md).
Under autocast the products have its dtype, and weights that are joined are cast together, because a
step of a small model on a GPU takes as long as its list of kernels.

Shapes: B examples, T tokens, M = B·T, D wide, R narrow, L few rows.
"""

import types
from typing import Any

import torch
from torch import nn

FEW_ROWS = 32  # with fewer rows, (W xᵀ)ᵀ is faster than x Wᵀ on a CPU
FEW_COLUMNS = 4  # with fewer columns, (Wᵀ xᵀ)ᵀ is up to four times as fast as x W in BLAS


class NoGradients:
    """A stand-in for autograd's context where no gradient is needed."""

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        """Keep nothing."""

    def set_materialize_grads(self, value: bool) -> None:
        """Do nothing, because there will be no gradients."""


class HandWritten(torch.autograd.Function):
    """An autograd function with a method that skips autograd where no gradient is needed."""

    @classmethod
    def run(cls, *args: Any) -> Any:
        """Return the result of `forward`, with gradients if they are enabled."""
        if not torch.is_grad_enabled():
            return cls.forward(NoGradients(), *args)
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return cls.apply(*args)
        # `apply` does only this where no transform is active, after looking at every argument.
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]

    @staticmethod
    def refuse_second_derivatives() -> None:
        """Raise RuntimeError where `backward` is to be differentiated. Call this first in it.

        What was saved is no longer connected with the inputs, so the result would be wrong. torch's
        once_differentiable misses some of these cases.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "UniPELT's layers have no second derivatives; leave out create_graph=True"
            )


def _product_dtype(wide: torch.Tensor, *linears: nn.Module) -> torch.dtype | None:
    """Return the dtype in which to multiply: autocast's, or else the one that all tensors have.

    Returns:
        None if each layer must be called by itself: a layer is not torch's own, dtypes differ, a
        compiler is at work, which fuses the plain formulas, or DeepSpeed has replaced torch's
        linear function, because it gathers weights around the call of a layer (ZeRO-3).
    """
    if (
        torch.compiler.is_compiling()
        or not isinstance(nn.functional.linear, types.BuiltinFunctionType)
        or not wide.is_contiguous()
    ):
        return None
    device = wide.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    allowed = (wide.dtype,) if autocast is None else (autocast, torch.float32)
    for linear in linears:
        if not isinstance(linear, nn.Linear) or linear.weight.dtype not in allowed:
            return None
    if autocast is None:
        return wide.dtype
    return autocast if wide.dtype in allowed else None


def _multiply(x_MD: torch.Tensor, weight_DR: torch.Tensor) -> torch.Tensor:
    """Return x W, [M, R]."""
    if weight_DR.shape[1] < FEW_COLUMNS:
        return (weight_DR.t() @ x_MD.t()).t()
    # On a CPU, copying the small matrix costs less than reading it across its rows.
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
        """Return x [W₁; W₂; …]ᵀ for each group; `groups` holds their numbers of weights."""
        x_MD, remaining = x_BTD.flatten(0, -2).to(dtype), list(weights_RD)
        joined, products = [], []
        ctx.shape, ctx.sizes, ctx.dtypes = x_BTD.shape, [], (x_BTD.dtype, weights_RD[0].dtype)
        for count in groups:
            group, remaining = remaining[:count], remaining[count:]
            joined.append((torch.cat(group) if count > 1 else group[0]).to(dtype))
            ctx.sizes.append([len(weight_RD) for weight_RD in group])
            products.append(_multiply(x_MD, joined[-1].t()).unflatten(0, ctx.shape[:-1]))
        ctx.save_for_backward(x_MD, *joined)
        return tuple(products)

    @staticmethod
    def backward(ctx: Any, *grads_BTR: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        HandWritten.refuse_second_derivatives()
        x_MD, *joined = ctx.saved_tensors
        grad_MD: torch.Tensor | None = None
        grad_weights: list[torch.Tensor] = []
        for grad_BTR, weight_RD, sizes in zip(grads_BTR, joined, ctx.sizes):
            grad_MR = grad_BTR.flatten(0, -2)
            if ctx.needs_input_grad[0] and grad_MD is None:
                grad_MD = grad_MR @ weight_RD
            elif grad_MD is not None:
                grad_MD.addmm_(grad_MR, weight_RD)
            grad_weights += (grad_MR.t() @ x_MD).to(ctx.dtypes[1]).split_with_sizes(sizes)
        grad_x = None if grad_MD is None else grad_MD.to(ctx.dtypes[0]).view(ctx.shape)
        return grad_x, None, None, *grad_weights


def narrow_products(x_BTD: torch.Tensor, *groups: list[nn.Linear]) -> list[torch.Tensor] | None:
    """Multiply one input by several groups of linear maps, without their biases.

    Returns:
        The products of each group side by side, [B, T, R]. None if each layer must be called by
        itself, see `_product_dtype`.
    """
    linears = [linear for group in groups for linear in group]
    dtype = _product_dtype(x_BTD, *linears)
    if dtype is None or len({linear.weight.dtype for linear in linears}) > 1:
        return None
    sizes = [len(group) for group in groups]
    return list(_Narrow.run(x_BTD, dtype, sizes, *(linear.weight for linear in linears)))


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
    """Return x Wᵀ + b, [L, R], faster than the layer's own call if x has few rows."""
    x_LD = x_LD.contiguous()
    if (
        len(x_LD) >= FEW_ROWS
        or x_LD.device.type != "cpu"
        or not x_LD.dtype == linear.weight.dtype == _product_dtype(x_LD, linear)
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

        The product has the dtype of v. Without a bias, gate_BT1 and bias_D are None.
        """
        dtype, ctx.dtype = v_BTR.dtype, weight_DR.dtype
        ctx.shapes = v_BTR.shape, None if gate_BT1 is None else gate_BT1.shape
        v_MR, weight_DR = v_BTR.flatten(0, -2), weight_DR.to(dtype)
        gate_M1 = None
        if bias_D is not None:
            assert gate_BT1 is not None
            gate_M1 = gate_BT1.expand(*v_BTR.shape[:-1], 1).reshape(-1, 1)
            bias_D = bias_D.to(dtype)
        ctx.save_for_backward(v_MR, gate_M1, weight_DR, bias_D)
        same_dtype = result_BTD.dtype == dtype
        if in_place and same_dtype:
            # Detached, because autograd would copy every gradient of a changed view. An operation
            # that saved `result` still notices in its backward pass that the version changed.
            out_BTD = result_BTD.detach()
            out_MD = out_BTD.view(-1, out_BTD.shape[-1]).addmm_(v_MR, weight_DR.t())
        elif same_dtype:
            out_MD = torch.addmm(result_BTD.flatten(0, -2), v_MR, weight_DR.t())
            out_BTD = out_MD.view_as(result_BTD)
        else:
            out_MD = v_MR @ weight_DR.t()
            out_BTD = out_MD.view_as(result_BTD)
        if gate_M1 is not None and bias_D is not None:
            out_MD.addmm_(gate_M1, bias_D.unsqueeze(0))
        return out_BTD if same_dtype else result_BTD + out_BTD

    @staticmethod
    def backward(ctx: Any, grad_BTD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        HandWritten.refuse_second_derivatives()
        v_MR, gate_M1, weight_DR, bias_D = ctx.saved_tensors
        shape, gate_shape = ctx.shapes
        grad_MD = grad_BTD.flatten(0, -2).to(v_MR.dtype)
        grad_gate = grad_bias = None
        if bias_D is not None:
            if ctx.needs_input_grad[2]:
                grad_gate = (grad_MD @ bias_D).view(*shape[:-1], 1).sum_to_size(gate_shape)
            grad_bias = (gate_M1.t() @ grad_MD).squeeze(0).to(ctx.dtype)
        # BLAS is slower the other way round. A weight takes a gradient without a copy only if both
        # have the same memory layout.
        grad_weight = (v_MR.t() @ grad_MD).t().to(ctx.dtype, memory_format=torch.contiguous_format)
        grad_v = _multiply(grad_MD, weight_DR).view(shape)
        return grad_BTD, grad_v, grad_gate, grad_weight, grad_bias, None


def scaled(gate: torch.Tensor | float, narrow_BTR: torch.Tensor) -> torch.Tensor:
    """Return gate · narrow in the dtype of `narrow`; the gate is [B, 1 or T, 1] or a constant."""
    return (gate.to(narrow_BTR.dtype) if isinstance(gate, torch.Tensor) else gate) * narrow_BTR


def add_lora(
    result_BTD: torch.Tensor, v_BTR: torch.Tensor, linear: nn.Module, may_overwrite: bool
) -> torch.Tensor:
    """Return result + W v.

    Args:
        result_BTD: output of a projection.
        v_BTR: the gated narrow side.
        linear: the layer of W.
        may_overwrite: whether `result_BTD` may hold the result.
    """
    if (
        not may_overwrite
        or v_BTR.dtype != result_BTD.dtype
        or _product_dtype(result_BTD, linear) != v_BTR.dtype
    ):
        return result_BTD + linear(v_BTR)
    return _Add.run(result_BTD, v_BTR, None, linear.weight, None, True)


def add_gated(
    z_BTD: torch.Tensor,
    narrow_BTR: torch.Tensor,
    gate: torch.Tensor | float,
    linear: nn.Linear,
    may_overwrite: bool,
) -> torch.Tensor:
    """Return z + gate · (W v + b).

    Args:
        z_BTD: z.
        narrow_BTR: v.
        gate: [B, 1 or T, 1] or a constant.
        linear: the layer of W and b.
        may_overwrite: whether z may hold the result where no gradient is needed.
    """
    dtype = narrow_BTR.dtype
    if _product_dtype(z_BTD, linear) != dtype:
        wide_BTD = linear(narrow_BTR).to(z_BTD.dtype)
        if isinstance(gate, float):
            return z_BTD.add(wide_BTD, alpha=gate)
        return torch.addcmul(z_BTD, wide_BTD, gate.to(z_BTD.dtype))
    if isinstance(gate, torch.Tensor):
        gate_BT1 = gate.to(dtype)
    else:
        gate_BT1 = narrow_BTR.new_full((1, 1, 1), gate)
    v_BTR = gate_BT1 * narrow_BTR
    in_place = may_overwrite and not torch.is_grad_enabled()
    return _Add.run(z_BTD, v_BTR, gate_BT1, linear.weight, linear.bias, in_place)
