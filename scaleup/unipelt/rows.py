"""Batches in which each row has its own adapter.

    model(**batch, adapter_names=["first", "second", "__base__"])        of a PeftModel
    model.generate(**batch, adapter_names=[...])

The rows of each adapter pass through each parent model by themselves, and the results are joined
in the order of the batch. A row therefore gets the same result as on its own, whatever submodules,
gates and prefix lengths the adapters of other rows have. The rows pass through trained heads in the
same way. What the model computes around its parent models (the loss, the choice of a token) sees
the whole batch.

This is the only file that sets PEFT's private names for the active adapter of a layer, because
`set_adapter` would also freeze the adapters of the other rows.

Shapes: B rows of the batch, which are repeated in beam search.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from .cache_rows import join_caches, select_rows
from .passes import exchange_rows, undivided
from .peft_names import AuxiliaryTrainingWrapper, BaseTunerLayer

BASE = "__base__"  # PEFT's name for the bare backbone


def count_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Return the number of rows of the batch among arguments, or None if none shows it."""
    values = (*args, *kwargs.values())
    # Positions may be the same for all rows, [1, T].
    counts = (v.shape[0] for v in values if isinstance(v, torch.Tensor) and v.dim() > 1)
    return max(counts, default=None)


def require_count(names: Sequence[str], rows: int, repeated: bool = False) -> None:
    """Raise ValueError if a batch has another number of rows than adapter names.

    Args:
        repeated: each row may stand several times.
    """
    if not names or rows % len(names) or (rows != len(names) and not repeated):
        raise ValueError(f"adapter_names has {len(names)} names for a batch of {rows} rows")


@contextlib.contextmanager
def adapters_of_rows(
    model: nn.Module,
    names: Sequence[str],
    is_parent: Callable[[nn.Module], bool],
    repeated: bool = False,
) -> Iterator[None]:
    """Give each row of the batch its adapter while the context is open.

    Args:
        model: the backbone with its adapters.
        names: the adapter of each row.
        is_parent: whether a module is a parent model.
        repeated: generation may repeat each row.
    """
    parents = [module for module in model.modules() if is_parent(module)]
    inside = {id(module) for parent in parents for module in parent.modules()}
    heads = [
        module
        for module in model.modules()
        if isinstance(module, AuxiliaryTrainingWrapper) and id(module) not in inside
    ]
    divided: list[nn.Module] = [*parents, *heads]
    before = [module.__dict__.get("forward") for module in divided]
    outer = exchange_rows(list(names))
    try:
        for module in divided:
            module.forward = _dividing(module, repeated)
        yield
    finally:
        exchange_rows(outer)
        for module, forward in zip(divided, before):
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.forward = forward


def _dividing(module: nn.Module, repeated: bool) -> Callable[..., Any]:
    """Return the forward of a module for rows with different adapters."""
    forward: Any = module.forward
    layers = switchable(module)

    @functools.wraps(forward)  # generation looks at the names of its arguments
    def divide(*args: Any, **kwargs: Any) -> Any:
        if not undivided():  # in another thread
            return forward(*args, **kwargs)
        names = exchange_rows(None)
        assert names is not None
        try:
            rows = count_rows(args, kwargs)
            assert rows is not None
            require_count(names, rows, repeated)
            of_rows = [name for name in names for _ in range(rows // len(names))]
            return _divide(module, forward, layers, of_rows, args, kwargs)
        finally:
            exchange_rows(names)

    return divide


def _divide(
    module: nn.Module,
    forward: Callable[..., Any],
    layers: list[Any],
    of_rows: list[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    values, size = (*args, *kwargs.values()), len(of_rows)
    device = next(v.device for v in values if isinstance(v, torch.Tensor))
    groups = {
        name: torch.tensor([i for i, other in enumerate(of_rows) if other == name], device=device)
        for name in dict.fromkeys(of_rows)
    }
    parts = []
    caches: list[tuple[Cache, list[Cache]]] = [(v, []) for v in values if isinstance(v, Cache)]
    for name, rows in groups.items():
        part_args, part_kwargs = _select((args, kwargs), rows, size)
        with using(layers, name):
            parts.append(_run(module, forward, layers, name, part_args, part_kwargs))
        found = [v for v in (*part_args, *part_kwargs.values()) if isinstance(v, Cache)]
        for (_, of_parts), part in zip(caches, found):
            of_parts.append(part)
    for cache, of_parts in caches:
        join_caches(of_parts, list(groups.values()), into=cache)
    into = caches[0][0] if caches else None
    return _join(parts, list(groups.values()), into)


def _run(
    module: nn.Module,
    forward: Callable[..., Any],
    layers: list[Any],
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call a module for the rows of one adapter, with a forward pass of their own."""
    passes: Any = module._modules.get("unipelt_passes")
    if passes is None:  # a head
        return forward(*args, **kwargs)
    return passes.run(module, forward, args, kwargs, functools.partial(using, layers, name))


def switchable(module: nn.Module) -> list[Any]:
    """Return the layers and heads in a module that have adapters."""
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return [child for child in module.modules() if isinstance(child, kinds)]


@contextlib.contextmanager
def using(layers: Iterable[Any], name: str) -> Iterator[None]:
    """Let layers use one adapter, or none, without changing which parameters are trained."""
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer, active, _ in before:
            layer._active_adapter = active if name == BASE else [name]
            layer._disable_adapters = name == BASE
        yield
    finally:
        for layer, active, disabled in before:
            layer._active_adapter, layer._disable_adapters = active, disabled


def _select(value: Any, rows: torch.Tensor, size: int) -> Any:
    """Return the rows of all tensors [B, …] and caches among nested arguments."""
    if isinstance(value, torch.Tensor):
        # Tensors with one dimension are positions in the cache, which rows share.
        return value[rows] if value.dim() > 1 and value.shape[0] == size else value
    if isinstance(value, Cache):
        return select_rows(value, rows, size)
    if isinstance(value, dict):
        selected = {key: _select(entry, rows, size) for key, entry in value.items()}
        return selected if type(value) is dict else type(value)(selected)
    if isinstance(value, (list, tuple)):
        return type(value)(_select(entry, rows, size) for entry in value)
    return value


def _join(parts: list[Any], groups: list[torch.Tensor], cache: Cache | None) -> Any:
    """Join the outputs of the parts in the order of the batch."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return join_rows(parts, groups)
    if isinstance(first, Cache):
        return join_caches(parts, groups) if cache is None else cache
    if isinstance(first, dict):  # also a ModelOutput
        joined = {key: _join([part[key] for part in parts], groups, cache) for key in first}
        return type(first)(**joined)
    if isinstance(first, (list, tuple)):
        return type(first)(_join(list(entries), groups, cache) for entries in zip(*parts))
    return first


def join_rows(parts: list[torch.Tensor], groups: list[torch.Tensor]) -> torch.Tensor:
    """Put the rows of several tensors in the order of the batch.

    Raises:
        ValueError: the shapes differ, as those of attention weights do if prefix lengths differ.
    """
    per_row = {divmod(len(part), len(rows)) for part, rows in zip(parts, groups) if part.dim()}
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) > 1 or len(per_row) != 1 or any(rest for _, rest in per_row):
        raise ValueError(
            "the adapters of the batch give an output different shapes, "
            f"{', '.join(str(tuple(part.shape)) for part in parts)}; leave output_attentions out, "
            "or call the model once for each adapter"
        )
    # Some outputs hold the tokens of all rows in their first dimension.
    by_row = torch.cat([part.unflatten(0, (len(rows), -1)) for part, rows in zip(parts, groups)])
    return by_row[torch.cat(groups).argsort()].flatten(0, 1)
