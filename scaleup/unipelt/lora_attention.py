"""LoRA's gate at an attention, which its queries, keys and values share.

In cross attention the queries come from the decoder, and the keys and values from the encoder.
Their gate is the same gate projection pooled over the encoder's tokens. It is computed when their
projections run: once per generation, as keys and values are cached.

Shapes: B examples, T tokens, D hidden size, R rank.
"""

import dataclasses
from typing import Any

import torch
from torch import nn

from .attention_gates import AttentionGates, AttentionInputs, AttentionMember
from .fused_qkv import FusedBlocks, FusedUpdate
from .gate import ConstantGate, GateValue, cast_to_weight
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
from .lora_layers import Holders, may_overwrite
from .site_types import ENCODER_ARGUMENTS

VALUE = "value"  # the gate of a cross attention's keys and values, where constants replace gates


@dataclasses.dataclass(slots=True)
class LoraCall:
    """The state of one call of an attention.

    Attributes:
        gates: G_L by projection, "query", "key" or "value".
        h_BTD: input of the attention.
        low_rank: G_L · A h [B, T, R] by projection, where it was computed with the gates; on the
            fast path [M, R] for M = B·T.
        encoder_states: input of a cross attention's key and value projections.
        fast: whether the attention takes the fast path.
    """

    gates: dict[str, GateValue]
    h_BTD: torch.Tensor
    low_rank: dict[str, torch.Tensor]
    encoder_states: torch.Tensor | None = None
    fast: bool = False


class LoraMember(AttentionMember):
    """Hands the LoRA gate of one attention to its query, key and value projections."""

    def __init__(self, layer: AttentionGates):
        self.layer = layer
        self.mergeable = not layer.site.projects_positions
        self.holders = Holders(layer)  # roles: "query", "key", "value"

    def _reads_input(self, role: str) -> bool:
        """Return whether a projection reads the same input as the gates."""
        return not self.layer.site.cross or role == "query"

    def _roles(self) -> list[str]:
        """Return the active projections whose A joins the product with the gates."""
        return [role for role in self.holders.active() if self._reads_input(role)]

    def maps(self) -> list[nn.Linear]:
        return self.holders.maps(self._roles())

    def narrow(self) -> list[Entry]:
        if self.layer.site.projects_positions:
            raise PlainPath("positions pass through the projections of an attention")
        self.holders.require_no_dropout()
        active = self.holders.active()
        return [self.holders.entry(active[role], "lora_A") for role in self._roles()]

    def declare(self) -> Sites:
        """Return B of each projection, and A and the gates of a cross attention's other input."""
        sites: Sites = {}
        for role, holder in self.holders.active().items():
            up, entry = self.layer.active_entry(holder.lora_B), self.holders.entry(holder, "lora_B")
            if isinstance(up, FusedUpdate):
                blocks = FusedBlocks(up.layout, up.keys)
                wide = Wide([entry], up.rows, up.columns, blocks)
            else:
                wide = Wide([entry], *up.weight.shape)
            site = sites[self, role] = Site(wide=wide)
            if not self._reads_input(role):
                down = self.holders.entry(holder, "lora_A")
                rank = len(parameter(down))
                site.narrow = self.layer.declare_narrow([down], [rank])
                site.narrow.selected = self.layer.learned_gate().names.index("lora")
                site.narrow.causal, site.details = False, [rank]
        return sites

    def begin(
        self, attention: nn.Module, kwargs: dict[str, Any], inputs: AttentionInputs
    ) -> LoraCall:
        roles = self._roles()
        if inputs.gated is not None:
            call = LoraCall({}, inputs.h_BTD, dict(zip(roles, inputs.gated)), fast=True)
        else:
            assert inputs.gate is not None
            call = LoraCall(dict.fromkeys(roles, inputs.gate), inputs.h_BTD, {})
        if self.layer.site.cross:
            states = (kwargs[name] for name in ENCODER_ARGUMENTS if kwargs.get(name) is not None)
            call.encoder_states = next(states)
        if inputs.product_BTR is not None and inputs.gate is not None:
            ranks = [linear.out_features for linear in self.maps()]
            low_rank = scaled(inputs.gate, inputs.product_BTR).split_with_sizes(ranks, dim=-1)
            call.low_rank = dict(zip(roles, low_rank))
        return call

    def _gate(self, role: str) -> GateValue | None:
        """Return G_L of this call for a projection, None for no update.

        DeBERTa also sends position embeddings through these projections. They belong to no example,
        so only the first call of a pass is gated there.
        """
        call: LoraCall = self.call
        if self.layer.site.projects_positions:
            return call.gates.pop(role, None)
        if role in call.gates:
            return call.gates[role]
        gate, current = self.layer.active("unipelt_gate"), self.layer.passes.current
        if self._reads_input(role):  # the fast path has no gate for a projection of other input
            mask_BT = current.real(call.h_BTD.shape[1])
            gates = gate(call.h_BTD, mask_BT, gate.pooling, self.layer.running)
            call.gates[role] = gates["lora"]
            return call.gates[role]
        if isinstance(gate, ConstantGate):  # what follows may see every encoder token
            return gate.values.get(VALUE, gate.values["lora"])
        pooling = "paper" if getattr(gate, "pooling", None) == "paper" else "masked"
        gates = gate(call.encoder_states, current.encoder_mask_BS, pooling)
        call.gates |= dict.fromkeys(("key", "value"), gates["lora"])
        return call.gates[role]

    def low_rank(
        self, role: str, x: torch.Tensor, lora_a: Any, dropout: Any
    ) -> torch.Tensor | None:
        gate = self._gate(role)
        if gate is None:
            return None
        call: LoraCall = self.call
        low_rank = call.low_rank.get(role) if x is call.h_BTD else None
        if low_rank is None:
            low_rank = scaled(gate, lora_a(dropout(cast_to_weight(x, lora_a.weight))))
        return low_rank

    def fast_update(
        self, role: str, x: torch.Tensor, result: torch.Tensor, layer: nn.Module
    ) -> torch.Tensor | None:
        current = self.layer.passes.current
        call: LoraCall = current.calls[self]
        if not call.fast:
            return None
        lease, anchor = current.lease, current.anchor
        assert lease is not None
        site = lease.sites[self, role]
        v_MR = call.low_rank.get(role) if x is call.h_BTD else None
        if v_MR is None:
            if role in call.low_rank or current.packed((self, role), x) is None:
                return None
            mask_BS, ranks = current.encoder_mask_BS, site.details
            (v_MR,) = narrow_site(x, anchor, lease, site, mask_BS, 0, ranks)
        return add_product(result, v_MR, anchor, lease, site, may_overwrite(layer))
