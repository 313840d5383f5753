"""Counts of tokens, and totals of gates that travel in a KV cache.

With causal pooling the gate at token t is the mean over the real tokens up to t:

    ḡ_t = Σ_{s ≤ t} m_s g_s / Σ_{s ≤ t} m_s          m: 1 at real tokens, 0 at padding

During generation, earlier tokens are not in the forward pass but in its KV cache. The totals of the
gates are therefore stored in that cache as one additional layer, and beam search, cropping and
repeating move them together with keys and values. All sites share that layer and the counts, so a
token costs each site one addition and one division more than a gate without a past.

Only this file and `cache_rows.py` depend on how transformers' caches are built.

Shapes: B examples, T tokens of the pass, S encoder tokens, N gates in one projection, W gates of
all sites together.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, EncoderDecoderCache


def real_and_count(
    g_BTN: torch.Tensor, mask_BT: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return which tokens are real and how many real tokens there are up to each of them.

    Returns:
        1 at real tokens [B, T, 1], None if all are real; the counts [B or 1, T, 1].
    """
    if mask_BT is None:
        count_T = torch.arange(1, g_BTN.shape[1] + 1, device=g_BTN.device, dtype=g_BTN.dtype)
        return None, count_T[None, :, None]
    real_BT1 = (mask_BT != 0).unsqueeze(2).to(g_BTN.dtype)
    return real_BT1, real_BT1.cumsum(dim=1)


def shares(mask_BT: torch.Tensor) -> torch.Tensor:
    """Return the weight of each token in a mean over real tokens, [B, T, 1] in float32.

    All weights of an example without real tokens are 0. Tokens are real where the mask is not 0, as
    in attention, whatever its data type.
    """
    real_BT = (mask_BT != 0).float()
    return (real_BT / real_BT.sum(dim=1, keepdim=True).clamp(min=1)).unsqueeze(2)


def running_totals(g_BTN: torch.Tensor, real_BT1: torch.Tensor | None) -> torch.Tensor:
    """Return the sums [B, T, N] over the real tokens up to each token."""
    real_BTN = g_BTN if real_BT1 is None else g_BTN * real_BT1
    return real_BTN.cumsum(dim=1) if g_BTN.shape[1] > 1 else real_BTN


class GateTotals(DynamicLayer):
    """A cache layer with the totals [B, 1, T, W] and counts [B, 1, T, 1] at every cached token."""

    supports_early_init = False

    def last(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the totals [B, 1, W] and the count [B, 1, 1] at the newest token."""
        if not self.is_initialized or not self.keys.numel():
            return None
        return self.keys[:, 0, -1:], self.values[:, 0, -1:]


class StaticGateTotals(CacheLayerMixin):
    """The totals and counts beside a static cache.

    A static cache is never cropped, so only the values of the newest token are kept, and their
    address is fixed.
    """

    is_compileable = True
    is_sliding = False
    supports_early_init = False  # transformers would assume the shape of keys

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = torch.zeros_like(key_states[:, :, -1:])
        self.values = torch.zeros_like(value_states[:, :, -1:])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys.copy_(key_states[:, :, -1:].detach())  # the buffer outlives the pass
        self.values.copy_(value_states[:, :, -1:])
        return self.keys, self.values

    def last(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the totals [B, 1, W] and the count [B, 1, 1] at the newest token."""
        return (self.keys[:, 0], self.values[:, 0]) if self.is_initialized else None

    def get_seq_length(self) -> int:
        """Return 1 if there are values; a number that grows would be recompiled for each token."""
        return int(self.is_initialized)

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0


def find_cache(inputs: tuple[Any, ...]) -> Cache | None:
    """Return the KV cache of a self-attention among its inputs, None if there is none."""
    cache = next((c for c in inputs if isinstance(c, Cache | EncoderDecoderCache)), None)
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


class KeptBesideCache(dict[Any, Any]):
    """What stays the same during a generation, by the layer that computes it.

    It is not part of the generated text: copies of a cache compute it anew.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeptBesideCache":
        return KeptBesideCache()

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptBesideCache, ()


def kept_beside(cache: Cache | None) -> dict[Any, Any] | None:
    """Return what is kept as long as a KV cache lives, None if nothing is kept."""
    if cache is None or torch.is_grad_enabled():  # weights that train may change
        return None
    kept: KeptBesideCache = cache.__dict__.setdefault("unipelt_kept", KeptBesideCache())
    return kept


def totals_layer(
    cache: Cache, kv_layers: int, create: bool
) -> GateTotals | StaticGateTotals | None:
    """Return the layer of a cache that holds the totals of gates.

    Args:
        cache: the KV cache of the self-attentions.
        kv_layers: number of attentions that keep keys and values.
        create: whether to add the layer if the cache has none.
    """
    kinds = GateTotals | StaticGateTotals
    totals = next((layer for layer in cache.layers if isinstance(layer, kinds)), None)
    if totals is None and create:
        # Each attention would create its layer at its own turn, behind the totals.
        while len(cache.layers) < kv_layers:
            cache.layers.append(cache.layer_class_to_replicate())
        # Layers without keys, of a hybrid model, are the same in a dynamic and in a static cache.
        first = next(layer for layer in cache.layers if isinstance(layer, CacheLayerMixin))
        totals = StaticGateTotals() if first.is_compileable else GateTotals()
        cache.layers.append(totals)
    return totals


def text_starts(positions_BT: torch.Tensor) -> torch.Tensor:
    """Return the index of the first token of each token's text, [B, T].

    Within a text, each position is greater by one than the position before it.
    """
    index_T = torch.arange(positions_BT.shape[1], device=positions_BT.device)
    first_BT = nn.functional.pad(positions_BT.diff(dim=1) != 1, (1, 0), value=True)
    return torch.where(first_BT, index_T, 0).cummax(dim=1).values.expand(positions_BT.shape)


def mean_within(g_BTN: torch.Tensor, starts_BT: torch.Tensor) -> torch.Tensor:
    """Return the running mean [B, T, N] within each text of a row.

    It is computed in float64, because it is a difference of sums over the whole row.
    """
    starts_BT = starts_BT.expand(g_BTN.shape[0], -1)
    sums_BTN = nn.functional.pad(g_BTN.double().cumsum(dim=1), (0, 0, 1, 0))
    before_BTN = sums_BTN.gather(1, starts_BT.unsqueeze(2).expand_as(g_BTN))
    count_BT1 = (torch.arange(1, g_BTN.shape[1] + 1, device=g_BTN.device) - starts_BT).unsqueeze(2)
    return ((sums_BTN[:, 1:] - before_BTN) / count_BT1).to(g_BTN.dtype)
