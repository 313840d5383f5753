"""A worker of launch/bench.py in the environment of the library `adapters`: does steps of models of its when asked.

Started by `launch/bench.py … --peer PYTHON`. Reads lines, a contender's name each; resumes that one's step for a piece and answers with
what `InTurns.resume` returns, as JSON. The first line it writes is JSON, too: name → trained parameters.
"""

import argparse
import json
import sys

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
from turns import InTurns

MODELS = {
    "bert-base": (
        BertForSequenceClassification,
        lambda: BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2),
    ),
    "bart-large": (BartForSequenceClassification, lambda: BartConfig(dropout=0.0, num_labels=2)),
}
METHODS = {"adapters APL": True, "adapters APL, prefix MLP": False}


def unipelt(flat: bool) -> UniPELTConfig:
    """The paper's sizes; dropout off as in every contender."""
    return UniPELTConfig(
        prefix_tuning=PrefixTuningConfig(prefix_length=10, flat=flat, dropout=0.0),
        adapter=SeqBnConfig(reduction_factor=16),
        lora=LoRAConfig(r=8, alpha=16, dropout=0.0),
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("inference", "training"))
    parser.add_argument("geometry", choices=MODELS)
    parser.add_argument("batch", help="a file that torch.save wrote")
    options = parser.parse_args()
    logging.set_verbosity_error()
    inputs, steps, trained = torch.load(options.batch), {}, {}
    for name, flat in METHODS.items():
        cls, make = MODELS[options.geometry]
        torch.manual_seed(0)
        model = cls._from_config(make(), attn_implementation="sdpa")
        adapters.init(model)
        model.add_adapter("own", config=unipelt(flat))
        model.train_adapter("own")
        model.set_active_adapters("own")
        head = model.classifier if options.geometry == "bert-base" else model.classification_head
        head.requires_grad_(True)
        trained[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        steps[name] = InTurns(
            training(model, inputs) if options.what == "training" else inference(model, inputs),
            model,
        )
    answer = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    print(json.dumps(trained), file=answer, flush=True)
    for line in sys.stdin:
        print(json.dumps(steps[line.strip()].resume()), file=answer, flush=True)
    for step in steps.values():
        step.leave_alone()


def training(model: torch.nn.Module, inputs: dict[str, torch.Tensor]):
    """One step of AdamW."""
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True
    )

    def step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def inference(model: torch.nn.Module, inputs: dict[str, torch.Tensor]):
    """One forward pass."""
    model.eval()
    given = {name: value for name, value in inputs.items() if name != "labels"}

    def step() -> None:
        with torch.inference_mode():
            model(**given)

    return step


if __name__ == "__main__":
    main()
