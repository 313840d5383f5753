"""Load the tokenizer of a backbone, and make the padding of both agree."""

import copy
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from scaleup.backbone.loading import empty_model, find_attentions, source_arguments
from scaleup.errors import ConfigError, one_line
from scaleup.settings.schema import ModelSettings


def load_tokenizer(
    settings: ModelSettings,
    config: PretrainedConfig,
    auto: Any = AutoModelForSequenceClassification,
) -> PreTrainedTokenizerBase:
    """Load the backbone's tokenizer, check that it fits the model, and make their padding agree.

    Args:
        config: config of the model, whose pad token is set if it has none.
        auto: transformers' AutoModelFor… class of the task.
    """
    name = settings.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **source_arguments(settings))
    except Exception as error:  # tokenizers raises Exception itself for a damaged file
        problem = f"its tokenizer cannot be loaded: {type(error).__name__}: {one_line(error, 200)}"
        raise ConfigError(f"model.name: {name}: {problem}") from error
    # Where files are missing, transformers makes an empty tokenizer that knows no word.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        advice = "save the backbone's tokenizer there"
        raise ConfigError(f"model.name: {name} has no tokenizer files; {advice}")
    words = getattr(config.get_text_config(), "vocab_size", None)
    if words is not None and max(tokenizer.get_vocab().values()) >= words:
        sizes = f"has {len(tokenizer)} tokens, its model {words}"
        problem = f"the tokenizer of {name} {sizes}; they do not belong together"
        raise ConfigError(f"model.name: {problem}")
    try:
        ids = tokenizer("A")["input_ids"]
    except Exception as error:  # a setting of the wrong type, an unknown special token, …
        problem = f"its tokenizer cannot be used: {type(error).__name__}: {one_line(error, 200)}"
        raise ConfigError(f"model.name: {name}: {problem}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = _missing_pad_token(tokenizer, pad_tokens(config))
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"model.name: the tokenizer of {name} has no padding token")
    share_pad_token(name, tokenizer, config, auto)
    _check_special_tokens(name, tokenizer, config, auto, ids)
    writes = auto in (AutoModelForCausalLM, AutoModelForSeq2SeqLM)
    if not writes and tokenizer.padding_side == "left":
        causal = _causality(config, auto)
        if causal and all(causal):
            # Padding on the left moves the positions of a text. GPT-2 has learned ones, and in any
            # decoder the attention to a prefix depends on them.
            tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "right"
    return tokenizer


def _check_special_tokens(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    auto: Any,
    ids: list[int],
) -> None:
    """Refuse an encoder-decoder model whose special tokens would fail in the first step.

    Trainer copies the ids of the tokenizer's bos, eos and pad tokens into the model's config, also
    those that the tokenizer lacks. `ids` are the tokens of a text.
    """
    if not config.is_encoder_decoder:
        return
    eos = tokenizer.eos_token_id
    classifies = auto is AutoModelForSequenceClassification
    if eos is None or (classifies and eos not in ids):
        problem = "has no end-of-sequence token"
        if eos is not None:
            problem = f"ends no text with its end-of-sequence token {tokenizer.eos_token}"
        raise ConfigError(
            f"model.name: the tokenizer of {name} {problem}, which a {config.model_type} model "
            "needs; set its eos_token and save it"
        )
    cls = AutoModelForSeq2SeqLM._model_mapping.get(type(config), None)
    aligned = copy.deepcopy(config)
    aligned.bos_token_id, aligned.eos_token_id = tokenizer.bos_token_id, eos
    aligned.pad_token_id = tokenizer.pad_token_id
    if cls is None or not hasattr(cls, "prepare_decoder_input_ids_from_labels"):
        return
    try:
        model = empty_model(aligned, "eager", None, AutoModelForSeq2SeqLM)
        starts = model.prepare_decoder_input_ids_from_labels(torch.tensor([[eos, eos]]))
    except (TypeError, ValueError, IndexError, AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"model.name: the special tokens of {name} do not fit ({one_line(error, 150)}); set "
            "decoder_start_token_id in its config.json"
        ) from error
    words = getattr(config, "vocab_size", None)
    if words is not None and not 0 <= int(starts.min()) <= int(starts.max()) < words:
        start = int(starts[0, 0])
        raise ConfigError(
            f"model.name: {name}/config.json: decoder_start_token_id {start} is none of the "
            f"{words} tokens"
        )


def _missing_pad_token(tokenizer: PreTrainedTokenizerBase, config_tokens: set[int]) -> str | None:
    """Return the pad token for a tokenizer that has none, as is usual for decoders.

    It is the one that the config names. An ordinary word cannot be the pad token, because texts
    contain it; then it is the end-of-sequence token, which masks hide.
    """
    for token in config_tokens:
        added = tokenizer.added_tokens_decoder.get(token)
        if added is not None and added.special:
            return added.content
    return tokenizer.eos_token


def _pad_configs(config: PretrainedConfig) -> list[PretrainedConfig]:
    """Return the parts of a config in which a model looks for its pad token."""
    text = config.get_text_config()
    parts = [config] if text is config else [config, text]
    return [part for part in parts if hasattr(part, "pad_token_id")]


def pad_tokens(config: PretrainedConfig) -> set[int]:
    """Return the pad tokens that a config names. A negative id stands for none."""
    ids = {part.pad_token_id for part in _pad_configs(config)}
    return {token for token in ids if token is not None and token >= 0}


def set_pad_token(config: PretrainedConfig, token: int) -> None:
    """Set the pad token wherever a model looks for it."""
    for part in _pad_configs(config):
        part.pad_token_id = token


def _causality(config: PretrainedConfig, auto: Any) -> list[bool]:
    """Return of each attention of a model whether it is causal; [] if they are not found."""
    attentions, _ = find_attentions(copy.deepcopy(config), "eager", auto)
    return [attention.causal for attention in attentions]


def share_pad_token(
    name: str, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, auto: Any
) -> None:
    """Set the tokenizer's pad token in the config; refuse a decoder's classifier with another one.

    Such a classifier takes the last token of a row that is not `config.pad_token_id` for the last
    token of the text. If the row is padded with another token, that is padding. In other models
    masks hide the padding. The config of an encoder then keeps its own pad token, from which some
    count their positions.

    Args:
        name: the model or folder to name in messages.
        tokenizer: a tokenizer with a pad token.
    """
    others = pad_tokens(config) - {tokenizer.pad_token_id}
    if not others or auto is AutoModelForCausalLM:
        set_pad_token(config, tokenizer.pad_token_id)
    elif auto is AutoModelForSequenceClassification and (
        any(causal := _causality(config, auto)) or not causal
    ):
        raise ConfigError(
            f"model.name: the pad token of {name} is {tokenizer.pad_token_id} in its tokenizer and "
            f"{min(others)} in its config.json (pad_token_id), so that a classifier would read "
            "padding; save it with the same token in both"
        )
