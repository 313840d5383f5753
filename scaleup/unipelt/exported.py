"""Attaching what is left of UniPELT to a model that is loaded from an exported folder.

The files of this package are copied next to the folder's modelling code unchanged. Neither scaleup
nor PEFT has to be installed there. A layer holds one set of weights instead of one per PEFT
adapter, prefixes are keys and values instead of PEFT's encoder, and LoRA is a hook instead of
PEFT's layer.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedModel

from .attachment import Attachment, SiteGates
from .site_types import AttentionSite, BlockSite, FusedQKVLayout, LinearSite
from .submodules import SUBMODULES, attach, chosen


def specification(
    config: Any, attentions: list[AttentionSite], blocks: list[BlockSite], gates: SiteGates
) -> dict[str, Any]:
    """Return the `unipelt` entry of the folder's config.json.

    Args:
        config: settings of the method.
        attentions, blocks: the sites of the model.
        gates: what remains at each site: submodule → constant, or None for a learned gate.
    """
    remaining = [
        dataclasses.replace(
            block, linears=tuple(linear for linear in block.linears if linear.name in gates)
        )
        for block in blocks
    ]
    fields = [field.name for s in chosen(config) for field in dataclasses.fields(s.options)]
    return {
        "config": {name: getattr(config, name) for name in ("submodules", "gate_pooling", *fields)},
        "attentions": [dataclasses.asdict(site) for site in attentions],
        "blocks": [dataclasses.asdict(block) for block in remaining],
        "gates": gates,
    }


def _linear_site(linears: list[str], hidden_size: int, attention_output: bool) -> LinearSite:
    return LinearSite(tuple(linears), hidden_size, attention_output)


def attach_exported(model: PreTrainedModel, specification: dict[str, Any]) -> None:
    """Attach the modules of a `specification`, into which the folder's weights are loaded."""
    config = SimpleNamespace(**specification["config"])
    attentions = [
        AttentionSite(**site | {"layout": site["layout"] and FusedQKVLayout(**site["layout"])})
        for site in specification["attentions"]
    ]
    blocks = [
        BlockSite(**site | {"linears": tuple(_linear_site(**linear) for linear in site["linears"])})
        for site in specification["blocks"]
    ]
    # JSON does not keep the order of the names, in which the rows of a shared gate are stored.
    gates = {
        path: {name: site[name] for name in SUBMODULES if name in site}
        for path, site in specification["gates"].items()
    }
    used = {name for site in gates.values() for name in site}
    for submodule in chosen(config):
        if submodule.name in used:
            submodule.prepare(model, attentions, blocks)
    attach(Attachment(model, config, attentions, blocks, gates))
