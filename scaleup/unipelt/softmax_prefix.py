"""A prefix for attentions that compute their softmax themselves, as DeBERTa and MPNet do.

Shapes: B examples, T queries, S keys, H heads, E head size, L prefix length.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .attention import Prefix
from .gate import GateValue


@dataclasses.dataclass(frozen=True)
class SoftmaxAttention:
    """A class of attentions that call torch's softmax, once, on their scores [B, H, T, S].

    Attributes:
        scale: returns the factor of q·k in the scores of one attention.
        output: name of the attention's output projection. None if the output projection lies
            outside, so that the prefix's context is added to the attention's output.
        projects_positions: whether position embeddings pass through the query and key projections
            too.
    """

    scale: Callable[[Any], float]
    output: str | None = None
    projects_positions: bool = False


# DeBERTa's scale is 1/√(E·n), where n is the number of kinds of scores that it adds up: content to
# content, and those that pos_att_type names.
BY_SOFTMAX = {
    "DisentangledSelfAttention": SoftmaxAttention(
        scale=lambda module: (
            (module.attention_head_size * (1 + len({"c2p", "p2c"} & set(module.pos_att_type))))
            ** -0.5
        ),
        projects_positions=True,
    ),
    "MPNetSelfAttention": SoftmaxAttention(
        scale=lambda module: module.attention_head_size**-0.5, output="o"
    ),
}


class SoftmaxPrefix(TorchFunctionMode):
    """A prefix for an attention that computes softmax(scores [B, H, T, S]) itself.

    While the mode is active, the scores grow by L columns in front. Their share of the softmax is
    kept for `context`; the rest returns to the attention, which multiplies it with its values.
    """

    def __init__(self, prefix: Prefix, query_BTD: torch.Tensor, scaling: float, dropout: float):
        super().__init__()
        self.prefix, self.query_BTD = prefix, query_BTD
        self.scaling, self.dropout = scaling, dropout
        self.share_BHTL: torch.Tensor | None = None

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is not nn.functional.softmax:
            return function(*args, **(kwargs or {}))
        assert self.share_BHTL is None, "one softmax per attention"
        (keys_HLE, _), gate = self.prefix
        scores_BHTS = args[0]
        heads, length, size = keys_HLE.shape
        query_BHTE = self.query_BTD.unflatten(-1, (heads, size)).transpose(1, 2)
        scores_BHTL = query_BHTE @ keys_HLE.to(query_BHTE.dtype).transpose(1, 2)
        scores_BHTL = scores_BHTL * self.scaling * _per_head(gate)
        share = torch.cat([scores_BHTL.to(scores_BHTS.dtype), scores_BHTS], dim=-1).softmax(dim=-1)
        self.share_BHTL = nn.functional.dropout(share[..., :length], self.dropout)
        return share[..., length:]

    def context(self) -> torch.Tensor:
        """Return what the prefix adds to the attention's output, [B, T, H·E]."""
        assert self.share_BHTL is not None
        (_, values_HLE), gate = self.prefix
        out_BHTE = self.share_BHTL @ values_HLE.to(self.share_BHTL.dtype) * _per_head(gate)
        return out_BHTE.transpose(1, 2).flatten(2)

    def change(self, real_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the change that the prefix makes to the attention's output, and that output.

        Args:
            real_BTD: the output without `context`, to which the real keys have contributed.
        """
        assert self.share_BHTL is not None
        # Without the prefix, the weights of the real keys would sum to 1.
        left_BTH1 = 1 - self.share_BHTL.float().sum(dim=-1).transpose(1, 2).unsqueeze(3)
        real_BTHE = real_BTD.float().unflatten(2, (left_BTH1.shape[2], -1))
        without_BTD = (real_BTHE / left_BTH1.clamp(min=1e-6)).flatten(2)
        whole_BTD = real_BTD + self.context()
        return whole_BTD - without_BTD, whole_BTD


def _per_head(gate: GateValue) -> GateValue:
    """Shape a gate [B, 1 or T, 1] for scores [B, H, T, L]."""
    return gate.unsqueeze(1) if isinstance(gate, torch.Tensor) else gate
