"""Exports without code of their own: the effect of UniPELT absorbed into low-rank updates.

plain   a model of the backbone's own class, with the updates in its weights
lora    the updates as a LoRA adapter of PEFT, for engines that load adapters
"""

import functools
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import datasets
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from scaleup.export.distill import DistillJob, Fit
from scaleup.export.evaluation import BATCH, Evaluation
from scaleup.export.fold import Folded
from scaleup.export.low_rank import read_updates
from scaleup.export.report import Absorption, Export
from scaleup.unipelt.model import PEFT_PREFIX, submodule_of


def fit_updates(evaluation: Evaluation, path: pathlib.Path) -> Absorption:
    """Fit updates to the trained model on training examples, and write them to a file."""
    options = evaluation.options
    rows, count = evaluation.examples.train, options.resolved_examples
    if isinstance(rows, datasets.Dataset) and len(rows) > count:
        rows = rows.shuffle(seed=0)
    rows = list(itertools.islice(iter(rows), count))
    trained = len(rows)
    if trained < count:
        rows += list(evaluation.unused_rows(count - trained) or [])
    collate = evaluation.module.collator(evaluation.tokenizer, evaluation.data)
    batches = [dict(collate(rows[start : start + BATCH])) for start in range(0, len(rows), BATCH)]
    batches_file = evaluation.work / "training.pt"
    torch.save(batches, batches_file)
    job = evaluation.trained_job(
        DistillJob,
        "fit",
        batches=str(batches_file),
        updates=str(path),
        rank=options.rank,
        epochs=options.epochs,
    )
    fit = evaluation.run_process("fit", ["-P", "-m", "scaleup.export.distill"], job, Fit)
    return Absorption(
        rank=options.rank,
        examples=len(rows),
        unused=len(rows) - trained,
        unexplained={name: round(share, 6) for name, share in fit.unexplained.items()},
        losses=[float(f"{loss:.4g}") for loss in fit.losses],
    )


def folded(export: Export, path: pathlib.Path) -> Folded:
    """Return the updates as changes of the backbone's weights."""
    updates: dict[str, Callable[[], torch.Tensor]] = {
        f"{name}.weight": functools.partial(torch.matmul, B_OR, A_RI)
        for name, (A_RI, B_OR) in read_updates(path).items()
    }
    return Folded(None, _head(export), updates, {})


def _head(export: Export) -> dict[str, torch.Tensor]:
    """Return the tensors of the run that belong to no submodule."""
    return {name: t for name, t in export.tensors.items() if submodule_of(name) is None}


def write_lora(export: Export, empty: nn.Module, path: pathlib.Path, folder: pathlib.Path) -> int:
    """Write the updates as a LoRA adapter of PEFT, and return the bytes of its weights."""
    updates, head = read_updates(path), _head(export)
    saved = [name for name in export.adapter.modules_to_save or [] if _has(head, name)]
    rank = max(len(A_RI) for A_RI, _ in updates.values())
    narrow = {name: len(A_RI) for name, (A_RI, _) in updates.items() if len(A_RI) != rank}
    config = LoraConfig(
        task_type=export.adapter.task_type,
        base_model_name_or_path=str(export.manifest.backbone["name"]),
        r=rank,
        lora_alpha=rank,  # so that the update is exactly B A
        rank_pattern=narrow,
        alpha_pattern=narrow,
        target_modules=target_modules(empty, set(updates)),
        modules_to_save=saved or None,
        fan_in_fan_out=any(isinstance(empty.get_submodule(name), Conv1D) for name in updates),
        inference_mode=True,
    )
    content: dict[str, Any] = {
        f"{name}.{part}.weight": tensor
        for name, update in updates.items()
        for part, tensor in zip(("lora_A", "lora_B"), update)
    }
    content = {PEFT_PREFIX + name: t.contiguous() for name, t in (content | head).items()}
    save_file(content, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    return sum(tensor.numel() * tensor.itemsize for tensor in content.values())


def _has(tensors: dict[str, torch.Tensor], module: str) -> bool:
    return any(name.startswith(f"{module}.") for name in tensors)


def target_modules(model: nn.Module, names: set[str]) -> list[str]:
    """Return short endings that match these linear layers of a model and no others.

    PEFT compares the end of a path with them. Serving engines know the short ones, such as q_proj.
    """
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    targets = set[str]()
    for name in sorted(names):
        parts = name.split(".")
        endings = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        targets.add(next(ending for ending in endings if _matched(linear, ending) <= names))
    return sorted(targets)


def _matched(names: set[str], ending: str) -> set[str]:
    return {name for name in names if name == ending or name.endswith(f".{ending}")}
