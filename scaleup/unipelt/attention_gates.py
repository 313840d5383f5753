"""The gates of an attention, which several submodules share.

    AttentionMember    the part of one submodule at one attention
    AttentionGates     the SiteLayer of an attention; it hands gates and narrow products to members

Shapes: B examples, T tokens, M = B·T, H heads, D hidden size, R columns of a narrow product.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .attention import PrefixSource
from .forward_pass import ForwardPass
from .gate import GateValue, LearnedGate
from .kernels import Entry, PackedSite, PlainPath, Site, Sites, StepSite, narrow_site, parameter
from .layers import SiteLayer
from .passes import Passes
from .site_types import AttentionSite


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
            heads=self.site.heads if others else 0,
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
        z_BC, gates_BN = self.step_gates(step, h_BTD[:, 0], current)
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
