"""The bottleneck adapter after the feed-forward sublayer (Houlsby et al. 2019).

    adapter(n) = W_up φ(W_down n + b_down) + b_up            m = 48 units, φ = ReLU

    post-LN block (BERT, BART):   z = x + h_F,  n = LN(z),    out = LN(z + G_A adapter(n))
    pre-LN block (T5, Llama):     z = x + h_F,  n = norm(z),  out = z + G_A adapter(n)

A post-LN block uses its closing LayerNorm LN twice; `PostNormAdapter` replaces that norm. In a
pre-LN block `PreNormAdapter` changes the block's output, and norm() normalises to mean 0 and
variance 1 without parameters: the residual stream grows with depth, and gate and adapter should see
the same scale in every layer. With `adapter_input: raw`, norm() does nothing there.

Shapes: B examples, T tokens, D hidden size, M bottleneck size.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from .attachment import Attachment
from .forward_pass import ForwardPass
from .gate import LearnedGate, cast_to_weight
from .kernels import (
    ACTIVATIONS,
    Entry,
    PlainPath,
    Site,
    Sites,
    StepSite,
    Wide,
    add_gated,
    aligned,
    bottleneck,
)
from .layers import SiteLayer
from .passes import Passes
from .site_types import AttentionSite, BlockSite
from .submodule import LARGEST, Folding, Submodule, option

BLOCK_CHILD = "unipelt_block"  # the child of a pre-LN block that is its PreNormAdapter


@dataclasses.dataclass
class AdapterOptions:
    """Settings of the bottleneck adapter."""

    adapter_size: int = option(48, "Bottleneck size, units.", at_least=1, at_most=LARGEST)
    adapter_activation: str = option(
        "relu",
        "Nonlinearity of the bottleneck.",
        choices=("relu", "gelu", "silu", "tanh"),
        accepts=tuple(ACT2FN),
    )
    adapter_input: str = option(
        "normalised",
        "What adapter and gate read in a pre-LN block (T5, Llama): its output, normalised or raw. "
        "raw is what the library adapters does.",
        choices=("normalised", "raw"),
    )


class Bottleneck(nn.Module):
    """A projection to `size` units and back, which the caller adds to something.

    As in BERT, weights are drawn from N(0, 0.02) and biases start at 0.

    Attributes:
        normalised: whether a pre-LN block normalises the input before it calls this.
    """

    def __init__(self, hidden_size: int, size: int, activation: str, normalised: bool = True):
        super().__init__()
        self.normalised = normalised
        self.down = nn.Linear(hidden_size, size)
        self.activation_name = activation
        self.activation = ACT2FN[activation]
        self.up = nn.Linear(size, hidden_size)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, n_BTD: torch.Tensor, wn_BTM: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the units φ(W_down n + b_down), [B, T, M].

        Args:
            n_BTD: input.
            wn_BTM: W_down n if it was computed together with other products of n.
        """
        if wn_BTM is None:
            return self.activation(self.down(cast_to_weight(n_BTD, self.down.weight)))
        return self.activation(wn_BTM + self.down.bias.to(wn_BTM.dtype))


@dataclasses.dataclass(frozen=True)
class OnesColumn:
    """[W_up, b_up, 0]: the bias is multiplied by the gate, which is the column behind the units."""

    def __call__(
        self, matrices: torch.Tensor, parts: Sequence[torch.Tensor]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        weights, biases = parts
        units = weights.shape[2]
        return [(matrices[..., :units], weights), (matrices[..., units], biases)]


class BottleneckLayer(SiteLayer):
    """A gated bottleneck, wherever it is placed.

    Attributes:
        entry: the container of its bottlenecks, which is also part of its parameters' names.
        gate: the name of its gate.
    """

    entry = "unipelt_adapter"
    gate = "adapter"
    adapter_layer_names: tuple[str, ...] = (entry, "unipelt_gate")

    def declare(self) -> Sites:
        adapter = self.active_entry(getattr(self, self.entry))
        if adapter is None:
            return {}
        gate = self.learned_gate()
        if adapter.activation_name not in ACTIVATIONS:
            raise PlainPath(f"there is no kernel for the activation {adapter.activation_name}")
        path = self.path(self.entry)
        down, up = (
            [(self, f"{path}.{name}.weight"), (self, f"{path}.{name}.bias")]
            for name in ("down", "up")
        )
        narrow = self.declare_narrow(down[:1], [down[1]])
        narrow.selected = gate.names.index(self.gate)
        narrow.activation, narrow.ones_column = adapter.activation_name, True
        columns = aligned(narrow.rank + 1)
        wide = Wide(up, adapter.up.out_features, columns, OnesColumn())
        return {self: Site(narrow, wide, self.norm_constants(), details=gate)}

    def norm_constants(self) -> list[Entry]:
        """Return weight and bias of a LayerNorm that the fast path evaluates with the adapter."""
        return []

    def fast(
        self,
        z_BTD: torch.Tensor,
        n_BTD: torch.Tensor | None,
        norm: tuple[float, bool] | None = None,
    ) -> torch.Tensor | None:
        """Compute `bottleneck` by the fast path, or return None if it does not apply."""
        current = self.passes.current
        step = current.step(self, z_BTD)
        if step is not None:
            return self._step(step, z_BTD, n_BTD, norm, current)
        packed, lease = current.packed(self, z_BTD if n_BTD is None else n_BTD), current.lease
        if packed is None or lease is None:
            return None
        self.require_adapters(current)
        gate: LearnedGate = packed.details
        mask_BT, sink = current.real(z_BTD.shape[1]), self.sink(gate, current)
        out_BTD = bottleneck(z_BTD, n_BTD, current.anchor, lease, packed, mask_BT, norm, sink)
        if sink is not None:
            self.note(gate, current, *sink)
        return out_BTD

    def _step(
        self,
        step: StepSite,
        z_BTD: torch.Tensor,
        n_BTD: torch.Tensor | None,
        norm: tuple[float, bool] | None,
        current: ForwardPass,
    ) -> torch.Tensor:
        """Compute `bottleneck` for a single generated token."""
        z_BD = z_BTD[:, 0]
        if norm is not None:
            n_BD = step.norm(z_BD, norm[0])
        else:
            assert n_BTD is not None
            n_BD = n_BTD[:, 0]
        units_BC, gates_BN = self.step_gates(step, n_BD, current)
        out_BD = step.bottleneck(z_BD, units_BC, gates_BN)
        if norm is not None and norm[1]:
            out_BD = step.norm(out_BD, norm[0])
        return out_BD.unsqueeze(1)

    def updated(
        self, z_BTD: torch.Tensor, n_BTD: torch.Tensor, owned: bool = False
    ) -> torch.Tensor | None:
        """Compute z + G adapter(n), or None if no adapter is active.

        Args:
            z_BTD: the value that the adapter is added to.
            n_BTD: input of the adapter and its gate.
            owned: whether nothing else reads z, so that it may be overwritten without gradients.
        """
        adapter: Bottleneck | None = self.active(self.entry)
        if adapter is None:
            return None
        fast_BTD = self.fast(z_BTD, n_BTD)
        if fast_BTD is not None:
            return fast_BTD
        gates, (wn_BTM,) = self.evaluate(n_BTD, [[adapter.down]])
        if self.gate not in gates:
            return None
        units_BTM, g = adapter(n_BTD, wn_BTM), gates[self.gate]
        if self.observer is not None:
            self.observer(self.gate, g * adapter.up(units_BTM), z_BTD)
        return add_gated(z_BTD, units_BTM, g, adapter.up, owned)


class PostNormAdapter(BottleneckLayer):
    """The adapter of a post-LN block. It replaces the closing norm, which is its `base_layer`."""

    def __init__(self, base_layer: nn.Module, passes: Passes):
        super().__init__(base_layer, passes)
        self.base_layer = base_layer

    def norm_constants(self) -> list[Entry]:
        norm = self.base_layer
        if type(norm) is not nn.LayerNorm or norm.bias is None:
            return []
        return [(self, "base_layer.weight"), (self, "base_layer.bias")]

    def forward(self, z_BTD: torch.Tensor) -> torch.Tensor:
        """Return LN(z + G_A adapter(LN(z)))."""
        norm: Any = self.base_layer
        frozen = type(norm) is nn.LayerNorm and norm.bias is not None
        if frozen and not (norm.weight.requires_grad or norm.bias.requires_grad):
            fast_BTD = self.fast(z_BTD, None, (norm.eps, True))
            if fast_BTD is not None:
                return fast_BTD
        n_BTD = self.base_layer(z_BTD)
        updated_BTD = self.updated(z_BTD, n_BTD, owned=True)  # the block made z for its norm only
        return n_BTD if updated_BTD is None else self.base_layer(updated_BTD)


class PreNormAdapter(BottleneckLayer):
    """The adapter of a pre-LN block."""

    def after_block(
        self, block: nn.Module, args: tuple[Any, ...], output: torch.Tensor | tuple[Any, ...]
    ) -> torch.Tensor | tuple[Any, ...]:
        """Add the gated adapter to the first output of the block, as its forward hook."""
        z_BTD = output[0] if isinstance(output, tuple) else output
        adapter: Bottleneck | None = self.active_entry(self.unipelt_adapter)
        raw = adapter is not None and not adapter.normalised
        updated_BTD = None if raw else self.fast(z_BTD, None, (1e-5, False))
        if updated_BTD is None:
            n_BTD = z_BTD if raw else nn.functional.layer_norm(z_BTD, z_BTD.shape[-1:])
            updated_BTD = self.updated(z_BTD, n_BTD)
        if updated_BTD is None:
            return output
        return (updated_BTD, *output[1:]) if isinstance(output, tuple) else updated_BTD


class BottleneckSubmodule(Submodule):
    """A submodule that is one gated bottleneck per block. Subclasses say where it is placed.

    Its settings are `<name>_size` and `<name>_activation`.
    """

    unmergeable = "a bottleneck is nonlinear"

    def path(self, site: BlockSite) -> str:
        """Return the path under which the gate of a block is reported."""
        raise NotImplementedError

    def layer_path(self, site: BlockSite) -> str:
        """Return the path of the block's BottleneckLayer."""
        raise NotImplementedError

    def layer(self, attachment: Attachment, site: BlockSite) -> BottleneckLayer:
        """Return the BottleneckLayer of a block, made and hooked the first time."""
        raise NotImplementedError

    def paths(
        self, config: Any, attentions: list[AttentionSite], blocks: list[BlockSite]
    ) -> list[str]:
        return [self.path(site) for site in blocks]

    def attach_to_block(self, attachment: Attachment, site: BlockSite) -> None:
        size = getattr(attachment.config, f"{self.name}_size")
        activation = getattr(attachment.config, f"{self.name}_activation")
        path, width = self.path(site), site.hidden_size
        if attachment.has(path, self.name):
            layer = self.layer(attachment, site)
            gate = attachment.gate(layer, path, (self.name,), width, site.causal)
            normalised = self.normalises(attachment.config)
            entry = Bottleneck(width, size, activation, normalised)
            layer.add(attachment.adapter_name, **{layer.entry: entry, "unipelt_gate": gate})

    def normalises(self, config: Any) -> bool:
        """Return whether a pre-LN block normalises its input."""
        return True

    def fold(
        self, folding: Folding, attentions: list[AttentionSite], blocks: list[BlockSite]
    ) -> None:
        """Scale W_up and b_up by the constant gate."""
        (mark,) = self.parameters
        for site in blocks:
            path, layer = self.path(site), self.layer_path(site)
            if (path, self.name) not in folding.dropped:
                self.replace(folding, site)
                folding.keep(f"{layer}{mark}down.")
                folding.keep(f"{layer}{mark}up.", folding.factor(path, self.name))
                folding.keep_gate(path, f"{layer}.unipelt_gate.", self.name)

    def replace(self, folding: Folding, site: BlockSite) -> None:
        """Note which module of the backbone the layer replaces, if it does."""


class Adapter(BottleneckSubmodule):
    """The bottleneck adapter A."""

    name = "adapter"
    learning_rate = 1e-4
    in_paper = True
    options = AdapterOptions
    parameters = (".unipelt_adapter.",)

    def normalises(self, config: Any) -> bool:
        return bool(config.adapter_input == "normalised")

    def path(self, site: BlockSite) -> str:
        return site.norm or site.name

    def layer_path(self, site: BlockSite) -> str:
        return site.norm or f"{site.name}.{BLOCK_CHILD}"

    def layer(self, attachment: Attachment, site: BlockSite) -> BottleneckLayer:
        passes = attachment.passes[site.parent]
        if site.norm is None:
            block = attachment.model.get_submodule(site.name)
            return attachment.child(
                block,
                BLOCK_CHILD,
                lambda: PreNormAdapter(first_linear(block), passes),
                {"after": "after_block"},
            )
        norm = attachment.model.get_submodule(site.norm)
        if not isinstance(norm, PostNormAdapter):
            norm = PostNormAdapter(norm, passes)
            attachment.model.set_submodule(site.norm, norm)
        return norm

    def replace(self, folding: Folding, site: BlockSite) -> None:
        if site.norm is not None:
            folding.renamed[site.norm] = f"{site.norm}.base_layer"


def first_linear(block: nn.Module) -> nn.Module:
    """Return a module of a block whose device and data type its adapters take."""
    return next(module for module in block.modules() if isinstance(module, (nn.Linear, Conv1D)))
