"""Prepare data for token classification: each word of a text has a tag in the IOB2 scheme.

O is not an entity, B-<type> the first word of an entity, and I-<type> each of its other words. The
words are joined by blanks and then tokenized, so that a word may have several tokens. Its tag
belongs to the first of them; the others have no label. A word without a token of its own (it lies
beyond `max_length`, or has no visible character) has no label either, and the scores count it as
predicted O.

The sets have the columns text, starts and ends (of each word, in characters) and label (tag ids);
among tokens, `words` is the index of the first token of each word, or -1.

Shapes: N examples, T tokens, C tags.
"""

import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from transformers import EvalPrediction, PreTrainedTokenizerBase

from scaleup.data import prepared, sources
from scaleup.data.columns import as_list, replace_surrogates
from scaleup.data.examples import Examples
from scaleup.data.files import Table
from scaleup.data.labels import common_names, joined_problems
from scaleup.data.metrics import IGNORED, entity_scores
from scaleup.data.padding import EncoderCollator
from scaleup.data.sets import (
    Cell,
    Rows,
    SetReader,
    declared_names,
    fast_tokenizer,
    named,
    number_scored,
    scored_rows,
)
from scaleup.settings.data import DataSettings

IOB2 = re.compile(r"O|[BI]-\S.*")
NUMBERS = pa.list_(pa.int32())
TYPES = {"text": pa.string(), "starts": NUMBERS, "ends": NUMBERS, "label": NUMBERS}

sources_of = sources.of_user  # the interface of a task's module: see scaleup.data.tasks


def _clean_words(cell: Any) -> Cell:
    words, problem = as_list(cell)
    if words is None:
        return None, problem
    if not words:
        return None, "is an empty list"
    for number, word in enumerate(words, 1):
        if not isinstance(word, str) or not word.strip():
            return None, f"word {number} is {word!r:.40}, not text"
    return [replace_surrogates(word) for word in words], None


def _clean_tags(cell: Any, known: set[str], declared: list[str] | None) -> Cell:
    """Return the tags of a row, and the problem with the cell or None.

    Args:
        known: tags of the training set; empty before it is read.
        declared: tags in id order, if the file declares them.
    """
    items, problem = as_list(cell)
    if items is None:
        return None, problem
    tags = [named(item, declared) for item in items]
    for item, tag in zip(items, tags):
        if tag is None or not IOB2.fullmatch(tag):
            return None, f"{item!r:.40} is not a tag of the IOB2 scheme (O, B-<type> or I-<type>)"
        if known and tag not in known:
            return None, f"the tag {tag[:40]!r} is none of {', '.join(sorted(known)[:10])}"
    for before, tag in zip(["O", *tags], tags):
        if str(tag)[0] == "I" and str(before)[1:] != str(tag)[1:]:
            begin = f"B{str(tag)[1:]}"
            return None, f"{tag!r:.40} follows {before!r:.40}; an entity begins with {begin!r:.40}"
    return tags, None


def _check_row(row: dict[str, Any]) -> tuple[str, str] | None:
    words, tags = len(row["tokens"]), len(row["tags"])
    return None if words == tags else ("tags", f"has {tags} tags for {words} words")


def _all_tags(found: set[str], declared: list[str] | None) -> list[str]:
    """Return the tags in id order: as declared, else O and both tags of every type."""
    types = sorted({tag[2:] for tag in found} - {""})
    return declared or ["O", *(f"{first}-{name}" for name in types for first in "BI")]


def _read(data: DataSettings, folder: pathlib.Path) -> dict[str, Any]:
    """Write the sets of a run into a folder. Return the other fields of `Examples`."""
    cells = {"tokens": pa.list_(pa.string()), "tags": pa.list_(pa.string())}
    reader = SetReader(data, folder, cells)
    known: set[str] = set()
    declared: list[list[str] | None] = []  # by source

    def clean(table: Table) -> Callable[[Any, str], Cell]:
        names = declared_names(table, "tags")
        declared.append(names)
        return lambda cell, role: (
            _clean_words(cell) if role == "tokens" else _clean_tags(cell, known, names)
        )

    labels: list[str] = []
    for split, parts in sources.of_user(data).items():
        reader.read(split, parts, clean, _check_row)
        if split != "train" or split not in reader.counts:
            continue
        found = {tag for tags in reader.training_cells("tags", False) for tag in tags}
        reader.problems += joined_problems({tag[2:] for tag in found}, "data.tags_column")
        labels = _all_tags(found, common_names(declared, found))
        known = set(labels)
        if not any(set(tags) - {"O"} for tags in reader.training_cells("tags", True)):
            place = f"the {len(reader.train)} examples to train on"
            reader.problems.append(f"data.tags_column: {place} have no entity, only O")
    ids = {tag: i for i, tag in enumerate(labels)}

    def encode(batch: Rows) -> Rows:
        columns: Rows = {name: [] for name in TYPES}
        for words, tags in zip(batch["tokens"], batch["tags"]):
            lengths = np.array([len(word) for word in words])
            starts = np.cumsum(lengths + 1) - lengths - 1
            columns["text"].append(" ".join(words))
            columns["starts"].append(starts.tolist())
            columns["ends"].append((starts + lengths).tolist())
            columns["label"].append([ids[tag] for tag in tags])
        return columns

    return reader.fields(reader.write(encode, TYPES), labels)


def load(data: DataSettings) -> Examples:
    """Read the examples of a run and choose those to train and develop on.

    The ConfigError names every problem in the files.
    """
    return prepared.load(data, _read, sources_of(data))


def first_tokens(
    starts: Sequence[int], ends: Sequence[int], offsets: Sequence[tuple[int, int]]
) -> list[int]:
    """Return the index of the first token of each word, or -1 for a word without its own.

    Args:
        starts, ends: of each word, in characters.
        offsets: start and end of each token; special tokens are empty.
    """
    firsts, token = [], 0
    taken = -1
    for start, end in zip(starts, ends):
        while token < len(offsets) and (
            offsets[token][0] == offsets[token][1] or offsets[token][1] <= start
        ):
            token += 1
        inside = token < len(offsets) and offsets[token][0] < end and token != taken
        firsts.append(token if inside else -1)
        taken = token if inside else taken
    return firsts


def tokenize(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, data: DataSettings
) -> Examples:
    """Replace texts by tokens, labels, words and length (number of tokens).

    A label is at the first token of its word. Inputs are cut to `max_length` tokens.
    """
    fast_tokenizer(tokenizer, data)
    filler = tokenizer.pad_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id

    def encode(batch: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(
            batch["text"],
            truncation=True,
            max_length=data.max_length,
            split_special_tokens=True,
            return_offsets_mapping=True,
        )
        offsets = encoded.pop("offset_mapping")
        columns: dict[str, list] = {key: list(rows) for key, rows in encoded.items()}
        columns |= {"labels": [], "words": [], "length": []}
        for row, tags in enumerate(batch["label"]):
            words = first_tokens(batch["starts"][row], batch["ends"][row], offsets[row])
            if not columns["input_ids"][row]:  # attention has to attend to something
                for key, value in (("input_ids", filler), ("attention_mask", 1)):
                    columns[key][row] = [value]
                if "token_type_ids" in columns:
                    columns["token_type_ids"][row] = [0]
            labels = [IGNORED] * len(columns["input_ids"][row])
            if max(words) < 0:  # no word is visible, and a loss needs a label
                words[0] = 0
            for token, tag in zip(words, tags):
                if token >= 0:
                    labels[token] = tag
            columns["labels"].append(labels)
            columns["words"].append(words)
            columns["length"].append(len(labels))
        return columns

    def make(name: str, rows: datasets.Dataset, folder: pathlib.Path) -> None:
        path, count = folder / f"{name}.arrow", prepared.workers(data, len(rows))
        prepared.encode(encode, rows, path, count, remove_columns=rows.column_names)

    return number_scored(prepared.tokens(examples, tokenizer, data, make), examples)


def notes(examples: Examples) -> list[str]:
    """Return a line about words of dev and test that have no token of their own, if any."""
    parts = []
    for name in ("dev", "test"):
        tokens = getattr(examples, name)
        words = [word for row in (tokens["words"][:] if tokens is not None else []) for word in row]
        if missing := sum(word < 0 for word in words):
            parts.append(f"{missing} of {len(words)} {name} words")
    where = "lie beyond data.max_length or are invisible; they count as predicted O"
    return [f"note: {' and '.join(parts)} {where}"] if parts else []


def collator(
    tokenizer: PreTrainedTokenizerBase, data: DataSettings, multiple: int = 1
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Return a function that pads examples and their labels to a batch of tensors [N, T]."""
    return EncoderCollator(tokenizer, data, multiple, label=IGNORED)


def _tags(
    examples: Examples, outputs: np.ndarray, numbers: np.ndarray
) -> list[tuple[int, list[str], list[str]]]:
    """Return the row, the predicted and the true tags of each example, in the order of the set.

    Args:
        outputs: logits [N, T, C]. A word with NaN among them, or without a token, is predicted O.
        numbers: of the examples, [N].
    """
    assert examples.labels is not None
    tokens, texts, rows = scored_rows(examples, numbers)
    guesses = np.where(np.isnan(outputs).any(axis=-1), -1, outputs.argmax(axis=-1))
    names = [*examples.labels, "O"]  # -1 is the last one
    found = []
    for position in np.argsort(rows):
        row = rows[position]
        words, guess = np.array(tokens[row]["words"]), guesses[position]
        chosen = np.where(words >= 0, guess[np.maximum(words, 0)], -1)
        truth = texts[row]["label"]
        found.append((row, [names[i] for i in chosen], [names[i] for i in truth]))
    return found


def compute_metrics(
    examples: Examples, tokenizer: PreTrainedTokenizerBase
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a function that scores entities and words, as shares of 1.

    The scores are precision, recall and F1 of entities, and the accuracy of words.
    """

    def score(prediction: EvalPrediction) -> dict[str, float]:
        numbers = np.asarray(prediction.label_ids).reshape(-1)
        found = _tags(examples, np.asarray(prediction.predictions), numbers)
        return entity_scores([guess for _, guess, _ in found], [truth for *_, truth in found])

    return score


def lines(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, outputs: np.ndarray, numbers: np.ndarray
) -> list[dict[str, Any]]:
    """Return the lines of predictions.jsonl in the order of the set."""
    _, texts, _ = scored_rows(examples, numbers)
    found = []
    for row, guess, truth in _tags(examples, outputs, numbers):
        text = texts[row]
        spans = zip(text["starts"], text["ends"])
        words = [text["text"][start:end] for start, end in spans]
        found.append({"tokens": words, "tags": guess, "references": truth})
    return found
