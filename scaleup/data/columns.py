"""Read the columns that a task needs, and report every mistake in them with its rows."""

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa

from scaleup.data.files import Batch, Table
from scaleup.errors import ConfigError

KINDS = 5  # of mistakes are reported per column
# A row by role → the role and the problem with its cell, or None.
CheckRow = Callable[[dict[str, Any]], tuple[str, str] | None]


@dataclasses.dataclass
class Places:
    """The number of rows with a mistake, and the first three of them."""

    count: int = 0
    first: list[tuple[int, int | None]] = dataclasses.field(default_factory=list)  # row, line

    def add(self, row: int, line: int | None) -> None:
        """Count a row, which has the number `row` from 0."""
        self.count += 1
        if len(self.first) < 3:
            self.first.append((row, line))

    def __str__(self) -> str:
        more = f" and {self.count - 3} more" if self.count > 3 else ""
        shown = (
            f"row {row + 1}{'' if line is None else f' (line {line})'}" for row, line in self.first
        )
        return ", ".join(shown) + more

    @classmethod
    def joined(cls, several: Iterable["Places"]) -> "Places":
        """Return the places of several kinds together."""
        several = list(several)
        first = [place for places in several for place in places.first]
        return cls(sum(places.count for places in several), first[:3])


@dataclasses.dataclass(frozen=True)
class Cleaned:
    """The cleaned cells of a batch by role, with the batch and the number of its first row."""

    values: dict[str, list]
    batch: Batch
    first_row: int


def _no_column(place: str, column: str, columns: Iterable[str]) -> str:
    """Name the columns that exist, and the one that may have been meant."""
    names = list(columns)
    shown = ", ".join(name[:40] for name in names[:20]) or "none"
    close = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
    advice = f"; did you mean {close[0]}" if close else ""
    return f"{place} has no column {column!r}; its columns are {shown}{advice}"


def replace_surrogates(text: str) -> str:
    """Replace halves of surrogate pairs, which JSON can spell but Arrow and tokenizers refuse."""
    return text if text.isascii() else re.sub("[\ud800-\udfff]", "\ufffd", text)


def as_list(cell: Any) -> tuple[list[Any] | None, str | None]:
    """Return a cell that holds a list, as JSON in CSV, and the problem with the cell or None."""
    if cell is None or cell != cell:
        return None, "is missing"
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            return None, "is not a list in JSON"
    if not isinstance(cell, list | tuple):
        return None, f"holds a {type(cell).__name__}, not a list"
    return list(cell), None


def clean_columns(
    table: Table,
    columns: dict[str, str],
    clean: Callable[[Any, str], tuple[Any, str | None]],
    column_key: str | None = None,
    at_once: bool = False,
    check: CheckRow | None = None,
) -> Iterator[Cleaned]:
    """Yield the cleaned cells of the columns that a task needs, in batches.

    Args:
        columns: role (text, label, …) → name of the column in the file.
        clean: (cell, role) → (value, the problem with the cell or None).
        column_key: the setting to name if a column is missing. Default: data.<role>_column.
        at_once: stop at the first batch with mistakes.
        check: what is wrong with a row whose cells are all right.

    Raises:
        ConfigError: after the last row, if there are mistakes. It names at most five kinds of
            mistakes per column.
    """
    names: dict[str, None] = {}
    bad: dict[str, dict[str, Places]] = {role: {} for role in columns}
    rows = 0

    def add(role: str, problem: str, batch: Batch, row: int) -> None:
        if problem in bad[role] or len(bad[role]) < KINDS:
            line = batch.lines[row] if batch.lines else None
            bad[role].setdefault(problem, Places()).add(rows + row, line)

    for batch in table.batches():
        names.update(dict.fromkeys(batch.columns))
        values: dict[str, list] = {}
        wrong: set[int] = set()
        for role, column in columns.items():
            cells = batch.columns.get(column, [None] * batch.rows)
            cells = cells.to_pylist() if isinstance(cells, pa.Array) else cells
            cleaned = [clean(cell, role) for cell in cells]
            values[role] = [value for value, _ in cleaned]
            for row, (_, problem) in enumerate(cleaned):
                if problem is not None:
                    add(role, problem, batch, row)
                    wrong.add(row)
        for row in range(batch.rows if check else 0):
            found = None
            if check is not None and row not in wrong:
                found = check({role: cells[row] for role, cells in values.items()})
            if found is not None:
                add(*found, batch, row)
        if batch.rows and not any(bad.values()):
            yield Cleaned(values, batch, rows)
        rows += batch.rows
        if at_once and any(bad.values()):
            break
    problems = []
    for role, column in columns.items():
        if column not in names:
            place = f"{column_key or f'data.{role}_column'}: {table.file}"
            problems.append(_no_column(place, column, names))
        else:
            problems += [
                f"{table.place}, {places}, column {column}: {problem}"
                for problem, places in bad[role].items()
            ]
    if problems or not rows:
        raise ConfigError(problems or f"{table.place} has no rows")
