"""Notice class names that are one class in different spellings, or no class at all."""

import decimal
import json
import re
import unicodedata
from typing import Any

from scaleup.data.columns import Cleaned, Places
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


class Spellings:
    """Collects in how many ways the classes of a training set are written, and where."""

    def __init__(self, table: Table, column: str):
        self.table, self.column = table, column
        self.places: dict[str, dict[str, Places]] = {}  # label → spelling → rows

    def add(self, cleaned: Cleaned) -> None:
        """Note the labels of some rows."""
        batch, labels = cleaned.batch, cleaned.values["label"]
        cells = batch.columns[self.column]
        cells = cells if isinstance(cells, list) else cells.to_pylist()
        for row, (cell, label) in enumerate(zip(cells, labels)):
            is_text = isinstance(cell, str)
            # In JSON, 1, 1.0 and "1" are different values.
            plain = is_text and self.table.is_text
            spelling = label if plain else json.dumps(label if is_text else cell)
            places = self.places.setdefault(label, {}).setdefault(spelling, Places())
            places.add(cleaned.first_row + row, batch.lines[row] if batch.lines else None)

    @property
    def labels(self) -> set[str]:
        """The labels as they are cleaned."""
        return set(self.places)

    def problems(self) -> list[str]:
        """Return which labels are one class in different spellings, with their rows.

        Examples are 1, 1.0, "1" and True, or TRUE and true. They would become separate classes, or
        be one class by accident. A missing value that is written as a word in a column of numbers
        is reported too.
        """
        by_meaning: dict[Any, dict[str, Places]] = {}
        for label, spellings in self.places.items():
            by_meaning.setdefault(_meaning(label), {}).update(spellings)
        place, column, problems = self.table.place, self.column, []
        for spellings in by_meaning.values():
            if len(spellings) > 1:
                shown = sorted(spellings.items(), key=lambda item: item[1].first)[:5]
                listed = "; ".join(f"{name[:40]} in {places}" for name, places in shown)
                problems.append(
                    f"{place}, column {column}: one class has several spellings; write it in one "
                    f"way ({listed})"
                )
        words = [meaning for meaning in by_meaning if isinstance(meaning, str)]
        if len(words) == 1 < len(by_meaning) and words[0].lower() in MISSING_AMONG_NUMBERS:
            missing = Places.joined(by_meaning[words[0]].values())
            problems.append(
                f"{place}, {missing}, column {column}: {words[0]!r} among numbers stands for a "
                "missing value; leave the rows out, or name the class otherwise"
            )
        return problems[:5]


def common_names(declared: list[list[str] | None], found: set[str]) -> list[str] | None:
    """Return the names in id order for all sources of a training set; None if nothing tells it.

    Args:
        declared: the names that each source declares, or None.
        found: the names that occur.
    """
    if declared[-1] is not None and found <= set(declared[-1]):
        return declared[-1]
    if None in declared:
        return None
    return list(dict.fromkeys(name for names in declared for name in names or ()))


def joined_problems(labels: set[str], key: str = "data.sources") -> list[str]:
    """Return which labels together are one class in different spellings.

    Args:
        key: the setting to name in messages.
    """
    by_meaning: dict[Any, list[str]] = {}
    for label in sorted(labels):
        by_meaning.setdefault(_meaning(label), []).append(label)
    return [
        f"{key}: one class has several spellings ({', '.join(same)}); write it in one way"
        for same in by_meaning.values()
        if len(same) > 1
    ][:5]
