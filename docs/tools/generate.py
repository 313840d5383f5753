"""Write the pages in docs/ that are derived from the code; with --check, only compare them.

python docs/tools/generate.py [--check]
"""

import argparse
import json
import pathlib
import sys
from typing import Any

DOCS = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(DOCS.parent))

from scaleup.settings.describe import json_schema  # noqa: E402

PASSED_THROUGH = "transformers.TrainingArguments"
INTRODUCTION = """# Configuration

<!-- Written by docs/tools/generate.py from scaleup/settings/schema.py: `make docs-pages`. -->

A run is described by a YAML file with the four sections below. On the command line,
`section.key=value` overrides the file, and the value is read as YAML. `null` stands for "not set".
Values have the types of YAML 1.2: `0100` is one hundred, not an octal number, and `yes` stays text
where text is expected.
Unknown keys, wrong types, combinations that cannot work and settings without effect are all
reported at once, before a model is loaded.

```bash
scaleup train --config configs/quickstart.yaml --print-config train.seed=7   # the resolved settings
scaleup train --help                                                         # this list
```

`configs/schema.json` is the same list as a JSON schema, with which editors complete and check YAML
files. `method: full` and `method: bitfit` are short for a section with that `name`.
"""


def _type_name(schema: dict[str, Any]) -> str:
    """Return a short name for the type of a JSON schema, with its bounds."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type_name(part) for part in schema["anyOf"]))
    if "$ref" in schema:
        return "mapping"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {_type_name(schema.get('items', {}))}"
    names = {"string": "text", "boolean": "true or false", "integer": "integer", "null": "null"}
    name = names.get(schema.get("type", ""), schema.get("type", "any"))
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]}" for key, sign in bounds.items() if key in schema]
    return " ".join([name, ", ".join(limits)]).strip()


def _section(name: str, schema: dict[str, Any]) -> list[str]:
    """Return the lines of one section: its own keys as a table, passed-through keys as a list."""
    own = {k: v for k, v in schema["properties"].items() if v["description"] != PASSED_THROUGH}
    lines = ["", f"## `{name}`", "", schema["description"].strip(), ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, value in own.items():
        default = json.dumps(value["default"], ensure_ascii=False) if "default" in value else ""
        cells = [
            f"`{key}`",
            _type_name(value),
            f"`{default}`",
            value["description"].replace("<", "&lt;"),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    passed = [f"`{key}`" for key in schema["properties"] if key not in own]
    if passed:
        lines += [
            "",
            "The following fields of transformers' `TrainingArguments` may be set here as well. "
            "They have the meaning that transformers documents.",
            "",
            ", ".join(passed) + ".",
        ]
    return lines


def configuration() -> str:
    """Return the page docs/configuration.md."""
    schema = json_schema()
    lines = [INTRODUCTION.rstrip()]
    for name, section in schema["properties"].items():
        options = section.get("anyOf", [section])
        reference = next(option["$ref"] for option in options if "$ref" in option)
        lines += _section(name, schema["$defs"][reference.rpartition("/")[2]])
    return "\n".join(lines) + "\n"


PAGES = {DOCS / "configuration.md": configuration}


def main() -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if stale")
    check = parser.parse_args().check
    stale = 0
    for path, page in PAGES.items():
        text = page()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale += 1
            print(f"{path}: " + ("not current; run `make docs-pages`" if check else "written"))
            if not check:
                path.write_text(text, encoding="utf-8")
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
