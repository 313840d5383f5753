"""Read the splits of a run from the user's files, and choose the rows of its sets.

    reader = SetReader(data, folder, columns, types)
    reader.read("train", parts, clean)       checked rows, as a file in the folder
    reader.write(encode, types)              the chosen rows as train.arrow, dev.arrow, test.arrow

A task says what is in a row: how a cell is cleaned, what is wrong with a row, and how its labels
become numbers.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from scaleup.data import prepared, splits
from scaleup.data.columns import CheckRow
from scaleup.data.examples import Examples, shared_texts
from scaleup.data.files import Table
from scaleup.data.sources import Reading, Source
from scaleup.errors import ConfigError
from scaleup.settings.data import DataSettings
from scaleup.settings.data_rules import COLUMNS

Cell = tuple[Any, str | None]  # the cleaned cell, and the problem with it or None
Clean = Callable[[Table], Callable[[Any, str], Cell]]
Rows = dict[str, list]  # columns of some rows


def role_columns(data: DataSettings) -> dict[str, str]:
    """Return the name of the column for each role of a task that reads the user's own files."""
    columns = {role: getattr(data, f"{role}_column") for role in COLUMNS[data.resolved_task]}
    return {role: column for role, column in columns.items() if column is not None}


class SetReader:
    """Reads the splits of a run into a folder, and collects all problems.

    Args:
        folder: where the files are written.
        types: role → Arrow type of its cleaned cells.
    """

    def __init__(self, data: DataSettings, folder: pathlib.Path, types: dict[str, pa.DataType]):
        self.data, self.folder, self.types = data, folder, types
        self.columns = role_columns(data)
        self.problems: list[str] = []
        self.described: list[dict[str, Any]] = []
        self.counts: dict[str, int] = {}  # rows of each split
        self.train: Sequence[int] = ()
        self.dev: Sequence[int] = ()

    def _raw(self, split: str) -> pathlib.Path:
        return self.folder / f"raw-{split}"

    def read(
        self, split: str, parts: list[Source], clean: Clean, check: CheckRow | None = None
    ) -> None:
        """Read a split, and choose the rows to train and to develop on if it is the training set.

        Args:
            clean: returns the function that cleans the cells of a table.
            check: see `clean_columns`.
        """
        reading = Reading(split, parts)
        try:
            read = (row.values for row in reading.read(self.columns, clean, check=check))
            rows = self.counts[split] = prepared.write(self._raw(split), self.types, read)
            self.described += reading.descriptions
            if split == "train":
                self.train, self.dev = splits.choose_rows(self.data, rows, reading.name)
                weights = [part.weight for part in parts]
                self.train = splits.weighted(self.data, self.train, reading.rows, weights)
        except ConfigError as error:
            self.problems += error.problems

    def training_cells(self, role: str, chosen: bool) -> Iterator[Any]:
        """Yield a cell of each row of the training data, or only of the rows to train on."""
        rows = prepared.read(self._raw("train")).select_columns([role])
        for batch in prepared.rows_of(rows, self.train if chosen else None):
            yield from batch[role]

    def write(
        self, encode: Callable[[Rows], Rows], types: dict[str, pa.DataType]
    ) -> dict[str, datasets.Dataset]:
        """Write the sets of the run with encoded rows, and return them by name.

        Args:
            encode: cleaned columns → the columns of `types`.

        Raises:
            ConfigError: with every problem of the files.
        """
        if self.problems:
            raise ConfigError(self.problems)
        chosen: dict[str, tuple[str, Sequence[int] | None]] = {"train": ("train", self.train)}
        chosen["dev"] = ("train", self.dev) if len(self.dev) else ("validation", None)
        if "test" in self.counts:
            chosen["test"] = ("test", splits.choose_test_rows(self.data, self.counts["test"]))
        sets = {}
        for name, (split, rows) in chosen.items():
            path = self.folder / f"{name}.arrow"
            batches = prepared.rows_of(prepared.read(self._raw(split)), rows)
            prepared.write(path, types, map(encode, batches))
            sets[name] = prepared.read(path)
        for split in self.counts:
            self._raw(split).unlink()
        return sets

    def fields(self, sets: dict[str, datasets.Dataset], labels: list[str] | None) -> dict[str, Any]:
        """Return the fields of `Examples` that are stored beside the sets."""
        shared = shared_texts(sets["train"], sets["dev"], sets.get("test"))
        return {
            "labels": labels,
            "metric": "f1",
            "task": self.data.resolved_task,
            "test_is_dev": False,
            "sources": self.described,
            "shared": [[*names, count] for names, count in shared.items()],
        }


def declared_names(table: Table, role: str) -> list[str] | None:
    """Return the names in id order that a file declares for the lists of a column, if any."""
    feature = table.features.get(table.roles[role])
    inner = getattr(feature, "feature", None)
    return inner.names if isinstance(inner, datasets.ClassLabel) else None


def named(item: Any, declared: list[str] | None) -> str | None:
    """Return the name of a label that is a name or a declared id; None if it is neither."""
    if declared and isinstance(item, int) and 0 <= item < len(declared):
        return declared[item]
    if isinstance(item, bool) or not isinstance(item, str | int) or not str(item).strip():
        return None
    return str(item).strip()


def number_scored(tokens: Examples, texts: Examples) -> Examples:
    """Number the rows of dev, and then those of test, so that scoring can find them.

    The numbers are the column `reference`. The texts of both sets stay with the examples.
    """
    first, sets = 0, {}
    for name in ("dev", "test"):
        part = getattr(tokens, name)
        if part is not None:
            sets[name] = part.add_column("reference", np.arange(first, first + len(part)))
            first += len(part)
    kept = {name: getattr(texts, name) for name in sets}
    return dataclasses.replace(tokens, **sets, texts=kept)


def scored_rows(
    examples: Examples, numbers: np.ndarray
) -> tuple[datasets.Dataset, datasets.Dataset, list[int]]:
    """Return the set of tokens, its texts, and the rows that have the numbers of one evaluation."""
    assert examples.texts is not None
    first = len(examples.dev)
    name, start = ("dev", 0) if len(numbers) == 0 or numbers.min() < first else ("test", first)
    return getattr(examples, name), examples.texts[name], (numbers - start).tolist()


def fast_tokenizer(tokenizer: PreTrainedTokenizerBase, data: DataSettings) -> None:
    """Check that a tokenizer says where its tokens are in a text.

    Raises:
        ConfigError: the tokenizer is written in Python.
    """
    if not tokenizer.is_fast:
        problem = f"the tokenizer of {tokenizer.name_or_path} does not say where its tokens are"
        raise ConfigError(
            f"model.name: {problem} in a text, which data.task {data.resolved_task} needs; use a "
            "model with a tokenizer.json"
        )
