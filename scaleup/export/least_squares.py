"""Fit the updates of a student to the outputs of the trained model's layers.

Every block of the student gets the arguments that it has in the trained model. Layers that read the
same input are fitted together, in the order in which they run, each to the difference that remains
in its output. The last layer of a block's feed-forward sublayer absorbs the adapter and everything
else that still differs in the block's output.

Shapes: B examples, T tokens, N real tokens, D width.
"""

import dataclasses
import functools
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from scaleup.export.low_rank import Regression, Student, sizes
from scaleup.unipelt.layers import SiteLayer
from scaleup.unipelt.site_types import BlockSite
from scaleup.unipelt.sites import find_sites, linear_layers

# Memory for the sums of one pass over the data. What does not fit takes further passes.
SUMS_BYTES = 4 * 2**30
CACHE = "past_key_values"  # argument of a block
CHECKED = 8  # number of batches on which the remaining error is measured


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of texts.

    Attributes:
        inputs: arguments of the model.
        mask_BT, decoder_mask_BT: which tokens are real; None if all are.
    """

    inputs: dict[str, Any]
    mask_BT: torch.Tensor | None
    decoder_mask_BT: torch.Tensor | None = None

    def real(self, x: torch.Tensor, decoder: bool) -> torch.Tensor:
        """Return the rows [N, D] of real tokens of a tensor [B, T, D] or [B·T, D]."""
        masks = [self.mask_BT, self.decoder_mask_BT]
        for mask_BT in reversed(masks) if decoder else masks:
            if mask_BT is not None and x.shape[:-1] in (mask_BT.shape, (mask_BT.numel(),)):
                return x.flatten(0, -2)[mask_BT.flatten()]
        return x.flatten(0, -2)


@dataclasses.dataclass
class _Ending:
    """The call of a block's last layer in the student.

    Attributes:
        gain: factor by which a norm between that layer and the residual stream scales each value.
    """

    input: torch.Tensor
    output: torch.Tensor
    gain: torch.Tensor | None = None


class _Block:
    """Compares a block of the student with that of the trained model."""

    def __init__(self, forcing: "Forcing", site: BlockSite, linears: Sequence[str]):
        self.forcing, self.site = forcing, site
        self.ending: _Ending | None = None
        ends = site.feed_forward or (None, None)
        self.last = ends[1] if ends[1] in linears else None
        base = forcing.student.model.get_base_model()
        block = base.get_submodule(site.name)
        forcing.hook(block.register_forward_pre_hook, self._replace, with_kwargs=True, prepend=True)
        if site.norm is None:
            forcing.hook(block.register_forward_hook, self._after_block)
        else:
            norm = base.get_submodule(site.norm)
            forcing.hook(norm.register_forward_pre_hook, self._before_norm)
            if isinstance(norm, SiteLayer):  # the adapter changes what its second norm reads
                norm.observer = self._observe
                forcing.observed.append(norm)
        inner = [m for m in block.modules() if "Norm" in type(m).__name__] if self.last else []
        for module in inner:
            forcing.hook(module.register_forward_hook, self._after_norm)
        for name in linears:
            hook = functools.partial(self._after_linear, name)
            forcing.hook(base.get_submodule(name).register_forward_hook, hook)

    def _replace(self, block: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self.forcing.teaching:
            return self.forcing.wanted(self.site.name)
        # The student would find the trained model's keys and values in a cache.
        kwargs = {name: None if name == CACHE else value for name, value in kwargs.items()}
        self.forcing.teach(self.site.name, (args, kwargs))
        return args, kwargs

    def _after_linear(self, name: str, layer: nn.Module, args: Any, output: torch.Tensor) -> None:
        forcing = self.forcing
        if forcing.order is not None:
            forcing.order.append((name, args[0]))
        if name not in forcing.regressions:
            return
        if name == self.last:
            if not forcing.teaching:
                self.ending = _Ending(args[0], output)
        elif forcing.teaching:
            forcing.teach(name, output)
        else:
            forcing.add(name, args[0], forcing.wanted(name) - output, self.site.causal)

    def _after_norm(self, norm: nn.Module, args: Any, output: torch.Tensor) -> None:
        if not self.forcing.teaching and self.ending is not None and args[0] is self.ending.output:
            self.ending.gain = output / args[0]

    def _observe(self, submodule: str, change_BTD: torch.Tensor, whole_BTD: torch.Tensor) -> None:
        if self.forcing.teaching:
            self.forcing.taught[self.site.name, "end"][-1] = whole_BTD + change_BTD

    def _before_norm(self, norm: nn.Module, args: Any) -> None:
        self._end(args[0])

    def _after_block(self, block: nn.Module, args: Any, output: Any) -> None:
        self._end(output[0] if isinstance(output, tuple) else output)

    def _end(self, value_BTD: torch.Tensor) -> None:
        forcing, key = self.forcing, (self.site.name, "end")
        if forcing.teaching:
            forcing.teach(key, value_BTD)
            return
        missing_BTD = forcing.wanted(key) - value_BTD
        rows_ND = forcing.batch.real(missing_BTD, self.site.causal)
        forcing.errors[self.site.name] += rows_ND.float().square().sum().item()
        ending, self.ending = self.ending, None
        if self.last is not None and ending is not None:
            if ending.gain is not None:
                missing_BTD = (missing_BTD / ending.gain).nan_to_num(0.0, 0.0, 0.0)
            forcing.add(self.last, ending.input, missing_BTD, self.site.causal)


class Forcing:
    """Runs the trained model and then the student on a batch, block by block on the same inputs.

    Attributes:
        regressions: the layers to fit in this pass over the data.
        errors: squared error of each block's output in this pass.
        order: layers and their inputs in the order of their calls, while a list.
    """

    def __init__(self, student: Student, blocks: dict[str, list[str]], sites: list[BlockSite]):
        self.student, self.teaching = student, True
        self.taught: dict[Any, deque[Any]] = defaultdict(deque)
        self.regressions: dict[str, Regression] = {}
        self.errors: dict[str, float] = defaultdict(float)
        self.order: list[tuple[str, torch.Tensor]] | None = None
        self.handles: list[Any] = []
        self.observed: list[SiteLayer] = []
        for site in sites:
            _Block(self, site, blocks[site.name])

    def hook(self, register: Any, method: Any, **options: Any) -> None:
        self.handles.append(register(method, **options))

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self.handles:
            handle.remove()
        for layer in self.observed:
            layer.observer = None

    def teach(self, key: Any, value: Any) -> None:
        """Keep a value of the trained model for the student's pass."""
        self.taught[key].append(value)

    def wanted(self, key: Any) -> Any:
        """Return the next value of the trained model."""
        return self.taught[key].popleft()

    def add(self, name: str, x: torch.Tensor, y: torch.Tensor, decoder: bool) -> None:
        """Add the tokens of a call to the sums of a layer."""
        self.regressions[name].add(self.batch.real(x, decoder), self.batch.real(y, decoder))

    def run(self, batch: Batch) -> None:
        """Run both models on a batch."""
        self.batch, self.teaching = batch, True
        with torch.no_grad():
            self.student.model(**batch.inputs)
            self.teaching = False
            with self.student.active() as model:
                model(**batch.inputs)
        assert not any(self.taught.values()), "a block ran more often in the trained model"

    def groups(self, batch: Batch, blocks: dict[str, list[str]]) -> Iterator[list[str]]:
        """Yield the layers of each pass over the data.

        Layers of one block that read the same tensor go together, and so do those at the same
        place of different blocks.
        """
        self.order = []
        with torch.no_grad():
            self.student.model(**batch.inputs)
        order, self.order = self.order, None
        self.taught.clear()
        places: list[list[str]] = []
        for names in blocks.values():
            calls = [(name, x) for name, x in order if name in names]
            place = -1
            for i, (name, x) in enumerate(calls):
                if i == 0 or x is not calls[i - 1][1]:
                    place += 1
                if place == len(places):
                    places.append([])
                if not any(name in group for group in places):  # shared layers run many times
                    places[place].append(name)
        yield from places


def _affordable(names: list[str], base: nn.Module) -> Iterator[list[str]]:
    """Divide layers among passes so that the sums of each fit into memory."""
    chunk: list[str] = []
    used = 0
    for name in names:
        inputs, outputs = sizes(base.get_submodule(name))
        needed = 4 * inputs * (inputs + outputs)
        if chunk and used + needed > SUMS_BYTES:
            yield chunk
            chunk, used = [], 0
        chunk.append(name)
        used += needed
    if chunk:
        yield chunk


def fit(
    student: Student, batches: list[Batch], rank: int, device: torch.device
) -> dict[str, float]:
    """Fit all updates of a student.

    Returns:
        The share of the squared change of each block's output that is left.
    """
    base: Any = student.model.get_base_model()
    sites = find_sites(base)[1]
    blocks = linear_layers(base)
    forcing = Forcing(student, blocks, sites)
    # The layers before the last one of a feed-forward sublayer have nothing of their own to learn.
    idle = {name for site in sites for name in _inner(site, blocks[site.name])}
    before: dict[str, float] = {}
    for group in list(forcing.groups(batches[0], blocks)):
        for names in _affordable([name for name in group if name not in idle], base):
            layers = {name: sizes(base.get_submodule(name)) for name in names}
            forcing.regressions = {n: Regression.zeros(*s, device) for n, s in layers.items()}
            forcing.errors.clear()
            for number, batch in enumerate(batches, 1):
                forcing.run(batch)
                if not before and number == min(CHECKED, len(batches)):
                    before = dict(forcing.errors)
            for name in names:
                student.updates[name].set(*forcing.regressions.pop(name).solve(rank))
    forcing.errors.clear()
    for batch in batches[:CHECKED]:
        forcing.run(batch)
    forcing.remove()
    return {name: forcing.errors[name] / max(error, 1e-12) for name, error in before.items()}


def _inner(site: BlockSite, linears: list[str]) -> list[str]:
    """Return the layers between the beginning of the feed-forward sublayer and its last layer."""
    first, last = site.feed_forward or ("", "")
    if first not in linears or last not in linears:
        return []
    return linears[linears.index(first) : linears.index(last)]
