"""Frozen weights that bitsandbytes quantises while transformers loads them: 8 bit, or 4 bit (NF4, Dettmers et al. 2023).

What both libraries leave undone around it is mended here, and only here.
"""

import logging
import sys

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel


def leave_out_scales(model: nn.Module) -> None:
    """Keeps 8-bit scales out of state dicts: DeepSpeed drops the frozen weights they belong to from its checkpoints, and scales
    alone cannot be loaded. Frozen weights always come from the backbone's own folder."""
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.register_state_dict_post_hook(_without_scales)


def _without_scales(module: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
    for key in ("SCB", "weight_format"):
        state.pop(prefix + key, None)


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference, on CPUs with AVX512-BF16.

    At the first forward pass in evaluation mode it would replace them by a layout that no gradient
    passes, in training mode neither, with scales rounded to bfloat16; and it would fail for layers
    whose inputs are no multiple of 64 or whose outputs are none of 32. Call it before that pass.

    Raises ValueError for weights that are repacked already: bitsandbytes cannot restore them.
    """
    library = sys.modules.get("bitsandbytes")  # not imported: no module can be one of its layers
    for name, module in model.named_modules() if library is not None else ():
        if not isinstance(module, library.nn.Linear4bit):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"bitsandbytes has repacked the 4-bit weights of {name} for inference on this CPU, "
                "and no gradient passes them any more; load the model anew and attach UniPELT "
                "before the first forward pass in evaluation mode"
            )
        module.support_avx512bf16_for_cpu = False  # all that decides, in each layer


def arguments(quantization: str, whole: tuple[str, ...], dtype: torch.dtype, device: torch.device | None) -> dict:
    """from_pretrained's arguments for "8bit", "nf4" or "none". `whole`: modules left as they are. Under ZeRO-3 `device` must be None."""
    if quantization == "none":
        return {}
    # It would say in every layer that it casts to float16, which is how it works.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    kinds = {
        "8bit": {"load_in_8bit": True},
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype},
    }
    # llm_int8_skip_modules serves 4 bit too, whatever its name says.
    config = BitsAndBytesConfig(**kinds[quantization], llm_int8_skip_modules=list(whole))
    return {"quantization_config": config} | ({} if device is None else {"device_map": {"": device}})


def renew_heads(model: PreTrainedModel, empty: PreTrainedModel, heads: tuple[str, ...]) -> None:
    """Initialises head weights of another shape than the task needs; from_pretrained does not when it quantises."""
    for name in heads:
        for path, module in empty.get_submodule(name).named_modules(prefix=name):
            loaded = model.get_submodule(path)
            wrong = [n for n, p in module.named_parameters(recurse=False) if p.shape != getattr(loaded, n).shape]
            for parameter in wrong:
                like = getattr(loaded, parameter)
                setattr(loaded, parameter, nn.Parameter(like.new_empty(getattr(module, parameter).shape)))
            if wrong:
                model._init_weights(loaded)
