"""Examples: GLUE by name or your own files, K-shot splits, tokens, batches and metrics.

Texts are kept as they stand: control characters, mojibake and empty strings are text, only an absent value is missing.
"""

import csv
import dataclasses
import difflib
import functools
import hashlib
import io
import json
import os
import re
import sys
from typing import Any, Callable

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import stats
from sklearn import metrics
from transformers import DataCollatorWithPadding, EvalPrediction, PreTrainedTokenizerBase

from scaleup.config import ConfigError, DataSettings, Section

# Task -> text column, column of the second text, class names in id order (None: regression), metric.
GLUE = {
    "cola": ("sentence", None, ["unacceptable", "acceptable"], "matthews"),
    "sst2": ("sentence", None, ["negative", "positive"], "accuracy"),
    "mrpc": ("sentence1", "sentence2", ["not_equivalent", "equivalent"], "f1"),
    "qqp": ("question1", "question2", ["not_duplicate", "duplicate"], "f1"),
    "stsb": ("sentence1", "sentence2", None, "spearman"),
    "mnli": ("premise", "hypothesis", ["entailment", "neutral", "contradiction"], "accuracy"),
    "qnli": ("question", "sentence", ["entailment", "not_entailment"], "accuracy"),
    "rte": ("sentence1", "sentence2", ["entailment", "not_entailment"], "accuracy"),
    "wnli": ("sentence1", "sentence2", ["not_entailment", "entailment"], "accuracy"),
}


@dataclasses.dataclass(frozen=True)
class Examples:
    """The sets of a run: columns text, text_pair (pairs only) and label (class id or float); after `tokenize`, tokens."""

    train: datasets.Dataset
    dev: datasets.Dataset
    test: datasets.Dataset | None  # None: no test set was given
    labels: list[str] | None  # class names in id order; None: regression
    metric: str  # accuracy, f1, matthews or spearman: picks the best checkpoint
    task: str  # sequence_classification or regression
    test_is_dev: bool  # GLUE with k all: the official validation set is both
    sources: list[dict[str, Any]]  # for each set read: split, rows, and file with sha256 or hub_id with name


def _delimited(text: str, place: str, delimiter: str, quoting: int) -> tuple[dict[str, list], list[int]]:
    csv.field_size_limit(sys.maxsize)  # the default, 131,072 characters, refuses long documents
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    header, rows, lines, line = [], [], [], 1
    try:
        for row in reader:
            if row and not header:
                header = [name.strip() for name in row]
            elif row:
                rows.append(row)
                lines.append(line)
                # A tab inside quotes in a .tsv is a sign that two stray quotes swallowed what stands between them.
                if len(row) != len(header) or (delimiter == "\t" and any("\t" in cell for cell in row)):
                    advice = "quote a text that holds a comma or a line break" if delimiter == "," else "no text may hold a tab"
                    raise ConfigError(f"{place}, line {line}: {len(row)} fields under a header of {len(header)}; {advice}")
            line = reader.line_num + 1
    except csv.Error as error:
        advice = "a quoted field must end, and a quote inside it must be doubled"
        raise ConfigError(f"{place}, line {line}: not valid CSV ({error}); {advice}") from None
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise ConfigError(f"{place} has the column {', '.join(twice)} more than once")
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}, lines


def _json_lines(text: str, place: str) -> tuple[dict[str, list], list[int]]:
    rows, lines = [], []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 and the like may stand in a text
        if line.strip():
            try:
                rows.append(json.loads(line, strict=False))  # not strict: control characters are text
            except (ValueError, RecursionError) as error:
                reason = str(error).partition(": line")[0]
                raise ConfigError(f"{place}, line {number}: not valid JSON ({reason}); write one object per line") from None
            if not isinstance(rows[-1], dict):
                raise ConfigError(f"{place}, line {number}: not a JSON object but {line[:40]}; write one object per line")
            lines.append(number)
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}, lines


def _parse(raw: bytes, suffix: str, place: str) -> tuple[dict[str, Any], list[int] | None, dict[str, Any]]:
    """Columns by name, the line on which each row begins, and the features that `datasets` left in a Parquet file."""
    if suffix == ".parquet":
        try:
            table = pq.read_table(pa.BufferReader(raw))
            table.validate(full=True)  # text that is not UTF-8 would fail only later
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"{place}: not a readable Parquet file ({' '.join(str(error).split())[:100]})") from None
        try:
            features = datasets.Features.from_arrow_schema(table.schema)
        except (KeyError, TypeError, ValueError, AttributeError):
            features = {}  # what another tool left there; the columns speak for themselves
        return dict(zip(table.column_names, table.columns)), None, features
    try:
        text = raw.decode("utf-8-sig")  # with or without the byte order mark that spreadsheets write
    except UnicodeDecodeError as error:
        line, byte = raw.count(b"\n", 0, error.start) + 1, raw[error.start]
        raise ConfigError(f"{place}, line {line}: not UTF-8 text (byte 0x{byte:02x}); save the file as UTF-8") from None
    if suffix == ".csv":
        return *_delimited(text, place, ",", csv.QUOTE_MINIMAL), {}
    if suffix == ".tsv":
        try:
            return *_delimited(text, place, "\t", csv.QUOTE_MINIMAL), {}
        except ConfigError:  # quotes are plain characters, as in GLUE's originals, or the mistake shows again
            return *_delimited(text, place, "\t", csv.QUOTE_NONE), {}
    if suffix in (".jsonl", ".json"):
        return *_json_lines(text, place), {}
    raise ConfigError(f"{place} has an unknown extension; use .csv, .tsv, .jsonl, .json (lines) or .parquet")


def _cell(value: Any, role: str, regression: bool, declared: list[str] | None) -> tuple[str | float | None, str | None]:
    """A cell as text, class name or number, or else what is wrong with it."""
    if value is None or value != value:  # NaN is what other tools make of a gap
        return None, "is missing"
    if role == "label" and declared and isinstance(value, int):
        if 0 <= value < len(declared):
            return declared[value], None
        # GLUE withholds a label by giving -1.
        return None, "is missing" if value == -1 else f"{value} is none of the {len(declared)} classes of this file"
    if not isinstance(value, str | int | float):
        return None, f"holds a {type(value).__name__}, not {'a label' if role == 'label' else 'text'}"
    if role != "label":  # JSON can spell half a surrogate pair, which neither Arrow nor a tokenizer takes
        return re.sub("[\ud800-\udfff]", "\ufffd", str(value)), None
    whole = isinstance(value, float) and value.is_integer()  # 1.0 is what other tools make of 1 beside a gap
    text = str(int(value) if whole else value).strip()
    if not text or not regression:
        return text or None, None if text else "is missing"
    if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text) or not np.isfinite(np.float32(text)):
        return None, f"{text[:40]!r} is not a number"
    return float(text), None


def _wanted(data: DataSettings) -> dict[str, str]:
    """Role (text, text_pair, label) -> column."""
    columns = {"text": data.text_column, "text_pair": data.text_pair_column, "label": data.label_column}
    if data.name is not None:
        columns = {"text": GLUE[data.name][0], "text_pair": GLUE[data.name][1], "label": "label"}
    return {role: column for role, column in columns.items() if column is not None}


def _check_columns(key: str, file: str, columns: dict[str, Any], wanted: dict[str, str]) -> None:
    problems = [] if columns else [f"{key}: {file} is empty"]
    for role, name in wanted.items() if columns else ():
        if name not in columns:
            close = difflib.get_close_matches(name, list(columns), n=1, cutoff=0.5)
            shown = ", ".join(other[:40] for other in list(columns)[:20]) + (f"; did you mean {close[0]}?" if close else "")
            setting = key if key == "data.path" else f"data.{role}_column"
            problems.append(f"{setting}: {file} has no column {name!r}; its columns are {shown}")
        elif not len(columns[name]):
            problems = [f"{key}: {file} has columns but no rows"]
    if problems:
        raise ConfigError(problems)


def _clean(key: str, file: str, parsed: tuple, data: DataSettings, known: list[str]) -> tuple[dict[str, list], list[str] | None]:
    """The wanted columns by role, labels as class names or floats, and the class names in id order as far as declared.

    `known`: the classes of training, once they are read. Raises ConfigError with a sentence for each kind of bad cell.
    """
    columns, lines, features = parsed
    wanted, part, problems = _wanted(data), {}, []
    _check_columns(key, file, columns, wanted)
    feature = features.get(wanted["label"])
    declared = feature.names if isinstance(feature, datasets.ClassLabel) else None
    if data.name is not None:
        expected = GLUE[data.name][2]
        if declared and declared != expected:
            raise ConfigError(f"{key}: {file} has the classes {', '.join(declared)}: that is not {data.name}")
        declared = expected
    for role, column in wanted.items():
        part[role], bad = [], {}
        cells = columns[column].to_pylist() if isinstance(columns[column], pa.ChunkedArray) else columns[column]
        for row, cell in enumerate(cells):
            value, reason = _cell(cell, role, _task(data) == "regression", declared)
            if role == "label" and known and reason is None and value not in known:
                reason = f"the label {value!r} does not occur in training"
            if reason is not None:
                bad.setdefault(reason, []).append(f"row {row + 1}" + (f" (line {lines[row]})" if lines else ""))
            part[role].append(value)
        for reason, rows in list(bad.items())[:5]:
            more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
            problems.append(f"{key}: {file}, {', '.join(rows[:3])}{more}, column {column}: {reason}")
    if problems:
        raise ConfigError(problems)
    return part, declared


def _files(data: DataSettings) -> dict[str, tuple[str, str]]:
    """Split -> the setting to name in messages, and the file. Empty: the hub."""
    if data.name is None:
        named = {"train": data.train_file, "validation": data.validation_file, "test": data.test_file}
        return {split: (f"data.{split}_file", file) for split, file in named.items() if file is not None}
    if data.path is None or (re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", data.path) and not os.path.exists(data.path)):
        return {}
    found = {}
    for split in ("train", "validation"):
        stems = [split + end for end in ("", "-00000-of-00001", "_matched", "_matched-00000-of-00001")]  # ours, and the hub's
        paths = [os.path.join(data.path, folder, f"{stem}.parquet") for folder in (data.name, "") for stem in stems]
        found[split] = ("data.path", next(filter(os.path.exists, paths), paths[0]))
    return found


def _from_hub(data: DataSettings):
    hub_id = data.path or "nyu-mll/glue"
