"""LoRA with a gate (Hu et al. 2021), on the query and value projections or on more layers.

    y = W x + G_L · B(A x)      r = 8; the gate replaces alpha/r. Ungated: the constant alpha/r = 2

With `lora_gate: scale`, G_L is the gate times alpha/r. With `use_rslora`, alpha/√r takes the place
of alpha/r (Kalajdzievski 2023).

For training this is a variant of PEFT's LoRA layers: `Linear`, `bnb.Linear8bitLt` and
`bnb.Linear4bit` all ask their variant for the forward pass, so one class serves every kind of
frozen weight. In an exported folder it is a hook on the layer, or folded into the weight.

There is one gate per input. Queries, keys and values share the gate of their attention
(`lora_attention.py`); other layers share one if they read the same tensor (`lora_linear.py`). With
`lora_gate_scope: projection`, only queries use the gate of the attention, and every other layer has
its own gate, of the second kind.

Shapes: R rank.
"""

import dataclasses
import math
from typing import Any

from .attachment import Attachment
from .attention import ATTENTION_CHILD
from .lora_attention import VALUE, LoraMember
from .lora_layers import LORA_CHILD, GatedProducts, LoraUpdate, attach_variant, weight_update
from .lora_linear import LINEAR_CHILD, LinearGate
from .site_types import AttentionSite, BlockSite, FusedQKVLayout, LinearSite
from .submodule import LARGEST, Folding, Submodule, option


@dataclasses.dataclass
class LoraOptions:
    """Settings of LoRA. Except for gate and targets, the fields are those of PEFT's LoraConfig."""

    r: int = option(8, "Rank of the LoRA update.", at_least=1, at_most=LARGEST)
    lora_alpha: float = option(
        16,
        "Ungated LoRA is scaled by alpha/r; see lora_gate for a learned gate.",
        above=0,
        at_most=1e6,
    )
    use_rslora: bool = option(False, "Rank-stabilised LoRA: alpha/√r in place of alpha/r.")
    lora_targets: str = option(
        "qv",
        "Layers with LoRA. qv: query and value projections (paper). attention: also keys and the "
        "output projection. all-linear: all linear layers of the blocks, without those of routed "
        "experts.",
        choices=("qv", "attention", "all-linear"),
    )
    lora_gate: str = option(
        "replace",
        "What a learned gate does to the factor alpha/r. replace: it takes its place (paper). "
        "scale: it multiplies it, so that an open gate gives the LoRA that is used alone.",
        choices=("replace", "scale"),
    )
    lora_gate_scope: str = option(
        "attention",
        "Which layers share a learned gate. attention: query, key and value of an attention "
        "(paper), and other layers that read the same input. projection: every layer has its own "
        "gate, as in the library adapters.",
        choices=("attention", "projection"),
    )
    lora_dropout: float = option(
        0.0, "Dropout probability on the input of LoRA.", at_least=0, below=1
    )


class Lora(Submodule):
    """LoRA L."""

    name = "lora"
    in_paper = True
    options = LoraOptions
    parameters = (".lora_A.", ".lora_B.")
    prunable = False

    def paths(
        self, config: Any, attentions: list[AttentionSite], blocks: list[BlockSite]
    ) -> list[str]:
        linears = _all_linears(config, attentions, blocks)
        return [site.name for site in attentions] + [linear.name for linear in linears]

    def constant_gate(self, config: Any) -> float:
        return float(config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r))

    def gate_scale(self, config: Any) -> float:
        return self.constant_gate(config) if config.lora_gate == "scale" else 1.0

    def lora_targets(
        self, config: Any, attentions: list[AttentionSite], blocks: list[BlockSite]
    ) -> list[str]:
        projections = [path for site in attentions for path in _projections(config, site).values()]
        linears = _all_linears(config, attentions, blocks)
        return projections + [path for linear in linears for path in linear.linears]

    def attach_to_attention(self, attachment: Attachment, site: AttentionSite) -> None:
        layer = attachment.attention(site)
        member = layer.members.setdefault(self.name, LoraMember(layer))
        assert isinstance(member, LoraMember)
        member.holders.start(attachment.adapter_name)
        fused = _fused(attachment.config, site)
        for role, path in _projections(attachment.config, site).items():
            _attach(attachment, path, fused, member, role)
        for linear in _own_gates(attachment.config, site):
            self._attach_linear(attachment, linear, site.parent, site.causal_block, site.cross)

    def attach_to_block(self, attachment: Attachment, site: BlockSite) -> None:
        for linear in _linears(attachment.config, site):
            self._attach_linear(attachment, linear, site.parent, site.causal)

    def _attach_linear(
        self,
        attachment: Attachment,
        linear: LinearSite,
        parent: str,
        causal: bool,
        of_encoder: bool = False,
    ) -> None:
        if attachment.has(linear.name, self.name):
            layer = _linear_gate(attachment, linear, parent, of_encoder)
            place = linear.name, (self.name,), linear.hidden_size
            gate = attachment.gate(layer, *place, causal, of_encoder)
            layer.add(attachment.adapter_name, unipelt_gate=gate)
            layer.holders.start(attachment.adapter_name)
            for path in linear.linears:
                _attach(attachment, path, None, layer, path)

    def fold(
        self, folding: Folding, attentions: list[AttentionSite], blocks: list[BlockSite]
    ) -> None:
        """Add G_L B A to the weights where the gate is a constant, else keep A and B.

        DeBERTa sends positions through the same projections without LoRA, so there A and B remain
        beside the weight and B absorbs the constant.
        """
        config, constant = folding.config, folding.gates is not None
        for site in attentions:
            update = constant and not site.projects_positions
            if not update:
                gate = f"{site.name}.{ATTENTION_CHILD}.unipelt_gate."
                folding.keep_gate(site.name, gate, self.name)
            measured = folding.gates is not None and (site.name, VALUE) in folding.gates
            for role, path in _projections(config, site).items():
                of_encoder = measured and site.cross and role != "query"
                factor = folding.factor(site.name, VALUE if of_encoder else self.name)
                _fold_layer(folding, path, factor, _fused(config, site), update)
        for linear in _all_linears(config, attentions, blocks):
            if not constant:
                gate = f"{linear.name}.{LINEAR_CHILD}.unipelt_gate."
                folding.keep_gate(linear.name, gate, self.name)
            factor = folding.factor(linear.name, self.name)
            for path in linear.linears:
                _fold_layer(folding, path, factor, None, constant)


def _projections(config: Any, site: AttentionSite) -> dict[str, str]:
    """Return the paths of the projections that share the gate of an attention, by their roles."""
    if site.layout is not None or config.lora_gate_scope == "projection":
        return {"query": site.query}
    return {"query": site.query, **_keys_and_values(config, site)}


def _keys_and_values(config: Any, site: AttentionSite) -> dict[str, str]:
    keys = {} if config.lora_targets == "qv" else {"key": site.key}
    return {**keys, "value": site.value}


def _own_gates(config: Any, site: AttentionSite) -> list[LinearSite]:
    """Return the keys and values of an attention if they have a gate each.

    Raises:
        ValueError: if they cannot have one.
    """
    if config.lora_gate_scope == "attention":
        return []
    if site.layout is not None:
        raise ValueError(
            f"lora_gate_scope: query and value of {site.name} are one projection; use attention"
        )
    if site.projects_positions and config.lora_targets != "qv":
        raise ValueError(
            f"lora_gate_scope: positions pass through the key projection of {site.name}, too; use "
            "attention, or lora_targets qv"
        )
    paths = _keys_and_values(config, site).values()
    return [LinearSite((path,), site.hidden_size, attention_output=False) for path in paths]


def _linears(config: Any, block: BlockSite) -> list[LinearSite]:
    """Return the other linear layers of a block that get LoRA."""
    wanted = {"qv": (), "attention": (True,), "all-linear": (True, False)}[config.lora_targets]
    linears = [linear for linear in block.linears if linear.attention_output in wanted]
    if config.lora_gate_scope == "attention":
        return linears
    return [
        dataclasses.replace(linear, linears=(path,))
        for linear in linears
        for path in linear.linears
    ]


def _all_linears(
    config: Any, attentions: list[AttentionSite], blocks: list[BlockSite]
) -> list[LinearSite]:
    """Return the layers that get LoRA without sharing the gate of an attention."""
    own = [linear for site in attentions for linear in _own_gates(config, site)]
    return own + [linear for block in blocks for linear in _linears(config, block)]


def _fused(config: Any, site: AttentionSite) -> tuple[FusedQKVLayout, bool] | None:
    """Return the layout of a fused projection and whether its keys are updated, else None."""
    return None if site.layout is None else (site.layout, config.lora_targets != "qv")


def _attach(
    attachment: Attachment,
    path: str,
    fused: tuple[FusedQKVLayout, bool] | None,
    source: GatedProducts,
    role: str,
) -> None:
    layer, rank = attachment.model.get_submodule(path), attachment.config.r
    if attachment.adapter_name is not None:
        attach_variant(layer, attachment.adapter_name, fused, source, role)
    else:
        attachment.child(
            layer,
            LORA_CHILD,
            lambda: LoraUpdate(layer, rank, fused, source, role),
            {"first": "after_projection"},  # a prefix reads the updated query
        )


def _linear_gate(
    attachment: Attachment, linear: LinearSite, parent: str, of_encoder: bool
) -> LinearGate:
    """Return the layer with the gate of linear layers, made the first time."""
    first, passes = attachment.model.get_submodule(linear.name), attachment.passes[parent]
    layer: LinearGate = attachment.child(
        first, LINEAR_CHILD, lambda: LinearGate(first, passes, of_encoder), {}
    )
    return layer


def _fold_layer(
    folding: Folding,
    path: str,
    factor: float,
    fused: tuple[FusedQKVLayout, bool] | None,
    update: bool,
) -> None:
    """Add factor · B A to the weight of one layer, or keep A and factor · B beside it."""
    a, b = (folding.checkpoint[f"{path}.lora_{matrix}.weight"] for matrix in "AB")
    if update:
        rank = folding.config.r
        folding.updates[f"{path}.weight"] = weight_update(
            a.float(), factor * b.float(), fused, rank
        )
    else:
        folding.tensors[f"{path}.{LORA_CHILD}.lora_A.weight"] = a
        folding.tensors[f"{path}.{LORA_CHILD}.lora_B.weight"] = b * factor
