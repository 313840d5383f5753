"""The model card of an exported folder, from what is known of the run; what is not known is said."""

import pathlib

import yaml

from scaleup.settings.schema import Settings
from scaleup.training.checkpoint import Manifest

LOADING = {
    "exact": """import scaleup
from peft import PeftModel
from transformers import {auto}

model = PeftModel.from_pretrained({auto}.from_pretrained("{backbone}"{labels}), "THIS FOLDER")""",
    "plain": """from transformers import {auto}

model = {auto}.from_pretrained("THIS FOLDER")""",
    "code": """from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("THIS FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER", trust_remote_code=True)""",
}


def backbone_licence(name: str) -> str | None:
    """`license` in the front matter of a local model's README.md; None if there is none to read."""
    path = pathlib.Path(name, "README.md")
    if not path.is_file():
        return None
    parts = path.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        values = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    found = values.get("license") if isinstance(values, dict) else None
    return str(found) if found else None


def card(settings: Settings, manifest: Manifest, report: dict, auto: str) -> str:
    """README.md. `report`: what export.json holds; `auto`: transformers' class for the task."""
    model, licence = settings.model, backbone_licence(settings.model.name)
    front = {
        "base_model": manifest.backbone["name"],
        "library_name": "peft" if report["kind"] == "exact" else "transformers",
        "tags": ["unipelt", "scaleup"],
    }
    front |= {"license": licence} if licence else {}
    labels = (
        f", num_labels={len(manifest.labels)}"
        if manifest.labels
        else ", num_labels=1"
        if manifest.task == "regression"
        else ""
    )
    code = LOADING[
        "exact" if report["kind"] == "exact" else "code" if report["remote_code"] else "plain"
    ].format(auto=auto, backbone=model.name, labels=labels)
    sets = "\n".join(
        f"- {source['split']}: {source.get('hub_id', 'own file')}, {source['rows']} rows"
        for source in manifest.data
    )
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {pathlib.Path(manifest.backbone["name"]).name} tuned with UniPELT

Exported by scaleup {report["versions"]["scaleup"]} as `{report["kind"]}`, gates {report["gates"]}.

```python
{code}
```

- Backbone: {manifest.backbone["name"]}, revision {manifest.backbone["revision"] or "not named"}, frozen weights while training: {manifest.backbone["quantization"]}.
- Licence of the backbone: {licence or "not found beside its weights; look it up before you pass this folder on"}.
- Task: {manifest.task}{"; labels " + ", ".join(manifest.labels) if manifest.labels else ""}.
- Method: {", ".join(f"{key} {value}" for key, value in manifest.method.items())}.

## Data

{sets}

## Scores

{_scores(report)}
"""


def _scores(report: dict) -> str:
    proof = report.get("proof")
    if proof is None:
        return "Not measured (exported with --no-verify)."
    metric, off = proof["metric"], proof["logit_difference"]
    agreement = (
        ""
        if proof["agreement"] is None
        else f" {100 * proof['agreement']:.1f}% of the predictions are the same."
    )
    return (
        f"{metric['name']} on {proof['data']} ({proof['examples']} examples): {metric['before']:.2f} before the export, {metric['after']:.2f} after it. Logits moved by at most "
        f"{off['max']:.2g}.{agreement} Everything else is in export.json."
    )
