"""Examples: GLUE by name or your own files, K-shot splits, tokens, batches and metrics.

`check` finds what is wrong with the user's data before a model is loaded; `load` reads the same data by the same code.
Texts are kept as they stand: control characters, mojibake and empty strings are text, only an absent value is missing.
"""

import csv
import dataclasses
import difflib
import functools
import hashlib
import io
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from typing import Any, Callable

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import stats
from sklearn import metrics
from transformers import DataCollatorWithPadding, EvalPrediction, PreTrainedTokenizerBase

from scaleup.config import ConfigError, DataSettings, Section

# Task -> text column, column of the second text, class names in id order (none: regression), metric.
GLUE = {
    "cola": ("sentence", None, ["unacceptable", "acceptable"], "matthews"),
    "sst2": ("sentence", None, ["negative", "positive"], "accuracy"),
    "mrpc": ("sentence1", "sentence2", ["not_equivalent", "equivalent"], "f1"),
    "qqp": ("question1", "question2", ["not_duplicate", "duplicate"], "f1"),
    "stsb": ("sentence1", "sentence2", [], "spearman"),
    "mnli": ("premise", "hypothesis", ["entailment", "neutral", "contradiction"], "accuracy"),
    "qnli": ("question", "sentence", ["entailment", "not_entailment"], "accuracy"),
    "rte": ("sentence1", "sentence2", ["entailment", "not_entailment"], "accuracy"),
    "wnli": ("sentence1", "sentence2", ["not_entailment", "entailment"], "accuracy"),
}
EXTENSIONS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Examples:
    """The sets of a run: columns text, text_pair (pairs only) and label (class id or float); after `tokenize`, tokens."""

    train: datasets.Dataset
    dev: datasets.Dataset
    test: datasets.Dataset | None  # none where no test set was given
    labels: list[str] | None  # class names in id order; none in regression
    metric: str  # accuracy, f1, matthews or spearman: picks the best checkpoint
    task: str  # sequence_classification or regression
    test_is_dev: bool  # GLUE with k all: the official validation set is both
    sources: list[dict[str, Any]]  # for each set read: split, rows, and file with sha256 or hub_id with name


@dataclass(frozen=True)
class _Table:
    """A file's wanted columns as they were read."""

    key: str  # the setting that named the file, for messages
    file: str
    columns: dict[str, list]
    lines: list[int] | None  # line of the file on which each row begins, from 1; none where a file has no lines
    declared: list[str]  # class names that the file itself gives to the ids in the label column
    source: dict[str, Any]


def _some(items: list[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def _rows(text: str, place: str, delimiter: str, quoting: int) -> tuple[dict[str, list], list[int]]:
    csv.field_size_limit(sys.maxsize)  # the default, 131,072 characters, refuses long documents
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    header, rows, lines, ragged, line = [], [], [], [], 1
    try:
        for row in reader:
            if row and not header:
                header = [name.strip() for name in row]
            elif row and len(row) != len(header):
                ragged.append(f"line {line} has {len(row)}")
            elif row:
                rows.append(row)
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        advice = "a quoted field must end, and a quote inside it must be doubled"
        raise ConfigError(f"{place}, line {line}: not valid CSV ({error}); {advice}") from None
    if ragged:
        advice = "put a text that holds the delimiter in quotes"
        raise ConfigError(f"{place}: the header has {len(header)} columns, but {_some(ragged)}; {advice}")
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise ConfigError(f"{place} has the column {', '.join(twice)} more than once")
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}, lines


def _tab_separated(text: str, place: str) -> tuple[dict[str, list], list[int]]:
    """Two habits exist: quotes as in CSV, and quotes as plain characters (GLUE's originals). The file tells which."""
    quoted = None
    try:
        quoted = _rows(text, place, "\t", csv.QUOTE_MINIMAL)
        if not any("\n" in cell for cells in quoted[0].values() for cell in cells):
            return quoted
    except ConfigError:
        pass  # read with plain quotes below, which reports what is still wrong then
    try:  # a line break in a field is meant, or two stray quotes swallowed what stood between them
        return _rows(text, place, "\t", csv.QUOTE_NONE)
    except ConfigError:
        if quoted is None:
            raise
        return quoted


def _json_lines(text: str, place: str) -> tuple[dict[str, list], list[int]]:
    if text.lstrip().startswith("["):
        raise ConfigError(f"{place} is one JSON array; write one object per line (jq -c '.[]' does it)")
    rows, lines, problems = [], [], []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 and the like may stand in a text
        try:
            row = json.loads(line, strict=False) if line.strip() else None  # not strict: control characters are text
        except (ValueError, RecursionError) as error:
            problems.append(f"{place}, line {number}: not valid JSON ({str(error).partition(': line')[0]})")
            continue
        if isinstance(row, dict):
            rows.append(row)
            lines.append(number)
        elif line.strip():
            problems.append(f"{place}, line {number}: expected one JSON object, found {line.strip()[:40]}")
    if problems:
        raise ConfigError(problems[:3] + [f"{place}: {len(problems) - 3} more lines like these"][: len(problems) > 3])
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}, lines


def _pick(key: str, file: str, columns: dict[str, Any], wanted: dict[str, str]) -> dict[str, list]:
    """The wanted columns (setting -> column) as lists. Raises ConfigError for every one that is not there."""
    problems = [f"{key}: {file} is empty"] if not columns else []
    for setting, name in wanted.items() if columns else ():
        if name not in columns:
            close = difflib.get_close_matches(name, list(columns), n=1, cutoff=0.5)
            shown = ", ".join(other[:40] for other in list(columns)[:20]) + (f"; did you mean {close[0]}?" if close else "")
            problems.append(f"{setting}: {file} has no column {name!r}; its columns are {shown}")
        elif not len(columns[name]):
            problems = [f"{key}: {file} has columns but no rows"]
    if problems:
        raise ConfigError(problems)
    return {name: columns[name].to_pylist() if isinstance(columns[name], pa.ChunkedArray) else columns[name] for name in wanted.values()}
