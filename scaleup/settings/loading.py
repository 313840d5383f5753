"""Read config files: strict YAML, and overrides of the form `section.key=value`."""

import difflib
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from scaleup.errors import ConfigError, one_line

# Names of settings in other libraries → their names here.
SYNONYMS = {
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
    """Return a question that names the closest valid name, or nothing if none is close."""
    valid = list(valid)
    if SYNONYMS.get(name) in valid:
        return f"; did you mean {SYNONYMS[name]}?"
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def shown(value: Any) -> str:
    """Return a value as Python writes it, cut to 80 characters."""
    try:
        return f"{value!r:.80}"
    except ValueError:  # Python refuses to write integers of thousands of digits
        return "a very long number"


def validation_problem(error: Mapping[str, Any], valid: Iterable[str]) -> str:
    """Return one of pydantic's errors in plain words. `valid` has the names of the settings."""
    if error["type"] == "extra_forbidden":
        return f"unknown setting{nearest(str(error['loc'][-1]), valid)}"
    message = re.sub(r"^(Value error, |Input )", "", error["msg"])
    return message if error["type"] == "missing" else f"{message} (got {shown(error['input'])})"


def override(key: str, value: Any) -> str:
    """Return the word that sets `key` to exactly this value, in JSON, which is YAML on one line."""
    return f"{key}={json.dumps(value, ensure_ascii=False, default=str)}"


def flat(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return nested sections as `section.key` → value."""
    return {
        f"{section}.{key}": value
        for section, values in sections.items()
        for key, value in values.items()
    }


class Loader(yaml.SafeLoader):
    """YAML in which 5e-4 is a number and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping whose keys are unique; merge keys (<<) may still be overridden."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key} stands twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=True)


class Dumper(yaml.SafeDumper):
    """Writes what Loader reads: a text such as the commit "5e4" gets quotes."""


for _yaml in (Loader, Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )

# PyYAML lets these pass for values such as `!!int x`, `!!bool x`, `!!timestamp x`, 0:0:… and [[[….
_PARSER_ERRORS = (ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


def parse(text: str, source: str) -> Any:
    """Return the value of a YAML text. The message of a ConfigError names `source`."""
    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except (yaml.YAMLError, *_PARSER_ERRORS) as error:
        raise ConfigError(f"{source}: not valid YAML: {one_line(error)}") from None


def parse_file(path: str) -> Any:
    """Return the value of a YAML file.

    Raises:
        ConfigError: the file cannot be read or is not valid YAML.
    """
    try:
        return parse(pathlib.Path(path).read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}") from None


def read(
    path: str | None, overrides: Sequence[str], sections: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Read a config file and apply overrides.

    Args:
        path: YAML file; None: an empty config.
        overrides: words `section.key=value`.
        sections: names of the valid sections.

    Returns:
        The valid sections as nested dicts, and one sentence for each problem with their shape.

    Raises:
        ConfigError: the file cannot be read or is not a YAML mapping.
    """
    raw = {} if path is None else parse_file(path)
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        names = ", ".join(sections)
        raise ConfigError(f"{path}: expected sections {names}, found {type(raw).__name__}")
    config: dict[str, dict[str, Any]] = {}
    problems = []
    for name, section in raw.items():
        if name == "method" and isinstance(section, str):
            section = {"name": section}  # `method: full` is short for `method: {name: full}`
        if name not in sections:
            problems.append(_unknown_section(str(name), str(name), sections))
        elif section is not None and not isinstance(section, dict):
            problems.append(f"{name}: expected settings, found {shown(section)}")
        else:
            config[name] = {str(key): value for key, value in (section or {}).items()}
    for word in overrides:
        key, equals, text = word.partition("=")
        key = "method.name" if key == "method" else key
        section, _, field = key.partition(".")
        if not equals or not field:
            problems.append(f"{word}: overrides look like section.key=value")
        elif section not in sections:
            problems.append(_unknown_section(key, section, sections))
        else:
            try:
                config.setdefault(section, {})[field] = parse(text, key)
            except ConfigError as error:
                problems += error.problems
    return config, problems


def _unknown_section(key: str, name: str, sections: Sequence[str]) -> str:
    known = ", ".join(sections)
    return f"{key}: unknown section{nearest(name, sections)} (sections: {known})"
