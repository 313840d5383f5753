"""The kinds of tasks: which module reads their data, which model class they need, whether text is written."""

import dataclasses
from types import ModuleType

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from scaleup.backbone.loading import local_config
from scaleup.data import classification as data
from scaleup.data import generation as sequences
from scaleup.settings.schema import DataSettings, Section


@dataclasses.dataclass(frozen=True)
class Task:
    """module: has load, check, tokenize, collator and compute_metrics. auto: transformers' class. token_mean: the loss of a step
    is a mean over its tokens, not over its batches."""

    module: ModuleType
    auto: type
    writes: bool = False
    token_mean: bool = False


TASKS = {
    "sequence_classification": Task(data, AutoModelForSequenceClassification),
    "regression": Task(data, AutoModelForSequenceClassification),
    "seq2seq": Task(sequences, AutoModelForSeq2SeqLM, writes=True),
    "causal_lm": Task(sequences, AutoModelForCausalLM, writes=True, token_mean=True),
}


def name_of(settings: DataSettings) -> str:
    """`data.task`, or what it is by default."""
    return settings.task or ("regression" if settings.name == "stsb" else "sequence_classification")


def of(settings: DataSettings) -> Task:
    """The task of a run's data."""
    return TASKS[name_of(settings)]


def generation(settings: DataSettings, metric: str) -> dict[str, int] | None:
    """Arguments of `generate` in evaluation; None where the metric needs nothing written."""
    if not of(settings).writes or metric == "loss":
        return None
    return {"max_new_tokens": settings.max_target_length, "num_beams": settings.num_beams}


def check(sections: dict[str, Section]) -> list[str]:
    """What is wrong with the data, and whether the model can do the task. For `config.load`."""
    settings, model = sections.get("data"), sections.get("model")
    if not isinstance(settings, DataSettings):
        return []
    problems = of(settings).module.check(sections)
    config = local_config(model) if model is not None and not model.trust_remote_code else None
    if config is not None and type(config) not in of(settings).auto._model_mapping:
        problems.append(
            f"model.name: transformers has no {config.model_type} model for data.task {name_of(settings)}"
        )
    return problems
