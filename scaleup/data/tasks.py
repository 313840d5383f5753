"""The table of tasks: which module prepares their data and which model class they need."""

import dataclasses
from types import ModuleType
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from scaleup.data import classification
from scaleup.data import generation as text_generation
from scaleup.data.splits import identical_files
from scaleup.errors import ConfigError
from scaleup.settings.data import DataSettings
from scaleup.settings.derived import Section


@dataclasses.dataclass(frozen=True)
class Task:
    """One kind of task."""

    module: ModuleType  # has sources_of, load, tokenize, collator and compute_metrics
    auto: Any  # transformers' AutoModelFor… class
    # The model generates text. The loss of a step is a mean over its tokens, not over its batches.
    writes: bool = False


TASKS = {
    "sequence_classification": Task(classification, AutoModelForSequenceClassification),
    "regression": Task(classification, AutoModelForSequenceClassification),
    "seq2seq": Task(text_generation, AutoModelForSeq2SeqLM, writes=True),
    "causal_lm": Task(text_generation, AutoModelForCausalLM, writes=True),
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
