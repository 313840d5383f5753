"""The data sets of a run."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import datasets


@dataclasses.dataclass(frozen=True)
class Examples:
    """The data sets of a run, as texts or, after `tokenize`, as tokens.

    Columns of texts: text, text_pair (pairs only) and label (class id or float) for classification
    and regression; text, target and reference (an index into `references`) for generation. Those of
    the other tasks are in their modules. All sets are memory-mapped, so the processes of a host
    share one copy. With data.streaming, `train` is None among texts, and a `Stream` of rows without
    end among tokens.
    """

    train: Any
    dev: datasets.Dataset
    test: datasets.Dataset | None  # None: the config names no test set
    labels: list[str] | None  # class names in id order; None: not a classification
    metric: str  # selects the best checkpoint
    task: str  # data.task
    test_is_dev: bool  # GLUE with data.k=all: the official validation set serves as both
    sources: list[dict[str, Any]]  # per set: split, rows, and file with sha256 or hub_id with name
    references: Sequence[list[str]] | None = None  # all targets of each source in dev and test
    prompts: Sequence[str] | None = None  # the sources that `references` belong to
    # Rows of dev and test whose texts also occur in the training set, and rows of test whose texts
    # also occur in dev, as (set, the other set) → number.
    shared: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)
    unanswerable: bool = False  # question_answering: there are questions without an answer
    # multi_label_classification, token_classification, question_answering: the texts of dev and
    # test, beside their tokens.
    texts: dict[str, datasets.Dataset] | None = None
    content: str = ""  # hash of what the texts depend on: the content of the files, and settings

    def count(self, name: str) -> int:
        """Return the number of examples in dev or test, of which tokens may have several rows."""
        part = (self.texts or {}).get(name, getattr(self, name))
        return 0 if part is None else len(part)

    @property
    def train_rows(self) -> int | None:
        """Number of rows of the training set; None if it is a stream."""
        return len(self.train) if isinstance(self.train, datasets.Dataset) else None


def shared_texts(
    train: datasets.Dataset | None, dev: datasets.Dataset, test: datasets.Dataset | None
) -> dict[tuple[str, str], int]:
    """Return how many rows of one set have texts that also occur in another (`Examples.shared`).

    The training set, which may be large, is read in batches. If it is a stream (None), nothing is
    known about it.
    """
    roles = [role for role in ("text", "text_pair") if role in dev.column_names]

    def rows(part: datasets.Dataset) -> Iterator[tuple]:
        for batch in part.select_columns(roles).iter(batch_size=1000):
            yield from zip(*(batch[role] for role in roles))

    counts: dict[tuple[str, str], int] = {}
    dev_rows = list(rows(dev))
    test_rows = [] if test is None else list(rows(test))
    if train is not None:
        known, asked = set(), {*dev_rows, *test_rows}
        for row in rows(train):
            if row in asked:
                known.add(row)
        counts["dev", "train"] = sum(row in known for row in dev_rows)
        if test is not None:
            counts["test", "train"] = sum(row in known for row in test_rows)
    if test is not None:
        in_dev = set(dev_rows)
        counts["test", "dev"] = sum(row in in_dev for row in test_rows)
    return counts
