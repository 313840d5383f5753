"""Attention masks with a prefix, and masks as the fused kernels need them.

Shapes: B examples, T queries, S keys, H heads, G key-value heads, E head size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .kernels import additive_mask, target_device

ALIGNMENT = 16  # keys; torch's fused CPU attention takes a fifth longer over 138 keys than over 144


def alignment_padding(
    query_BHTE: torch.Tensor, key_BGSE: torch.Tensor, length: int, dropout: float
) -> int:
    """Return how many invisible keys bring the number of keys to a multiple of ALIGNMENT.

    0 where that is not worth a mask: with dropout the fused CPU attention is not used, and a single
    query takes next to no time.
    """
    worth = target_device(query_BHTE) == "cpu" and query_BHTE.shape[2] > 1 and not dropout
    return -(key_BGSE.shape[2] + length) % ALIGNMENT if worth else 0


def widen_mask(
    mask: torch.Tensor | None,
    length: int,
    query_BHTE: torch.Tensor,
    key_BGSE: torch.Tensor,
    causal: bool,
    padding: int = 0,
) -> torch.Tensor | None:
    """Add columns for a prefix in front of an attention mask.

    No mask with causal attention means "rely on is_causal", which a longer key would misalign, so
    the causal mask is written out.

    Args:
        mask: boolean or additive, [B or 1, H or 1, T, S], or None. The result has the same type.
        length: columns that every query sees.
        query_BHTE, key_BGSE: tensors that give the sizes.
        causal: whether queries do not see later keys.
        padding: columns in front of these that no query sees.
    """
    queries, keys = query_BHTE.shape[2], key_BGSE.shape[2]
    if mask is not None:
        boolean = mask.dtype == torch.bool
        front = mask.new_full((*mask.shape[:-1], padding + length), True if boolean else 0.0)
        front[..., :padding] = False if boolean else torch.finfo(mask.dtype).min
        return torch.cat([front, mask], dim=-1)
    if (not causal or queries == 1) and not padding:
        return None
    rows = queries if causal else 1
    visible = query_BHTE.new_ones(rows, padding + length + keys, dtype=torch.bool)
    visible = visible.tril(diagonal=padding + length) if causal else visible
    visible[:, :padding] = False
    return visible[None, None]


def with_position_bias(attention: nn.Module) -> nn.Module:
    """Return an attention that computes a bias by relative position, as the first of T5 does.

    Raises:
        ValueError: if it does not.
    """
    if not getattr(attention, "has_relative_attention_bias", False):
        raise ValueError(
            "prefix_positions: only T5 can count them, which adds a bias to scores by relative "
            "position; leave the setting out"
        )
    return attention


class PassMasks:
    """The masks of one forward pass. Layers with the same mask share what is made of it.

    Args:
        fast: whether the attentions of the pass take the fast path. It is decided once, because
            blocks that are recomputed in the backward pass must keep the same tensors.
        relative: the attention whose position bias counts the positions of the prefix, None if
            they have none.
    """

    def __init__(self, fast: bool = False, relative: Any = None) -> None:
        self.fast, self.relative = fast, relative
        self.known: list[tuple[tuple[Any, ...], tuple[Any, ...], torch.Tensor | None]] = []

    def widened(
        self,
        mask: torch.Tensor | None,
        length: int,
        query_BHTE: torch.Tensor,
        key_BGSE: torch.Tensor,
        causal: bool,
        padding: int = 0,
    ) -> torch.Tensor | None:
        """Return `widen_mask` of these arguments."""
        sizes = (length, query_BHTE.shape[2], key_BGSE.shape[2], causal, padding)
        return self._once(
            (mask,), sizes, lambda: widen_mask(mask, length, query_BHTE, key_BGSE, causal, padding)
        )

    def widened_bias(self, bias: torch.Tensor, length: int, padding: int) -> torch.Tensor:
        """Return a position bias [1, H, T, S] with columns for padding and a prefix in front.

        The bias of a prefix is 0, because it has no distance to the tokens, unless its positions
        are counted. Then the tokens behind it are farther away from the queries, too.
        """
        if self.relative is None:
            return nn.functional.pad(bias, (padding + length, 0))
        queries, keys = bias.shape[2:]

        def counted() -> torch.Tensor:
            wide: torch.Tensor = self.relative.compute_bias(
                queries, length + keys, device=bias.device, past_seen_tokens=keys - queries
            )
            return nn.functional.pad(wide.to(bias.dtype), (padding, 0))

        wide = self._once((bias,), (length, padding), counted)
        assert wide is not None
        return wide

    def additive(
        self, mask: torch.Tensor | None, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Return `additive_mask` of a mask, a position bias or both; None if there is neither."""
        if mask is None and bias is None:
            return None
        return self._once((mask, bias), (dtype,), lambda: additive_mask(_both(mask, bias), dtype))

    def _once(
        self,
        tensors: tuple[torch.Tensor | None, ...],
        details: tuple[Any, ...],
        make: Callable[[], torch.Tensor | None],
    ) -> torch.Tensor | None:
        for known, same, made in self.known:
            if details == same and all(a is b for a, b in zip(known, tensors)):
                return made
        made = make()
        self.known.append((tensors, details, made))
        return made


def _both(mask: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    """Return a position bias where a mask, which may be boolean or additive, lets queries see."""
    if mask is None or bias is None:
        both = bias if mask is None else mask
        assert both is not None
        return both.detach()
    bias = bias.detach()
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask
