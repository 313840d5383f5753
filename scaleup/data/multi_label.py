"""Prepare data for multi-label classification: each text has any number of labels.

The model has one output per label; a label is predicted if its probability exceeds 0.5. The sets
have the columns text, text_pair (pairs only) and label: 1.0 or 0.0 for each label of the run.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import EvalPrediction, PreTrainedTokenizerBase

from scaleup.data import classification, prepared, sources
from scaleup.data.columns import as_list, replace_surrogates
from scaleup.data.examples import Examples
from scaleup.data.files import Table
from scaleup.data.labels import common_names, joined_problems
from scaleup.data.sets import (
    Cell,
    Rows,
    SetReader,
    declared_names,
    named,
    number_scored,
    role_columns,
    scored_rows,
)
from scaleup.settings.data import DataSettings

# The interface of a task's module: see scaleup.data.tasks.
sources_of, collator = sources.of_user, classification.collator


def _clean_cell(cell: Any, role: str, known: set[str], declared: list[str] | None) -> Cell:
    """Return a text, or the names of its labels, and the problem with the cell or None.

    Args:
        known: labels of the training set; empty before it is read.
        declared: names in id order, if the file declares them.
    """
    if role != "labels":
        if cell is None or cell != cell:
            return None, "is missing"
        if not isinstance(cell, str | int | float):
            return None, f"holds a {type(cell).__name__}, not text"
        return replace_surrogates(str(cell)), None
    items, problem = as_list(cell)
    if items is None:
        return None, problem
    names = [named(item, declared) for item in items]
    if None in names:
        item = items[names.index(None)]
        return None, f"{item!r:.40} is not the name of a label"
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        advice = "; list the names of the labels" if set(names) <= {"0", "1"} else ""
        return None, f"names {twice!r:.40} twice{advice}"
    valid = known or set(declared or ())
    unknown = [str(name) for name in names if valid and name not in valid]
    if unknown:
        shown = ", ".join(sorted(valid)[:10])
        return None, f"the label {unknown[0][:40]!r} is none of {shown}"
    return names, None


def _read(data: DataSettings, folder: pathlib.Path) -> dict[str, Any]:
    """Write the sets of a run into a folder. Return the other fields of `Examples`."""
    columns = role_columns(data)
    texts = {role: pa.string() for role in columns if role != "labels"}
    reader = SetReader(data, folder, texts | {"labels": pa.list_(pa.string())})
    if columns["labels"] in (columns["text"], columns.get("text_pair")):
        advice = "the text would tell the labels"
        reader.problems.append(
            f"data.labels_column: {columns['labels']} is a text column, too; {advice}"
        )
    known: set[str] = set()
    declared: list[list[str] | None] = []  # by source

    def clean(table: Table) -> Callable[[Any, str], Cell]:
        declared.append(declared_names(table, "labels"))
        return functools.partial(_clean_cell, known=known, declared=declared[-1])

    labels: list[str] = []
    for split, parts in sources.of_user(data).items():
        reader.read(split, parts, clean)
        if split != "train" or split not in reader.counts:
            continue
        known = {name for names in reader.training_cells("labels", False) for name in names}
        names = common_names(declared, known)
        reader.problems += joined_problems(known, "data.labels_column") if names is None else []
        labels = names or sorted(known)
        known = set(labels)
        if not any(reader.training_cells("labels", True)):
            place = f"the {len(reader.train)} examples to train on"
            reader.problems.append(f"data.labels_column: {place} have no label at all")
    ids = {label: i for i, label in enumerate(labels)}

    def encode(batch: Rows) -> Rows:
        rows = batch.pop("labels")
        hot = np.zeros((len(rows), len(ids)), dtype=np.float32)
        for row, names in enumerate(rows):
            hot[row, [ids[name] for name in names]] = 1
        return batch | {"label": hot.tolist()}

    sets = reader.write(encode, texts | {"label": pa.list_(pa.float32())})
    return reader.fields(sets, labels)


def load(data: DataSettings) -> Examples:
    """Read the examples of a run and choose those to train and develop on.

    The ConfigError names every problem in the files.
    """
    return prepared.load(data, _read, sources_of(data))


def tokenize(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, data: DataSettings
) -> Examples:
    """Replace texts by tokens, as in classification."""
    return number_scored(classification.tokenize(examples, tokenizer, data), examples)


def _guesses(outputs: np.ndarray) -> np.ndarray:
    """Return 1 where the probability of a label exceeds 0.5. NaN predicts nothing."""
    return (np.asarray(outputs) > 0).astype(int)


def compute_metrics(
    examples: Examples, tokenizer: PreTrainedTokenizerBase
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a function that computes micro-F1 (f1) and macro-F1 over labels, as shares of 1.

    F1 = 2 TP / (labels + predictions). It is 0 for a label that neither occurs nor is predicted.
    """

    def score(prediction: EvalPrediction) -> dict[str, float]:
        tokens, _, rows = scored_rows(examples, np.asarray(prediction.label_ids).reshape(-1))
        truth = np.asarray(tokens.select(rows)["labels"][:]).astype(int)
        guesses = _guesses(prediction.predictions)
        right, both = (truth * guesses).sum(axis=0), (truth + guesses).sum(axis=0)
        return {
            "f1": float(2 * right.sum() / max(both.sum(), 1)),
            "macro_f1": float(np.mean(2 * right / np.maximum(both, 1))),
        }

    return score


def lines(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, outputs: np.ndarray, numbers: np.ndarray
) -> list[dict[str, Any]]:
    """Return the lines of predictions.jsonl in the order of the set."""
    assert examples.labels is not None
    tokens, texts, rows = scored_rows(examples, numbers)
    names, guesses = np.array(examples.labels, dtype=object), _guesses(outputs)
    roles = [role for role in ("text", "text_pair") if role in texts.column_names]
    found = []
    for position in np.argsort(rows):
        row = rows[position]
        text = texts[row]
        found.append(
            {role: text[role] for role in roles}
            | {"labels": names[guesses[position] == 1].tolist()}
            | {"references": names[np.array(text["label"]) == 1].tolist()}
        )
    return found
