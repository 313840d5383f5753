"""The rows of KV caches, for batches in which each row has its own adapter (`rows.py`)."""

import copy
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache

from .pooling import GateTotals, StaticGateTotals, kept_beside


def select_rows(cache: Cache, rows: torch.Tensor, size: int) -> Cache:
    """Return a cache with some of the `size` rows of another cache, which does not change."""

    def select(tensor: torch.Tensor) -> torch.Tensor:
        of_rows = tensor.dim() > 1 and tensor.shape[0] == size
        return tensor[rows] if of_rows else tensor.clone()  # counts of tokens change in place

    kept_beside(cache)  # so that what is kept during a generation is kept for all parts
    part = copy.copy(cache)
    if isinstance(part, EncoderDecoderCache):
        part.self_attention_cache = select_rows(part.self_attention_cache, rows, size)
        part.cross_attention_cache = select_rows(part.cross_attention_cache, rows, size)
        part.is_updated = dict(part.is_updated)
        return part
    part.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in part.layers:
        layer.__dict__ = _map_tensors(vars(layer), select)
    return part


def _map_tensors(state: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(state, torch.Tensor):
        return function(state)
    if isinstance(state, dict):
        return {key: _map_tensors(value, function) for key, value in state.items()}
    return state


def join_caches(
    parts: Sequence[Cache], groups: Sequence[torch.Tensor], into: Cache | None = None
) -> Cache:
    """Join caches that hold several rows each, in the order of the rows.

    Args:
        parts: the caches.
        groups: the rows of each.
        into: the cache that gets the result; a new one if None.
    """
    joined = copy.copy(parts[0]) if into is None else into
    if isinstance(joined, EncoderDecoderCache):
        for name in ("self_attention_cache", "cross_attention_cache"):
            inner = [getattr(part, name) for part in parts]
            setattr(joined, name, join_caches(inner, groups, getattr(into, name, None)))
        joined.is_updated = dict(parts[0].is_updated)
        return joined
    order = torch.cat(list(groups)).argsort()
    counts = [len(rows) for rows in groups]
    layers = []
    for at_depth in zip_longest(*(part.layers for part in parts)):
        of_parts = _with_totals(at_depth, counts)
        layer = copy.copy(of_parts[0])
        layer.__dict__ = _join_states([vars(part) for part in of_parts], counts, order)
        layers.append(layer)
    joined.layers = layers
    return joined


def _with_totals(layers: Sequence[Any], counts: Sequence[int]) -> Sequence[Any]:
    """Add totals of 0 to parts whose gates have none, because they are constant or disabled."""
    totals = [layer for layer in layers if isinstance(layer, GateTotals | StaticGateTotals)]
    if not any(layer.is_initialized for layer in totals):
        return layers
    longest = max(totals, key=lambda layer: layer.get_seq_length())
    filled = []
    for layer, count in zip(layers, counts):
        if layer is None or layer.get_seq_length() != longest.get_seq_length():
            layer = copy.copy(longest)
            layer.keys = longest.keys.new_zeros(count, *longest.keys.shape[1:])
            layer.values = longest.values.new_zeros(count, *longest.values.shape[1:])
        filled.append(layer)
    return filled


def _join_states(states: Sequence[Any], counts: Sequence[int], order: torch.Tensor) -> Any:
    first = states[0]
    if isinstance(first, dict):
        return {key: _join_states([s[key] for s in states], counts, order) for key in first}
    if not isinstance(first, torch.Tensor) or first.dim() < 2:
        return first
    assert all(len(state) == count for state, count in zip(states, counts)), "rows of a cache"
    return torch.cat(list(states))[order]
