"""LoRA's update of one linear layer: a variant of PEFT's layer, and a hook in exported folders.

The gated narrow product G · A x of a layer comes from a `GatedProducts`: that of an attention
(`lora_attention.py`) or that of other layers that read one input (`lora_linear.py`).

Shapes: T tokens, R rank.
"""

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .fused_qkv import FusedUpdate, updated_heads
from .gate import ConstantGate
from .kernels import Entry, PlainPath, add_lora
from .layers import SiteLayer
from .linears import sizes
from .peft_names import LoraLayer, LoraVariant
from .site_types import FusedQKVLayout

LORA_CHILD = "unipelt_lora"  # the child of a linear layer in an exported folder


class Holders:
    """The modules that hold A and B of the layers that share a gate, by adapter and role.

    The roles of an adapter have the order in which they are added.

    Args:
        site: the layer with the gate.
    """

    def __init__(self, site: SiteLayer):
        self.site = site
        self._by_adapter: dict[str | None, dict[str, Any]] = {}

    def start(self, adapter_name: str | None) -> None:
        """Forget what an earlier adapter of this name had."""
        self._by_adapter[adapter_name] = {}
        self.site.passes.forget_layers()

    def add(self, adapter_name: str | None, role: str, holder: Any) -> None:
        """Add the module that holds A and B of a layer."""
        self._by_adapter[adapter_name][role] = holder

    def active(self) -> dict[str, Any]:
        """Return the modules of the active adapter that has this gate, by role."""
        by_adapter = self._by_adapter
        if len(by_adapter) == 1:
            return next(iter(by_adapter.values()))
        return next(by_adapter[name] for name in self.site.active_adapters if name in by_adapter)

    def entry(self, holder: Any, container: str) -> Entry:
        """Return the active adapter's A ("lora_A") or B ("lora_B") for the fast path."""
        return holder, f"{self.site.path(container, holder)}.weight"

    def require_no_dropout(self) -> None:
        """Raise PlainPath if LoRA and its gate read different inputs."""
        dropouts = (self.site.active_entry(h.lora_dropout) for h in self.active().values())
        if not all(isinstance(dropout, nn.Identity) for dropout in dropouts):
            raise PlainPath("lora_dropout changes what LoRA reads")

    def maps(self, roles: Iterable[str]) -> list[nn.Linear]:
        """Return A of layers, or none while LoRA and its gate read different inputs."""
        active, holders, linears = self.site.active_entry, self.active(), []
        for holder in (holders[role] for role in roles):
            linear, dropout = active(holder.lora_A), active(holder.lora_dropout)
            idle = isinstance(dropout, nn.Identity) or not dropout.training
            if linear is None or not idle:
                return []
            linears.append(linear)
        return linears


class GatedProducts(Protocol):
    """What layers with a shared gate ask for. `role` identifies the layer that asks."""

    holders: Holders
    mergeable: bool  # whether ungated LoRA can be added to the weights

    def fast_update(
        self, role: str, x: torch.Tensor, result: torch.Tensor, layer: nn.Module
    ) -> torch.Tensor | None:
        """Return result + G · B(A x) by the fast path, None if it does not apply.

        This is called first, and `low_rank` only if there is no result.

        Args:
            role: the layer that asks.
            x: its input.
            result: its frozen output.
            layer: the layer itself, or PEFT's layer around it.
        """
        ...

    def low_rank(self, role: str, x: torch.Tensor, lora_a: Any, dropout: Any) -> Any:
        """Return G · A x [..., T, R], None for no update."""
        ...


class GatedLora(LoraVariant):
    """PEFT's LoRA of one linear layer, with a gate."""

    def __init__(self, source: GatedProducts, role: str):
        self.source, self.role = source, role

    def forward(
        self,
        module: LoraLayer,
        active_adapter: str,
        x: torch.Tensor,
        result: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return result + gate · B(A x). The gate scales the narrow product, which is less work.

        Args:
            module: PEFT's layer.
            active_adapter: name of the adapter.
            x: input of the projection, [..., T, in].
            result: its frozen output, [..., T, out].
        """
        updated = self.source.fast_update(self.role, x, result, module)
        if updated is not None:
            return updated
        lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        low_rank = self.source.low_rank(self.role, x, lora_a, module.lora_dropout[active_adapter])
        if low_rank is None:
            return result
        return add_lora(result, low_rank, lora_b, may_overwrite(module))

    def supports_lora_conversion(self) -> bool:
        return False

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Do nothing: the gate's weights belong to the site."""

    def _merged(self, module: Any, active_adapter: str) -> torch.Tensor:
        """Return what ungated LoRA adds to the weight of a linear layer."""
        gates: Any = self.source.holders.site.unipelt_gate
        gate = gates[active_adapter]
        if not isinstance(gate, ConstantGate) or not self.source.mergeable:
            reason = "position embeddings pass through the projection without LoRA"
            reason = reason if isinstance(gate, ConstantGate) else "its gate depends on the input"
            raise ValueError(f"LoRA of {self.role} cannot be merged exactly: {reason}")
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        fused = (b.layout, b.keys) if isinstance(b, FusedUpdate) else None
        scaled_b = gate.values["lora"] * b.weight.detach().float()
        rank = module.r[active_adapter]
        update = weight_update(a.weight.detach().float(), scaled_b, fused, rank)()
        return update.t() if module.fan_in_fan_out else update

    def merge_safe(
        self, module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor
    ) -> torch.Tensor:
        return orig_weight + self._merged(module, active_adapter).to(orig_weight.dtype)

    def merge_unsafe(
        self, module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor
    ) -> None:
        orig_weight.data += self._merged(module, active_adapter).to(orig_weight.dtype)

    def unmerge(
        self, module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor
    ) -> torch.Tensor:
        return orig_weight.data - self._merged(module, active_adapter).to(orig_weight.dtype)


class LoraUpdate(nn.Module):
    """The gated update of a linear layer in an exported folder, where it is not in the weight.

    Args:
        layer: the linear layer.
        rank: R.
        fused: layout of a fused projection and whether its keys are updated, else None.
        source: the gated products.
        role: the role of the layer among those that share the gate.
    """

    def __init__(
        self,
        layer: nn.Module,
        rank: int,
        fused: tuple[FusedQKVLayout, bool] | None,
        source: GatedProducts,
        role: str,
    ):
        super().__init__()
        self.handles: list[Any] = []
        inputs, outputs = sizes(layer)
        if fused is None:
            self.lora_A = nn.Linear(inputs, rank, bias=False)
            self.lora_B: nn.Module = nn.Linear(rank, outputs, bias=False)
        else:
            self.lora_A = nn.Linear(inputs, len(updated_heads(*fused)) * rank, bias=False)
            self.lora_B = FusedUpdate(rank, *fused)
        self._source, self.role = (source,), role
        self.lora_dropout = nn.Identity()
        source.holders.add(None, role, self)

    def after_projection(
        self, layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor
    ) -> torch.Tensor:
        """Add the update. This is a forward hook of the linear layer."""
        source, x = self._source[0], args[0]
        updated = source.fast_update(self.role, x, output, layer)
        if updated is None:
            low_rank = source.low_rank(self.role, x, self.lora_A, self.lora_dropout)
            if low_rank is None:
                return output
            updated = add_lora(output, low_rank, self.lora_B, may_overwrite(layer))
        return updated.to(output.dtype)


def attach_variant(
    layer: nn.Module,
    adapter_name: str,
    fused: tuple[FusedQKVLayout, bool] | None,
    source: GatedProducts,
    role: str,
) -> None:
    """Put the gate on a linear layer that PEFT has turned into a LoRA layer.

    Args:
        layer: PEFT's layer.
        adapter_name: name of the adapter.
        fused, source, role: as for `LoraUpdate`.
    """
    assert isinstance(layer, LoraLayer), type(layer)
    if fused is not None:  # A [2R or 3R, in] and B [updated rows, R]
        rank = layer.r[adapter_name]
        lora_b = FusedUpdate(rank, *fused)
        lora_a = nn.Linear(layer.in_features, lora_b.columns, bias=False)
        nn.init.kaiming_uniform_(lora_a.weight, a=math.sqrt(5))  # as PEFT initialises A
        layer.lora_A[adapter_name], layer.lora_B[adapter_name] = lora_a, lora_b
        layer._move_adapter_to_device_of_base_layer(adapter_name)
    layer.lora_variant[adapter_name] = GatedLora(source, role)
    # A cast would copy x, and A x was computed from the original.
    layer.cast_input_dtype_enabled = False
    source.holders.add(adapter_name, role, layer)


def weight_update(
    a_RI: torch.Tensor, b_OR: torch.Tensor, fused: tuple[FusedQKVLayout, bool] | None, rank: int
) -> Any:
    """Return a function that computes B A, [out, in]."""
    if fused is None:
        return lambda: b_OR @ a_RI
    update = FusedUpdate(rank, *fused)
    update.weight.data = b_OR
    return lambda: update(a_RI.t()).detach().t()


def may_overwrite(layer: nn.Module) -> bool:
    """Return whether the output of a linear layer may hold the sum of it and the update.

    torch's own layers do not need their output in the backward pass. That of a quantised layer may
    be a view that must not be changed, and a hook may keep or replace the output.
    """
    base: Any = getattr(layer, "base_layer", layer)
    own_hooks = 1 if LORA_CHILD in base._modules else 0  # in an exported folder
    return type(base) in (nn.Linear, Conv1D) and len(base._forward_hooks) <= own_hooks
