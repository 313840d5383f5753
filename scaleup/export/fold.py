"""What becomes of UniPELT's weights in an exported folder.

With a gate taken for a constant g it disappears into what it scales:

    W ← W + g_L B A            W_up, b_up ← g_A W_up, g_A b_up            P_K, P_V ← g_P P_K, g_P P_V

The MLP behind a prefix is evaluated once and left out, in every kind of export. Nothing here needs the backbone's weights.

Shapes: L prefix length, N attentions of one model and kind, G key-value heads, E head size.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import torch
from peft import PeftConfig
from safetensors import safe_open
from torch import nn

from scaleup.unipelt.attach import BLOCK_CHILD, PREFIX_CHILD
from scaleup.unipelt.config import UniPeltConfig
from scaleup.unipelt.exported import LORA_CHILD
from scaleup.unipelt.gate import resolve_pooling
from scaleup.unipelt.lora import FusedUpdate
from scaleup.unipelt.model import PARTS
from scaleup.unipelt.prefix import CHILD
from scaleup.unipelt.sites import AttentionSite, BlockSite

OUTSIDE = "base_model.model."  # what PEFT puts in front of every name
# (place, "prefix" | "lora" | "value" | "adapter") → constant. The place is the path of an attention, of a post-LN block's norm or of a
# pre-LN block; "value" is the LoRA gate of a cross attention's values.
Gates = dict[tuple[str, str], float]


@dataclasses.dataclass(frozen=True)
class Folded:
    """spec: the `unipelt` entry of config.json, None if plain weights remain. tensors: to add to the backbone's or to put in their
    place. updates: to add to the weight of that name. renamed: modules whose parameters move into another one."""

    spec: dict | None
    tensors: dict[str, torch.Tensor]
    updates: dict[str, Callable[[], torch.Tensor]]
    renamed: dict[str, str]


def read_bundle(folder: pathlib.Path) -> tuple[UniPeltConfig, dict[str, torch.Tensor]]:
    """Config and tensors, by their names in the model, the prefix MLP collapsed."""
    config, tensors = PeftConfig.from_pretrained(str(folder)), {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name.removeprefix(OUTSIDE): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    assert isinstance(config, UniPeltConfig), type(config)
    return collapse(config, tensors)


def collapse(
    config: UniPeltConfig, tensors: dict[str, torch.Tensor]
) -> tuple[UniPeltConfig, dict[str, torch.Tensor]]:
    """The same method with the prefixes [L, 2·N·G·E] themselves in place of the MLP that makes them."""
    if "prefix" not in config.submodules or config.prefix_reparameterization == "none":
        return config, tensors
    kept = {
        name: tensor for name, tensor in tensors.items() if ".unipelt_prefix.transform." not in name
    }
    for name in [name for name in kept if name.endswith(".unipelt_prefix.embedding.weight")]:
        mlp = name.removesuffix("embedding.weight") + "transform."
        first, second = (
            (tensors[f"{mlp}{i}.weight"].float(), tensors[f"{mlp}{i}.bias"].float()) for i in (0, 2)
        )
        out = nn.functional.linear(
            torch.tanh(nn.functional.linear(kept[name].float(), *first)), *second
        )
        kept[name] = out.to(kept[name].dtype)
    return dataclasses.replace(config, prefix_reparameterization="none"), kept


def fixed_gates(
    config: UniPeltConfig, attentions: list[AttentionSite], blocks: list[BlockSite]
) -> Gates:
    """The constants of an ungated model: 1, and alpha/r for LoRA."""
    lora = config.lora_alpha / config.r
    values = {"prefix": 1.0, "lora": lora, "value": lora}
    return {(site.name, part): value for site in attentions for part, value in values.items()} | {
        (place(site), "adapter"): 1.0 for site in blocks
    }


def place(site: BlockSite) -> str:
    """Where a block's adapter sits."""
    return site.norm or site.name


def fold(
    config: UniPeltConfig,
    tensors: dict[str, torch.Tensor],
    attentions: list[AttentionSite],
    blocks: list[BlockSite],
    gates: Gates | None,
    dropped: set[tuple[str, str]] = frozenset(),
) -> Folded:
    """`gates`: a constant for each, None to keep them learned. `dropped`: prefixes and adapters to leave out, by site and part."""
    folding = _Folding(config, tensors, gates, dropped)
    banks: dict[tuple[str, bool], list[torch.Tensor]] = {}
    entries = [folding.attention(site, banks) for site in attentions]
    adapters = [
        folding.block(site)
        for site in blocks
        if "adapter" in config.submodules and (place(site), "adapter") not in dropped
    ]
    for (host, cross), layers in banks.items():
        folding.tensors[f"{host}.{PREFIX_CHILD[cross]}.unipelt_prefix"] = torch.stack(layers)
    heads = {
        name: tensor
        for name, tensor in tensors.items()
        if not any(mark in f".{name}" for mark, _ in PARTS)
    }
    spec = {
        "attentions": entries if gates is None else [entry for entry in entries if entry["gates"]],
        "blocks": adapters,
        "prefixes": [
            [[host, cross], [len(layers), *layers[0].shape[1:]]]
            for (host, cross), layers in banks.items()
        ],
    }
    left = any(entry["gates"] for entry in entries) or adapters
    return Folded(spec if left else None, folding.tensors | heads, folding.updates, folding.renamed)


class _Folding:
    """One site after another."""

    def __init__(
        self,
        config: UniPeltConfig,
        bundle: dict[str, torch.Tensor],
        gates: Gates | None,
        dropped: set[tuple[str, str]],
    ):
        self.config, self.bundle, self.gates, self.dropped = config, bundle, gates, dropped
        self.tensors: dict[str, torch.Tensor] = {}
        self.updates: dict[str, Callable[[], torch.Tensor]] = {}
        self.renamed: dict[str, str] = {}

    def attention(
        self, site: AttentionSite, banks: dict[tuple[str, bool], list[torch.Tensor]]
    ) -> dict:
        """Entry of `spec`; adds the site's prefix to its bank."""
        names = [
            part
            for part in ("prefix", "lora")
            if part in self.config.submodules and (site.name, part) not in self.dropped
        ]
        as_update = self.gates is not None and site.softmax_scale is None
        if "prefix" in names:
            bank = banks.setdefault((site.host, site.cross), [])
            bank.append(self._prefix(site))
            site = dataclasses.replace(site, layer=len(bank) - 1)
        if "lora" in names and as_update:
            names.remove("lora")
            self._add_to_weights(site)
        elif "lora" in names:
            self._keep_lora(site)
        if names and self.gates is None:
            self._keep(f"{site.name}.{CHILD}.unipelt_gate.")
        return {
            "site": dataclasses.asdict(site),
            "gates": names if self.gates is None else dict.fromkeys(names, 1.0),
            "pooling": resolve_pooling(self.config.gate_pooling, site.causal_block),
            "rank": self.config.r if "lora" in names else 0,
        }

    def block(self, site: BlockSite) -> dict:
        """Entry of `spec`."""
        layer = f"{site.name}.{BLOCK_CHILD}" if site.norm is None else site.norm
        if site.norm is not None:
            self.renamed[site.norm] = f"{site.norm}.base_layer"
        scale = 1.0 if self.gates is None else self.gates[place(site), "adapter"]
        self._keep(f"{layer}.unipelt_adapter.down.")
        self._keep(f"{layer}.unipelt_adapter.up.", scale)
        if self.gates is None:
            self._keep(f"{layer}.unipelt_gate.")
        return {
            "site": dataclasses.asdict(site),
            "gates": ["adapter"] if self.gates is None else {"adapter": 1.0},
            "pooling": resolve_pooling(self.config.gate_pooling, site.causal),
            "size": self.config.adapter_size,
            "activation": self.config.adapter_activation,
        }

    def _keep(self, prefix: str, scale: float = 1.0) -> None:
        found = {
            name: tensor * scale if scale != 1.0 else tensor
            for name, tensor in self.bundle.items()
            if name.startswith(prefix)
        }
        assert found, prefix
        self.tensors |= found

    def _prefix(self, site: AttentionSite) -> torch.Tensor:
        """[2, G, L, E]"""
        whole = self.bundle[
            f"{site.host}.{PREFIX_CHILD[site.cross]}.unipelt_prefix.embedding.weight"
        ]
        layers_NLE = whole.view(
            self.config.prefix_length, -1, 2, site.kv_heads, site.head_size
        ).permute(1, 2, 3, 0, 4)
        return layers_NLE[site.layer] * (
            1.0 if self.gates is None else self.gates[site.name, "prefix"]
        )

    def _roles(self, site: AttentionSite) -> dict[str, str]:
        """Path of a projection → the gate that scales its update."""
        return (
            {site.query: "lora"}
            if site.rows is not None
            else {site.query: "lora", site.value: "value" if site.cross else "lora"}
        )

    def _keep_lora(self, site: AttentionSite) -> None:
        for projection, role in self._roles(site).items():
            scale = 1.0 if self.gates is None else self.gates[site.name, role]
            for part, factor in (("lora_A", 1.0), ("lora_B", scale)):
                self.tensors[f"{projection}.{LORA_CHILD}.{part}.weight"] = (
                    self.bundle[f"{projection}.{part}.weight"] * factor
                )

    def _add_to_weights(self, site: AttentionSite) -> None:
        for projection, role in self._roles(site).items():
            a_RI, b_OR = (
                self.bundle[f"{projection}.{part}.weight"].float() for part in ("lora_A", "lora_B")
            )
            scale = self.gates[site.name, role]
            if site.rows is None:
                self.updates[f"{projection}.weight"] = lambda a=a_RI, b=b_OR, g=scale: g * b @ a
            else:
                fused = FusedUpdate(self.config.r, site.rows)
                fused.weight.data = b_OR
                self.updates[f"{projection}.weight"] = lambda a=a_RI, fused=fused, g=scale: (
                    g * fused(a.t()).detach()
                ).t()
