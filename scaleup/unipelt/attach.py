"""Attaching UniPELT to the sites of a model: gates, prefixes, adapters as child modules with hooks, LoRA as a variant of PEFT's.

What sits where: on every model that gets a padding mask, a `Tokens` and its prefixes; on every attention, `AttentionGates`; on
query and value, PEFT's LoRA with a gate; at the end of every block, the adapter.
"""

from peft.tuners.lora import LoraConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from scaleup.unipelt import lora
from scaleup.unipelt.adapter import Bottleneck, PostNormAdapter, PreNormAdapter
from scaleup.unipelt.attention_site import AttentionGates
from scaleup.unipelt.gate import GateFactory, LearnedGate, gate_factory
from scaleup.unipelt.pooling import RunningMean, Tokens
from scaleup.unipelt.prefix import ATTENTION, CHILD, PrefixTuning
from scaleup.unipelt.sites import AttentionSite, BlockSite, mask_arguments

TOKENS_CHILD, BLOCK_CHILD = "unipelt_tokens", "unipelt_block"
PREFIX_CHILD = {False: "unipelt_bank_self", True: "unipelt_bank_cross"}


def use_prefix_attention(model: PreTrainedModel) -> None:
    """Switches the model to the attention functions that know prefixes. Raises ValueError for one without such a function."""
    for part in with_own_config(model):
        current = part.config._attn_implementation
        if current in ATTENTION.values():
            continue
        if current not in ATTENTION:
            raise ValueError(
                f"the prefix works with sdpa or eager attention, not with {current}; load the model with attn_implementation='sdpa'"
            )
        part.set_attn_implementation(ATTENTION[current])
        assert part.config._attn_implementation == ATTENTION[current]


def with_own_config(model: nn.Module) -> list[PreTrainedModel]:
    """The models in a model, one for each config: T5's encoder and decoder have copies, which a switch of the whole does not reach."""
    return list(
        {
            id(part.config): part for part in model.modules() if isinstance(part, PreTrainedModel)
        }.values()
    )


def _child(parent: nn.Module, name: str, make, hooks: dict[str, str]) -> nn.Module:
    """`parent.name`, made and hooked up the first time. Hooks are bound methods, so copies of the model keep working."""
    if name not in parent._modules:
        child = make()
        parent.add_module(name, child)
        child.handles = []
        for kind, method in hooks.items():
            _hook(child, parent, kind, method)
    return parent._modules[name]


def _hook(child: nn.Module, module: nn.Module, kind: str, method: str) -> None:
    """`child.method` before or after each forward pass of `module`; "always" after one that failed, too."""
    if kind == "before":
        handle = module.register_forward_pre_hook(getattr(child, method), with_kwargs=True)
    else:
        handle = module.register_forward_hook(getattr(child, method), always_call=kind == "always")
    child.handles.append(handle)


def attach(
    model: nn.Module,
    name: str,
    config: LoraConfig,
    attentions: list[AttentionSite],
    blocks: list[BlockSite],
) -> None:
    """Everything of the adapter `name` but PEFT's LoRA layers, which are there. `config`: a UniPeltConfig."""
    lora_scaling = config.lora_alpha / config.r if "lora" in config.submodules else 1.0
    gates = gate_factory(config.gates == "learned", config.gate_pooling, lora_scaling)
    tokens = {
        host: _tokens(model, host, attentions)
        for host in dict.fromkeys(site.host for site in attentions)
    }
    banks = (
        _attach_prefixes(model, name, config, attentions) if "prefix" in config.submodules else {}
    )
    names = tuple(part for part in ("prefix", "lora") if part in config.submodules)
    for site in attentions if names else ():
        _attach_attention(
            model, name, site, names, tokens[site.host], banks.get((site.host, site.cross)), gates
        )
    for site in blocks if "adapter" in config.submodules else ():
        _attach_adapter(model, name, config, site, tokens[site.host], gates)


def _tokens(model: nn.Module, host: str, attentions: list[AttentionSite]) -> Tokens:
    module = model.get_submodule(host)
    fresh = TOKENS_CHILD not in module._modules
    child = _child(
        module,
        TOKENS_CHILD,
        lambda: Tokens(mask_arguments(module)),
        {"before": "capture", "after": "store"},
    )
    causal = [site for site in attentions if site.host == host and site.causal]
    if fresh and causal:
        child.kv_layers = len(causal)
        _hook(child, model.get_submodule(causal[0].name), "before", "note_cache")
    return child


def _use_slot(running: RunningMean, gate: nn.Module, tokens: Tokens) -> None:
    """A place in the KV cache for the totals of a decoder's gate."""
    if (
        isinstance(gate, LearnedGate)
        and gate.pooling == "causal"
        and tokens.kv_layers
        and len(gate.names) not in running.slots
    ):
        running.slots[len(gate.names)] = tokens.new_slot(len(gate.names))


def _attach_prefixes(model, name, config, attentions) -> dict[tuple[str, bool], PrefixTuning]:
    """One bank per model and kind of attention: BART gets encoder self, decoder self and cross."""
    banks = {}
    for key in dict.fromkeys((site.host, site.cross) for site in attentions):
        sites = [site for site in attentions if (site.host, site.cross) == key]
        first = sites[0]
        bank = _child(
            model.get_submodule(first.host),
            PREFIX_CHILD[first.cross],
            lambda: PrefixTuning(
                model.get_submodule(first.value), len(sites), first.kv_heads, first.head_size
            ),
            {"before": "before_forward"},
        )
        bank.add(
            name,
            unipelt_prefix=bank.encoder(
                config.prefix_length, config.prefix_hidden_size, config.prefix_reparameterization
            ),
        )
        banks[key] = bank
    return banks


def _attach_attention(
    model: nn.Module,
    name: str,
    site: AttentionSite,
    names: tuple[str, ...],
    tokens: Tokens,
    bank: PrefixTuning | None,
    gates: GateFactory,
) -> None:
    child = _child(
        model.get_submodule(site.name),
        CHILD,
        lambda: AttentionGates(model.get_submodule(site.query), site, tokens, bank),
        {"before": "before_attention", "always": "after_attention"},
    )
    child.use_bank(bank)
    gate = gates(site.hidden_size, names, site.causal_block)
    child.add(name, unipelt_gate=gate)
    _use_slot(child.running, gate, tokens)
    if site.softmax_scale is not None and bank is not None and not child.watches_query:
        child.watches_query = True
        _hook(child, model.get_submodule(site.query), "after", "after_query")
    if "lora" in names and site.rows is not None:
        lora.attach_fused(model.get_submodule(site.query), name, child, site.rows)
    elif "lora" in names:
        lora.attach(model.get_submodule(site.query), name, child, "query")
        lora.attach(model.get_submodule(site.value), name, child, "value")


def _attach_adapter(
    model: nn.Module,
    name: str,
    config: LoraConfig,
    site: BlockSite,
    tokens: Tokens,
    gates: GateFactory,
) -> None:
    block = model.get_submodule(site.name)
    if site.norm is None:
        linear = next(
            module for module in block.modules() if isinstance(module, (nn.Linear, Conv1D))
        )
        layer = _child(
            block, BLOCK_CHILD, lambda: PreNormAdapter(linear, tokens), {"after": "after_block"}
        )
    else:
        layer = model.get_submodule(site.norm)
        if not isinstance(layer, PostNormAdapter):
            layer = PostNormAdapter(layer, tokens)
            parent, _, child = site.norm.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
    gate = gates(site.hidden_size, ("adapter",), site.causal)
    layer.add(
        name,
        unipelt_adapter=Bottleneck(
            site.hidden_size, config.adapter_size, config.adapter_activation
        ),
        unipelt_gate=gate,
    )
    _use_slot(layer.running, gate, tokens)
