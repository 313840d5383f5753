"""Modules that sit beside a module of the backbone instead of wrapping it.

    AuxiliaryLayer     entries (gates, adapters, prefixes) of one or more PEFT adapters
    SiteLayer          adds the gates of a site; evaluates the gates and all narrow maps that read
                       the same input as one product
    AttentionGates     the SiteLayer of an attention, whose gates several submodules share

In an exported folder, where there is only one set of weights, entries are plain child modules.

Shapes: B examples, T tokens, D hidden size, R columns of a narrow product.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .attention import PrefixSource
from .gate import GateValue, LearnedGate
from .kernels import (
    Entry,
    Narrow,
    PackedSite,
    PlainPath,
    Site,
    Sites,
    StepSite,
    narrow_products,
    narrow_site,
    parameter,
)
from .passes import ForwardPass, Passes, RunningMean
from .peft_names import BaseTunerLayer
from .site_types import AttentionSite


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

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise ValueError: a gated submodule cannot be merged into weights."""
        raise ValueError(
            "UniPELT cannot be merged into the weights exactly; keep the adapter, or unload() it"
        )

    def unmerge(self) -> None:
        assert not self.merged_adapters


class SiteLayer(AuxiliaryLayer):
    """An auxiliary layer with gates that read the input of its site."""

    adapter_layer_names: tuple[str, ...] = ("unipelt_gate",)

    def __init__(self, reference_module: nn.Module, passes: Passes):
        super().__init__(reference_module, passes)
        self.running = RunningMean(passes)

    def declare(self) -> Sites:
        """Return the matrices that the fast path needs of the active adapter, if there is one.

        Raises:
            PlainPath: if the layer cannot take it.
        """
        raise NotImplementedError

    def learned_gate(self) -> LearnedGate:
        """Return the gate of the active adapter.

        Raises:
            PlainPath: if it is a constant.
        """
        gate = self.active_entry(self.unipelt_gate)
        if not isinstance(gate, LearnedGate):
            raise PlainPath("gates are constants")
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

    def step_gates(self, step: StepSite, x_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the product [B, C] and the gates [B, N] of a single generated token."""
        current = self.passes.current
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
        mask_BT = self.passes.current.real(x_BTD.shape[1])
        return gate(x_BTD, mask_BT, running=self.running, logits_BTN=logits), products


class AttentionMember:
    """The part of one submodule at one attention."""

    layer: "AttentionGates"

    @property
    def call(self) -> Any:
        """What `begin` returned for the running call of the attention, None if it did not run."""
        return self.layer.passes.current.calls.get(self)

    def maps(self) -> list[nn.Linear]:
        """Return the linear maps of the attention's input to evaluate together with the gates.

        The list is empty if there are none, or if the member must evaluate them itself this time.
        """
        return []

    def narrow(self) -> list[Entry]:
        """Return the weights of its maps for the fast path, empty if it has none.

        Raises:
            PlainPath: if it cannot take the fast path.
        """
        raise PlainPath(f"{type(self).__name__} has no fast path")

    def declare(self) -> Sites:
        """Return the other matrices that it needs there."""
        return {}

    def begin(self, attention: nn.Module, kwargs: dict[str, Any], inputs: "AttentionInputs") -> Any:
        """Take its gate when the attention is called, and return the state of that call."""
        raise NotImplementedError

    def end(self, call: Any, output: Any) -> Any:
        """Finish the call of the attention.

        Args:
            call: what `begin` returned.
            output: the attention's output, None if the attention raised an exception.

        Returns:
            The output that replaces it, or None.
        """
        return None


@dataclasses.dataclass(slots=True)
class AttentionInputs:
    """What a member gets when its attention is called.

    Attributes:
        h_BTD: input of the attention.
        gate: the member's gate.
        product_BTR: its `maps` of the input side by side, None if it has to evaluate them itself.
        gated: on the fast path, the gated product [M, R] of each of its maps (M = B·T). A member
            without maps gets its gate instead, as an expanded view [B, H, T] in float32. None on
            the plain path.
    """

    h_BTD: torch.Tensor
    gate: GateValue | None
    product_BTR: torch.Tensor | None
    gated: Sequence[torch.Tensor] | None = None


@dataclasses.dataclass(slots=True)
class FastAttention:
    """What the fast path of one attention needs besides the matrices.

    Attributes:
        reader: the member with maps, and their numbers of outputs.
        other: the member that gets its gate, and the number of query heads, 0 without such a one.
    """

    gate: LearnedGate
    reader: AttentionMember | None
    ranks: list[int]
    other: AttentionMember | None
    heads: int


class AttentionGates(SiteLayer):
    """The child of an attention that evaluates its gates and hands them to the submodules there."""

    def __init__(self, reference_module: nn.Module, site: AttentionSite, passes: Passes):
        super().__init__(reference_module, passes)
        self.site = site
        self.members: dict[str, AttentionMember] = {}  # by the name of the submodule
        self.prefix_source: PrefixSource | None = None

    @property
    def heads(self) -> int:
        """The number of query heads, 0 if no prefix can take part in the softmax."""
        if self.site.layout is not None:
            return self.site.layout.heads
        query: Any = self.get_base_layer()
        return query.out_features // self.site.head_size if self.site.takes_prefix else 0

    def declare(self) -> Sites:
        if self.active_entry(self.unipelt_gate) is None:
            return {}
        names = [name for name in self.learned_gate().names if name in self.members]
        maps = {name: self.members[name].narrow() for name in names}
        readers = [name for name, weights in maps.items() if weights]
        others = [name for name, weights in maps.items() if not weights]
        if len(readers) > 1 or len(others) > 1:
            raise PlainPath("several submodules of one attention need the same products")
        weights = maps[readers[0]] if readers else []
        narrow = self.declare_narrow(weights, [sum(len(parameter(w)) for w in weights)])
        gates = self.learned_gate().names
        narrow.selected = gates.index(readers[0]) if readers else 0
        narrow.handed_out = gates.index(others[0]) if others else 0
        ranks = [len(parameter(weight)) for weight in weights]
        fast = FastAttention(
            gate=self.learned_gate(),
            reader=self.members[readers[0]] if readers else None,
            ranks=ranks,
            other=self.members[others[0]] if others else None,
            heads=self.heads if others else 0,
        )
        sites: Sites = {self: Site(narrow, details=fast)}
        for name in names:
            sites |= self.members[name].declare()
        return sites

    def before_attention(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Evaluate the gates. This is a forward pre-hook of the attention."""
        h_BTD = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        current = self.passes.current
        step = current.step(self, h_BTD)
        if step is not None:
            self._begin_step(attention, kwargs, h_BTD, current, step)
            return
        packed = current.packed(self, h_BTD)
        if packed is not None:
            self._begin_fast(attention, kwargs, h_BTD, current, packed)
            return
        gate = self.active("unipelt_gate")
        if gate is None:
            return
        names = [name for name in gate.names if name in self.members]
        groups = [self.members[name].maps() for name in names]
        gates, products = self.evaluate(h_BTD, groups, joined=True)
        calls = self.passes.current.calls
        for name, group, product in zip(names, groups, products):
            inputs = AttentionInputs(h_BTD, gates[name], product if group else None)
            member = self.members[name]
            calls[member] = member.begin(attention, kwargs, inputs)

    def _begin_fast(
        self,
        attention: nn.Module,
        kwargs: dict[str, Any],
        h_BTD: torch.Tensor,
        current: ForwardPass,
        packed: PackedSite,
    ) -> None:
        """Evaluate gates and gated narrow products by the fast path."""
        self.require_adapters(current)
        fast: FastAttention = packed.details
        mask_BT, sink = current.real(h_BTD.shape[1]), self.sink(fast.gate, current)
        anchor, lease = current.anchor, current.lease
        assert lease is not None
        results = narrow_site(h_BTD, anchor, lease, packed, mask_BT, fast.heads, fast.ranks, sink)
        if sink is not None:
            self.note(fast.gate, current, *sink)
        if fast.other is not None:
            inputs = AttentionInputs(h_BTD, results[0], None, ())
            current.calls[fast.other] = fast.other.begin(attention, kwargs, inputs)
            results = results[1:]
        if fast.reader is not None:
            inputs = AttentionInputs(h_BTD, None, None, results)
            current.calls[fast.reader] = fast.reader.begin(attention, kwargs, inputs)

    def _begin_step(
        self,
        attention: nn.Module,
        kwargs: dict[str, Any],
        h_BTD: torch.Tensor,
        current: ForwardPass,
        step: StepSite,
    ) -> None:
        """Evaluate gates and gated narrow products of a single generated token."""
        fast: FastAttention = step.details
        z_BC, gates_BN = self.step_gates(step, h_BTD[:, 0])
        if fast.other is not None:
            gate_B11 = gates_BN[:, step.handed_out].unsqueeze(1)
            inputs = AttentionInputs(h_BTD, gate_B11, None, ())
            current.calls[fast.other] = fast.other.begin(attention, kwargs, inputs)
        if fast.reader is not None:
            gated = step.gated(z_BC, gates_BN).split_with_sizes(fast.ranks, dim=1)
            inputs = AttentionInputs(h_BTD, None, None, gated)
            current.calls[fast.reader] = fast.reader.begin(attention, kwargs, inputs)

    def after_attention(
        self, attention: nn.Module, args: tuple[Any, ...], output: object
    ) -> object:
        """Finish the call. This is a forward hook of the attention, also after an exception."""
        current, replaced = self.passes.find(), None
        calls = {} if current is None else current.calls
        for member in self.members.values():
            call = calls.pop(member, None)
            if call is not None:
                result = member.end(call, output if replaced is None else replaced)
                replaced = result if result is not None else replaced
        return replaced
