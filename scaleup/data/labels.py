"""Notice class names that are one class in different spellings, or no class at all."""

import decimal
import json
import re
import unicodedata
from typing import Any

from scaleup.data.files import Table

NUMBER = re.compile(r"(?a)[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
# Texts that tools write for a missing value. A class may well be called none or NA, but not in a
# column of numbers.
MISSING = {"nan", "-nan", "<na>", "#n/a", "nat", "\\n"}  # databases write \N
MISSING_AMONG_NUMBERS = {"none", "null", "na", "n/a", "?", "-"}
TRUTH_VALUES = {"true": 1, "false": 0}


def _meaning(label: str) -> Any:
    """Return a value that is equal for all spellings of one class."""
    # Full-width digits, ligatures and the like, invisible characters, and the typographic minus.
    visible = (c for c in unicodedata.normalize("NFKC", label) if unicodedata.category(c) != "Cf")
    text = "".join(visible).replace("\N{MINUS SIGN}", "-").strip()
    word = text.lower()
    if word in TRUTH_VALUES:
        return decimal.Decimal(TRUTH_VALUES[word])
    if word in ("yes", "no"):
        return word
    try:
        return decimal.Decimal(text) if NUMBER.fullmatch(text) else text
    except decimal.InvalidOperation:  # an exponent of twenty digits
        return text


def spelling_problems(table: Table, column: str, labels: list[str]) -> list[str]:
    """Return which labels are one class in different spellings, with their rows.

    Examples are 1, 1.0, "1" and True, or TRUE and true. They would become separate classes, or be
    one class by accident. A missing value that is written as a word in a column of numbers is
    reported too.

    Args:
        column: name of the column with the labels.
        labels: its cleaned cells.
    """
    cells = table.columns[column]
    cells = cells if isinstance(cells, list) else cells.to_pylist()
    rows: dict[Any, dict[str, list[int]]] = {}  # meaning → spelling → rows
    meanings = {label: _meaning(label) for label in set(labels)}
    for row, (cell, label) in enumerate(zip(cells, labels)):
        is_text = isinstance(cell, str)
        # In JSON, 1, 1.0 and "1" are different values.
        spelling = label if is_text and table.is_text else json.dumps(label if is_text else cell)
        rows.setdefault(meanings[label], {}).setdefault(spelling, []).append(row)
    problems = []
    for spellings in rows.values():
        if len(spellings) > 1:
            places = "; ".join(
                f"{name[:40]} in {table.rows_shown(of)}" for name, of in list(spellings.items())[:5]
            )
            problems.append(
                f"{table.place}, column {column}: one class has several spellings; write it in "
                f"one way ({places})"
            )
    words = [meaning for meaning in rows if isinstance(meaning, str)]
    if len(words) == 1 < len(rows) and words[0].lower() in MISSING_AMONG_NUMBERS:
        (spellings,) = (of for meaning, of in rows.items() if meaning == words[0])
        missing = [row for of in spellings.values() for row in of]
        problems.append(
            f"{table.place}, {table.rows_shown(missing)}, column {column}: {words[0]!r} among "
            "numbers stands for a missing value; leave the rows out, or name the class otherwise"
        )
    return problems[:5]
