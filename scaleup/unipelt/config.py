"""Settings of the PEFT method UNIPELT."""

import dataclasses
import math
from typing import Literal

from peft import LoraConfig, PeftType
from transformers.activations import ACT2FN

SUBMODULES = ("adapter", "prefix", "lora")

# What LoraConfig offers and UniPELT cannot honour, with the only value it takes.
FIXED = {
    "target_modules": None,
    "exclude_modules": None,
    "bias": "none",
    "use_rslora": False,
    "layers_to_transform": None,
    "layers_pattern": None,
    "megatron_config": None,
    "trainable_token_indices": None,
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "use_dora": False,
    "velora_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "monteclora_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "target_parameters": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "fan_in_fan_out": False,
    "ensure_weight_tying": False,
}


@dataclasses.dataclass
class UniPeltConfig(LoraConfig):
    """Settings of the PEFT method UNIPELT; the defaults are the paper's. `r`, `lora_alpha` and `lora_dropout` are LoraConfig's.

    submodules: any of "adapter", "prefix", "lora".
    gates: "learned" or "none" (NoGate); left out: learned for two or three submodules, none for one, as in the paper.
    gate_pooling: "auto", "paper", "masked" or "causal", see `scaleup.unipelt.gate.resolve_pooling`.
    adapter_size, adapter_activation: units of the bottleneck and its nonlinearity (a transformers name, "relu").
    prefix_length, prefix_hidden_size: positions per attention; units of the MLP behind them.
    prefix_reparameterization: "mlp", or "none" to train keys and values directly.

    Raises ValueError for values outside these and for LoraConfig's fields that have no meaning here.
    """

    r: int = 8
    lora_alpha: float = 16
    submodules: list[str] | str = dataclasses.field(default_factory=lambda: list(SUBMODULES))
    gates: Literal["learned", "none"] | None = None
    gate_pooling: Literal["auto", "paper", "masked", "causal"] = "auto"
    adapter_size: int = 48
    adapter_activation: str = "relu"
    prefix_length: int = 10
    prefix_hidden_size: int = 512
    prefix_reparameterization: Literal["mlp", "none"] = "mlp"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.UNIPELT
        named = [self.submodules] if isinstance(self.submodules, str) else self.submodules
        if (
            not isinstance(named, list | tuple | set)
            or not named
            or any(named_part not in SUBMODULES for named_part in named)
            or len(set(named)) != len(named)
        ):
            raise ValueError(
                f"submodules must name adapter, prefix or lora, each at most once and at least one; got {named}"
            )
        self.submodules = [name for name in SUBMODULES if name in named]
        if self.gates is None:
            self.gates = "learned" if len(self.submodules) > 1 else "none"
        choices = {
            "gates": ("learned", "none"),
            "gate_pooling": ("auto", "paper", "masked", "causal"),
            "prefix_reparameterization": ("mlp", "none"),
        }
        if "adapter" in self.submodules:
            choices["adapter_activation"] = tuple(ACT2FN)
        for field, values in choices.items():
            if getattr(self, field) not in values:
                raise ValueError(
                    f"{field} must be one of {', '.join(values)}; got {getattr(self, field)!r}"
                )
        sizes = {
            "r": "lora",
            "adapter_size": "adapter",
            "prefix_length": "prefix",
            "prefix_hidden_size": "prefix",
        }
        for field in (field for field, part in sizes.items() if part in self.submodules):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field} must be a positive whole number; got {value!r}")
        ranges = {"lora_alpha": (0, math.inf), "lora_dropout": (-1e-9, 1)}
        for field, (low, high) in ranges.items() if "lora" in self.submodules else ():
            value = getattr(self, field)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not low < value < high
            ):
                raise ValueError(
                    f"{field} must be {'above 0' if low == 0 else 'at least 0 and below 1'}; got {value!r}"
                )
        changed = [field for field, value in FIXED.items() if getattr(self, field) != value]
        changed += [field for field in ("rank_pattern", "alpha_pattern") if getattr(self, field)]
        if changed or not isinstance(self.init_lora_weights, bool):
            raise ValueError(
                f"UniPELT puts plain LoRA on every query and value; leave out {', '.join(changed or ['init_lora_weights'])}"
            )
