"""What UniPELT has to know about the quantised layers of bitsandbytes.

This is the only file that touches private names of bitsandbytes. It does not import bitsandbytes:
if no other module has, no layer can be one of its layers.
"""

import sys
from typing import Any

from torch import nn


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference on CPUs with AVX512-BF16.

    At the first forward pass in evaluation mode it would replace them in place by a layout through
    which no gradient passes, with scales rounded to bfloat16. It would also fail for layers whose
    number of inputs is not a multiple of 64 or whose number of outputs is not a multiple of 32.

    Raises:
        ValueError: for weights that are repacked already, which bitsandbytes cannot restore.
    """
    library: Any = sys.modules.get("bitsandbytes")
    for name, module in model.named_modules() if library is not None else ():
        if not isinstance(module, library.nn.Linear4bit):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"bitsandbytes has repacked the 4-bit weights of {name} for inference on this CPU, "
                "and no gradient passes through them any more; load the model again and attach "
                "UniPELT before the first forward pass in evaluation mode"
            )
        module.support_avx512bf16_for_cpu = False


def leave_out_scales(model: nn.Module) -> None:
    """Keep the scales of 8-bit layers out of state dicts.

    DeepSpeed leaves the frozen weights that they belong to out of its checkpoints, and scales alone
    cannot be loaded. Frozen weights always come from the backbone's own folder.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.register_state_dict_post_hook(_without_scales)


def _without_scales(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in ("SCB", "weight_format"):
        state.pop(prefix + key, None)


def unpacked_numel(parameter: Any) -> int:
    """Return the number of values of a parameter; 4-bit weights hold two of them in a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else int(parameter.numel())
