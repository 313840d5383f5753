"""What `nn.Linear` and transformers' `Conv1D`, which keeps its weight [in, out], have in common."""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer."""
    return isinstance(module, (nn.Linear, Conv1D))


def sizes(layer: Any) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a linear layer."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    return layer.in_features, layer.out_features
