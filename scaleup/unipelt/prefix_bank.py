"""The prefixes of one parent model's attentions: PEFT's `PrefixEncoder`, evaluated once per pass.

Shapes: G key-value heads, E head size, L prefix length, N layers.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from .kernels import fast_path, few_rows, state_of
from .layers import AuxiliaryLayer
from .masks import PassMasks
from .passes import Passes, undivided
from .peft_names import PrefixEncoder, PrefixTuningConfig
from .pooling import find_cache, kept_beside

# The child of a parent model that holds the prefixes of its self or cross attentions.
PREFIX_CHILD = {False: "unipelt_bank_self", True: "unipelt_bank_cross"}


class PassPrefixes(NamedTuple):
    """What the attentions of one forward pass share.

    Attributes:
        layers_kv: keys and values [2, G, L, E] of each layer.
        masks: attention masks that layers share.
    """

    layers_kv: tuple[torch.Tensor, ...]
    masks: PassMasks


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
