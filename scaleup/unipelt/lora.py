"""LoRA with a gate on the query and value projections (Hu et al. 2021).

    y = W x + G_L · B(A x)      r = 8; the gate replaces alpha/r. Ungated: the constant alpha/r = 2

With `lora_gate: scale`, G_L is the gate times alpha/r.

For training this is a variant of PEFT's LoRA layers: `Linear`, `bnb.Linear8bitLt` and
`bnb.Linear4bit` all ask their variant for the forward pass, so one class serves every kind of
frozen weight. In an exported folder it is a hook on the projection, or folded into the weight.

Query and value share the gate of their attention. In cross attention the queries come from the
decoder and the values from the encoder, so the value projection's gate is the same gate projection
pooled over the encoder's tokens. It is computed when that projection runs: once per generation, as
the values are cached.

Shapes: B examples, T tokens, D hidden size, R rank.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .attachment import Attachment
from .attention import ATTENTION_CHILD
from .attention_gates import AttentionGates, AttentionInputs, AttentionMember
from .fused_qkv import FusedBlocks, FusedUpdate
from .gate import ConstantGate, GateValue, cast_to_weight
from .kernels import (
    Entry,
    PlainPath,
    Site,
    Sites,
    Wide,
    add_lora,
    add_product,
    narrow_site,
    parameter,
    scaled,
)
from .peft_names import LoraLayer, LoraVariant
from .site_types import ENCODER_ARGUMENTS, AttentionSite, BlockSite, FusedQKVLayout
from .submodule import LARGEST, Folding, Submodule, option

LORA_CHILD = "unipelt_lora"  # the child of a projection in an exported folder
VALUE = "value"  # the gate of a cross attention's value projection, where constants replace gates


@dataclasses.dataclass
class LoraOptions:
    """Settings of LoRA; the fields are those of PEFT's LoraConfig."""

    r: int = option(8, "Rank of the LoRA update.", at_least=1, at_most=LARGEST)
    lora_alpha: float = option(
        16,
        "Ungated LoRA is scaled by alpha/r; see lora_gate for a learned gate.",
        above=0,
        at_most=1e6,
    )
    lora_gate: str = option(
        "replace",
        "What a learned gate does to the factor alpha/r. replace: it takes its place (paper). "
        "scale: it multiplies it, so that an open gate gives the LoRA that is used alone.",
        choices=("replace", "scale"),
    )
    lora_dropout: float = option(
        0.0, "Dropout on the input of LoRA, probability.", at_least=0, below=1
    )


@dataclasses.dataclass(slots=True)
class LoraCall:
    """The state of one call of an attention.

    Attributes:
        gates: G_L by projection, "query" or "value".
        h_BTD: input of the attention.
        low_rank: G_L · A h [B, T, R] by projection, where it was computed with the gates; on the
            fast path [M, R] for M = B·T.
        encoder_states: input of a cross attention's value projection.
        fast: whether the attention takes the fast path.
    """

    gates: dict[str, GateValue]
    h_BTD: torch.Tensor
    low_rank: dict[str, torch.Tensor]
    encoder_states: torch.Tensor | None = None
    fast: bool = False


class LoraMember(AttentionMember):
    """Hands the LoRA gate of one attention to its query and value projections."""

    def __init__(self, layer: AttentionGates):
        self.layer = layer
        self.projections: dict[str, Any] = {}  # "query", "value" → what holds its A and B
        self.roles: list[str] = []  # of those that read the input of the attention

    def register(self, role: str, projection: nn.Module) -> None:
        """Note a projection. Its A joins the product with the gates if it reads the same input."""
        self.projections[role] = projection
        cross = self.layer.site.cross
        self.roles = [role for role in self.projections if not cross or role == "query"]
        self.layer.passes.forget_layers()

    def maps(self) -> list[nn.Linear]:
        active = self.layer.active_entry
        linears = []
        for projection in map(self.projections.__getitem__, self.roles):
            linear, dropout = active(projection.lora_A), active(projection.lora_dropout)
            idle = isinstance(dropout, nn.Identity) or not dropout.training
            if linear is None or not idle:
                return []
            linears.append(linear)
        return linears

    def _entry(self, projection: Any, container: str) -> Entry:
        return projection, f"{self.layer.path(container, projection)}.weight"

    def narrow(self) -> list[Entry]:
        if self.layer.site.projects_positions:
            raise PlainPath("positions pass through the projections of an attention")
        dropouts = [self.layer.active_entry(p.lora_dropout) for p in self.projections.values()]
        if not all(isinstance(dropout, nn.Identity) for dropout in dropouts):
            raise PlainPath("lora_dropout changes what LoRA reads")
        return [self._entry(self.projections[role], "lora_A") for role in self.roles]

    def declare(self) -> Sites:
        """Return B of each projection, and A and the gates of a cross attention's values."""
        sites: Sites = {}
        for role, projection in self.projections.items():
            up = self.layer.active_entry(projection.lora_B)
            entry = self._entry(projection, "lora_B")
            if isinstance(up, FusedUpdate):
                rank = up.weight.shape[1]
                wide = Wide([entry], up.rows, 2 * rank, FusedBlocks(up.layout))
            else:
                wide = Wide([entry], *up.weight.shape)
            site = sites[self, role] = Site(wide=wide)
            if role not in self.roles:
                down = self._entry(projection, "lora_A")
                rank = len(parameter(down))
                site.narrow = self.layer.declare_narrow([down], [rank])
                site.narrow.selected = self.layer.learned_gate().names.index("lora")
                site.narrow.causal, site.details = False, [rank]
        return sites

    def begin(
        self, attention: nn.Module, kwargs: dict[str, Any], inputs: AttentionInputs
    ) -> LoraCall:
        if inputs.gated is not None:
            call = LoraCall({}, inputs.h_BTD, dict(zip(self.roles, inputs.gated)), fast=True)
        else:
            assert inputs.gate is not None
            call = LoraCall(dict.fromkeys(self.roles, inputs.gate), inputs.h_BTD, {})
        if self.layer.site.cross:
            states = (kwargs[name] for name in ENCODER_ARGUMENTS if kwargs.get(name) is not None)
            call.encoder_states = next(states)
        if inputs.product_BTR is not None and inputs.gate is not None:
            ranks = [linear.out_features for linear in self.maps()]
            low_rank = scaled(inputs.gate, inputs.product_BTR).split_with_sizes(ranks, dim=-1)
            call.low_rank = dict(zip(self.roles, low_rank))
        return call

    def gate(self, projection: str) -> GateValue | None:
        """Return G_L of this call for "query" or "value", None for no update.

        DeBERTa also sends position embeddings through these projections. They belong to no example,
        so only the first call of a pass is gated there.
        """
        call: LoraCall = self.call
        if self.layer.site.projects_positions:
            return call.gates.pop(projection, None)
        if projection in call.gates:
            return call.gates[projection]
        gate, current = self.layer.active("unipelt_gate"), self.layer.passes.current
        if projection in self.roles:  # the fast path has no gate for a projection of other input
            mask_BT = current.real(call.h_BTD.shape[1])
            gates = gate(call.h_BTD, mask_BT, gate.pooling, self.layer.running)
        else:  # of a cross attention, which may see every encoder token
            if isinstance(gate, ConstantGate):
                return gate.values.get(VALUE, gate.values["lora"])
            pooling = "paper" if getattr(gate, "pooling", None) == "paper" else "masked"
            gates = gate(call.encoder_states, current.encoder_mask_BS, pooling)
        call.gates[projection] = gates["lora"]
        return call.gates[projection]

    def product(self, projection: str, x_BTD: torch.Tensor) -> torch.Tensor | None:
        """Return G_L · A x [B, T, R] if it was computed together with the gates."""
        call: LoraCall = self.call
        return call.low_rank.get(projection) if x_BTD is call.h_BTD else None

    def fast_update(
        self, role: str, x_BTD: torch.Tensor, result: torch.Tensor, projection: nn.Module
    ) -> torch.Tensor | None:
        """Return the result with the update by the fast path, None if it does not apply."""
        current = self.layer.passes.current
        call: LoraCall = current.calls[self]
        if not call.fast:
            return None
        lease, anchor = current.lease, current.anchor
        assert lease is not None
        site = lease.sites[self, role]
        v_MR = call.low_rank.get(role) if x_BTD is call.h_BTD else None
        if v_MR is None:
            if role in call.low_rank or current.packed((self, role), x_BTD) is None:
                return None
            mask_BS, ranks = current.encoder_mask_BS, site.details
            (v_MR,) = narrow_site(x_BTD, anchor, lease, site, mask_BS, 0, ranks)
        return add_product(result, v_MR, anchor, lease, site, _may_overwrite(projection))


def _may_overwrite(projection: nn.Module) -> bool:
    """Return whether the output of a projection may hold the sum of it and the update.

    torch's own layers do not need their output in the backward pass. That of a quantised layer may
    be a view that must not be changed, and a hook may keep or replace the output.
    """
    layer: Any = getattr(projection, "base_layer", projection)
    own_hooks = 1 if LORA_CHILD in layer._modules else 0  # in an exported folder
    return type(layer) in (nn.Linear, Conv1D) and len(layer._forward_hooks) <= own_hooks


class GatedLora(LoraVariant):
    """PEFT's LoRA of one projection, "query" or "value", with a gate."""

    def __init__(self, member: LoraMember, projection: str):
        self.member, self.projection = member, projection

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
        updated = self.member.fast_update(self.projection, x, result, module)
        if updated is not None:
            return updated
        lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        dropout = module.lora_dropout[active_adapter]
        parts, frozen = (lora_a, dropout, lora_b), module.get_base_layer()
        return _update(self.member, self.projection, parts, x, result, frozen)

    def supports_lora_conversion(self) -> bool:
        return False

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Do nothing: the gate's weights belong to the attention."""

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> Any:
        raise ValueError("a gated LoRA depends on the input and cannot be merged into a weight")

    merge_unsafe = merge_safe
    unmerge = merge_safe


def _update(
    member: LoraMember,
    role: str,
    parts: tuple[Any, Any, Any],
    x: torch.Tensor,
    result: torch.Tensor,
    frozen: Any,
) -> torch.Tensor:
    gate = member.gate(role)
    if gate is None:
        return result
    lora_a, dropout, lora_b = parts
    low_rank = member.product(role, x)
    if low_rank is None:
        low_rank = scaled(gate, lora_a(dropout(cast_to_weight(x, lora_a.weight))))
    return add_lora(result, low_rank, lora_b, _may_overwrite(frozen))


class LoraUpdate(nn.Module):
    """The gated update of a projection in an exported folder, where it is not in the weight."""

    def __init__(
        self,
        projection: Any,
        layout: FusedQKVLayout | None,
        rank: int,
        member: LoraMember,
        role: str,
    ):
        super().__init__()
        self.handles: list[Any] = []
        if layout is None:
            outputs, inputs = projection.weight.shape
            self.lora_A = nn.Linear(inputs, rank, bias=False)
            self.lora_B: nn.Module = nn.Linear(rank, outputs, bias=False)
        else:
            self.lora_A = nn.Linear(member.layer.site.hidden_size, 2 * rank, bias=False)
            self.lora_B = FusedUpdate(rank, layout)
        self._member, self.role = (member,), role
        self.lora_dropout = nn.Identity()
        member.register(role, self)

    def after_projection(
        self, projection: nn.Module, args: tuple[Any, ...], output: torch.Tensor
    ) -> torch.Tensor:
        """Add the update. This is a forward hook of the projection."""
        member, x = self._member[0], args[0]
        updated = member.fast_update(self.role, x, output, projection)
        if updated is None:
            parts = (self.lora_A, self.lora_dropout, self.lora_B)
            updated = _update(member, self.role, parts, x, output, projection)
        return updated.to(output.dtype)


class Lora(Submodule):
    """LoRA L."""

    name = "lora"
    in_paper = True
    options = LoraOptions
    parameters = (".lora_A.", ".lora_B.")
    prunable = False

    def paths(self, attentions: list[AttentionSite], blocks: list[BlockSite]) -> list[str]:
        return [site.name for site in attentions]

    def constant_gate(self, config: Any) -> float:
        return config.lora_alpha / config.r

    def gate_scale(self, config: Any) -> float:
        return config.lora_alpha / config.r if config.lora_gate == "scale" else 1.0

    def lora_targets(self, attentions: list[AttentionSite]) -> list[str]:
        return [name for site in attentions for name in (site.query, site.value)]

    def attach_to_attention(self, attachment: Attachment, site: AttentionSite) -> None:
        layer = attachment.attention(site)
        member = layer.members.setdefault(self.name, LoraMember(layer))
        assert isinstance(member, LoraMember)
        roles = {"query": site.query, "value": site.value}
        for role, path in list(roles.items())[: 1 if site.layout is not None else 2]:
            projection = attachment.model.get_submodule(path)
            if attachment.adapter_name is None:
                self._attach_hook(attachment, projection, site, member, role)
            else:
                _attach_variant(projection, attachment.adapter_name, site, member, role)

    def _attach_hook(
        self,
        attachment: Attachment,
        projection: nn.Module,
        site: AttentionSite,
        member: LoraMember,
        role: str,
    ) -> None:
        rank = attachment.config.r
        attachment.child(
            projection,
            LORA_CHILD,
            lambda: LoraUpdate(projection, site.layout, rank, member, role),
            {"first": "after_projection"},  # a prefix reads the updated query
        )

    def fold(
        self, folding: Folding, attentions: list[AttentionSite], blocks: list[BlockSite]
    ) -> None:
        """Add G_L B A to the weights where the gate is a constant, else keep A and B.

        DeBERTa sends positions through the same projections without LoRA, so there A and B remain
        beside the weight and B absorbs the constant.
        """
        for site in attentions:
            roles = {site.query: self.name}
            if site.layout is None:
                measured = folding.gates is not None and (site.name, VALUE) in folding.gates
                roles[site.value] = VALUE if measured and site.cross else self.name
            update = folding.gates is not None and not site.projects_positions
            if not update:
                gate = f"{site.name}.{ATTENTION_CHILD}.unipelt_gate."
                folding.keep_gate(site.name, gate, self.name)
            for path, gate_name in roles.items():
                factor = folding.factor(site.name, gate_name)
                a = folding.checkpoint[f"{path}.lora_A.weight"]
                b = folding.checkpoint[f"{path}.lora_B.weight"]
                if update:
                    folding.updates[f"{path}.weight"] = _weight_update(
                        a.float(), factor * b.float(), site.layout, folding.config.r
                    )
                else:
                    folding.tensors[f"{path}.{LORA_CHILD}.lora_A.weight"] = a
                    folding.tensors[f"{path}.{LORA_CHILD}.lora_B.weight"] = b * factor


def _attach_variant(
    projection: nn.Module, adapter_name: str, site: AttentionSite, member: LoraMember, role: str
) -> None:
    """Put the gate on a projection that PEFT has turned into a LoRA layer."""
    assert isinstance(projection, LoraLayer), type(projection)
    if site.layout is not None:  # A [2R, in] and B [query rows + value rows, R]
        rank = projection.r[adapter_name]
        lora_a = nn.Linear(projection.in_features, 2 * rank, bias=False)
        nn.init.kaiming_uniform_(lora_a.weight, a=math.sqrt(5))  # as PEFT initialises A
        projection.lora_A[adapter_name] = lora_a
        projection.lora_B[adapter_name] = FusedUpdate(rank, site.layout)
        projection._move_adapter_to_device_of_base_layer(adapter_name)
    projection.lora_variant[adapter_name] = GatedLora(member, role)
    # A cast would copy x, and A x was computed from the original.
    projection.cast_input_dtype_enabled = False
    member.register(role, projection)


def _weight_update(
    a_RI: torch.Tensor, b_OR: torch.Tensor, layout: FusedQKVLayout | None, rank: int
) -> Any:
    """Return a function that computes B A, [out, in]."""
    if layout is None:
        return lambda: b_OR @ a_RI
    fused = FusedUpdate(rank, layout)
    fused.weight.data = b_OR
    return lambda: fused(a_RI.t()).detach().t()
