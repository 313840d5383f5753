"""The list of submodules. Its order is the order in which gates of one site are stored."""

from typing import Any

from .adapter import Adapter
from .attachment import Attachment, SiteGates
from .lora import Lora
from .parallel_adapter import ParallelAdapter
from .prefix import PrefixSubmodule
from .site_types import AttentionSite, BlockSite
from .submodule import Submodule

SUBMODULES: dict[str, Submodule] = {
    submodule.name: submodule
    for submodule in (Adapter(), PrefixSubmodule(), Lora(), ParallelAdapter())
}


def register(submodule: Submodule) -> None:
    """Add a submodule that is defined outside of this package, in every process that uses it.

    Its parameters of construction are its settings: the config of UniPELT has no fields for it.

    Raises:
        ValueError: if its name is taken.
    """
    if submodule.name in SUBMODULES:
        raise ValueError(f"a submodule named {submodule.name} exists already; choose another name")
    SUBMODULES[submodule.name] = submodule


def chosen(config: Any) -> list[Submodule]:
    """Return the submodules that a config asks for, in the order of the list."""
    return [submodule for name, submodule in SUBMODULES.items() if name in config.submodules]


def site_gates(config: Any, attentions: list[AttentionSite], blocks: list[BlockSite]) -> SiteGates:
    """Return the gates of a model in training: learned, or each submodule's constant (NoGate)."""
    gates: SiteGates = {}
    for submodule in chosen(config):
        value = None if config.gates == "learned" else submodule.constant_gate(config)
        for path in submodule.paths(config, attentions, blocks):
            gates.setdefault(path, {})[submodule.name] = value
    return gates


def attach(attachment: Attachment) -> None:
    """Attach all submodules of an adapter. PEFT's LoRA layers must be there already.

    The order is fixed, because a seed must keep giving the same initial weights.
    """
    submodules = chosen(attachment.config)
    attachment.gate_scales = {s.name: s.gate_scale(attachment.config) for s in submodules}
    for submodule in submodules:
        submodule.attach(attachment)
    for attention in attachment.attentions:
        for submodule in submodules:
            if attachment.has(attention.name, submodule.name):
                submodule.attach_to_attention(attachment, attention)
    for block in attachment.blocks:
        for submodule in submodules:
            submodule.attach_to_block(attachment, block)
