"""Files that finished runs leave, for tests of reports."""

import csv
import json
import pathlib
import re

import yaml

METHODS = {
    "full": {"name": "full"},
    "bitfit": {"name": "bitfit"},
    "adapter": {"name": "unipelt", "submodules": ["adapter"], "gates": "none", "adapter_size": 48},
    "prefix": {"name": "unipelt", "submodules": ["prefix"], "gates": "none"},
    "lora": {"name": "unipelt", "submodules": ["lora"], "gates": "none", "lora_alpha": 16, "r": 8},
    "ap": {"name": "unipelt", "submodules": ["adapter", "prefix"], "gates": "learned"},
    "apl": {"name": "unipelt", "submodules": ["adapter", "prefix", "lora"], "gates": "learned"},
    "ap_nogate": {"name": "unipelt", "submodules": ["adapter", "prefix"], "gates": "none"},
}
METHODS |= {f"{name}_frozen": METHODS[name] | {"head": "frozen"} for name in ("prefix", "lora")}
METRICS = {"cola": "matthews", "mrpc": "f1"}


def leave_run(
    folder: pathlib.Path,
    task: str,
    k,
    method: str,
    seed: int,
    test: float,
    dev: float = 0.5,
    model: str = "tiny",
    **changes,
) -> pathlib.Path:
    """Write what a finished run leaves, as far as a report reads it."""
    described, metric = METHODS[method] | changes, METRICS.get(task, "accuracy")
    out = folder / f"{task}-{k}-{'-'.join([method, *map(str, changes.values())])}-{seed}"
    out.mkdir(parents=True)
    stored = 2000 if method == "full" else 150
    results = {
        "task": task,
        "metric": metric,
        "test": {metric: test},
        "dev": {metric: dev},
        "test_is_dev": k == "all",
        "method": described,
        "gates": {},
        "seeds": {"data": seed, "train": seed},
        "examples": {"train": k if k != "all" else 3000},
        "parameters": {"stored": stored, "stored_percent": stored / 20},
    }
    (out / "results.json").write_text(json.dumps(results))
    settings = {
        "model": {"name": model},
        "data": {"name": task, "k": k, "seed": seed, "max_length": 64},
        "train": {"seed": seed},
    }
    (out / "config.yaml").write_text(yaml.safe_dump(settings))
    (out / "timing.json").write_text('{"seconds": 3.0, "peak_memory_mib": 10}')
    return out


def read_cells(path: pathlib.Path) -> dict[tuple[str, str, str, str], dict[str, str]]:
    """Return (block, row, source, column) -> the line of a table's CSV."""
    return {
        (line["block"], line["row"], line["source"], line["column"]): line
        for line in csv.DictReader(path.open())
    }


def squeeze(markdown: str) -> str:
    """Remove the spaces that align the columns of a Markdown table."""
    return re.sub(" +", " ", markdown)
