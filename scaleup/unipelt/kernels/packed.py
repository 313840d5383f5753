"""Trained weights in the layout of the fast path's products, and buffers for their gradients.

At a site everything narrow is one product x [W; W_gates]ᵀ, so the weights of several modules lie in
one matrix. They are copied there, and cast, once per forward pass of a parent model. In the
backward pass the gradients of a site are added to a buffer of the same layout, which is copied back
once.

    Narrow, Wide    what a layer declares: its input matrix and its output matrix
    Plan            the layout of all matrices of one parent model
    Workspace       the matrices, and the buffers of their gradients
    Lease           a workspace while one forward pass needs it
    Pack            the autograd node through which gradients reach the parameters

A workspace belongs to one pass at a time. The pass and the autograd nodes of its sites hold the
lease; when the last of them is gone, the workspace returns to the pool of the plan.

The sites do not hand their gradients to autograd. They only depend on the result of `Pack`, the
anchor, so autograd runs `Pack` after all sites that take part in a backward pass. It returns what
they have accumulated and clears the buffers, however often it runs.

Shapes: C = R + N columns of a site's input (R narrow ones, N gates), D its width, V columns of v.
"""

import dataclasses
import types
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from .reference import wide_dtype

ALIGNMENT = 8  # values; matrix products are fast for sizes that are multiples of it
Entry = tuple[nn.Module, str]  # a parameter: a module and the path below it, "down.weight"
Tensor = torch.Tensor


class PlainPath(Exception):
    """A layer cannot take the fast path. The text says why, in words for users."""


def aligned(columns: int) -> int:
    """Return the next multiple of ALIGNMENT."""
    return -(-columns // ALIGNMENT) * ALIGNMENT


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

    weights: list[Entry]
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


Sites = dict[Any, Site]  # by the object that finds its matrices by itself in `Workspace.sites`


class PackedSite:
    """The matrices and buffers of one site in a workspace.

    Attributes:
        number: the index of its biases in the buffer of their gradients.
    """

    __slots__ = (
        *("weight_in", "weight_in_t", "weight_out", "weight_out_t", "grad_in", "grad_out"),
        *("bias", "scales", "constants", "number", "rank", "width", "masked", "causal"),
        *("selected", "handed_out", "activation", "ones_column", "details"),
    )
    weight_in: Tensor  # [C aligned, D]
    weight_in_t: Tensor
    weight_out: Tensor  # [out, V]
    weight_out_t: Tensor
    grad_in: Tensor
    grad_out: Tensor
    bias: Tensor
    scales: Tensor
    constants: Sequence[Tensor]
    number: int
    rank: int
    width: int
    masked: bool
    causal: bool
    selected: int
    handed_out: int
    activation: str
    ones_column: bool

    def __init__(self, site: Site):
        narrow, self.details = site.narrow, site.details
        if narrow is not None:
            self.rank, self.masked, self.causal = narrow.rank, narrow.masked, narrow.causal
            self.selected, self.handed_out = narrow.selected, narrow.handed_out
            self.activation, self.ones_column = narrow.activation, narrow.ones_column
            self.width = aligned(max(narrow.rank + int(narrow.ones_column), 1))


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
    """Return (dictionary, key, value) for each step from the module to the parameter."""
    module, path = entry
    *names, last = path.split(".")
    links: list[tuple[dict[str, Any], str, Any]] = []
    for name in names:
        links.append((module._modules, name, module._modules[name]))
        module = links[-1][2]
    return [*links, (module._parameters, last, module._parameters[last])]


def parameter(entry: Entry) -> Any:
    """Return the parameter of an entry."""
    return _links(entry)[-1][2]


def _require_packable(entry: Entry, first: Any) -> None:
    """Raise PlainPath for a parameter that cannot be packed with `first`."""
    value = parameter(entry)
    if hasattr(value, "ds_id") or not isinstance(nn.functional.linear, types.BuiltinFunctionType):
        raise PlainPath("ZeRO-3 shards the trained weights")
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
            sites |= declared
        except PlainPath as reason:
            reasons[str(reason)] = None
    return sites, list(reasons)


def _templates(entries: Sequence[Entry | int]) -> list[Tensor]:
    """Return the parameters of entries. Gaps become empty tensors of their size."""
    return [torch.empty(e, device="meta") if isinstance(e, int) else parameter(e) for e in entries]


def _cut(flat: Tensor, templates: list[Tensor]) -> list[Tensor]:
    """View consecutive parts of a tensor in the shapes of the templates, without those of gaps."""
    if not templates:
        return []
    views = torch._C._nn.unflatten_dense_tensors(flat, templates)  # type: ignore[attr-defined]
    return [view for view, t in zip(views, templates) if isinstance(t, nn.Parameter)]


def _size(templates: list[Tensor]) -> int:
    return sum(template.numel() for template in templates)


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
        pools: workspaces that no pass needs, by CUDA stream.
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
        self.links = [link for entry in known for link in _links(entry)]
        self.dense, self.grouped, self.vectors, self.constants = (
            _templates(entries) for entries in (dense, grouped, vectors, constants)
        )
        self.dense_size = _size(self.dense)
        every = (*self.dense, *self.grouped, *self.vectors)
        self.parameters = [p for p in every if isinstance(p, nn.Parameter)]
        self.device, self.parameter_dtype = self.parameters[0].device, self.parameters[0].dtype
        self.pools: dict[int, list[Workspace]] = {}

    def is_current(self) -> bool:
        """Return whether the modules still have the parameters that the plan was made for."""
        for container, name, value in self.links:
            if container.get(name) is not value:
                return False
        first = self.parameters[0]
        return first.device == self.device and first.dtype == self.parameter_dtype

    def begin(self) -> "tuple[Lease, Tensor | None]":
        """Copy the weights for a pass that begins.

        Returns:
            The lease, and the anchor if gradients are enabled.
        """
        lease = Lease(self)
        if torch.is_grad_enabled():
            return lease, Pack.apply(lease, *self.parameters)
        lease.workspace.load()
        return lease, None

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
        pairs, at, done = [], self.dense_size, 0
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
        return self.dense_size + sum(sizes)


class Workspace:
    """The matrices of one plan, and the buffers of their gradients."""

    def __init__(self, plan: Plan):
        self.plan = plan
        # Zeros, because nothing is ever written to the gaps.
        self.flat = torch.zeros(plan.size, dtype=plan.dtype, device=plan.device)
        wide: dict[str, Any] = {"dtype": wide_dtype(self.flat), "device": plan.device}
        staging = self.flat.new_empty(_size(plan.grouped))
        vectors = torch.zeros(_size(plan.vectors), **wide)
        constants = torch.empty(_size(plan.constants), **wide)
        self.weights = _cut(self.flat[: plan.dense_size], plan.dense) + _cut(staging, plan.grouped)
        self.biases, self.frozen = _cut(vectors, plan.vectors), _cut(constants, plan.constants)
        self.placed = plan.pairs(self.flat, staging)
        self.sites = {key: PackedSite(site) for key, site in plan.sites.items()}
        self._set_matrices("weight", self.flat)
        self._set_vectors(vectors, wide)
        self.grads: Tensor | None = None
        self.bias_grads: Tensor | None = None
        self.bias_views: tuple[Tensor, ...] = ()
        self.dirty = False  # whether the buffers hold gradients that nobody has fetched
        # A FakeTensor and an inference tensor work only in their modes, and a CUDA graph writes to
        # its memory at any later time.
        self.reusable = (
            type(self.flat) is Tensor
            and not self.flat.is_inference()
            and not (self.flat.is_cuda and torch.cuda.is_current_stream_capturing())
        )

    def _set_matrices(self, kind: str, flat: Tensor) -> None:
        inputs, outputs = self.plan.matrices(flat)
        for side, matrices in (("in", inputs), ("out", outputs)):
            for key, matrix in matrices.items():
                setattr(self.sites[key], f"{kind}_{side}", matrix)
                if kind == "weight":
                    setattr(self.sites[key], f"weight_{side}_t", matrix.t())

    def _set_vectors(self, vectors: Tensor, wide: dict[str, Any]) -> None:
        at, self.bias_widths = 0, [s.narrow.columns for s in self.plan.sites.values() if s.narrow]
        scales: dict[tuple[float, ...], Tensor] = {}
        frozen, number = iter(self.frozen), 0
        for packed, site in zip(self.sites.values(), self.plan.sites.values()):
            packed.constants = [next(frozen) for _ in site.constants]
            if site.narrow is None:
                continue
            packed.bias, packed.number = vectors[at : at + site.narrow.columns], number
            at, number = at + site.narrow.columns, number + 1
            values = site.narrow.scales
            if values not in scales:
                scales[values] = torch.ones(len(values), **wide)
                for i, value in enumerate(values):
                    scales[values][i] = value
            packed.scales = scales[values]

    def load(self) -> None:
        """Copy the parameters to their places."""
        plan = self.plan
        torch._foreach_copy_(self.weights, plan.parameters[: len(self.weights)])
        torch._foreach_copy_(self.biases, plan.parameters[len(self.weights) :])
        if self.frozen:
            torch._foreach_copy_(self.frozen, plan.constants)
        for matrices, parts in self.placed:
            matrices.copy_(parts)

    def prepare_gradients(self) -> None:
        """Make the buffers of the gradients, or clear them if something is left in them."""
        if self.grads is None:
            self.grads = torch.zeros_like(self.flat)
            self._set_matrices("grad", self.grads)
        elif self.dirty:
            self._clear()

    def bias_grad(self, site: PackedSite, batch: int) -> Tensor:
        """Return the buffer [B, C] of the gradients of one site's biases for each example."""
        if self.bias_grads is None or len(self.bias_grads) < batch:
            bigger = site.bias.new_zeros(batch, sum(self.bias_widths))
            if self.bias_grads is not None:
                bigger[: len(self.bias_grads)] = self.bias_grads
            self.bias_grads = bigger
            self.bias_views = bigger.split_with_sizes(self.bias_widths, dim=1)
        view = self.bias_views[site.number]
        return view if len(view) == batch else view[:batch]

    def _clear(self) -> None:
        assert self.grads is not None
        self.grads.zero_()
        if self.bias_grads is not None:
            self.bias_grads.zero_()
        self.dirty = False

    def drain(self) -> list[Tensor]:
        """Return the gradients of `Plan.parameters`, and clear the buffers."""
        plan, grads = self.plan, self.grads
        assert grads is not None
        dtype = plan.parameter_dtype
        # Copies, because the results become the gradients of the parameters.
        results = _cut(grads[: plan.dense_size].to(dtype, copy=True), plan.dense)
        if plan.grouped:
            parts = grads.new_empty(_size(plan.grouped), dtype=dtype)
            for matrices, part in plan.pairs(grads, parts):
                part.copy_(matrices)
            results += _cut(parts, plan.grouped)
        if self.bias_grads is None:
            sums = self.biases[0].new_zeros(_size(plan.vectors))
        else:
            sums = self.bias_grads.sum(dim=0)
        results += _cut(sums.to(dtype), plan.vectors)
        self._clear()
        return results


class Lease:
    """A workspace while one forward pass and its backward passes need it."""

    __slots__ = ("autocast", "device", "dtype", "pool", "sites", "workspace")

    def __init__(self, plan: Plan):
        self.device, self.dtype, self.autocast = plan.device.type, plan.dtype, plan.autocast
        stream, capturing = 0, False
        if plan.device.type == "cuda":
            stream = torch.cuda.current_stream(plan.device).cuda_stream
            capturing = torch.cuda.is_current_stream_capturing()
        self.pool = plan.pools.setdefault(stream, [])
        try:
            self.workspace = Workspace(plan) if capturing else self.pool.pop()
        except IndexError:  # another thread may have taken the last one
            self.workspace = Workspace(plan)
        self.sites: dict[Any, PackedSite] = self.workspace.sites

    def takes(self, x: Tensor) -> bool:
        """Return whether an input can be multiplied by the packed weights now."""
        if torch.is_autocast_enabled(self.device) != self.autocast:
            return False
        return x.dtype is self.dtype or (self.autocast and x.dtype is torch.float32)

    def __del__(self) -> None:
        workspace = getattr(self, "workspace", None)  # missing if memory ran out
        if workspace is not None and workspace.reusable:
            self.pool.append(workspace)


def refuse_double_backward() -> None:
    """Raise RuntimeError in a backward pass that is itself to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the fast path of UniPELT has no second derivatives; set SCALEUP_KERNELS=off to use "
            "create_graph=True"
        )


class Pack(torch.autograd.Function):
    """Copies the weights to a workspace, and the gradients from there to the parameters."""

    @staticmethod
    def forward(ctx: Any, lease: Lease, *parameters: Tensor) -> Tensor:
        """Return the anchor, a scalar without a meaning."""
        ctx.lease = lease
        ctx.set_materialize_grads(False)
        lease.workspace.prepare_gradients()
        lease.workspace.load()
        return parameters[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        grads = ctx.lease.workspace.drain()
        needed = ctx.needs_input_grad[1:]
        if all(needed):
            return (None, *grads)
        return (None, *(g if need else None for g, need in zip(grads, needed)))
