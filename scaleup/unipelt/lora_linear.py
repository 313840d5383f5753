"""LoRA's gate at linear layers that read one input and share no gate of an attention.

The output projection of an attention has its own gate, computed from its own input, and so does the
last projection of a feed-forward sublayer, whose first projections share a gate. Keys and values
each have a gate if `lora_gate_scope` is projection.

Shapes: B examples, T tokens, D width of the input, R rank, M = B·T.
"""

import dataclasses
from typing import Any

import torch
from torch import nn

from .gate import GateValue, cast_to_weight
from .kernels import Site, Sites, Wide, add_product, narrow_site, parameter, scaled
from .layers import SiteLayer
from .lora_layers import Holders, may_overwrite
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
    """The gate of linear layers that read one input. The first of them evaluates it.

    Args:
        of_encoder: whether they are keys or values of a cross attention, which read the encoder's
            tokens.
    """

    mergeable = True

    def __init__(self, reference_module: nn.Module, passes: Passes, of_encoder: bool = False):
        super().__init__(reference_module, passes)
        self.of_encoder = of_encoder
        self.holders = Holders(self)  # roles: the paths, in the order in which the layers run

    def declare(self) -> Sites:
        if self.active_entry(self.unipelt_gate) is None:
            return {}
        self.learned_gate()
        self.holders.require_no_dropout()
        active = self.holders.active()
        downs = [self.holders.entry(holder, "lora_A") for holder in active.values()]
        ranks = [len(parameter(down)) for down in downs]
        sites: Sites = {self: Site(self.declare_narrow(downs, [sum(ranks)]), details=ranks)}
        for role, holder in active.items():
            up = self.holders.entry(holder, "lora_B")
            sites[self, role] = Site(wide=Wide([up], *parameter(up).shape))
        return sites

    def fast_update(
        self, role: str, x: torch.Tensor, result: torch.Tensor, layer: nn.Module
    ) -> torch.Tensor | None:
        current = self.passes.current
        call: LinearCall | None = current.calls.get(self)
        if call is None or role == next(iter(self.holders.active())):
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
        """Drop the input, which may be wide, after the last layer that reads it."""
        if role == next(reversed(self.holders.active())):
            del self.passes.current.calls[self]

    def _begin(self, x: torch.Tensor) -> LinearCall:
        """Evaluate the gate and the gated narrow products of all layers.

        The tokens of all examples may come as one matrix [M, D].
        """
        current, active = self.passes.current, self.holders.active()
        x_BTD = x if x.dim() == 3 else x.unflatten(0, (current.examples, -1))
        step = None if self.of_encoder else current.step(self, x_BTD)
        if step is not None:
            z_BC, gates_BN = self.step_gates(step, x_BTD[:, 0], current)
            gated = step.gated(z_BC, gates_BN).split_with_sizes(step.details, dim=1)
            return LinearCall(x_BTD, dict(zip(active, gated)))
        packed = current.packed(self, x_BTD)
        if packed is not None:
            self.require_adapters(current)
            gate, mask_BT = self.learned_gate(), self.real(x_BTD)
            sink, lease = self.sink(gate, current), current.lease
            assert lease is not None
            ranks = packed.details
            products = narrow_site(x_BTD, current.anchor, lease, packed, mask_BT, 0, ranks, sink)
            if sink is not None:
                self.note(gate, current, *sink)
            return LinearCall(x_BTD, dict(zip(active, products)))
        self.active("unipelt_gate")  # of the adapters that the pass began with
        maps = self.holders.maps(active)
        gates, (product_BTR,) = self.evaluate(x_BTD, [maps], joined=True)
        call = LinearCall(x_BTD, {}, gates["lora"])
        if maps and product_BTR is not None:
            widths = [linear.out_features for linear in maps]
            parts = scaled(gates["lora"], product_BTR).split_with_sizes(widths, dim=-1)
            call.low_rank = dict(zip(active, parts))
        return call
