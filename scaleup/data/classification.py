"""Examples to classify or to give a number: GLUE by name or your own files, K-shot splits, tokens, batches and metrics."""

import dataclasses
import functools
import os
import re
from typing import Any, Callable

import datasets
import numpy as np
from scipy import stats
from sklearn import metrics
from transformers import DataCollatorWithPadding, EvalPrediction, PreTrainedTokenizerBase

from scaleup.data.files import (
    Examples,
    cut,
    judge_cells,
    no_column,
    own_files,
    read_columns,
    same_state,
    whole_characters,
)
from scaleup.errors import ConfigError
from scaleup.settings.schema import DataSettings, Section

# Task -> text column, column of the second text, class names in id order (None: regression), metric.
GLUE = {
    "cola": ("sentence", None, ["unacceptable", "acceptable"], "matthews"),
    "sst2": ("sentence", None, ["negative", "positive"], "accuracy"),
    "mrpc": ("sentence1", "sentence2", ["not_equivalent", "equivalent"], "f1"),
    "qqp": ("question1", "question2", ["not_duplicate", "duplicate"], "f1"),
    "stsb": ("sentence1", "sentence2", None, "spearman"),
    "mnli": ("premise", "hypothesis", ["entailment", "neutral", "contradiction"], "accuracy"),
    "qnli": ("question", "sentence", ["entailment", "not_entailment"], "accuracy"),
    "rte": ("sentence1", "sentence2", ["entailment", "not_entailment"], "accuracy"),
    "wnli": ("sentence1", "sentence2", ["not_entailment", "entailment"], "accuracy"),
}


def _files(data: DataSettings) -> dict[str, tuple[str, str]]:
    """Split -> the setting to name in messages, and the file; empty where the hub is meant."""
    if data.name is None:
        return own_files(data)
    if data.path is None or (
        re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", data.path) and not os.path.exists(data.path)
    ):
        return {}
    ends = (
        ".parquet",
        "-00000-of-00001.parquet",
        "_matched.parquet",
        "_matched-00000-of-00001.parquet",
    )  # ours, and the hub's
    roots = (os.path.join(data.path, data.name), data.path)
    paths = {
        split: [os.path.join(root, split + end) for root in roots for end in ends]
        for split in ("train", "validation")
    }
    return {
        split: ("data.path", next(filter(os.path.exists, files), files[0]))
        for split, files in paths.items()
    }


def _from_hub(data: DataSettings) -> dict[str, tuple]:
    """Split -> what `read_columns` gives for a file."""
    hub_id = data.path or "nyu-mll/glue"
    try:
        sets = datasets.load_dataset(hub_id, data.name)
        chosen = {
            "train": sets["train"],
            "validation": sets["validation_matched" if data.name == "mnli" else "validation"],
        }
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        datasets.exceptions.DatasetsError,
    ) as error:
        problem = f"{hub_id} is no folder here and did not load from the hub ({' '.join(str(error).split())[:200]})"
        raise ConfigError(
            f"data.path: {problem}; give data.path as a local folder with {data.name}/train.parquet"
        ) from None
    source = {"hub_id": hub_id, "name": data.name}
    return {
        split: ({c: rows[c][:] for c in rows.column_names}, None, rows.features, source)
        for split, rows in chosen.items()
    }


def _cell(
    value: Any, role: str, known: set[str] | None, declared: list[str] | None
) -> tuple[str | float | None, str | None]:
    """A cell as text, class name or (`known` None: a regression) number, or else what is wrong with it."""
    blank = role == "label" and (
        not str(value).strip() or (declared is not None and value == -1)
    )  # GLUE withholds labels by -1
    if value is None or value != value or blank:  # NaN is what other tools make of a gap
        return None, "is missing"
    if not isinstance(value, str | int | float):
        return (
            None,
            f"holds a {type(value).__name__}, not {'a label' if role == 'label' else 'text'}",
        )
    if role != "label":
        return whole_characters(str(value)), None
    value = (
        int(value) if isinstance(value, float) and value.is_integer() else value
    )  # 1.0 is what other tools make of 1 beside a gap
    if declared and isinstance(value, int) and 0 <= value < len(declared):
        value = declared[value]
    text = str(value).strip()
    if known is not None:
        valid = known or declared or [text]
        return (
            text,
            None
            if text in valid
            else f"the label {text[:40]!r} is none of {', '.join(sorted(valid)[:10])}",
        )
    number = (
        re.fullmatch(r"(?a)[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text)
        and abs(float(text)) <= np.finfo(np.float32).max
    )
    return (float(text), None) if number else (None, f"{text[:40]!r} is not a number")


def _clean(
    key: str, file: str, parsed: tuple, data: DataSettings, known: set[str] | None
) -> tuple[dict, list[str] | None]:
    """The wanted columns by role, labels as class names or floats, and the class names in id order if they are declared.
    `known`: the labels of training, empty before it is read, None in a regression. Raises ConfigError with all bad cells.
    """
    columns, lines, features, _ = parsed
    own, part, problems = data.name is None, {}, []
    names = (
        [data.text_column, data.text_pair_column, data.label_column]
        if own
        else [*GLUE[data.name][:2], "label"]
    )
    feature = features.get(names[2])
    declared = (
        feature.names if isinstance(feature, datasets.ClassLabel) and known is not None else None
    )
    if not own and declared not in (None, GLUE[data.name][2]):
        raise ConfigError(
            f"{key}: {file} is not {data.name}; its classes are {', '.join(declared)}"
        )
    declared = declared if own else GLUE[data.name][2]
    for role, column in zip(("text", "text_pair", "label"), names):
        if column is not None and column not in columns:
            problems.append(no_column(f"data.{role}_column" if own else key, file, column, columns))
        elif column is not None:
            judge = functools.partial(_cell, role=role, known=known, declared=declared)
            part[role], found = judge_cells(columns, column, lines, f"{key}: {file}", judge)
            problems += found
    if names[2] in names[:2]:
        problems.append(
            f"data.label_column: {names[2]} is a text column, too; the text would tell the label"
        )
    if problems or not part["label"]:
        raise ConfigError(problems or f"{key}: {file} has no rows")
    return part, declared


def _dataset(
    part: dict[str, list], rows: list[int] | range, ids: dict[str, int]
) -> datasets.Dataset:
    columns = {role: [cells[row] for row in rows] for role, cells in part.items()}
    columns["label"] = [
        ids.get(label, label) for label in columns["label"]
    ]  # the numbers of a regression have no ids
    return datasets.Dataset.from_dict(columns)


@functools.lru_cache(maxsize=1)  # load finds what check has read
def _load(settings: str, _state: tuple) -> Examples:
    data, parts, sources, problems = DataSettings.model_validate_json(settings), {}, [], []
    files, task = (
        _files(data),
        data.task or ("regression" if data.name == "stsb" else "sequence_classification"),
    )
    hub = {} if files else _from_hub(data)
    labels, known = None, None if task == "regression" else set()
    for split, (key, file) in (
        files or {split: ("data.path", f"the hub's {split} split") for split in hub}
    ).items():
        try:
            parsed = hub[split] if hub else read_columns(key, file)
            parts[split], declared = _clean(key, file, parsed, data, known)
            sources.append({"split": split, "rows": len(parts[split]["label"]), **parsed[3]})
            if split == "train" and known is not None:
                known = set(parts[split]["label"])
                whole = all(re.fullmatch(r"[-+]?\d+(\.\d+)?", name) for name in known)
                if len(known) > 20 and (
                    len(known) == sources[0]["rows"]
                    or (whole and any("." in name for name in known))
                ):
                    raise ConfigError(
                        f"data.label_column: {file} has {len(known)} labels; numbers need data.task=regression"
                    )
                labels = declared or sorted(
                    known, key=lambda name: (float(name) if whole else 0, name)
                )
            if split == "train":
                train, dev = cut(data, len(parts[split]["label"]), file)
                chosen = {parts[split]["label"][row] for row in train}
                if len(chosen) < 2:
                    raise ConfigError(
                        f"data.k: the {len(train)} examples of {file} to train on all have the label {next(iter(chosen))!r}"
                    )
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    ids = {name: i for i, name in enumerate(labels or [])}
    sets = {
        split: _dataset(part, train if split == "train" else range(len(part["label"])), ids)
        for split, part in parts.items()
    }
    test = sets.get("test" if data.name is None else "validation")
    dev_set = _dataset(parts["train"], dev, ids) if dev else sets["validation"]
    metric = data.metric or (
        GLUE[data.name][3] if data.name is not None else "accuracy" if ids else "spearman"
    )
    return Examples(
        sets["train"],
        dev_set,
        test,
        labels,
        metric,
        task,
        data.name is not None and data.k == "all",
        sources,
    )


def load(data: DataSettings) -> Examples:
    """The paper's protocol: `k` examples of the training set shuffled by `seed`, the next `dev_size` for development.

    GLUE is tested on its official validation set, which with k all is the development set as well; there, nothing is
    shuffled. Your own validation_file replaces the cut; test_file is the test. Raises ConfigError with all problems found.
    """
    return _load(data.model_dump_json(), same_state(file for _, file in _files(data).values()))


def check(sections: dict[str, Section]) -> list[str]:
    """What is wrong with the data that a config names: one sentence per problem. The hub is left to `load`."""
    data = sections.get("data")
    try:
        if isinstance(data, DataSettings) and "train" in _files(data):
            load(data)
    except ConfigError as error:
        return error.problems
    return []


def tokenize(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, data: DataSettings
) -> Examples:
    """Texts to input_ids, attention_mask and what else the tokenizer gives; adds labels and length (tokens).

    Cut to `max_length` tokens, of a pair the longer text first; padding is the collator's. A text without any token gets
    one, so that no example attends to nothing. Raises ConfigError where the tokenizer cannot pad or leaves no room.
    """
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"model.name: the tokenizer of {tokenizer.name_or_path} has no padding token; set one and save it"
        )
    roles = [role for role in ("text", "text_pair") if role in examples.train.column_names]
    special = tokenizer.num_special_tokens_to_add(len(roles) == 2)
    if data.max_length <= special:
        raise ConfigError(
            f"data.max_length: {data.max_length} leaves no room for text beside {special} special tokens"
        )
    # A line of 100,000 characters need not be tokenized whole for its first tokens: 100 characters a token hold them.
    keep = (
        slice(-100 * data.max_length, None)
        if tokenizer.truncation_side == "left"
        else slice(100 * data.max_length)
    )
    blank = tokenizer.pad_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    # "</s>" or "[SEP]" in a text is text: as a token it would end the sequence, and BART's head counts the ends.
    to_ids = functools.partial(
        tokenizer, truncation="longest_first", max_length=data.max_length, split_special_tokens=True
    )

    def encode(batch: dict[str, list]) -> dict[str, list]:
        found = to_ids(*([text[keep] for text in batch[role]] for role in roles))
        cut = {
            row
            for role in roles
            for row, text in enumerate(batch[role])
            if len(text) > 100 * data.max_length
        }
        if any(
            len(found["input_ids"][row]) < data.max_length for row in cut
        ):  # blanks or an endless word
            found = to_ids(*(batch[role] for role in roles))
        filler = {"input_ids": [blank], "attention_mask": [1], "token_type_ids": [0]}
        columns = {
            name: [values or filler[name] for values in rows] for name, rows in found.items()
        }
        return columns | {
            "labels": batch["label"],
            "length": [len(ids) for ids in columns["input_ids"]],
        }

    names = (
        examples.train.column_names
    )  # below, a fingerprint spares the pickling of the tokenizer for one
    encoded = functools.partial(
        datasets.Dataset.map,
        function=encode,
        batched=True,
        remove_columns=names,
        new_fingerprint="ids",
    )
    dev = encoded(examples.dev)
    test = dev if examples.test_is_dev else examples.test and encoded(examples.test)
    return dataclasses.replace(examples, train=encoded(examples.train), dev=dev, test=test)


def prior(examples: Examples) -> list[float]:
    """The best output of a head that sees nothing: the mean of the training labels, or the logarithms of the classes' shares, each class counted
    once more than it occurs. [outputs]"""
    labels = np.array(examples.train["labels"])
    if examples.labels is None:
        return [float(labels.mean())]
    counts = np.bincount(labels, minlength=len(examples.labels)) + 1
    return np.log(counts / counts.sum()).tolist()


class _Collator(DataCollatorWithPadding):
    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        return super().__call__(
            [{name: value for name, value in row.items() if name != "length"} for row in features]
        )


def provenance(examples: Examples) -> list[dict[str, Any]]:
    """By which a run's data is known again, set by set: rows, and the file's hash or the hub's name for it."""
    return [
        {key: source[key] for key in ("split", "rows", "sha256", "hub_id") if key in source}
        for source in examples.sources
    ]


def collator(
    tokenizer: PreTrainedTokenizerBase, data: DataSettings
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Examples to a batch of tensors [examples, tokens], padded to the longest of them or to max_length."""
    return _Collator(
        tokenizer,
        padding="max_length" if data.pad_to_max_length else "longest",
        max_length=data.max_length,
    )


def compute_metrics(
    examples: Examples, tokenizer: PreTrainedTokenizerBase
) -> Callable[[EvalPrediction], dict[str, float]]:
    """The main metric and its companions, as shares of 1: f1 or matthews with accuracy; spearman with pearson.

    F1 is that of class id 1; of more than two classes the macro average over those that occur. A NaN among the outputs of
    an example makes it wrong; in a regression it makes both correlations 0, as constant outputs do.
    """

    def _score(prediction: EvalPrediction) -> dict[str, float]:
        outputs = prediction.predictions
        truth = np.asarray(prediction.label_ids).reshape(-1)
        outputs = np.asarray(
            outputs[0] if isinstance(outputs, tuple) else outputs, dtype=np.float64
        ).reshape(len(truth), -1)
        if examples.task == "regression":
            if not np.isfinite(outputs).all() or np.ptp(outputs) == 0 or np.ptp(truth) == 0:
                return {"spearman": 0.0, "pearson": 0.0}
            both = {
                "spearman": stats.spearmanr(outputs[:, 0], truth),
                "pearson": stats.pearsonr(outputs[:, 0], truth),
            }
            return {name: float(np.nan_to_num(found.statistic)) for name, found in both.items()}
        guess = np.where(np.isnan(outputs).any(axis=1), -1, outputs.argmax(axis=1))
        found = {"accuracy": float(metrics.accuracy_score(truth, guess))}
        if examples.metric == "f1":
            classes = [1] if len(examples.labels) == 2 else sorted(set(truth) | set(guess) - {-1})
            found["f1"] = float(
                metrics.f1_score(truth, guess, labels=classes, average="macro", zero_division=0)
            )
        if examples.metric == "matthews":
            found["matthews"] = float(metrics.matthews_corrcoef(truth, guess))
        return found

    return _score
