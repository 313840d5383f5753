"""Prepare data for classification and regression: GLUE by name or the user's files, K-shot splits,
tokens, batches and metrics."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from scaleup.data import files
from scaleup.data.files import Examples, Table
from scaleup.data.glue import GLUE, load_from_hub, local_files
from scaleup.data.labels import MISSING, NUMBER, spelling_problems
from scaleup.data.metrics import label_metrics
from scaleup.data.padding import padded_length
from scaleup.data.pairs import separate_pairs
from scaleup.errors import ConfigError
from scaleup.settings.schema import DataSettings

LARGEST_FLOAT = float(np.finfo(np.float32).max)
CHARACTERS_PER_TOKEN = 100  # at least so many characters are tokenized for each token that is kept


compute_metrics = label_metrics  # the interface of a task's module: see scaleup.data.tasks


def source_files(data: DataSettings) -> dict[str, tuple[str, str]]:
    """Return, per split, the setting to name in messages and the file; {} if data is on the hub."""
    return files.user_files(data) if data.name is None else local_files(data)


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
        return files.replace_surrogates(str(cell)), None
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


def _clean(
    table: Table, data: DataSettings, known: set[str] | None
) -> tuple[dict[str, list], list[str] | None]:
    """Return the columns of a split by role, and the declared class names in id order if any."""
    columns = role_columns(data)
    feature = table.features.get(columns["label"])
    declared = None
    if isinstance(feature, datasets.ClassLabel) and known is not None:
        declared = feature.names
    if data.name is not None:
        official = GLUE[data.name].labels
        if declared not in (None, official):
            classes = ", ".join(declared)
            raise ConfigError(f"{table.place} is not {data.name}; its classes are {classes}")
        declared = official
    clean = functools.partial(_clean_cell, known=known, declared=declared)
    return files.clean_columns(table, columns, clean, table.key if data.name else None), declared


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


def _dataset(
    part: dict[str, list], rows: list[int] | None, ids: dict[str, int]
) -> datasets.Dataset:
    """Return the chosen rows of a split, or all of them."""
    columns = {
        role: cells if rows is None else [cells[row] for row in rows]
        for role, cells in part.items()
    }
    columns["label"] = [ids.get(label, label) for label in columns["label"]]  # numbers have no ids
    return datasets.Dataset.from_dict(columns)


@functools.lru_cache(maxsize=1)  # preflight checks and the run share one reading
def _load(settings: str, _state: tuple) -> Examples:
    data = DataSettings.model_validate_json(settings)
    task = data.resolved_task
    columns, problems, sources, parts = role_columns(data), [], [], {}
    label = columns["label"]
    if label in (columns["text"], columns.get("text_pair")):
        advice = "the text would tell the label"
        problems.append(f"data.label_column: {label} is a text column, too; {advice}")
    known: set[str] | None = None if task == "regression" else set()
    labels: list[str] | None = None
    sources_by_split = source_files(data)
    tables = {} if sources_by_split else load_from_hub(data)
    for split in sources_by_split or tables:
        try:
            table = tables[split] if tables else files.read_columns(*sources_by_split[split])
            part, declared = _clean(table, data, known)
            parts[split], count = part, len(part["label"])
            sources.append({"split": split, "rows": count, **table.source})
            if split != "train":
                continue
            if known is not None:
                known = set(part["label"])
                if declared is None:
                    problems += spelling_problems(table, columns["label"], part["label"])
                labels = _class_names(known, count, declared, table.file)
            train, dev = files.choose_rows(data, count, table.file)
            if len({part["label"][row] for row in train}) < 2:
                subject = f"the {len(train)} examples of {table.file} to train on"
                label = part["label"][train[0]]
                raise ConfigError(f"data.k: {subject} all have the label {label!r}")
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    ids = {name: i for i, name in enumerate(labels or [])}
    test_is_dev = data.name is not None and data.k == "all"
    dev_split, dev_rows = ("train", dev) if dev else ("validation", None)
    test_split = "test" if data.name is None else "validation"
    test_set = None
    if test_split in parts:
        test_rows = files.choose_test_rows(data, len(parts[test_split]["label"]))
        test_set = _dataset(parts[test_split], test_rows, ids)
    default = "accuracy" if ids else "spearman"
    train_set = _dataset(parts["train"], train, ids)
    dev_set = _dataset(parts[dev_split], dev_rows, ids)
    return Examples(
        train=train_set,
        dev=dev_set,
        test=test_set,
        labels=labels,
        metric=data.metric or (default if data.name is None else GLUE[data.name].metric),
        task=task,
        test_is_dev=test_is_dev,
        sources=sources,
        shared=files.shared_texts(train_set, dev_set, None if test_is_dev else test_set),
    )


def load(data: DataSettings) -> Examples:
    """Read the examples of a run and choose those to train and develop on (protocol of the paper).

    The first `k` examples of the training set, shuffled by `seed`, are for training; the next
    `dev_size` are for development. GLUE is tested on its official validation set. With data.k=all
    that set is also the development set, and nothing is shuffled. A validation_file of the user's
    own replaces the development examples, and test_file is the test set. The ConfigError names
    every problem in the files.
    """
    return _load(data.model_dump_json(), files.file_states(source_files(data)))


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

    encoded = functools.partial(
        datasets.Dataset.map,
        function=encode,
        batched=True,
        remove_columns=examples.train.column_names,
        new_fingerprint="ids",  # otherwise `map` would pickle the tokenizer to compute one
    )
    dev = encoded(examples.dev)
    test = dev if examples.test_is_dev else examples.test and encoded(examples.test)
    return dataclasses.replace(examples, train=encoded(examples.train), dev=dev, test=test)


def prior(examples: Examples) -> list[float]:
    """Return the label-prior bias: the best output of a head that does not see its input.

    It is the mean label of the training set (regression), or the logarithm of each class's share,
    where each class counts once more than it occurs. Shape: [outputs].
    """
    labels = np.array(examples.train["labels"])
    if examples.labels is None:
        return [float(labels.mean())]
    counts = np.bincount(labels, minlength=len(examples.labels)) + 1
    return np.log(counts / counts.sum()).tolist()


def provenance(examples: Examples) -> list[dict[str, Any]]:
    """Return what identifies the data of a run: per set its rows, and a file hash or a hub id."""
    keys = ("split", "rows", "sha256", "hub_id")
    return [{key: source[key] for key in keys if key in source} for source in examples.sources]


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
