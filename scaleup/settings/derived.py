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


class Section(BaseModel):
    """Base of the sections: no unknown keys, no infinities, and a truth value is no number."""

    model_config = ConfigDict(
        extra="forbid", validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_as_number(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        hint = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in _alternatives(hint):
            raise ValueError("should be a number or a text, not yes or no")
        if isinstance(value, dict) and (text := misread_text(value)) is not None:
            raise ValueError(f"{text!r} is a text; write numbers plainly, and true or false")
        return value


def _alternatives(hint: Any) -> set[Any]:
    """Return the types of a union, however nested."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return {hint}
    return set().union(*map(_alternatives, typing.get_args(hint)))


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
    for name, bound in {"at_least": "ge", "above": "gt", "below": "lt"}.items():
        if name in rule:
            values[bound] = rule[name]
    return hint, Field(**values)


def trainer_fields(excluded: typing.Container[str]) -> dict[str, Any]:
    """Return the other fields of TrainingArguments that a user may set, as optional fields."""
    hints = typing.get_type_hints(TrainingArguments)
    return {
        field.name: (
            _only_enumeration(hints[field.name]) | None,
            Field(None, description="transformers.TrainingArguments"),
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
