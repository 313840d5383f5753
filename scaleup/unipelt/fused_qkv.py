"""LoRA's B of a projection that computes queries, keys and values at once.

Shapes: R rank.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from .site_types import FusedQKVLayout


def updated_heads(layout: FusedQKVLayout, keys: bool) -> list[int]:
    """Return the numbers of heads of the queries, the keys if they are updated, and the values."""
    return [layout.heads, *[layout.kv_heads] * (2 if keys else 1)]


@dataclasses.dataclass(frozen=True)
class FusedBlocks:
    """Where B of a fused projection lies in a matrix [rows, 2R or 3R]; the other blocks are 0."""

    layout: FusedQKVLayout
    keys: bool

    def __call__(
        self, matrices: torch.Tensor, parts: Sequence[torch.Tensor]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        (weights,) = parts
        layout, rank, size = self.layout, weights.shape[2], self.layout.head_size
        heads = updated_heads(layout, self.keys)
        blocks = weights.split([n * size for n in heads], dim=1)
        places: Sequence[torch.Tensor]
        if layout.order == "parts":
            rows = matrices.unflatten(1, (-1, size))
            places = rows.split([layout.heads, layout.kv_heads, layout.kv_heads], dim=1)
        else:
            places = matrices.unflatten(1, (layout.heads, -1, size)).unbind(2)
        places = places if self.keys else (places[0], places[2])
        return [
            (place[..., i * rank : (i + 1) * rank], block.unflatten(1, (n, size)))
            for i, (place, block, n) in enumerate(zip(places, blocks, heads))
        ]


class FusedUpdate(nn.Module):
    """B of a fused projection of queries, keys and values, [..., 2R or 3R] → [..., rows].

    The first R inputs are for the queries and the last R for the values. Those in between are for
    the keys, which get no update without them. It does what two or three LoRA layers would do, with
    one pass through the frozen weights.
    """

    def __init__(self, rank: int, layout: FusedQKVLayout, keys: bool):
        super().__init__()
        self.layout, self.keys = layout, keys
        self.sizes = [n * layout.head_size for n in updated_heads(layout, keys)]
        self.weight = nn.Parameter(torch.zeros(sum(self.sizes), rank))

    @property
    def rows(self) -> int:
        """The number of outputs of the projection."""
        return self.sizes[0] + 2 * self.sizes[-1]

    @property
    def columns(self) -> int:
        """The number of inputs."""
        return len(self.sizes) * self.weight.shape[1]

    def forward(self, low_rank: torch.Tensor) -> torch.Tensor:
        lows, weights = low_rank.chunk(len(self.sizes), dim=-1), self.weight.split(self.sizes)
        parts = [nn.functional.linear(low, weight) for low, weight in zip(lows, weights)]
        if not self.keys:
            parts.insert(1, parts[1].new_zeros(()).expand_as(parts[1]))
        if self.layout.order == "parts":
            return torch.cat(parts, dim=-1)
        heads = (self.layout.heads, self.layout.head_size)
        return torch.stack([part.unflatten(-1, heads) for part in parts], dim=-2).flatten(-3)
