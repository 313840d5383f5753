"""Convert the weights of UniPELT to those of an exported folder.

A gate that is replaced by a constant g disappears into the weights that it scales:

    W ← W + g_L B A        W_up, b_up ← g_A W_up, g_A b_up        P_K, P_V ← g_P P_K, g_P P_V

The formula of each submodule is in its own file. The MLP that produces a prefix is evaluated once
and is not part of any export. Nothing here needs the backbone's weights.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig
from safetensors import safe_open

from scaleup.backbone.weights import tensor_files
from scaleup.unipelt.attachment import SiteGates
from scaleup.unipelt.config import UniPeltConfig
from scaleup.unipelt.exported import specification
from scaleup.unipelt.model import PEFT_PREFIX, submodule_of
from scaleup.unipelt.site_types import AttentionSite, BlockSite
from scaleup.unipelt.submodule import Folding, Gates
from scaleup.unipelt.submodules import chosen


@dataclasses.dataclass(frozen=True)
class Folded:
    """A folded adapter.

    Attributes:
        specification: the `unipelt` entry of config.json, None if only plain weights remain.
        tensors: tensors that are added to the backbone's or replace them.
        updates: name of a weight → function that returns what is added to it, [out, in].
        renamed: modules whose parameters move into another module.
    """

    specification: dict[str, Any] | None
    tensors: dict[str, torch.Tensor]
    updates: dict[str, Callable[[], torch.Tensor]]
    renamed: dict[str, str]


def read_checkpoint(folder: pathlib.Path) -> tuple[UniPeltConfig, dict[str, torch.Tensor]]:
    """Return the config and the tensors of an adapter checkpoint, the prefix's MLP collapsed.

    Tensors have their names in the model.
    """
    config: Any = PeftConfig.from_pretrained(str(folder))
    assert isinstance(config, UniPeltConfig), type(config)
    tensors: dict[str, torch.Tensor] = {}
    for path in tensor_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (the file is not a mapping)
                tensors[name.removeprefix(PEFT_PREFIX)] = file.get_tensor(name)
    for submodule in chosen(config):
        config, tensors = submodule.collapse(config, tensors)
    return config, tensors


def constant_gates(
    config: UniPeltConfig, attentions: list[AttentionSite], blocks: list[BlockSite]
) -> Gates:
    """Return the constants of a model without learned gates."""
    return {
        (path, submodule.name): submodule.constant_gate(config)
        for submodule in chosen(config)
        for path in submodule.paths(config, attentions, blocks)
    }


def fold(
    config: UniPeltConfig,
    tensors: dict[str, torch.Tensor],
    attentions: list[AttentionSite],
    blocks: list[BlockSite],
    gates: Gates | None,
    dropped: frozenset[tuple[str, str]] = frozenset(),
) -> Folded:
    """Fold an adapter.

    Args:
        config, tensors: what `read_checkpoint` returned.
        attentions, blocks: the sites of the model.
        gates: a constant for each gate, None to keep gates learned.
        dropped: (path of a site, submodule) pairs to leave out.
    """
    folding = Folding(config, tensors, gates, frozenset(dropped))
    for submodule in chosen(config):
        submodule.fold(folding, attentions, blocks)
    head = {name: tensor for name, tensor in tensors.items() if submodule_of(name) is None}
    constant = None if gates is None else 1.0  # constants are in the weights
    kept: SiteGates = {path: dict.fromkeys(names, constant) for path, names in folding.kept.items()}
    spec = specification(config, attentions, blocks, kept) if kept else None
    return Folded(spec, folding.tensors | head, folding.updates, folding.renamed)
