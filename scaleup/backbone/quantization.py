"""Quantise frozen weights with bitsandbytes: int8, or 4-bit NF4 (Dettmers et al. 2023).

transformers quantises while it loads a model. What bitsandbytes leaves undone in its layers, and
what a PEFT user needs as well, is in `scaleup.unipelt.quantized`.
"""

import logging

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

OUTLIER = 6.0  # bitsandbytes' threshold: on a GPU, larger inputs are multiplied in half precision


def loading_arguments(
    quantization: str, whole: tuple[str, ...], dtype: torch.dtype, device: torch.device | None
) -> dict:
    """Return the arguments of `from_pretrained` that quantise a model.

    Args:
        quantization: "8bit", "nf4" or "none".
        whole: names of the modules that are not quantised.
        device: where the weights go. None under ZeRO-3, which places them itself.
    """
    if quantization == "none":
        return {}
    # It warns in every layer that it casts to float16, which is intended.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    kind: dict = {"load_in_8bit": True}
    if quantization == "nf4":
        kind = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    # llm_int8_skip_modules is used for 4-bit weights, too.
    config = BitsAndBytesConfig(**kind, llm_int8_skip_modules=list(whole))
    placement = {} if device is None else {"device_map": {"": device}}
    return {"quantization_config": config, **placement}


def initialize_heads(
    model: PreTrainedModel, empty: PreTrainedModel, heads: tuple[str, ...]
) -> set[str]:
    """Initialise head weights whose shape in the checkpoint differs from that in `empty`.

    `from_pretrained` does this itself unless it quantises. `empty` is the task's model on the meta
    device.

    Returns:
        The names of the parameters that were initialised.
    """
    initialized: set[str] = set()
    for name in heads:
        for path, module in empty.get_submodule(name).named_modules(prefix=name):
            loaded, resized = model.get_submodule(path), False
            for key, parameter in module.named_parameters(recurse=False):
                current = getattr(loaded, key)
                if parameter.shape != current.shape:
                    setattr(loaded, key, nn.Parameter(current.new_empty(parameter.shape)))
                    resized = True
            if resized:
                model._init_weights(loaded)
                initialized |= {f"{path}.{key}" for key, _ in loaded.named_parameters()}
    return initialized


def quantize_rows(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the int8 weight [O, I] and float32 row scales [O], computed through float16."""
    from bitsandbytes.functional import int8_vectorwise_quant  # an optional package

    weight_int8_OI, scale_O, _ = int8_vectorwise_quant(weight_OI.to(torch.float16))
    return weight_int8_OI, scale_O


def int8_product(x: torch.Tensor, weight_OI: torch.Tensor, scale_O: torch.Tensor) -> torch.Tensor:
    """Multiply inputs [..., I] with an int8 weight on a GPU, as bitsandbytes' layer does."""
    from bitsandbytes.functional import int8_vectorwise_quant

    rows = x.reshape(-1, x.shape[-1])
    rows_int8, row_scales, outliers = int8_vectorwise_quant(rows.half(), threshold=OUTLIER)
    out, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
        rows, rows_int8, weight_OI, row_scales, scale_O, outliers, None
    )
    return out.view(*x.shape[:-1], -1)
