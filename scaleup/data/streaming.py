"""Training data that is read and tokenized while a run trains, for data that exceeds the disk.

    rows = open_stream(data, examples.sources, encode)      # never ends

Each source is read from its beginning to its end, and then again. A run with several sources draws
the next row from one of them, with probabilities in proportion to their weights. Of the last
`data.shuffle_buffer` rows, one at random is the next. All of it depends on data.seed only, so that
a resumed run finds the rows that it has not seen.
"""

import dataclasses
import functools
import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import torch
from datasets.exceptions import DatasetsError

from scaleup.data import encoding, sources
from scaleup.data.sources import HubSplit, Reading, Source
from scaleup.data.texts import read_pairs
from scaleup.errors import ConfigError, RunError, one_line
from scaleup.settings.data import DataSettings

ENCODED = 100  # rows that are tokenized together
AHEAD = 16  # batches of such rows that are ready before they are needed
TEXTS = datasets.Features({name: datasets.Value("string") for name in ("text", "target")})


class Stream(torch.utils.data.IterableDataset):
    """Rows of tokens without end.

    Args:
        rows: one pass over the sources, in an order that depends on the number of the pass.
        packed_length: join texts to rows of at most this many tokens; None: one text per row.
    """

    def __init__(self, rows: datasets.IterableDataset, packed_length: int | None):
        self.rows, self.packed_length = rows, packed_length

    def _batches(self) -> Iterator[dict[str, list]]:
        for number in itertools.count():
            self.rows.set_epoch(number)
            yield from self.rows.iter(batch_size=ENCODED)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = _read_ahead(self._batches(), AHEAD)
        if self.packed_length is not None:
            batches = encoding.packed(batches, self.packed_length)
        for batch in batches:
            for values in zip(*batch.values()):
                yield dict(zip(batch, values))


def _read_ahead(items: Iterator[Any], count: int) -> Iterator[Any]:
    """Yield the items of an iterator without end, which a thread reads up to `count` items ahead.

    An error of the iterator is raised where its item would be needed.
    """
    ready: queue.Queue[tuple[Any, Exception | None]] = queue.Queue(count)
    closed = threading.Event()

    def put(item: Any, error: Exception | None) -> None:
        while not closed.is_set():
            try:
                ready.put((item, error), timeout=0.5)
                return
            except queue.Full:  # the run computes; ask again whether it goes on
                pass

    def read() -> None:
        try:
            for item in items:
                put(item, None)
                if closed.is_set():
                    return
        except Exception as error:
            put(None, error)

    threading.Thread(target=read, name="stream", daemon=True).start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        closed.set()


def try_out(reading: Reading, data: DataSettings) -> list[dict[str, Any]]:
    """Read the first rows of each source, and return what `Examples.sources` says about it.

    Raises:
        ConfigError: a source cannot be opened, or has mistakes in its first rows.
    """
    found, problems = [], []
    for source in reading.sources:
        part = Reading(reading.split, [source])
        try:
            next(read_pairs(part, data))
            found.append({"split": reading.split, **part.tables[0].source})
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return found


def check(data: DataSettings, described: list[dict[str, Any]]) -> int:
    """Read all training data once, and return the number of rows.

    Raises:
        ConfigError: names the first mistake.
    """
    parts = _parts(data, described)
    return sum(1 for part in parts for _ in _rows(part, data))


def open_stream(
    data: DataSettings,
    described: list[dict[str, Any]],
    encode: Callable[[dict[str, list]], dict[str, list]],
) -> Stream:
    """Return the training rows of a run as tokens.

    Args:
        described: `Examples.sources`, which name the commits that are read from the hub.
        encode: turns a batch of texts into columns of tokens.
    """
    parts = _parts(data, described)
    # One source ends with each pass. Of several, a pass would leave others in their middle, and
    # their first rows would be seen more often than their last ones.
    read = _rows if len(parts) == 1 else _rows_without_end
    passes = [
        datasets.IterableDataset.from_generator(functools.partial(read, part, data), features=TEXTS)
        for part in parts
    ]
    total = sum(part.weight for part in parts)
    mixed = passes[0]
    if len(passes) > 1:
        mixed = datasets.interleave_datasets(
            passes, probabilities=[part.weight / total for part in parts], seed=data.seed
        )
    tokens = mixed.shuffle(seed=data.seed, buffer_size=data.shuffle_buffer).map(
        encode,
        batched=True,
        batch_size=ENCODED,
        remove_columns=list(TEXTS),
        features=encoding.features(data, scored=False),
    )
    return Stream(tokens, data.max_length if data.packing else None)


def _parts(data: DataSettings, described: list[dict[str, Any]]) -> list[Source]:
    """Return the sources of the training data, at the commits that the run has started with."""
    known = [source for source in described if source["split"] == "train"]
    parts = []
    for source, found in zip(sources.of_user(data)["train"], known, strict=True):
        if isinstance(source.place, HubSplit):
            place = dataclasses.replace(source.place, revision=found["revision"])
            source = dataclasses.replace(source, place=place)
        parts.append(source)
    return parts


def _rows(source: Source, data: DataSettings) -> Iterator[dict[str, str]]:
    """Yield the rows of a source once.

    Raises:
        ConfigError: a row has a mistake.
        RunError: the source cannot be read any more.
    """
    try:
        for batch in read_pairs(Reading("train", [source]), data):
            for text, target in zip(batch["text"], batch["target"]):
                yield {"text": text, "target": target}
    except ConfigError as error:
        advice = (
            "Correct the data, and start anew or with train.resume=weights_only; "
            "scaleup prepare finds such mistakes in advance"
        )
        raise ConfigError([f"{problem}. {advice}" for problem in error.problems]) from error
    except (OSError, RuntimeError, DatasetsError) as error:
        if isinstance(error, RunError):
            raise
        advice = "continue with train.resume=auto once it can be read again"
        raise RunError(
            f"{source.key}: reading it failed ({one_line(error, 200)}); {advice}"
        ) from error


def _rows_without_end(source: Source, data: DataSettings) -> Iterator[dict[str, str]]:
    """Yield the rows of a source again and again."""
    while True:
        yield from _rows(source, data)
