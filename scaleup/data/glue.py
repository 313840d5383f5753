"""The tasks of GLUE: their columns, classes and metrics, and where their files are."""

import os
import re
from typing import NamedTuple

from scaleup.data.sources import HubSplit, Source
from scaleup.errors import ConfigError
from scaleup.settings.data import DataSettings


class GlueTask(NamedTuple):
    """One task. Without `labels` it is a regression."""

    text: str  # column of the first text
    text_pair: str | None  # column of the second text
    labels: list[str] | None  # class names in id order
    metric: str


HUB_ID = "nyu-mll/glue"
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


def sources(data: DataSettings) -> dict[str, list[Source]]:
    """Return the source of each split: local files, or else the hub.

    Raises:
        ConfigError: the folder or a file in it is missing.
    """
    path = data.path
    if path is None or (re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path) and not os.path.exists(path)):
        hub_id = path or HUB_ID
        validation = "validation_matched" if data.name == "mnli" else "validation"
        advice = f"give data.path as a local folder with {data.name}/train.parquet"
        return {
            split: [Source("data.path", HubSplit(hub_id, data.name, name, data.revision, advice))]
            for split, name in (("train", "train"), ("validation", validation))
        }
    files, missing = {}, []
    for split in ("train", "validation"):
        roots = (os.path.join(path, data.name or ""), path)
        candidates = [os.path.join(root, split + end) for root in roots for end in ENDINGS]
        file = next(filter(os.path.exists, candidates), None)
        if file is None:
            missing.append(f"{data.name}/{split}.parquet")
        else:
            files[split] = [Source("data.path", file)]
    if missing:
        problem = f"{path} has no {' and no '.join(missing)}"
        if not os.path.isdir(path):
            problem = f"there is no folder {path}"
        advice = f"give the folder with {data.name}/train.parquet, or leave data.path out to use"
        raise ConfigError(f"data.path: {problem}; {advice} the hub")
    return files
