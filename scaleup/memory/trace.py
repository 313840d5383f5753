"""Predict the activations of a deep model from two shallow copies of it.

step = trace(make_model, config, Kernels(...), batch=16, length=128)
"""

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from scaleup.memory.activations import Kernels, Step, fake_step

# The settings by which configs say how deep a model is.
LAYERS = "num_hidden_layers encoder_layers decoder_layers num_layers num_decoder_layers n_layer"


def trace(
    make: Callable[[PretrainedConfig], nn.Module],
    config: PretrainedConfig,
    kernels: Kernels,
    batch: int,
    length: int,
    target: int = 128,
    whole: nn.Module | None = None,
) -> Step:
    """Predict one step of the model that `make(config)` builds on the meta device.

    The layers of a stack are alike, or repeat a pattern after the first: hybrid models alternate
    attention with recurrent layers, and some models with experts have none in their first layers. A
    deep model is therefore extrapolated from two shallow copies that differ by one pattern. Random
    skipping of layers (BART's layerdrop) is off, which is the worst case.

    Args:
        whole: `make(config)`, if it exists already.
    """
    names = config.to_dict()
    depths = {
        name: getattr(config, name)
        for name in LAYERS.split()
        if name in names and name not in config.attribute_map
    }
    if len(depths) > 1:  # BART's num_hidden_layers repeats its encoder_layers
        depths.pop("num_hidden_layers", None)

    def at(**changes: int) -> Step:
        shallow = copy.deepcopy(config)
        for name, depth in changes.items():
            setattr(shallow, name, depth)
        return fake_step(make(shallow), kernels, batch, length, target)

    deep = make(config) if whole is None else whole
    low, pattern = {}, {}
    for name, depth in depths.items():
        start, pattern[name] = _pattern(deep, depth)
        # Two patterns, because the first layers keep less. What is left out is a multiple of one.
        least = start + 2 * pattern[name]
        low[name] = min(depth, least + (depth - least) % pattern[name])
    base = at(**low)
    kept, peak, operations = base.kept, base.peak, base.operations
    for name, depth in depths.items():
        times = (depth - low[name]) // pattern[name]
        if times > 0:
            deeper = at(**(low | {name: low[name] + pattern[name]}))
            kept += times * (deeper.kept - base.kept)
            peak += times * (deeper.peak - base.peak)
            operations += times * (deeper.operations - base.operations)
    return Step(kept, peak, operations)


def _pattern(model: nn.Module, depth: int) -> tuple[int, int]:
    """Return where the repeated pattern of a model's layers begins, and its length.

    Layers are alike if their parameters have the same names and shapes.
    """
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    # A number for each kind of layer, because layers of experts have thousands of parameters.
    numbers: dict[Any, int] = {}
    kinds = []
    for index in range(depth):
        shapes = tuple(_shapes(stack[index]) for stack in stacks)
        kinds.append(numbers.setdefault(shapes, len(numbers)))
    candidates = (
        (end - unit, unit)
        for end in range(1, depth + 1)
        for unit in range(1, end + 1)
        if kinds[end:] == kinds[end - unit : depth - unit]
    )
    return next(candidates)


def _shapes(layer: nn.Module) -> tuple[Any, ...]:
    return tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())
