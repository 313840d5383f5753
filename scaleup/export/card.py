"""The model card of an exported folder."""

import pathlib
from typing import Any

import yaml

from scaleup.backbone.loading import HEADS_WITHOUT_CLASSES, load_config
from scaleup.backbone.tokenizer import pad_tokens
from scaleup.data.classification import role_columns
from scaleup.errors import ConfigError
from scaleup.export.kinds import KINDS
from scaleup.export.report import Export, ExportReport, Proof
from scaleup.settings.loading import parse

LOAD_ADAPTER = """import scaleup
from peft import PeftModel
from transformers import {auto}

model = PeftModel.from_pretrained({auto}.from_pretrained("{backbone}"{changes}), "THIS FOLDER")"""
LOAD_LORA = LOAD_ADAPTER.removeprefix("import scaleup\n")
LOAD_PLAIN = """from transformers import {auto}

model = {auto}.from_pretrained("THIS FOLDER")"""
LOAD_REMOTE_CODE = """from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("THIS FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER", trust_remote_code=True)"""


# What the hub calls the tasks.
PIPELINES = {
    "sequence_classification": "text-classification",
    "regression": "text-classification",
    "multi_label_classification": "text-classification",
    "token_classification": "token-classification",
    "question_answering": "question-answering",
    "seq2seq": "text2text-generation",
    "causal_lm": "text-generation",
}


def backbone_licence(name: str) -> str | None:
    """Return `license` in the front matter of a local model's README.md, None if there is none."""
    path = pathlib.Path(name, "README.md")
    if not path.is_file():
        return None
    parts = path.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        values = parse(parts[1], str(path))
    except ConfigError:
        return None
    licence = values.get("license") if isinstance(values, dict) else None
    return str(licence) if licence else None


def card(export: Export, report: ExportReport) -> str:
    """Return the text of README.md."""
    settings, manifest = export.settings, export.manifest
    backbone = manifest.backbone
    licence = backbone_licence(settings.model.name)
    front: dict[str, Any] = {
        "base_model": None if pathlib.Path(settings.model.name).exists() else backbone["name"],
        "library_name": "peft" if KINDS[report.kind].with_peft else "transformers",
        "tags": ["unipelt", "scaleup"],
        "pipeline_tag": PIPELINES[manifest.task],
    } | ({"license": licence} if licence else {})
    if report.proof is not None:
        front |= _index(export, report.proof)
    front = {key: value for key, value in front.items() if value is not None}
    outputs = len(manifest.labels or []) or HEADS_WITHOUT_CLASSES.get(manifest.task)
    changes = f", num_labels={outputs}" if outputs else ""
    if manifest.task == "multi_label_classification":
        changes += f', problem_type="{manifest.task}"'
    config = load_config(settings.model)
    head = export.auto.__name__.removeprefix("AutoModel")
    has_head = any(name.endswith(head) for name in config.architectures or [])
    if outputs and has_head and config.num_labels != outputs:  # the adapter has the right one
        changes += ", ignore_mismatched_sizes=True"
    if outputs and not pad_tokens(config):
        changes += f", pad_token_id={export.tokenizer.pad_token_id}"
    code = LOAD_REMOTE_CODE if report.remote_code else LOAD_PLAIN
    code = {"exact": LOAD_ADAPTER, "lora": LOAD_LORA}.get(report.kind, code)
    task = manifest.task + ("; labels " + ", ".join(manifest.labels) if manifest.labels else "")
    sets = [
        f"- {source['split']}: {source.get('hub_id', 'own file')}, "
        + (f"{source['rows']} rows" if "rows" in source else "read as a stream")
        for source in manifest.data
    ]
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {pathlib.Path(str(backbone["name"])).name} tuned with UniPELT

Exported by scaleup {report.versions["scaleup"]} as `{report.kind}`, gates {report.gates}.

```python
{code.format(auto=export.auto.__name__, backbone=settings.model.name, changes=changes)}
```

- Backbone: {backbone["name"]}, revision {backbone["revision"] or "not named"}.
- Frozen weights while training: {backbone["quantization"]}.
- Licence of the backbone: {licence or "not stated beside its weights; look it up before sharing"}.
- Task: {task}.{_inputs(export)}
- Method: {", ".join(f"{key} {value}" for key, value in manifest.method.items())}.

## Data

{chr(10).join(sets)}

## Scores

{_scores(report)}
"""


def _index(export: Export, proof: Proof) -> dict[str, Any]:
    """Return the scores as the hub reads them."""
    manifest, metric = export.manifest, proof.metric
    ids = [source["hub_id"] for source in manifest.data if "hub_id" in source]
    name = export.settings.data.name or (ids[0] if ids else "own data")
    result = {
        "task": {"type": PIPELINES[manifest.task]},
        "dataset": {"name": f"{name}, {proof.data}", "type": ids[0] if ids else "own"},
        "metrics": [{"type": metric.name, "value": metric.after}],
    }
    backbone = pathlib.Path(str(manifest.backbone["name"])).name
    index = [{"name": f"{backbone} tuned with UniPELT", "results": [result]}]
    return {"metrics": [metric.name], "model-index": index}


def _inputs(export: Export) -> str:
    """Return how an input is made of its texts, if there is more than one way."""
    data = export.settings.data
    if data.prompt_template != type(data).model_fields["prompt_template"].default:
        return f"\n- Inputs: made of a text by the template `{data.prompt_template!r}`."
    answers = data.resolved_task == "question_answering"
    if not answers and "text_pair" not in role_columns(data):
        return ""
    names = "question, context" if answers else "text, text_pair"
    joined = export.tokenizer.decode(export.tokenizer("one", "two")["input_ids"])
    return (
        f"\n- Text pairs: `tokenizer({names})` with the tokenizer of this folder joins them as in "
        f"training. It turns `one` and `two` into `{joined!r}`."
    )


def _scores(report: ExportReport) -> str:
    proof = report.proof
    if proof is None:
        return "Not measured (exported with --no-verify)."
    metric, agreement = proof.metric, ""
    if proof.agreement is not None:
        agreement = f" {100 * proof.agreement:.1f}% of the predictions are the same."
    before, after = metric.shown
    return (
        f"{metric.name} on {proof.data} ({proof.examples} examples): {before} before "
        f"the export, {after} after it. Logits moved by at most "
        f"{proof.logit_difference['max']:.2g}.{agreement} export.json has all measurements."
    )
