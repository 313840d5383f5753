"""The fast path's products at a site, with their gradients written out.

    narrow_site     x → the gate that is handed out, and gated narrow columns v
    add_product     result + v W_outᵀ
    bottleneck      z + G adapter(n), with the norms before and after it if they are frozen

Everything narrow at a site is one matrix product and one kernel in each direction. The weights are
those of a `PackedSite`. Their gradients are added to its buffers, so autograd sees no weights here:
the functions depend on the anchor instead, see `workspace.py`.

Shapes: B examples, T tokens, M = B·T, D wide, H heads, R narrow columns, V columns of v.
"""

from typing import Any

import torch

from . import ops
from .narrow import HandWritten
from .workspace import Lease, PackedSite, refuse_double_backward

Tensor = torch.Tensor
aten = torch.ops.aten


def _collects(ctx: Any) -> bool:
    """Return whether the running backward pass will reach the parameters through the anchor."""
    pack = ctx.pack
    return pack is not None and torch._C._will_engine_execute_node(pack)


def _keep(ctx: Any, anchor: Tensor | None, lease: Lease, site: PackedSite) -> None:
    ctx.pack = None if anchor is None else anchor.grad_fn
    ctx.lease, ctx.site = lease, site
    ctx.set_materialize_grads(False)


def _narrow(
    x_MD: Tensor, site: PackedSite, shape: torch.Size, mask_BT: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x in the dtype of the weights, z [B, T, W], v [B, T, V] and the gates [B, ·, N]."""
    weight_t = site.weight_in_t
    if x_MD.dtype is not weight_t.dtype:
        x_MD = x_MD.to(weight_t.dtype)
    z_BTW = torch.mm(x_MD, weight_t).view(*shape[:2], weight_t.shape[1])
    v_BTV, gates = ops.narrow_forward(
        z_BTW,
        site.bias,
        site.scales,
        mask_BT,
        site.selected,
        site.causal,
        site.activation,
        site.ones_column,
        site.width,
    )
    return x_MD, z_BTW, v_BTV, gates


def _gates_backward(
    ctx: Any,
    z_BTW: Tensor,
    gates: Tensor,
    mask_BT: Tensor | None,
    grads_v: list[Tensor],
    grad_gate_BHT: Tensor | None,
    grad_gates_BTN: Tensor | None,
    collects: bool,
) -> Tensor:
    """Return the gradient of z, [M, W]. `grad_gates_BTN` is that of all gates, if it is known."""
    site, workspace, batch = ctx.site, ctx.lease.workspace, len(z_BTW)
    if collects:
        workspace.reached.add(site)
        grad_bias_BC = workspace.bias_grad(site, batch)
    else:
        grad_bias_BC = site.bias.new_zeros(batch, len(site.bias))

    def backward(parts: list[Tensor], grad_gate: Tensor | None, gate: int) -> Tensor:
        return ops.narrow_backward(
            z_BTW,
            site.bias,
            site.scales,
            mask_BT,
            gates,
            parts,
            grad_gate,
            grad_bias_BC,
            site.selected,
            gate,
            site.causal,
            site.activation,
            site.ones_column,
        )

    grad_BTW = backward(grads_v, grad_gate_BHT, site.handed_out)
    if grad_gates_BTN is not None:  # a later pass has used the totals in the KV cache
        assert site.causal
        zeros = [torch.zeros_like(grad) for grad in grads_v]
        for gate, grad_BT in enumerate(grad_gates_BTN.unbind(dim=2)):
            grad_BTW += backward(zeros, grad_BT.unsqueeze(1), gate)
    return grad_BTW.view(-1, z_BTW.shape[2])


class _NarrowSite(HandWritten):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTD: Tensor,
        anchor: Tensor | None,
        lease: Lease,
        site: PackedSite,
        mask_BT: Tensor | None,
        heads: int,
        ranks: list[int],
        with_gates: bool,
    ) -> tuple[Tensor, ...]:
        batch, tokens, width = x_BTD.shape
        mask_BT = mask_BT if site.masked else None
        x_MD, z_BTW, v_BTV, gates = _narrow(x_BTD.reshape(-1, width), site, x_BTD.shape, mask_BT)
        _keep(ctx, anchor, lease, site)
        ctx.save_for_backward(x_MD, z_BTW, gates, mask_BT)
        ctx.shape, ctx.dtype, ctx.ranks = x_BTD.shape, x_BTD.dtype, ranks
        results = []
        if heads:
            columns = gates.shape[2]
            strides = (gates.shape[1] * columns, 0, columns if site.causal else 0)
            results = [gates.as_strided((batch, heads, tokens), strides, site.handed_out)]
        v_MV, at = v_BTV.view(-1, site.width), 0
        for rank in ranks:
            results.append(v_MV[:, at : at + rank])
            at += rank
        ctx.handed_out, ctx.with_gates = bool(heads), with_gates
        return (*results, gates) if with_gates else tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        x_MD, z_BTW, gates, mask_BT = ctx.saved_tensors
        grad_gates_BTN = grads[-1] if ctx.with_gates else None
        grad_gate_BHT = grads[0] if ctx.handed_out else None
        grads_v = [
            x_MD.new_zeros(len(x_MD), rank) if grad is None else grad.contiguous()
            for grad, rank in zip(grads[ctx.handed_out :], ctx.ranks)
        ]
        collects = _collects(ctx)
        grad_MW = _gates_backward(
            ctx, z_BTW, gates, mask_BT, grads_v, grad_gate_BHT, grad_gates_BTN, collects
        )
        if collects:
            ctx.site.grad_in.addmm_(grad_MW.t(), x_MD)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad_MW, ctx.site.weight_in).view(ctx.shape)
            grad_x = grad_x if grad_x.dtype is ctx.dtype else grad_x.to(ctx.dtype)
        return grad_x, None, None, None, None, None, None, None


def narrow_site(
    x_BTD: Tensor,
    anchor: Tensor | None,
    lease: Lease,
    site: PackedSite,
    mask_BT: Tensor | None,
    heads: int,
    ranks: list[int],
    sink: list[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Evaluate the gates of a site and its gated narrow columns.

    Args:
        x_BTD: input of the site.
        anchor: result of `Pack`; None if no weight gets a gradient.
        lease: the workspace of the pass.
        site: the matrices of the site.
        mask_BT: 1 at real tokens; None if all are real.
        heads: H, or 0 to hand out no gate.
        ranks: numbers of consecutive columns of v to return separately.
        sink: takes all gates [B, 1 or T, N].

    Returns:
        The gate to hand out as an expanded view [B, H, T] in float32, if H > 0, and v [M, ·] for
        each of the `ranks`.
    """
    results: tuple[Tensor, ...] = _NarrowSite.run(
        x_BTD, anchor, lease, site, mask_BT, heads, ranks, sink is not None
    )
    if sink is not None:
        *results, gates = results  # type: ignore[assignment]
        sink.append(gates)
    return results


class _AddProduct(HandWritten):
    @staticmethod
    def forward(
        ctx: Any,
        result: Tensor,
        v_MR: Tensor,
        anchor: Tensor | None,
        lease: Lease,
        site: PackedSite,
        in_place: bool,
    ) -> Tensor:
        _keep(ctx, anchor, lease, site)
        ctx.save_for_backward(v_MR)
        weight_t = site.weight_out_t
        if result.dtype is not v_MR.dtype:
            return result + torch.mm(v_MR, weight_t).view(result.shape)
        if in_place:
            # Detached, because autograd would copy every gradient of a changed view. An operation
            # that saved `result` still notices in its backward pass that the version changed.
            out = result.detach()
            out.view(-1, out.shape[-1]).addmm_(v_MR, weight_t)
            return out
        return torch.addmm(result.reshape(-1, result.shape[-1]), v_MR, weight_t).view(result.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        (v_MR,) = ctx.saved_tensors
        if grad is None:
            return None, None, None, None, None, None
        grad_MO = grad.reshape(-1, grad.shape[-1])
        if grad_MO.dtype is not v_MR.dtype:
            grad_MO = grad_MO.to(v_MR.dtype)
        if _collects(ctx):
            ctx.lease.workspace.reached.add(ctx.site)
            ctx.site.grad_out.addmm_(grad_MO.t(), v_MR)
        grad_v = torch.mm(grad_MO, ctx.site.weight_out) if ctx.needs_input_grad[1] else None
        return grad, grad_v, None, None, None, None


def add_product(
    result: Tensor,
    v_MR: Tensor,
    anchor: Tensor | None,
    lease: Lease,
    site: PackedSite,
    in_place: bool,
) -> Tensor:
    """Return result + v W_outᵀ.

    Args:
        result: output of a projection, [..., out].
        v_MR: gated narrow columns of its tokens, from `narrow_site`.
        anchor, lease, site: as for `narrow_site`.
        in_place: whether the result may be overwritten.
    """
    return _AddProduct.run(result, v_MR, anchor, lease, site, in_place)


class _Bottleneck(HandWritten):
    @staticmethod
    def forward(
        ctx: Any,
        z_BTD: Tensor,
        n_BTD: Tensor | None,
        anchor: Tensor | None,
        lease: Lease,
        site: PackedSite,
        mask_BT: Tensor | None,
        norm: tuple[float, bool] | None,
        with_gates: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        width = z_BTD.shape[2]
        sizes = [width]
        z_MD = z_BTD.reshape(-1, width)
        weight, bias = site.constants or (None, None)
        if norm is not None:
            n_MD, *moments = torch.native_layer_norm(z_MD, sizes, weight, bias, norm[0])
        else:
            assert n_BTD is not None
            n_MD, moments = n_BTD.reshape(-1, width), []
        mask_BT = mask_BT if site.masked else None
        n_MD, x_BTW, v_BTV, gates = _narrow(n_MD, site, z_BTD.shape, mask_BT)
        v_MV = v_BTV.view(-1, site.width)
        if z_MD.dtype is v_MV.dtype:
            u_MD = torch.addmm(z_MD, v_MV, site.weight_out_t)
        else:
            u_MD = z_MD + torch.mm(v_MV, site.weight_out_t)
        saved = [n_MD, x_BTW, v_MV, gates, mask_BT]
        out_MD = u_MD
        if norm is not None:
            saved += [z_MD, *moments]
            if norm[1]:
                out_MD, *moments = torch.native_layer_norm(u_MD, sizes, weight, bias, norm[0])
                saved += [u_MD, *moments]
        _keep(ctx, anchor, lease, site)
        ctx.save_for_backward(*saved)
        ctx.n_dtype, ctx.shape = None if n_BTD is None else n_BTD.dtype, z_BTD.shape
        out_BTD = out_MD.view(z_BTD.shape)
        return (out_BTD, gates) if with_gates else out_BTD

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_gates_BTN: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        site, shape = ctx.site, ctx.shape
        if grad is None:
            grad = ctx.saved_tensors[0].new_zeros(shape)
        n_MD, x_BTW, v_MV, gates, mask_BT, *of_norms = ctx.saved_tensors
        weight, bias = site.constants or (None, None)
        grad_u_MD = grad.reshape(-1, shape[-1])
        if len(of_norms) > 3:
            grad_u_MD = _norm_backward(grad_u_MD, of_norms[3:], weight, bias)
        narrow_MD = grad_u_MD if grad_u_MD.dtype is v_MV.dtype else grad_u_MD.to(v_MV.dtype)
        collects = _collects(ctx)
        grad_v_MV = torch.mm(narrow_MD, site.weight_out)
        grad_MW = _gates_backward(
            ctx, x_BTW, gates, mask_BT, [grad_v_MV], None, grad_gates_BTN, collects
        )
        if collects:
            site.grad_out.addmm_(narrow_MD.t(), v_MV)
            site.grad_in.addmm_(grad_MW.t(), n_MD)
        grad_z = grad_n = None
        if of_norms and ctx.needs_input_grad[0]:
            grad_n_MD = torch.mm(grad_MW, site.weight_in)
            if grad_n_MD.dtype is not grad_u_MD.dtype:
                grad_n_MD = grad_n_MD.to(grad_u_MD.dtype)
            grad_z_MD = _norm_backward(grad_n_MD, of_norms[:3], weight, bias)
            grad_z = grad_z_MD.add_(grad_u_MD).view(shape)
        elif not of_norms:
            grad_z = grad_u_MD.view(shape)
            if ctx.needs_input_grad[1]:
                grad_n = torch.mm(grad_MW, site.weight_in).view(shape).to(ctx.n_dtype)
        return grad_z, grad_n, None, None, None, None, None, None


def _norm_backward(
    grad_MD: Tensor, saved: list[Tensor], weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return the gradient of the input of a LayerNorm, given (input, mean, 1 / deviation)."""
    x_MD, mean_M1, rstd_M1 = saved
    needed = [True, False, False]
    result: tuple[Tensor, ...] = aten.native_layer_norm_backward(
        grad_MD, x_MD, [x_MD.shape[1]], mean_M1, rstd_M1, weight, bias, needed
    )
    return result[0]


def bottleneck(
    z_BTD: Tensor,
    n_BTD: Tensor | None,
    anchor: Tensor | None,
    lease: Lease,
    site: PackedSite,
    mask_BT: Tensor | None,
    norm: tuple[float, bool] | None = None,
    sink: list[Tensor] | None = None,
) -> Tensor:
    """Return z + G adapter(n), or with norms LN(z + G adapter(LN(z))).

    Args:
        z_BTD: the value that the adapter is added to.
        n_BTD: input of the adapter and its gate; None if it is LN(z).
        anchor, lease, site, mask_BT, sink: as for `narrow_site`. Weight and bias of the norm are
            the constants of the site; without constants it only normalises.
        norm: ε, and whether the norm is applied to the sum as well; None without norms.
    """
    with torch._C._DisableAutocast():
        out: Any = _Bottleneck.run(
            z_BTD, n_BTD, anchor, lease, site, mask_BT, norm, sink is not None
        )
    if sink is not None:
        out, gates = out
        sink.append(gates)
    return out
