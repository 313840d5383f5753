"""Reading a config file: YAML in which 5e-4 is a number and no key stands twice, and `section.key=value` overrides."""

import difflib
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from scaleup.errors import ConfigError

# What other libraries call it.
KNOWN_AS = {
    "lr": "learning_rate",
    "rank": "r",
    "lora_r": "r",
    "lora_rank": "r",
    "alpha": "lora_alpha",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "bottleneck": "adapter_size",
    "bottleneck_size": "adapter_size",
    "num_virtual_tokens": "prefix_length",
    "pooling": "gate_pooling",
    "model_name_or_path": "name",
    "dataset": "name",
}


def nearest(name: str, valid: Iterable[str]) -> str:
    """A question that names the closest valid name; empty if none is close."""
    valid = list(valid)
    close = (
        [KNOWN_AS[name]]
        if KNOWN_AS.get(name) in valid
        else difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    )
    return f"; did you mean {close[0]}?" if close else ""


def shown(value: Any) -> str:
    """A value as Python writes it, cut; Python refuses to write integers of thousands of digits."""
    try:
        return f"{value!r:.80}"
    except ValueError:
        return "a very long number"


def override(key: str, value: Any) -> str:
    """The word of a command line that sets `key` to just this value, whatever YAML would make of its characters. JSON is YAML on one line."""
    return f"{key}={json.dumps(value, ensure_ascii=False, default=str)}"


def flat(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`section.key` → value."""
    return {
        f"{section}.{key}": value
        for section, values in sections.items()
        for key, value in values.items()
    }


class Loader(yaml.SafeLoader):
    """YAML where 5e-4 is a number and a key given twice is an error."""


class Dumper(yaml.SafeDumper):
    """Writes what Loader reads: the text "5e-4", a commit say, gets quotes."""


for _yaml in (Loader, Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def _no_duplicates(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, Any]:
    seen = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = str(loader.construct_object(key_node, deep=True))
        if key in seen:
            raise yaml.MarkedYAMLError(
                problem=f"the key {key} stands twice", problem_mark=key_node.start_mark
            )
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


Loader.add_constructor("tag:yaml.org,2002:map", _no_duplicates)


def parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader)  # noqa: S506 (a SafeLoader)
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        # Beyond its own error PyYAML lets through what Python raises for `!!int x`, `!!bool x`, `!!timestamp x`, 0:0:… and [[[[….
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def read(
    path: str | None, overrides: Sequence[str], sections: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """The file and the overrides as nested dicts, and what is wrong with their shape.

    Raises ConfigError for a file that cannot be read or is not YAML: nothing else can be said of it.
    """
    raw: Any = {}
    if path is not None:
        try:
            raw = parse(pathlib.Path(path).read_text(encoding="utf-8"), path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{path}: cannot be read: {error.strerror if isinstance(error, OSError) else 'not UTF-8 text'}"
            ) from None
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path}: expected sections {', '.join(sections)}, found {type(raw).__name__}"
        )
    problems = []
    if isinstance(raw.get("method"), str):  # `method: full` is short for `method: {name: full}`
        raw["method"] = {"name": raw["method"]}
    for name in list(raw):
        if name not in sections:
            problems.append(
                f"{name}: unknown section{nearest(str(name), sections)} (sections: {', '.join(sections)})"
            )
            del raw[name]
        elif raw[name] is None:
            raw[name] = {}
        elif not isinstance(raw[name], dict):
            problems.append(f"{name}: expected settings, found {shown(raw[name])}")
            del raw[name]
        else:
            raw[name] = {str(key): value for key, value in raw[name].items()}
    for item in overrides:
        key, sign, text = item.partition("=")
        section, dot, field = key.partition(".")
        if section == "method" and not dot and sign:
            field, dot = "name", "."
        if not sign or not dot or not field:
            problems.append(f"{item}: overrides look like section.key=value")
        elif section not in sections:
            problems.append(
                f"{key}: unknown section{nearest(section, sections)} (sections: {', '.join(sections)})"
            )
        else:
            try:
                raw.setdefault(section, {})[field] = parse(text, key)
            except ConfigError as error:
                problems += error.problems
    return raw, problems
