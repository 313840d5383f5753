"""LoRA's gate at linear layers outside of queries, keys and values, which read one input.

The output projection of an attention has its own gate, computed from its own input. So has the last
projection of a feed-forward sublayer, and its first projections share one.

Shapes: B examples, T tokens, D width of the input, R rank, M = B·T.
"""

import dataclasses
from typing import Any

import torch
from torch import nn

from .gate import GateValue, cast_to_weight
from .kernels import (
    Entry,
    PlainPath,
    Site,
    Sites,
    Wide,
    add_product,
    narrow_site,
    parameter,
    scaled,
)
from .layers import SiteLayer
from .lora_layers import may_overwrite
from .passes import Passes

LINEAR_CHILD = "unipelt_linear"  # the child of the first of the layers


@dataclasses.dataclass(slots=True)
class LinearCall:
    """What the layers of one input share.

    Attributes:
        x_BTD: the input.
        low_rank: G_L · A x [B, T, R] by layer, where it was computed with the gate; on the fast
            path [M, R].
        gate: G_L, None on the fast path.
    """

    x_BTD: torch.Tensor
    low_rank: dict[str, torch.Tensor]
    gate: GateValue | None = None


class LinearGate(SiteLayer):
    """The gate of linear layers that read one input. The first of them evaluates it."""

    def __init__(self, reference_module: nn.Module, passes: Passes):
        super().__init__(reference_module, passes)
        # Path → what holds A and B, in the order in which the layers run. No registered children.
        self.projections: dict[str, Any] = {}

    def register(self, role: str, holder: Any) -> None:
        self.projections[role] = holder
        self.passes.forget_layers()

    def _active(self) -> dict[str, Any]:
        """Return the layers that the active adapter updates."""
        entries = self.projections.items()
        return {role: p for role, p in entries if self.active_entry(p.lora_A) is not None}

    def _entry(self, projection: Any, container: str) -> Entry:
        return projection, f"{self.path(container, projection)}.weight"

    def declare(self) -> Sites:
        active = self._active()
        if not active:
            return {}
        dropouts = [self.active_entry(p.lora_dropout) for p in active.values()]
        if not all(isinstance(dropout, nn.Identity) for dropout in dropouts):
            raise PlainPath("lora_dropout changes what LoRA reads")
        self.learned_gate()
        downs = [self._entry(projection, "lora_A") for projection in active.values()]
        ranks = [len(parameter(down)) for down in downs]
        sites: Sites = {self: Site(self.declare_narrow(downs, [sum(ranks)]), details=ranks)}
        for role, projection in active.items():
            up = self._entry(projection, "lora_B")
            sites[self, role] = Site(wide=Wide([up], *parameter(up).shape))
        return sites

    def fast_update(
        self, role: str, x: torch.Tensor, result: torch.Tensor, layer: nn.Module
    ) -> torch.Tensor | None:
        current, active = self.passes.current, list(self._active())
        call: LinearCall | None = current.calls.get(self)
        if call is None or role == active[0]:
            call = current.calls[self] = self._begin(x)
        if call.gate is not None:
            return None
        v_MR, lease = call.low_rank[role], current.lease
        assert lease is not None
        self._finish(role)
        site = lease.sites[self, role]
        return add_product(result, v_MR, current.anchor, lease, site, may_overwrite(layer))

    def low_rank(
        self, role: str, x: torch.Tensor, lora_a: Any, dropout: Any
    ) -> torch.Tensor | None:
        call: LinearCall = self.passes.current.calls[self]
        assert call.gate is not None
        low_rank = call.low_rank.get(role)
        if low_rank is None:
            product = lora_a(dropout(cast_to_weight(call.x_BTD, lora_a.weight)))
            low_rank = scaled(call.gate, product)
        self._finish(role)
        return low_rank.flatten(0, 1) if x.dim() == 2 else low_rank

    def _finish(self, role: str) -> None:
        """Drop the input behind the last layer that reads it, which may be wide."""
        if role == list(self._active())[-1]:
            del self.passes.current.calls[self]

    def _begin(self, x: torch.Tensor) -> LinearCall:
        """Evaluate the gate and the gated narrow products of all layers.

        The tokens of all examples may come as one matrix [M, D].
        """
        current, active = self.passes.current, self._active()
        x_BTD = x if x.dim() == 3 else x.unflatten(0, (current.examples, -1))
        step = current.step(self, x_BTD)
        if step is not None:
            z_BC, gates_BN = self.step_gates(step, x_BTD[:, 0], current)
            gated = step.gated(z_BC, gates_BN).split_with_sizes(step.details, dim=1)
            return LinearCall(x_BTD, dict(zip(active, gated)))
        packed = current.packed(self, x_BTD)
        if packed is not None:
            self.require_adapters(current)
            gate, mask_BT = self.learned_gate(), current.real(x_BTD.shape[1])
            sink, lease = self.sink(gate, current), current.lease
            assert lease is not None
            ranks = packed.details
            products = narrow_site(x_BTD, current.anchor, lease, packed, mask_BT, 0, ranks, sink)
            if sink is not None:
                self.note(gate, current, *sink)
            return LinearCall(x_BTD, dict(zip(active, products)))
        self.active("unipelt_gate")  # of the adapters that the pass began with
        maps = [self.active_entry(projection.lora_A) for projection in active.values()]
        dropouts = [self.active_entry(projection.lora_dropout) for projection in active.values()]
        if not all(isinstance(d, nn.Identity) or not d.training for d in dropouts):
            maps = []
        gates, (product_BTR,) = self.evaluate(x_BTD, [maps], joined=True)
        call = LinearCall(x_BTD, {}, gates["lora"])
        if maps and product_BTR is not None:
            widths = [linear.out_features for linear in maps]
            parts = scaled(gates["lora"], product_BTR).split_with_sizes(widths, dim=-1)
            call.low_rank = dict(zip(active, parts))
        return call
