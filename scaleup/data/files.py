"""Files of examples to columns: CSV, TSV, JSON lines, Parquet; and which rows are for training and which for development.

Texts are kept as they stand: control characters, mojibake and empty strings are text, only an absent value is missing.
"""

import csv
import dataclasses
import difflib
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scaleup.errors import ConfigError
from scaleup.settings.schema import DataSettings


@dataclasses.dataclass(frozen=True)
class Examples:
    """The sets of a run; after `tokenize`, tokens. Columns: text, text_pair (pairs only) and label (class id or float) where there
    is something to classify; text or messages, target and reference (a row of `references`) where text is to be written."""

    train: datasets.Dataset
    dev: datasets.Dataset
    test: datasets.Dataset | None  # None: no test set was given
    labels: list[str] | None  # class names in id order; None: not a classification
    metric: str  # picks the best checkpoint
    task: str  # data.task
    test_is_dev: bool  # GLUE with k all: the official validation set is both
    sources: list[
        dict[str, Any]
    ]  # for each set read: split, rows, and file with sha256 or hub_id with name
    references: list[list[str]] | None = (
        None  # what a written text is scored against: every target of the same source
    )
    prompts: list[str] | None = None  # those sources
    known: int = 0  # of the dev set's, those that are in train too, with other targets


def _delimited(
    text: str, place: str, delimiter: str, quoting: int
) -> tuple[dict[str, list], list[int]]:
    csv.field_size_limit(2**31 - 1)  # the default, 131,072 characters, refuses long documents
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True
    )
    header, rows, lines, line = [], [], [], 1
    try:
        for row in reader:
            if row and not header:
                header = [name.strip() for name in row]
            elif row:
                rows.append(row)
                lines.append(line)
                # A tab inside quotes in a .tsv is a sign that two stray quotes swallowed what stands between them.
                if len(row) != len(header) or (
                    delimiter == "\t" and any("\t" in cell for cell in row)
                ):
                    if delimiter == "," and len(header) == 1 and ";" in header[0]:
                        raise ConfigError(
                            f"{place}: its columns are separated by semicolons; save it with commas, or with tabs as .tsv"
                        )
                    advice = (
                        "a text with a comma or line break needs quotes"
                        if delimiter == ","
                        else "no text may hold a tab"
                    )
                    raise ConfigError(
                        f"{place}, line {line}: {len(row)} fields under a header of {len(header)}; {advice}"
                    )
            line = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError(
            f"{place}, line {line}: not valid CSV ({error}); a quote inside a quoted field is doubled"
        ) from None
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise ConfigError(f"{place} has the column {', '.join(twice)} more than once")
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}, lines


def _json_lines(text: str, place: str) -> tuple[dict[str, list], list[int]]:
    rows, lines = [], []
    for number, line in enumerate(
        text.split("\n"), 1
    ):  # not splitlines: U+2028 and the like may stand in a text
        if line.strip():
            try:
                rows.append(
                    json.loads(line, strict=False)
                )  # not strict: control characters are text
                lines.append(number)
                if not isinstance(rows[-1], dict):
                    raise ValueError(f"but a {type(rows[-1]).__name__}")
            except (ValueError, RecursionError) as error:
                raise ConfigError(
                    f"{place}, line {number}: not one JSON object ({str(error).partition(': line')[0]})"
                ) from None
    return {
        name: [row.get(name) for row in rows]
        for name in dict.fromkeys(name for row in rows for name in row)
    }, lines


def read_columns(
    key: str, file: str
) -> tuple[dict[str, Any], list[int] | None, dict[str, Any], dict[str, Any]]:
    """Columns by name, the line on which each row begins, the features that `datasets` left in a Parquet file, the source."""
    place, suffix = f"{key}: {file}", os.path.splitext(file)[1].lower()
    if suffix not in (".csv", ".tsv", ".jsonl", ".json", ".parquet"):
        raise ConfigError(
            f"{place} has an unknown extension; use .csv, .tsv, .jsonl, .json (lines) or .parquet"
        )
    try:
        with open(file, "rb") as handle:
            raw = handle.read()
        source = {"file": file, "sha256": hashlib.sha256(raw).hexdigest()}
        if suffix == ".parquet":
            table = pq.read_table(pa.BufferReader(raw))
            table.validate(full=True)  # text that is not UTF-8 would fail only later
            try:
                features = datasets.Features.from_arrow_schema(table.schema)
            except (KeyError, TypeError, ValueError, AttributeError):
                features = {}  # what another tool left there; the columns speak for themselves
            return dict(zip(table.column_names, table.columns)), None, features, source
        text = raw.decode(
            "utf-8-sig"
        )  # with or without the byte order mark that spreadsheets write
    except UnicodeDecodeError as error:
        line, byte = raw.count(b"\n", 0, error.start) + 1, raw[error.start]
        raise ConfigError(
            f"{place}, line {line}: not UTF-8 text (byte 0x{byte:02x}); save the file as UTF-8"
        ) from None
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())[
            :100
        ]
        raise ConfigError(f"{place} cannot be read: {reason}") from None
    if not text.strip():
        raise ConfigError(f"{place} is empty")
    if suffix == ".csv":
        return *_delimited(text, place, ",", csv.QUOTE_MINIMAL), {}, source
    if suffix != ".tsv":
        return *_json_lines(text, place), {}, source
    try:
        return *_delimited(text, place, "\t", csv.QUOTE_MINIMAL), {}, source
    except (
        ConfigError
    ):  # quotes are plain characters, as in GLUE's originals, or the mistake shows again
        return *_delimited(text, place, "\t", csv.QUOTE_NONE), {}, source


def own_files(data: DataSettings) -> dict[str, tuple[str, str]]:
    """Split → the setting to name in messages, and the user's file."""
    named = {"train": data.train_file, "validation": data.validation_file, "test": data.test_file}
    return {
        split: (f"data.{split}_file", file) for split, file in named.items() if file is not None
    }


def no_column(key: str, file: str, column: str, columns: Iterable[str]) -> str:
    """One line: which columns there are, and which one may have been meant."""
    shown = ", ".join(name[:40] for name in list(columns)[:20]) or "none"
    shown = "; did you mean ".join(
        [shown, *difflib.get_close_matches(column, list(columns), n=1, cutoff=0.5)]
    )
    return f"{key}: {file} has no column {column!r}; its columns are {shown}"


def whole_characters(text: str) -> str:
    """JSON can spell half a surrogate pair, which neither Arrow nor a tokenizer takes."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def judge_cells(
    columns: dict[str, Any],
    column: str,
    lines: list[int] | None,
    place: str,
    judge: Callable[[Any], tuple[Any, str | None]],
) -> tuple[list, list[str]]:
    """Values of a column as `judge` gives them (value, what is wrong or None), and a line on each kind of mistake, five at most."""
    values, bad = [], {}
    cells = columns[column]
    for row, cell in enumerate(
        cells.to_pylist() if isinstance(cells, pa.ChunkedArray) else cells
    ):
        value, reason = judge(cell)
        if reason is not None:
            bad.setdefault(reason, []).append(
                f"row {row + 1}" + (f" (line {lines[row]})" if lines else "")
            )
        values.append(value)
    problems = []
    for reason, rows in list(bad.items())[:5]:
        shown = ", ".join(rows[:3]) + f" and {len(rows) - 3} more" * (len(rows) > 3)
        problems.append(f"{place}, {shown}, column {column}: {reason}")
    return values, problems


def cut(data: DataSettings, rows: int, file: str) -> tuple[list[int], list[int]]:
    """FusedQKVLayout of the training set to train on, and those to develop on (none where a development set is given)."""
    given = data.k == "all" if data.name is not None else data.validation_file is not None
    dev = 0 if given else data.dev_size
    k = max(rows - dev, 1) if data.k == "all" else data.k
    if k + dev > rows:
        fits = [f"data.k={rows - dev}"] * (rows > dev) + [f"data.dev_size={rows - k}"] * (
            dev > 0 and rows > k
        )
        advice = (
            f"the largest that fits: {' or '.join(fits)}"
            if fits and data.k != "all"
            else "lower data.dev_size"
        )
        asked = (
            f"data.dev_size: {dev}"
            if data.k == "all"
            else f"data.k: {k} examples to train on and {dev}"
        )
        raise ConfigError(f"{asked} for development, but {file} has {rows}; {advice}")
    order = (
        np.random.default_rng(data.seed).permutation(rows).tolist()
        if dev or data.k != "all"
        else list(range(rows))
    )
    return order[:k], order[k : k + dev]


def same_state(files: Iterable[str]) -> tuple:
    """Changes when a file does: what has been read of them may be used again until then."""
    states = [os.stat(file) for file in files if os.path.isfile(file)]
    return tuple((state.st_mtime_ns, state.st_size) for state in states)
