"""Prefix-tuning: learned keys and values in front of every attention (Li and Liang 2021).

    softmax([g q·P_Kᵀ, q·Kᵀ] / √E) · [g P_V; V]    L = 10; MLP d → 512 → 2·N·d with Tanh in training

The parameters and their values in one forward pass are in `prefix_bank.py`, and how the prefix
enters the attention is in `attention.py`.

Shapes: B examples, T queries, G key-value heads, E head size, L prefix length, N layers.
"""

import dataclasses
import functools
from typing import Any

import torch
from torch import nn

from .attachment import Attachment
from .attention import ATTENTION_CHILD, Prefix, use_prefix_attention
from .attention_gates import AttentionGates, AttentionInputs, AttentionMember
from .kernels import Entry, PlainPath
from .masks import PassMasks, with_position_bias
from .prefix_bank import PREFIX_CHILD, PassPrefixes, PrefixTuning
from .site_types import AttentionSite, BlockSite
from .softmax_prefix import SoftmaxPrefix
from .submodule import LARGEST, Folding, Submodule, option


@dataclasses.dataclass
class PrefixOptions:
    """Settings of the prefix."""

    prefix_length: int = option(
        10,
        "Number of learned positions (keys and values) in front of each attention.",
        at_least=1,
        at_most=LARGEST,
    )
    prefix_hidden_size: int = option(
        512, "Hidden size of the MLP that produces the prefix, units.", at_least=1, at_most=LARGEST
    )
    prefix_reparameterization: str = option(
        "mlp",
        "Train the prefix through an MLP (paper; ~10M more weights while training), or directly.",
        choices=("mlp", "none"),
    )
    prefix_positions: str = option(
        "none",
        "Positions of the prefix in T5, which adds a bias to scores by relative position. none: "
        "the prefix has none, and no bias. counted: it precedes the tokens and moves them away "
        "from the queries, as in the library adapters; this is slower.",
        choices=("none", "counted"),
    )


@dataclasses.dataclass(slots=True)
class PrefixCall:
    """The state of one call of an attention.

    Attributes:
        prefix: the gated prefix, until the attention takes it.
        masks: those of the pass.
        dropout: probability, of an attention that computes its softmax itself.
        softmax: the prefix in such an attention.
    """

    prefix: Prefix | None
    masks: PassMasks
    dropout: float = 0.0
    softmax: SoftmaxPrefix | None = None


class PrefixMember(AttentionMember):
    """Hands the gated prefix to one attention."""

    def __init__(self, layer: AttentionGates, bank: PrefixTuning, index: int):
        self.layer, self.bank, self.index = layer, bank, index
        self.causal = layer.site.causal
        self.watches_query = False

    def narrow(self) -> list[Entry]:
        """Return no maps: the prefix only needs its gate."""
        if self.layer.site.softmax_scale is not None:
            raise PlainPath("an attention computes its softmax itself")
        return []

    def begin(
        self, attention: Any, kwargs: dict[str, Any], inputs: AttentionInputs
    ) -> PrefixCall | None:
        """Keep the prefix until the attention function takes it.

        Raises:
            ValueError: gradients would be lost.
        """
        prefixes: PassPrefixes | None = self.layer.passes.current.shared.get(self.bank)
        if prefixes is None:
            return None
        kv = prefixes.layers_kv[self.index]
        if kv.requires_grad and not torch.is_grad_enabled():
            raise ValueError(
                "reentrant gradient checkpointing loses the gradient of the prefix; "
                "use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        assert inputs.gate is not None
        call = PrefixCall((kv, inputs.gate), prefixes.masks)
        if self.layer.site.softmax_scale is not None:
            call.dropout = attention.dropout.p if attention.training else 0.0
        return call

    def take_prefix(self) -> tuple[Prefix, PassMasks] | None:
        """Return the prefix of this call, once, and the masks that the pass shares.

        The attention function calls it.
        """
        call: PrefixCall | None = self.call
        if call is None or call.prefix is None:
            return None
        prefix, call.prefix = call.prefix, None
        return prefix, call.masks

    def observer(self) -> Any:
        """Return where to report the change that the prefix makes, or None."""
        observer = self.layer.observer
        return None if observer is None else lambda change, whole: observer("prefix", change, whole)

    def after_query(
        self, projection: nn.Module, args: tuple[Any, ...], query_BTD: torch.Tensor
    ) -> None:
        """Intercept the softmax. This is a forward hook of the query projection.

        The first call of a pass is for the queries. DeBERTa sends its position embeddings through
        the same projection later.
        """
        taken, call = self.take_prefix(), self.call
        if taken is not None:
            scale = self.layer.site.softmax_scale
            assert scale is not None
            call.softmax = SoftmaxPrefix(taken[0], query_BTD, scale, call.dropout)
            call.softmax.__enter__()

    def before_output(
        self, projection: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Add the prefix's context to the input of the attention's output projection."""
        call: PrefixCall | None = self.call
        softmax = None if call is None else call.softmax
        if softmax is None or softmax.share_BHTL is None:
            return None  # `end` reports it
        return (self._joined(softmax, args[0]), *args[1:]), kwargs

    def _joined(self, softmax: SoftmaxPrefix, real_BTD: torch.Tensor) -> torch.Tensor:
        """Return the attention's output with the prefix's context."""
        observer = self.observer()
        if observer is not None:
            observer(*softmax.change(real_BTD))
        return real_BTD + softmax.context()

    def end(self, call: PrefixCall, output: Any) -> Any:
        """Finish the call, and add the prefix's context that no output projection has taken.

        Raises:
            RuntimeError: if the attention did not use the prefix.
        """
        softmax = call.softmax
        if softmax is not None:
            softmax.__exit__(None, None, None)
        if output is None:
            return None
        if call.prefix is not None or (softmax is not None and softmax.share_BHTL is None):
            raise RuntimeError(
                "the attention ignored its prefix: its implementation was changed after UniPELT "
                "was attached; use set_attn_implementation('unipelt_sdpa') or 'unipelt_eager'"
            )
        if softmax is None or self.layer.site.output is not None:
            return None
        return (self._joined(softmax, output[0]), *output[1:])


class PrefixSubmodule(Submodule):
    """Prefix-tuning P."""

    name = "prefix"
    learning_rate = 2e-4
    in_paper = True
    options = PrefixOptions
    parameters = (".unipelt_prefix.",)
    unmergeable = "a prefix changes the softmax"

    def paths(
        self, config: Any, attentions: list[AttentionSite], blocks: list[BlockSite]
    ) -> list[str]:
        return [site.name for site in attentions]

    def check(self, attentions: list[AttentionSite]) -> None:
        for site in attentions:
            if not site.takes_prefix:
                raise ValueError(
                    f"prefix: no prefix can be put into {site.name}, because this model type "
                    "computes attention itself; leave prefix out of submodules"
                )

    def prepare(self, model: Any, attentions: list[AttentionSite], blocks: list[BlockSite]) -> None:
        self.check(attentions)
        if any(site.softmax_scale is None for site in attentions):
            use_prefix_attention(model)

    def attach(self, attachment: Attachment) -> None:
        """Attach one bank per parent model and kind: BART has encoder self, decoder self, cross."""
        for (parent, cross), sites in self._attached_banks(attachment).items():
            first = sites[0]
            value = attachment.model.get_submodule(first.value)
            arguments = attachment.passes[parent], len(sites), first.kv_heads, first.head_size
            bank = attachment.child(
                attachment.model.get_submodule(parent),
                PREFIX_CHILD[cross],
                functools.partial(PrefixTuning, value, *arguments),
                {"before": "before_forward"},
            )
            bank.add(attachment.adapter_name, unipelt_prefix=self._entry(attachment, bank))
            bank.counted.pop(attachment.adapter_name, None)  # of an earlier adapter of this name
            if attachment.config.prefix_positions == "counted" and not cross:
                path = _banks(attachment.attentions)[parent, cross][0].name
                relative = with_position_bias(attachment.model.get_submodule(path))
                bank.counted[attachment.adapter_name] = (relative,)

    def _attached_banks(
        self, attachment: Attachment
    ) -> dict[tuple[str, bool], list[AttentionSite]]:
        """Return the attentions of each bank that get a prefix, in the bank's order."""
        return _banks([s for s in attachment.attentions if attachment.has(s.name, self.name)])

    def _entry(self, attachment: Attachment, bank: PrefixTuning) -> nn.Module | nn.Parameter:
        config = attachment.config
        if attachment.adapter_name is not None:
            return bank.encoder(
                config.prefix_length, config.prefix_hidden_size, config.prefix_reparameterization
            )
        shape = (bank.layers, 2, bank.kv_heads, config.prefix_length, bank.head_size)
        return nn.Parameter(torch.empty(shape))

    def attach_to_attention(self, attachment: Attachment, site: AttentionSite) -> None:
        layer = attachment.attention(site)
        member = layer.members.get(self.name)
        if not isinstance(member, PrefixMember):
            parent = attachment.model.get_submodule(site.parent)
            bank: Any = parent.get_submodule(PREFIX_CHILD[site.cross])
            index = self._attached_banks(attachment)[site.parent, site.cross].index(site)
            member = PrefixMember(layer, bank, index)
            layer.members[self.name] = layer.prefix_source = member
        if site.softmax_scale is not None and not member.watches_query:
            member.watches_query = True
            module = attachment.model.get_submodule
            attachment.hook(layer, module(site.query), "after", member.after_query)
            if site.output is not None:
                attachment.hook(layer, module(site.output), "before", member.before_output)

    def stored(self, model: nn.Module) -> int | None:
        return sum(m.stored() for m in model.modules() if isinstance(m, PrefixTuning))

    def collapse(
        self, config: Any, tensors: dict[str, torch.Tensor]
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """Replace the MLP by the prefixes [L, 2·N·G·E] that it produces."""
        if config.prefix_reparameterization == "none":
            return config, tensors
        mark, weight = ".unipelt_prefix.transform.", ".unipelt_prefix.embedding.weight"
        kept = {name: tensor for name, tensor in tensors.items() if mark not in name}
        for name in [name for name in kept if name.endswith(weight)]:
            mlp = name.removesuffix("embedding.weight") + "transform."
            first, second = (
                (tensors[f"{mlp}{i}.weight"].float(), tensors[f"{mlp}{i}.bias"].float())
                for i in (0, 2)
            )
            hidden = torch.tanh(nn.functional.linear(kept[name].float(), *first))
            kept[name] = nn.functional.linear(hidden, *second).to(kept[name].dtype)
        return dataclasses.replace(config, prefix_reparameterization="none"), kept

    def fold(
        self, folding: Folding, attentions: list[AttentionSite], blocks: list[BlockSite]
    ) -> None:
        """Scale P_K and P_V by the constant gate, and stack those of one parent model."""
        for (parent, cross), sites in _banks(attentions).items():
            bank = f"{parent}.{PREFIX_CHILD[cross]}.unipelt_prefix"
            weight = folding.checkpoint[f"{bank}.embedding.weight"]
            shape = (folding.config.prefix_length, len(sites), 2, sites[0].kv_heads, -1)
            layers_N2GLE = weight.view(shape).permute(1, 2, 3, 0, 4)
            remaining = []
            for site in sites:
                if (site.name, self.name) in folding.dropped:
                    continue
                remaining.append(layers_N2GLE[site.layer] * folding.factor(site.name, self.name))
                gate = f"{site.name}.{ATTENTION_CHILD}.unipelt_gate."
                folding.keep_gate(site.name, gate, self.name)
            if remaining:
                folding.tensors[bank] = torch.stack(remaining)


def _banks(attentions: list[AttentionSite]) -> dict[tuple[str, bool], list[AttentionSite]]:
    """Group attentions by parent model and kind (self or cross)."""
    banks: dict[tuple[str, bool], list[AttentionSite]] = {}
    for site in attentions:
        banks.setdefault((site.parent, site.cross), []).append(site)
    return banks
