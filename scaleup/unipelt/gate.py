"""The gate: one learned scalar per submodule, layer and example that turns a submodule up or down.

    g = pool(sigmoid(W h + b)),   W ~ N(0, 0.02), b = 0        (Mao et al. 2022, section 3.2)

The sigmoid is applied per token, and the mean over tokens is taken after it. Gates that read the
same input share one projection.

Shapes: B examples, T tokens, D hidden size, N gates in one projection. A gate is [B, 1, 1] (one
scalar per example) or, with causal pooling, [B, T, 1] (at each token, the mean over the tokens so
far).
"""

from typing import Any

import torch
from torch import nn

from .kernels import narrow_products
from .passes import RunningMean
from .pooling import real_and_count, running_totals, shares

GateValue = torch.Tensor | float


def resolve_pooling(requested: str, causal: bool) -> str:
    """Return the pooling of one site.

    `masked` averages over real tokens where all of them may be seen. In causal attention that mean
    would show a token its future, so `masked` and `auto` become the running mean there.

    Args:
        requested: `gate_pooling`: "auto", "paper", "masked" or "causal".
        causal: whether queries at the site must not depend on later tokens.

    Returns:
        "paper", "masked" or "causal".
    """
    if requested in ("auto", "masked"):
        return "causal" if causal else "masked"
    return requested


def pool(
    g_BTN: torch.Tensor,
    pooling: str,
    mask_BT: torch.Tensor | None,
    share_BT1: torch.Tensor | None = None,
) -> torch.Tensor:
    """Average per-token gates.

    Args:
        g_BTN: gates per token.
        pooling: "paper" (all positions), "masked" (real tokens) or "causal" (tokens so far).
        mask_BT: 1 at real tokens; None if all tokens are real.
        share_BT1: precomputed `shares(mask_BT)`; computed here if None.

    Returns:
        [B, 1, N], or [B, T, N] for the running mean.
    """
    if pooling == "paper" or (mask_BT is None and pooling == "masked"):
        return g_BTN.mean(dim=1, keepdim=True)
    if pooling == "masked":
        assert mask_BT is not None
        share_BT1 = shares(mask_BT) if share_BT1 is None else share_BT1
        return (g_BTN * share_BT1).sum(dim=1, keepdim=True)
    assert pooling == "causal", pooling
    real_BT1, count_BT1 = real_and_count(g_BTN, mask_BT)
    return running_totals(g_BTN, real_BT1) / count_BT1.clamp(min=1)


def cast_to_weight(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Cast x to the dtype of a weight, except under autocast, which casts by itself."""
    if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(weight.dtype)


class GateMoments:
    """Mean and standard deviation of the values of N gates since the last call of `take`.

    Sums are updated on the device and in place: there is no synchronisation per step, and no
    reference to a step's own tensors, which CUDA graphs overwrite.
    """

    def __init__(self, gates: int, device: torch.device):
        self.sums_3N = torch.zeros(3, gates, device=device)  # count, sum, sum of squares

    def add(self, g_BTN: torch.Tensor, mask_BT: torch.Tensor | None) -> None:
        """Add one value per example: for per-token gates, the mean over real tokens."""
        with torch.no_grad():
            g_BTN = g_BTN.detach().float()
            g_BN = (pool(g_BTN, "masked", mask_BT) if g_BTN.shape[1] > 1 else g_BTN)[:, 0]
            self.sums_3N.add_(torch.stack([torch.ones_like(g_BN), g_BN, g_BN.square()]).sum(1))

    def drain(self) -> list[tuple[float, float]]:
        """Return (mean, standard deviation) per gate, empty if there are no values; start again."""
        return self.moments(self.take())

    def take(self) -> torch.Tensor:
        """Return the sums [3, N], which can be added to those of other processes; start again."""
        sums_3N = self.sums_3N.clone()
        self.sums_3N.zero_()
        return sums_3N

    @staticmethod
    def moments(sums_3N: torch.Tensor) -> list[tuple[float, float]]:
        """Return (mean, standard deviation) per gate from sums of one or more processes."""
        count_N, total_N, squares_N = sums_3N.double().cpu()
        if not count_N.any():
            return []
        mean_N = total_N / count_N
        spread_N = (squares_N / count_N - mean_N.square()).clamp(min=0).sqrt()
        return list(zip(mean_N.tolist(), spread_N.tolist()))


class LearnedGate(nn.Linear):
    """The gates of submodules that read the same input [B, T, D], as one projection.

    Args:
        hidden_size: D.
        names: the submodules.
        pooling: "paper", "masked" or "causal".
        scales: constants that multiply the gates.
        bias: initial value of b.
    """

    def __init__(
        self,
        hidden_size: int,
        names: tuple[str, ...],
        pooling: str,
        scales: tuple[float, ...] | None = None,
        bias: float = 0.0,
    ):
        self.initial_bias = bias
        super().__init__(hidden_size, len(names))
        self.names = names
        self.pooling = pooling
        self.scales = scales or (1.0,) * len(names)
        self.statistics: GateMoments | None = None  # set while gates are logged

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        nn.init.constant_(self.bias, self.initial_bias)

    def forward(  # type: ignore[override]
        self,
        h_BTD: torch.Tensor,
        mask_BT: torch.Tensor | None,
        pooling: str | None = None,
        running: RunningMean | None = None,
        logits_BTN: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the gates of an input.

        Args:
            h_BTD: input.
            mask_BT: 1 at real tokens; None if all tokens are real.
            pooling: replaces the gate's own pooling, for tokens of another kind (an encoder's).
            running: a running mean that includes the tokens in the KV cache.
            logits_BTN: W h if it was computed together with other products of h.

        Returns:
            Gates by name times their scales, [B, 1, 1] or [B, T, 1], in the dtype of the input.
        """
        if logits_BTN is None:
            alone = narrow_products(h_BTD, [self])
            logits_BTN = None if alone is None else alone[0]
        if logits_BTN is None:
            logits_BTN = super().forward(cast_to_weight(h_BTD, self.weight))
        else:
            logits_BTN = logits_BTN + self.bias
        # In float32, because a mean over many tokens in bfloat16 would lose the third digit.
        g_BTN = torch.sigmoid(logits_BTN.float())
        kind = pooling or self.pooling
        if running is not None and kind != "causal":
            running.refuse_cache()
        if kind == "causal" and running is not None:
            g_BTN = running(g_BTN)
        else:
            share = None
            if running is not None and mask_BT is not None:
                share = running.passes.current.share(mask_BT)
            g_BTN = pool(g_BTN, kind, mask_BT, share)
        recomputed = running is not None and running.passes.current.recomputed
        if self.statistics is not None and pooling is None and not recomputed:
            self.statistics.add(g_BTN, mask_BT)
        gates = g_BTN.to(h_BTD.dtype).chunk(len(self.names), dim=-1)
        scaled_gates = (g if scale == 1 else g * scale for g, scale in zip(gates, self.scales))
        return dict(zip(self.names, scaled_gates))


class ConstantGate(nn.Module):
    """A fixed factor per submodule in place of learned gates."""

    def __init__(self, values: dict[str, float]):
        super().__init__()
        self.values = dict(values)

    @property
    def names(self) -> tuple[str, ...]:
        """The submodules."""
        return tuple(self.values)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the factors, whatever the input is."""
        return self.values
