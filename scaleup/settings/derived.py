"""Settings that are declared elsewhere: UniPeltConfig's and those of transformers' Trainer."""

import dataclasses
import enum
import types
import typing
from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field
from transformers import TrainingArguments

from scaleup.settings.loading import misread_text
from scaleup.settings.rules import MANAGED
from scaleup.unipelt.config import CommonOptions
from scaleup.unipelt.submodules import SUBMODULES

MOST = 10**9  # of anything that is counted: examples, steps, tokens

# Bounds of numbers of TrainingArguments, most of which Trainer does not check.
BOUNDS: dict[str, dict[str, Any]] = {
    "adam_beta1": {"ge": 0, "lt": 1},
    "adam_beta2": {"ge": 0, "lt": 1},
    "adam_epsilon": {"gt": 0, "le": 1},  # with 0, a gradient of 0 gives an update of 0/0
    "max_grad_norm": {"ge": 0, "le": 1e6},
    "label_smoothing_factor": {"ge": 0, "lt": 1},
    "neftune_noise_alpha": {"ge": 0, "le": 1000},
    "torch_empty_cache_steps": {"ge": 1, "le": MOST},
    "eval_steps": {"gt": 0, "le": MOST},
    "eval_delay": {"ge": 0, "le": MOST},
    "eval_accumulation_steps": {"ge": 1, "le": MOST},
    "save_steps": {"gt": 0, "le": MOST},
    "dataloader_num_workers": {"ge": 0, "le": 1024},
    "dataloader_prefetch_factor": {"ge": 1, "le": 1024},
    "ddp_bucket_cap_mb": {"ge": 1, "le": 65_536},
    "ddp_timeout": {"ge": 1, "le": 10_000_000},
}


class Section(BaseModel):
    """Base of the sections: no unknown keys, no infinities, and a truth value is not a number."""

    model_config = ConfigDict(
        extra="forbid", validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_as_number(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        hint = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in alternatives(hint):
            raise ValueError("should be a number or a text, not yes or no")
        if isinstance(value, dict) and (text := misread_text(value)) is not None:
            raise ValueError(f"{text!r} is a text; write numbers plainly, and true or false")
        return value


def alternatives(hint: Any) -> set[Any]:
    """Return the types of a union, however nested."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return {hint}
    return set().union(*map(alternatives, typing.get_args(hint)))


def method_fields() -> dict[str, Any]:
    """Return the options of UniPeltConfig as fields of pydantic, with all that they declare."""
    fields: dict[str, Any] = {}
    for group in (CommonOptions, *(submodule.options for submodule in SUBMODULES.values())):
        hints = typing.get_type_hints(group)
        for option in dataclasses.fields(group):
            fields[option.name] = _field_of_option(option, hints[option.name])
    names: Any = Literal[tuple(SUBMODULES)]
    description = f"Any subset of {', '.join(SUBMODULES)}."
    default = fields["submodules"][1].get_default(call_default_factory=True)
    fields["submodules"] = (list[names], Field(default, min_length=1, description=description))
    return fields


def _field_of_option(option: dataclasses.Field[Any], hint: Any) -> tuple[Any, Any]:
    rule = option.metadata
    if rule["choices"]:
        choices: Any = Literal[tuple(rule["choices"])]
        hint = choices | None if option.default is None else choices
    values: dict[str, Any] = {"default": option.default, "description": rule["description"]}
    if option.default is dataclasses.MISSING:
        del values["default"]
        values["default_factory"] = option.default_factory
    bounds = {"at_least": "ge", "above": "gt", "below": "lt", "at_most": "le"}
    for name, bound in bounds.items():
        if name in rule:
            values[bound] = rule[name]
    return hint, Field(**values)


def trainer_fields(excluded: typing.Container[str]) -> dict[str, Any]:
    """Return the other fields of TrainingArguments that a user may set.

    Their default None stands for Trainer's own. A user can only set it where Trainer takes it.
    """
    hints = typing.get_type_hints(TrainingArguments)
    return {
        field.name: (
            _only_enumeration(hints[field.name]),
            Field(
                None,
                description="transformers.TrainingArguments",
                validate_default=False,
                **BOUNDS.get(field.name, {}),
            ),
        )
        for field in dataclasses.fields(TrainingArguments)
        if field.init
        and not field.name.startswith("_")
        and field.name not in excluded
        and field.name not in MANAGED
    }


def _only_enumeration(hint: Any) -> Any:
    """Return the enumeration of a hint like `SchedulerType | str`, which would take any text."""
    kinds = typing.get_args(hint)
    enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, enum.Enum)]
    return enums[0] if enums and str in kinds else hint
