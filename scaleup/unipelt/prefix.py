"""Prefix-tuning P: learned keys and values in front of every attention, scaled by the gate (Li and Liang 2021).

    softmax([g q·P_Kᵀ, q·Kᵀ] / √E) · [g P_V; V]              L = 10; MLP d → 512 → 2·N·d with Tanh while training

The parameters are PEFT's `PrefixEncoder`, evaluated once per forward pass of the model that owns the attentions. The
prefix enters in the attention function itself: it takes part in every attention (encoder, decoder, cross), every query
sees it, the positions of real tokens do not shift, and nothing of it is kept in a KV cache.

This file is the only one that touches transformers' attention and mask registries and its modules' eager functions.

Shapes: B examples, T queries, S keys, H heads, G key-value heads, E head size, L prefix length, N layers.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Callable, NamedTuple

import torch
from peft import PrefixEncoder, PrefixTuningConfig
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from scaleup.unipelt.kernels.narrow import few_rows
from scaleup.unipelt.kernels.short_attention import attend, is_short
from scaleup.unipelt.layer import AuxiliaryLayer

CHILD = "unipelt_attention"  # where an attention keeps what is handed to it (scaleup.unipelt.attention_site)
ATTENTION = {
    "sdpa": "unipelt_sdpa",
    "eager": "unipelt_eager",
}  # the plain implementation → ours around it
PROBE = "unipelt_probe"  # takes notes of who calls it, see `probing`

Prefix = tuple[torch.Tensor, torch.Tensor | float]  # keys and values [2, G, L, E], gate


class PrefixTuning(AuxiliaryLayer):
    """The prefixes of one model's attentions, of one kind ("self" or "cross"): a child of that model."""

    adapter_layer_names = ("unipelt_prefix",)

    def __init__(self, neighbour: nn.Module, layers: int, kv_heads: int, head_size: int):
        super().__init__(neighbour)
        self.layers, self.kv_heads, self.head_size = layers, kv_heads, head_size
        self.layers_kv: tuple[torch.Tensor, ...] | None = (
            None  # of the running forward pass: [2, G, L, E] for each layer
        )
        self.masks = WideMasks()

    def encoder(self, length: int, hidden_size: int, reparameterization: str) -> PrefixEncoder:
        """PEFT's prefix encoder for this model: through an MLP ("mlp") or the keys and values themselves ("none").

        Weights ~ N(0, 0.02), biases 0, as in the authors' code, where BERT's own initialisation reaches the prefix too. PEFT's
        default (an embedding ~ N(0, 1)) starts with a prefix that outweighs a short sentence: on MiniLM and CoLA at
        K = 500 UniPELT then stayed at the larger class.
        """
        config = PrefixTuningConfig(
            num_virtual_tokens=length,
            token_dim=self.kv_heads * self.head_size,
            num_layers=self.layers,
            encoder_hidden_size=hidden_size,
            prefix_projection=reparameterization == "mlp",
        )
        encoder = PrefixEncoder(config)
        for module in encoder.modules():
            if isinstance(module, (nn.Embedding, nn.Linear)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        return encoder

    def keys_values(self, encoder: PrefixEncoder) -> torch.Tensor:
        """[N, 2, G, L, E]: layer i's keys and values. The same layout as the authors' and PEFT's: entry 2i keys, 2i+1 values."""
        # ZeRO-3 leaves an empty weight between calls, so the length comes from the layer's own record.
        positions = torch.arange(
            encoder.embedding.num_embeddings, device=encoder.embedding.weight.device
        )
        out = encoder.embedding(positions)
        for part in encoder.transform if encoder.prefix_projection else ():
            out = few_rows(out, part) if isinstance(part, nn.Linear) else part(out)
        kind = out.device.type
        out = (
            out.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else out
        )  # once, and not in each layer
        return (
            out.view(-1, self.layers, 2, self.kv_heads, self.head_size)
            .permute(1, 2, 3, 0, 4)
            .contiguous()
        )

    def before_forward(self, host: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the model: once per pass, however many layers and examples there are."""
        self.masks = WideMasks()
        encoder = self.active(self.unipelt_prefix)
        # Taken apart once: an index per layer would make a gradient of all layers' size each time.
        self.layers_kv = None if encoder is None else self.keys_values(encoder).unbind()

    def layer(self, index: int) -> torch.Tensor | None:
        """Keys and values [2, G, L, E] of one layer in the running forward pass; None when nothing is active."""
        return None if self.layers_kv is None else self.layers_kv[index]

    def stored(self) -> int:
        """Numbers that remain of the prefixes after training, the MLP collapsed."""
        width = 2 * self.layers * self.kv_heads * self.head_size
        return sum(
            encoder.embedding.num_embeddings * width for encoder in self.unipelt_prefix.values()
        )

    def __getstate__(self) -> dict:
        # The running prefix is part of a graph; copies and pickles of the model go without it.
        return self.__dict__ | {"layers_kv": None, "masks": WideMasks()}


def spare_columns(
    query_BHTE: torch.Tensor, key_BGSE: torch.Tensor, length: int, dropout: float
) -> int:
    """How many keys that nobody sees bring their number to a multiple of 16, where that is worth a mask.

    torch's fused attention for CPUs takes a fifth longer over 138 keys than over 144 (docs/performance.md). With dropout it is not used,
    and one query, a token being generated, is over before it matters.
    """
    worth = query_BHTE.device.type == "cpu" and query_BHTE.shape[2] > 1 and not dropout
    return -(key_BGSE.shape[2] + length) % 16 if worth else 0


def widen_mask(
    mask: torch.Tensor | None,
    length: int,
    query_BHTE: torch.Tensor,
    key_BGSE: torch.Tensor,
    causal: bool,
    spare: int = 0,
) -> torch.Tensor | None:
    """The attention mask with columns in front: `spare` ones that nobody sees, `length` ones that every query sees. Boolean stays boolean,
    additive additive.

    No mask with causal attention means "rely on is_causal", which a longer key would misalign: it is spelled out.
    """
    queries, keys = query_BHTE.shape[2], key_BGSE.shape[2]
    if mask is not None:
        boolean = mask.dtype == torch.bool
        front = mask.new_full((*mask.shape[:-1], spare + length), True if boolean else 0.0)
        front[..., :spare] = False if boolean else torch.finfo(mask.dtype).min
        return torch.cat([front, mask], dim=-1)
    if (not causal or queries == 1) and not spare:
        return None
    rows = queries if causal else 1
    seen = torch.ones(rows, spare + length + keys, dtype=torch.bool, device=query_BHTE.device)
    seen = seen.tril(diagonal=spare + length) if causal else seen
    seen[:, :spare] = False
    return seen[None, None]


class WideMasks:
    """The widened masks of one forward pass: layers of a kind share one."""

    def __init__(self) -> None:
        self.known: list[tuple] = []

    def __call__(
        self,
        mask: torch.Tensor | None,
        length: int,
        query_BHTE: torch.Tensor,
        key_BGSE: torch.Tensor,
        causal: bool,
        spare: int = 0,
    ) -> torch.Tensor | None:
        """As `widen_mask`."""
        sizes = (length, query_BHTE.shape[2], key_BGSE.shape[2], causal, spare)
        for other, same_sizes, wide in self.known:
            if other is mask and sizes == same_sizes:
                return wide
        wide = widen_mask(mask, length, query_BHTE, key_BGSE, causal, spare)
        self.known.append((mask, sizes, wide))
        return wide


def _join_scaled(
    prefix: Prefix, key_BGSE: torch.Tensor, value_BGSE: torch.Tensor, spare: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values with the prefix, scaled by one gate per example, in front, and `spare` zeros before it."""
    own, gate = prefix
    if isinstance(gate, torch.Tensor):  # as a product of matrices, for the sake of its gradients
        own = (gate.flatten(1).to(own.dtype) @ own.reshape(1, -1)).unflatten(
            1, own.shape
        )  # [B, 2, G, L, E]
    elif gate != 1.0:
        own = gate * own
    keys, values = (
        part.to(key_BGSE.dtype).expand(key_BGSE.shape[0], -1, -1, -1) for part in own.unbind(dim=-4)
    )
    front = (
        [key_BGSE.new_zeros(()).expand(*key_BGSE.shape[:2], spare, key_BGSE.shape[3])]
        if spare
        else []
    )
    return torch.cat([*front, keys, key_BGSE], dim=2), torch.cat(
        [*front, values, value_BGSE], dim=2
    )


def _attend_per_token(
    plain: Callable,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    prefix: Prefix,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A gate per query: softmax([g_t q_t·P_Kᵀ, q_t·Kᵀ]) · [g_t P_V; V], exact in any attention kernel.

    Heads grow by L columns. A query carries its gated prefix scores there, the prefix keys are unit vectors that read
    them, and as unit vectors among the values they give back the prefix's share of the softmax, which then weighs P_V.
    """
    own, gate_BT1 = prefix
    keys_HLE, values_HLE = own.to(query.dtype).repeat_interleave(
        query.shape[1] // own.shape[1], dim=1
    )
    head_size, length = query.shape[-1], keys_HLE.shape[1]
    extra = -(head_size + length) % 8 + length  # kernels want multiples of 8

    scores_BHTL = gate_BT1.unsqueeze(1) * (query @ keys_HLE.transpose(1, 2))
    wide_query = torch.cat([query, nn.functional.pad(scores_BHTL, (0, extra - length))], dim=-1)
    unit_LW = nn.functional.pad(
        torch.eye(length, extra, device=query.device, dtype=query.dtype), (head_size, 0)
    )
    unit = unit_LW.expand(*key.shape[:2], -1, -1)
    wide_key = torch.cat([unit, nn.functional.pad(key, (0, extra))], dim=2)
    wide_value = torch.cat([unit, nn.functional.pad(value, (0, extra))], dim=2)
    out_BTHW, weights = plain(
        module, wide_query, wide_key, wide_value, mask, scaling=scaling, **kwargs
    )
    share_BTHL = out_BTHW[..., head_size : head_size + length]
    from_prefix = torch.einsum("bthl,hle->bthe", share_BTHL, values_HLE) * gate_BT1.unsqueeze(-1)
    return out_BTHW[..., :head_size] + from_prefix, weights


def _attend(
    plain: Callable,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An attention function as transformers calls it: `plain` with this module's prefix, if it was handed one."""
    child = module._modules.get(CHILD)
    prefix = child.take_prefix() if child is not None else None
    if prefix is None:
        return plain(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = kwargs.get("is_causal")
    causal = child.site.causal if causal is None else causal
    length, gate = prefix[0].shape[2], prefix[1]
    per_token = isinstance(gate, torch.Tensor) and gate.shape[1] > 1
    dropout, sdpa = kwargs.get("dropout", 0.0), plain is not _plain_eager
    if (
        sdpa
        and kwargs.get("position_bias") is None
        and is_short(query, key, value, attention_mask, length, dropout, per_token)
    ):
        return attend(
            query,
            key,
            value,
            *prefix,
            child.widened(attention_mask, length, query, key, causal),
            scaling,
            dropout,
        ), None
    spare = spare_columns(query, key, length, dropout) if sdpa and not per_token else 0
    mask = child.widened(attention_mask, length, query, key, causal, spare)
    kwargs["is_causal"] = False  # the mask says it all
    if (
        kwargs.get("position_bias") is not None
    ):  # T5's, by the distance between tokens: a prefix has none
        kwargs["position_bias"] = nn.functional.pad(kwargs["position_bias"], (spare + length, 0))
    if per_token:
        return _attend_per_token(plain, module, query, key, value, mask, prefix, scaling, **kwargs)
    key, value = _join_scaled(prefix, key, value, spare)
    return plain(module, query, key, value, mask, scaling=scaling, **kwargs)


def unipelt_sdpa(module: nn.Module, query, key, value, attention_mask, **kwargs):
    """Scaled-dot-product attention with the module's gated prefix."""
    return _attend(
        ALL_ATTENTION_FUNCTIONS["sdpa"], module, query, key, value, attention_mask, **kwargs
    )


def unipelt_eager(module: nn.Module, query, key, value, attention_mask, **kwargs):
    """The eager attention of the module's own modelling file, with the module's gated prefix."""
    return _attend(_plain_eager, module, query, key, value, attention_mask, **kwargs)


def _plain_eager(module: nn.Module, *args, **kwargs):
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


class Call(NamedTuple):
    """What an attention asked of its attention function. `causal`: None if it had no mask to go by."""

    module: nn.Module
    heads: int
    kv_heads: int
    head_size: int
    causal: bool | None


_calls: list[Call] = []


@contextlib.contextmanager
def probing() -> Iterator[list[Call]]:
    """Within it, the attentions of models with the attention implementation PROBE leave their calls."""
    _calls.clear()
    try:
        yield _calls
    finally:
        _calls.clear()


def unipelt_probe(module: nn.Module, query, key, value, attention_mask, **kwargs):
    """No attention at all: takes a note and returns zeros of the right shape."""
    causal = None if attention_mask is None else attention_mask.shape[2] > 1
    _calls.append(Call(module, query.shape[1], key.shape[1], query.shape[3], causal))
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


def probe_mask(
    batch_size: int, q_length: int, kv_length: int, mask_function: Callable = None, **kwargs
) -> torch.Tensor:
    """The mask of PROBE: real ones look at values, which a model on the meta device has not. Has a row per query if it is causal."""
    first, last = torch.tensor(0), torch.tensor(kv_length - 1)
    seen = mask_function is None or bool(mask_function(first, first, first, last))
    return torch.empty(batch_size, 1, 1 if seen else q_length, kv_length, device="meta")


class SoftmaxPrefix(TorchFunctionMode):
    """A prefix for an attention that computes softmax(scores [B, H, T, S]) by itself, while the mode is on.

    The scores grow by L columns in front; their share of the softmax is kept for `context`, the rest goes back to the
    attention, which multiplies it with its values.
    """

    def __init__(self, prefix: Prefix, query_BTD: torch.Tensor, scaling: float, dropout: float):
        super().__init__()
        self.prefix, self.query_BTD, self.scaling, self.dropout = (
            prefix,
            query_BTD,
            scaling,
            dropout,
        )
        self.share_BHTL: torch.Tensor | None = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not nn.functional.softmax:
            return function(*args, **(kwargs or {}))
        assert self.share_BHTL is None, "one softmax per attention"
        (keys_HLE, _), gate = self.prefix
        scores_BHTS = args[0]
        heads, length, size = keys_HLE.shape
        query_BHTE = self.query_BTD.unflatten(-1, (heads, size)).transpose(1, 2)
        scores_BHTL = (
            query_BHTE
            @ keys_HLE.to(query_BHTE.dtype).transpose(1, 2)
            * self.scaling
            * _per_head(gate)
        )
        share = torch.cat([scores_BHTL.to(scores_BHTS.dtype), scores_BHTS], dim=-1).softmax(dim=-1)
        self.share_BHTL = nn.functional.dropout(share[..., :length], self.dropout)
        return share[..., length:]

    def context(self) -> torch.Tensor:
        """What the prefix adds to the attention's output, [B, T, H·E]."""
        (_, values_HLE), gate = self.prefix
        out_BHTE = self.share_BHTL @ values_HLE.to(self.share_BHTL.dtype) * _per_head(gate)
        return out_BHTE.transpose(1, 2).flatten(2)


def _per_head(gate: torch.Tensor | float) -> torch.Tensor | float:
    """A gate [B, 1 or T, 1] beside scores [B, H, T, L]."""
    return gate.unsqueeze(1) if isinstance(gate, torch.Tensor) else gate


def register_attention() -> None:
    """Makes our functions known to transformers. Their masks too: without them a model's mask would silently be None."""
    for plain, function in (("sdpa", unipelt_sdpa), ("eager", unipelt_eager)):
        AttentionInterface.register(ATTENTION[plain], function)
        AttentionMaskInterface.register(ATTENTION[plain], ALL_MASK_ATTENTION_FUNCTIONS[plain])


@contextlib.contextmanager
def watching(note: Callable[[nn.Module, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """Within it `note` gets each attention that has a prefix, its output [B, T, H, E], and what that would be without the prefix."""

    def watched(ours: Callable, plain: Callable) -> Callable:
        def attend(module: nn.Module, query, key, value, attention_mask, **kwargs):
            has_prefix = module._modules[CHILD].has_prefix()
            out, weights = ours(module, query, key, value, attention_mask, **kwargs)
            if has_prefix:
                note(module, out, plain(module, query, key, value, attention_mask, **kwargs)[0])
            return out, weights

        return attend

    AttentionInterface.register(
        ATTENTION["sdpa"], watched(unipelt_sdpa, ALL_ATTENTION_FUNCTIONS["sdpa"])
    )
    AttentionInterface.register(ATTENTION["eager"], watched(unipelt_eager, _plain_eager))
    try:
        yield
    finally:
        register_attention()


register_attention()
AttentionInterface.register(PROBE, unipelt_probe)
AttentionMaskInterface.register(PROBE, probe_mask)
