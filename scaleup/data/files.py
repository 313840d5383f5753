"""Read files of examples (CSV, TSV, JSON lines, Parquet) in batches of rows.

Texts stay as they are: control characters, wrongly decoded characters and empty strings are text.
Only an absent value counts as missing. A file is never in memory as a whole.
"""

import csv
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator
from typing import IO, Any, Literal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from scaleup.errors import ConfigError, one_line
from scaleup.io import check_regular_file, file_hash, is_lfs_pointer, read_bytes, sample_hash

EXTENSIONS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
ROWS = 1000  # of a batch at most
CHARACTERS = 1 << 24  # of a batch, about


@dataclasses.dataclass(frozen=True)
class Batch:
    """Some rows of a table. The first batch of a table may have columns without rows."""

    columns: dict[str, Any]  # name → cells: a list or an Arrow array
    rows: int
    lines: list[int] | None = None  # the line on which each row begins; None: not a text file


@dataclasses.dataclass(frozen=True)
class Table:
    """One file of examples, or one split of a data set of the hub."""

    key: str  # the setting to name in messages
    file: str
    batches: Callable[[], Iterator[Batch]]  # each call reads from the beginning
    source: dict[str, Any]  # file and sha256, or hub_id and name
    features: dict[str, Any] = dataclasses.field(default_factory=dict)  # declared by `datasets`
    roles: dict[str, str] = dataclasses.field(default_factory=dict)  # role → column in this table

    @property
    def place(self) -> str:
        """The setting and the file, as messages name them."""
        return f"{self.key}: {self.file}"

    @property
    def is_text(self) -> bool:
        """Return whether every cell is a text, as in CSV and TSV."""
        return os.path.splitext(self.file)[1].lower() in (".csv", ".tsv")


def in_batches(
    rows: Iterator[tuple[Any, int, int]], columns: Callable[[list], dict[str, list]]
) -> Iterator[Batch]:
    """Yield batches of rows.

    Args:
        rows: each row with its line and its size in characters.
        columns: turns the rows of a batch into columns.
    """
    some: list[Any] = []
    lines: list[int] = []
    size = 0
    for row, line, characters in rows:
        some.append(row)
        lines.append(line)
        size += characters
        if len(some) == ROWS or size > CHARACTERS:
            yield Batch(columns(some), len(some), lines)
            some, lines, size = [], [], 0
    if some:
        yield Batch(columns(some), len(some), lines)


def _wrong_field_count(count: int, header: list[str], delimiter: str, line: int) -> str:
    if delimiter == "," and len(header) == 1 and ";" in header[0]:
        advice = "save it with commas, or with tabs as .tsv"
        return f": its columns are separated by semicolons; {advice}"
    commas = "a text with a comma or line break needs quotes"
    advice = commas if delimiter == "," else "no text may hold a tab"
    return f", line {line}: {count} fields under a header of {len(header)}; {advice}"


def _delimited(
    stream: IO[str], place: str, delimiter: str, quoting: Literal[0, 3]
) -> Iterator[Batch]:
    """Parse CSV or TSV text. The first batch has the columns without rows."""
    csv.field_size_limit(2**31 - 1)  # the default, 131,072 characters, refuses long documents
    reader = csv.reader(stream, delimiter=delimiter, quoting=quoting, strict=True)
    header: list[str] = []
    line = 1

    def rows() -> Iterator[tuple[list[str], int, int]]:
        nonlocal line
        line = reader.line_num + 1
        for row in reader:
            if row:
                # A tab inside quotes in a .tsv means that two stray quotes joined several fields.
                joined = delimiter == "\t" and any("\t" in cell for cell in row)
                if len(row) != len(header) or joined:
                    raise ConfigError(place + _wrong_field_count(len(row), header, delimiter, line))
                yield row, line, sum(map(len, row))
            line = reader.line_num + 1

    try:
        header += (name.strip() for name in next(filter(None, reader), []))
        if repeated := sorted({name for name in header if name and header.count(name) > 1}):
            raise ConfigError(f"{place} has the column {', '.join(repeated)} more than once")
        yield Batch({name: [] for name in header}, 0, [])
        yield from in_batches(rows(), lambda some: dict(zip(header, map(list, zip(*some)))))
    except csv.Error as error:
        advice = "a quote inside a quoted field is doubled"
        raise ConfigError(f"{place}, line {line}: not valid CSV ({error}); {advice}") from None


def _tabbed(stream: IO[str], place: str) -> Iterator[Batch]:
    """Parse TSV text. In GLUE's original files, quotes are plain characters."""
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL
    try:
        for _ in _delimited(stream, place, "\t", quoting):
            pass
    except ConfigError:
        quoting = csv.QUOTE_NONE
    stream.seek(0)
    yield from _delimited(stream, place, "\t", quoting)


def _json_rows(stream: IO[str], place: str) -> Iterator[tuple[dict, int, int]]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, strict=False)  # not strict: control characters are text
            if not isinstance(row, dict):
                raise ValueError(f"it is a {type(row).__name__}")
        except (ValueError, RecursionError) as error:
            reason = str(error).partition(": line")[0]
            problem = f"not one JSON object ({reason}); write one object per line"
            raise ConfigError(f"{place}, line {number}: {problem}") from None
        yield row, number, len(line)


def _json_columns(rows: list[dict]) -> dict[str, list]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _parquet(file: str) -> Iterator[Batch]:
    with pq.ParquetFile(file, pre_buffer=False) as content:
        yield Batch({name: [] for name in content.schema_arrow.names}, 0)
        for batch in content.iter_batches(batch_size=ROWS):
            batch.validate(full=True)  # text that is not UTF-8 would fail only later
            yield Batch(dict(zip(batch.schema.names, batch.columns)), batch.num_rows)


def _features(file: str) -> dict[str, Any]:
    """Return the features that `datasets` stored in a Parquet file."""
    try:
        return datasets.Features.from_arrow_schema(pq.read_schema(file))
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}  # metadata of another tool; the columns are complete without it


def _batches(place: str, file: str, suffix: str) -> Iterator[Batch]:
    try:
        if suffix == ".parquet":
            yield from _parquet(file)
            return
        # JSON: a text may contain U+2028 or a carriage return, which are no line ends.
        newline = "\n" if suffix in (".jsonl", ".json") else ""
        # Spreadsheets write a byte order mark.
        with open(file, encoding="utf-8-sig", newline=newline) as stream:
            if not any(line.strip() for line in stream):
                raise ConfigError(f"{place} is empty")
            stream.seek(0)
            if suffix == ".csv":
                yield from _delimited(stream, place, ",", csv.QUOTE_MINIMAL)
            elif suffix == ".tsv":
                yield from _tabbed(stream, place)
            else:
                yield from in_batches(_json_rows(stream, place), _json_columns)
    except UnicodeDecodeError:
        raise ConfigError(_not_utf8(place, file)) from None
    except (OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{place} cannot be read: {_reason(error)}") from None


def _not_utf8(place: str, file: str) -> str:
    content = read_bytes(file)
    try:
        content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        where = f"line {line}: not UTF-8 text (byte 0x{byte:02x})"
        return f"{place}, {where}; save the file as UTF-8"
    return f"{place} cannot be read: it changed meanwhile"


def _reason(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else None
    return reason or one_line(error, 100)


def read_table(key: str, file: str, hashed: bool = True) -> Table:
    """Open a file of examples, which messages name by the setting `key`.

    Args:
        hashed: identify the file by a hash of its content, instead of by its size and samples.
    """
    place, suffix = f"{key}: {file}", os.path.splitext(file)[1].lower()
    if suffix not in EXTENSIONS:
        raise ConfigError(
            f"{place} has an unknown extension; use .csv, .tsv, .jsonl, .json (lines) or .parquet"
        )
    try:
        check_regular_file(file)
        if is_lfs_pointer(file):
            problem = "is a Git LFS pointer instead of the file itself; run `git lfs pull`"
            raise ConfigError(f"{place} {problem}")
        source: dict[str, Any] = {"file": file}
        if hashed:
            source["sha256"] = file_hash(file)
        else:
            source["samples"] = sample_hash(file)
        features = _features(file) if suffix == ".parquet" else {}
    except (OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{place} cannot be read: {_reason(error)}") from None
    batches = functools.partial(_batches, place, file, suffix)
    return Table(key, file, batches, source, features)
