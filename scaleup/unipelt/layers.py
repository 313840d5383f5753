"""Modules that sit beside a module of the backbone instead of wrapping it.

    AuxiliaryLayer     entries (gates, adapters, prefixes) of one or more PEFT adapters
    SiteLayer          adds the gates of a site; evaluates the gates and all narrow maps that read
                       the same input as one product

The SiteLayer of an attention is in `attention_gates.py`.

In an exported folder, where there is only one set of weights, entries are plain child modules.

Shapes: B examples, T tokens, D hidden size, R columns of a narrow product.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .forward_pass import ForwardPass
from .gate import ConstantGate, GateValue, LearnedGate
from .kernels import (
    Entry,
    Narrow,
    PlainPath,
    Sites,
    StepSite,
    narrow_products,
    parameter,
    require_whole,
)
from .passes import Passes, RunningMean
from .peft_names import BaseTunerLayer


def one_at_a_time(adapter_names: Sequence[str]) -> str:
    """Return why several adapters are not made active together."""
    return (
        f"UniPELT runs one adapter at a time; got {', '.join(adapter_names)}. A PeftModel takes "
        "adapter_names, one for each row of a batch"
    )


class AuxiliaryLayer(nn.Module, BaseTunerLayer):
    """A PEFT tuner layer beside a module. PEFT saves, freezes and switches its entries.

    Args:
        reference_module: the module whose device and dtype new entries take. Beside quantised
            weights entries stay float32.
        passes: the forward passes of the parent model.
    """

    adapter_layer_names: tuple[str, ...] = ()
    # Of BaseTunerLayer; without these lines, type checkers take them for parameters or modules.
    active_adapters: list[str]
    disable_adapters: bool
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(self, reference_module: nn.Module, passes: Passes):
        super().__init__()
        # In tuples, because attributes would register the modules as children.
        self._reference_module, self._passes = (reference_module,), (passes,)
        self.merged_adapters: list[str] = []
        self.handles: list[Any] = []
        # Called as observer(submodule, change_BTD, whole_BTD) while an export measures by how much
        # each submodule changes the value that it is added to.
        self.observer: Callable[[str, torch.Tensor, torch.Tensor], None] | None = None
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ModuleDict())

    @property
    def passes(self) -> Passes:
        """The forward passes of the parent model."""
        return self._passes[0]

    def get_base_layer(self) -> nn.Module:
        """Return the module that PEFT asks for device and dtype."""
        module = self._reference_module[0]
        return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module

    def add(self, adapter_name: str | None, **entries: nn.Module | nn.Parameter) -> None:
        """Add the entries of one adapter; without a name they become plain children."""
        assert entries.keys() == set(self.adapter_layer_names), entries.keys()
        for container, entry in entries.items():
            if adapter_name is None:
                setattr(self, container, entry)
            else:
                getattr(self, container)[adapter_name] = entry
        self.passes.forget_layers()
        if adapter_name is not None:
            self._move_adapter_to_device_of_base_layer(adapter_name)

    def active(self, container: str) -> Any:
        """Return the entry of the active adapter, or None if there is none or it is disabled.

        Raises:
            RuntimeError: if the adapters were switched since the pass began.
        """
        entries = getattr(self, container)
        self.require_adapters(self.passes.current)
        return self.active_entry(entries)

    def require_adapters(self, current: ForwardPass) -> None:
        """Raise RuntimeError if the adapters were switched since the pass began."""
        if isinstance(self._modules.get(self.adapter_layer_names[0]), nn.ModuleDict):
            current.require_adapters(self.disable_adapters, tuple(self.active_adapters))

    def active_entry(self, entries: Any) -> Any:
        """Return the active adapter's entry of a container that belongs to another layer."""
        if not isinstance(entries, nn.ModuleDict):  # an exported folder
            return entries
        if self.disable_adapters:
            return None
        return next((entries[name] for name in self.active_adapters if name in entries), None)

    def active_names(self) -> tuple[str, ...] | None:
        """Return the names of the active adapters, () in an exported folder; None if disabled."""
        if not any(isinstance(module, nn.ModuleDict) for module in self._modules.values()):
            return ()
        return None if self.disable_adapters else tuple(self.active_adapters)

    def path(self, container: str, module: nn.Module | None = None) -> str:
        """Return the path of the active adapter's entry, below this layer or another module."""
        entries = getattr(self if module is None else module, container)
        if not isinstance(entries, nn.ModuleDict):
            return container
        return f"{container}.{next(n for n in self.active_adapters if n in entries)}"

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter the active one.

        Raises:
            ValueError: for several adapters, whose gates would each expect to be alone.
        """
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise ValueError(one_at_a_time(adapter_names))
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Do nothing for constant gates, which are part of what LoRA adds to the weights.

        Raises:
            ValueError: for anything else.
        """
        for name in self.active_adapters if adapter_names is None else adapter_names:
            entries = [getattr(self, container) for container in self.adapter_layer_names]
            if not all(isinstance(e[name], ConstantGate) for e in entries if name in e):
                raise ValueError(
                    f"the adapter {name} cannot be merged exactly; unload() removes it"
                )

    def unmerge(self) -> None:
        assert not self.merged_adapters


class SiteLayer(AuxiliaryLayer):
    """An auxiliary layer with gates that read the input of its site."""

    adapter_layer_names: tuple[str, ...] = ("unipelt_gate",)
    of_encoder = False  # whether the input consists of the encoder's tokens, in a decoder

    def __init__(self, reference_module: nn.Module, passes: Passes):
        super().__init__(reference_module, passes)
        self.running = RunningMean(passes)

    def declare(self) -> Sites:
        """Return the matrices that the fast path needs of the active adapter, if there is one.

        Raises:
            PlainPath: if the layer cannot take it.
        """
        raise NotImplementedError

    def real(self, x_BTD: torch.Tensor) -> torch.Tensor | None:
        """Return the mask [B, T] of an input, None if all of its tokens are real."""
        current = self.passes.current
        return current.encoder_mask_BS if self.of_encoder else current.real(x_BTD.shape[1])

    def learned_gate(self) -> LearnedGate:
        """Return the gate of the active adapter.

        Raises:
            PlainPath: if it is a constant, or if ZeRO-3 shards it.
        """
        gate = self.active_entry(self.unipelt_gate)
        if not isinstance(gate, LearnedGate):
            raise PlainPath("gates are constants")
        require_whole(gate.weight)  # before layers look at the sizes of their weights
        return gate

    def declare_narrow(self, weights: Sequence[Entry], biases: Sequence[Entry | int]) -> Narrow:
        """Return a matrix with the gates behind other rows, and the gates' pooling."""
        gate, path = self.learned_gate(), self.path("unipelt_gate")
        rank = sum(len(parameter(entry)) for entry in weights)
        return Narrow(
            weights=[*weights, (self, f"{path}.weight")],
            biases=[*biases, (self, f"{path}.bias")],
            rank=rank,
            scales=gate.scales,
            masked=gate.pooling != "paper",
            causal=gate.pooling == "causal",
        )

    def sink(self, gate: LearnedGate, current: ForwardPass) -> list[torch.Tensor] | None:
        """Return a list for the gates that the fast path computes, if anything may need them."""
        return None if gate.statistics is None and current.totals is None else []

    def note(self, gate: LearnedGate, current: ForwardPass, gates_BTN: torch.Tensor) -> None:
        """Log gates [B, 1 or T, N] that the fast path computed, and keep their totals."""
        if any(scale != 1 for scale in gate.scales):
            gates_BTN = gates_BTN / gates_BTN.new_tensor(gate.scales)
        if gate.pooling == "causal":
            self.running.keep(gates_BTN)
        if gate.statistics is not None and not current.recomputed:
            gate.statistics.add(gates_BTN, current.real(gates_BTN.shape[1]))

    def step_gates(
        self, step: StepSite, x_BD: torch.Tensor, current: ForwardPass
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the product [B, C] and the gates [B, N] of a single generated token."""
        slot = self.running.slots[step.gates]
        z_BC, current.means[slot], gates_BN = step.evaluate(x_BD, current.means_of_step(), slot)
        return z_BC, gates_BN

    def evaluate(
        self, x_BTD: torch.Tensor, groups: Sequence[Sequence[nn.Linear]], joined: bool = False
    ) -> tuple[dict[str, GateValue], list[torch.Tensor | None]]:
        """Evaluate the gates and the narrow linear maps of one input, the latter without biases.

        Args:
            x_BTD: input of the site.
            groups: linear maps of that input, each with few outputs.
            joined: whether one product for everything is faster than one per group.

        Returns:
            The gates by name, and the products of each group side by side, [B, T, R]. A product is
            None if the caller has to call its maps itself.
        """
        gate = self.active_entry(self.unipelt_gate)
        products: list[torch.Tensor | None] = [None] * len(groups)
        logits = None
        maps = [linear for group in groups for linear in group]
        if maps and isinstance(gate, nn.Linear):
            results: Any = narrow_products(
                x_BTD, *([[*maps, gate]] if joined else [*groups, [gate]])
            )
            if results is not None and joined:
                widths = [sum(linear.out_features for linear in group) for group in groups]
                results = results[0].split_with_sizes([*widths, gate.out_features], dim=-1)
            if results is not None:
                *products, logits = results
        running = None if self.of_encoder else self.running  # all of an encoder's tokens are known
        return gate(x_BTD, self.real(x_BTD), running=running, logits_BTN=logits), products
