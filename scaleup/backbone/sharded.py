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

from scaleup.backbone.int8 import Int8Linear
from scaleup.backbone.quantization import quantize_rows
from scaleup.backbone.weights import (
    Weights,
    copy_of_first,
    from_first,
    is_alone,
    return_freed_memory,
)
from scaleup.errors import one_line

TRIM_EVERY = 1 << 24  # weights
GATHERED = 1 << 26  # weights that are whole at the same time while they are copied


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """Return the shape of a parameter; under ZeRO-3 that of the whole parameter."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def stored_tensor(parameter: nn.Parameter) -> torch.Tensor:
    """Return what this process stores of a parameter: all of it, or its ZeRO-3 shard."""
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

            deepspeed.zero.Init(module=module, config_dict_or_path=deepspeed_config())
            self.first = parameters[0]


class _Loader:
    """Fills the modules of a model on the meta device, one after another."""

    def __init__(self, model: PreTrainedModel, weights: Weights | None, device: torch.device):
        self.model, self.weights, self.device = model, weights, device
        self.info: dict[str, set[str]] = {"missing_keys": set(), "mismatched_keys": set()}
        self.names: dict[int, list[str]] = {}  # of each parameter; tied weights have several
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.names.setdefault(id(parameter), []).append(name)
        # Meta parameter and its replacement. The former is kept alive so that its id stays unique.
        self.loaded: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        self.blank: list[str] = []  # buffers that the checkpoint lacks

    def fill(self, prefix: str, module: nn.Module) -> list[nn.Parameter]:
        """Load or initialise the parameters and buffers of one module; return new parameters."""
        complete, new = True, []
        for name, empty in list(module._parameters.items()):
            is_scale = isinstance(module, Int8Linear) and name == "scale"
            if empty is None or is_scale:
                continue
            if id(empty) in self.loaded:  # tied weights stay one parameter
                module._parameters[name] = self.loaded[id(empty)][1]
                continue
            value = self._read(empty, module)
            complete = complete and value is not None
            tensor = torch.empty_like(empty, device=self.device) if value is None else value
            parameter: Any = nn.Parameter(tensor.to(self.device), empty.requires_grad)
            parameter._is_hf_initialized = value is not None
            self.loaded[id(empty)] = (empty, parameter)
            module._parameters[name] = parameter
            new.append(parameter)
            if isinstance(module, Int8Linear) and name == "weight":
                parameter.data, scale_O = quantize_rows(parameter.data)
                scale: Any = nn.Parameter(scale_O.to(self.device), requires_grad=False)
                scale._is_hf_initialized = True
                module.scale = scale
                new.append(scale)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "meta":
                value = self._copy_of_first([f"{prefix}.{name}"], buffer.dtype)
                complete = complete and value is not None
                if value is None:
                    self.blank.append(f"{prefix}.{name}".removeprefix("."))
                    blank = float("nan") if buffer.is_floating_point() else 0
                    value = torch.full_like(buffer, blank, device=self.device)
                module._buffers[name] = value.to(self.device, buffer.dtype)
        if not complete:
            self.model._init_weights(module)
            for parameter in new:
                parameter._is_hf_initialized = True
        return new

    def finish(self) -> None:
        """Let modules initialise the buffers of those inside them, after all are loaded.

        Raises:
            ValueError: if a buffer remains without a value.
        """
        for name in self.blank:
            path = name
            while self.model.get_buffer(name).isnan().any():
                if not path:
                    raise ValueError(f"{name} is not in the checkpoint; use ZeRO-2")
                path = path.rpartition(".")[0]
                self.model._init_weights(self.model.get_submodule(path))

    def _read(self, empty: nn.Parameter, module: nn.Module) -> torch.Tensor | None:
        """Return a copy of a tensor in the model's type; None if the checkpoint has none that fits.

        What is missing or has another shape is noted in `info`. On processes that do not read, the
        values are arbitrary, because DeepSpeed replaces them by those of rank 0.
        """
        names = self.names[id(empty)]
        value = None if self.weights is None else self.weights.get(names)
        shape = from_first(None if value is None else value.shape)
        if shape != empty.shape:
            self.info["missing_keys" if shape is None else "mismatched_keys"].add(names[0])
            return None
        quantized = isinstance(module, Int8Linear) and empty.dtype == torch.int8
        # bitsandbytes quantises from float16, whatever type the checkpoint has.
        dtype = torch.float16 if quantized else empty.dtype
        return torch.zeros(shape, dtype=dtype) if value is None else value.to(dtype, copy=True)

    def _copy_of_first(self, names: list[str], dtype: torch.dtype) -> torch.Tensor | None:
        """Return a buffer with rank 0's values; None if the checkpoint has none."""
        value = None if self.weights is None else self.weights.get(names)
        shape = from_first(None if value is None else value.shape)
        if shape is None:
            return None
        return copy_of_first(torch.zeros(shape, dtype=dtype) if value is None else value.to(dtype))


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

    Rank 0 reads the files in `folder`, and DeepSpeed hands out what it has read. The weights of
    `Int8Linear` layers are quantised.

    Returns:
        transformers' loading info: `missing_keys` and `mismatched_keys` (another shape in the
        checkpoint). Both kinds have been initialised as transformers does.
    """
    loader = _Loader(model, _open_on_first(model, folder), device)
    partition, read = _Partitioner(), 0
    for prefix, module in model.named_modules():
        parameters = loader.fill(prefix, module)
        partition(module, parameters)
        read += sum(p.ds_numel for p in parameters)  # type: ignore[attr-defined]
        if read > TRIM_EVERY:
            return_freed_memory()
            read = 0
    loader.finish()
    return_freed_memory()
    return loader.info
