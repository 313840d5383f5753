"""The gate: one learned scalar per submodule, layer and example that turns a submodule up or down.

    g = pool(sigmoid(W h + b)),   W ~ N(0, 0.02), b = 0        (Mao et al. 2022, section 3.2; the authors' code)

The sigmoid is taken per token, the mean over tokens after it. Gates that read the same input share one fused projection.

Shapes: B examples, T tokens, D hidden size, N gates in one projection. A gate is [B, 1, 1] (one scalar per example) or,
with causal pooling, [B, T, 1] (at each token, the mean over the tokens so far).
"""

from typing import Callable

import torch
from torch import nn

from scaleup.unipelt.kernels.narrow import narrow_products
from scaleup.unipelt.pooling import RunningMean, real_and_count, running_totals, shares

Pooling = str  # "paper" | "masked" | "causal"


def resolve_pooling(requested: str, causal: bool) -> Pooling:
    """The pooling of one site, from `gate_pooling` and whether its queries must not see later tokens.

    `masked` averages over real tokens where all of them may be seen. In causal attention that mean would show a token
    its future, so `masked`, like `auto`, becomes the running mean there. `paper` and `causal` are taken at their word.
    """
    if requested in ("auto", "masked"):
        return "causal" if causal else "masked"
    return requested


def pool(
    g_BTN: torch.Tensor,
    pooling: Pooling,
    mask_BT: torch.Tensor | None,
    share_BT1: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean of per-token gates: [B, 1, N], or [B, T, N] for the running mean. `mask_BT` is 1 at real tokens, None: all real.
    `share_BT1`: `shares(mask_BT)`, by those who have it."""
    if pooling == "paper" or (mask_BT is None and pooling == "masked"):
        return g_BTN.mean(dim=1, keepdim=True)
    if pooling == "masked":
        share_BT1 = shares(mask_BT) if share_BT1 is None else share_BT1
        return (g_BTN * share_BT1).sum(dim=1, keepdim=True)
    assert pooling == "causal", pooling
    real_BT1, count_BT1 = real_and_count(g_BTN, mask_BT)
    return running_totals(g_BTN, real_BT1) / count_BT1.clamp(min=1)


def cast_to_weight(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x` in the type of `weight`; unchanged under autocast, which casts by itself."""
    if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(weight.dtype)


class GateMoments:
    """Mean and spread of the values of `gates` gates since the last look. Summed on the device and in place: no synchronisation per step, no
    reference to a step's own tensors, which CUDA graphs write over."""

    def __init__(self, gates: int, device: torch.device):
        self.sums_3N = torch.zeros(3, gates, device=device)  # count, sum, sum of squares

    def add(self, g_BTN: torch.Tensor, mask_BT: torch.Tensor | None) -> None:
        """Adds one value per example; of per-token gates the mean over real tokens."""
        with torch.no_grad():
            g_BTN = g_BTN.detach().float()
            g_BN = (pool(g_BTN, "masked", mask_BT) if g_BTN.shape[1] > 1 else g_BTN)[:, 0]
            self.sums_3N.add_(torch.stack([torch.ones_like(g_BN), g_BN, g_BN.square()]).sum(1))

    def drain(self) -> list[tuple[float, float]]:
        """(mean, standard deviation) per gate, and starts anew. Empty if nothing was seen."""
        return self.moments(self.take())

    def take(self) -> torch.Tensor:
        """The sums since the last look, to be added to other processes'; starts anew."""
        sums_3N = self.sums_3N.clone()
        self.sums_3N.zero_()
        return sums_3N

    @staticmethod
    def moments(sums_3N: torch.Tensor) -> list[tuple[float, float]]:
        """(mean, standard deviation) per gate from such sums, which may be of several processes."""
        count_N, total_N, squares_N = sums_3N.double().cpu()
        if not count_N.any():
            return []
        mean_N = total_N / count_N
        spread_N = (squares_N / count_N - mean_N.square()).clamp(min=0).sqrt()
        return list(zip(mean_N.tolist(), spread_N.tolist()))


class LearnedGate(nn.Linear):
    """Gates named `names` that read the same input [B, T, D], as one projection.

    Calling it gives one tensor per name, [B, 1, 1] or [B, T, 1], in the type of the input.
    """

    def __init__(self, hidden_size: int, names: tuple[str, ...], pooling: Pooling):
        super().__init__(hidden_size, len(names))
        self.names = names
        self.pooling = pooling
        self.statistics: GateMoments | None = None  # set by whoever wants to log gates

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def forward(
        self,
        h_BTD: torch.Tensor,
        mask_BT: torch.Tensor | None,
        pooling: Pooling | None = None,
        running: RunningMean | None = None,
        wh_BTN: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """`pooling`: another than the gate's own, for tokens of another kind. `running`: a running mean that knows earlier tokens.
        `wh_BTN`: W h, by those who made it together with other products of h."""
        if wh_BTN is None:
            alone = narrow_products(h_BTD, [self])
            wh_BTN = None if alone is None else alone[0]
        logits_BTN = (
            super().forward(cast_to_weight(h_BTD, self.weight))
            if wh_BTN is None
            else wh_BTN + self.bias
        )
        # float32 from here on: a mean over many tokens in bfloat16 would lose the gate's third digit.
        g_BTN = torch.sigmoid(logits_BTN.float())
        kind = pooling or self.pooling
        if running is not None and kind != "causal":
            running.refuse_cache()
        if kind == "causal" and running is not None:
            g_BTN = running(g_BTN)
        else:
            g_BTN = pool(
                g_BTN,
                kind,
                mask_BT,
                None if running is None or mask_BT is None else running.tokens.share(mask_BT),
            )
        if self.statistics is not None and pooling is None:
            self.statistics.add(g_BTN, mask_BT)
        g_BTN = g_BTN.to(h_BTD.dtype)
        return dict(zip(self.names, g_BTN.chunk(len(self.names), dim=-1)))


class ConstantGate(nn.Module):
    """The ungated ablation: a fixed factor per name, nothing to learn."""

    def __init__(self, values: dict[str, float]):
        super().__init__()
        self.values = dict(values)

    def forward(
        self,
        h_BTD: torch.Tensor,
        mask_BT: torch.Tensor | None,
        pooling: Pooling | None = None,
        running: RunningMean | None = None,
        wh_BTN: torch.Tensor | None = None,
    ) -> dict[str, float]:
        return self.values


GateFactory = Callable[[int, tuple[str, ...], bool], nn.Module]


def gate_factory(learned: bool, pooling: str, lora_scaling: float) -> GateFactory:
    """How to make the gates of a site: `make(hidden_size, names, causal)`. The only place that knows gated from ungated.

    Ungated, prefix and adapter have the factor 1 and LoRA its alpha/r.
    """

    def make(hidden_size: int, names: tuple[str, ...], causal: bool) -> nn.Module:
        if learned:
            return LearnedGate(hidden_size, names, resolve_pooling(pooling, causal))
        return ConstantGate({name: lora_scaling if name == "lora" else 1.0 for name in names})

    return make
