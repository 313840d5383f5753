"""The table of tasks: which module prepares their data and which model class they need."""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from scaleup.data import classification, multi_label, question_answering, token_classification
from scaleup.data import generation as text_generation
from scaleup.data.examples import Examples
from scaleup.data.splits import identical_files
from scaleup.errors import ConfigError
from scaleup.settings.data import DataSettings
from scaleup.settings.derived import Section

FOR_SCORES = ("prompt", "prompt_mask", "reference")  # columns that only scores and `generate` read


@dataclasses.dataclass(frozen=True)
class Task:
    """One kind of task.

    Attributes:
        module: has sources_of, load, tokenize, collator and compute_metrics.
        auto: transformers' AutoModelFor… class.
        writes: the model generates text.
        by_token: the loss of a step is a mean over its labelled tokens, not over its batches.
        loss: (outputs of the model, batch) → the mean loss; None: the model computes it.
        outputs: the outputs of the model that are scored.
        lines: (examples, tokenizer, outputs, numbers of the rows) → the lines of predictions.jsonl;
            None: the task has none.
        notes: what a user should know about the tokens of a run; None: nothing.
    """

    module: ModuleType
    auto: Any
    writes: bool = False
    by_token: bool = False
    loss: Callable[[Any, dict[str, torch.Tensor]], torch.Tensor] | None = None
    outputs: tuple[str, ...] = ("logits",)
    lines: Callable[..., list[dict[str, Any]]] | None = None
    notes: Callable[[Examples], list[str]] | None = None

    def model_inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Return the arguments of the model for a batch with labels."""
        inputs: dict[str, Any] = {n: value for n, value in batch.items() if n not in FOR_SCORES}
        if self.loss is not None:
            del inputs["labels"]
        if self.writes:  # with a cache, texts packed into one row see each other
            inputs["use_cache"] = False
        return inputs

    def scored(self, outputs: Any) -> torch.Tensor:
        """Return the outputs [B, …] that are scored; several become the last dimension.

        Args:
            outputs: what the model returned, without the loss.
        """
        if not isinstance(outputs, tuple):
            return outputs
        count = len(self.outputs)
        return outputs[0] if count == 1 else torch.stack(outputs[:count], dim=-1)


TASKS = {
    "sequence_classification": Task(classification, AutoModelForSequenceClassification),
    "regression": Task(classification, AutoModelForSequenceClassification),
    "multi_label_classification": Task(
        multi_label, AutoModelForSequenceClassification, lines=multi_label.lines
    ),
    "token_classification": Task(
        token_classification,
        AutoModelForTokenClassification,
        by_token=True,
        lines=token_classification.lines,
        notes=token_classification.notes,
    ),
    "question_answering": Task(
        question_answering,
        AutoModelForQuestionAnswering,
        loss=question_answering.loss,
        outputs=question_answering.OUTPUTS,
        lines=question_answering.lines,
    ),
    "seq2seq": Task(
        text_generation,
        AutoModelForSeq2SeqLM,
        writes=True,
        by_token=True,
        lines=text_generation.lines,
    ),
    "causal_lm": Task(
        text_generation,
        AutoModelForCausalLM,
        writes=True,
        by_token=True,
        lines=text_generation.lines,
    ),
}


def of(data: DataSettings) -> Task:
    """Return the task of a run."""
    return TASKS[data.resolved_task]


def metric(data: DataSettings) -> str | None:
    """Return the metric of a generation task; None for other tasks."""
    if not of(data).writes:
        return None
    return data.metric or text_generation.DEFAULT_METRIC[data.resolved_task]


def generation(data: DataSettings, metric: str) -> dict[str, int] | None:
    """Return the arguments of `generate` in evaluation; None if the metric needs no text."""
    if not of(data).writes or metric == "loss":
        return None
    return {"max_new_tokens": data.max_target_length, "num_beams": data.num_beams}


def check(sections: dict[str, Section]) -> list[str]:
    """Return what is wrong with the data files of a config. Data on the hub is not read."""
    data = sections.get("data")
    if not isinstance(data, DataSettings):
        return []
    module = of(data).module
    try:
        sources = module.sources_of(data)
    except ConfigError as error:
        return error.problems
    local = all(part.file for parts in sources.values() for part in parts)
    if not sources["train"] or not local:
        return []
    problems = identical_files(sources)
    try:
        module.load(data)
    except ConfigError as error:
        problems = [*error.problems, *problems]
    return problems
