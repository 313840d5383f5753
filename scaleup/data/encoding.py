"""Turn texts into tokens for generation: pairs for seq2seq, completions and chats for causal_lm.

A batch of texts becomes columns of tokens with labels at the tokens that the loss counts.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator

import datasets
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from scaleup.data.chats import Chat, encode_chats
from scaleup.data.metrics import IGNORED
from scaleup.errors import ConfigError
from scaleup.settings.data import DataSettings

CHARACTERS = 100  # a token has fewer, except in odd texts; what no token needs is cut first
TOKEN_IDS = datasets.List(datasets.Value("int32"))
TYPES = {
    "input_ids": TOKEN_IDS,
    "attention_mask": datasets.List(datasets.Value("int8")),
    "labels": TOKEN_IDS,
    "length": datasets.Value("int64"),
    "prompt": TOKEN_IDS,
    "reference": datasets.Value("int64"),
}
PACKED = dict.fromkeys(("input_ids", "labels", "position_ids"), pa.list_(pa.int32()))
PACKED |= {"length": pa.int64()}


def features(data: DataSettings, scored: bool) -> datasets.Features:
    """Return the columns of tokens. What is scored has an index of references, too."""
    pairs = data.resolved_task == "seq2seq"
    used = ["input_ids", "labels", "length"] + ["attention_mask"] * pairs
    if scored:
        used += ["reference"] + ["prompt"] * (not pairs)
    return datasets.Features({column: TYPES[column] for column in used})


def encoder(
    tokenizer: PreTrainedTokenizerBase, data: DataSettings
) -> Callable[[dict[str, list]], dict[str, list]]:
    """Return the function that turns a batch of texts into columns of tokens."""
    lacks = f"the tokenizer of {tokenizer.name_or_path} has no"
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.name: {lacks} end-of-sequence token; set one and save it")
    if data.messages_column and tokenizer.chat_template is None:
        advice = "use an instruction-tuned model"
        raise ConfigError(f"data.messages_column: {lacks} chat template; {advice}")
    encode = _encode_pairs if data.resolved_task == "seq2seq" else _encode_texts
    return functools.partial(encode, tokenizer=tokenizer, data=data)


def _completions(
    batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, data: DataSettings
) -> list[Chat]:
    """Encode prompts and completions."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    plain = functools.partial(tokenizer, add_special_tokens=False, split_special_tokens=True)
    most = CHARACTERS * data.max_length  # a prompt that is too long loses its beginning
    texts = [data.prompt_template.replace("{text}", text[-most:]) for text in batch["text"]]
    targets = [text[:most] for text in batch["target"]]
    encoded = []
    for source, target in zip(plain(texts)["input_ids"], plain(targets)["input_ids"]):
        prompt, completion = begin + source, [*target, tokenizer.eos_token_id]
        counted = [False] * len(prompt) + [True] * len(completion)
        encoded.append(Chat(prompt + completion, counted, len(prompt), prompt))
    return encoded


def _encode_pairs(
    batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, data: DataSettings
) -> dict[str, list]:
    """Encode rows for seq2seq: the source for the encoder, the target as labels."""
    encode = functools.partial(tokenizer, truncation=True, split_special_tokens=True)
    sources = [
        data.prompt_template.replace("{text}", text[: CHARACTERS * data.max_length])
        for text in batch["text"]
    ]
    targets = [text[: CHARACTERS * data.max_target_length] for text in batch["target"]]
    inputs = encode(sources, max_length=data.max_length)
    labels = encode(text_target=targets, max_length=data.max_target_length)["input_ids"]
    columns = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return columns | {"labels": labels, "length": [len(ids) for ids in columns["input_ids"]]}


def _encode_texts(
    batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, data: DataSettings
) -> dict[str, list]:
    """Encode rows for causal_lm, with labels at the tokens that the loss counts.

    A prompt that is too long loses its beginning.
    """
    blank = tokenizer.eos_token_id
    columns: dict[str, list] = {"input_ids": [], "labels": [], "length": []}
    if "reference" in batch:  # only what is scored has to be answered
        columns["prompt"] = []
    if data.messages_column:
        turns = [
            [*json.loads(source), {"role": "assistant", "content": target}]
            for source, target in zip(batch["text"], batch["target"])
        ]
        chats = encode_chats(turns, tokenizer, data)
    else:
        chats = _completions(batch, tokenizer, data)
    for chat in chats:
        end = min(len(chat.ids), chat.answer + data.max_length - 1)
        start = max(0, end - data.max_length)
        ids, counted = chat.ids[start:end], chat.counted[start:end]
        if chat.answer == 0:  # generation needs a first token
            ids, counted = [blank, *ids], [False, *counted]
        row = {
            "input_ids": ids,
            # No token predicts the first one, so that the loss cannot count it.
            "labels": [IGNORED, *(t if mark else IGNORED for t, mark in zip(ids[1:], counted[1:]))],
            "length": len(ids),
            "prompt": chat.prompt[start:] or [blank],
        }
        for name, values in columns.items():
            values.append(row[name])
    return columns


def packed(batches: Iterable[dict[str, list]], length: int) -> Iterator[dict[str, list]]:
    """Join complete texts, in order, to rows of at most `length` tokens; yield them in batches.

    Positions restart with each text. The first token of a text is not a continuation of the text
    before it, so it has no label.
    """
    names = ("input_ids", "labels", "position_ids")
    full: dict[str, list] = {name: [] for name in (*names, "length")}
    row: dict[str, list[int]] = {name: [] for name in names}

    def close() -> None:
        for name in names:
            full[name].append(row[name])
            row[name] = []
        full["length"].append(len(full["input_ids"][-1]))

    for batch in batches:
        for ids, labels in zip(batch["input_ids"], batch["labels"]):
            if row["input_ids"] and len(row["input_ids"]) + len(ids) > length:
                close()
            row["input_ids"] += ids
            row["labels"] += [IGNORED, *labels[1:]]
            row["position_ids"] += range(len(ids))
        yield full
        full = {name: [] for name in full}
    close()
    yield full
