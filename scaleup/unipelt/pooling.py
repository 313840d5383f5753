"""What gates need to know about the tokens of a pass: which are real, and which came before.

With causal pooling, the gate at token t is the mean over the real tokens up to t:

    ḡ_t = Σ_{s ≤ t} m_s g_s / Σ_{s ≤ t} m_s          m: 1 at real tokens

During generation, earlier tokens are not in the forward pass but in its KV cache. The running
totals therefore travel with the cache, as one additional layer of it, so beam search, cropping and
repeating move them together with keys and values. All sites share that layer and the counts.

This is the only file that knows how the caches of transformers are built.

Shapes: B examples, T tokens of the pass, S encoder tokens, N gates of one projection, W gates of
all sites.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, EncoderDecoderCache


def real_and_count(
    g_BTN: torch.Tensor, mask_BT: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return which tokens are real, and how many real tokens there are up to each.

    Returns:
        1 at real tokens [B, T, 1], None if all are real; the counts [B or 1, T, 1].
    """
    if mask_BT is None:
        count_T = torch.arange(1, g_BTN.shape[1] + 1, device=g_BTN.device, dtype=g_BTN.dtype)
        return None, count_T[None, :, None]
    real_BT1 = mask_BT.unsqueeze(2).to(g_BTN.dtype)
    return real_BT1, real_BT1.cumsum(dim=1)


def shares(mask_BT: torch.Tensor) -> torch.Tensor:
    """Return the weight of each token in a mean over real tokens, [B, T, 1], in float32.

    Without any real token all weights, and so the mean, are 0.
    """
    return (mask_BT / mask_BT.sum(dim=1, keepdim=True).clamp(min=1)).float().unsqueeze(2)


def running_totals(g_BTN: torch.Tensor, real_BT1: torch.Tensor | None) -> torch.Tensor:
    """Return the sums over the real tokens up to each, [B, T, N]."""
    kept_BTN = g_BTN if real_BT1 is None else g_BTN * real_BT1
    return kept_BTN.cumsum(dim=1) if g_BTN.shape[1] > 1 else kept_BTN


class GateTotals(DynamicLayer):
    """Totals [B, 1, T, W] of all sites and counts [B, 1, T, 1] for each token in a cache."""

    supports_early_init = False

    def last(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return totals [B, 1, W] and count [B, 1, 1] of the newest token, if there is one."""
        if not self.is_initialized or not self.keys.numel():
            return None
        return self.keys[:, 0, -1:], self.values[:, 0, -1:]


class StaticGateTotals(CacheLayerMixin):
    """Totals and count of the newest token only, at a fixed address, for a static cache.

    A static cache is never cropped.
    """

    is_compileable = True
    is_sliding = False
    supports_early_init = False  # transformers would assume the shape of keys

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate totals and count."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = torch.zeros_like(key_states[:, :, -1:])
        self.values = torch.zeros_like(value_states[:, :, -1:])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the totals and the count of the newest token."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys.copy_(key_states[:, :, -1:])
        self.values.copy_(value_states[:, :, -1:])
        return self.keys, self.values

    def last(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return totals [B, 1, W] and count [B, 1, 1] of the newest token, if there is one."""
        return (self.keys[:, 0], self.values[:, 0]) if self.is_initialized else None

    def get_seq_length(self) -> int:
        """Return 1 if there are totals. A growing number would cause a compilation per token."""
        return int(self.is_initialized)

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of a mask."""
        return query_length, 0


class Tokens(nn.Module):
    """The tokens of the running forward pass, as a child of the parent model that gets padding
    masks.

    `generate` calls an encoder directly, so encoder and decoder have one each.

    Masks stay until the next forward pass, because gradient checkpointing recomputes layers in the
    backward pass. Two forward passes with different masks before the first backward pass therefore
    need gradient checkpointing off.

    Args:
        find_argument: position of each argument that is read here, for callers that pass it by
            position.
    """

    def __init__(self, find_argument: dict[str, int]):
        super().__init__()
        self.find_argument = find_argument
        self.handles: list[Any] = []
        # For each site whose totals go into the cache: index of its first gate → number of its
        # gates.
        self.slots: dict[int, int] = {}
        self.kv_layers = 0  # attentions that keep keys and values
        self._forget()

    def _forget(self) -> None:
        self.mask_BT: torch.Tensor | None = None
        self.encoder_mask_BS: torch.Tensor | None = None  # of the encoder's tokens, in a decoder
        # With several texts in one row: the index at which the text of each token begins.
        self.starts_BT: torch.Tensor | None = None
        self.past: int | torch.Tensor = 0  # number of tokens in the cache
        self.layer: GateTotals | StaticGateTotals | None = None  # of the cache
        self.counts: tuple[torch.Tensor | None, torch.Tensor] | None = None
        self.share_BT1: torch.Tensor | None = None
        self.pending: dict[int, torch.Tensor] = {}  # slot → totals of this pass

    def new_slot(self, width: int) -> int:
        """Reserve places for the gates of one site and return the index of the first."""
        slot = sum(self.slots.values())
        self.slots[slot] = width
        return slot

    def capture(self, parent: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the masks. This is a forward pre-hook of the parent model.

        Raises:
            ValueError: for a mask that does not say which tokens are real.
        """
        self._forget()
        self.mask_BT = self._real(self._argument("attention_mask", args, kwargs), "attention_mask")
        self.encoder_mask_BS = self._real(
            self._argument("encoder_attention_mask", args, kwargs), "encoder_attention_mask"
        )
        positions_BT = self._argument("position_ids", args, kwargs)
        if positions_BT is not None and self.mask_BT is None and positions_BT.shape[1] > 1:
            self.starts_BT = _starts(positions_BT)

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        position = self.find_argument.get(name)
        by_position = args[position] if position is not None and position < len(args) else None
        return kwargs.get(name, by_position)

    def _real(self, mask: Any, name: str) -> torch.Tensor | None:
        """Return the mask [B, T] of real tokens.

        Generation with a static cache passes masks per query and key [B, 1, T, K], one for each
        kind of layer. Padding on the left sees no key there, so the real tokens are the queries
        that see any.
        """
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
        """Return the mask [B, T] of this pass, without the earlier tokens of a generated text."""
        return None if self.mask_BT is None else self.mask_BT[:, -tokens:]

    def note_cache(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Find the KV cache. This is a forward pre-hook of the first self-attention.

        Models create their own cache, so it is not known any earlier.
        """
        values = (*kwargs.values(), *args)
        cache = next((v for v in values if isinstance(v, Cache | EncoderDecoderCache)), None)
        cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        if cache is None:
            return
        # A copy, because after a crop sliding layers count in a tensor that they change in place.
        self.past, self.starts_BT = cache.get_seq_length() + 0, None
        self.layer = next(
            (layer for layer in cache.layers if isinstance(layer, GateTotals | StaticGateTotals)),
            None,
        )
        if self.layer is None and self.slots:
            while len(cache.layers) < self.kv_layers:  # transformers adds each at its attention
                cache.layers.append(cache.layer_class_to_replicate())
            self.layer = StaticGateTotals() if cache.layers[0].is_compileable else GateTotals()
            cache.layers.append(self.layer)

    def before(self, slot: int) -> torch.Tensor | None:
        """Return the totals [B, 1, N] of one site before this pass, None if there are none.

        Raises:
            ValueError: for a cache that was filled without the gates.
        """
        if self.layer is None:
            return None
        if isinstance(self.layer, GateTotals) and self.layer.get_seq_length() != self.past:
            raise ValueError(
                "the KV cache holds tokens whose gates are not known: it was filled without this "
                "adapter; start with an empty one"
            )
        last = self.layer.last()
        return None if last is None else last[0][..., slot : slot + self.slots[slot]]

    def counted(self, g_BTN: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return `real_and_count` of this pass, counting cached tokens as well."""
        if self.counts is None:
            real_BT1, count_BT1 = real_and_count(g_BTN, self.real(g_BTN.shape[1]))
            last = self.layer.last() if self.layer is not None else None
            self.counts = real_BT1, count_BT1 if last is None else count_BT1 + last[1]
        return self.counts

    def share(self, mask_BT: torch.Tensor) -> torch.Tensor:
        """Return `shares(mask_BT)` for the mask of this pass. Computed once per pass."""
        if self.share_BT1 is None:
            self.share_BT1 = shares(mask_BT)
        return self.share_BT1

    def store(self, parent: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Put the totals of this pass into the cache, as a forward hook of the parent model."""
        if self.layer is None or not self.pending:
            return
        assert self.counts is not None
        some, count_BT1 = next(iter(self.pending.values())), self.counts[1]
        shape = some.shape[:2]
        parts = [
            self.pending.get(slot, some[..., :1] * 0).expand(*shape, width)
            for slot, width in self.slots.items()
        ]
        totals = torch.cat(parts, dim=-1).detach()
        self.layer.update(totals.unsqueeze(1), count_BT1.expand(*shape, 1).unsqueeze(1))
        self.pending, self.layer = {}, None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which is between two passes."""
        between: dict[str, Any] = {"past": 0, "pending": {}}
        names = ("mask_BT", "encoder_mask_BS", "starts_BT", "layer", "counts", "share_BT1")
        return self.__dict__ | between | dict.fromkeys(names)


class RunningMean:
    """The running mean of the gates of one site.

    Attributes:
        slots: number of gates → index of their totals in the cache; empty if the model never
            generates.
    """

    def __init__(self, tokens: Tokens):
        self.tokens = tokens
        self.slots: dict[int, int] = {}

    def __call__(self, g_BTN: torch.Tensor) -> torch.Tensor:
        """Return at each token the mean over the real tokens so far, including the cached ones.

        Args:
            g_BTN: gates per token.
        """
        tokens = self.tokens
        if tokens.starts_BT is not None:
            return _mean_within(g_BTN, tokens.starts_BT)
        slot = self.slots.get(g_BTN.shape[2])
        before_B1N = None if slot is None else tokens.before(slot)
        real_BT1, count_BT1 = tokens.counted(g_BTN)
        total_BTN = running_totals(g_BTN, real_BT1)
        if before_B1N is not None:
            total_BTN = total_BTN + before_B1N
        if tokens.layer is not None and slot is not None:
            tokens.pending[slot] = total_BTN
        return total_BTN / (count_BT1 if real_BT1 is None else count_BT1.clamp(min=1))

    def refuse_cache(self) -> None:
        """Raise ValueError if there is a cache, for a gate that needs the whole sequence."""
        if isinstance(self.tokens.past, torch.Tensor) or self.tokens.past > 0:
            raise ValueError(
                "gate_pooling 'paper' needs the whole sequence: train with 'auto' to generate, or "
                "call generate(use_cache=False)"
            )


def _starts(positions_BT: torch.Tensor) -> torch.Tensor:
    """Return the index at which each token's text begins. There, positions do not grow by 1."""
    index_T = torch.arange(positions_BT.shape[1], device=positions_BT.device)
    first_BT = nn.functional.pad(positions_BT.diff(dim=1) != 1, (1, 0), value=True)
    return torch.where(first_BT, index_T, 0).cummax(dim=1).values.expand(positions_BT.shape)


def _mean_within(g_BTN: torch.Tensor, starts_BT: torch.Tensor) -> torch.Tensor:
    """Return the running mean that restarts with each text of a row.

    It is a difference of sums over the whole row, so it is computed in float64.
    """
    starts_BT = starts_BT.expand(g_BTN.shape[0], -1)
    sums_BTN = nn.functional.pad(g_BTN.double().cumsum(dim=1), (0, 0, 1, 0))
    before_BTN = sums_BTN.gather(1, starts_BT.unsqueeze(2).expand_as(g_BTN))
    count_BT1 = (torch.arange(1, g_BTN.shape[1] + 1, device=g_BTN.device) - starts_BT).unsqueeze(2)
    return ((sums_BTN[:, 1:] - before_BTN) / count_BT1).to(g_BTN.dtype)
