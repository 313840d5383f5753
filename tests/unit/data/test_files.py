"""The user's own files in every format: what is read, and which rows are chosen."""

import dataclasses
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scaleup.data import classification as data
from scaleup.data import sources
from tests.utils.examples import (
    ROWS,
    own,
    problems,
    settings,
    write,
    write_csv,
    write_jsonl,
    write_parquet,
)


@pytest.mark.parametrize("extension", ["csv", "CSV", "tsv", "jsonl", "json", "parquet"])
def test_every_format_gives_the_same_examples(in_tmp, extension):
    kind, columns = (
        extension.lower(),
        {"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]},
    )
    if kind == "parquet":
        write_parquet("own.parquet", columns)
    elif kind in ("csv", "tsv"):
        write(
            f"own.{extension}",
            "\n".join(
                ("," if kind == "csv" else "\t").join(row) for row in [("text", "label"), *ROWS]
            ),
        )
    else:
        write_jsonl(f"own.{extension}", [dict(zip(columns, row)) for row in ROWS])
    examples = data.load(
        settings(train_file=f"own.{extension}", validation_file=f"own.{extension}")
    )
    assert examples.train["text"][:] == columns["text"]
    assert examples.train["label"][:] == [1, 0, 1, 0, 1, 0]
    assert (examples.labels, examples.metric, examples.task, examples.test) == (
        ["neg", "pos"],
        "accuracy",
        "sequence_classification",
        None,
    )


def test_columns_are_found_by_the_names_set_and_pairs_become_text_pair(in_tmp):
    write_csv(
        "own.csv",
        [("1", "a", "x", "no"), ("2", "b", "y", "yes")],
        ("id", "question", " answer", "good"),
    )
    fields = {"text_column": "question", "text_pair_column": "answer", "label_column": "good"}
    examples = data.load(settings(train_file="own.csv", validation_file="own.csv", **fields))
    assert examples.train[:] == {"text": ["a", "b"], "text_pair": ["x", "y"], "label": [0, 1]}


@pytest.mark.parametrize(
    "values, names",
    [
        ([10, 9, 2, 10, 9, 2], ["2", "9", "10"]),
        (["b", "a", "c", "b", "a", "c"], ["a", "b", "c"]),
        ([True, False, True, False, True, False], ["False", "True"]),
        ([1.0, 0.0, 1.0, 0.0, -1.0, -1.0], ["-1", "0", "1"]),
        ([" b", "a ", "b", "a", "a", "b"], ["a", "b"]),
    ],
)
@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
def test_class_names_are_the_sorted_labels_of_training_and_ids_follow_them(
    in_tmp, values, names, extension
):
    texts = [f"t{i}" for i in range(len(values))]
    if extension == "parquet":
        write_parquet("own.parquet", {"text": texts, "label": values})
    else:
        write_jsonl(
            "own.jsonl", [{"text": text, "label": value} for text, value in zip(texts, values)]
        )
    examples = data.load(
        settings(train_file=f"own.{extension}", validation_file=f"own.{extension}")
    )
    assert examples.labels == names
    shown = [str(int(value) if isinstance(value, float) else value).strip() for value in values]
    assert [names[label] for label in examples.train["label"]] == shown


def test_integer_labels_of_a_csv_sort_as_numbers(in_tmp):
    assert own([(f"t{i}", i % 12) for i in range(24)]).labels == [str(i) for i in range(12)]


def test_ids_of_development_follow_training_whatever_its_own_labels(in_tmp):
    train, dev = write_csv("t.csv"), write_csv("d.csv", [("x", "pos")])
    assert data.load(settings(train_file=train, validation_file=dev)).dev["label"][:] == [1]


def test_class_names_declared_in_a_parquet_file_keep_their_order(in_tmp):
    kinds = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])}
    )
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=kinds).to_parquet(
        "own.parquet"
    )
    dev = write_csv("dev.csv", [("x", "neg")])
    examples = data.load(settings(train_file="own.parquet", validation_file=dev))
    assert (examples.labels, examples.train["label"][:], examples.dev["label"][:]) == (
        ["pos", "neg"],
        [0, 1],
        [1],
    )
    numbers = data.load(
        settings(train_file="own.parquet", validation_file="own.parquet", task="regression")
    )
    assert numbers.train["label"][:] == [0.0, 1.0], "a regression takes the numbers themselves"


@pytest.mark.parametrize(
    "metadata",
    [
        b"not json",
        b"[]",
        b'{"info": {"features": {"label": {"_type": "Unheard"}}}}',
        b'{"info": {"features": 3}}',
    ],
)
def test_metadata_of_other_tools_does_not_matter(in_tmp, metadata):
    table = pa.table({"text": ["a", "b"], "label": [0, 1]}).replace_schema_metadata(
        {b"huggingface": metadata}
    )
    pq.write_table(table, "own.parquet")
    assert data.load(settings(train_file="own.parquet", validation_file="own.parquet")).labels == [
        "0",
        "1",
    ]


def test_all_of_your_own_file_without_a_validation_file_gives_dev_size_of_it_to_development(in_tmp):
    rows = [(f"text {i}", "ab"[i % 2]) for i in range(100)]
    examples = data.load(settings(train_file=write_csv("t.csv", rows), dev_size=30))
    train, dev = examples.train["text"][:], examples.dev["text"][:]
    assert (len(train), len(dev)) == (70, 30) and sorted(train + dev) == sorted(
        text for text, _ in rows
    )
    order = np.random.default_rng(0).permutation(100)
    assert dev == [f"text {i}" for i in order[70:]], "drawn, not the file's end"


def test_a_validation_file_replaces_the_cut_and_a_test_file_is_the_test(in_tmp):
    rows = [(f"text {i}", "ab"[i % 2]) for i in range(40)]
    files = {
        "train_file": write_csv("t.csv", rows),
        "validation_file": write_csv("v.csv", rows[:7]),
        "test_file": write_csv("s.csv", rows[:3]),
    }
    examples = data.load(settings(**files, k=40))
    assert (len(examples.train), len(examples.dev), len(examples.test), examples.test_is_dev) == (
        40,
        7,
        3,
        False,
    )
    assert examples.train["text"][:] == [
        f"text {i}" for i in np.random.default_rng(0).permutation(40)
    ]
    whole = data.load(settings(**files))
    assert whole.train["text"][:] == [text for text, _ in rows], (
        "nothing is sampled: the file's order"
    )
    assert [source["split"] for source in whole.sources] == ["train", "validation", "test"]


def test_a_metric_set_for_own_files_is_the_one_that_counts(in_tmp):
    assert own(metric="f1").metric == "f1"
    numbers = [(text, i / 2) for i, (text, _) in enumerate(ROWS)]
    assert own(numbers, task="regression").metric == "spearman"


def test_a_regression_reads_numbers_from_every_format(in_tmp):
    values = [1, 2.5, -3e-2, 4.0]
    texts = [f"t{i}" for i in range(4)]
    write_csv("own.csv", [("t0", "1"), ("t1", " 2.5 "), ("t2", "-3e-2"), ("t3", "4.")])
    write_jsonl(
        "own.jsonl",
        [{"text": text, "label": value} for text, value in zip(texts, [1, "2.5", -3e-2, 4.0])],
    )
    write_parquet("own.parquet", {"text": texts, "label": values})
    for name in ("own.csv", "own.jsonl", "own.parquet"):
        examples = data.load(settings(train_file=name, validation_file=name, task="regression"))
        assert (examples.train["label"][:], examples.labels) == (values, None), name


def test_numbers_in_a_text_column_are_text(in_tmp):
    write_parquet("own.parquet", {"text": [123, 456], "label": ["a", "b"]})
    assert data.load(settings(train_file="own.parquet", validation_file="own.parquet")).train[
        "text"
    ][:] == ["123", "456"]
    write_jsonl("own.jsonl", [{"text": 123, "label": "a"}, {"text": 4.5, "label": "b"}])
    assert data.load(settings(train_file="own.jsonl", validation_file="own.jsonl")).train["text"][
        :
    ] == ["123", "4.5"]
    assert own([(123, "a"), (456, "b")]).train["text"][:] == ["123", "456"]


def test_pandas_categories_and_gaps_in_integers_are_read(in_tmp):
    labels = pa.array(["x", "y", "x"]).dictionary_encode()
    write_parquet("own.parquet", {"text": ["a", "b", "c"], "label": labels})
    assert data.load(settings(train_file="own.parquet", validation_file="own.parquet")).train[
        "label"
    ][:] == [0, 1, 0]
    write_parquet("gap.parquet", {"text": ["a", "b", "c"], "label": [0.0, 1.0, float("nan")]})
    assert (
        problems(train_file="gap.parquet", validation_file="own.parquet")[0]
        == "data.train_file: gap.parquet, row 3, column label: is missing"
    )


def test_a_changed_file_is_read_anew_and_an_unchanged_one_is_not(in_tmp, monkeypatch):
    fields = {"train_file": write_csv("t.csv"), "validation_file": write_csv("v.csv", ROWS[:3])}
    read = []
    monkeypatch.setattr(
        sources,
        "read_table",
        lambda key, file, hashed, parse=sources.read_table: (
            read.append(file) or parse(key, file, hashed)
        ),
    )
    assert problems(**fields) == []
    data.load(settings(**fields))
    assert read == ["t.csv", "v.csv"], "check and load share one reading"
    write_csv("v.csv", ROWS[:2])
    assert len(data.load(settings(**fields)).dev) == 2


def test_loading_writes_nothing_beside_the_data(in_tmp):
    own()
    assert sorted(os.listdir(".")) == ["own.csv", "own_dev.csv"]


def test_examples_can_be_replaced_but_not_changed(in_tmp):
    with pytest.raises(dataclasses.FrozenInstanceError):
        own().metric = "f1"
