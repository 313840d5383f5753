"""Prepare data for generation: a target for a source (seq2seq), or a completion of a prompt or a
chat (causal_lm).

The examples come from the user's files. The loss counts only the tokens of the target, or of all
answers of a chat. On the development and test sets the model writes an answer for every distinct
source, which is compared with all targets that the set has for it.

Shapes of a batch: B examples, T tokens.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import pyarrow as pa
import torch
from transformers import PreTrainedTokenizerBase

from scaleup.data import columns as cells
from scaleup.data import prepared, sources, splits
from scaleup.data.chats import Chat, encode_chats
from scaleup.data.examples import Examples, shared_texts
from scaleup.data.metrics import IGNORED, text_metrics
from scaleup.data.padding import TextCollator
from scaleup.data.sources import Reading
from scaleup.errors import ConfigError
from scaleup.settings.schema import DataSettings

ROLES = ("system", "user", "assistant", "tool")
DEFAULT_METRIC = {"seq2seq": "bleu", "causal_lm": "loss"}

# The interface of a task's module: see scaleup.data.tasks.
sources_of, compute_metrics = sources.of_user, text_metrics

TEXTS = {"text": pa.string(), "target": pa.string()}


def _is_turn(turn: Any) -> bool:
    valid = isinstance(turn, dict) and turn.get("role") in ROLES
    return valid and isinstance(turn.get("content"), str)


def _clean_chat(cell: Any) -> tuple[str | None, str | None]:
    """Return a chat as JSON, and the problem with the cell or None."""
    try:
        turns = json.loads(cell) if isinstance(cell, str) else cell
    except ValueError:
        return None, "is not JSON"
    valid = isinstance(turns, list) and len(turns) >= 2 and all(map(_is_turn, turns))
    if not valid or turns[-1]["role"] != "assistant":
        return None, "is not a list of {role, content} that ends with the assistant"
    turns = [turn | {"content": cells.replace_surrogates(turn["content"])} for turn in turns]
    return json.dumps(turns), None


def _clean_cell(cell: Any, role: str) -> tuple[str | None, str | None]:
    """Return a text, or a chat (role "messages") as JSON, and the problem with the cell or None."""
    if cell is None or cell != cell:
        return None, "is missing"
    if role == "messages":
        return _clean_chat(cell)
    if not isinstance(cell, str | int | float):
        return None, f"holds a {type(cell).__name__}, not text"
    if role == "target" and not str(cell).strip():
        return None, "is empty; there would be nothing to learn"
    return cells.replace_surrogates(str(cell)), None


def _pairs(reading: Reading, data: DataSettings) -> Iterator[dict[str, list]]:
    """Yield the columns text and target of every row, in batches.

    The text of a chat is the JSON of all turns before the last; the target is the last one.
    """
    if not data.messages_column:
        columns = {"text": data.text_column, "target": data.target_column}
        for cleaned in reading.read(columns, lambda table: _clean_cell):
            yield cleaned.values
        return
    columns = {"messages": data.messages_column}
    for cleaned in reading.read(columns, lambda table: _clean_cell):
        chats = list(map(json.loads, cleaned.values["messages"]))
        texts = [json.dumps(turns[:-1]) for turns in chats]
        yield {"text": texts, "target": [turns[-1]["content"] for turns in chats]}


def _by_source(batches: Iterator[dict[str, list]]) -> dict[str, list[str]]:
    """Return all targets of each source, in order."""
    targets: dict[str, list[str]] = {}
    for batch in batches:
        for source, target in zip(batch["text"], batch["target"]):
            targets.setdefault(source, []).append(target)
    return targets


def _write_scored(
    folder: pathlib.Path, name: str, groups: dict[str, list[str]], first: int
) -> datasets.Dataset:
    """Write a set of one row per source, with the index of its references, from `first` on."""
    columns: dict[str, list] = {
        "text": list(groups),
        "target": [targets[0] for targets in groups.values()],
        "reference": list(range(first, first + len(groups))),
    }
    path = folder / f"{name}.arrow"
    prepared.write(path, TEXTS | {"reference": pa.int64()}, [columns])
    return prepared.read(path)


def _read(data: DataSettings, folder: pathlib.Path) -> dict[str, Any]:
    """Write the sets of a run into a folder. Return the other fields of `Examples`."""
    described, problems, rows = [], [], {}
    if not data.messages_column and data.target_column == data.text_column:
        advice = "the text would tell the target"
        problems.append(
            f"data.target_column: {data.target_column} is the text column, too; {advice}"
        )
    raw = {split: folder / f"raw-{split}" for split in ("train", "validation", "test")}
    for split, parts in sources.of_user(data).items():
        try:
            reading = Reading(split, parts)
            rows[split] = prepared.write(raw[split], TEXTS, _pairs(reading, data))
            described += reading.descriptions
            if split == "train":
                train, dev = splits.choose_rows(data, rows[split], reading.name)
                weights = [part.weight for part in parts]
                train = splits.weighted(data, train, reading.rows, weights)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    prepared.write(
        folder / "train.arrow", TEXTS, prepared.rows_of(prepared.read(raw["train"]), train)
    )
    train_set = prepared.read(folder / "train.arrow")
    in_train = len(dev) > 0
    dev_part = prepared.read(raw["train" if in_train else "validation"])
    dev_groups = _by_source(prepared.rows_of(dev_part, dev if in_train else None))
    test_groups: dict[str, list[str]] = {}
    if "test" in rows:
        test_groups = _by_source(prepared.rows_of(prepared.read(raw["test"])))
        test_sources = list(test_groups)
        kept = [test_sources[row] for row in splits.choose_test_rows(data, len(test_sources))]
        test_groups = {source: test_groups[source] for source in kept}
    dev_set, test_set = _write_scored(folder, "dev", dev_groups, 0), None
    if test_groups:
        test_set = _write_scored(folder, "test", test_groups, len(dev_groups))
    answers: dict[str, list] = {
        "text": [*dev_groups, *test_groups],
        "references": [*dev_groups.values(), *test_groups.values()],
    }
    types = {"text": pa.string(), "references": pa.list_(pa.string())}
    prepared.write(folder / "references.arrow", types, [answers])
    for split in rows:
        raw[split].unlink()
    return {
        "labels": None,
        "metric": DEFAULT_METRIC[data.resolved_task],
        "task": data.task or "seq2seq",
        "test_is_dev": False,
        "sources": described,
        "shared": [
            [*names, count] for names, count in shared_texts(train_set, dev_set, test_set).items()
        ],
    }


@functools.lru_cache(maxsize=1)  # preflight checks and the run share one reading
def _load(settings: str, state: tuple) -> Examples:
    data = DataSettings.model_validate_json(settings)
    return prepared.texts(data, state, functools.partial(_read, data))


def load(data: DataSettings) -> Examples:
    """Read the examples of a run and choose those to train and develop on.

    The first `k` rows of the training file, shuffled by `seed`, are for training. The next
    `dev_size` rows are for development unless there is a validation file. The ConfigError names
    every problem in the files.
    """
    return _load(data.model_dump_json(), prepared.file_states(sources.files(sources.of_user(data))))


def _completions(
    batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, data: DataSettings
) -> list[Chat]:
    """Encode prompts and completions."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    plain = functools.partial(tokenizer, add_special_tokens=False, split_special_tokens=True)
    texts = [data.prompt_template.replace("{text}", text) for text in batch["text"]]
    encoded = []
    for source, target in zip(plain(texts)["input_ids"], plain(batch["target"])["input_ids"]):
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
        data.prompt_template.replace("{text}", text[: 100 * data.max_length])
        for text in batch["text"]
    ]
    targets = [text[: 100 * data.max_target_length] for text in batch["target"]]
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
            "labels": [token if mark else IGNORED for token, mark in zip(ids, counted)],
            "length": len(ids),
            "prompt": chat.prompt[start:] or [blank],
        }
        for name, values in columns.items():
            values.append(row[name])
    return columns


def _packed(rows: datasets.Dataset, length: int) -> Iterator[dict[str, list]]:
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

    for batch in prepared.rows_of(rows):
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


def tokenize(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, data: DataSettings
) -> Examples:
    """Replace texts by tokens and add the column length (tokens)."""
    lacks = f"the tokenizer of {tokenizer.name_or_path} has no"
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.name: {lacks} end-of-sequence token; set one and save it")
    if data.messages_column and tokenizer.chat_template is None:
        advice = "use an instruction-tuned model"
        raise ConfigError(f"data.messages_column: {lacks} chat template; {advice}")
    pairs = examples.task == "seq2seq"
    encode = functools.partial(
        _encode_pairs if pairs else _encode_texts, tokenizer=tokenizer, data=data
    )

    def make(name: str, rows: datasets.Dataset, folder: pathlib.Path) -> None:
        used = ["input_ids", "labels", "length"] + ["attention_mask"] * pairs
        if name != "train":
            used += ["reference"] + ["prompt"] * (not pairs)
        options = {
            "remove_columns": ["text", "target"],
            "features": datasets.Features({column: TYPES[column] for column in used}),
        }
        packs = name == "train" and data.packing
        path = folder / ("unpacked.arrow" if packs else f"{name}.arrow")
        encoded = prepared.encode(encode, rows, path, prepared.workers(data, len(rows)), **options)
        if packs:
            types = PACKED | {"length": pa.int64()}
            prepared.write(folder / "train.arrow", types, _packed(encoded, data.max_length))
            for part in folder.glob("unpacked*"):
                part.unlink()

    return prepared.tokens(examples, tokenizer, data, make)


def collator(
    tokenizer: PreTrainedTokenizerBase, data: DataSettings, multiple: int = 1
) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
    """Return a function that pads examples to the longest of the batch, or to max_length.

    The lengths of a batch are rounded up to multiples of `multiple`.
    """
    return TextCollator(tokenizer.pad_token_id, data, multiple)
