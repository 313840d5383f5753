"""What gates must know of the running forward pass: which tokens are real, which belong together, which came before.

With causal pooling the gate at token t is the mean over the real tokens up to t. While a model generates, earlier tokens are
not in the forward pass but in its KV cache, so the running totals travel with that cache, as one more layer of it: beam search,
cropping and repeating then move them together with keys and values. All sites share that layer and the counts, so that a token
costs each site one addition and one division more than a gate without a past.

    ḡ_t = Σ_{s ≤ t} m_s g_s / Σ_{s ≤ t} m_s          m: 1 at real tokens

This file is the only one that knows how transformers' caches are made.

Shapes: B examples, T tokens of this pass, S encoder tokens, N gates in one projection, W gates of all sites.
"""

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, EncoderDecoderCache


def real_and_count(
    g_BTN: torch.Tensor, mask_BT: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(1 at real tokens [B, T, 1], None where all are, how many there are up to each [B or 1, T, 1])."""
    if mask_BT is None:
        return None, torch.arange(1, g_BTN.shape[1] + 1, device=g_BTN.device, dtype=g_BTN.dtype)[
            None, :, None
        ]
    real_BT1 = mask_BT.unsqueeze(2).to(g_BTN.dtype)
    return real_BT1, real_BT1.cumsum(dim=1)


def shares(mask_BT: torch.Tensor) -> torch.Tensor:
    """[B, T, 1], float32: what each real token contributes to a mean. Without any real token the mean is 0."""
    return (mask_BT / mask_BT.sum(dim=1, keepdim=True).clamp(min=1)).float().unsqueeze(2)


def running_totals(g_BTN: torch.Tensor, real_BT1: torch.Tensor | None) -> torch.Tensor:
    """Sums [B, T, N] over the real tokens up to each."""
    kept_BTN = g_BTN if real_BT1 is None else g_BTN * real_BT1
    return kept_BTN.cumsum(dim=1) if g_BTN.shape[1] > 1 else kept_BTN


class GateTotals(DynamicLayer):
    """Running totals [B, 1, T, W] of all sites and counts [B, 1, T, 1], one of each for every token in the cache."""

    supports_early_init = False

    def last(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Totals [B, 1, W] and count [B, 1, 1] at the newest token."""
        if not self.is_initialized or not self.keys.numel():
            return None
        return self.keys[:, 0, -1:], self.values[:, 0, -1:]


class StaticGateTotals(CacheLayerMixin):
    """The same beside a static cache, which is never cropped: only the newest token's, at a fixed address."""

    is_compileable = True
    is_sliding = False
    supports_early_init = False  # what transformers would guess is the shape of keys

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            torch.zeros_like(key_states[:, :, -1:]),
            torch.zeros_like(value_states[:, :, -1:]),
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys.copy_(key_states[:, :, -1:])
        self.values.copy_(value_states[:, :, -1:])
        return self.keys, self.values

    def last(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return (self.keys[:, 0], self.values[:, 0]) if self.is_initialized else None

    def get_seq_length(self) -> int:
        """Only whether anything is there: a number that grew would be compiled anew for each token."""
        return int(self.is_initialized)

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0


class Tokens(nn.Module):
    """A child of the model that is called with padding masks; `generate` calls an encoder directly, so each has its own.

    Masks stay until the next forward pass because gradient checkpointing recomputes layers in the backward pass: two forward
    passes with different masks before the first backward pass need gradient checkpointing off.
    """

    def __init__(self, find_argument: dict[str, int]):
        """`find_argument`: position of each argument that is read here, for callers that pass it by position."""
        super().__init__()
        self.find_argument = find_argument
        self.handles: list = []
        self.slots: dict[
            int, int
        ] = {}  # of each site whose totals go into the cache: where its gates begin → how many
        self.kv_layers = 0  # attentions that keep keys and values
        self._forget()

    def _forget(self) -> None:
        self.mask_BT: torch.Tensor | None = None
        self.encoder_mask_BS: torch.Tensor | None = None  # of the encoder's tokens, in a decoder
        self.starts_BT: torch.Tensor | None = (
            None  # with several texts in one row: where each token's own begins
        )
        self.past: int | torch.Tensor = 0  # tokens in the running pass's cache
        self.layer: GateTotals | StaticGateTotals | None = None  # of that cache
        self.counts: tuple[torch.Tensor | None, torch.Tensor] | None = None
        self.share_BT1: torch.Tensor | None = None
        self.pending: dict[int, torch.Tensor] = {}  # slot → totals of this pass

    def new_slot(self, width: int) -> int:
        """A place among the totals for one site's gates: where they begin."""
        slot = sum(self.slots.values())
        self.slots[slot] = width
        return slot

    def capture(self, host: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the model. Raises ValueError for a mask of which it cannot be told what tokens are real."""
        self._forget()
        self.mask_BT = self._real(self._argument("attention_mask", args, kwargs), "attention_mask")
        self.encoder_mask_BS = self._real(
            self._argument("encoder_attention_mask", args, kwargs), "encoder_attention_mask"
        )
        positions_BT = self._argument("position_ids", args, kwargs)
        if positions_BT is not None and self.mask_BT is None and positions_BT.shape[1] > 1:
            self.starts_BT = _starts(positions_BT)

    def _argument(self, name: str, args: tuple, kwargs: dict) -> object:
        position = self.find_argument.get(name)
        return kwargs.get(
            name, args[position] if position is not None and position < len(args) else None
        )

    def _real(self, mask: torch.Tensor | dict | None, name: str) -> torch.Tensor | None:
        """[B, T], of a decoder's mask per query and key [B, 1, T, K] the queries that see anything. Generation with a static
        cache gives those, one for each kind of layer: padding on the left sees nothing."""
        if isinstance(mask, dict):
            mask = next((entry for entry in mask.values() if entry is not None), None)
        if mask is None or mask.dim() == 2:
            return mask
        if mask.dim() != 4 or mask.shape[1] != 1 or not self.kv_layers:
            raise ValueError(
                f"{name} has the shape {tuple(mask.shape)}; UniPELT's gates need the padding mask of shape [batch, tokens]"
            )
        return (mask if mask.dtype == torch.bool else mask == 0)[:, 0].any(dim=-1)

    def real(self, tokens: int) -> torch.Tensor | None:
        """The mask of this pass's tokens [B, T]; a generating model is called with the mask of earlier ones in front."""
        return None if self.mask_BT is None else self.mask_BT[:, -tokens:]

    def note_cache(self, attention: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the first self-attention: models make their own cache, so it is known only here."""
        cache = next(
            (
                value
                for value in (*kwargs.values(), *args)
                if isinstance(value, Cache | EncoderDecoderCache)
            ),
            None,
        )
        cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        if cache is None:
            return
        # A number of its own: after a crop, sliding layers count in a tensor that they change in place.
        self.past, self.starts_BT = cache.get_seq_length() + 0, None
        self.layer = next(
            (layer for layer in cache.layers if isinstance(layer, GateTotals | StaticGateTotals)),
            None,
        )
        if self.layer is None and self.slots:
            while (
                len(cache.layers) < self.kv_layers
            ):  # made one by one otherwise, each at its attention
                cache.layers.append(cache.layer_class_to_replicate())
            self.layer = StaticGateTotals() if cache.layers[0].is_compileable else GateTotals()
            cache.layers.append(self.layer)

    def before(self, slot: int) -> torch.Tensor | None:
        """The totals [B, 1, N] of one site up to this pass. Raises ValueError for a cache that was filled without its gates."""
        if self.layer is None:
            return None
        if isinstance(self.layer, GateTotals) and self.layer.get_seq_length() != self.past:
            raise ValueError(
                "the KV cache holds tokens whose gates are not known: it was filled without this adapter; start with an empty one"
            )
        last = self.layer.last()
        return None if last is None else last[0][..., slot : slot + self.slots[slot]]

    def counted(self, g_BTN: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """`real_and_count` of this pass's tokens, those in the cache counted in; once per pass."""
        if self.counts is None:
            real_BT1, count_BT1 = real_and_count(g_BTN, self.real(g_BTN.shape[1]))
            last = self.layer.last() if self.layer is not None else None
            self.counts = real_BT1, count_BT1 if last is None else count_BT1 + last[1]
        return self.counts

    def share(self, mask_BT: torch.Tensor) -> torch.Tensor:
        """`shares` of this pass's tokens, `mask_BT` of them; once per pass."""
        if self.share_BT1 is None:
            self.share_BT1 = shares(mask_BT)
        return self.share_BT1

    def store(self, host: nn.Module, args: tuple, output: object) -> None:
        """Forward hook of the model: this pass's totals into the cache."""
        if self.layer is None or not self.pending:
            return
        some, (_, count_BT1) = next(iter(self.pending.values())), self.counts
        parts = [
            self.pending.get(slot, some[..., :1] * 0).expand(*some.shape[:2], width)
            for slot, width in self.slots.items()
        ]
        self.layer.update(
            torch.cat(parts, dim=-1).detach().unsqueeze(1),
            count_BT1.expand(*some.shape[:2], 1).unsqueeze(1),
        )
        self.pending, self.layer = {}, None

    def __getstate__(self) -> dict:
        fresh = {
            "mask_BT": None,
            "encoder_mask_BS": None,
            "starts_BT": None,
            "past": 0,
            "layer": None,
            "counts": None,
            "share_BT1": None,
            "pending": {},
        }
        return self.__dict__ | fresh


class RunningMean:
    """The running mean of one site's gates, called with g [B, T, N] → [B, T, N].

    `slots`: the site's places among the totals in the cache, by the number of its gates; none where its model never generates.
    """

    def __init__(self, tokens: Tokens):
        self.tokens = tokens
        self.slots: dict[int, int] = {}

    def __call__(self, g_BTN: torch.Tensor) -> torch.Tensor:
        """At each token the mean over the real tokens so far, those in the cache included."""
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
        """For a gate that needs the whole sequence. Raises ValueError while a model generates with a cache."""
        if isinstance(self.tokens.past, torch.Tensor) or self.tokens.past > 0:
            raise ValueError(
                "gate_pooling 'paper' needs the whole sequence: train with 'auto' to generate, or call generate(use_cache=False)"
            )


def _starts(positions_BT: torch.Tensor) -> torch.Tensor:
    """Index of the first token of the text that each token belongs to; positions count on by one within a text."""
    index_T = torch.arange(positions_BT.shape[1], device=positions_BT.device)
    first_BT = nn.functional.pad(positions_BT.diff(dim=1) != 1, (1, 0), value=True)
    return torch.where(first_BT, index_T, 0).cummax(dim=1).values.expand(positions_BT.shape)


def _mean_within(g_BTN: torch.Tensor, starts_BT: torch.Tensor) -> torch.Tensor:
    """The running mean that begins anew with each text. In float64: it is a difference of sums over the whole row."""
    starts_BT = starts_BT.expand(g_BTN.shape[0], -1)
    sums_BTN = nn.functional.pad(g_BTN.double().cumsum(dim=1), (0, 0, 1, 0))
    before_BTN = sums_BTN.gather(1, starts_BT.unsqueeze(2).expand_as(g_BTN))
    count_BT1 = (torch.arange(1, g_BTN.shape[1] + 1, device=g_BTN.device) - starts_BT).unsqueeze(2)
    return ((sums_BTN[:, 1:] - before_BTN) / count_BT1).to(g_BTN.dtype)
