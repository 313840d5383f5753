"""LoRA L with a gate, as a variant of PEFT's own LoRA layers (Hu et al. 2021).

    y = W x + G_L · B(A x)          r = 8; the gate replaces alpha/r. Ungated: the constant alpha/r = 2

PEFT's `Linear`, `bnb.Linear8bitLt` and `bnb.Linear4bit` all ask their variant for the forward pass, so one class serves
every kind of frozen weight. The gate is one per layer, shared by query and value; the attention that owns the
projection computes it before it calls them.
"""

import math
from typing import Protocol

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import nn

from scaleup.unipelt.gate import cast_to_weight
from scaleup.unipelt.kernels.narrow import add_lora, scaled
from scaleup.unipelt.sites import FusedQKVLayout


class GateSource(Protocol):
    """Whoever computes G_L: gives the gate of one projection for the running forward pass, None for no update; and G_L · A x, if it
    made that with the gates, from what it was lent."""

    def lora_gate(self, projection: str) -> torch.Tensor | float | None: ...

    def lora_product(self, projection: str, x_BTD: torch.Tensor) -> torch.Tensor | None: ...

    def lend(self, projection: str, lora_a: nn.Module, dropout: nn.Module | None) -> None: ...


class GatedLora(LoraVariant):
    """The gated update of one projection, "query" or "value"."""

    def __init__(self, source: GateSource, projection: str):
        self.source = source
        self.projection = projection

    def forward(
        self,
        module: LoraLayer,
        active_adapter: str,
        x: torch.Tensor,
        result: torch.Tensor,
        **kwargs,
    ) -> torch.Tensor:
        """x [..., T, in] → result + gate · B(A x), [..., T, out]. The gate scales the r-wide product: less work than the output."""
        gate = self.source.lora_gate(self.projection)
        if gate is None:
            return result
        lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        gated = self.source.lora_product(self.projection, x)
        if gated is None:
            gated = scaled(
                gate, lora_a(module.lora_dropout[active_adapter](cast_to_weight(x, lora_a.weight)))
            )
        return add_lora(result, gated, lora_b, module.get_base_layer())

    def supports_lora_conversion(self) -> bool:
        return False

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs) -> None:
        """Nothing to set up: the gate's weights live with the attention."""

    @staticmethod
    def merge_safe(
        module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor
    ) -> torch.Tensor:
        raise ValueError("a gated LoRA depends on the input and cannot be merged into a weight")

    merge_unsafe = merge_safe
    unmerge = merge_safe


class FusedUpdate(nn.Module):
    """B of a projection of query, key and value in one: [..., 2r] → [..., rows], the first r for the queries, the others for
    the values, nothing for the keys. As two LoRA layers would, for one pass through the frozen weights.
    """

    def __init__(self, rank: int, rows: FusedQKVLayout):
        super().__init__()
        self.rows = rows
        self.sizes = (rows.heads * rows.head_size, rows.kv_heads * rows.head_size)
        self.weight = nn.Parameter(torch.zeros(sum(self.sizes), rank))

    def forward(self, low_rank: torch.Tensor) -> torch.Tensor:
        queries, values = self.sizes
        low_q, low_v = low_rank.chunk(2, dim=-1)
        weight_q, weight_v = self.weight.split([queries, values])
        update_q, update_v = (
            nn.functional.linear(low_q, weight_q),
            nn.functional.linear(low_v, weight_v),
        )
        keys = update_v.new_zeros(()).expand_as(update_v)
        if self.rows.order == "parts":
            return torch.cat([update_q, keys, update_v], dim=-1)
        per_head = [
            part.unflatten(-1, (self.rows.heads, self.rows.head_size))
            for part in (update_q, keys, update_v)
        ]
        return torch.stack(per_head, dim=-2).flatten(-3)


def attach_fused(
    projection: nn.Module, adapter_name: str, source: GateSource, rows: FusedQKVLayout
) -> None:
    """As `attach` for query and value at once: A [2r, in], B [query rows + value rows, r]."""
    assert isinstance(projection, LoraLayer), type(projection)
    rank = projection.r[adapter_name]
    lora_a = nn.Linear(projection.in_features, 2 * rank, bias=False)
    nn.init.kaiming_uniform_(lora_a.weight, a=math.sqrt(5))  # as PEFT's
    projection.lora_A[adapter_name], projection.lora_B[adapter_name] = (
        lora_a,
        FusedUpdate(rank, rows),
    )
    projection._move_adapter_to_device_of_base_layer(adapter_name)
    attach(projection, adapter_name, source, "query")


def attach(projection: nn.Module, adapter_name: str, source: GateSource, role: str) -> None:
    """Puts the gate on a projection that PEFT has turned into a LoRA layer."""
    assert isinstance(projection, LoraLayer), type(projection)
    projection.lora_variant[adapter_name] = GatedLora(source, role)
    projection.cast_input_dtype_enabled = False  # else x comes as a copy in A's type, which is not what A x was made of with the gates
    source.lend(role, projection.lora_A, projection.lora_dropout)
