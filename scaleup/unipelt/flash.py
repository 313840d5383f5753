"""Flash attention without masks: `model.attention: flash`, and packed rows with sdpa.

Torch's flash kernel takes no mask. It takes the lengths of the texts in one long row instead, and
each text attends to itself. Padding is thus a text of its own, so that nothing is gathered and
sizes do not depend on the data. The mask function makes the lengths once per forward pass, and they
travel through the model in place of its mask.

Shapes: B examples, T queries, S keys, H heads, G key-value heads, E head size, N texts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, masking_utils
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
from transformers.utils.import_utils import is_tracing

from .kernels import Visible, fast_path, kernel_for, lse_attention, target_device

# Arguments of attention functions that change what the kernel would have to compute.
UNSUPPORTED = ("softcap", "s_aux", "position_bias")
WINDOWS = ("sliding_window", "attention_chunk_size")  # settings of models that see a part of a text
SETTING = "model.attention: flash"


def check_flash(model: PreTrainedModel) -> None:
    """Check that a model can use flash attention.

    Raises:
        ValueError: if it cannot.
    """
    config: Any = model.config.get_text_config()
    reason = None
    if not model._supports_flash_attn:
        reason = "does not support it, for example because it adds a bias to the scores"
    elif getattr(config, "attn_logit_softcapping", None):
        reason = "caps its scores"
    elif getattr(config, "attention_chunk_size", None):
        reason = "attends in chunks"
    elif any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        reason = "has attention sinks"
    if reason is not None:
        other = "sdpa" if model._supports_sdpa else "eager"
        raise ValueError(f"{SETTING}: {config.model_type} {reason}; set model.attention={other}")


def flash_lengths(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Return the lengths of texts in place of a mask. This is a mask function of transformers.

    Args:
        batch_size, q_length, kv_length: B, T and S.
        q_offset, kv_offset: positions of the first query and the first key.
        mask_function: which keys a query sees, beside windows and padding.
        attention_mask: 1 at real tokens, [B, ≥ S].
        use_vmap: whether the model changes the usual mask.
        kwargs: other arguments of mask functions, such as the device.

    Returns:
        int32 [2, N + 1], the cumulative lengths of the texts in queries and in keys. None if each
        row is one text, in which the last query and the last key have the same position.

    Raises:
        ValueError: for a static cache, and for masks of other kinds.
    """
    if use_vmap:
        raise ValueError(f"{SETTING}: this model changes its mask; set model.attention=sdpa")
    encoder = mask_function is bidirectional_mask_function
    past = None if encoder or isinstance(q_offset, torch.Tensor) else q_offset + q_length
    if not encoder and past != kv_offset + kv_length:
        raise ValueError(f"{SETTING} does not work with a static cache; use a dynamic one")
    if attention_mask is not None:
        mask_BS = attention_mask[:, -kv_length:].bool()
        if not is_tracing(mask_BS) and bool(mask_BS.all()):
            return None
        return _of_padding(mask_BS, q_length, encoder)
    packs = mask_function not in (causal_mask_function, bidirectional_mask_function)
    if not packs or q_length != kv_length or q_length == 1:
        return None
    # A token that does not see the one before it begins a text.
    device = kwargs["device"]
    row_B1 = torch.arange(batch_size, device=device).unsqueeze(1)
    at_T = torch.arange(1, q_length, device=device)
    joined_BT = mask_function(row_B1, torch.zeros_like(row_B1), at_T, at_T - 1)
    starts_BT = joined_BT.logical_not().expand(batch_size, -1)
    if is_tracing(starts_BT):  # the number of texts would have to be known
        one_text = starts_BT.logical_not().all()
        torch._assert_async(
            one_text, f"{SETTING}: torch.compile and CUDA graphs take no packed rows"
        )
        return None
    if not bool(starts_BT.any()):
        return None
    starts_BT = nn.functional.pad(starts_BT, (1, 0), value=True)
    starts_N = starts_BT.flatten().nonzero().squeeze(1)
    ends_N = torch.cat([starts_N, starts_N.new_tensor([starts_BT.numel()])]).int()
    return torch.stack([ends_N, ends_N])


def sdpa_mask(**arguments: Any) -> torch.Tensor | None:
    """Return the mask of sdpa, or `flash_lengths` of packed texts if the flash kernel takes them.

    This is a mask function of transformers.
    """
    lengths = flash_lengths(**arguments) if _is_packed_for_flash(**arguments) else None
    return masking_utils.sdpa_mask(**arguments) if lengths is None else lengths


def _is_packed_for_flash(
    q_length: int,
    kv_length: int,
    device: torch.device,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    dtype: torch.dtype = torch.float32,
    config: Any = None,
    **kwargs: Any,
) -> bool:
    """Return whether rows may hold several texts, and the flash kernel does what sdpa does.

    Args:
        q_length, kv_length, mask_function, attention_mask, use_vmap: as for `flash_lengths`.
        device, dtype, config: those of the model.
        kwargs: other arguments of mask functions.
    """
    plain = mask_function in (causal_mask_function, bidirectional_mask_function)
    if plain or attention_mask is not None or use_vmap or q_length != kv_length or is_tracing():
        return False
    # Beside texts, only plain causal attention. sdpa leaves out the cap of the scores.
    if any(getattr(config, name, None) for name in (*WINDOWS, "attn_logit_softcapping")):
        return False
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    head = torch.empty(1, 1, 1, size, dtype=dtype, device=device)
    return fast_path(head) and kernel_for(head, head, Visible(), 0.0) in ("flash", "cpu")


def _of_padding(mask_BS: torch.Tensor, queries: int, encoder: bool) -> torch.Tensor:
    """Return the lengths of three texts per row: padding, real tokens, padding.

    Args:
        mask_BS: True at real keys. There is no padding between them.
        queries: T.
        encoder: whether all queries belong to the real keys, as in an encoder and in cross
            attention. If not, the last query has the position of the last key.
    """
    batch, keys = mask_BS.shape
    at_S = torch.arange(keys, device=mask_BS.device)
    first_B = torch.where(mask_BS, at_S, keys).amin(dim=1)
    end_B = torch.where(mask_BS, at_S + 1, 0).amax(dim=1).maximum(first_B)
    no_gap = (mask_BS.sum(dim=1) == end_B - first_B).all()
    torch._assert_async(no_gap, f"{SETTING}: there is padding between the tokens of a text")
    ends_B3 = torch.stack([first_B, end_B, torch.full_like(end_B, keys)], dim=1)
    if encoder:
        query_ends_B3 = ends_B3.new_tensor([0, queries, queries]).expand(batch, -1)
    else:
        query_ends_B3 = (ends_B3 - (keys - queries)).clamp(min=0)
    rows_B1 = torch.arange(batch, device=mask_BS.device).unsqueeze(1)
    lengths = [
        (rows_B1 * tokens + ends).flatten()
        for tokens, ends in ((queries, query_ends_B3), (keys, ends_B3))
    ]
    return nn.functional.pad(torch.stack(lengths), (1, 0)).int()


def flash_visible(
    module: Any,
    query_BHTE: torch.Tensor,
    key_BGSE: torch.Tensor,
    lengths: torch.Tensor | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> Visible:
    """Return which keys a query sees.

    Args:
        module: the attention.
        query_BHTE, key_BGSE: its queries and keys.
        lengths: result of `flash_lengths`.
        dropout: probability.
        kwargs: other arguments of the attention function.

    Raises:
        ValueError: where flash attention cannot be used.
    """
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{SETTING}: this model passes {name}; set model.attention=sdpa")
    if lengths is not None and (lengths.dim() != 2 or lengths.dtype != torch.int32):
        raise ValueError(f"{SETTING} takes no mask of its own; set model.attention=sdpa")
    if not fast_path(query_BHTE):
        raise ValueError(
            f"{SETTING} needs a GPU and SCALEUP_KERNELS=auto; set model.attention=sdpa"
        )
    queries, keys = query_BHTE.shape[2], key_BGSE.shape[2]
    causal = kwargs.get("is_causal")
    causal = bool(module.is_causal if causal is None else causal) and queries > 1
    if lengths is None and causal and queries != keys:  # several queries after cached ones
        rows = torch.arange(len(query_BHTE) + 1, dtype=torch.int32, device=query_BHTE.device)
        lengths = torch.stack([rows * queries, rows * keys])
    window = kwargs.get("sliding_window")
    window = None if window is None or window >= keys else window
    visible = Visible(None, causal, lengths, (queries, keys), window)
    kernel = kernel_for(query_BHTE, key_BGSE, visible, dropout)
    if target_device(query_BHTE) == "cuda" and kernel != "flash":
        raise ValueError(
            f"{SETTING} needs bfloat16 or float16 (train.bf16=true) and heads of at most 256 "
            "columns in multiples of 8; set model.attention=sdpa"
        )
    return visible


def plain_flash(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute flash attention without a prefix, as an attention function of transformers."""
    visible = flash_visible(module, query, key, attention_mask, dropout, kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return lse_attention(query, key, value, None, 1.0, visible, scaling, dropout), None
