"""Prepare data for generation: a target for a source (seq2seq), or a completion of a prompt or a
chat (causal_lm).

The examples come from the user's files. The loss counts only the tokens of the target, or of all
answers of a chat. On the development and test sets the model writes an answer for every distinct
source, which is compared with all targets that the set has for it.

Shapes of a batch: B examples, T tokens.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedTokenizerBase

from scaleup.data import encoding, prepared, sources, splits, streaming
from scaleup.data.examples import Examples, shared_texts
from scaleup.data.metrics import decode, text_metrics
from scaleup.data.padding import TextCollator
from scaleup.data.sources import Reading
from scaleup.data.texts import TEXTS, read_pairs
from scaleup.errors import ConfigError
from scaleup.settings.data import DataSettings

DEFAULT_METRIC = {"seq2seq": "bleu", "causal_lm": "loss"}

# The interface of a task's module: see scaleup.data.tasks.
sources_of, compute_metrics = sources.of_user, text_metrics


def _by_source(batches: Iterator[dict[str, list]]) -> dict[str, list[str]]:
    """Return all targets of each source, in order."""
    targets: dict[str, list[str]] = {}
    for batch in batches:
        for source, target in zip(batch["text"], batch["target"]):
            targets.setdefault(source, []).append(target)
    return targets


def _write_scored(
    folder: pathlib.Path, name: str, groups: dict[str, list[str]], first: int
) -> datasets.Dataset:
    """Write a set of one row per source, with the index of its references, from `first` on."""
    columns: dict[str, list] = {
        "text": list(groups),
        "target": [targets[0] for targets in groups.values()],
        "reference": list(range(first, first + len(groups))),
    }
    path = folder / f"{name}.arrow"
    prepared.write(path, TEXTS | {"reference": pa.int64()}, [columns])
    return prepared.read(path)


def _read(data: DataSettings, folder: pathlib.Path) -> dict[str, Any]:
    """Write the sets of a run into a folder. Return the other fields of `Examples`."""
    described, problems, rows = [], [], {}
    train: Sequence[int] | None = None  # None: the training set is a stream
    dev: Sequence[int] = ()
    if not data.messages_column and data.target_column == data.text_column:
        advice = "the text would tell the target"
        problems.append(
            f"data.target_column: {data.target_column} is the text column, too; {advice}"
        )
    raw = {split: folder / f"raw-{split}" for split in ("train", "validation", "test")}
    for split, parts in sources.of_user(data).items():
        reading = Reading(split, parts)
        try:
            if reading.streams:
                described += streaming.try_out(reading, data)
                continue
            rows[split] = prepared.write(raw[split], TEXTS, read_pairs(reading, data))
            described += reading.descriptions
            if split == "train":
                train, dev = splits.choose_rows(data, rows[split], reading.name)
                weights = [part.weight for part in parts]
                train = splits.weighted(data, train, reading.rows, weights)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    train_set = None
    if train is not None:
        chosen = prepared.rows_of(prepared.read(raw["train"]), train)
        prepared.write(folder / "train.arrow", TEXTS, chosen)
        train_set = prepared.read(folder / "train.arrow")
    in_train = len(dev) > 0
    dev_groups: dict[str, list[str]] = {}  # empty: a stream without them, which the rules refuse
    if in_train or "validation" in rows:
        dev_part = prepared.read(raw["train" if in_train else "validation"])
        dev_groups = _by_source(prepared.rows_of(dev_part, dev if in_train else None))
    test_groups: dict[str, list[str]] = {}
    if "test" in rows:
        test_groups = _by_source(prepared.rows_of(prepared.read(raw["test"])))
        test_sources = list(test_groups)
        kept = [test_sources[row] for row in splits.choose_test_rows(data, len(test_sources))]
        test_groups = {source: test_groups[source] for source in kept}
    dev_set, test_set = _write_scored(folder, "dev", dev_groups, 0), None
    if test_groups:
        test_set = _write_scored(folder, "test", test_groups, len(dev_groups))
    answers: dict[str, list] = {
        "text": [*dev_groups, *test_groups],
        "references": [*dev_groups.values(), *test_groups.values()],
    }
    types = {"text": pa.string(), "references": pa.list_(pa.string())}
    prepared.write(folder / "references.arrow", types, [answers])
    for split in rows:
        raw[split].unlink()
    return {
        "labels": None,
        "metric": DEFAULT_METRIC[data.resolved_task],
        "task": data.task or "seq2seq",
        "test_is_dev": False,
        "sources": described,
        "shared": [
            [*names, count] for names, count in shared_texts(train_set, dev_set, test_set).items()
        ],
    }


def load(data: DataSettings) -> Examples:
    """Read the examples of a run and choose those to train and develop on.

    The first `k` rows of the training file, shuffled by `seed`, are for training. The next
    `dev_size` rows are for development unless there is a validation file. The ConfigError names
    every problem in the files.
    """
    return prepared.load(data, _read, sources_of(data))


def tokenize(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, data: DataSettings
) -> Examples:
    """Replace texts by tokens and add the column length (tokens)."""
    encode = encoding.encoder(tokenizer, data)

    def make(name: str, rows: datasets.Dataset, folder: pathlib.Path) -> None:
        features = encoding.features(data, scored=name != "train")
        options = {"remove_columns": ["text", "target"], "features": features}
        packs = name == "train" and data.packing
        path = folder / ("unpacked.arrow" if packs else f"{name}.arrow")
        encoded = prepared.encode(encode, rows, path, prepared.workers(data, len(rows)), **options)
        if packs:
            batches = encoding.packed(prepared.rows_of(encoded), data.max_length)
            prepared.write(folder / "train.arrow", encoding.PACKED, batches)
            for part in folder.glob("unpacked*"):
                part.unlink()

    tokens = prepared.tokens(examples, tokenizer, data, make)
    if data.streaming:
        stream = streaming.open_stream(data, examples.sources, encode)
        tokens = dataclasses.replace(tokens, train=stream)
    return tokens


def collator(
    tokenizer: PreTrainedTokenizerBase, data: DataSettings, multiple: int = 1
) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
    """Return a function that pads examples to the longest of the batch, or to max_length.

    The lengths of a batch are rounded up to multiples of `multiple`.
    """
    return TextCollator(tokenizer.pad_token_id, data, multiple)


def lines(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, outputs: np.ndarray, numbers: np.ndarray
) -> list[dict[str, Any]]:
    """Return the lines of predictions.jsonl in the order of the set.

    Args:
        outputs: generated tokens.
        numbers: indices into `references`.
    """
    assert examples.prompts is not None and examples.references is not None
    return [
        {"text": examples.prompts[i], "written": text, "references": examples.references[i]}
        for i, text in sorted(zip(numbers.tolist(), decode(tokenizer, outputs)))
    ]
