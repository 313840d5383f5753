"""What is known during one forward pass of one parent model.

`passes.py` begins and ends passes, and finds the pass of a layer.

Shapes: B examples, T tokens of the pass, S encoder tokens, N gates in one projection, W gates of
all sites together.
"""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .kernels import Decoding, Lease, Means, PackedSite, StepSite, means_of_step
from .pooling import GateTotals, StaticGateTotals, real_and_count, shares


@dataclasses.dataclass(eq=False)
class ForwardPass:
    """What is known during one forward pass of one parent model.

    Attributes:
        mask_BT: 1 at real tokens, None if all are real.
        encoder_mask_BS: the same for the encoder's tokens, in a decoder.
        examples: B, None if no layer needs the masks.
        starts_BT: index of the first token of each token's text if a row holds several texts.
        past: number of tokens in the cache.
        cached: the totals [B, 1, W] of all gates and the count [B, 1, 1] at the newest cached
            token, None if there is none.
        totals: the layer of the cache that holds them, None if there is no cache.
        pending: totals of this pass by slot, to be stored when the pass ends.
        shared: what is computed once per pass, by the layer that computes it, such as the prefixes
            of all layers.
        lease: the packed weights of the fast path, None if all layers take the plain path.
        anchor: what the sites depend on so that gradients reach those weights; None without
            gradients.
        decoding: the packed weights for single tokens, in a pass of a generation.
        means: of the gates that single tokens have, by slot, to be stored when the pass ends.
        calls: what a layer keeps from one of its hooks to the next, by the object that keeps it.
        adapters: whether the adapters are disabled, and the names of the active ones.
        switch: returns a context in which layers use the adapter of this pass, if its rows are part
            of a batch with several adapters.
        entered: whether the forward of the model has begun, where `DirectForward` looks at it.
        outer: the pass of the same model that this one interrupts, as in a hook that calls the
            model.
        recomputed: whether this is the recomputation of a block in the backward pass.
    """

    mask_BT: torch.Tensor | None = None
    encoder_mask_BS: torch.Tensor | None = None
    examples: int | None = None
    starts_BT: torch.Tensor | None = None
    past: int | torch.Tensor = 0
    cached: tuple[torch.Tensor, torch.Tensor] | None = None
    totals: GateTotals | StaticGateTotals | None = None
    pending: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    shared: dict[Any, Any] = dataclasses.field(default_factory=dict)
    lease: Lease | None = None
    anchor: torch.Tensor | None = None
    decoding: Decoding | None = None
    means: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    calls: dict[Any, Any] = dataclasses.field(default_factory=dict)
    adapters: tuple[bool, tuple[str, ...]] | None = None
    switch: Callable[[], AbstractContextManager[None]] = nullcontext
    entered: bool = False
    outer: "ForwardPass | None" = None
    recomputed: bool = False
    _counts: tuple[torch.Tensor | None, torch.Tensor] | None = None
    _share_BT1: torch.Tensor | None = None
    _step: Means | None = None

    def real(self, tokens: int) -> torch.Tensor | None:
        """Return the mask [B, T] of the last `tokens` tokens; cached tokens precede them in it."""
        return None if self.mask_BT is None else self.mask_BT[:, -tokens:]

    def packed(self, owner: Any, x_BTD: torch.Tensor) -> PackedSite | None:
        """Return the packed matrices for an input, None if its layer takes the plain path now.

        Args:
            owner: the object under which the layer has declared them.
            x_BTD: the input.
        """
        lease = self.lease
        if lease is None or torch.compiler.is_compiling():
            return None
        site = lease.sites.get(owner)
        if (
            site is None
            or type(self.past) is not int  # of a static cache
            or self.past
            or x_BTD.dim() != 3
            or (self.anchor is None and torch.is_grad_enabled())
            or not lease.takes(x_BTD)
        ):
            return None
        return site

    def step(self, owner: Any, x_BTD: torch.Tensor) -> StepSite | None:
        """Return the weights of a site for a single token, None if it takes another path.

        Args:
            owner: the object under which the layer has declared them.
            x_BTD: the input.
        """
        decoding = self.decoding
        if decoding is None or self.cached is None or not decoding.takes(x_BTD):
            return None
        if torch.compiler.is_compiling():
            return None
        return decoding.site(owner)

    def means_of_step(self) -> Means:
        """Return what the running means of a single token share."""
        if self._step is None:
            assert self.cached is not None
            self._require_totals()
            totals_B1W, count_B11 = self.cached
            self._step = means_of_step(totals_B1W[:, 0], count_B11[:, 0], self.real(1))
        return self._step

    def share(self, mask_BT: torch.Tensor) -> torch.Tensor:
        """Return `shares` of this pass's mask, computed once."""
        if self._share_BT1 is None:
            self._share_BT1 = shares(mask_BT)
        return self._share_BT1

    def counts(self, g_BTN: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return `real_and_count` of this pass, computed once, with cached tokens in the counts."""
        if self._counts is None:
            real_BT1, count_BT1 = real_and_count(g_BTN, self.real(g_BTN.shape[1]))
            if self.cached is not None:
                count_BT1 = count_BT1 + self.cached[1]
            self._counts = real_BT1, count_BT1
        return self._counts

    def before(self, slot: int, width: int) -> torch.Tensor | None:
        """Return the totals [B, 1, N] of one site at the newest cached token."""
        self._require_totals()
        return None if self.cached is None else self.cached[0][..., slot : slot + width]

    def _require_totals(self) -> None:
        """Raise ValueError if the cache was filled without this adapter."""
        if isinstance(self.totals, GateTotals) and self.totals.get_seq_length() != self.past:
            raise ValueError(
                "the KV cache holds tokens whose gates are not known, because it was filled without"
                " this adapter; start with an empty one"
            )

    def require_adapters(self, disabled: bool, names: tuple[str, ...]) -> None:
        """Raise RuntimeError if other adapters are active than earlier in this pass."""
        if self.adapters is None:
            self.adapters = disabled, names
        elif self.adapters != (disabled, names):
            raise RuntimeError(
                "a layer does not find the adapters of its forward pass, which were switched or "
                "disabled meanwhile; gradient checkpointing needs the same active adapters in the "
                "backward pass, and threads that share a model must not switch them"
            )

    def store(self, slots: dict[int, int]) -> None:
        """Store this pass's totals in the cache.

        Args:
            slots: index of a site's first gate → number of its gates.
        """
        if self.totals is not None and self.means:
            self._store_step(self.totals, slots)
        if self.totals is None or not self.pending:
            return
        assert self._counts is not None
        any_BTN = next(iter(self.pending.values()))
        zeros_BT1 = any_BTN[..., :1] * 0  # for sites that were not called
        shape, count_BT1 = any_BTN.shape[:2], self._counts[1]
        parts = [
            self.pending.get(slot, zeros_BT1).expand(*shape, width) for slot, width in slots.items()
        ]
        totals_BTW = torch.cat(parts, dim=-1)  # with gradients, as the keys and values have them
        self.totals.update(totals_BTW.unsqueeze(1), count_BT1.expand(*shape, 1).unsqueeze(1))

    def _store_step(self, totals: GateTotals | StaticGateTotals, slots: dict[int, int]) -> None:
        before_BW, _, count_B1 = self.means_of_step()
        parts = []
        for slot, width in slots.items():
            if slot in self.means:
                parts.append(self.means[slot])
            elif slot in self.pending:  # of a site on the plain path
                parts.append(self.pending[slot][:, 0] / count_B1.clamp(min=1))
            else:  # of a site that was not called
                parts.append(torch.zeros_like(before_BW[:, :width]))
        totals_BW = torch.cat(parts, dim=1) * count_B1
        totals.update(totals_BW[:, None, None], count_B1.expand(len(totals_BW), 1)[:, None, None])
        self.pending = {}

    def clear(self) -> None:
        """Drop what only the pass itself needs.

        Blocks to be recomputed keep the pass. If it kept a tensor of a block, the two would keep
        each other in memory.
        """
        self.totals, self.pending, self.calls, self.outer = None, {}, {}, None
        self.means, self._step = {}, None

    def again(self) -> "ForwardPass":
        """Return a copy for the recomputation of a block."""
        return dataclasses.replace(self, calls={}, recomputed=True)
