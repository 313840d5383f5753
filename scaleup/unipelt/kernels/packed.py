"""The layout of trained weights for the products of the fast path.

At a site everything narrow is one product x [W; W_gates]ᵀ, so the weights of several modules lie in
one matrix. Layers declare what they need as a `Site`; a `Plan` places all matrices of a parent
model in one buffer. `workspace.py` fills such buffers.

Shapes: C = R + N columns of a site's input (R narrow ones, N gates), D its width, V columns of v.
"""

import dataclasses
import operator
import types
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from .target import MOST_COLUMNS

_VERSION, _ADDRESS = operator.attrgetter("_version"), operator.methodcaller("data_ptr")

ALIGNMENT = 8  # values; matrix products are fast for sizes that are multiples of it
Entry = tuple[nn.Module, str]  # a parameter: a module and the path below it, "down.weight"
Tensor = torch.Tensor


class PlainPath(Exception):
    """A layer cannot take the fast path. The text says why, in words for users."""


def aligned(columns: int) -> int:
    """Return the next multiple of ALIGNMENT."""
    return -(-columns // ALIGNMENT) * ALIGNMENT


def state_of(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Return what changes when tensors are changed in place or get other memory (`p.data = …`).

    What is written through `p.data` or by a fused optimizer leaves no trace.
    """
    versioned = [tensor for tensor in tensors if not tensor.is_inference()]
    return sum(map(_VERSION, versioned)), tuple(map(_ADDRESS, tensors))


class Layout(Protocol):
    """Says where parameters lie in a matrix that they do not fill, for n equal matrices at once."""

    def __call__(self, matrices: Tensor, parts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return pairs of equal views: of the matrices [n, rows, columns], of the parts [n, …]."""
        ...


@dataclasses.dataclass(eq=False)
class Narrow:
    """The input side of a site: [W; W_gates], biases and gates. See `narrow_forward`.

    Attributes:
        weights: the rows of the matrix in their order, those of the gates last.
        biases: the biases of the rows; a number leaves out so many rows.
        rank: R.
        scales: constants that multiply the gates.
        masked: whether the gates are means over real tokens only.
    """

    weights: list[Entry]
    biases: list[Entry | int]
    rank: int
    scales: tuple[float, ...]
    masked: bool
    causal: bool
    selected: int = 0
    handed_out: int = 0
    activation: str = "none"
    ones_column: bool = False

    @property
    def columns(self) -> int:
        return self.rank + len(self.scales)


@dataclasses.dataclass(eq=False)
class Wide:
    """The output side of a site, a matrix [rows, columns] that v is multiplied by.

    Attributes:
        weights: the parameter that fills the matrix, or those that `layout` places.
        layout: sites with equal layouts and sizes are copied together.
    """

    weights: Sequence[Entry]
    rows: int
    columns: int
    layout: Layout | None = None


@dataclasses.dataclass(eq=False)
class Site:
    """Everything that one layer wants packed.

    Attributes:
        constants: frozen vectors, which are cast to float32.
        details: what else the layer wants to know when it runs.
    """

    narrow: Narrow | None = None
    wide: Wide | None = None
    constants: Sequence[Entry] = ()
    details: Any = None

    def trained(self) -> list[Entry]:
        """Return the parameters that get gradients here."""
        entries = [] if self.narrow is None else [*self.narrow.weights, *self.narrow.biases]
        entries += [] if self.wide is None else self.wide.weights
        return [entry for entry in entries if not isinstance(entry, int)]


Sites = dict[Any, Site]  # by the object that looks for its matrices in `Workspace.sites`


class Group:
    """The output matrices of several sites with the same sizes and the same layout."""

    def __init__(self, layout: Layout, shapes: list[torch.Size]):
        self.layout, self.shapes = layout, shapes  # of the parts of one site
        self.wides: list[Wide] = []

    def entries(self) -> list[Entry]:
        """Return the first part of every site, then the second of every site, and so on."""
        return [wide.weights[i] for i in range(len(self.shapes)) for wide in self.wides]

    @property
    def part_sizes(self) -> list[int]:
        return [len(self.wides) * shape.numel() for shape in self.shapes]

    def pairs(self, flat: Tensor, parts: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the pairs of views of `layout` for all sites.

        Args:
            flat: the matrices, one behind the other.
            parts: the parameters in the order of `entries`, one behind the other.
        """
        count, wide = len(self.wides), self.wides[0]
        stacked = [
            part.view(count, *shape)
            for part, shape in zip(parts.split_with_sizes(self.part_sizes), self.shapes)
        ]
        return self.layout(flat.view(count, wide.rows, wide.columns), stacked)


def _links(entry: Entry) -> list[tuple[dict[str, Any], str, Any]]:
    """Return (dictionary, key, value) for each step from the module to the parameter.

    Raises:
        PlainPath: if there is none, as where torch computes it from others at each access.
    """
    module, path = entry
    *names, last = path.split(".")
    links: list[tuple[dict[str, Any], str, Any]] = []
    for name in names:
        if name not in module._modules:
            raise PlainPath("trained weights are computed from others")
        links.append((module._modules, name, module._modules[name]))
        module = links[-1][2]
    if last not in module._parameters:
        raise PlainPath("trained weights are computed from others")
    return [*links, (module._parameters, last, module._parameters[last])]


def parameter(entry: Entry) -> Any:
    """Return the parameter of an entry."""
    return _links(entry)[-1][2]


def require_whole(value: Any) -> None:
    """Raise PlainPath for a parameter of which a process holds a share, or nothing in between."""
    if hasattr(value, "ds_id") or not isinstance(nn.functional.linear, types.BuiltinFunctionType):
        raise PlainPath("ZeRO-3 shards the trained weights")


def _require_packable(entry: Entry, first: Any) -> None:
    """Raise PlainPath for a parameter that cannot be packed with `first`."""
    value = parameter(entry)
    require_whole(value)
    if type(value).__name__ not in ("Parameter", "FakeTensor"):
        raise PlainPath(f"trained weights are kept as {type(value).__name__}")
    if value.dtype != first.dtype or value.device != first.device:
        raise PlainPath("trained weights differ in data type or device")
    if not value.is_contiguous():
        raise PlainPath("trained weights are not contiguous in memory")


def collect_sites(layers: Iterable[Any]) -> tuple[Sites, list[str]]:
    """Return what the layers of a model declare, and why others take the plain path.

    Args:
        layers: layers with a method `declare`, which returns `Sites` or raises PlainPath.
    """
    sites: Sites = {}
    reasons: dict[str, None] = {}
    first = None
    for layer in layers:
        try:
            declared: Sites = layer.declare()
            trained = [entry for site in declared.values() for entry in site.trained()]
            for entry in trained:
                first = parameter(entry) if first is None else first
                _require_packable(entry, first)
            if any(s.narrow and s.narrow.rank > MOST_COLUMNS for s in declared.values()):
                raise PlainPath(f"narrow maps of one input have more than {MOST_COLUMNS} columns")
            sites |= declared
        except PlainPath as reason:
            reasons[str(reason)] = None
    return sites, list(reasons)


class Blocks:
    """Parameters that lie one behind the other in a buffer.

    Args:
        entries: the parameters; a number is a gap of so many values.

    Attributes:
        parameters: the parameters.
        size: the number of values with the gaps.
    """

    def __init__(self, entries: Sequence[Entry | int]):
        # Gaps of no size are left out: torch would create a tensor for each of them in every pass.
        present = [entry for entry in entries if entry != 0]
        self._templates: list[Tensor] = [
            torch.empty(e, device="meta") if isinstance(e, int) else parameter(e) for e in present
        ]
        self._kept = [i for i, entry in enumerate(present) if not isinstance(entry, int)]
        self.parameters = [self._templates[i] for i in self._kept]
        self.size = sum(template.numel() for template in self._templates)

    def cut(self, flat: Tensor) -> list[Tensor]:
        """View a buffer as the parameters."""
        if not self._templates:
            return []
        views = torch._C._nn.unflatten_dense_tensors(flat, self._templates)
        return [views[i] for i in self._kept]


class Plan:
    """The layout of all matrices of a parent model for one adapter and one dtype.

    Args:
        sites: the sites by the objects that ask for them. Their trained parameters are contiguous
            and have the same dtype and device.
        dtype: the dtype of the products.
        autocast: whether that is autocast's dtype.

    Attributes:
        dense: the parameters that fill whole rows, in the order of the buffer, and its gaps.
        grouped: the parameters of `groups`, whose matrices lie behind the dense part.
        vectors: the biases, and gaps.
        parameters: all of them without gaps. One that several sites use occurs several times.
        pools: workspaces that no pass needs, by CUDA stream (0 on a CPU).
    """

    def __init__(self, sites: Sites, dtype: torch.dtype, autocast: bool):
        self.sites, self.dtype, self.autocast = sites, dtype, autocast
        dense: list[Entry | int] = []
        vectors: list[Entry | int] = []
        groups: dict[Any, Group] = {}
        for site in sites.values():
            narrow, wide = site.narrow, site.wide
            if narrow is not None:
                width = parameter(narrow.weights[0]).shape[1]
                gap = (aligned(narrow.columns) - narrow.columns) * width
                dense += [*narrow.weights, gap]
                vectors += narrow.biases
            if wide is not None and wide.layout is None:
                size = wide.rows * wide.columns
                dense += [*wide.weights, aligned(size) - size]
            elif wide is not None and wide.layout is not None:
                shapes = [parameter(entry).shape for entry in wide.weights]
                key = (wide.layout, wide.rows, wide.columns, *shapes)
                groups.setdefault(key, Group(wide.layout, shapes)).wides.append(wide)
        self.groups = list(groups.values())
        grouped = [entry for group in self.groups for entry in group.entries()]
        constants = [entry for site in sites.values() for entry in site.constants]
        known = {e for e in (*dense, *grouped, *vectors, *constants) if not isinstance(e, int)}
        links = {(id(link[0]), link[1]): link for entry in known for link in _links(entry)}
        self.links = tuple(zip(*links.values()))  # dictionaries, keys, values
        self.dense, self.grouped, self.vectors, self.constants = (
            Blocks(entries) for entries in (dense, grouped, vectors, constants)
        )
        self.matrix_parameters = [*self.dense.parameters, *self.grouped.parameters]
        self.parameters = [*self.matrix_parameters, *self.vectors.parameters]
        self.device, self.parameter_dtype = self.parameters[0].device, self.parameters[0].dtype
        self.copied = [*self.parameters, *self.constants.parameters]
        self.versioned = [p for p in self.copied if not p.is_inference()]
        self.pools: dict[int, list[Any]] = {}

    def is_current(self) -> bool:
        """Return whether the modules still have the parameters that the plan was made for."""
        containers, names, values = self.links
        # In C, because this is asked for every generated token.
        if not all(map(operator.is_, map(dict.get, containers, names), values)):
            return False
        first = self.parameters[0]
        same = first.device == self.device and first.dtype == self.parameter_dtype
        return same and not hasattr(first, "ds_id")  # DeepSpeed shards parameters in place

    def owners(self) -> list[Any]:
        """Return the site of each of `parameters`, by its key."""
        keys = {site.wide: key for key, site in self.sites.items() if site.wide is not None}
        dense, vectors = [], []
        for key, site in self.sites.items():
            if site.narrow is not None:
                dense += [key] * len(site.narrow.weights)
                vectors += [key for entry in site.narrow.biases if not isinstance(entry, int)]
            if site.wide is not None and site.wide.layout is None:
                dense += [key] * len(site.wide.weights)
        grouped = [
            keys[wide] for group in self.groups for _ in group.shapes for wide in group.wides
        ]
        return [*dense, *grouped, *vectors]

    def state(self) -> tuple[Any, ...]:
        """Return `state_of` of what is copied to workspaces."""
        return sum(map(_VERSION, self.versioned)), tuple(map(_ADDRESS, self.copied))

    def matrices(self, flat: Tensor) -> tuple[dict[Any, Tensor], dict[Any, Tensor]]:
        """View the input and the output matrices in a buffer, by site."""
        inputs: dict[Any, Tensor] = {}
        outputs: dict[Any, Tensor] = {}
        at, places = 0, {}
        for key, site in self.sites.items():
            narrow, wide = site.narrow, site.wide
            if narrow is not None:
                width = parameter(narrow.weights[0]).shape[1]
                size = aligned(narrow.columns) * width
                inputs[key] = flat[at : at + size].view(-1, width)
                at += size
            if wide is not None and wide.layout is None:
                size = wide.rows * wide.columns
                outputs[key] = flat[at : at + size].view(wide.rows, -1)
                at += aligned(size)
            elif wide is not None:
                places[wide] = key
        for group in self.groups:
            for wide in group.wides:
                size = wide.rows * wide.columns
                outputs[places[wide]] = flat[at : at + size].view(wide.rows, -1)
                at += size
        assert at == len(flat)
        return inputs, outputs

    def pairs(self, flat: Tensor, parts: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return equal views of the groups' matrices in a buffer and of their parameters."""
        pairs, at, done = [], self.dense.size, 0
        for group in self.groups:
            size = len(group.wides) * group.wides[0].rows * group.wides[0].columns
            width = sum(group.part_sizes)
            pairs += group.pairs(flat[at : at + size], parts[done : done + width])
            at, done = at + size, done + width
        return pairs

    @property
    def size(self) -> int:
        """The number of values of all matrices."""
        sizes = [len(g.wides) * g.wides[0].rows * g.wides[0].columns for g in self.groups]
        return self.dense.size + sum(sizes)
