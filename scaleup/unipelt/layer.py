"""A PEFT tuner layer that sits beside a module, as gates, prefixes and adapters do, instead of wrapping one."""

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


class AuxiliaryLayer(nn.Module, BaseTunerLayer):
    """Entries by PEFT adapter name in the ModuleDicts of `adapter_layer_names`. PEFT saves, freezes and switches them.

    `neighbour`: the module whose device and type new entries take; beside quantised weights they stay float32.
    """

    def __init__(self, neighbour: nn.Module):
        super().__init__()
        self._neighbour = (neighbour,)  # in a tuple: a plain attribute would make it a submodule
        self.merged_adapters = []
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ModuleDict())

    def get_base_layer(self) -> nn.Module:
        """What PEFT asks for device and type."""
        neighbour = self._neighbour[0]
        return neighbour.get_base_layer() if isinstance(neighbour, BaseTunerLayer) else neighbour

    def add(self, name: str, **entries: nn.Module) -> None:
        """One module per ModuleDict for the adapter `name`."""
        assert entries.keys() == set(self.adapter_layer_names), entries.keys()
        for container, entry in entries.items():
            self.get_submodule(container)[name] = entry
        self._move_adapter_to_device_of_base_layer(name)

    def active(self, container: nn.ModuleDict) -> nn.Module | None:
        """The entry of the active adapter; None if adapters are disabled or it has no entry here."""
        if self.disable_adapters:
            return None
        return next((container[name] for name in self.active_adapters if name in container), None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always raises ValueError: gates depend on the input, the prefix changes the softmax, the adapter is nonlinear."""
        raise ValueError(
            "UniPELT cannot be merged into the weights exactly; keep the adapter, or unload() it"
        )

    def unmerge(self) -> None:
        assert not self.merged_adapters
