"""Attention with a gated prefix, registered as attention functions of transformers.

    softmax([g q·P_Kᵀ, q·Kᵀ] / √E) · [g P_V; V]

The prefix enters in the attention function, so that it takes part in every attention (encoder,
decoder, cross), every query sees it, positions of real tokens do not shift, and nothing of it is
kept in a KV cache. A gate per example scales keys and values; a gate per token scales scores and
values per query.

This is the only file that touches transformers' attention and mask registries and the eager
attention functions of its modelling files.

Shapes: B examples, T queries, S keys, H heads, G key-value heads, E head size, L prefix length.
"""

import contextlib
import hashlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from .flash import flash_lengths, flash_visible, plain_flash, sdpa_mask
from .gate import GateValue
from .kernels import Visible, attend, is_fast_on_cpu, is_short, kernel_for, lse_attention
from .masks import PassMasks, alignment_padding

# The plain implementation → its name with a prefix. Each exported folder has names of its own,
# because one process may load scaleup and folders that several versions of it have exported.
_FOLDER = hashlib.sha256(__name__.encode()).hexdigest()[:8]
FAMILY = "unipelt" if __name__.startswith("scaleup.") else f"unipelt_{_FOLDER}"
ATTENTION = {plain: f"{FAMILY}_{plain}" for plain in ("sdpa", "eager")}
FLASH = f"{FAMILY}_fa"  # transformers searches "flash" in names and would import flash-attn
PROBE = f"{FAMILY}_probe"  # records its callers, see `probing`
ATTENTION_CHILD = "unipelt_attention"  # the child of an attention that evaluates its gates

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

# Keys and values [2, G, L, E], and the gate: a constant, [B, 1 or T, 1], or an expanded [B, H, T].
Prefix = tuple[torch.Tensor, GateValue]


def use_prefix_attention(model: PreTrainedModel) -> None:
    """Switch a model to the attention functions that take a prefix.

    Raises:
        ValueError: for an attention implementation without such a function.
    """
    for part in models_with_own_config(model):
        current = part.config._attn_implementation
        if current in (*ATTENTION.values(), FLASH):
            continue
        if current not in ATTENTION:
            raise ValueError(
                f"the prefix works with sdpa, eager or {FLASH} attention, not with {current}; "
                "load the model with attn_implementation='sdpa'"
            )
        part.set_attn_implementation(ATTENTION[current])
        assert part.config._attn_implementation == ATTENTION[current]


def implementation(attention: str) -> str:
    """Return the name in transformers of a value of `model.attention`."""
    return FLASH if attention == "flash" else attention


def restore_attention(model: nn.Module) -> None:
    """Switch a model back to the plain attention functions."""
    plain = {name: implementation for implementation, name in ATTENTION.items()}
    for part in models_with_own_config(model):
        if part.config._attn_implementation in plain:
            part.set_attn_implementation(plain[part.config._attn_implementation])


def models_with_own_config(model: nn.Module) -> list[PreTrainedModel]:
    """Return one model per config: T5's encoder and decoder have one each."""
    models = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    return list({id(part.config): part for part in models}.values())


def _of_one_head(gate: GateValue, query_BHTE: torch.Tensor) -> GateValue:
    """Return a gate that may be expanded to [B, H, T] as [B, 1 or T, 1]."""
    if not isinstance(gate, torch.Tensor) or gate.shape[1:] != query_BHTE.shape[1:3]:
        return gate
    gate_BT = gate[:, 0] if gate.stride(2) else gate[:, 0, :1]
    return gate_BT.unsqueeze(2).to(query_BHTE.dtype)


def _join_scaled(
    prefix: Prefix, key_BGSE: torch.Tensor, value_BGSE: torch.Tensor, padding: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the prefix, gated per example, and `padding` zeros in front of keys and values."""
    kv, gate = prefix
    if isinstance(gate, torch.Tensor) and torch.is_grad_enabled():
        # A matrix product, because its gradients are faster. [B, 2, …]
        kv = (gate.flatten(1).to(kv.dtype) @ kv.reshape(1, -1)).unflatten(1, kv.shape)
    elif isinstance(gate, torch.Tensor):
        kv = gate.to(kv.dtype)[..., None, None] * kv
    elif gate != 1.0:
        kv = gate * kv
    shape = key_BGSE.shape[0], -1, -1, -1
    keys, values = kv.to(key_BGSE.dtype).unbind(dim=-4)
    keys, values = keys.expand(shape), values.expand(shape)
    zeros = key_BGSE.new_zeros(()).expand(*key_BGSE.shape[:2], padding, key_BGSE.shape[3])
    front = [zeros] if padding else []
    return torch.cat([*front, keys, key_BGSE], dim=2), torch.cat([*front, values, value_BGSE], 2)


def _attend_per_token(
    plain: Callable[..., Any],
    module: nn.Module,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    prefix: Prefix,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute softmax([g_t q_t·P_Kᵀ, q_t·Kᵀ]) · [g_t P_V; V] with any attention kernel.

    Heads grow by L columns. A query carries its gated prefix scores there, the prefix keys are unit
    vectors that read them, and the same unit vectors among the values return the prefix's share of
    the softmax, which then weighs P_V.
    """
    query, key, value = qkv
    kv, gate_BT1 = prefix
    assert isinstance(gate_BT1, torch.Tensor)
    keys_HLE, values_HLE = kv.to(query.dtype).repeat_interleave(query.shape[1] // kv.shape[1], 1)
    head_size, length = query.shape[-1], keys_HLE.shape[1]
    extra = -(head_size + length) % 8 + length  # kernels need multiples of 8

    scores_BHTL = gate_BT1.unsqueeze(1) * (query @ keys_HLE.transpose(1, 2))
    wide_query = torch.cat([query, nn.functional.pad(scores_BHTL, (0, extra - length))], dim=-1)
    eye_LW = torch.eye(length, extra, device=query.device, dtype=query.dtype)
    unit = nn.functional.pad(eye_LW, (head_size, 0)).expand(*key.shape[:2], -1, -1)
    wide_key = torch.cat([unit, nn.functional.pad(key, (0, extra))], dim=2)
    wide_value = torch.cat([unit, nn.functional.pad(value, (0, extra))], dim=2)
    out_BTHW, weights = plain(module, wide_query, wide_key, wide_value, mask, **kwargs)
    share_BTHL = out_BTHW[..., head_size : head_size + length]
    of_prefix = torch.einsum("bthl,hle->bthe", share_BTHL, values_HLE) * gate_BT1.unsqueeze(-1)
    return out_BTHW[..., :head_size] + of_prefix, weights


class PrefixSource(Protocol):
    """What hands the prefix of the running pass to an attention function."""

    causal: bool  # the attention's own mask: queries do not see later keys

    def take_prefix(self) -> tuple[Prefix, PassMasks] | None: ...

    def observer(self) -> Callable[[torch.Tensor, torch.Tensor], None] | None: ...


def _attend(
    plain: Callable[..., Any],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Call `plain` as transformers calls it, with the prefix of the module if there is one."""
    layer: Any = module._modules.get(ATTENTION_CHILD)
    source: PrefixSource | None = layer.prefix_source if layer is not None else None
    taken = source.take_prefix() if source is not None else None
    if source is None or taken is None:
        return plain(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    observer, qkv = source.observer(), (query, key, value)
    if observer is None:
        return _join(plain, module, qkv, attention_mask, scaling, source.causal, taken, kwargs)
    without = plain(module, query, key, value, attention_mask, scaling=scaling, **kwargs)[0]
    out, weights = _join(plain, module, qkv, attention_mask, scaling, source.causal, taken, kwargs)
    observer((out - without).flatten(2), out.flatten(2))
    return out, weights


def _join(
    plain: Callable[..., Any],
    module: nn.Module,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None,
    scaling: float,
    source_causal: bool,
    taken: tuple[Prefix, PassMasks],
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Call `plain` with the prefix in front of keys and values, or an equivalent kernel."""
    (query, key, value), (prefix, masks) = qkv, taken
    causal = kwargs.get("is_causal")
    causal = source_causal if causal is None else causal
    dropout, sdpa = kwargs.get("dropout", 0.0), plain is not _plain_eager
    bias = kwargs.get("position_bias")

    def by_log_sum_exp() -> torch.Tensor | None:
        return _by_log_sum_exp(qkv, attention_mask, bias, causal, prefix, masks, scaling, dropout)

    if attention_mask is not None and attention_mask.dtype in INTEGERS and plain is not plain_flash:
        raise ValueError(
            f"the attention mask of shape {tuple(attention_mask.shape)} is {attention_mask.dtype}; "
            "pass a boolean mask, or one that is added to the scores"
        )
    if plain is plain_flash:
        visible = flash_visible(module, query, key, attention_mask, dropout, kwargs)
        return lse_attention(query, key, value, *prefix, visible, scaling, dropout), None
    joins = sdpa and masks.relative is None  # a bias that counts the prefix cannot be split
    if joins and masks.fast and (out := by_log_sum_exp()) is not None:
        return out, None
    length, gate = prefix[0].shape[2], _of_one_head(prefix[1], query)
    prefix = prefix[0], gate
    per_token = isinstance(gate, torch.Tensor) and gate.shape[1] > 1
    few = bias is None and is_short(*qkv, attention_mask, length, dropout, per_token)
    if sdpa and few:
        mask = masks.widened(attention_mask, length, query, key, causal)
        return attend(*qkv, *prefix, mask, scaling, dropout), None
    if (
        joins
        and is_fast_on_cpu(query, per_token, dropout)
        and (out := by_log_sum_exp()) is not None
    ):
        return out, None
    padding = alignment_padding(query, key, length, dropout) if sdpa and not per_token else 0
    mask = masks.widened(attention_mask, length, query, key, causal, padding)
    kwargs = kwargs | {"is_causal": False, "scaling": scaling}  # the mask contains the causal part
    if bias is not None:
        kwargs["position_bias"] = masks.widened_bias(bias, length, padding)
    if per_token:
        return _attend_per_token(plain, module, qkv, mask, prefix, **kwargs)
    key, value = _join_scaled(prefix, key, value, padding)
    return plain(module, query, key, value, mask, **kwargs)


def _autocast(qkv: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Cast queries, keys and values under autocast, as torch's sdpa does."""
    device = qkv[0].device.type
    if not torch.is_autocast_enabled(device):
        return qkv
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in qkv)


def _by_log_sum_exp(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    causal: bool,
    prefix: Prefix,
    masks: PassMasks,
    scaling: float,
    dropout: float,
) -> torch.Tensor | None:
    """Return the attention [B, T, H, E] of the real keys in a fused kernel, joined by the prefix.

    Returns:
        None if there is no such kernel, or if a mask or a position bias is trained, whose gradient
        the kernels do not compute.
    """
    if attention_mask is not None and attention_mask.requires_grad:
        return None
    # With gradient checkpointing, T5 asks for the gradient of a bias of zeros, a leaf.
    if bias is not None and bias.requires_grad and not bias.is_leaf:
        return None
    query, key, value = _autocast(qkv)
    mask = masks.additive(attention_mask, bias, query.dtype)
    visible = Visible(mask, causal and attention_mask is None and query.shape[2] > 1)
    same = query.dtype == key.dtype == value.dtype
    if not same or not dropout < 1 or kernel_for(query, key, visible, dropout) is None:
        return None
    return lse_attention(query, key, value, *prefix, visible, scaling, dropout)


def unipelt_sdpa(module: nn.Module, query, key, value, attention_mask, **kwargs):  # type: ignore[no-untyped-def]
    """Compute scaled-dot-product attention with the module's gated prefix."""
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        return unipelt_flash(module, query, key, value, attention_mask, **kwargs)
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return _attend(plain, module, query, key, value, attention_mask, **kwargs)


def unipelt_eager(module: nn.Module, query, key, value, attention_mask, **kwargs):  # type: ignore[no-untyped-def]
    """Call the eager attention of the module's modelling file with the module's gated prefix."""
    return _attend(_plain_eager, module, query, key, value, attention_mask, **kwargs)


def unipelt_flash(module: nn.Module, query, key, value, attention_mask, **kwargs):  # type: ignore[no-untyped-def]
    """Compute flash attention with the module's gated prefix if there is one."""
    query, key, value = _autocast((query, key, value))
    return _attend(plain_flash, module, query, key, value, attention_mask, **kwargs)


def _plain_eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


class Call(NamedTuple):
    """What an attention asked of its attention function. `causal` is None without a mask."""

    module: nn.Module
    heads: int
    kv_heads: int
    head_size: int
    causal: bool | None


_probe = threading.local()  # several threads may load models at the same time


@contextlib.contextmanager
def probing() -> Iterator[list[Call]]:
    """Record the calls of attentions in models whose attention implementation is PROBE."""
    _probe.calls = []
    try:
        yield _probe.calls
    finally:
        del _probe.calls


def unipelt_probe(module: nn.Module, query, key, value, attention_mask, **kwargs):  # type: ignore[no-untyped-def]
    """Record the call and return zeros of the right shape."""
    causal = None if attention_mask is None else attention_mask.shape[2] > 1
    _probe.calls.append(Call(module, query.shape[1], key.shape[1], query.shape[3], causal))
    return query.new_zeros(*query.shape[:1], query.shape[2], query.shape[1], value.shape[3]), None


def probe_mask(
    batch_size: int, q_length: int, kv_length: int, mask_function: Any = None, **kwargs: Any
) -> torch.Tensor:
    """Return the mask of PROBE, which has one row per query if it is causal.

    Real mask functions look at values, which a model on the meta device does not have.
    """
    first, last = torch.tensor(0), torch.tensor(kv_length - 1)
    visible = mask_function is None or bool(mask_function(first, first, first, last))
    return torch.empty(batch_size, 1, 1 if visible else q_length, kv_length, device="meta")


def register_attention() -> None:
    """Register the attention functions in transformers.

    Their mask functions are registered too: without them a model's mask would silently be None.
    """
    AttentionInterface.register(ATTENTION["sdpa"], unipelt_sdpa)
    AttentionMaskInterface.register(ATTENTION["sdpa"], sdpa_mask)
    AttentionInterface.register(ATTENTION["eager"], unipelt_eager)
    AttentionMaskInterface.register(ATTENTION["eager"], ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    AttentionInterface.register(FLASH, unipelt_flash)
    AttentionMaskInterface.register(FLASH, flash_lengths)
    AttentionInterface.register(PROBE, unipelt_probe)
    AttentionMaskInterface.register(PROBE, probe_mask)


register_attention()
