"""LoRA L with a gate, as a variant of PEFT's own LoRA layers (Hu et al. 2021).

    y = W x + G_L · B(A x)          r = 8; the gate replaces alpha/r. Ungated: the constant alpha/r = 2

PEFT's `Linear`, `bnb.Linear8bitLt` and `bnb.Linear4bit` all ask their variant for the forward pass, so one class serves
every kind of frozen weight. The gate is one per layer, shared by query and value; the attention that owns the
projection computes it before it calls them.
"""

from typing import Protocol

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import nn


class GateSource(Protocol):
    """Whoever computes G_L: gives the gate of one projection for the running forward pass."""

    def lora_gate(self, projection: str) -> torch.Tensor | float: ...


class GatedLora(LoraVariant):
    """The gated update of one projection, "query" or "value"."""

    def __init__(self, source: GateSource, projection: str):
        self.source = source
        self.projection = projection

    def forward(self, module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs) -> torch.Tensor:
        """x [..., T, in] → result + gate · B(A x), [..., T, out]. The gate scales the r-wide product: less work than the output."""
        lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        low_rank = lora_a(module.lora_dropout[active_adapter](x))
        return result + lora_b(self.source.lora_gate(self.projection) * low_rank)

    def supports_lora_conversion(self) -> bool:
        return False

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs) -> None:
        """Nothing to set up: the gate's weights live with the attention."""

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        raise ValueError("a gated LoRA depends on the input and cannot be merged into a weight")

    merge_unsafe = merge_safe
    unmerge = merge_safe


def attach(projection: nn.Module, adapter_name: str, source: GateSource, role: str) -> None:
    """Puts the gate on a projection that PEFT has turned into a LoRA layer."""
    assert isinstance(projection, LoraLayer), type(projection)
    projection.lora_variant[adapter_name] = GatedLora(source, role)
