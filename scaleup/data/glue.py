"""The tasks of GLUE: their columns, classes and metrics, and where their files are."""

import functools
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import datasets
from datasets.exceptions import DatasetsError

from scaleup.data.files import ROWS, Batch, Table
from scaleup.errors import ConfigError, one_line
from scaleup.settings.schema import DataSettings


class GlueTask(NamedTuple):
    """One task. Without `labels` it is a regression."""

    text: str  # column of the first text
    text_pair: str | None  # column of the second text
    labels: list[str] | None  # class names in id order
    metric: str


GLUE = {
    "cola": GlueTask("sentence", None, ["unacceptable", "acceptable"], "matthews"),
    "sst2": GlueTask("sentence", None, ["negative", "positive"], "accuracy"),
    "mrpc": GlueTask("sentence1", "sentence2", ["not_equivalent", "equivalent"], "f1"),
    "qqp": GlueTask("question1", "question2", ["not_duplicate", "duplicate"], "f1"),
    "stsb": GlueTask("sentence1", "sentence2", None, "spearman"),
    "mnli": GlueTask(
        "premise", "hypothesis", ["entailment", "neutral", "contradiction"], "accuracy"
    ),
    "qnli": GlueTask("question", "sentence", ["entailment", "not_entailment"], "accuracy"),
    "rte": GlueTask("sentence1", "sentence2", ["entailment", "not_entailment"], "accuracy"),
    "wnli": GlueTask("sentence1", "sentence2", ["not_entailment", "entailment"], "accuracy"),
}
ENDINGS = (  # of local files as the documentation names them, and as the hub does
    ".parquet",
    "-00000-of-00001.parquet",
    "_matched.parquet",
    "_matched-00000-of-00001.parquet",
)


def local_files(data: DataSettings) -> dict[str, tuple[str, str]]:
    """Return, per split, the setting to name in messages and the file; {} if data is on the hub.

    Raises:
        ConfigError: the folder or a file in it is missing.
    """
    path = data.path
    if path is None or (re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path) and not os.path.exists(path)):
        return {}
    files, missing = {}, []
    for split in ("train", "validation"):
        roots = (os.path.join(path, data.name or ""), path)
        candidates = [os.path.join(root, split + end) for root in roots for end in ENDINGS]
        file = next(filter(os.path.exists, candidates), None)
        if file is None:
            missing.append(f"{data.name}/{split}.parquet")
        else:
            files[split] = ("data.path", file)
    if missing:
        problem = f"{path} has no {' and no '.join(missing)}"
        if not os.path.isdir(path):
            problem = f"there is no folder {path}"
        advice = f"give the folder with {data.name}/train.parquet, or leave data.path out to use"
        raise ConfigError(f"data.path: {problem}; {advice} the hub")
    return files


def _batches(rows: datasets.Dataset) -> Iterator[Batch]:
    yield Batch({name: [] for name in rows.column_names}, 0)
    for columns in rows.iter(batch_size=ROWS):
        yield Batch(columns, len(next(iter(columns.values()))))


def load_from_hub(data: DataSettings) -> dict[str, Table]:
    """Load the training and validation splits from the Hugging Face hub."""
    hub_id = data.path or "nyu-mll/glue"
    validation = "validation_matched" if data.name == "mnli" else "validation"
    try:
        sets = datasets.load_dataset(hub_id, data.name)
        chosen = {"train": sets["train"], "validation": sets[validation]}
    except (OSError, ValueError, RuntimeError, KeyError, DatasetsError) as error:
        raise ConfigError(
            f"data.path: {hub_id} is no folder here and did not load from the hub "
            f"({one_line(error, 200)}); "
            f"give data.path as a local folder with {data.name}/train.parquet"
        ) from None
    tables = {}
    for split, rows in chosen.items():
        source = {"hub_id": hub_id, "name": data.name}
        place = f"the hub's {split} split"
        batches = functools.partial(_batches, rows)
        tables[split] = Table("data.path", place, batches, source, rows.features)
    return tables
