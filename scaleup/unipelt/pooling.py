"""Padding masks, counts of tokens, and running means of gates that continue from a KV cache.

With causal pooling the gate at token t is the mean over the real tokens up to t:

    ḡ_t = Σ_{s ≤ t} m_s g_s / Σ_{s ≤ t} m_s          m: 1 at real tokens, 0 at padding

During generation, earlier tokens are not in the forward pass but in its KV cache. The totals of the
gates are therefore stored in that cache as one additional layer, and beam search, cropping and
repeating move them together with keys and values. All sites share that layer and the counts, so a
token costs each site one addition and one division more than a gate without a past.

Only this file depends on how transformers' caches are built.

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
    real_BT1 = mask_BT.unsqueeze(2).to(g_BTN.dtype)
    return real_BT1, real_BT1.cumsum(dim=1)


def shares(mask_BT: torch.Tensor) -> torch.Tensor:
    """Return the weight of each token in a mean over real tokens, [B, T, 1] in float32.

    All weights of an example without real tokens are 0.
    """
    return (mask_BT / mask_BT.sum(dim=1, keepdim=True).clamp(min=1)).float().unsqueeze(2)


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
        self.keys.copy_(key_states[:, :, -1:])
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


class Tokens(nn.Module):
    """The state of the tokens in the running forward pass of one parent model.

    It is a child of the model that is called with padding masks. An encoder has its own, because
    `generate` calls it directly. The masks stay until the next pass, because gradient checkpointing
    recomputes layers in the backward pass, which must therefore come before the next forward pass.

    Args:
        positions: position of each argument of the model's `forward` that is read here, for callers
            that pass it by position.

    Attributes:
        slots: index of a site's first gate among the totals in the cache → number of its gates.
        kv_layers: number of attentions that keep keys and values.
        mask_BT: 1 at real tokens, None if all are real.
        encoder_mask_BS: the same for the encoder's tokens, in a decoder.
        starts_BT: index of the first token of each token's text if a row holds several texts.
        past: number of tokens in the cache.
        totals: the layer of the cache that holds the totals, None if there is no cache.
        pending: totals of this pass by slot, to be stored when the pass ends.
    """

    def __init__(self, positions: dict[str, int]):
        super().__init__()
        self.positions = positions
        self.handles: list[Any] = []
        self.slots: dict[int, int] = {}
        self.kv_layers = 0
        self._reset()

    def _reset(self) -> None:
        self.mask_BT: torch.Tensor | None = None
        self.encoder_mask_BS: torch.Tensor | None = None
        self.starts_BT: torch.Tensor | None = None
        self.past: int | torch.Tensor = 0
        self.totals: GateTotals | StaticGateTotals | None = None
        self.pending: dict[int, torch.Tensor] = {}
        self._counts: tuple[torch.Tensor | None, torch.Tensor] | None = None
        self._share_BT1: torch.Tensor | None = None

    def new_slot(self, width: int) -> int:
        """Reserve a place among the totals for the gates of one site, and return its index."""
        slot = sum(self.slots.values())
        self.slots[slot] = width
        return slot

    def capture(self, parent: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the masks. This is a forward pre-hook of the parent model.

        Raises:
            ValueError: for a mask that does not tell which tokens are real.
        """
        self._reset()
        self.mask_BT = self._padding("attention_mask", args, kwargs)
        self.encoder_mask_BS = self._padding("encoder_attention_mask", args, kwargs)
        positions_BT = self._argument("position_ids", args, kwargs)
        if positions_BT is not None and self.mask_BT is None and positions_BT.shape[1] > 1:
            self.starts_BT = _starts(positions_BT)

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        position = self.positions.get(name, len(args))
        return kwargs.get(name, args[position] if position < len(args) else None)

    def _padding(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        """Return a padding mask [B, T].

        Generation with a static cache passes masks per query and key [B, 1, T, K], one for each
        kind of layer. There, queries that see no key are padding.
        """
        mask = self._argument(name, args, kwargs)
        if isinstance(mask, dict):
            mask = next((entry for entry in mask.values() if entry is not None), None)
        if mask is None or mask.dim() == 2:
            return mask
        if mask.dim() != 4 or mask.shape[1] != 1 or not self.kv_layers:
            raise ValueError(
                f"{name} has the shape {tuple(mask.shape)}; UniPELT's gates need the padding mask "
                "of shape [batch, tokens]"
            )
        return (mask if mask.dtype == torch.bool else mask == 0)[:, 0].any(dim=-1)

    def real(self, tokens: int) -> torch.Tensor | None:
        """Return the mask [B, T] of the last `tokens` tokens; cached tokens precede them in it."""
        return None if self.mask_BT is None else self.mask_BT[:, -tokens:]

    def note_cache(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Find the KV cache, to which the layer with the totals is added.

        This is a forward pre-hook of the first self-attention, because models may create the cache.
        """
        inputs = (*kwargs.values(), *args)
        cache = next((c for c in inputs if isinstance(c, Cache | EncoderDecoderCache)), None)
        cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        if cache is None:
            return
        # A copy: after a crop, sliding layers count in a tensor that they change in place.
        self.past, self.starts_BT = cache.get_seq_length() + 0, None
        kinds = GateTotals | StaticGateTotals
        self.totals = next((layer for layer in cache.layers if isinstance(layer, kinds)), None)
        if self.totals is None and self.slots:
            # Each attention would create its layer at its own turn, behind the totals.
            while len(cache.layers) < self.kv_layers:
                cache.layers.append(cache.layer_class_to_replicate())
            self.totals = StaticGateTotals() if cache.layers[0].is_compileable else GateTotals()
            cache.layers.append(self.totals)

    def before(self, slot: int) -> torch.Tensor | None:
        """Return the totals [B, 1, N] of one site at the newest cached token.

        Raises:
            ValueError: if the cache was filled without this adapter.
        """
        if self.totals is None:
            return None
        if isinstance(self.totals, GateTotals) and self.totals.get_seq_length() != self.past:
            raise ValueError(
                "the KV cache holds tokens whose gates are not known, because it was filled without"
                " this adapter; start with an empty one"
            )
        last = self.totals.last()
        return None if last is None else last[0][..., slot : slot + self.slots[slot]]

    def counts(self, g_BTN: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return `real_and_count` of this pass, with cached tokens in the counts."""
        if self._counts is None:
            real_BT1, count_BT1 = real_and_count(g_BTN, self.real(g_BTN.shape[1]))
            last = self.totals.last() if self.totals is not None else None
            self._counts = real_BT1, count_BT1 if last is None else count_BT1 + last[1]
        return self._counts

    def share(self, mask_BT: torch.Tensor) -> torch.Tensor:
        """Return `shares` of this pass's mask, computed once per pass."""
        if self._share_BT1 is None:
            self._share_BT1 = shares(mask_BT)
        return self._share_BT1

    def store(self, parent: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Store this pass's totals in the cache. This is a forward hook of the parent model."""
        if self.totals is None or not self.pending:
            return
        assert self._counts is not None
        any_BTN = next(iter(self.pending.values()))
        zeros_BT1 = any_BTN[..., :1] * 0  # for sites that were not called
        shape, count_BT1 = any_BTN.shape[:2], self._counts[1]
        parts = [
            self.pending.get(slot, zeros_BT1).expand(*shape, width)
            for slot, width in self.slots.items()
        ]
        totals_BTW = torch.cat(parts, dim=-1).detach()
        self.totals.update(totals_BTW.unsqueeze(1), count_BT1.expand(*shape, 1).unsqueeze(1))
        self.pending, self.totals = {}, None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the state of the pass out of copies and pickles."""
        tensors = ("mask_BT", "encoder_mask_BS", "starts_BT", "totals", "_counts", "_share_BT1")
        return self.__dict__ | dict.fromkeys(tensors) | {"past": 0, "pending": {}}


class RunningMean:
    """The running mean of the gates of one site.

    Attributes:
        slots: number of gates → their slot among the totals in the cache; empty if the model never
            generates.
    """

    def __init__(self, tokens: Tokens):
        self.tokens = tokens
        self.slots: dict[int, int] = {}

    def __call__(self, g_BTN: torch.Tensor) -> torch.Tensor:
        """Return the mean [B, T, N] over the real tokens up to each, with the cached ones."""
        tokens = self.tokens
        if tokens.starts_BT is not None:
            return _mean_within(g_BTN, tokens.starts_BT)
        slot = self.slots.get(g_BTN.shape[2])
        before_B1N = None if slot is None else tokens.before(slot)
        real_BT1, count_BT1 = tokens.counts(g_BTN)
        total_BTN = running_totals(g_BTN, real_BT1)
        if before_B1N is not None:
            total_BTN = total_BTN + before_B1N
        if tokens.totals is not None and slot is not None:
            tokens.pending[slot] = total_BTN
        return total_BTN / (count_BT1 if real_BT1 is None else count_BT1.clamp(min=1))

    def refuse_cache(self) -> None:
        """Raise ValueError if there are cached tokens, for gates that need the whole sequence."""
        if isinstance(self.tokens.past, torch.Tensor) or self.tokens.past > 0:
            raise ValueError(
                "gate_pooling 'paper' needs the whole sequence: train with 'auto' to generate, or "
                "call generate(use_cache=False)"
            )


def _starts(positions_BT: torch.Tensor) -> torch.Tensor:
    """Return the index of the first token of each token's text, [B, T].

    Within a text, each position is greater by one than the position before it.
    """
    index_T = torch.arange(positions_BT.shape[1], device=positions_BT.device)
    first_BT = nn.functional.pad(positions_BT.diff(dim=1) != 1, (1, 0), value=True)
    return torch.where(first_BT, index_T, 0).cummax(dim=1).values.expand(positions_BT.shape)


def _mean_within(g_BTN: torch.Tensor, starts_BT: torch.Tensor) -> torch.Tensor:
    """Return the running mean [B, T, N] within each text of a row.

    It is computed in float64, because it is a difference of sums over the whole row.
    """
    starts_BT = starts_BT.expand(g_BTN.shape[0], -1)
    sums_BTN = nn.functional.pad(g_BTN.double().cumsum(dim=1), (0, 0, 1, 0))
    before_BTN = sums_BTN.gather(1, starts_BT.unsqueeze(2).expand_as(g_BTN))
    count_BT1 = (torch.arange(1, g_BTN.shape[1] + 1, device=g_BTN.device) - starts_BT).unsqueeze(2)
    return ((sums_BTN[:, 1:] - before_BTN) / count_BT1).to(g_BTN.dtype)
