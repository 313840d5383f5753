"""The bottleneck adapter A after the feed-forward sublayer (Houlsby et al. 2019; UniPELT's placement).

    adapter(n) = W_up φ(W_down n + b_down) + b_up            m = 48 units, φ = ReLU

post-LN block (BERT, BART):  z = x + h_F,  n = LN(z),  out = LN(z + G_A adapter(n))       the same LN twice
pre-LN block (mBART):        z = x + h_F,  n = norm(z), out = z + G_A adapter(n)          norm: mean 0, variance 1, no parameters

In a post-LN block the closing norm is replaced by `PostNormAdapter`; in a pre-LN block `PreNormAdapter` changes the
block's output. A pre-LN residual stream grows with depth, and gate and adapter should see the same scale in every layer:
hence the norm without parameters.

Shapes: B examples, T tokens, D hidden size, M bottleneck size.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN

from scaleup.unipelt.gate import cast_to_weight
from scaleup.unipelt.kernels.narrow import add_gated, narrow_products
from scaleup.unipelt.layer import AuxiliaryLayer
from scaleup.unipelt.pooling import RunningMean, Tokens


class Bottleneck(nn.Module):
    """Down to `size` units, and up again by whoever adds the result to something. Weights ~ N(0, 0.02), biases 0, as BERT initialises its own."""

    def __init__(self, hidden_size: int, size: int, activation: str):
        super().__init__()
        self.down = nn.Linear(hidden_size, size)
        self.activation = ACT2FN[activation]
        self.up = nn.Linear(size, hidden_size)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, n_BTD: torch.Tensor, wn_BTM: torch.Tensor | None = None) -> torch.Tensor:
        """The units [B, T, M], φ(W_down n + b_down). `wn_BTM`: W_down n, by those who made it together with other products of n."""
        if wn_BTM is None:
            return self.activation(self.down(cast_to_weight(n_BTD, self.down.weight)))
        return self.activation(wn_BTM + self.down.bias.to(wn_BTM.dtype))


class AdapterLayer(AuxiliaryLayer):
    """What both placements share: adapters and their gates by PEFT adapter name."""

    adapter_layer_names = ("unipelt_adapter", "unipelt_gate")

    def __init__(self, neighbour: nn.Module, tokens: Tokens):
        super().__init__(neighbour)
        self._tokens = (tokens,)  # in a tuple: owned by the model, not by each block
        self.running = RunningMean(tokens)

    def updated(
        self, z_BTD: torch.Tensor, n_BTD: torch.Tensor, own: bool = False
    ) -> torch.Tensor | None:
        """z + G_A · adapter(n), or None when nothing is active. `own`: z is read by nobody else."""
        adapter, gate = self.active(self.unipelt_adapter), self.active(self.unipelt_gate)
        if adapter is None:
            return None
        products = (
            narrow_products(n_BTD, [adapter.down], [gate]) if isinstance(gate, nn.Linear) else None
        )
        wn_BTM, wn_BT1 = products or (None, None)
        g = gate(n_BTD, self._tokens[0].real(n_BTD.shape[1]), running=self.running, wh_BTN=wn_BT1)[
            "adapter"
        ]
        return add_gated(z_BTD, adapter(n_BTD, wn_BTM), g, adapter.up, own)


class PostNormAdapter(AdapterLayer):
    """Stands where the closing LayerNorm of a post-LN block stood; `base_layer` is that norm."""

    def __init__(self, base_layer: nn.Module, tokens: Tokens):
        super().__init__(base_layer, tokens)
        self.base_layer = base_layer

    def forward(self, z_BTD: torch.Tensor) -> torch.Tensor:
        n_BTD = self.base_layer(z_BTD)
        updated_BTD = self.updated(z_BTD, n_BTD, own=True)  # a sum that the block made for its norm
        return n_BTD if updated_BTD is None else self.base_layer(updated_BTD)


class PreNormAdapter(AdapterLayer):
    """A child of a pre-LN block whose forward hook changes the block's output."""

    def after_block(
        self, block: nn.Module, args: tuple, output: torch.Tensor | tuple
    ) -> torch.Tensor | tuple:
        """Forward hook: the block's first output plus the gated adapter of its normalised value."""
        z_BTD = output[0] if isinstance(output, tuple) else output
        updated_BTD = self.updated(z_BTD, nn.functional.layer_norm(z_BTD, z_BTD.shape[-1:]))
        if updated_BTD is None:
            return output
        return (updated_BTD, *output[1:]) if isinstance(output, tuple) else updated_BTD
