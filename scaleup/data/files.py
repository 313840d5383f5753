"""Read files of examples (CSV, TSV, JSON lines, Parquet) as columns, and choose the rows of a run.

Texts stay as they are: control characters, wrongly decoded characters and empty strings are text.
Only an absent value counts as missing.
"""

import csv
import dataclasses
import difflib
import filecmp
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scaleup.errors import ConfigError, one_line
from scaleup.io import LFS_MARK, check_regular_file, read_bytes
from scaleup.settings.schema import DataSettings

EXTENSIONS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


@dataclasses.dataclass(frozen=True)
class Examples:
    """The data sets of a run, as texts or, after `tokenize`, as tokens.

    Columns of texts: text, text_pair (pairs only) and label (class id or float) for classification
    and regression; text, target and reference (an index into `references`) for generation.
    """

    train: datasets.Dataset
    dev: datasets.Dataset
    test: datasets.Dataset | None  # None: the config names no test set
    labels: list[str] | None  # class names in id order; None: not a classification
    metric: str  # selects the best checkpoint
    task: str  # data.task
    test_is_dev: bool  # GLUE with data.k=all: the official validation set serves as both
    sources: list[dict[str, Any]]  # per set: split, rows, and file with sha256 or hub_id with name
    references: list[list[str]] | None = None  # all targets of each source in dev and test
    prompts: list[str] | None = None  # the sources that `references` belong to
    # Rows of dev and test whose texts also occur in the training set, and rows of test whose texts
    # also occur in dev, as (set, the other set) → number.
    shared: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Table:
    """One file of examples as columns."""

    key: str  # the setting to name in messages
    file: str
    columns: dict[str, Any]  # name → cells
    source: dict[str, Any]  # file and sha256, or hub_id and name
    lines: list[int] | None = None  # the line on which each row begins; None: not a text file
    features: dict[str, Any] = dataclasses.field(default_factory=dict)  # declared by `datasets`

    @property
    def place(self) -> str:
        """The setting and the file, as messages name them."""
        return f"{self.key}: {self.file}"

    @property
    def is_text(self) -> bool:
        """Return whether every cell is a text, as in CSV and TSV."""
        return os.path.splitext(self.file)[1].lower() in (".csv", ".tsv")

    def rows_shown(self, rows: list[int]) -> str:
        """Return at most three rows, counted from 1, with their lines."""
        lines = {row: f" (line {self.lines[row]})" if self.lines else "" for row in rows[:3]}
        more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
        return ", ".join(f"row {row + 1}{line}" for row, line in lines.items()) + more


def _wrong_field_count(count: int, header: list[str], delimiter: str, line: int) -> str:
    if delimiter == "," and len(header) == 1 and ";" in header[0]:
        advice = "save it with commas, or with tabs as .tsv"
        return f": its columns are separated by semicolons; {advice}"
    commas = "a text with a comma or line break needs quotes"
    advice = commas if delimiter == "," else "no text may hold a tab"
    return f", line {line}: {count} fields under a header of {len(header)}; {advice}"


def _delimited(
    text: str, place: str, delimiter: str, quoting: Literal[0, 3]
) -> tuple[dict[str, list], list[int]]:
    """Parse CSV or TSV text into columns and the line on which each row begins."""
    csv.field_size_limit(2**31 - 1)  # the default, 131,072 characters, refuses long documents
    stream = io.StringIO(text, newline="")
    reader = csv.reader(stream, delimiter=delimiter, quoting=quoting, strict=True)
    header: list[str] = []
    rows: list[list[str]] = []
    lines, line = [], 1
    try:
        for row in reader:
            if row and not header:
                header = [name.strip() for name in row]
            elif row:
                # A tab inside quotes in a .tsv means that two stray quotes joined several fields.
                joined = delimiter == "\t" and any("\t" in cell for cell in row)
                if len(row) != len(header) or joined:
                    raise ConfigError(place + _wrong_field_count(len(row), header, delimiter, line))
                rows.append(row)
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        advice = "a quote inside a quoted field is doubled"
        raise ConfigError(f"{place}, line {line}: not valid CSV ({error}); {advice}") from None
    if repeated := sorted({name for name in header if name and header.count(name) > 1}):
        raise ConfigError(f"{place} has the column {', '.join(repeated)} more than once")
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}, lines


def _json_lines(text: str, place: str) -> tuple[dict[str, list], list[int]]:
    """Parse JSON lines into columns and the line of each row."""
    rows, lines = [], []
    # Not splitlines: a text may contain U+2028, which Python takes for a line end.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, strict=False)  # not strict: control characters are text
            if not isinstance(row, dict):
                raise ValueError(f"but a {type(row).__name__}")
        except (ValueError, RecursionError) as error:
            reason = str(error).partition(": line")[0]
            raise ConfigError(f"{place}, line {number}: not one JSON object ({reason})") from None
        rows.append(row)
        lines.append(number)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}, lines


def _parquet(content: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the columns of a Parquet file and the features that `datasets` stored in it."""
    table = pq.read_table(pa.BufferReader(content))
    table.validate(full=True)  # text that is not UTF-8 would fail only later
    try:
        features = datasets.Features.from_arrow_schema(table.schema)
    except (KeyError, TypeError, ValueError, AttributeError):
        features = {}  # metadata of another tool; the columns are complete without it
    return dict(zip(table.column_names, table.columns)), features


def read_columns(key: str, file: str) -> Table:
    """Read a file of examples, which messages name by the setting `key`."""
    place, suffix = f"{key}: {file}", os.path.splitext(file)[1].lower()
    if suffix not in EXTENSIONS:
        raise ConfigError(
            f"{place} has an unknown extension; use .csv, .tsv, .jsonl, .json (lines) or .parquet"
        )
    try:
        content = read_bytes(file)
        if content.startswith(LFS_MARK):
            problem = "is a Git LFS pointer instead of the file itself; run `git lfs pull`"
            raise ConfigError(f"{place} {problem}")
        source = {"file": file, "sha256": hashlib.sha256(content).hexdigest()}
        if suffix == ".parquet":
            columns, features = _parquet(content)
            return Table(key, file, columns, source, features=features)
        text = content.decode("utf-8-sig")  # spreadsheets write a byte order mark
    except ConfigError:
        raise
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise ConfigError(
            f"{place}, line {line}: not UTF-8 text (byte 0x{byte:02x}); save the file as UTF-8"
        ) from None
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        reason = reason or one_line(error, 100)
        raise ConfigError(f"{place} cannot be read: {reason}") from None
    if not text.strip():
        raise ConfigError(f"{place} is empty")
    if suffix == ".csv":
        columns, lines = _delimited(text, place, ",", csv.QUOTE_MINIMAL)
    elif suffix == ".tsv":
        try:
            columns, lines = _delimited(text, place, "\t", csv.QUOTE_MINIMAL)
        except ConfigError:  # in GLUE's original files, quotes are plain characters
            columns, lines = _delimited(text, place, "\t", csv.QUOTE_NONE)
    else:
        columns, lines = _json_lines(text, place)
    return Table(key, file, columns, source, lines)


def user_files(data: DataSettings) -> dict[str, tuple[str, str]]:
    """Return, per split, the setting to name in messages and the user's file."""
    files = {split: getattr(data, f"{split}_file") for split in ("train", "validation", "test")}
    return {split: (f"data.{split}_file", file) for split, file in files.items() if file}


def identical_files(files: dict[str, tuple[str, str]]) -> list[str]:
    """Return which files have the content of another split's file, under whatever name."""
    problems = []
    for split, other in (("validation", "train"), ("test", "train"), ("test", "validation")):
        if split in files and other in files and _same_content(files[split][1], files[other][1]):
            key, file = files[split]
            known = "is trained on" if other == "train" else "picks the best checkpoint"
            problems.append(
                f"{key}: {file} has the same content as {files[other][1]}, which {known}; give "
                "other examples, or leave it out"
            )
            break  # a third file is equal to both
    return problems


def _same_content(file: str, other: str) -> bool:
    try:
        for path in (file, other):
            check_regular_file(path)
        return filecmp.cmp(file, other, shallow=False)
    except (OSError, ValueError):  # reading it reports the reason
        return False


def shared_texts(
    train: datasets.Dataset, dev: datasets.Dataset, test: datasets.Dataset | None
) -> dict[tuple[str, str], int]:
    """Return how many rows of one set have texts that also occur in another (`Examples.shared`)."""
    sets = {"train": train, "dev": dev} | ({} if test is None else {"test": test})
    roles = [role for role in ("text", "text_pair") if role in train.column_names]
    rows = {name: list(zip(*(part[role][:] for role in roles))) for name, part in sets.items()}
    counts = {}
    for name, other in (("dev", "train"), ("test", "train"), ("test", "dev")):
        if name in rows:
            known = set(rows[other])
            counts[name, other] = sum(row in known for row in rows[name])
    return counts


def _no_column(place: str, column: str, columns: Iterable[str]) -> str:
    """Name the columns that exist, and the one that may have been meant."""
    names = list(columns)
    shown = ", ".join(name[:40] for name in names[:20]) or "none"
    close = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
    advice = f"; did you mean {close[0]}" if close else ""
    return f"{place} has no column {column!r}; its columns are {shown}{advice}"


def replace_surrogates(text: str) -> str:
    """Replace halves of surrogate pairs, which JSON can spell but Arrow and tokenizers refuse."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def clean_columns(
    table: Table,
    columns: dict[str, str],
    clean: Callable[[Any, str], tuple[Any, str | None]],
    column_key: str | None = None,
) -> dict[str, list]:
    """Return the cleaned cells of the columns that a task needs, by role.

    The ConfigError names at most five kinds of mistakes per column.

    Args:
        columns: role (text, label, …) → name of the column in the file.
        clean: (cell, role) → (value, the problem with the cell or None).
        column_key: the setting to name if a column is missing. Default: data.<role>_column.
    """
    values: dict[str, list] = {}
    problems = []
    for role, column in columns.items():
        if column not in table.columns:
            place = f"{column_key or f'data.{role}_column'}: {table.file}"
            problems.append(_no_column(place, column, table.columns))
            continue
        cells = table.columns[column]
        cells = cells.to_pylist() if isinstance(cells, pa.ChunkedArray) else cells
        values[role] = []
        bad: dict[str, list[int]] = {}
        for row, cell in enumerate(cells):
            value, problem = clean(cell, role)
            values[role].append(value)
            if problem is not None:
                bad.setdefault(problem, []).append(row)
        for problem, rows in list(bad.items())[:5]:
            problems.append(f"{table.place}, {table.rows_shown(rows)}, column {column}: {problem}")
    if problems or not all(values.values()):
        raise ConfigError(problems or f"{table.place} has no rows")
    return values


def choose_rows(data: DataSettings, rows: int, file: str) -> tuple[list[int], list[int]]:
    """Choose the rows of a training set to train on and to develop on.

    The second list is empty if the config provides a separate development set.
    """
    has_dev = data.k == "all" if data.name is not None else data.validation_file is not None
    dev = 0 if has_dev else data.dev_size
    k = max(rows - dev, 1) if data.k == "all" else data.k
    if k + dev > rows:
        fits, request = [], f"data.dev_size: {dev}"
        if data.k != "all":
            request = f"data.k: {k} examples to train on and {dev}"
            fits += [f"data.k={rows - dev}"] if rows > dev else []
            fits += [f"data.dev_size={rows - k}"] if dev and rows > k else []
        advice = f"the largest that fits: {' or '.join(fits)}" if fits else "lower data.dev_size"
        raise ConfigError(f"{request} for development, but {file} has {rows}; {advice}")
    order = list(range(rows))
    if dev or data.k != "all":
        order = np.random.default_rng(data.seed).permutation(rows).tolist()
    return order[:k], order[k : k + dev]


def choose_test_rows(data: DataSettings, rows: int) -> list[int]:
    """Choose the rows of a test set to score: all, or the same `test_size` rows in every run."""
    if data.test_size is None or data.test_size >= rows:
        return list(range(rows))
    return sorted(np.random.default_rng(0).permutation(rows)[: data.test_size].tolist())


def file_states(files: dict[str, tuple[str, str]]) -> tuple:
    """Return modification times and sizes, which tell whether cached contents are still valid."""
    states = [os.stat(file) for _, file in files.values() if os.path.isfile(file)]
    return tuple((state.st_mtime_ns, state.st_size) for state in states)
