"""Prepare the data of a run."""

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from scaleup.backbone.tokenizer import load_tokenizer
from scaleup.data import tasks
from scaleup.data.examples import Examples
from scaleup.data.pairs import separate_pairs
from scaleup.settings.schema import Settings


def prepare(
    settings: Settings, config: PretrainedConfig
) -> tuple[Examples, PreTrainedTokenizerBase]:
    """Return the tokens of a run, and the tokenizer that checkpoints contain.

    One process per file system reads and tokenizes what is not prepared yet.

    Args:
        settings: with the lengths that fit the model (`fit_length`).
        config: config of the model.
    """
    task = tasks.of(settings.data)
    examples = task.module.load(settings.data)
    tokenizer = load_tokenizer(settings.model, config, task.auto)
    if "text_pair" in examples.dev.column_names:
        tokenizer = separate_pairs(tokenizer)  # checkpoints contain the tokenizer as it is used
    return task.module.tokenize(examples, tokenizer, settings.data), tokenizer
