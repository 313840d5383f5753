"""UniPELT inside an exported folder, where neither scaleup nor PEFT is installed.

`scaleup.export.folder` writes this file into the folder as its modelling code, together with the definitions of scaleup that it uses, word
for word: what a user loads there is what was trained here. Only three things differ: a side layer has one set of weights
instead of PEFT's many, prefixes are keys and values instead of PEFT's encoder, LoRA is a hook instead of PEFT's layer.

Names that other modules of scaleup define too (AuxiliaryLayer, ATTENTION) replace theirs in the folder.

Shapes: N attentions of one model and kind, G key-value heads, L prefix length, E head size.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from scaleup.unipelt.adapter import Bottleneck, PostNormAdapter, PreNormAdapter
from scaleup.unipelt.attach import (
    PREFIX_CHILD,
    BLOCK_CHILD,
    _child,
    _hook,
    _use_slot,
    use_prefix_attention,
)
from scaleup.unipelt.attention_site import AttentionGates
from scaleup.unipelt.gate import ConstantGate, LearnedGate, cast_to_weight
from scaleup.unipelt.kernels.narrow import add_lora, scaled
from scaleup.unipelt.lora import FusedUpdate, GateSource
from scaleup.unipelt.pooling import Tokens
from scaleup.unipelt.prefix import CHILD, WideMasks
from scaleup.unipelt.sites import AttentionSite, BlockSite, FusedQKVLayout

# Names of their own: a process may have scaleup and several exported models.
ATTENTION = {"sdpa": "unipelt_exported_sdpa", "eager": "unipelt_exported_eager"}
LORA_CHILD = "unipelt_lora"


class AuxiliaryLayer(nn.Module):
    """A module beside another one, with one entry under each of `adapter_layer_names`."""

    def __init__(self, neighbour: nn.Module):
        super().__init__()
        for name in self.adapter_layer_names:
            self.register_module(name, None)

    def active(self, entry: nn.Module | None) -> nn.Module | None:
        return entry


class Prefixes(nn.Module):
    """Keys and values [N, 2, G, L, E] of one model's attentions of one kind."""

    def __init__(self, layers: int, kv_heads: int, length: int, head_size: int):
        super().__init__()
        self.unipelt_prefix = nn.Parameter(torch.empty(layers, 2, kv_heads, length, head_size))
        self.masks = WideMasks()

    def before_forward(self, host: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the model."""
        self.masks = WideMasks()

    def layer(self, index: int) -> torch.Tensor:
        return self.unipelt_prefix.detach()[index]


class LoraUpdate(nn.Module):
    """G_L · B(A x) on top of a projection, where it is not folded into the weight."""

    def __init__(
        self,
        projection: nn.Module,
        rows: FusedQKVLayout | None,
        rank: int,
        source: GateSource,
        role: str,
    ):
        super().__init__()
        if rows is None:
            outside, inside = projection.weight.shape
            self.lora_A, self.lora_B = (
                nn.Linear(inside, rank, bias=False),
                nn.Linear(rank, outside, bias=False),
            )
        else:
            self.lora_A, self.lora_B = (
                nn.Linear(source.site.hidden_size, 2 * rank, bias=False),
                FusedUpdate(rank, rows),
            )
        self._source, self.role = (source,), role
        source.lend(role, self.lora_A, None)

    def after_projection(
        self, projection: nn.Module, args: tuple, output: torch.Tensor
    ) -> torch.Tensor:
        """Forward hook of the projection."""
        gate = self._source[0].lora_gate(self.role)
        if gate is None:
            return output
        gated = self._source[0].lora_product(self.role, args[0])
        gated = (
            scaled(gate, self.lora_A(cast_to_weight(args[0], self.lora_A.weight)))
            if gated is None
            else gated
        )
        return add_lora(output, gated, self.lora_B, projection).to(output.dtype)


class AllReal:
    """In place of `Tokens` where no gate is left that would ask which tokens are real."""

    encoder_mask_BS = None

    def real(self, tokens: int) -> None:
        return None


def all_real(model: PreTrainedModel, host: str, sites: list[AttentionSite]) -> AllReal:
    """As `_tokens`, for constant gates."""
    return AllReal()


def constant_gate(layer: nn.Module, entry: dict, hidden_size: int, tokens: AllReal) -> nn.Module:
    """From {name: value}."""
    return ConstantGate(entry["gates"])


def learned_gate(layer: nn.Module, entry: dict, hidden_size: int, tokens: Tokens) -> nn.Module:
    """From names; with its place in the KV cache."""
    gate = LearnedGate(hidden_size, tuple(entry["gates"]), entry["pooling"])
    _use_slot(layer.running, gate, tokens)
    return gate


def attach_exported(
    model: PreTrainedModel, spec: dict, tokens_of: Callable, gate_of: Callable
) -> None:
    """What `spec`, the `unipelt` entry of the folder's config.json, says is left of UniPELT, as modules to load weights into.

    `tokens_of`, `gate_of`: `_tokens` and `learned_gate`, or `all_real` and `constant_gate`.
    """
    sites = [
        AttentionSite(
            **entry["site"]
            | {"rows": FusedQKVLayout(**entry["site"]["rows"]) if entry["site"]["rows"] else None}
        )
        for entry in spec["attentions"]
    ]
    blocks = [BlockSite(**entry["site"]) for entry in spec["blocks"]]
    if any(
        "prefix" in entry["gates"] and site.softmax_scale is None
        for site, entry in zip(sites, spec["attentions"])
    ):
        use_prefix_attention(model)
    tokens = {
        host: tokens_of(model, host, sites)
        for host in dict.fromkeys(site.host for site in [*sites, *blocks])
    }
    for (host, cross), sizes in spec["prefixes"]:
        _child(
            model.get_submodule(host),
            PREFIX_CHILD[cross],
            lambda: Prefixes(*sizes),
            {"before": "before_forward"},
        )
    for site, entry in zip(sites, spec["attentions"]):
        if entry["gates"]:
            _attach_to_attention(model, site, entry, tokens[site.host], gate_of)
    for site, entry in zip(blocks, spec["blocks"]):
        _attach_to_block(model, site, entry, tokens[site.host], gate_of)


def _attach_to_attention(
    model: PreTrainedModel, site: AttentionSite, entry: dict, tokens: Tokens, gate_of: Callable
) -> None:
    attention, query = model.get_submodule(site.name), model.get_submodule(site.query)
    bank = (
        model.get_submodule(site.host)._modules[PREFIX_CHILD[site.cross]]
        if "prefix" in entry["gates"]
        else None
    )
    child = _child(
        attention,
        CHILD,
        lambda: AttentionGates(query, site, tokens, bank),
        {"before": "before_attention", "always": "after_attention"},
    )
    child.unipelt_gate = gate_of(child, entry, site.hidden_size, tokens)
    for role, name in {"query": site.query, "value": site.value}.items() if entry["rank"] else ():
        projection = model.get_submodule(name)
        _child(
            projection,
            LORA_CHILD,
            lambda: LoraUpdate(projection, site.rows, entry["rank"], child, role),
            {"after": "after_projection"},
        )
    if (
        site.softmax_scale is not None and bank is not None
    ):  # after LoRA: it reads the updated query
        _hook(child, query, "after", "after_query")


def _attach_to_block(
    model: PreTrainedModel, site: BlockSite, entry: dict, tokens: Tokens, gate_of: Callable
) -> None:
    if site.norm is None:
        layer = _child(
            model.get_submodule(site.name),
            BLOCK_CHILD,
            lambda: PreNormAdapter(None, tokens),
            {"after": "after_block"},
        )
    else:
        layer = PostNormAdapter(model.get_submodule(site.norm), tokens)
        model.set_submodule(site.norm, layer)
    layer.unipelt_adapter = Bottleneck(site.hidden_size, entry["size"], entry["activation"])
    layer.unipelt_gate = gate_of(layer, entry, site.hidden_size, tokens)
