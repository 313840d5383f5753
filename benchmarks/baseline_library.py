"""Do the steps of the baseline library, `adapters`, in an environment of its own.

`make bench-baseline` creates the environment from baseline_library.txt; `scaleup bench --baseline
PYTHON` starts this script in it.

calls: the script writes one line of JSON, name of the batch → variant → calls per layer by name.

inference, training: the first line that the script writes is JSON, variant → trained parameters.
Then each line that it reads names a variant; it works on the next piece of the step of that variant
and answers with what `PausingStep.resume` returns, as JSON.
"""

import argparse
import functools
import importlib.util
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import adapters
import torch
from adapters import LoRAConfig, PrefixTuningConfig, SeqBnConfig, UniPELTConfig
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)
from transformers.utils import logging

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[1] / "scaleup" / "experiments"


def load(name: str) -> Any:
    """Import one file of scaleup, which as a package cannot be imported with these versions."""
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


call_counts, timing = load("call_counts"), load("timing")

MODELS = {
    "bert-base": (
        BertForSequenceClassification,
        lambda: BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2),
    ),
    "bart-large": (BartForSequenceClassification, lambda: BartConfig(dropout=0.0, num_labels=2)),
}
VARIANTS = {"adapters APL": True, "adapters APL, prefix MLP": False}  # → is the prefix flat


def create_model(geometry: str, flat: bool) -> torch.nn.Module:
    """Create a model that trains its head and UniPELT."""
    model_class, create_config = MODELS[geometry]
    torch.manual_seed(0)
    model = model_class._from_config(create_config(), attn_implementation="sdpa")
    add_unipelt(model, flat)
    head = model.classifier if geometry == "bert-base" else model.classification_head
    head.requires_grad_(True)
    return model


def add_unipelt(model: torch.nn.Module, flat: bool) -> None:
    """Add UniPELT in the paper's sizes and without dropout, and train nothing else."""
    adapters.init(model)
    config = UniPELTConfig(
        prefix_tuning=PrefixTuningConfig(prefix_length=10, flat=flat, dropout=0.0),
        adapter=SeqBnConfig(reduction_factor=16),
        lora=LoRAConfig(r=8, alpha=16, dropout=0.0),
    )
    model.add_adapter("unipelt", config=config)
    model.train_adapter("unipelt")
    model.set_active_adapters("unipelt")


def training_step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Return a function that does one step of AdamW."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def inference_step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Return a function that does one forward pass."""
    model.eval()
    inputs = {name: value for name, value in batch.items() if name != "labels"}

    def step() -> None:
        with torch.inference_mode():
            model(**inputs)

    return step


def count_calls(batches: dict[str, tuple[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Count the calls per layer of the frozen-backbone lower bound and of UniPELT.

    Args:
        batches: name → family and batch.
    """

    def count(family: str, add: Callable, batch: Any) -> dict[str, float]:
        def of_model(layers: int) -> dict[str, int]:
            model = call_counts.narrow_model(family, layers)
            add(model)
            return call_counts.training_calls(model, batch)

        return call_counts.layer_calls(of_model)

    add_flat = functools.partial(add_unipelt, flat=True)
    variants = {"lower-bound": call_counts.pass_gradients, "adapters APL": add_flat}
    return {
        name: {variant: count(family, add, batch) for variant, add in variants.items()}
        for name, (family, batch) in batches.items()
    }


def main() -> None:
    """Answer the lines of standard input until it closes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("inference", "training", "calls"))
    parser.add_argument("--geometry", choices=MODELS, default="bert-base")
    parser.add_argument("batch", help="a file written by torch.save: the inputs of a step")
    options = parser.parse_args()
    logging.set_verbosity_error()
    answers = sys.stdout
    sys.stdout = sys.stderr  # the libraries print, but only answers may reach standard output
    batch = torch.load(options.batch)
    if options.what == "calls":
        print(json.dumps(count_calls(batch)), file=answers, flush=True)
        return
    create_step = training_step if options.what == "training" else inference_step
    steps, trained = {}, {}
    for name, flat in VARIANTS.items():
        model = create_model(options.geometry, flat)
        trained[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        steps[name] = timing.PausingStep(create_step(model, batch), model)
    print(json.dumps(trained), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(steps[line.strip()].resume()), file=answers, flush=True)
    for step in steps.values():
        step.close()


if __name__ == "__main__":
    main()
