"""LoRA's B of a projection that computes queries, keys and values at once.

Shapes: R rank.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from .site_types import FusedQKVLayout


@dataclasses.dataclass(frozen=True)
class FusedBlocks:
    """Where B of a fused projection lies in a matrix [rows, 2R]; the other blocks are 0."""

    layout: FusedQKVLayout

    def __call__(
        self, matrices: torch.Tensor, parts: Sequence[torch.Tensor]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        (weights,) = parts
        layout, rank = self.layout, weights.shape[2]
        heads = layout.heads, layout.kv_heads
        blocks = zip(weights.split([n * layout.head_size for n in heads], dim=1), heads)
        query, value = (block.unflatten(1, (n, layout.head_size)) for block, n in blocks)
        if layout.order == "parts":
            rows = matrices.unflatten(1, (-1, layout.head_size))
            first, last = rows[:, : layout.heads], rows[:, -layout.kv_heads :]
        else:
            rows = matrices.unflatten(1, (layout.heads, -1, layout.head_size))
            first, last = rows[:, :, 0], rows[:, :, -1]
        return [(first[..., :rank], query), (last[..., rank:], value)]


class FusedUpdate(nn.Module):
    """B of a fused projection of queries, keys and values, [..., 2R] → [..., rows].

    The first R inputs are for the queries, the others for the values; keys get no update. It does
    what two LoRA layers would do, with one pass through the frozen weights.
    """

    def __init__(self, rank: int, layout: FusedQKVLayout):
        super().__init__()
        self.layout = layout
        self.sizes = [layout.heads * layout.head_size, layout.kv_heads * layout.head_size]
        self.weight = nn.Parameter(torch.zeros(sum(self.sizes), rank))

    @property
    def rows(self) -> int:
        """The number of outputs of the projection."""
        return self.sizes[0] + 2 * self.sizes[1]

    def forward(self, low_rank: torch.Tensor) -> torch.Tensor:
        low_q, low_v = low_rank.chunk(2, dim=-1)
        weight_q, weight_v = self.weight.split(self.sizes)
        update_q = nn.functional.linear(low_q, weight_q)
        update_v = nn.functional.linear(low_v, weight_v)
        keys = update_v.new_zeros(()).expand_as(update_v)
        parts = [update_q, keys, update_v]
        if self.layout.order == "parts":
            return torch.cat(parts, dim=-1)
        heads = (self.layout.heads, self.layout.head_size)
        return torch.stack([part.unflatten(-1, heads) for part in parts], dim=-2).flatten(-3)
