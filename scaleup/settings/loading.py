"""Read config files: strict YAML, and overrides of the form `section.key=value`."""

import difflib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from scaleup.errors import ConfigError, one_line
from scaleup.io import read_bytes

# Names of settings in other libraries → their names here.
SYNONYMS = {
    "lr": "learning_rate",
    "rank": "r",
    "lora_r": "r",
    "lora_rank": "r",
    "alpha": "lora_alpha",
    "rslora": "use_rslora",
    "target_modules": "lora_targets",
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


# What pydantic calls a valid integer, string, … → plain words.
KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "a text",
    "list": "a list",
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
    if error["type"] == "string_type" and isinstance(error["input"], dict):
        message += "; a text that begins with { needs quotes"
    return message if error["type"] == "missing" else f"{message} (got {shown(error['input'])})"


def alternatives_problem(errors: Sequence[Mapping[str, Any]]) -> str | None:
    """Return pydantic's errors about the alternatives of one setting as one sentence.

    Return None if the errors are about several values, as about the items of a list.
    """
    parts = []
    for error in errors:
        _, should_be, part = error["msg"].partition("should be ")
        if not should_be or shown(error["input"]) != shown(errors[0]["input"]):
            return None
        kind = re.match(r"a valid (\w+)", part)
        parts.append(KINDS.get(kind[1], part) if kind else part.replace("'", ""))
    return f"must be {' or '.join(dict.fromkeys(parts))}; got {shown(errors[0]['input'])}"


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


MOST_BYTES = 256 * 1024  # of a config file
MOST_DIGITS = 3000  # Python writes no decimal number of more than 4300 digits
MOST_VALUES = 100_000  # of a YAML text in which every alias is replaced by what it stands for

INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*|0x[0-9a-fA-F]+)")
FLOAT = re.compile(
    r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
# The plain words that are no text, as in YAML 1.2: type → pattern and possible first characters.
PLAIN = {
    "null": (re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    "int": (INTEGER, list("-+0123456789")),
    "float": (FLOAT, list("-+.0123456789")),
    "merge": (re.compile(r"<<"), ["<"]),
}
# Texts that YAML 1.1 and many readers take for truth values or numbers.
MISREAD = re.compile(r"(?i)yes|no|on|off|[-+]?[0-9][0-9_:]*")


class Loader(yaml.SafeLoader):
    """A strict reader of YAML.

    Plain words have the types of YAML 1.2: 5e-4 is a number, and 0100, 1_000, 1:30, yes, no and
    dates are texts. A key that stands twice is an error, and so are aliases that multiply.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # not those of YAML 1.1, which PyYAML has

    def get_single_node(self) -> yaml.Node | None:
        """Return the root of the text; refuse aliases that stand for too many values."""
        root = super().get_single_node()
        if root is not None and _count_values(root, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"its aliases (*name) stand for more than {MOST_VALUES:,} values")
        return root

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Return a text in which two halves of a surrogate pair, as JSON spells them, are one."""
        value = super().construct_scalar(node)
        try:
            return value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise yaml.MarkedYAMLError(
                problem="a text has half of a surrogate pair", problem_mark=node.start_mark
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping whose keys are unique; merge keys (<<) may still be overridden."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key} appears twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=True)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Return an integer, also one with the tag !!int, for which PyYAML reads 0100 as 64."""
        if len(node.value) > MOST_DIGITS:
            raise yaml.YAMLError(f"a number has more than {MOST_DIGITS:,} digits")
        if not INTEGER.fullmatch(node.value):
            raise yaml.MarkedYAMLError(
                problem=f"{node.value:.80} is not an integer", problem_mark=node.start_mark
            )
        return int(node.value, 16 if "x" in node.value else 10)


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """Count the values of a YAML node in which every alias is replaced by what it stands for.

    Args:
        counts: counts of the nodes that have been visited, by their ids. It is updated.
    """
    if id(node) not in counts:
        counts[id(node)] = 0  # a node that contains itself is refused later
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        parts = itertools.chain(*parts) if isinstance(node, yaml.MappingNode) else parts
        counts[id(node)] = 1 + sum(_count_values(part, counts) for part in parts)
    return counts[id(node)]


class Dumper(yaml.SafeDumper):
    """Writes what Loader reads, with quotes where other readers would need them."""


for _name, (_pattern, _first) in PLAIN.items():
    Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern.pattern})\\Z"), _first
    )
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(f"(?:{FLOAT.pattern})\\Z"), PLAIN["float"][1]
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
        return parse(read_bytes(path, MOST_BYTES).decode("utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}") from None


def misread_text(value: Any) -> str | None:
    """Return the first text in a nested value that may have been meant as another type."""
    if isinstance(value, str):
        return value if MISREAD.fullmatch(value) else None
    parts = value.values() if isinstance(value, dict) else value
    texts = map(misread_text, parts) if isinstance(value, dict | list) else ()
    return next(filter(None, texts), None)


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
            file = path is None and not equals and word.endswith((".yaml", ".yml"))
            advice = f"; did you mean --config {word}?" if file else ""
            problems.append(f"{word}: overrides look like section.key=value{advice}")
        elif section not in sections:
            problems.append(_unknown_section(key, section, sections))
        else:
            try:
                config.setdefault(section, {})[field] = parse(text, key)
            except ConfigError as error:
                advice = ""
                if text[:1] in ("{", "["):
                    advice = f"; a text that begins with {text[0]} needs quotes: {key}='\"…\"'"
                problems += [f"{problem}{advice}" for problem in error.problems]
    return config, problems


def _unknown_section(key: str, name: str, sections: Sequence[str]) -> str:
    known = ", ".join(sections)
    return f"{key}: unknown section{nearest(name, sections)} (sections: {known})"
