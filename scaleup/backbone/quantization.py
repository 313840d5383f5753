"""Frozen weights that bitsandbytes quantises while transformers loads them: 8 bit, or 4 bit (NF4, Dettmers et al. 2023).

What both libraries leave undone around it is mended here, and only here.
"""

import logging

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel


def arguments(
    quantization: str, whole: tuple[str, ...], dtype: torch.dtype, device: torch.device | None
) -> dict:
    """from_pretrained's arguments for "8bit", "nf4" or "none". `whole`: modules left as they are. Under ZeRO-3 `device` must be None."""
    if quantization == "none":
        return {}
    # It would say in every layer that it casts to float16, which is how it works.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    kinds = {
        "8bit": {"load_in_8bit": True},
        "nf4": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": dtype,
        },
    }
    # llm_int8_skip_modules serves 4 bit too, whatever its name says.
    config = BitsAndBytesConfig(**kinds[quantization], llm_int8_skip_modules=list(whole))
    return {"quantization_config": config} | (
        {} if device is None else {"device_map": {"": device}}
    )


def renew_heads(model: PreTrainedModel, empty: PreTrainedModel, heads: tuple[str, ...]) -> None:
    """Initialises head weights of another shape than the task needs; from_pretrained does not when it quantises."""
    for name in heads:
        for path, module in empty.get_submodule(name).named_modules(prefix=name):
            loaded = model.get_submodule(path)
            wrong = [
                n
                for n, p in module.named_parameters(recurse=False)
                if p.shape != getattr(loaded, n).shape
            ]
            for parameter in wrong:
                like = getattr(loaded, parameter)
                setattr(
                    loaded,
                    parameter,
                    nn.Parameter(like.new_empty(getattr(module, parameter).shape)),
                )
            if wrong:
                model._init_weights(loaded)
