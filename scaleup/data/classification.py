"""Prepare data for classification and regression: GLUE by name or the user's files, K-shot splits,
tokens, batches and metrics."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from scaleup.data import columns as cells
from scaleup.data import glue, prepared, sources, splits
from scaleup.data.examples import Examples, shared_texts
from scaleup.data.files import Table
from scaleup.data.glue import GLUE
from scaleup.data.labels import MISSING, NUMBER, Spellings, common_names, joined_problems
from scaleup.data.metrics import label_metrics
from scaleup.data.padding import padded_length
from scaleup.data.pairs import separate_pairs
from scaleup.data.sources import Reading, Source
from scaleup.errors import ConfigError
from scaleup.settings.data import DataSettings

LARGEST_FLOAT = float(np.finfo(np.float32).max)
CHARACTERS_PER_TOKEN = 100  # at least so many characters are tokenized for each token that is kept


compute_metrics = label_metrics  # the interface of a task's module: see scaleup.data.tasks


def sources_of(data: DataSettings) -> dict[str, list[Source]]:
    """Return where the examples of each split come from."""
    return sources.of_user(data) if data.name is None else glue.sources(data)


def role_columns(data: DataSettings) -> dict[str, str]:
    """Return the name of the column for each role."""
    text, pair, label = data.text_column, data.text_pair_column, data.label_column
    if data.name is not None:
        text, pair, label = GLUE[data.name].text, GLUE[data.name].text_pair, "label"
    columns = {"text": text, "text_pair": pair, "label": label}
    return {role: column for role, column in columns.items() if column is not None}


def _clean_cell(
    cell: Any, role: str, known: set[str] | None, declared: list[str] | None
) -> tuple[str | float | None, str | None]:
    """Return a text, a class name or a number (regression), and the problem with the cell or None.

    Args:
        known: labels of the training set; empty before it is read; None in a regression.
        declared: class names in id order, if the file or GLUE declares them.
    """
    if cell is None or cell != cell:  # pandas and others write NaN for a missing value
        return None, "is missing"
    if not isinstance(cell, str | int | float):
        expected = "a label" if role == "label" else "text"
        return None, f"holds a {type(cell).__name__}, not {expected}"
    if role != "label":
        return cells.replace_surrogates(str(cell)), None
    # GLUE withholds the labels of its test sets by -1.
    if not str(cell).strip() or (declared is not None and cell == -1):
        return None, "is missing"
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)  # other tools write 1.0 for 1 in a column with gaps
    if declared and isinstance(cell, int) and 0 <= cell < len(declared):
        cell = declared[cell]
    label = str(cell).strip()
    if known is None:
        if NUMBER.fullmatch(label) and abs(float(label)) <= LARGEST_FLOAT:
            return float(label), None
        return None, f"{label[:40]!r} is not a number"
    if declared is None and label.lower() in MISSING:
        return None, f"{label!r} stands for a missing value; leave the row out"
    valid = known or declared or [label]
    if label in valid:
        return label, None
    return label, f"the label {label[:40]!r} is none of {', '.join(sorted(valid)[:10])}"


def _declared(table: Table, data: DataSettings) -> list[str] | None:
    """Return the class names in id order that a file or GLUE declares, if any."""
    feature = table.features.get(table.roles["label"])
    declared = None
    if isinstance(feature, datasets.ClassLabel) and data.resolved_task != "regression":
        declared = feature.names
    if data.name is None:
        return declared
    official = GLUE[data.name].labels
    if declared not in (None, official):
        classes = ", ".join(declared)
        raise ConfigError(f"{table.place} is not {data.name}; its classes are {classes}")
    return official


def _class_names(labels: set[str], rows: int, declared: list[str] | None, file: str) -> list[str]:
    """Return the class names in id order: as declared, else sorted, as numbers if all are numbers.

    Labels that look like the values of a regression or like row ids are refused.
    """
    numeric = all(re.fullmatch(r"[-+]?\d+(\.\d+)?", label) for label in labels)
    fractions = numeric and any("." in label for label in labels)
    if len(labels) > 20 and (len(labels) == rows or fractions):
        problem = f"{file} has {len(labels)} labels; numbers need data.task=regression"
        raise ConfigError(f"data.label_column: {problem}")
    return declared or sorted(labels, key=lambda label: (float(label) if numeric else 0, label))


def _types(data: DataSettings, label: pa.DataType) -> dict[str, pa.DataType]:
    return {role: pa.string() for role in role_columns(data)} | {"label": label}


@dataclasses.dataclass
class _Reader:
    """Reads the sets of a run into a folder, and collects all problems.

    Attributes:
        known: labels of the training set; empty before it is read; None in a regression.
        labels: class names in id order.
    """

    data: DataSettings
    folder: pathlib.Path

    def __post_init__(self) -> None:
        regression = self.data.resolved_task == "regression"
        self.known: set[str] | None = None if regression else set()
        self.labels: list[str] | None = None
        self.problems: list[str] = []
        self.sources: list[dict[str, Any]] = []
        self.counts: dict[str, int] = {}  # rows of each split
        self.train: Sequence[int] = ()
        self.dev: Sequence[int] = ()

    def raw(self, split: str) -> pathlib.Path:
        return self.folder / f"raw-{split}"

    def read(self, split: str, parts: list[Source]) -> None:
        """Read a split. Training comes first, because it decides which labels are valid."""
        data, columns, reading = self.data, role_columns(self.data), Reading(split, parts)
        counts_labels = split == "train" and self.known is not None
        spellings: list[Spellings] = []  # by source
        declared: list[list[str] | None] = []  # by source

        def clean(table: Table) -> Callable[[Any, str], tuple[Any, str | None]]:
            declared.append(_declared(table, data))
            spellings.append(Spellings(table, table.roles["label"]))
            return functools.partial(_clean_cell, known=self.known, declared=declared[-1])

        def batches() -> Iterator[dict[str, list]]:
            for cleaned in reading.read(columns, clean, "data.path" if data.name else None):
                if counts_labels:
                    spellings[-1].add(cleaned)
                yield cleaned.values

        types = _types(data, pa.float64() if self.known is None else pa.string())
        rows = self.counts[split] = prepared.write(self.raw(split), types, batches())
        self.sources += reading.descriptions
        if split != "train":
            return
        if counts_labels:
            self.known = set().union(*(found.labels for found in spellings))
            names = common_names(declared, self.known)
            if names is None:
                found = [problem for part in spellings for problem in part.problems()]
                self.problems += found or joined_problems(self.known)
            self.labels = _class_names(self.known, rows, names, reading.name)
        self.train, self.dev = splits.choose_rows(data, rows, reading.name)
        weights = [part.weight for part in parts]
        self.train = splits.weighted(data, self.train, reading.rows, weights)
        labels = prepared.read(self.raw(split)).select_columns(["label"])
        distinct = {
            label for batch in prepared.rows_of(labels, self.train) for label in batch["label"]
        }
        if len(distinct) < 2:
            subject = f"the {len(self.train)} examples of {reading.name} to train on"
            raise ConfigError(f"data.k: {subject} all have the label {distinct.pop()!r}")

    def choose(self, name: str, split: str, rows: Sequence[int] | None) -> datasets.Dataset:
        """Write the chosen rows of a split, or all of them, with class ids as the set `name`."""
        ids = {label: i for i, label in enumerate(self.labels or [])}

        def batches() -> Iterator[dict[str, list]]:
            for batch in prepared.rows_of(prepared.read(self.raw(split)), rows):
                # Numbers have no ids.
                yield batch | {"label": [ids.get(label, label) for label in batch["label"]]}

        path = self.folder / f"{name}.arrow"
        prepared.write(path, _types(self.data, pa.int64() if ids else pa.float64()), batches())
        return prepared.read(path)


def _read(data: DataSettings, folder: pathlib.Path) -> dict[str, Any]:
    """Write the sets of a run into a folder. Return the other fields of `Examples`."""
    columns, reader = role_columns(data), _Reader(data, folder)
    label = columns["label"]
    if label in (columns["text"], columns.get("text_pair")):
        advice = "the text would tell the label"
        reader.problems.append(f"data.label_column: {label} is a text column, too; {advice}")
    for split, parts in sources_of(data).items():
        try:
            reader.read(split, parts)
        except ConfigError as error:
            reader.problems += error.problems
    if reader.problems:
        raise ConfigError(reader.problems)
    test_is_dev = data.name is not None and data.k == "all"
    train_set = reader.choose("train", "train", reader.train)
    in_train = len(reader.dev) > 0
    dev_set = reader.choose(
        "dev", "train" if in_train else "validation", reader.dev if in_train else None
    )
    test_split, test_set = "test" if data.name is None else "validation", None
    if test_split in reader.counts and not test_is_dev:
        rows = splits.choose_test_rows(data, reader.counts[test_split])
        test_set = reader.choose("test", test_split, rows)
    for split in reader.counts:
        reader.raw(split).unlink()
    default = "accuracy" if reader.labels else "spearman"
    shared = shared_texts(train_set, dev_set, test_set)
    return {
        "labels": reader.labels,
        "metric": default if data.name is None else GLUE[data.name].metric,
        "task": data.resolved_task,
        "test_is_dev": test_is_dev,
        "sources": reader.sources,
        "shared": [[*names, count] for names, count in shared.items()],
    }


def load(data: DataSettings) -> Examples:
    """Read the examples of a run and choose those to train and develop on (protocol of the paper).

    The first `k` examples of the training set, shuffled by `seed`, are for training; the next
    `dev_size` are for development. GLUE is tested on its official validation set. With data.k=all
    that set is also the development set, and nothing is shuffled. A validation_file of the user's
    own replaces the development examples, and test_file is the test set. The ConfigError names
    every problem in the files.
    """
    return prepared.load(data, _read, sources_of(data))


def tokenize(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, data: DataSettings
) -> Examples:
    """Replace texts by the tokenizer's outputs, labels and length (tokens).

    The texts of a pair are separated (`scaleup.data.pairs`). Inputs are cut to `max_length` tokens,
    the longer text of a pair first. A text without any token gets one, so that attention has
    something to attend to.
    """
    if tokenizer.pad_token_id is None:
        name = tokenizer.name_or_path
        raise ConfigError(
            f"model.name: the tokenizer of {name} has no padding token; set one and save it"
        )
    roles = [role for role in ("text", "text_pair") if role in examples.train.column_names]
    if len(roles) == 2:
        tokenizer = separate_pairs(tokenizer)
    special = tokenizer.num_special_tokens_to_add(len(roles) == 2)
    if data.max_length <= special:
        problem = f"{data.max_length} leaves no room for text beside {special} special tokens"
        raise ConfigError(f"data.max_length: {problem}")
    # A line of 100,000 characters need not be tokenized completely for its first tokens.
    most = CHARACTERS_PER_TOKEN * data.max_length
    kept = slice(-most, None) if tokenizer.truncation_side == "left" else slice(most)
    blank = tokenizer.pad_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    filler = {"input_ids": [blank], "attention_mask": [1], "token_type_ids": [0]}
    # "</s>" or "[SEP]" in a text is text. As a token it would end the sequence.
    to_ids = functools.partial(
        tokenizer, truncation="longest_first", max_length=data.max_length, split_special_tokens=True
    )

    def encode(batch: dict[str, list]) -> dict[str, list]:
        encoded = to_ids(*([text[kept] for text in batch[role]] for role in roles))
        cut = {i for role in roles for i, text in enumerate(batch[role]) if len(text) > most}
        # Blanks or one endless word may give fewer tokens than there is room for.
        if any(len(encoded["input_ids"][i]) < data.max_length for i in cut):
            encoded = to_ids(*(batch[role] for role in roles))
        columns = {key: [row or filler[key] for row in rows] for key, rows in encoded.items()}
        lengths = [len(ids) for ids in columns["input_ids"]]
        return columns | {"labels": batch["label"], "length": lengths}

    def make(name: str, rows: datasets.Dataset, folder: pathlib.Path) -> None:
        names = rows.column_names
        path, count = folder / f"{name}.arrow", prepared.workers(data, len(rows))
        prepared.encode(encode, rows, path, count, remove_columns=names)

    return prepared.tokens(examples, tokenizer, data, make)


def prior(examples: Examples) -> list[float]:
    """Return the label-prior bias: the best output of a head that does not see its input.

    It is the mean label of the training set (regression), or the logarithm of each class's share,
    where each class counts once more than it occurs. Shape: [outputs].
    """
    labels = np.array(examples.train["labels"][:])
    if examples.labels is None:
        return [float(labels.mean())]
    counts = np.bincount(labels, minlength=len(examples.labels)) + 1
    return np.log(counts / counts.sum()).tolist()


def provenance(examples: Examples) -> list[dict[str, Any]]:
    """Return what identifies the data of a run: per set its rows, and a file hash or a hub id."""
    keys = ["split", "rows", "sha256", "hub_id", "samples"]
    # A stream is read again when the run continues, so the commit must be the same, too.
    return [
        {key: source[key] for key in keys + ["revision"] * ("rows" not in source) if key in source}
        for source in examples.sources
    ]


def collator(
    tokenizer: PreTrainedTokenizerBase, data: DataSettings, multiple: int = 1
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Return a function that pads examples to a batch of tensors [examples, tokens].

    The batch is as long as its longest example, rounded up to a multiple of `multiple`, or as
    `max_length` if data.pad_to_max_length is on.
    """

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        length = data.max_length
        if not data.pad_to_max_length:
            longest = max(len(row["input_ids"]) for row in rows)
            length = padded_length(longest, multiple, data.max_length)
        pad = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=length)
        return pad([{k: value for k, value in row.items() if k != "length"} for row in rows])

    return collate
