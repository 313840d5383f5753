"""Write tables as Markdown, as text for a terminal, and as CSV."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from scaleup.experiments.tables import PAPER, Table


def _lines(
    table: Table, marks: dict[int, str], spread: str, heading: str, paper: str
) -> pd.DataFrame:
    """Lay a table out as text.

    `marks` is rank → format of a mean. The others are the formats of a standard deviation, of a
    block's title and of the cells of the paper's rows.
    """

    def show(cell: Any) -> str:
        if pd.isna(cell.mean):
            return "–"
        if hasattr(cell, "low"):
            return _difference(cell)
        form = table.formats.get(cell.column, "{:.2f}")
        mark = "{}" if pd.isna(cell.rank) else marks[cell.rank]
        deviation = "" if pd.isna(cell.std) else spread.format(form.format(cell.std))
        return mark.format(form.format(cell.mean)) + deviation

    lines = []
    for block, of_block in table.cells.groupby("block", sort=False):
        if block:
            lines.append([heading.format(block), *[""] * len(table.columns)])
        for (row, source), cells in of_block.groupby(["row", "source"], sort=False):
            shown = [show(cell) for cell in cells.itertuples()]
            if source == PAPER:
                lines.append([paper.format(text) for text in ("paper", *shown)])
            else:
                lines.append([table.title_of(row), *shown])
    return pd.DataFrame(lines, columns=[table.first, *table.columns.values()])


def _difference(cell: Any) -> str:
    """Return a difference, with its intervals if there are several pairs."""
    if pd.isna(cell.low):
        return f"{cell.mean:+.1f}"
    bootstrap = f"[{cell.low:+.1f}, {cell.high:+.1f}]"
    return f"{cell.mean:+.1f} {bootstrap} ({cell.t_low:+.1f}, {cell.t_high:+.1f})"


def grid(frame: pd.DataFrame, style: str = "pipe", align: Sequence[str] = ()) -> str:
    """Return a frame of text as a table, in a style of tabulate.

    By default all columns but the first are aligned to the right.
    """
    align = align or ["left", *["right"] * (len(frame.columns) - 1)]
    return frame.to_markdown(index=False, tablefmt=style, disable_numparse=True, colalign=align)


def markdown(title: str, table: Table) -> str:
    """Return a table for GitHub: bold, underlined, subscripts; the paper's rows in italics."""
    lines = _lines(table, {1: "**{}**", 2: "<u>{}</u>"}, "<sub>{}</sub>", "**{}**", "*{}*")
    notes = "".join(f"{note}  \n" for note in table.footer)
    return f"### {title}\n\n{grid(lines)}\n\n{notes}"


def text(title: str, table: Table) -> list[str]:
    """Return the lines of a table for a terminal."""
    lines = grid(_lines(table, {1: "{}*", 2: "{}'"}, " ±{}", "{}", "{}"), "plain").splitlines()
    if table.cells["rank"].notna().any():
        lines.append(
            "* best, ' second best of scaleup's rows, or of the paper's; "
            "± standard deviation over seeds"
        )
    return [title, *lines, *table.footer]


def csv_text(table: Table) -> str:
    """Return one line for each cell, also for those without a result."""
    numbers = table.cells.select_dtypes(float).columns
    return table.cells.round(dict.fromkeys(numbers, 4)).to_csv(index=False)
