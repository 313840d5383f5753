"""Prefix-tuning: learned keys and values in front of every attention (Li and Liang 2021).

    softmax([g q·P_Kᵀ, q·Kᵀ] / √E) · [g P_V; V]    L = 10; MLP d → 512 → 2·N·d with Tanh in training

The parameters are PEFT's `PrefixEncoder`, evaluated once per forward pass of the model that owns
the attentions. How the prefix enters the attention is in `attention.py`.

Shapes: B examples, T queries, G key-value heads, E head size, L prefix length, N layers.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import torch
from torch import nn

from .attachment import Attachment
from .attention import ATTENTION_CHILD, Prefix, use_prefix_attention
from .attention_gates import AttentionGates, AttentionInputs, AttentionMember
from .kernels import Entry, PlainPath, fast_path, few_rows, state_of
from .layers import AuxiliaryLayer
from .masks import PassMasks, with_position_bias
from .passes import Passes, undivided
from .peft_names import PrefixEncoder, PrefixTuningConfig
from .pooling import find_cache, kept_beside
from .site_types import AttentionSite, BlockSite
from .softmax_prefix import SoftmaxPrefix
from .submodule import LARGEST, Folding, Submodule, option

# The child of a parent model that holds the prefixes of its self or cross attentions.
PREFIX_CHILD = {False: "unipelt_bank_self", True: "unipelt_bank_cross"}


@dataclasses.dataclass
class PrefixOptions:
    """Settings of the prefix."""

    prefix_length: int = option(
        10,
        "Learned keys and values in front of each attention, positions.",
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


class PassPrefixes(NamedTuple):
    """What the attentions of one forward pass share.

    Attributes:
        layers_kv: keys and values [2, G, L, E] of each layer.
        masks: attention masks that layers share.
    """

    layers_kv: tuple[torch.Tensor, ...]
    masks: PassMasks


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


class PrefixTuning(AuxiliaryLayer):
    """The prefixes of one parent model's self or cross attentions. It is a child of that model."""

    adapter_layer_names = ("unipelt_prefix",)

    def __init__(
        self,
        reference_module: nn.Module,
        passes: Passes,
        layers: int,
        kv_heads: int,
        head_size: int,
    ):
        super().__init__(reference_module, passes)
        self.layers, self.kv_heads, self.head_size = layers, kv_heads, head_size
        # Adapter → the attention whose position bias counts its prefix, in a tuple, because it is
        # no child.
        self.counted: dict[str | None, tuple[nn.Module]] = {}

    @property
    def relative(self) -> nn.Module | None:
        """The attention whose position bias counts the active adapter's prefix, if one does."""
        names = self.active_names() or (None,)  # None in an exported folder
        return next((self.counted[name][0] for name in names if name in self.counted), None)

    def encoder(self, length: int, hidden_size: int, reparameterization: str) -> nn.Module:
        """Return PEFT's prefix encoder: an MLP ("mlp") or the keys and values themselves ("none").

        As in the authors' code, where BERT's initialisation reaches the prefix, weights are drawn
        from N(0, 0.02) and biases start at 0. PEFT's default, an embedding from N(0, 1), starts
        with a prefix that outweighs a short sentence.
        """
        config = PrefixTuningConfig(
            num_virtual_tokens=length,
            token_dim=self.kv_heads * self.head_size,
            num_layers=self.layers,
            encoder_hidden_size=hidden_size,
            prefix_projection=reparameterization == "mlp",
        )
        encoder = PrefixEncoder(config)
        for module in encoder.modules():
            if isinstance(module, (nn.Embedding, nn.Linear)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        return encoder

    def keys_values(self, encoder: Any) -> torch.Tensor:
        """Compute the keys and values of all layers, [N, 2, G, L, E].

        The layout is the authors' and PEFT's: entry 2i are the keys of layer i, entry 2i+1 its
        values.
        """
        # Under ZeRO-3 the weight is empty between calls, so the length comes from the layer's
        # record.
        weight = encoder.embedding.weight
        out = encoder.embedding(
            torch.arange(encoder.embedding.num_embeddings, device=weight.device)
        )
        for part in encoder.transform if encoder.prefix_projection else ():
            out = few_rows(out, part) if isinstance(part, nn.Linear) else part(out)
        if torch.is_autocast_enabled(out.device.type):  # once here instead of once per layer
            out = out.to(torch.get_autocast_dtype(out.device.type))
        out = out.view(-1, self.layers, 2, self.kv_heads, self.head_size)
        return out.permute(1, 2, 3, 0, 4).contiguous()

    def before_forward(
        self, parent: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Evaluate the prefixes. This is a forward pre-hook of the parent model.

        During generation they are evaluated once, not for each token.
        """
        entry = None if undivided() else self.active("unipelt_prefix")
        if entry is None:
            return
        if isinstance(entry, nn.Parameter):  # an exported folder holds [N, 2, G, L, E]
            kv = entry.detach()
        else:
            kv = self._kept(entry, kept_beside(find_cache((*kwargs.values(), *args))))
        masks = PassMasks(fast_path(kv), self.relative)
        # unbind: one index per layer would each create a gradient of the size of all layers.
        self.passes.current.shared[self] = PassPrefixes(kv.unbind(), masks)

    def _kept(self, entry: nn.Module, kept: dict[Any, Any] | None) -> torch.Tensor:
        """Return `keys_values`, from what is kept beside a KV cache if the weights are the same."""
        if kept is None:
            return self.keys_values(entry)
        state, (known, kv) = None, kept.get((self, entry), (None, None))
        if not torch.compiler.is_compiling():  # compilers cannot trace it
            parameters = list(entry.parameters())
            state = self.passes.trained, tuple(map(id, parameters)), state_of(parameters)
        if kv is None or state not in (None, known):
            kv = self.keys_values(entry)
            kept[self, entry] = state, kv
        return kv

    def stored(self) -> int:
        """Return the number of values that remain after training."""
        width = 2 * self.layers * self.kv_heads * self.head_size
        encoders: Any = self.unipelt_prefix
        return sum(e.embedding.num_embeddings * width for e in encoders.values())


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
            ValueError: where gradients would be lost.
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
        return (args[0] + softmax.context(), *args[1:]), kwargs

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
        return (output[0] + softmax.context(), *output[1:])


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
