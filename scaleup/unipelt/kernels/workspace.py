"""Buffers with packed weights, and with their gradients.

The weights of a parent model are copied to a workspace, and cast, once per forward pass. In the
backward pass the gradients of the sites are added to a buffer of the same layout, which is copied
back once.

    Workspace    the matrices of a plan, and the buffers of their gradients
    Lease        a workspace while one forward pass needs it
    Pack         the autograd node through which gradients reach the parameters

A workspace belongs to one pass at a time. The pass and the autograd nodes of its sites hold the
lease; when the last of them is gone, the workspace returns to the pool of the plan.

The sites do not hand their gradients to autograd. They only depend on the result of `Pack`, the
anchor, so autograd runs `Pack` after all sites that take part in a backward pass. It returns what
they have accumulated and clears the buffers, however often it runs.

Shapes: B examples, C = R + N columns of a site's input (R narrow ones, N gates), D its width, V
columns of v.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .narrow import HandWritten
from .packed import Plan, Site, aligned
from .reference import wide_dtype

Tensor = torch.Tensor


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


class Workspace:
    """The matrices of one plan, and the buffers of their gradients."""

    def __init__(self, plan: Plan):
        self.plan = plan
        # Zeros, because nothing is ever written to the gaps.
        self.flat = torch.zeros(plan.size, dtype=plan.dtype, device=plan.device)
        wide: dict[str, Any] = {"dtype": wide_dtype(self.flat), "device": plan.device}
        staging = self.flat.new_empty(plan.grouped.size)
        vectors = torch.zeros(plan.vectors.size, **wide)
        constants = torch.empty(plan.constants.size, **wide)
        self.weights = plan.dense.cut(self.flat[: plan.dense.size]) + plan.grouped.cut(staging)
        self.biases, self.frozen = plan.vectors.cut(vectors), plan.constants.cut(constants)
        self.placed = plan.pairs(self.flat, staging)
        self.sites = {key: PackedSite(site) for key, site in plan.sites.items()}
        self._set_matrices("weight", self.flat)
        self._set_vectors(vectors, wide)
        self.grads: Tensor | None = None
        self.bias_grads: Tensor | None = None
        self.bias_views: tuple[Tensor, ...] = ()
        self.reached: set[PackedSite] = set()  # whose gradients are in the buffers
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

    def fill(self) -> None:
        """Copy the parameters to their places."""
        plan = self.plan
        torch._foreach_copy_(self.weights, plan.matrix_parameters)
        torch._foreach_copy_(self.biases, plan.vectors.parameters)
        if self.frozen:
            torch._foreach_copy_(self.frozen, plan.constants.parameters)
        for matrices, parts in self.placed:
            matrices.copy_(parts)

    def prepare_gradients(self) -> None:
        """Make the buffers of the gradients, or clear them if something is left in them."""
        if self.grads is None:
            self.grads = torch.zeros_like(self.flat)
            self._set_matrices("grad", self.grads)
        elif self.reached:
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
        self.reached.clear()

    def drain(self) -> list[Tensor | None]:
        """Return the gradients of `Plan.parameters`, and clear the buffers.

        As in autograd, the parameters of sites that no gradient has reached have none: an optimizer
        must leave out layers that a pass has skipped.
        """
        plan, grads = self.plan, self.grads
        assert grads is not None
        dtype = plan.parameter_dtype
        # Copies, because the results become the gradients of the parameters.
        results: list[Tensor | None] = []
        results += plan.dense.cut(grads[: plan.dense.size].to(dtype, copy=True))
        if plan.groups:
            parts = grads.new_empty(plan.grouped.size, dtype=dtype)
            for matrices, part in plan.pairs(grads, parts):
                part.copy_(matrices)
            results += plan.grouped.cut(parts)
        if self.bias_grads is None:
            sums = self.biases[0].new_zeros(plan.vectors.size)
        else:
            sums = self.bias_grads.sum(dim=0)
        results += plan.vectors.cut(sums.to(dtype))
        if len(self.reached) < len(self.sites):
            missing = {key for key, site in self.sites.items() if site not in self.reached}
            owners = plan.owners()
            results = [None if key in missing else g for key, g in zip(owners, results)]
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
            "UniPELT's layers have no second derivatives; leave out create_graph=True"
        )


def begin(plan: Plan) -> tuple[Lease, Tensor | None]:
    """Copy the weights for a pass that begins.

    Returns:
        The lease, and the anchor if gradients are enabled.
    """
    lease = Lease(plan)
    if torch.is_grad_enabled():
        return lease, Pack.run(lease, *plan.parameters)
    lease.workspace.fill()
    return lease, None


class Pack(HandWritten):
    """Copies the weights to a workspace, and the gradients from there to the parameters."""

    @staticmethod
    def forward(ctx: Any, lease: Lease, *parameters: Tensor) -> Tensor:
        """Return the anchor, a scalar without a meaning."""
        ctx.lease = lease
        ctx.set_materialize_grads(False)
        lease.workspace.prepare_gradients()
        lease.workspace.fill()
        return parameters[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        grads = ctx.lease.workspace.drain()
        needed = ctx.needs_input_grad[1:]
        if all(needed):
            return (None, *grads)
        return (None, *(g if need else None for g, need in zip(grads, needed)))
