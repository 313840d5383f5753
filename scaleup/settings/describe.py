"""Descriptions of every setting: the help text and the JSON schema."""

import json
import textwrap
import typing
from typing import Any

from scaleup.settings.schema import SECTIONS, DeclaredTrainSettings, MethodSettings, Settings


def describe(columns: int = 100) -> str:
    """Describe every setting with its default, by section, in lines of at most `columns`."""
    lines = []
    for name, cls in SECTIONS.items():
        lines += ["", *textwrap.wrap(f"{name}: {cls.__doc__}", columns)]
        fields = (DeclaredTrainSettings if name == "train" else cls).model_fields
        for field, info in fields.items():
            default = "" if info.default is None else f" [{info.get_default()}]"
            lines.append(f"  {name}.{field}{default}")
            indent = " " * 6
            lines += textwrap.wrap(
                info.description or "", columns, initial_indent=indent, subsequent_indent=indent
            )
    return "\n".join(lines)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a config file, for editors (configs/schema.json)."""
    schema = Settings.model_json_schema()
    schema = json.loads(json.dumps(schema).replace("\\n", " "))  # descriptions of several lines
    names = typing.get_args(MethodSettings.model_fields["name"].annotation)
    schema["properties"]["method"] = {
        "anyOf": [schema["properties"]["method"], {"type": "string", "enum": list(names)}]
    }
    return schema | {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "scaleup run",
    }
