"""Load weights directly into ZeRO-3 shards, and read and write sharded parameters.

transformers' own loader for ZeRO-3 first reads the whole checkpoint, cannot replace a head of
another size and cannot quantise. This one reads the tensors of one module at a time from mapped
files, quantises its linear weights if requested, and hands them to DeepSpeed, which keeps the shard
of this rank and frees the rest.

This is the only file that uses `deepspeed.zero` and the `ds_*` attributes of parameters, except
that the parameter counts in `scaleup.unipelt.model` read `ds_numel`. The state of DeepSpeed's
optimizers is in `scaleup.training.zero_state`.
"""

import pathlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import deepspeed_config

from scaleup.backbone.filling import TRIM_EVERY, Filler
from scaleup.backbone.weights import (
    Weights,
    copy_of_first,
    from_first,
    is_alone,
    return_freed_memory,
)
from scaleup.errors import one_line
from scaleup.settings.presets import HPZ

GATHERED = 1 << 26  # weights that are whole at the same time while they are copied


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """Return the shape of a parameter; under ZeRO-3 that of the whole parameter."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def stored_tensor(parameter: nn.Parameter) -> torch.Tensor:
    """Return what this process stores of a parameter: all of it, or its shard."""
    if hasattr(parameter, "to_local"):  # of FSDP
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter.data)


def set_values(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Write a parameter. Under ZeRO-3 every process passes all values and keeps its shard."""
    if not hasattr(parameter, "ds_id"):
        parameter.data.copy_(values)
        return
    import deepspeed  # slow to import, and optional

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(values)


def copies_on_first(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Return copies of whole parameters in the CPU memory of rank 0; {} on other processes.

    Under ZeRO-3 every process must call this, and nothing else than these parameters is gathered.
    """
    first = is_alone() or dist.get_rank() == 0
    shards = {name: p for name, p in parameters.items() if hasattr(p, "ds_id")}
    copies = {}
    if first:
        copies = {
            name: p.detach().to("cpu", copy=True)
            for name, p in parameters.items()
            if name not in shards
        }
    while shards:
        batch, size = {}, 0
        while shards and size < GATHERED:
            name = next(iter(shards))
            batch[name] = shards.pop(name)
            size += whole_shape(batch[name]).numel()
        copies |= _gathered(batch, first)
    return copies


def _gathered(parameters: dict[str, nn.Parameter], keep: bool) -> dict[str, torch.Tensor]:
    """Gather ZeRO-3 parameters, and return copies of them on the CPU if `keep`."""
    import deepspeed  # slow to import, and optional

    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        if not keep:
            return {}
        return {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}


class _Partitioner:
    """Turns parameters into ZeRO-3 parameters, of which this process keeps its shard."""

    def __init__(self) -> None:
        self.first: Any = None  # the first parameter, to which DeepSpeed adds methods

    def __call__(self, module: nn.Module, parameters: list[nn.Parameter]) -> None:
        if self.first is not None:
            self.first.convert_to_zero_parameters(param_list=parameters)
        elif parameters:
            import deepspeed  # slow to import, and optional
            from deepspeed.utils import groups

            config: Any = deepspeed_config()
            group = None
            if config["zero_optimization"].get(HPZ, 1) > 1:
                # DeepSpeed refuses to make this group twice in a process. None: it is not made yet.
                group = groups._get_zero_param_intra_parallel_group()
            deepspeed.zero.Init(
                module=module, config_dict_or_path=config, zero_param_parallel_group=group
            )
            self.first = parameters[0]


class _FirstFiller(Filler):
    """Rank 0 reads the files. DeepSpeed replaces the values of other processes by those of rank 0.

    Args:
        weights: on rank 0; None on other processes.
    """

    def __init__(self, model: PreTrainedModel, weights: Weights | None, device: torch.device):
        super().__init__(model, weights, device)
        self.found: torch.Tensor | None = None  # what `shape` has read, on rank 0

    def shape(self, names: list[str]) -> torch.Size | None:
        self.found = None if self.weights is None else self.weights.get(names)
        return from_first(None if self.found is None else self.found.shape)

    def values(self, names: list[str], empty: nn.Parameter) -> torch.Tensor:
        return torch.zeros(empty.shape) if self.found is None else self.found

    def buffer(self, name: str, empty: torch.Tensor) -> torch.Tensor | None:
        shape, dtype = self.shape([name]), empty.dtype
        if shape is None:
            return None
        found = torch.zeros(shape, dtype=dtype) if self.found is None else self.found.to(dtype)
        return copy_of_first(found)


def _open_on_first(model: PreTrainedModel, folder: pathlib.Path) -> Weights | None:
    """Return the weights on rank 0, and None on others. If they are unusable, all raise."""
    weights, problem = None, None
    if is_alone() or dist.get_rank() == 0:
        try:
            weights = Weights(model, folder)
        except Exception as error:  # safetensors and torch.load raise all kinds
            problem = error
    text = from_first(problem and (one_line(problem) or type(problem).__name__))
    if text is not None:
        raise problem or ValueError(text)
    return weights


def load_sharded(
    model: PreTrainedModel, folder: pathlib.Path, device: torch.device
) -> dict[str, set[str]]:
    """Fill a model of meta tensors after TrainingArguments have set up ZeRO-3.

    Rank 0 reads the files in `folder`, and DeepSpeed hands out what it has read.

    Returns:
        `Filler.info`.
    """
    loader = _FirstFiller(model, _open_on_first(model, folder), device)
    partition, read = _Partitioner(), 0
    for prefix, module in model.named_modules():
        parameters: list[Any] = loader.fill(prefix, module)
        partition(module, parameters)
        read += sum(p.ds_numel for p in parameters)
        if read > TRIM_EVERY:
            return_freed_memory()
            read = 0
    loader.finish()
    return_freed_memory()
    return loader.info
