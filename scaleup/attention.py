"""What sits at every attention: computes the gates G_P and G_L from the attention's input and hands them out.

A forward pre-hook reads the input h [B, T, D], evaluates one fused projection for both gates, leaves the gated prefix for
the attention function (scaleup.prefix) and the LoRA gate for the query and value projections (scaleup.lora).

In cross attention the queries come from the decoder and the values from the encoder: the value projection's LoRA gate is
the same projection pooled over the encoder's tokens.
"""

import torch
from torch import nn

from scaleup.backbone import ENCODER_ARGUMENTS
from scaleup.gate import TokenMask
from scaleup.prefix import Prefix, PrefixBank
from scaleup.tuner import SideLayer


class AttentionGates(SideLayer):
    """A child of one attention. `layer`: its index in the prefix bank; `cross`: it attends to an encoder; `causal`: its is_causal."""

    adapter_layer_names = ("unipelt_gate",)

    def __init__(self, neighbour: nn.Module, mask: TokenMask, bank: PrefixBank | None, layer: int, cross: bool, causal: bool):
        super().__init__(neighbour)
        self.layer, self.cross, self.causal = layer, cross, causal
        self._mask, self._bank = (mask,), (bank,)  # in tuples: owned by the model, not by each attention
        self._prefix: Prefix | None = None
        self._lora: dict[str, torch.Tensor | float] = {}

    def use_bank(self, bank: PrefixBank | None) -> None:
        """A second adapter may be the first one with a prefix."""
        self._bank = (bank or self._bank[0],)

    def before_attention(self, attention: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the attention. Raises ValueError for a decoding step: see `_refuse_decoding`."""
        gate = self.active(self.unipelt_gate)
        if gate is None:
            return
        h_BTD = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        mask = self._mask[0]
        self._refuse_decoding(gate, attention, kwargs)
        gates = gate(h_BTD, mask.mask_BT)
        if "lora" in gates:
            self._lora = {"query": gates["lora"], "value": gates["lora"]}
            if self.cross:
                states = next(kwargs[name] for name in ENCODER_ARGUMENTS if kwargs.get(name) is not None)
                self._lora["value"] = gate(states, mask.encoder_mask_BS, self._encoder_pooling(gate))["lora"]
        kv = self._bank[0].layer(self.layer) if self._bank[0] is not None else None
        if kv is not None and "prefix" in gates:
            if kv[0].requires_grad and not torch.is_grad_enabled():
                raise ValueError(
                    "reentrant gradient checkpointing loses the gradient of the prefix; "
                    "use gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
            self._prefix = (*kv, gates["prefix"])

    @staticmethod
    def _encoder_pooling(gate: nn.Module) -> str:
        """Every encoder token may be seen: the mean over real ones, unless the paper's mean was asked for."""
        return "paper" if getattr(gate, "pooling", None) == "paper" else "masked"

    def _refuse_decoding(self, gate: nn.Module, attention: nn.Module, kwargs: dict) -> None:
        """With a filled KV cache only the new tokens are here, and the gates' running mean over earlier ones is not."""
        cache = kwargs.get("past_key_values")
        if cache is None or next(gate.parameters(), None) is None:
            return
        if not self.cross and cache.get_seq_length(attention.layer_idx) > 0:
            raise ValueError("learned gates need the whole sequence: call generate(..., use_cache=False)")

    def take_prefix(self) -> Prefix | None:
        """The prefix of this pass, once. Called by the attention function."""
        prefix, self._prefix = self._prefix, None
        return prefix

    def lora_gate(self, projection: str) -> torch.Tensor | float:
        """G_L of this pass for "query" or "value"."""
        return self._lora[projection]

    def after_attention(self, attention: nn.Module, args: tuple, output: object) -> None:
        """Forward hook of the attention, also after an exception. Raises RuntimeError if the prefix was not used."""
        unused, self._prefix, self._lora = self._prefix is not None and output is not None, None, {}
        if unused:
            raise RuntimeError(
                "the attention ignored its prefix: its implementation was changed after UniPELT was attached; "
                "use set_attn_implementation('unipelt_sdpa') or 'unipelt_eager'"
            )
