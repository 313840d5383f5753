"""Choose the files and the rows of each data set of a run."""

import filecmp
import itertools
from collections.abc import Sequence

import numpy as np

from scaleup.data.sources import Source
from scaleup.errors import ConfigError
from scaleup.io import check_regular_file
from scaleup.settings.data import DataSettings


def identical_files(sources: dict[str, list[Source]]) -> list[str]:
    """Return which files have the content of another split's file, under whatever name."""
    problems = []
    for split, other in (("validation", "train"), ("test", "train"), ("test", "validation")):
        for one, two in itertools.product(sources.get(split, ()), sources.get(other, ())):
            if one.file and two.file and _same_content(one.file, two.file):
                known = "is trained on" if other == "train" else "picks the best checkpoint"
                problems.append(
                    f"{one.key}: {one.file} has the same content as {two.file}, which {known}; "
                    "give other examples, or leave it out"
                )
                return problems  # a third file is equal to both
    return problems


def _same_content(file: str, other: str) -> bool:
    try:
        for path in (file, other):
            check_regular_file(path)
        return filecmp.cmp(file, other, shallow=False)
    except (OSError, ValueError):  # reading it reports the reason
        return False


def has_own_dev(data: DataSettings) -> bool:
    """Return whether the development set is not cut from the training set."""
    return data.k == "all" if data.name is not None else data.has_validation


def choose_rows(data: DataSettings, rows: int, file: str) -> tuple[Sequence[int], Sequence[int]]:
    """Choose the rows of a training set to train on and to develop on.

    The second sequence is empty if the config provides a separate development set.
    """
    dev = 0 if has_own_dev(data) else data.dev_size
    k = max(rows - dev, 1) if data.k == "all" else data.k
    if k + dev > rows:
        fits, request = [], f"data.dev_size: {dev}"
        if data.k != "all":
            request = f"data.k: {k} examples to train on and {dev}"
            fits += [f"data.k={rows - dev}"] if rows > dev else []
            fits += [f"data.dev_size={rows - k}"] if dev and rows > k else []
        advice = f"the largest that fits: {' or '.join(fits)}" if fits else "lower data.dev_size"
        raise ConfigError(f"{request} for development, but {file} has {rows}; {advice}")
    order: Sequence[int] = range(rows)
    if dev or data.k != "all":
        order = np.random.default_rng(data.seed).permutation(rows)  # type: ignore[assignment]
    return order[:k], order[k : k + dev]


def choose_test_rows(data: DataSettings, rows: int) -> Sequence[int]:
    """Choose the rows of a test set to score: all, or the same `test_size` rows in every run."""
    if data.test_size is None or data.test_size >= rows:
        return range(rows)
    return sorted(np.random.default_rng(0).permutation(rows)[: data.test_size].tolist())


def weighted(
    data: DataSettings, rows: Sequence[int], counts: Sequence[int], weights: Sequence[float]
) -> Sequence[int]:
    """Repeat or leave out rows, so that each source is seen as often as its weight says.

    Of a weight like 2.5, every row is taken twice and half of them, drawn by data.seed, once more.

    Args:
        rows: the rows to train on, numbered over all sources.
        counts: rows of each source.

    Raises:
        ConfigError: a weight is so small that no row of its source, or no row at all, is seen.
    """
    if all(weight == 1 for weight in weights):
        return rows
    chosen, every, first = [], np.asarray(rows), 0
    for number, (count, weight) in enumerate(zip(counts, weights)):
        own = every[(every >= first) & (every < first + count)]
        whole, part = divmod(weight, 1)
        chosen += [own] * int(whole)
        drawn = np.random.default_rng([data.seed, number]).permutation(len(own))
        some = round(part * len(own))
        if data.k == "all" and len(own) and not whole and not some:
            problem = f"{weight:g} of {len(own)} rows is less than one row"
            raise ConfigError(
                f"data.sources[{number}].weight: {problem}; raise it, or leave the source out"
            )
        chosen.append(own[np.sort(drawn[:some])])
        first += count
    if not any(map(len, chosen)):
        raise ConfigError("data.sources: the weights leave no row to train on; raise them")
    return np.concatenate(chosen)  # type: ignore[return-value]
