"""Where the examples of each split come from: files, splits of data sets on the hub, or several."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from scaleup.data.columns import Cleaned, clean_columns
from scaleup.data.files import ROWS, Batch, Table, read_table
from scaleup.errors import ConfigError, one_line
from scaleup.settings.schema import DataSettings


@dataclasses.dataclass(frozen=True)
class HubSplit:
    """A split of a data set on the hub."""

    path: str
    subset: str | None
    split: str
    revision: str | None
    advice: str  # what to do if it cannot be loaded


@dataclasses.dataclass(frozen=True)
class Source:
    """One file or one split, with what its mixture says about it.

    Attributes:
        key: the setting to name in messages.
        place: a file, or a split on the hub.
        columns: role → column of this source, where it differs from the others.
        weight: how often its rows are seen in an epoch.
    """

    key: str
    place: str | HubSplit
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    weight: float = 1.0

    @property
    def file(self) -> str | None:
        """The file, or None on the hub."""
        return self.place if isinstance(self.place, str) else None

    def open(self) -> Table:
        """Open the source, which may download it."""
        if isinstance(self.place, str):
            return read_table(self.key, self.place)
        return _hub_table(self.key, self.place)


def of_user(data: DataSettings) -> dict[str, list[Source]]:
    """Return the sources of each split, where data.name is not set."""
    advice = "correct it, or give files with data.train_file"
    # Training comes first, because it decides which labels are valid.
    found = {"train": [_part(data, number) for number in range(len(data.sources or ()))]}
    for split in ("train", "validation", "test"):
        if file := getattr(data, f"{split}_file"):
            found[split] = [Source(f"data.{split}_file", file)]
        elif data.path and (name := getattr(data, f"{split}_split")):
            hub = HubSplit(data.path, data.subset, name, data.revision, advice)
            found[split] = [Source("data.path", hub)]
    return found


def _part(data: DataSettings, number: int) -> Source:
    """Return one of the sources of data.sources."""
    part = (data.sources or [])[number]
    place: str | HubSplit = part.file or HubSplit(
        part.path or "", part.subset, part.split, part.revision, "correct it, or give a file"
    )
    columns = {
        role: column
        for role in ("text", "text_pair", "label", "target", "messages")
        if (column := getattr(part, f"{role}_column")) is not None
    }
    return Source(f"data.sources[{number}]", place, columns, part.weight)


def files(sources: dict[str, list[Source]]) -> list[str]:
    """Return all files among the sources."""
    every = itertools.chain.from_iterable(sources.values())
    return [source.file for source in every if source.file is not None]


def _hub_batches(rows: datasets.Dataset) -> Iterator[Batch]:
    yield Batch({name: [] for name in rows.column_names}, 0)
    for columns in rows.iter(batch_size=ROWS):
        yield Batch(columns, len(next(iter(columns.values()))))


def _hub_table(key: str, hub: HubSplit) -> Table:
    try:
        rows = datasets.load_dataset(hub.path, hub.subset, split=hub.split, revision=hub.revision)
    except (OSError, ValueError, RuntimeError, KeyError, DatasetsError) as error:
        raise ConfigError(
            f"{key}: {hub.path} is no folder here and did not load from the hub "
            f"({one_line(error, 200)}); {hub.advice}"
        ) from None
    source: dict[str, Any] = {"hub_id": hub.path, "name": hub.subset}
    checksums = rows.info.download_checksums
    if commits := sorted({url.split("@")[1][:40] for url in checksums or {} if "@" in url}):
        source["revision"] = commits[0]  # hf://datasets/<id>@<commit>/<file>
    batches = functools.partial(_hub_batches, rows)
    return Table(key, f"the hub's {hub.split} split", batches, source, rows.features)


@dataclasses.dataclass
class Reading:
    """Reads the sources of one split one after another.

    Attributes:
        tables: the sources that have been opened.
        rows: the number of rows of each of them.
    """

    split: str
    sources: list[Source]
    tables: list[Table] = dataclasses.field(default_factory=list)
    rows: list[int] = dataclasses.field(default_factory=list)

    def read(
        self,
        columns: dict[str, str],
        clean: Callable[[Table], Callable[[Any, str], tuple[Any, str | None]]],
        column_key: str | None = None,
    ) -> Iterator[Cleaned]:
        """Yield the cleaned rows of every source in batches, see `clean_columns`.

        Raises:
            ConfigError: after the last source. It names the problems of all of them.
        """
        problems: list[str] = []
        for source in self.sources:
            try:
                table = source.open()
                self.tables.append(table)
                self.rows.append(0)
                chosen = columns | {r: c for r, c in source.columns.items() if r in columns}
                for cleaned in clean_columns(table, chosen, clean(table), column_key):
                    self.rows[-1] += cleaned.batch.rows
                    yield cleaned
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)

    @property
    def name(self) -> str:
        """The file, or what stands for several."""
        return self.tables[0].file if len(self.tables) == 1 else "data.sources"

    @property
    def descriptions(self) -> list[dict[str, Any]]:
        """What `Examples.sources` says about each source."""
        pairs = zip(self.tables, self.rows)
        return [{"split": self.split, "rows": rows, **table.source} for table, rows in pairs]
