"""Compute on one device with weights that do not fit there.

Accelerate keeps them in the memory of the host, or else in files, and brings those of one module at
a time to the device. What a run has trained, about 1% of the model, is always on the device.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import infer_auto_device_map
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import get_max_memory
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

ROOM = 0.8  # share of the free memory that weights may take; the rest is for activations


@dataclasses.dataclass(frozen=True)
class Offload:
    """What to do with weights that do not fit on the device.

    Attributes:
        folder: takes the files of weights for which the host has no memory either.
        memory: bytes of weights that may be on the device; None: `ROOM` of what is free there.
    """

    folder: pathlib.Path
    memory: int | None = None

    def loading_arguments(
        self, model: PreTrainedModel, heads: Sequence[str], device: torch.device
    ) -> dict[str, Any]:
        """Return the arguments of `from_pretrained` for a model, {} if it fits on the device.

        Args:
            model: the model on the meta device.
            heads: the modules that must be on the device, because a run replaces their weights.
            device: where to compute.
        """
        free = get_max_memory()
        home: int | str = "cpu" if device.type == "cpu" else device.index or 0
        limits = {name: int(ROOM * free[name]) for name in (home, "cpu")}
        if self.memory is not None:
            limits[home] = self.memory
        if sum(t.nbytes for t in model.state_dict().values()) <= limits[home]:
            return {}
        places = infer_auto_device_map(
            model,
            max_memory=limits,
            no_split_module_classes=list(model._no_split_modules or ()),
            clean_result=False,  # an entry for a parent would cover those of heads
        )
        inside = tuple(f"{name}." for name in heads)
        places = {name: place for name, place in places.items() if not name.startswith(inside)}
        places |= dict.fromkeys(heads, home)
        return {"device_map": places, "offload_folder": str(self.folder)}


def materialize_trained(model: nn.Module, device: torch.device) -> None:
    """Put the trained tensors, and a head that is saved with them, on the device.

    They are not initialised: the tensors of a checkpoint must follow. PEFT makes them where the
    module beside them is, which may be nowhere.
    """
    copies = [
        copy
        for module in model.modules()
        if isinstance(module, ModulesToSaveWrapper)
        for copy in module.modules_to_save.values()
    ]
    for copy in copies:  # with Accelerate's hook it would get the weights of the original
        remove_hook_from_submodules(copy)
    saved = {parameter for copy in copies for parameter in copy.parameters()}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or parameter.device.type != "meta":
                continue
            if parameter.requires_grad or parameter in saved:
                real = torch.empty_like(parameter, device=device)
                module._parameters[name] = nn.Parameter(real, parameter.requires_grad)
