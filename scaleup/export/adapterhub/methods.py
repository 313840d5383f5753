"""Translate configs of the library `adapters` to UniPeltConfig, or say why that is impossible."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from transformers.activations import ACT2FN

from scaleup.export.adapterhub.checkpoint import Checkpoint

MODEL_TYPES = ("bart", "bert", "roberta", "t5", "xlm-roberta")  # whose logits are compared in tests
ACTIVATIONS = {"swish": "silu", "leakyrelu": "leaky_relu"}  # other names for the same functions


@dataclasses.dataclass(frozen=True)
class Rule:
    """A field of a config that must have one value.

    Attributes:
        field: name of the field.
        value: the only value that converts.
        problem: what another value means, as the end of a sentence.
        applies: whether the rule applies to a config.
    """

    field: str
    value: Any
    problem: str
    applies: Callable[[dict[str, Any]], bool] = lambda config: True


def _in_line(config: dict[str, Any]) -> bool:
    return not config.get("is_parallel", False)


LAYERS = Rule("leave_out", [], "layers are left out, and scaleup adapts all of them")
BOTTLENECK = (
    Rule("mh_adapter", False, "there is a bottleneck behind the attention, where scaleup has none"),
    Rule("output_adapter", True, "there is no bottleneck at the feed-forward sublayer"),
    Rule("cross_adapter", False, "there is a bottleneck behind the cross attention"),
    Rule("inv_adapter", None, "there is an invertible adapter behind the embeddings"),
    Rule("phm_layer", False, "the bottleneck is a Compacter"),
    Rule("ln_before", False, "the bottleneck has a layer norm of its own"),
    Rule("ln_after", False, "the bottleneck has a layer norm of its own"),
    Rule("original_ln_after", True, "no layer norm follows the bottleneck"),
    Rule("original_ln_before", True, "the bottleneck reads the sublayer alone", _in_line),
    Rule("residual_before_ln", True, "the residual starts behind the layer norm", _in_line),
    LAYERS,
)
LORA = (
    Rule("selfattn_lora", True, "LoRA is not at the attentions"),
    Rule("intermediate_lora", False, "there is LoRA in the feed-forward sublayer"),
    Rule("output_lora", False, "there is LoRA in the feed-forward sublayer"),
    Rule("composition_mode", "add", "(IA)³ has no counterpart in scaleup"),
    Rule("use_dora", False, "DoRA has no counterpart in scaleup"),
    Rule("vera_d", None, "VeRA has no counterpart in scaleup"),
    Rule("vera_b", None, "VeRA has no counterpart in scaleup"),
    LAYERS,
)
PREFIX = (
    Rule("encoder_prefix", True, "the encoder has no prefix, and scaleup's is at every attention"),
    Rule("cross_prefix", True, "cross attentions have no prefix, and scaleup's is at every one"),
    Rule(
        "shared_gating",
        True,
        "keys and values of the prefix have different gates",
        lambda config: bool(config.get("use_gating")),
    ),
    LAYERS,
)

# Submodule → fields that its config must have.
FIELDS = {
    "lora": ("r", "alpha", "dropout"),
    "prefix": ("prefix_length", "flat", "non_linearity"),
    "adapter": ("scaling", "non_linearity"),
    "parallel_adapter": ("scaling", "non_linearity"),
}
SCALES = ("learned", "channel")  # scaling factors that are parameters


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value <= 65_536


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


# Field → whether a value of it is valid. Without this check, other values would count as true or
# become NaN.
VALUES: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        ("is_parallel", "use_gating", "flat", "shared_gating"),
        lambda value: isinstance(value, bool),
    ),
    **dict.fromkeys(("r", "prefix_length"), _is_count),
    "alpha": lambda value: _is_number(value) and 0 < value <= 1e6,
    "scaling": lambda value: value in SCALES or _is_number(value),
    "attn_matrices": lambda value: (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
    ),
}


def kind(method: dict[str, Any]) -> str | None:
    """Return the submodule that a method becomes, None if there is none."""
    architecture = method.get("architecture")
    if architecture is None:
        return "parallel_adapter" if method.get("is_parallel") else "adapter"
    return {"lora": "lora", "prefix_tuning": "prefix"}.get(str(architecture))


def by_submodule(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Return the configs of the methods by the submodules that they become."""
    return {kind(method) or "": method for method in checkpoint.methods}


def gated(checkpoint: Checkpoint) -> bool:
    """Return whether the methods have gates."""
    return any(method.get("use_gating") for method in checkpoint.methods)


def problems(checkpoint: Checkpoint, encoder_decoder: bool, attention: str | None) -> list[str]:
    """Return one sentence for each reason why a checkpoint cannot be converted exactly.

    Args:
        checkpoint: the checkpoint.
        encoder_decoder: whether the backbone has an encoder and a decoder.
        attention: the attn_implementation that the adapter was trained with, None if unknown.
    """
    found = []
    if checkpoint.model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        found.append(f"the backbone is a {checkpoint.model_type}; only {known} are supported")
    for method in checkpoint.methods:
        name = kind(method)
        if name is None:
            found.append(f"{method.get('architecture')} has no counterpart in scaleup")
        elif missing := [field for field in FIELDS[name] if field not in method]:
            found.append(f"adapter_config.json lacks {', '.join(missing)}")
        elif odd := _odd_values(name, method):
            found += odd
        elif name == "lora":
            found += _broken(LORA, method)
            matrices = method.get("attn_matrices", [])
            if sorted(matrices) != ["q", "v"]:
                found.append(
                    f"attn_matrices={matrices}: LoRA has to be at queries and values, ['q', 'v']"
                )
        elif name == "prefix":
            found += _broken(PREFIX if encoder_decoder else PREFIX[2:], method)
            found += [] if method["flat"] else _unknown_activation(method)
        else:
            found += _broken(BOTTLENECK, method)
            found += _unknown_activation(method)
    if len({bool(method.get("use_gating")) for method in checkpoint.methods}) > 1:
        found.append("use_gating: only some of the methods have gates; scaleup gates all or none")
    kinds = [kind(method) for method in checkpoint.methods]
    if len(set(kinds)) < len(kinds):
        found.append("two methods of one kind would become the same submodule")
    if checkpoint.model_type == "t5" and "parallel_adapter" in kinds:
        found.append(
            "is_parallel=True: in T5 this bottleneck reads what precedes the layer norm of the "
            "sublayer, and scaleup's reads what follows it"
        )
    if checkpoint.model_type == "bart" and "prefix" in kinds and attention != "eager":
        found.append(
            "a prefix in BART: with sdpa attention, its default, the library adapters shifts the "
            "decoder's causal mask by the prefix, which scaleup does not; if the adapter was "
            "trained with attn_implementation='eager', add --attention eager"
        )
    return list(dict.fromkeys(found))


def _odd_values(name: str, method: dict[str, Any]) -> list[str]:
    """Return one sentence for each field of a method that becomes `name` and has no valid value."""
    valid = VALUES | ({"dropout": _is_share} if name == "lora" else {})
    return [
        f"{field}={method[field]!r:.40} is not a valid value of this field"
        for field, is_valid in valid.items()
        if field in method and not is_valid(method[field])
    ]


def _broken(rules: tuple[Rule, ...], method: dict[str, Any]) -> list[str]:
    return [
        f"{rule.field}={method[rule.field]}: {rule.problem}"
        for rule in rules
        if method.get(rule.field, rule.value) != rule.value and rule.applies(method)
    ]


def activation(method: dict[str, Any]) -> str:
    """Return transformers' name of the nonlinearity of a method."""
    name = str(method.get("non_linearity")).lower()
    return ACTIVATIONS.get(name, name)


def _unknown_activation(method: dict[str, Any]) -> list[str]:
    if activation(method) in ACT2FN:
        return []
    return [f"non_linearity={method.get('non_linearity')}: transformers has no such function"]


def options(checkpoint: Checkpoint, sizes: dict[str, int]) -> dict[str, Any]:
    """Return the values of UniPeltConfig for a checkpoint without `problems`.

    Args:
        checkpoint: the checkpoint.
        sizes: bottleneck size of each of its bottleneck adapters.
    """
    methods = by_submodule(checkpoint)
    learned = gated(checkpoint)
    values: dict[str, Any] = {
        "submodules": list(methods),
        "gates": "learned" if learned else "none",
    }
    if learned:
        values["gate_pooling"] = "paper"  # its gates are means over all positions
    for name, size in sizes.items():
        values |= {f"{name}_size": size, f"{name}_activation": activation(methods[name])}
    pre_norm = checkpoint.model_type == "t5"
    if "adapter" in methods and pre_norm:
        values["adapter_input"] = "raw"
    if "prefix" in methods:
        values["prefix_length"] = methods["prefix"]["prefix_length"]
        values["prefix_reparameterization"] = "none"
        values["prefix_positions"] = "counted" if pre_norm else "none"
    if "lora" in methods:
        lora = methods["lora"]
        values |= {"r": lora["r"], "lora_alpha": lora["alpha"], "lora_dropout": lora["dropout"]}
        if learned:
            values["lora_gate_scope"] = "projection"
    return values
