"""Settings of the PEFT method UNIPELT. Defaults of the method exist only here and in submodules."""

import dataclasses
from typing import Any

from peft import LoraConfig, PeftType

from .submodule import invalid_option, option
from .submodules import SUBMODULES, chosen

# Fields of LoraConfig that UniPELT cannot honour, with the only value that it accepts.
FIXED: dict[str, Any] = {
    "target_modules": None,
    "exclude_modules": None,
    "bias": "none",
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
class CommonOptions:
    """Settings that belong to no single submodule."""

    submodules: list[str] = option(
        [name for name, submodule in SUBMODULES.items() if submodule.in_paper],
        "The submodules: any subset.",
    )
    gates: str | None = option(
        None,
        "learned, or none (NoGate). Default: learned for several submodules, none for one, as in "
        "the paper.",
        choices=("learned", "none"),
    )
    gate_pooling: str = option(
        "auto",
        "Mean of the per-token gates over every position (paper), real tokens (masked) or the "
        "tokens so far (causal). auto: masked in bidirectional attention, causal in causal "
        "attention and its layer.",
        choices=("auto", "paper", "masked", "causal"),
    )
    gate_bias: float = option(
        0.0,
        "Initial bias of the learned gates: 0 starts them at 0.5 (paper), 3 at 0.95.",
        at_least=-30,
        at_most=30,
    )
    head: str = option(
        "trained",
        "The task head, including a pooler that the backbone's files lack. frozen: it keeps its "
        "initial values, which are random for a new head, and is saved with the rest. The authors' "
        "code does this wherever no adapter is trained, apart from fine-tuning.",
        choices=("trained", "frozen"),
    )


_BASES = (CommonOptions, *(submodule.options for submodule in SUBMODULES.values()), LoraConfig)


@dataclasses.dataclass
class UniPeltConfig(*dict.fromkeys(_BASES)):  # type: ignore[misc]
    """Settings of the PEFT method UNIPELT. The defaults are the paper's.

    The fields are those of `CommonOptions`, of the `options` of every submodule, and of PEFT's
    LoraConfig.

    Raises:
        ValueError: for values outside of their range, and for fields of LoraConfig that have no
            meaning here.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.UNIPELT
        self.submodules = _checked_submodules(self.submodules)  # type: ignore[has-type]
        if self.gates is None:  # type: ignore[has-type]
            self.gates = "learned" if len(self.submodules) > 1 else "none"
        for group in (CommonOptions, *(submodule.options for submodule in chosen(self))):
            for field in dataclasses.fields(group):
                problem = invalid_option(field, getattr(self, field.name))
                if problem is not None:
                    raise ValueError(problem)
        self.require_supported()

    def require_supported(self) -> None:
        """Raise ValueError for fields of LoraConfig that have no meaning here.

        Other libraries also set them after the config has been made.
        """
        changed = [field for field, value in FIXED.items() if getattr(self, field) != value]
        changed += [field for field in ("rank_pattern", "alpha_pattern") if getattr(self, field)]
        if changed or not isinstance(self.init_lora_weights, bool):
            raise ValueError(
                "UniPELT puts plain LoRA on the layers that lora_targets names; leave out "
                + ", ".join(changed or ["init_lora_weights"])
            )


def _checked_submodules(names: Any) -> list[str]:
    """Return the submodules in the order of the list, or raise ValueError."""
    names = [names] if isinstance(names, str) else names
    is_list = isinstance(names, list | tuple | set) and len(names) > 0
    if (
        not is_list
        or any(n not in list(SUBMODULES) for n in names)
        or len(set(names)) != len(names)
    ):
        *first, last = SUBMODULES
        raise ValueError(
            f"submodules must name {', '.join(first)} or {last}, each at most once and at least "
            f"one; got {names}"
        )
    return [name for name in SUBMODULES if name in names]
