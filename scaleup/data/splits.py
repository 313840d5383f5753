"""Choose the files and the rows of each data set of a run."""

import filecmp
from collections.abc import Sequence

import numpy as np

from scaleup.errors import ConfigError
from scaleup.io import check_regular_file
from scaleup.settings.schema import DataSettings


def user_files(data: DataSettings) -> dict[str, tuple[str, str]]:
    """Return, per split, the setting to name in messages and the user's file."""
    files = {split: getattr(data, f"{split}_file") for split in ("train", "validation", "test")}
    return {split: (f"data.{split}_file", file) for split, file in files.items() if file}


def identical_files(files: dict[str, tuple[str, str]]) -> list[str]:
    """Return which files have the content of another split's file, under whatever name."""
    problems = []
    for split, other in (("validation", "train"), ("test", "train"), ("test", "validation")):
        if split in files and other in files and _same_content(files[split][1], files[other][1]):
            key, file = files[split]
            known = "is trained on" if other == "train" else "picks the best checkpoint"
            problems.append(
                f"{key}: {file} has the same content as {files[other][1]}, which {known}; give "
                "other examples, or leave it out"
            )
            break  # a third file is equal to both
    return problems


def _same_content(file: str, other: str) -> bool:
    try:
        for path in (file, other):
            check_regular_file(path)
        return filecmp.cmp(file, other, shallow=False)
    except (OSError, ValueError):  # reading it reports the reason
        return False


def choose_rows(data: DataSettings, rows: int, file: str) -> tuple[Sequence[int], Sequence[int]]:
    """Choose the rows of a training set to train on and to develop on.

    The second sequence is empty if the config provides a separate development set.
    """
    has_dev = data.k == "all" if data.name is not None else data.validation_file is not None
    dev = 0 if has_dev else data.dev_size
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
