"""The narrow work of one generated token, with as few torch operations as possible.

A token costs its layers little arithmetic, so time goes into the number of operations. The packed
weights are therefore kept as long as the KV cache, biases join their products, and the running
means of all gates share what depends on the counts of tokens:

    ḡ = (Σ_{s < t} m_s g_s + m_t g_t) / n_t = before + share · g_t          n_t = Σ_{s ≤ t} m_s

Shapes: B examples, D wide, N gates of a site, C columns of its product, R of them narrow.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from .packed import Plan
from .reference import activate, wide_dtype
from .workspace import PackedSite, begin

Tensor = torch.Tensor


class Means(NamedTuple):
    """What the running means of one pass share.

    Attributes:
        before_BW: totals of all gates at the newest cached token, divided by the new counts.
        share_B1: the weight of the new token.
        count_B1: the number of real tokens, the new one included.
    """

    before_BW: Tensor
    share_B1: Tensor
    count_B1: Tensor


def means_of_step(totals_BW: Tensor, count_B1: Tensor, real_B1: Tensor | None) -> Means:
    """Prepare the means of a pass with one token.

    Args:
        totals_BW: totals of all gates at the newest cached token.
        count_B1: the number of real tokens in the cache.
        real_B1: not 0 where the new token is real; None if it is in all examples.
    """
    if real_B1 is None:
        count_B1 = count_B1 + 1
        share_B1 = count_B1.reciprocal()
    else:
        real_B1 = (real_B1 != 0).to(count_B1.dtype)
        count_B1 = count_B1 + real_B1
        share_B1 = real_B1 / count_B1.clamp(min=1)
    return Means(totals_BW / count_B1.clamp(min=1), share_B1, count_B1)


class StepSite:
    """The weights of one site, arranged for single tokens."""

    __slots__ = (
        *("weight_t", "bias", "same_dtype", "rank", "gates", "columns", "scales", "selected"),
        *("handed_out", "activation", "constants", "up_t", "up_bias", "details"),
    )

    def __init__(self, site: PackedSite):
        self.weight_t, self.rank, self.details = site.weight_in_t, site.rank, site.details
        self.bias = site.bias.new_zeros(self.weight_t.shape[1])
        self.bias[: len(site.bias)] = site.bias
        self.same_dtype = self.weight_t.dtype is wide_dtype(self.weight_t)
        self.gates = len(site.scales)
        self.columns = slice(site.rank, len(site.bias))
        self.scales = None if bool((site.scales == 1).all()) else site.scales
        self.selected = slice(site.selected, site.selected + 1)
        self.handed_out = slice(site.handed_out, site.handed_out + 1)
        self.activation, self.constants = site.activation, site.constants
        if site.ones_column:
            self.up_t = site.weight_out[:, : site.rank].contiguous().t()
            self.up_bias = site.weight_out[:, site.rank].contiguous()

    def evaluate(self, x_BD: Tensor, means: Means, slot: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the product [B, C], the means of the gates [B, N], and the scaled gates [B, N].

        Args:
            x_BD: input of the site.
            means: those of the pass.
            slot: index of the site's first gate among all gates.
        """
        if self.same_dtype:
            z_BC = torch.addmm(self.bias, x_BD, self.weight_t)
        else:
            z_BC = torch.mm(x_BD.to(self.weight_t.dtype), self.weight_t).to(self.bias.dtype)
            z_BC.add_(self.bias)
        g_BN = z_BC[:, self.columns].sigmoid()
        before_BN = means.before_BW[:, slot : slot + self.gates]
        mean_BN = torch.addcmul(before_BN, g_BN, means.share_B1)
        return z_BC, mean_BN, mean_BN if self.scales is None else mean_BN * self.scales

    def gated(self, z_BC: Tensor, gates_BN: Tensor) -> Tensor:
        """Return the gated narrow columns [B, R] in the dtype of the weights."""
        v_BR = z_BC[:, : self.rank] * gates_BN[:, self.selected]
        return v_BR if self.same_dtype else v_BR.to(self.weight_t.dtype)

    def bottleneck(self, z_BD: Tensor, units_BC: Tensor, gates_BN: Tensor) -> Tensor:
        """Return z + G (W_up φ(units) + b_up), [B, D]."""
        units_BM = activate(units_BC[:, : self.rank], self.activation)
        if not self.same_dtype:
            units_BM = units_BM.to(self.up_t.dtype)
        up_BD = torch.addmm(self.up_bias, units_BM, self.up_t)
        return torch.addcmul(z_BD, up_BD.to(z_BD.dtype), gates_BN[:, self.selected].to(z_BD.dtype))

    def norm(self, x_BD: Tensor, eps: float) -> Tensor:
        """Return LN(x) with the frozen weights of the site, if it has any."""
        weight, bias = self.constants or (None, None)
        return nn.functional.layer_norm(x_BD, x_BD.shape[1:], weight, bias, eps)


class Decoding:
    """The packed weights for the tokens of one generation."""

    def __init__(self, plan: Plan):
        self.plan, self.state = plan, plan.state()
        self.lease = begin(plan)[0]
        self.sites: dict[Any, StepSite | None] = {}

    def is_current(self) -> bool:
        """Return whether the model still has the weights that were packed."""
        return self.plan.is_current() and self.state == self.plan.state()

    def site(self, owner: Any) -> StepSite | None:
        """Return the weights that a layer has declared under `owner`, None if there are none."""
        if owner not in self.sites:
            packed = self.lease.sites.get(owner)
            self.sites[owner] = None if packed is None or not packed.causal else StepSite(packed)
        return self.sites[owner]

    def takes(self, x: Tensor) -> bool:
        """Return whether an input is a single token of the dtype of the weights."""
        return x.shape[1] == 1 and (x.dtype is self.lease.dtype or self.lease.autocast)
