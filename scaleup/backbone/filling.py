"""Fill a model on the meta device from its weight files, module by module.

transformers' own loader reads the whole checkpoint on every process. Loaders that shard a model
(`sharded`, `fsdp`) need one module at a time.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from scaleup.backbone.int8 import Int8Linear
from scaleup.backbone.quantization import quantize_rows
from scaleup.backbone.weights import Weights

TRIM_EVERY = 1 << 24  # weights read between two calls of `weights.return_freed_memory`


def names_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of each parameter by its id. Tied weights have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


class Filler:
    """Fills the modules of a model on the meta device, one after another.

    The weights of `Int8Linear` layers are quantised.

    Attributes:
        info: transformers' loading info: `missing_keys` and `mismatched_keys` (another shape in the
            checkpoint). Both kinds are initialised as transformers does.
    """

    def __init__(self, model: PreTrainedModel, weights: Weights | None, device: torch.device):
        self.model, self.weights, self.device = model, weights, device
        self.shapes = {} if weights is None else weights.shapes()
        self.info: dict[str, set[str]] = {"missing_keys": set(), "mismatched_keys": set()}
        self.names = names_of_parameters(model)
        # Meta parameter and its replacement. The former is kept alive so that its id stays unique.
        self.loaded: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        self.blank: list[str] = []  # buffers that the checkpoint lacks

    def shape(self, names: list[str]) -> torch.Size | None:
        """Return the shape of a tensor of the checkpoint, which may have one of several names."""
        return next((self.shapes[name] for name in names if name in self.shapes), None)

    def values(self, names: list[str], empty: nn.Parameter) -> torch.Tensor:
        """Return the tensor whose shape was asked for last, or what this process keeps of it."""
        value = self._get(names, self.rows(empty))
        assert value is not None
        if value.shape[1:] != empty.shape[1:]:  # one that is made of several in the files
            raise ValueError(f"{names[0]} is {tuple(value.shape)} in the files")
        return value

    def rows(self, empty: nn.Parameter) -> slice | None:
        """Return the rows of a parameter that this process reads; None: all of them."""
        return None

    def buffer(self, name: str, empty: torch.Tensor) -> torch.Tensor | None:
        """Return the values of a buffer; None if the checkpoint has none."""
        return self._get([name])

    def _get(self, names: list[str], rows: slice | None = None) -> torch.Tensor | None:
        return None if self.weights is None else self.weights.get(names, rows)

    def make_parameter(self, empty: nn.Parameter, value: torch.Tensor) -> Any:
        """Return the parameter that replaces an empty one, with the rows that were read."""
        return nn.Parameter(value.to(self.device), empty.requires_grad)

    def fill(self, prefix: str, module: nn.Module) -> list[Any]:
        """Load or initialise the parameters and buffers of one module; return new parameters."""
        complete, new = True, list[Any]()
        for name, empty in list(module._parameters.items()):
            is_scale = isinstance(module, Int8Linear) and name == "scale"
            if empty is None or is_scale:
                continue
            if id(empty) in self.loaded:  # tied weights stay one parameter
                module._parameters[name] = self.loaded[id(empty)][1]
                continue
            value = self._read(empty, module)
            complete = complete and value is not None
            values = {name: torch.empty_like(empty, device=self.device) if value is None else value}
            if isinstance(module, Int8Linear) and name == "weight":
                values = dict(zip(("weight", "scale"), quantize_rows(values[name].to(self.device))))
            for key, tensor in values.items():
                old: Any = module._parameters[key]
                parameter = self.make_parameter(old, tensor)
                parameter._is_hf_initialized = value is not None
                self.loaded[id(old)] = (old, parameter)
                module._parameters[key] = parameter
                new.append(parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "meta":
                value = self.buffer(f"{prefix}.{name}", buffer)
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

        What is missing or has another shape is noted in `info`.
        """
        names = self.names[id(empty)]
        shape = self.shape(names)
        if shape != empty.shape:
            self.info["missing_keys" if shape is None else "mismatched_keys"].add(names[0])
            return None
        quantized = isinstance(module, Int8Linear) and empty.dtype == torch.int8
        # bitsandbytes quantises from float16, whatever type the checkpoint has.
        dtype = torch.float16 if quantized else empty.dtype
        return self.values(names, empty).to(dtype, copy=True)
