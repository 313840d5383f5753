"""Where the examples of each split come from: files, splits of data sets on the hub, or several."""

import dataclasses
import functools
import hashlib
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import huggingface_hub
from datasets.exceptions import DatasetsError

from scaleup.data.columns import CheckRow, Cleaned, clean_columns
from scaleup.data.files import ROWS, Batch, Table, read_table
from scaleup.errors import ConfigError, one_line
from scaleup.io import sample_hash
from scaleup.settings.data import DataSettings
from scaleup.settings.data_rules import ROLES


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
        stream: seed of the order in which the files of a data set on the hub are read while
            training; None: the source is read as a whole before.
    """

    key: str
    place: str | HubSplit
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    weight: float = 1.0
    stream: int | None = None

    @property
    def file(self) -> str | None:
        """The file, or None on the hub."""
        return self.place if isinstance(self.place, str) else None

    def open(self) -> Table:
        """Open the source, which may download it."""
        if isinstance(self.place, str):
            return read_table(self.key, self.place, hashed=self.stream is None)
        return _hub_table(self.key, self.place, self.stream)


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
    if data.streaming:
        found["train"] = [dataclasses.replace(p, stream=data.seed) for p in found["train"]]
    return found


def _part(data: DataSettings, number: int) -> Source:
    """Return one of the sources of data.sources."""
    part = (data.sources or [])[number]
    place: str | HubSplit = part.file or HubSplit(
        part.path or "", part.subset, part.split, part.revision, "correct it, or give a file"
    )
    columns = {
        role: column for role in ROLES if (column := getattr(part, f"{role}_column")) is not None
    }
    return Source(f"data.sources[{number}]", place, columns, part.weight)


def files(sources: dict[str, list[Source]]) -> list[str]:
    """Return all files among the sources, and those in local folders among them."""
    found = []
    for source in itertools.chain.from_iterable(sources.values()):
        found += [source.place] if isinstance(source.place, str) else _folder_files(source.place)
    return found


def _folder_files(hub: HubSplit) -> list[str]:
    """Return the files of a data set that is a local folder; [] on the hub."""
    folder = pathlib.Path(hub.path)
    return sorted(str(path) for path in folder.rglob("*") if path.is_file())


def _hub_batches(rows: datasets.Dataset | datasets.IterableDataset) -> Iterator[Batch]:
    yield Batch({name: [] for name in rows.column_names or ()}, 0)
    for columns in rows.iter(batch_size=ROWS):
        yield Batch(columns, len(next(iter(columns.values()))))


def _hub_table(key: str, hub: HubSplit, stream: int | None) -> Table:
    place, revision = f"the hub's {hub.split} split", hub.revision
    source: dict[str, Any] = {"hub_id": hub.path, "name": hub.subset}
    if local := _folder_files(hub):
        source["samples"] = hashlib.sha256("".join(map(sample_hash, local)).encode()).hexdigest()
    try:
        if stream is not None:
            revision = _commit(hub)
            place += f", its files in the order of data.seed {stream}"
        rows = datasets.load_dataset(
            hub.path, hub.subset, split=hub.split, revision=revision, streaming=stream is not None
        )
    except (OSError, ValueError, RuntimeError, KeyError, DatasetsError) as error:
        raise ConfigError(
            f"{key}: there is no folder {hub.path} here, and it cannot be loaded from the hub "
            f"({one_line(error, 200)}); {hub.advice}"
        ) from None
    if isinstance(rows, datasets.IterableDataset):
        source["revision"] = revision
        # A buffer of one row: the order of the files changes, and that within a file does not.
        rows = rows.shuffle(seed=stream, buffer_size=1)
    else:
        checksums = rows.info.download_checksums
        if commits := sorted({url.split("@")[1][:40] for url in checksums or {} if "@" in url}):
            source["revision"] = commits[0]  # hf://datasets/<id>@<commit>/<file>
    return Table(key, place, functools.partial(_hub_batches, rows), source, rows.features or {})


def _commit(hub: HubSplit) -> str | None:
    """Return the commit of a data set on the hub, which a resumed run reads again."""
    if os.path.isdir(hub.path):
        return hub.revision
    return huggingface_hub.HfApi().dataset_info(hub.path, revision=hub.revision).sha


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
        check: CheckRow | None = None,
    ) -> Iterator[Cleaned]:
        """Yield the cleaned rows of every source in batches, see `clean_columns`.

        Raises:
            ConfigError: after the last source. It names the problems of all of them.
        """
        problems: list[str] = []
        for source in self.sources:
            try:
                chosen = columns | {r: c for r, c in source.columns.items() if r in columns}
                table = dataclasses.replace(source.open(), roles=chosen)
                self.tables.append(table)
                self.rows.append(0)
                at_once = source.stream is not None
                for cleaned in clean_columns(
                    *(table, chosen, clean(table), column_key, at_once, check)
                ):
                    self.rows[-1] += cleaned.batch.rows
                    yield cleaned
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)

    @property
    def streams(self) -> bool:
        """Return whether the rows are read while training, instead of before."""
        return any(source.stream is not None for source in self.sources)

    @property
    def name(self) -> str:
        """The file, or what stands for several."""
        return self.tables[0].file if len(self.tables) == 1 else "data.sources"

    @property
    def descriptions(self) -> list[dict[str, Any]]:
        """What `Examples.sources` says about each source."""
        pairs = zip(self.tables, self.rows)
        return [{"split": self.split, "rows": rows, **table.source} for table, rows in pairs]
