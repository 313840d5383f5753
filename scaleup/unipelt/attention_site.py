"""What sits at every attention: computes the gates G_P and G_L from the attention's input and hands them out.

A forward pre-hook reads the input h [B, T, D], evaluates one fused projection for both gates, leaves the gated prefix for
the attention function (scaleup.unipelt.prefix) and the LoRA gate for the query and value projections (scaleup.unipelt.lora).

In cross attention the queries come from the decoder and the values from the encoder: the value projection's LoRA gate is
the same projection pooled over the encoder's tokens, computed when that projection runs: once per generation, as the values
are kept.
"""

import dataclasses

import torch
from torch import nn

from scaleup.unipelt.kernels.narrow import narrow_products, scaled
from scaleup.unipelt.layer import AuxiliaryLayer
from scaleup.unipelt.pooling import RunningMean, Tokens
from scaleup.unipelt.prefix import Prefix, PrefixTuning, SoftmaxPrefix
from scaleup.unipelt.sites import ENCODER_ARGUMENTS, AttentionSite


@dataclasses.dataclass(slots=True)
class Pass:
    """What one call of the attention hands on."""

    prefix: Prefix | None = None
    lora: dict[str, torch.Tensor | float] = dataclasses.field(default_factory=dict)
    h_BTD: torch.Tensor | None = None
    narrow: dict[str, torch.Tensor] = dataclasses.field(
        default_factory=dict
    )  # G_L · A h of LoRA, by projection
    states: torch.Tensor | None = None  # of the encoder
    dropout: float = 0.0
    softmax: SoftmaxPrefix | None = None


class AttentionGates(AuxiliaryLayer):
    """A child of one attention."""

    adapter_layer_names = ("unipelt_gate",)

    def __init__(
        self, neighbour: nn.Module, site: AttentionSite, tokens: Tokens, bank: PrefixTuning | None
    ):
        super().__init__(neighbour)
        self.site = site
        self.watches_query = False
        self._tokens, self._bank = (
            (tokens,),
            (bank,),
        )  # in tuples: owned by the model, not by each attention
        self.running = RunningMean(tokens)
        self._down: dict[str, tuple[nn.Module, nn.Module | None]] = {}
        self._pass = Pass()

    def use_bank(self, bank: PrefixTuning | None) -> None:
        """A second adapter may be the first one with a prefix."""
        self._bank = (bank or self._bank[0],)

    def lend(self, projection: str, lora_a: nn.Module, dropout: nn.Module | None) -> None:
        """A of the projection's LoRA, and the dropout before it: where it reads what the gates read, one product makes both."""
        if not self.site.cross or projection == "query":
            self._down[projection] = (lora_a, dropout)

    def _products(
        self, gate: nn.Module, h_BTD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]] | None:
        """A h of all of LoRA that was lent [B, T, R], W h of the gates [B, T, N], and the rank of each LoRA, if one product can make them."""
        found = [
            (self.active(lora_a), self.active(dropout)) for lora_a, dropout in self._down.values()
        ]
        ready = all(
            lora_a is not None
            and (dropout is None or isinstance(dropout, nn.Identity) or not dropout.training)
            for lora_a, dropout in found
        )
        if not found or not ready or not isinstance(gate, nn.Linear):
            return None
        products = narrow_products(h_BTD, [*(lora_a for lora_a, _ in found), gate])
        if products is None:
            return None
        ranks = [lora_a.out_features for lora_a, _ in found]
        return *products[0].split_with_sizes([sum(ranks), gate.out_features], dim=-1), ranks

    def before_attention(self, attention: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the attention. Raises ValueError where gradients would be lost."""
        gate = self.active(self.unipelt_gate)
        if gate is None:
            return
        h_BTD = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        ah_BTR, wh_BTN, ranks = self._products(gate, h_BTD) or (None, None, [])
        gates = gate(
            h_BTD, self._tokens[0].real(h_BTD.shape[1]), running=self.running, wh_BTN=wh_BTN
        )
        if self.site.softmax_scale is not None and attention.training:
            self._pass.dropout = attention.dropout.p
        if "lora" in gates:
            self._pass.lora = {"query": gates["lora"], "value": gates["lora"]}
            if self.site.cross:
                del self._pass.lora["value"]
                self._pass.states = next(
                    kwargs[name] for name in ENCODER_ARGUMENTS if kwargs.get(name) is not None
                )
            if ah_BTR is not None:
                self._pass.h_BTD, self._pass.narrow = (
                    h_BTD,
                    dict(
                        zip(
                            self._down,
                            scaled(gates["lora"], ah_BTR).split_with_sizes(ranks, dim=-1),
                        )
                    ),
                )
        kv = self._bank[0].layer(self.site.layer) if self._bank[0] is not None else None
        if kv is not None and "prefix" in gates:
            if kv.requires_grad and not torch.is_grad_enabled():
                raise ValueError(
                    "reentrant gradient checkpointing loses the gradient of the prefix; "
                    "use gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
            self._pass.prefix = (kv, gates["prefix"])

    def has_prefix(self) -> bool:
        """Whether a prefix waits for the attention function."""
        return self._pass.prefix is not None

    def take_prefix(self) -> Prefix | None:
        """The prefix of this pass, once. Called by the attention function."""
        prefix, self._pass.prefix = self._pass.prefix, None
        return prefix

    def widened(self, *mask_and_sizes) -> torch.Tensor | None:
        """The attention mask with the prefix's columns, see `scaleup.unipelt.prefix.widen_mask`; made once for the layers that share it."""
        return self._bank[0].masks(*mask_and_sizes)

    def lora_gate(self, projection: str) -> torch.Tensor | float | None:
        """G_L of this pass for "query" or "value". None for what DeBERTa sends through them besides: positions have no example."""
        if self.site.softmax_scale is not None:
            return self._pass.lora.pop(projection, None)
        if (
            projection not in self._pass.lora
        ):  # of cross attention: every encoder token may be seen, unless the paper's mean was asked for
            gate = self.active(self.unipelt_gate)
            pooling = "paper" if getattr(gate, "pooling", None) == "paper" else "masked"
            self._pass.lora[projection] = gate(
                self._pass.states, self._tokens[0].encoder_mask_BS, pooling
            )["lora"]
        return self._pass.lora[projection]

    def lora_product(self, projection: str, x_BTD: torch.Tensor) -> torch.Tensor | None:
        """G_L · A x [B, T, r] if x is what the attention was called with and the product is there."""
        return self._pass.narrow.get(projection) if x_BTD is self._pass.h_BTD else None

    def after_query(self, projection: nn.Module, args: tuple, query_BTD: torch.Tensor) -> None:
        """Forward hook of the query projection where a prefix enters through the softmax: from here on softmax is ours.

        The first call of a pass is the queries'; DeBERTa sends its position embeddings through the same projection later.
        """
        prefix = self.take_prefix()
        if prefix is not None:
            self._pass.softmax = SoftmaxPrefix(
                prefix, query_BTD, self.site.softmax_scale, self._pass.dropout
            )
            self._pass.softmax.__enter__()

    def after_attention(self, attention: nn.Module, args: tuple, output: object) -> object:
        """Forward hook of the attention, also after an exception. Raises RuntimeError if the prefix was not used."""
        softmax, prefix = self._pass.softmax, self._pass.prefix
        self._pass = Pass()
        if softmax is not None:
            softmax.__exit__(None, None, None)
        if output is None:  # an exception is on its way
            return None
        if prefix is not None or (softmax is not None and softmax.share_BHTL is None):
            raise RuntimeError(
                "the attention ignored its prefix: its implementation was changed after UniPELT was attached; "
                "use set_attn_implementation('unipelt_sdpa') or 'unipelt_eager'"
            )
        return None if softmax is None else (output[0] + softmax.context(), *output[1:])
