"""The state of forward passes. It belongs to a pass, never to a module.

A model may run several forward passes before one backward pass, and several threads may run one
model at the same time. Hooks therefore keep nothing on the modules that they watch.

    Passes         the child of a parent model that begins and ends the model's forward passes;
                   `Passes.current` returns the running ForwardPass

Each thread has its own running passes. Gradient checkpointing recomputes blocks in the backward
pass, when the forward pass of their model is over. The function that transformers calls for it is
therefore wrapped, so that a recomputed block finds the pass to which it belongs.

This is the only file that uses transformers' private name of that function.

Shapes: B examples, T tokens of the pass, S encoder tokens, N gates in one projection.
"""

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .forward_pass import ForwardPass
from .kernels import Decoding, Plan, begin, collect_sites, fast_path, mode
from .pooling import find_cache, kept_beside, mean_within, running_totals, text_starts, totals_layer
from .site_types import TOKEN_ARGUMENTS

# The dictionary of passes is replaced, never changed. No subclass of threading.local: torch.compile
# loses what is assigned to its attributes.
_thread = threading.local()
_thread.passes = {}  # now, because a compiler would start again when it appears
_thread.rows = None  # the adapters of rows that are to be divided, see `rows.py`


def _running() -> "dict[Passes, ForwardPass]":
    """Return the passes that run in this thread."""
    passes: dict[Passes, ForwardPass] = getattr(_thread, "passes", {})
    return passes


def undivided() -> bool:
    """Return whether the call that runs is for rows with different adapters."""
    return getattr(_thread, "rows", None) is not None


def exchange_rows(names: list[str] | None) -> list[str] | None:
    """Set the adapters of the rows of this thread's calls, and return those set before."""
    before: list[str] | None = getattr(_thread, "rows", None)
    _thread.rows = names
    return before


class Passes(nn.Module):
    """The forward passes of one parent model, which is called with padding masks.

    It is a child of that model. An encoder has its own, because `generate` calls it directly.

    Args:
        positions: position of each argument of the model's `forward` that is read here, for callers
            that pass it by position. None if no layer needs the masks.

    Attributes:
        slots: index of a site's first gate among the totals in the cache → number of its gates.
        kv_layers: number of attentions that keep keys and values.
        trained: number of passes with gradients, after which an optimizer may change weights.
    """

    def __init__(self, positions: dict[str, int] | None):
        super().__init__()
        self.positions = positions
        self.handles: list[Any] = []
        self.slots: dict[int, int] = {}
        self.kv_layers = self.trained = 0
        self._checkpointing: list[Any] | None = None  # modules that can be recomputed
        self.forget_layers()

    def forget_layers(self) -> None:
        """Find the layers and their packed weights anew at the next pass."""
        self._layers: list[Any] | None = None  # those that can take the fast path
        self._plans: dict[Any, Plan | None] = {}

    def new_slot(self, width: int) -> int:
        """Reserve a place among the totals for the gates of one site, and return its index."""
        slot = sum(self.slots.values())
        self.slots[slot] = width
        return slot

    def find(self) -> ForwardPass | None:
        """Return the pass that runs in this thread, None if there is none."""
        return _running().get(self)

    @property
    def current(self) -> ForwardPass:
        """The pass that runs in this thread.

        Raises:
            RuntimeError: if there is none.
        """
        running = self.find()
        if running is None:
            raise RuntimeError(
                "a layer with UniPELT was called outside of a forward pass of its model, where its "
                "padding mask is not known; call the whole model, and switch gradient checkpointing"
                " on with model.gradient_checkpointing_enable()"
            )
        return running

    def begin(self, parent: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a pass and read its masks. This is a forward pre-hook of the parent model.

        Raises:
            ValueError: for a mask that does not tell which tokens are real.
        """
        if undivided():
            return
        if "adapter_names" in kwargs:
            raise ValueError(
                "adapter_names is an argument of PeftModel; load the adapters with "
                "PeftModel.from_pretrained and load_adapter"
            )
        new = ForwardPass(outer=self.find())
        if self.positions is not None:
            new.mask_BT = self._padding("attention_mask", args, kwargs)
            new.encoder_mask_BS = self._padding("encoder_attention_mask", args, kwargs)
            tokens = (self._argument(name, args, kwargs) for name in TOKEN_ARGUMENTS)
            new.examples = next((len(given) for given in tokens if given is not None), None)
            positions_BT = self._argument("position_ids", args, kwargs)
            if positions_BT is not None and new.mask_BT is None and positions_BT.shape[1] > 1:
                new.starts_BT = text_starts(positions_BT)
        self._wrap_checkpointing(parent)
        if not torch.compiler.is_compiling():
            self.trained += torch.is_grad_enabled()
            if new.starts_BT is None:
                self._pack(parent, new, (*kwargs.values(), *args))
        _thread.passes = {**_running(), self: new}

    def end(self, parent: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """End the pass. This is a forward hook of the parent model, also after an exception."""
        ended = None if undivided() else self.find()
        if ended is None:
            return
        remaining = {key: value for key, value in _running().items() if key is not self}
        _thread.passes = remaining if ended.outer is None else {**remaining, self: ended.outer}
        if output is not None:
            ended.store(self.slots)
        ended.clear()

    def run(
        self,
        parent: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        switch: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> Any:
        """Call the forward of the parent model in a pass, as its hooks do when it is called.

        Args:
            parent: the parent model.
            forward: its forward.
            args, kwargs: the arguments.
            switch: see ForwardPass.
        """
        output = None
        self.begin(parent, args, kwargs)
        self.current.switch = switch
        try:
            for child in parent.children():
                evaluate_prefixes: Any = getattr(child, "before_forward", None)
                if evaluate_prefixes is not None:
                    evaluate_prefixes(parent, args, kwargs)
            self.current.entered = True
            output = forward(*args, **kwargs)
        finally:
            self.end(parent, args, output)
        return output

    def note_cache(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the KV cache, to which the layer with the totals is added.

        This is a forward pre-hook of the first block, because models may create the cache.
        """
        current, cache = self.current, find_cache((*kwargs.values(), *args))
        if cache is None or current.recomputed:
            return
        # A copy: after a crop, sliding layers count in a tensor that they change in place.
        current.past, current.starts_BT = cache.get_seq_length() + 0, None
        current.totals = totals_layer(cache, self.kv_layers, create=bool(self.slots))
        current.cached = None if current.totals is None else current.totals.last()

    def _pack(self, parent: nn.Module, new: ForwardPass, inputs: tuple[Any, ...]) -> None:
        """Pack the weights for a pass of the fast path."""
        if self._layers is None:
            own = (m for m in parent.modules() if getattr(m, "passes", None) is self)
            self._layers = [layer for layer in own if hasattr(layer, "declare")]
        layers = self._layers
        first = next((p for layer in layers for p in layer.parameters()), None)
        if first is None or mode() == "off":
            return
        names = layers[0].active_names()
        if names is None or any(layer.observer is not None for layer in layers):
            return
        device = first.device.type
        if device == "meta":  # the weights wait elsewhere, and Accelerate brings them to each call
            return
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else first.dtype
        key = names, dtype, autocast
        cache = None if torch.is_grad_enabled() else find_cache(inputs)
        past = 0 if cache is None else cache.get_seq_length()
        if isinstance(past, torch.Tensor):  # of a static cache
            return
        if past:
            kept = kept_beside(cache)
            assert kept is not None
            trained, decoding = kept.get((self, *key), (None, None))
            if trained != self.trained or (decoding is not None and not decoding.is_current()):
                plan = self._plan(layers, key)
                decoding = None if plan is None else Decoding(plan)
                kept[self, *key] = self.trained, decoding
            new.decoding = decoding
            new.lease = None if new.decoding is None else new.decoding.lease
        elif fast_path(first):
            plan = self._plan(layers, key)
            if plan is not None:
                new.lease, new.anchor = begin(plan)

    def _plan(self, layers: list[Any], key: tuple[Any, torch.dtype, bool]) -> Plan | None:
        """Return the layout of the weights for adapters, dtype and autocast; None without one."""
        plan = self._plans.get(key)
        if key not in self._plans or (plan is not None and not plan.is_current()):
            sites = collect_sites(layers)[0]
            plan = self._plans[key] = Plan(sites, *key[1:]) if sites else None
        return plan

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self.positions is not None
        position = self.positions.get(name, len(args))
        return kwargs.get(name, args[position] if position < len(args) else None)

    def _padding(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        """Return a padding mask [B, T].

        Generation with a static cache passes masks per query and key [B, 1, T, K], one for each
        kind of layer. There, queries that see no key are padding.
        """
        mask = self._argument(name, args, kwargs)
        if isinstance(mask, dict):
            mask = next((entry for entry in mask.values() if entry is not None), None)
        if mask is None or mask.dim() == 2:
            return mask
        if mask.dim() != 4 or mask.shape[1] != 1 or not self.kv_layers:
            raise ValueError(
                f"{name} has the shape {tuple(mask.shape)}; UniPELT's gates need the padding mask "
                "of shape [batch, tokens]"
            )
        return (mask if mask.dtype == torch.bool else mask == 0)[:, 0].any(dim=-1)

    def _wrap_checkpointing(self, parent: nn.Module) -> None:
        """Let blocks that checkpointing recomputes find their pass.

        This is done at every pass, because users may switch checkpointing on at any time.
        """
        if self._checkpointing is None:
            modules = parent.modules()
            self._checkpointing = [m for m in modules if hasattr(m, "gradient_checkpointing")]
        for module in self._checkpointing:
            if module.gradient_checkpointing:
                function = module._gradient_checkpointing_func
                if getattr(function, "func", None) is not _checkpoint_in_pass:
                    wrapped = functools.partial(_checkpoint_in_pass, function)
                    module._gradient_checkpointing_func = wrapped

    def __getstate__(self) -> dict[str, Any]:
        # A copy of one layer would otherwise contain copies of all blocks.
        return self.__dict__ | {"_checkpointing": None, "_layers": None, "_plans": {}}


def unwrap_checkpointing(model: nn.Module) -> None:
    """Give blocks back the checkpointing functions that they had before their first pass."""
    for module in model.modules():
        function: Any = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(function, "func", None) is _checkpoint_in_pass:
            module._gradient_checkpointing_func = function.args[0]


def _checkpoint_in_pass(checkpoint: Callable[..., Any], function: Any, *args: Any) -> Any:
    """Call a checkpointing function so that it recomputes `function` in the running passes."""
    return checkpoint(functools.partial(_run_in, _running(), function), *args)


def _run_in(passes: dict[Passes, ForwardPass], function: Callable[..., Any], *args: Any) -> Any:
    before = _running()
    if before is passes:  # the forward pass itself
        return function(*args)
    _thread.passes = {owner: of_model.again() for owner, of_model in passes.items()}
    try:
        with contextlib.ExitStack() as adapters:
            for of_model in passes.values():
                adapters.enter_context(of_model.switch())
            return function(*args)
    finally:
        _thread.passes = before


class RunningMean:
    """The running mean of the gates of one site.

    Attributes:
        slots: number of gates → their slot among the totals in the cache; empty if the model never
            generates.
    """

    def __init__(self, passes: Passes):
        self.passes = passes
        self.slots: dict[int, int] = {}

    def __call__(self, g_BTN: torch.Tensor) -> torch.Tensor:
        """Return the mean [B, T, N] over the real tokens up to each, with the cached ones."""
        current, width = self.passes.current, g_BTN.shape[2]
        if current.starts_BT is not None:
            return mean_within(g_BTN, current.starts_BT)
        slot = self.slots.get(width)
        before_B1N = None if slot is None else current.before(slot, width)
        real_BT1, count_BT1 = current.counts(g_BTN)
        total_BTN = running_totals(g_BTN, real_BT1)
        if before_B1N is not None:
            total_BTN = total_BTN + before_B1N
        if current.totals is not None and slot is not None:
            current.pending[slot] = total_BTN
        return total_BTN / (count_BT1 if real_BT1 is None else count_BT1.clamp(min=1))

    def keep(self, mean_BTN: torch.Tensor) -> None:
        """Keep the totals of means [B, T, N] that were computed elsewhere, from an empty cache."""
        current, slot = self.passes.current, self.slots.get(mean_BTN.shape[2])
        if current.totals is not None and slot is not None:
            _, count_BT1 = current.counts(mean_BTN)
            current.pending[slot] = mean_BTN * count_BT1.clamp(min=1)

    def refuse_cache(self) -> None:
        """Raise ValueError if there are cached tokens, for gates that need the whole sequence."""
        past = self.passes.current.past
        if isinstance(past, torch.Tensor) or past > 0:
            raise ValueError(
                "gate_pooling 'paper' needs the whole sequence: train with 'auto' to generate, or "
                "call generate(use_cache=False)"
            )
