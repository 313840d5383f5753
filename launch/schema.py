"""Writes configs/schema.json, from which an editor completes and checks the YAML configs. `make schema` after a changed setting."""

import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scaleup.settings.schema import json_schema  # noqa: E402 (the checkout need not be installed)

path = ROOT / "configs" / "schema.json"
draft = path.with_suffix(".json.new")
draft.write_text(json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
draft.replace(path)
print(f"{path}: written")
