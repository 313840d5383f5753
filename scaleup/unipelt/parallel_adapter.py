"""The bottleneck adapter beside the feed-forward sublayer (He et al. 2022, "parallel adapter").

    FFN(x) becomes FFN(x) + G · adapter(x)          adapter: as in adapter.py

x is the input of the sublayer's first projection, which pre-LN blocks have normalised. The sum is
made at the output of the sublayer's last projection. A mixture of experts is one module, beside
which the adapter stands.

Shapes: B examples, T tokens, D hidden size.
"""

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from .adapter import BottleneckLayer, BottleneckSubmodule, first_linear
from .attachment import Attachment
from .site_types import AttentionSite, BlockSite
from .submodule import LARGEST, option

PARALLEL_CHILD = "unipelt_parallel"  # the child of the last projection, or of the experts


@dataclasses.dataclass
class ParallelAdapterOptions:
    """Settings of the parallel adapter."""

    parallel_adapter_size: int = option(
        48, "Bottleneck size of the parallel adapter, units.", at_least=1, at_most=LARGEST
    )
    parallel_adapter_activation: str = option(
        "relu",
        "Nonlinearity of the parallel adapter.",
        choices=("relu", "gelu", "silu", "tanh"),
        accepts=tuple(ACT2FN),
    )


class ParallelAdapterLayer(BottleneckLayer):
    """The parallel adapter of one block."""

    entry = "unipelt_parallel_adapter"
    gate = "parallel_adapter"
    adapter_layer_names = (entry, "unipelt_gate")

    def before_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the number of examples. This is a forward pre-hook of a block with `flat`."""
        z_BTD = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.passes.current.calls[self, "examples"] = len(z_BTD)

    def before_feed_forward(
        self, projection: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Keep the input of the sublayer. This is a forward pre-hook of its first projection."""
        self.passes.current.calls[self] = args[0] if args else kwargs["hidden_states"]

    def after_feed_forward(
        self, projection: nn.Module, args: tuple[Any, ...], output: Any
    ) -> torch.Tensor | tuple[Any, ...] | None:
        """Add the gated adapter. This is a forward hook of the sublayer's last projection.

        Experts may return their scores as well, behind the output.
        """
        calls = self.passes.current.calls
        x, examples = calls.pop(self), calls.pop((self, "examples"), None)
        out = output[0] if isinstance(output, tuple) else output
        if examples is None:
            updated = self.updated(out, x)
        else:
            updated = self.updated(*(y.unflatten(0, (examples, -1)) for y in (out, x)))
            updated = None if updated is None else updated.flatten(0, 1)
        if updated is None or not isinstance(output, tuple):
            return updated
        return (updated, *output[1:])


class ParallelAdapter(BottleneckSubmodule):
    """The parallel adapter."""

    name = "parallel_adapter"
    options = ParallelAdapterOptions
    parameters = (".unipelt_parallel_adapter.",)
    learning_rate = 1e-4

    def path(self, site: BlockSite) -> str:
        assert site.feed_forward is not None
        return site.feed_forward[1]

    def layer_path(self, site: BlockSite) -> str:
        return f"{self.path(site)}.{PARALLEL_CHILD}"

    def prepare(
        self, model: nn.Module, attentions: list[AttentionSite], blocks: list[BlockSite]
    ) -> None:
        missing = [site.name for site in blocks if site.feed_forward is None]
        if missing:
            raise ValueError(
                f"parallel_adapter: found no feed-forward sublayer in {missing[0]}; leave "
                "parallel_adapter out of the submodules"
            )

    def layer(self, attachment: Attachment, site: BlockSite) -> BottleneckLayer:
        assert site.feed_forward is not None
        first, last = (attachment.model.get_submodule(path) for path in site.feed_forward)
        block = attachment.model.get_submodule(site.name)
        new = PARALLEL_CHILD not in last._modules
        layer: ParallelAdapterLayer = attachment.child(
            last,
            PARALLEL_CHILD,
            lambda: ParallelAdapterLayer(first_linear(block), attachment.passes[site.parent]),
            {"after": "after_feed_forward"},
        )
        if new:
            attachment.hook(layer, first, "before", layer.before_feed_forward)
            if site.flat:
                attachment.hook(layer, block, "before", layer.before_block)
        return layer
