"""Data: the K-shot protocol on real GLUE, your own files in every format and with every mistake, tokens, batches, metrics."""

import dataclasses
import hashlib
import json
import os
import random
import time

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats
from sklearn import metrics
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertTokenizerFast, EvalPrediction, PreTrainedTokenizerFast

from scaleup.data import classification as data
from scaleup.errors import ConfigError
from scaleup.settings.schema import DataSettings
from scaleup.settings.schema import load as load_config

ROWS = [
    ("good film", "pos"),
    ("bad film", "neg"),
    ("fine film", "pos"),
    ("dull film", "neg"),
    ("great film", "pos"),
    ("poor film", "neg"),
]


@pytest.fixture
def glue(data_dir):
    return str(data_dir / "glue")


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """File names in messages are then short: as the user wrote them."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer():
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] good bad fine dull great poor film a b c d".split()
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})


def settings(**fields) -> DataSettings:
    return DataSettings(**fields)


def problems(**fields) -> list[str]:
    return data.check({"data": settings(**fields)})


def write(name: str, content: str | bytes, folder=".") -> str:
    with open(os.path.join(folder, name), "wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
    return name


def write_csv(name: str, rows=ROWS, header=("text", "label")) -> str:
    return write(name, "\n".join(",".join(map(str, row)) for row in [header, *rows]) + "\n")


def write_jsonl(name: str, rows: list[dict]) -> str:
    return write(name, "".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(name: str, columns: dict) -> str:
    pq.write_table(pa.table(columns), name)
    return name


def own(rows=ROWS, **fields) -> data.Examples:
    """`rows` as training and development set, whole and in file order."""
    fields = {
        "train_file": write_csv("own.csv", rows),
        "validation_file": write_csv("own_dev.csv", rows),
        **fields,
    }
    return data.load(settings(**fields))


def made(task="sequence_classification", labels=("a", "b"), metric="accuracy") -> data.Examples:
    """Examples for the metrics, which look at no rows."""
    rows = datasets.Dataset.from_dict({"text": ["x"], "label": [0]})
    return data.Examples(
        rows, rows, None, list(labels) if labels else None, metric, task, False, []
    )


def score(examples: data.Examples, outputs, truth) -> dict[str, float]:
    return data.compute_metrics(examples, None)(
        EvalPrediction(predictions=outputs, label_ids=np.asarray(truth))
    )


# --- the protocol, on real data ---------------------------------------------------------------------------------------

COUNTS = {
    "cola": (8551, 1043),
    "rte": (2490, 277),
    "stsb": (5749, 1500),
    "mrpc": (3668, 408),
    "wnli": (635, 71),
}
NAMES = {
    "cola": ["unacceptable", "acceptable"],
    "mrpc": ["not_equivalent", "equivalent"],
    "qqp": ["not_duplicate", "duplicate"],
    "rte": ["entailment", "not_entailment"],
    "qnli": ["entailment", "not_entailment"],
    "wnli": ["not_entailment", "entailment"],
    "stsb": None,
}
METRICS = {
    "cola": "matthews",
    "mrpc": "f1",
    "qqp": "f1",
    "stsb": "spearman",
    "rte": "accuracy",
    "qnli": "accuracy",
    "wnli": "accuracy",
}


@pytest.mark.parametrize("task", COUNTS)
def test_all_of_a_glue_task_trains_on_its_training_set_and_develops_on_its_validation_set(
    glue, task
):
    examples = data.load(settings(name=task, path=glue))
    assert (len(examples.train), len(examples.dev), len(examples.test)) == (
        *COUNTS[task],
        COUNTS[task][1],
    )
    assert examples.test_is_dev and examples.dev[:] == examples.test[:]
    table = pq.read_table(f"{glue}/{task}/train.parquet")
    assert examples.train["label"][:] == table["label"].to_pylist(), (
        "in the file's order, with the file's ids"
    )
    assert examples.train["text"][:] == table[0].to_pylist()


@pytest.mark.parametrize("task", NAMES)
def test_every_local_glue_task_loads_with_its_names_metric_and_columns(glue, task):
    examples = data.load(settings(name=task, path=glue))
    assert examples.labels == NAMES[task]
    assert examples.metric == METRICS[task]
    assert examples.task == ("regression" if task == "stsb" else "sequence_classification")
    assert examples.train.column_names == (
        ["text", "label"] if task == "cola" else ["text", "text_pair", "label"]
    )
    assert isinstance(examples.train[0]["label"], float if task == "stsb" else int)


def test_k_shot_takes_the_first_k_of_the_shuffled_training_set_then_the_next_for_development(glue):
    examples = data.load(settings(name="cola", path=glue, k=100, seed=3))
    rows = pq.read_table(f"{glue}/cola/train.parquet").to_pylist()
    shuffled = datasets.Dataset.from_list(rows).shuffle(
        seed=3
    )  # an independent draw, by the library the authors used
    assert examples.train["text"][:] == shuffled["sentence"][:100]
    assert examples.dev["text"][:] == shuffled["sentence"][100:1100]
    assert examples.dev["label"][:] == shuffled["label"][100:1100]
    assert not examples.test_is_dev
    assert (
        examples.test["text"][:]
        == pq.read_table(f"{glue}/cola/validation.parquet")["sentence"].to_pylist()
    )


def test_training_and_development_share_no_row(in_tmp):
    rows = [(f"text {i}", "ab"[i % 2]) for i in range(300)]
    examples = data.load(settings(train_file=write_csv("t.csv", rows), k=100, dev_size=150))
    train, dev = set(examples.train["text"]), set(examples.dev["text"])
    assert (len(train), len(dev), len(train & dev)) == (100, 150, 0)


def test_the_seed_alone_decides_which_examples_are_drawn(glue):
    def draw(seed):
        data._load.cache_clear()
        return data.load(settings(name="rte", path=glue, k=100, seed=seed)).train["text"][:]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_more_examples_are_drawn_by_adding_to_fewer(glue):
    few, many = (
        data.load(settings(name="mrpc", path=glue, k=k)).train["text"][:] for k in (100, 500)
    )
    assert many[:100] == few


def test_the_prior_is_the_best_output_of_a_head_that_sees_nothing(glue):
    found = data.load(DataSettings(name="stsb", path=glue, k=50))
    labels = found.train["label"]
    renamed = dataclasses.replace(found, train=found.train.rename_column("label", "labels"))
    assert data.prior(renamed) == pytest.approx([sum(labels) / 50])
    train = datasets.Dataset.from_dict({"labels": [0, 2, 2, 2, 0]})
    classes = dataclasses.replace(found, train=train, labels=["a", "b", "c"])
    assert data.prior(classes) == pytest.approx(np.log([3 / 8, 1 / 8, 4 / 8]))


def test_a_task_too_small_for_k_and_dev_size_is_told_what_fits(glue):
    assert problems(name="rte", path=glue, k=2000) == [
        f"data.k: 2000 examples to train on and 1000 for development, but {glue}/rte/train.parquet has 2490; "
        "the largest that fits: data.k=1490 or data.dev_size=490"
    ]
    assert (
        problems(name="rte", path=glue, k=1490)
        == problems(name="rte", path=glue, k=2000, dev_size=490)
        == []
    )
    assert problems(name="wnli", path=glue, k=500)[0].endswith(
        "the largest that fits: data.dev_size=135"
    )
    assert problems(name="wnli", path=glue, k=700)[0].endswith("has 635; lower data.dev_size")


def test_the_folder_of_the_task_itself_is_taken_too(glue):
    assert (
        data.load(settings(name="rte", path=f"{glue}/rte")).train[:]
        == data.load(settings(name="rte", path=glue)).train[:]
    )


def test_the_folder_of_another_task_with_the_same_columns_is_refused(glue):
    path = f"{glue}/mrpc"
    found = problems(name="rte", path=path)
    assert (
        found[0]
        == f"data.path: {path}/train.parquet is not rte; its classes are not_equivalent, equivalent"
    )


def test_sources_name_every_file_read_with_its_hash(glue):
    examples = data.load(settings(name="wnli", path=glue))
    assert [source["split"] for source in examples.sources] == ["train", "validation"]
    for source in examples.sources:
        with open(source["file"], "rb") as file:
            assert source["sha256"] == hashlib.sha256(file.read()).hexdigest()
    assert [source["rows"] for source in examples.sources] == [635, 71]


def glue_folder(
    task: str,
    validation="validation",
    features=None,
    names=("entailment", "neutral", "contradiction"),
) -> str:
    """A made-up GLUE folder as `datasets` writes it, in the current folder."""
    text, pair, _, _ = data.GLUE[task]
    os.makedirs(task, exist_ok=True)
    for split, rows in (("train", 30), (validation, 6)):
        columns = {
            text: [f"{split} {i}" for i in range(rows)],
            "label": [i % len(names) for i in range(rows)],
        }
        columns |= {pair: [f"second {i}" for i in range(rows)]} if pair else {}
        kinds = {name: datasets.Value("string") for name in columns} | {
            "label": datasets.ClassLabel(names=list(names))
        }
        datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).to_parquet(
            f"{task}/{split}.parquet"
        )
    return "."


def test_mnli_is_tested_on_the_matched_validation_set_under_the_hubs_file_names(in_tmp):
    glue_folder("mnli", "validation_matched-00000-of-00001")
    os.rename("mnli/train.parquet", "mnli/train-00000-of-00001.parquet")
    os.mkdir("none")
    examples = data.load(settings(name="mnli", path=str(in_tmp)))
    assert examples.test["text"][0] == "validation_matched-00000-of-00001 0"
    assert (examples.labels, examples.metric) == (
        ["entailment", "neutral", "contradiction"],
        "accuracy",
    )


def test_sst2_loads(in_tmp):
    examples = data.load(
        settings(name="sst2", path=glue_folder("sst2", names=("negative", "positive")))
    )
    assert (examples.labels, examples.metric, examples.train.column_names) == (
        ["negative", "positive"],
        "accuracy",
        ["text", "label"],
    )


def test_a_withheld_glue_label_is_missing(in_tmp):
    os.mkdir("cola")
    write_parquet("cola/train.parquet", {"sentence": ["a", "b"], "label": [0, 1]})
    write_parquet("cola/validation.parquet", {"sentence": ["a", "b"], "label": [-1, 1]})
    assert problems(name="cola", path=".") == [
        "data.path: ./cola/validation.parquet, row 1, column label: is missing"
    ]


def test_a_glue_file_without_metadata_has_the_official_classes_and_no_other(in_tmp):
    os.mkdir("cola")
    write_parquet("cola/train.parquet", {"sentence": ["a", "b"], "label": [1, 0]})
    write_parquet(
        "cola/validation.parquet", {"sentence": ["a", "b"], "label": ["acceptable", "unacceptable"]}
    )
    examples = data.load(settings(name="cola", path="."))
    assert (examples.labels, examples.train["label"][:], examples.dev["label"][:]) == (
        NAMES["cola"],
        [1, 0],
        [1, 0],
    )
    write_parquet("cola/train.parquet", {"sentence": ["a", "b", "c"], "label": [1, 0, 7]})
    found = problems(name="cola", path=".")
    assert found == [
        "data.path: ./cola/train.parquet, row 3, column label: the label '7' is none of acceptable, unacceptable"
    ]


def test_a_folder_that_is_not_there_or_holds_no_such_task_is_named(in_tmp):
    missing = "cannot be read: No such file or directory"
    assert problems(name="cola", path="/nowhere") == [
        f"data.path: /nowhere/cola/{s}.parquet {missing}" for s in ("train", "validation")
    ]
    assert problems(name="cola", path=".") == [
        f"data.path: ./cola/{s}.parquet {missing}" for s in ("train", "validation")
    ]


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_check_leaves_the_hub_alone(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("check asked the hub"))
    assert problems(name="rte") == problems(name="rte", path="someone/glue") == []


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach\nthe Hub"),
        ValueError("no config rte"),
        RuntimeError("scripts"),
        KeyError("x"),
    ],
)
def test_a_hub_that_fails_gives_one_line_with_the_way_out(monkeypatch, error):
    def fail(hub_id, name):
        assert (hub_id, name) == ("nyu-mll/glue", "rte")
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConfigError) as caught:
        data.load(settings(name="rte"))
    (problem,) = caught.value.problems
    assert problem.startswith(
        "data.path: nyu-mll/glue is no folder here and did not load from the hub ("
    )
    assert (
        problem.endswith("give data.path as a local folder with rte/train.parquet")
        and "\n" not in problem
    )


def test_the_real_hub_offline_gives_the_same_line():
    with pytest.raises(
        ConfigError, match="give data.path as a local folder with cola/train.parquet"
    ):
        data.load(settings(name="cola"))


def test_a_hub_data_set_goes_through_the_same_protocol(monkeypatch):
    def rows(split, count):
        kinds = datasets.Features(
            {
                "premise": datasets.Value("string"),
                "hypothesis": datasets.Value("string"),
                "label": datasets.ClassLabel(names=data.GLUE["mnli"][2]),
            }
        )
        columns = {
            "premise": [f"{split} {i}" for i in range(count)],
            "hypothesis": ["h"] * count,
            "label": [i % 3 for i in range(count)],
        }
        return datasets.Dataset.from_dict(columns, features=kinds)

    sets = {
        "train": rows("train", 50),
        "validation_matched": rows("matched", 5),
        "validation_mismatched": rows("other", 5),
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda hub_id, name: sets)
    examples = data.load(settings(name="mnli", path="someone/mnli", k=20, dev_size=10))
    assert (len(examples.train), len(examples.dev), examples.test["text"][0]) == (
        20,
        10,
        "matched 0",
    )
    assert examples.sources[0] == {
        "split": "train",
        "rows": 50,
        "hub_id": "someone/mnli",
        "name": "mnli",
    }
    assert examples.train["label"][0] == int(examples.train["text"][0].split()[1]) % 3


# --- your own files ---------------------------------------------------------------------------------------------------


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
    fields = {"train_file": write_csv("t.csv"), "validation_file": write_csv("v.csv")}
    read = []
    monkeypatch.setattr(
        data,
        "read_columns",
        lambda key, file, parse=data.read_columns: read.append(file) or parse(key, file),
    )
    assert problems(**fields) == []
    data.load(settings(**fields))
    assert read == ["t.csv", "v.csv"], "check and load share one reading"
    write_csv("v.csv", ROWS[:2])
    assert len(data.load(settings(**fields)).dev) == 2


def test_loading_writes_nothing_beside_the_data(in_tmp):
    own()
    assert sorted(os.listdir(".")) == ["own.csv", "own_dev.csv"]


# --- odd text ---------------------------------------------------------------------------------------------------------

ODD = [
    "",
    " ",
    "tab\tinside",
    "new\nline",
    "carriage\r\nreturn",
    'say "hi" and ""',
    "'",
    "a,b;c",
    "nul\x00byte",
    "bell\x07 \x1b[0m",
    "cafÃ© â€™",
    "\u2028line separator\x85",
    "emoji 😀 \u200d",
    "\ufeffmark",
    "e\u0301",
    "x" * 200_000,
    '\\n \\" \\u0041',
    "NA",
    "null",
    "nan",
]


def quoted(value: str) -> str:
    return '"' + value.replace('"', '""') + '"'


@pytest.mark.parametrize(
    "kind",
    [
        "csv",
        "csv with CRLF and BOM",
        "tsv",
        "jsonl",
        "jsonl with CRLF and BOM",
        "raw jsonl",
        "parquet",
    ],
)
def test_odd_text_arrives_as_it_was_written(in_tmp, kind):
    texts = [text for text in ODD if "tsv" not in kind or "\t" not in text]
    labels = ["ab"[i % 2] for i in range(len(texts))]
    mark, end = ("\ufeff", "\r\n") if "BOM" in kind else ("", "\n")
    name = "own." + (
        "tsv"
        if kind == "tsv"
        else "csv"
        if "csv" in kind
        else "parquet"
        if kind == "parquet"
        else "jsonl"
    )
    if kind == "parquet":
        write_parquet(name, {"text": texts, "label": labels})
    elif "json" in kind:
        lines = [
            json.dumps({"text": text, "label": label}, ensure_ascii="raw" not in kind)
            for text, label in zip(texts, labels)
        ]
        write(name, mark + "".join(line + end for line in lines))
    else:
        comma = "\t" if kind == "tsv" else ","
        lines = [f"text{comma}label"] + [
            f"{quoted(text)}{comma}{label}" for text, label in zip(texts, labels)
        ]
        write(name, mark + "".join(line + end for line in lines))
    assert problems(train_file=name, validation_file=name) == []
    assert data.load(settings(train_file=name, validation_file=name)).train["text"][:] == texts


def test_a_raw_control_character_in_a_json_string_is_text(in_tmp):
    write("own.jsonl", '{"text": "a\tb\x00c\x01", "label": "x"}\n\n{"text": "d", "label": "y"}\n')
    assert (
        data.load(settings(train_file="own.jsonl", validation_file="own.jsonl")).train["text"][0]
        == "a\tb\x00c\x01"
    )


def test_half_a_surrogate_pair_becomes_the_replacement_character(in_tmp, tokenizer):
    write(
        "own.jsonl",
        '{"text": "cut \\ud83d", "label": "x"}\n{"text": "whole \\ud83d\\ude00", "label": "y"}\n',
    )
    fields = settings(train_file="own.jsonl", validation_file="own.jsonl")
    assert data.load(fields).train["text"][:] == ["cut \ufffd", "whole 😀"]
    assert len(data.tokenize(data.load(fields), tokenizer, fields).train) == 2


def test_a_tsv_without_quoting_keeps_its_quotes_as_characters(in_tmp):
    texts = [
        '"Stray quote at the start',
        'in the "middle" of it',
        "plain",
        'and one at the end"',
        '"both" sides',
        '"',
    ]
    write(
        "own.tsv",
        "text\tlabel\n" + "".join(f"{text}\t{'ab'[i % 2]}\n" for i, text in enumerate(texts)),
    )
    assert (
        data.load(settings(train_file="own.tsv", validation_file="own.tsv")).train["text"][:]
        == texts
    )


def test_two_stray_quotes_in_a_tsv_swallow_no_rows(in_tmp):
    write("own.tsv", 'text\tlabel\n"opens\ta\nbetween\tb\ncloses"\ta\n')
    write("quoted.tsv", 'label\ttext\na\t"opens\nb\tcloses"\n')
    assert len(data.load(settings(train_file="own.tsv", validation_file="own.tsv")).train) == 3
    assert data.load(settings(train_file="quoted.tsv", validation_file="quoted.tsv")).train["text"][
        :
    ] == ['"opens', 'closes"']


def test_random_texts_survive_every_format(in_tmp):
    draw = random.Random(0)
    alphabet = "ab \"',;\\\n\r\x00\x0b\x1f\x85é漢\u2028😀{}[]"
    texts = ["".join(draw.choice(alphabet) for _ in range(draw.randrange(30))) for _ in range(400)]
    labels = [draw.choice("xy") for _ in texts]
    write(
        "own.csv",
        "text,label\n" + "".join(f"{quoted(text)},{label}\n" for text, label in zip(texts, labels)),
    )
    write(
        "own.tsv",
        "text\tlabel\n"
        + "".join(f"{quoted(text)}\t{label}\n" for text, label in zip(texts, labels)),
    )
    write_jsonl("own.jsonl", [{"text": text, "label": label} for text, label in zip(texts, labels)])
    for name in ("own.csv", "own.tsv", "own.jsonl"):
        examples = data.load(settings(train_file=name, validation_file=name))
        assert examples.train["text"][:] == texts, name
        assert examples.train["label"][:] == ["xy".index(label) for label in labels], name


# --- mistakes: each is one plain sentence -----------------------------------------------------------------------------

GOOD_CSV = "text,label\ngood,a\nbad,b\n"

MISTAKES = {
    "missing column": (
        "t.csv",
        "text,label_id\nx,a\ny,b\n",
        "data.label_column: t.csv has no column 'label'; its columns are text, label_id; did you mean label_id",
    ),
    "no such column at all": (
        "t.csv",
        "q,z\nx,a\n",
        "data.text_column: t.csv has no column 'text'; its columns are q, z",
    ),
    "no such column in JSON": (
        "t.jsonl",
        '{"body": "x", "label": 1}\n',
        "data.text_column: t.jsonl has no column 'text'; its columns are body, label",
    ),
    "semicolons": (
        "t.csv",
        "text;label\na, b;c\n",
        "data.train_file: t.csv: its columns are separated by semicolons",
    ),
    "empty file": ("t.csv", "", "data.train_file: t.csv is empty"),
    "header only": ("t.csv", "text,label\n", "data.train_file: t.csv has no rows"),
    "unknown extension": (
        "t.txt",
        "x",
        "data.train_file: t.txt has an unknown extension; use .csv, .tsv, .jsonl, .json (lines) or .parquet",
    ),
    "column twice": (
        "t.csv",
        "text,label,text\nx,a,y\n",
        "data.train_file: t.csv has the column text more than once",
    ),
    "too many fields": (
        "t.csv",
        "text,label\nx,a\nwell, well,b\n",
        "data.train_file: t.csv, line 3: 3 fields under a header of 2; a text with a comma or line break needs quotes",
    ),
    "too few fields": (
        "t.csv",
        'text,label\n"two\nlines",a\nx\n',
        "data.train_file: t.csv, line 4: 1 fields under a header of 2; a text with a comma or line break needs quotes",
    ),
    "tab in a TSV": (
        "t.tsv",
        "text\tlabel\nx\ta\ny\tz\tb\n",
        "data.train_file: t.tsv, line 3: 3 fields under a header of 2; no text may hold a tab",
    ),
    "open quote": (
        "t.csv",
        'text,label\nx,a\n"y,b\nz,b\n',
        "data.train_file: t.csv, line 3: not valid CSV (unexpected end of data); a quote inside a quoted field is doubled",
    ),
    "stray quote": (
        "t.csv",
        'text,label\n"a "b" c",a\n',
        "data.train_file: t.csv, line 2: not valid CSV (',' expected after '\"'); a quote inside a quoted field is doubled",
    ),
    "not UTF-8": (
        "t.csv",
        b"text,label\nx,a\ncaf\xe9,b\n",
        "data.train_file: t.csv, line 3: not UTF-8 text (byte 0xe9); save the file as UTF-8",
    ),
    "UTF-16": (
        "t.csv",
        GOOD_CSV.encode("utf-16"),
        "data.train_file: t.csv, line 1: not UTF-8 text (byte 0xff); save the file as UTF-8",
    ),
    "missing label in CSV": (
        "t.csv",
        'text,label\n"two\nlines",a\nx,\ny,b\n',
        "data.train_file: t.csv, row 2 (line 4), column label: is missing",
    ),
    "blank label": (
        "t.csv",
        "text,label\nx,a\ny,  \nz,b\n",
        "data.train_file: t.csv, row 2 (line 3), column label: is missing",
    ),
    "missing label in JSON": (
        "t.jsonl",
        '{"text": "x", "label": "a"}\n\n{"text": "y"}\n',
        "data.train_file: t.jsonl, row 2 (line 3), column label: is missing",
    ),
    "missing text": (
        "t.jsonl",
        '{"text": null, "label": "a"}\n{"text": "y", "label": "b"}\n',
        "data.train_file: t.jsonl, row 1 (line 1), column text: is missing",
    ),
    "a list as text": (
        "t.jsonl",
        '{"text": ["x"], "label": "a"}\n',
        "data.train_file: t.jsonl, row 1 (line 1), column text: holds a list, not text",
    ),
    "an object as label": (
        "t.jsonl",
        '{"text": "x", "label": {"a": 1}}\n',
        "data.train_file: t.jsonl, row 1 (line 1), column label: holds a dict, not a label",
    ),
    "many rows": (
        "t.csv",
        "text,label\n" + "x,\n" * 4,
        "data.train_file: t.csv, row 1 (line 2), row 2 (line 3), row 3 (line 4) and 1 more, column label: is missing",
    ),
    "JSON syntax": (
        "t.jsonl",
        '{"text": "x", "label": "a"}\n{"text": "y" "label": "b"}\n',
        "data.train_file: t.jsonl, line 2: not one JSON object (Expecting ',' delimiter)",
    ),
    "JSON array": (
        "t.json",
        '[{"text": "x", "label": "a"}]',
        "data.train_file: t.json, line 1: not one JSON object (but a list)",
    ),
    "two objects on a line": (
        "t.jsonl",
        '{"text": "x"} {"text": "y"}',
        "data.train_file: t.jsonl, line 1: not one JSON object (Extra data)",
    ),
    "JSON nested beyond reason": (
        "t.jsonl",
        "[" * 100_000,
        "data.train_file: t.jsonl, line 1: not one JSON object (maximum recursion depth exceeded",
    ),
    "one label": (
        "t.csv",
        "text,label\nx,a\ny,a\n",
        "data.k: the 2 examples of t.csv to train on all have the label 'a'",
    ),
    "not Parquet": ("t.parquet", b"PAR1 nonsense", "data.train_file: t.parquet cannot be read: "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_file_is_named_with_its_place(in_tmp, mistake):
    name, content, sentence = MISTAKES[mistake]
    write("dev.csv", GOOD_CSV)
    found = problems(train_file=write(name, content), validation_file="dev.csv")
    assert found[0].startswith(sentence), found
    assert all("\n" not in problem for problem in found)
    with pytest.raises(ConfigError) as caught:
        data.load(settings(train_file=name, validation_file="dev.csv"))
    assert caught.value.problems == found, "load refuses what check reports"


@pytest.mark.parametrize(
    "name, found",
    [
        ("nowhere.csv", "data.train_file: nowhere.csv cannot be read: No such file or directory"),
        ("folder.csv", "data.train_file: folder.csv cannot be read: Is a directory"),
        ("nul\0.csv", "data.train_file: nul\0.csv cannot be read: embedded null byte"),
        (
            "x" * 300 + ".csv",
            f"data.train_file: {'x' * 300}.csv cannot be read: File name too long",
        ),
    ],
)
def test_a_file_that_cannot_be_opened_is_named(in_tmp, name, found):
    os.mkdir("folder.csv")
    assert problems(train_file=name, validation_file=write("dev.csv", GOOD_CSV)) == [found]


def test_text_that_is_not_utf8_in_a_parquet_file_is_a_problem(in_tmp):
    broken = pa.array([b"ok", b"\xff\xfe"]).view(pa.string())
    pq.write_table(pa.table({"text": broken, "label": ["a", "b"]}), "t.parquet")
    (found,) = problems(train_file="t.parquet", validation_file=write("dev.csv", GOOD_CSV))
    assert found.startswith("data.train_file: t.parquet cannot be read: ") and "UTF8" in found


def test_bytes_and_nested_columns_of_a_parquet_file_are_no_text(in_tmp):
    write_parquet("t.parquet", {"text": [b"a", b"b"], "pair": [["x"], ["y"]], "label": ["a", "b"]})
    found = problems(train_file="t.parquet", validation_file="t.parquet", text_pair_column="pair")
    assert found[:2] == [
        "data.train_file: t.parquet, row 1, row 2, column text: holds a bytes, not text",
        "data.train_file: t.parquet, row 1, row 2, column pair: holds a list, not text",
    ]


def test_a_label_that_training_does_not_have_is_named_with_row_and_value(in_tmp):
    dev, test = (
        write_csv("dev.csv", [("x", "pos"), ("y", "neutral")]),
        write_csv("test.csv", [("x", "Pos")]),
    )
    assert problems(train_file=write_csv("t.csv"), validation_file=dev, test_file=test) == [
        "data.validation_file: dev.csv, row 2 (line 3), column label: the label 'neutral' is none of neg, pos",
        "data.test_file: test.csv, row 1 (line 2), column label: the label 'Pos' is none of neg, pos",
    ]


def test_a_declared_class_that_training_does_not_have_is_no_label_of_development(in_tmp):
    kinds = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["pos", "neg", "neutral"]),
        }
    )
    for name, ids in (("t.parquet", [0, 1]), ("v.parquet", [0, 2])):
        datasets.Dataset.from_dict({"text": ["a", "b"], "label": ids}, features=kinds).to_parquet(
            name
        )
    assert problems(train_file="t.parquet", validation_file="v.parquet") == [
        "data.validation_file: v.parquet, row 2, column label: the label 'neutral' is none of neg, pos"
    ]


@pytest.mark.parametrize(
    "value", ["high", "3,5", "nan", "inf", "1e999", "1_000", "0x10", "٣", "True"]
)
def test_a_label_that_is_no_number_is_named_in_a_regression(in_tmp, value):
    train = write("t.csv", f'text,label\nx,1.5\ny,"{value}"\nz,2\n')
    found = problems(
        train_file=train,
        validation_file=write_csv("dev.csv", [("x", 1), ("y", 2)]),
        task="regression",
    )
    assert found == [
        f"data.train_file: t.csv, row 2 (line 3), column label: {value!r} is not a number"
    ]


def test_a_json_nan_or_true_is_no_number_either(in_tmp):
    write(
        "t.jsonl",
        '{"text": "x", "label": NaN}\n{"text": "y", "label": true}\n{"text": "z", "label": Infinity}\n',
    )
    found = problems(
        train_file="t.jsonl", validation_file=write_csv("dev.csv", [("x", 1)]), task="regression"
    )
    assert [problem.partition("column label: ")[2] for problem in found] == [
        "is missing",
        "'True' is not a number",
        "'inf' is not a number",
    ]


def test_every_problem_of_every_file_is_reported_at_once(in_tmp):
    write("t.csv", "text,label\nx,\ny,b\n")
    write("v.csv", "body,lable\nx,a\n")
    assert problems(train_file="t.csv", validation_file="v.csv", test_file="s.csv") == [
        "data.train_file: t.csv, row 1 (line 2), column label: is missing",
        "data.text_column: v.csv has no column 'text'; its columns are body, lable",
        "data.label_column: v.csv has no column 'label'; its columns are body, lable; did you mean lable",
        "data.test_file: s.csv cannot be read: No such file or directory",
    ]


def test_k_and_dev_size_beyond_your_own_file_are_told_what_fits(in_tmp):
    train = write_csv("t.csv")
    assert problems(train_file=train) == [
        "data.dev_size: 1000 for development, but t.csv has 6; lower data.dev_size"
    ]
    assert problems(train_file=train, k=4, dev_size=3)[0].endswith(
        "but t.csv has 6; the largest that fits: data.k=3 or data.dev_size=2"
    )
    assert problems(train_file=train, validation_file=train, k=7)[0].endswith(
        "but t.csv has 6; the largest that fits: data.k=6"
    )
    assert (
        problems(train_file=train, k=4, dev_size=2) == problems(train_file=train, dev_size=2) == []
    )


def test_a_draw_with_a_single_label_is_refused(in_tmp):
    assert problems(train_file=write_csv("t.csv"), k=1, dev_size=2)[0].startswith(
        "data.k: the 1 examples of t.csv to train on all have the label '"
    )


def test_the_label_column_cannot_be_a_text_column(in_tmp):
    train = write_csv("t.csv")
    found = problems(train_file=train, validation_file=train, text_column="label")
    assert (
        found[0] == "data.label_column: label is a text column, too; the text would tell the label"
    )


def test_scores_and_ids_given_as_classes_are_noticed(in_tmp):
    scores = [(f"t{i}", (i % 25) / 4) for i in range(100)]
    assert problems(
        train_file=write_csv("t.csv", scores), validation_file=write_csv("v.csv", scores)
    ) == ["data.label_column: t.csv has 25 labels; numbers need data.task=regression"]
    ids = [(f"t{i}", f"id{i}") for i in range(30)]
    assert problems(train_file=write_csv("t.csv", ids), dev_size=5) == [
        "data.label_column: t.csv has 30 labels; numbers need data.task=regression"
    ]
    stars = [(f"t{i}", (i % 10) / 2) for i in range(100)]
    assert problems(train_file=write_csv("t.csv", stars), dev_size=5) == [], (
        "half stars are classes"
    )


def test_check_is_silent_without_data_and_joins_the_config(in_tmp):
    assert data.check({}) == data.check({"data": settings()}) == []
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["data.train_file=nowhere.csv", "data.k=0"], checks=[data.check])
    assert len(caught.value.problems) == 1, "an invalid section is not checked further"
    with pytest.raises(ConfigError, match="data.train_file: nowhere.csv cannot be read"):
        load_config(None, ["data.train_file=nowhere.csv"], checks=[data.check])


def test_damaged_files_give_sentences_and_never_a_traceback(in_tmp):
    draw = random.Random(1)
    write_parquet(
        "good.parquet", {"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]}
    )
    write_jsonl("good.jsonl", [{"text": text, "label": label} for text, label in ROWS])
    write_csv("good.csv")
    refused = 0
    for name in ("good.parquet", "good.jsonl", "good.csv"):
        with open(name, "rb") as file:
            content = file.read()
        for turn in range(60):
            damaged = bytearray(content)
            for _ in range(draw.randrange(1, 5)):
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
            write(
                "bad." + name.partition(".")[2],
                bytes(damaged[: draw.randrange(len(damaged))] if turn % 3 == 0 else damaged),
            )
            found = problems(train_file="bad." + name.partition(".")[2], dev_size=2)
            assert all(isinstance(problem, str) for problem in found)
            refused += bool(found)
    assert refused > 60


# --- tokens and batches -----------------------------------------------------------------------------------------------


def test_tokens_labels_and_lengths_replace_the_columns(in_tmp, tokenizer):
    fields = settings(train_file="x.csv", max_length=128)
    tokens = data.tokenize(own(), tokenizer, fields)
    assert sorted(tokens.train.column_names) == [
        "attention_mask",
        "input_ids",
        "labels",
        "length",
        "token_type_ids",
    ]
    first = tokens.train[0]
    assert tokenizer.convert_ids_to_tokens(first["input_ids"]) == ["[CLS]", "good", "film", "[SEP]"]
    assert (first["attention_mask"], first["labels"], first["length"]) == ([1] * 4, 1, 4)
    assert tokens.labels == ["neg", "pos"] and tokens.test is None and len(tokens.dev) == 6


def test_long_texts_are_cut_to_max_length_and_short_ones_are_not_padded(in_tmp, tokenizer):
    examples = own([("good " * 50, "a"), ("bad", "b")])
    tokens = data.tokenize(
        examples, tokenizer, settings(train_file="x.csv", max_length=10, pad_to_max_length=True)
    )
    assert tokens.train["length"][:] == [10, 3]
    assert tokens.train[0]["input_ids"][-1] == tokenizer.sep_token_id


def test_of_a_pair_the_longer_text_is_cut_first(in_tmp, tokenizer):
    write_jsonl(
        "p.jsonl",
        [
            {"text": "good " * 20, "second": "bad bad", "label": 0},
            {"text": "a", "second": "b " * 20, "label": 1},
        ],
    )
    fields = settings(
        train_file="p.jsonl", validation_file="p.jsonl", text_pair_column="second", max_length=10
    )
    tokens = data.tokenize(data.load(fields), tokenizer, fields)
    assert (
        tokenizer.decode(tokens.train[0]["input_ids"])
        == "[CLS] good good good good good [SEP] bad bad [SEP]"
    )
    assert tokens.train[1]["token_type_ids"] == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]


def test_special_tokens_written_in_a_text_are_text(in_tmp, tokenizer):
    fields = settings(train_file="x.csv")
    tokens = data.tokenize(
        own([("good [SEP] bad [PAD] [CLS]", "a"), ("fine", "b")]), tokenizer, fields
    )
    ids = tokens.train[0]["input_ids"]
    special = [
        i
        for i in ids
        if i in (tokenizer.sep_token_id, tokenizer.cls_token_id, tokenizer.pad_token_id)
    ]
    assert special == [ids[0], ids[-1]] == [tokenizer.cls_token_id, tokenizer.sep_token_id]


def test_a_tokenizer_without_token_types_gives_none(in_tmp):
    plain = PreTrainedTokenizerFast(
        tokenizer_object=word_level(), unk_token="<unk>", pad_token="<pad>"
    )
    plain.model_input_names = ["input_ids", "attention_mask"]
    tokens = data.tokenize(own(), plain, settings(train_file="x.csv"))
    assert sorted(tokens.train.column_names) == ["attention_mask", "input_ids", "labels", "length"]


def word_level() -> Tokenizer:
    made = Tokenizer(
        models.WordLevel(
            {"<unk>": 0, "<pad>": 1, "good": 2, "bad": 3, "film": 4}, unk_token="<unk>"
        )
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def test_a_text_without_any_token_gets_one_so_that_something_is_attended_to(in_tmp):
    plain = PreTrainedTokenizerFast(
        tokenizer_object=word_level(), unk_token="<unk>", pad_token="<pad>"
    )
    fields = settings(train_file="x.csv")
    tokens = data.tokenize(own([('""', "a"), ("good", "b")]), plain, fields)
    assert (
        tokens.train[0]["input_ids"],
        tokens.train[0]["attention_mask"],
        tokens.train[0]["length"],
    ) == ([1], [1], 1)
    assert data.collator(plain, fields)([tokens.train[0]])["attention_mask"].tolist() == [[1]]


def test_a_tokenizer_that_cannot_pad_is_refused(in_tmp):
    plain = PreTrainedTokenizerFast(tokenizer_object=word_level(), unk_token="<unk>")
    with pytest.raises(ConfigError, match="has no padding token"):
        data.tokenize(own(), plain, settings(train_file="x.csv"))


def test_a_max_length_below_the_special_tokens_is_refused(in_tmp, tokenizer):
    with pytest.raises(
        ConfigError, match="data.max_length: 2 leaves no room for text beside 2 special tokens"
    ):
        data.tokenize(own(), tokenizer, settings(train_file="x.csv", max_length=2))
    assert (
        data.tokenize(own(), tokenizer, settings(train_file="x.csv", max_length=3)).train["length"][
            :
        ]
        == [3] * 6
    )


LONG = {
    "words": "good bad film " * 8000 + "great poor",
    "letters": "a b c d " * 13_000,
    "one endless word, then words": "x" * 60_000 + " good bad film" * 3000,
    "blanks, then words": " " * 60_000 + "good bad film " * 3000,
    "control characters, then a word": "\x01" * 100_000 + " good",
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", LONG)
def test_a_line_of_100000_characters_is_cut_as_if_tokenized_whole(in_tmp, tokenizer, kind, side):
    write_jsonl("long.jsonl", [{"text": LONG[kind], "label": 0}, {"text": "good", "label": 1}])
    fields = settings(train_file="long.jsonl", validation_file="long.jsonl")
    tokenizer.truncation_side = side
    try:
        whole = tokenizer(LONG[kind], truncation=True, max_length=128)["input_ids"]
        assert data.tokenize(data.load(fields), tokenizer, fields).train[0]["input_ids"] == whole
    finally:
        tokenizer.truncation_side = "right"


def test_long_pairs_are_cut_as_if_tokenized_whole(in_tmp, tokenizer):
    rows = [
        {"text": "good " * 20_000, "second": "bad", "label": 0},
        {"text": "good " * 20_000, "second": "bad " * 25_000, "label": 1},
    ]
    write_jsonl("long.jsonl", rows)
    fields = settings(
        train_file="long.jsonl", validation_file="long.jsonl", text_pair_column="second"
    )
    tokens = data.tokenize(data.load(fields), tokenizer, fields)
    assert (
        tokens.train[0]["input_ids"]
        == tokenizer(rows[0]["text"], rows[0]["second"], truncation=True, max_length=128)[
            "input_ids"
        ]
    )
    counts = [tokens.train[1]["token_type_ids"].count(part) for part in (0, 1)]
    assert sorted(counts) == [63, 65] or sorted(counts) == [64, 64], "both texts keep their half"


def test_a_100000_character_line_takes_less_than_a_second(in_tmp, tokenizer):
    write_jsonl(
        "long.jsonl", [{"text": LONG["words"], "label": 0}, {"text": LONG["letters"], "label": 1}]
    )
    fields = settings(train_file="long.jsonl", validation_file="long.jsonl")
    examples = data.load(fields)
    seen = []

    class Watched(BertTokenizerFast):
        def __call__(self, texts, *args, **kwargs):
            seen.append(max(map(len, texts)))
            return super().__call__(texts, *args, **kwargs)

    watched = Watched(vocab=tokenizer.get_vocab())
    start = time.perf_counter()
    data.tokenize(examples, watched, fields)
    assert time.perf_counter() - start < 1
    assert max(seen) == 12_800, "only the beginning is tokenized"


def test_batches_are_padded_to_their_longest_example_or_to_max_length(in_tmp, tokenizer):
    fields = settings(train_file="x.csv", max_length=12)
    tokens = data.tokenize(own([("good " * 5, "a"), ("bad", "b")]), tokenizer, fields)
    rows = [tokens.train[0], tokens.train[1]]
    short = data.collator(tokenizer, fields)(rows)
    assert short["input_ids"].shape == (2, 7) and "length" not in short
    assert short["attention_mask"].tolist() == [[1] * 7, [1] * 3 + [0] * 4]
    assert (short["labels"].tolist(), short["labels"].dtype) == ([0, 1], torch.int64)
    long = data.collator(tokenizer, fields.model_copy(update={"pad_to_max_length": True}))(rows)
    assert long["input_ids"].shape == (2, 12)
    assert torch.equal(long["input_ids"][:, :7], short["input_ids"])
    assert "length" in rows[0], "the examples themselves are left alone"


def test_regression_labels_become_float32(in_tmp, tokenizer):
    fields = settings(train_file="x.csv", task="regression")
    tokens = data.tokenize(own([("good", 1.5), ("bad", 2)], task="regression"), tokenizer, fields)
    labels = data.collator(tokenizer, fields)([tokens.train[0], tokens.train[1]])["labels"]
    assert (labels.dtype, labels.tolist()) == (torch.float32, [1.5, 2.0])


def test_development_and_test_set_of_a_whole_glue_task_are_tokenized_once(glue, tokenizer):
    fields = settings(name="wnli", path=glue)
    tokens = data.tokenize(data.load(fields), tokenizer, fields)
    assert tokens.test is tokens.dev


def test_tokenizing_twice_gives_the_same(glue, tokenizer):
    fields = settings(name="wnli", path=glue, k=50, dev_size=50)
    first, second = (data.tokenize(data.load(fields), tokenizer, fields).train[:] for _ in range(2))
    assert first == second


# --- metrics ----------------------------------------------------------------------------------------------------------


def logits(guesses, classes=2) -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=(len(guesses), classes))
    noise[np.arange(len(guesses)), guesses] = 9.0
    return noise


def test_the_metrics_of_two_classes_by_hand():
    truth, guess = [1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0, 0]  # TP 2, FN 1, FP 1, TN 4
    assert score(made(metric="accuracy"), logits(guess), truth) == {"accuracy": 0.75}
    assert score(made(metric="f1"), logits(guess), truth) == pytest.approx(
        {"accuracy": 0.75, "f1": 2 / 3}
    )
    matthews = (2 * 4 - 1 * 1) / (3 * 3 * 5 * 5) ** 0.5
    assert score(made(metric="matthews"), logits(guess), truth) == pytest.approx(
        {"accuracy": 0.75, "matthews": matthews}
    )


def test_f1_of_two_classes_is_that_of_class_one():
    truth, guess = [0, 0, 0, 1], [0, 0, 1, 0]
    assert score(made(metric="f1"), logits(guess), truth)["f1"] == 0.0, "class 0 would have 2/3"


def test_f1_of_three_classes_is_the_macro_average():
    truth, guess = [0, 0, 1, 1, 2, 2], [0, 0, 1, 2, 2, 2]
    found = score(made(labels="abc", metric="f1"), logits(guess, 3), truth)["f1"]
    assert found == pytest.approx((1 + 2 / 3 + 4 / 5) / 3)


def test_metrics_equal_independent_calls_on_random_predictions():
    draw = np.random.default_rng(7)
    for classes in (2, 3, 5):
        truth, outputs = (
            draw.integers(0, classes, 200),
            draw.normal(size=(200, classes)).astype(np.float16),
        )
        guess, names = outputs.argmax(1), [str(i) for i in range(classes)]
        average = "binary" if classes == 2 else "macro"
        assert score(made(labels=names, metric="f1"), outputs, truth)["f1"] == pytest.approx(
            metrics.f1_score(truth, guess, average=average)
        )
        found = score(made(labels=names, metric="matthews"), outputs, truth)
        assert found == pytest.approx(
            {
                "accuracy": (truth == guess).mean(),
                "matthews": metrics.matthews_corrcoef(truth, guess),
            }
        )
    truth, outputs = (
        draw.normal(size=300).astype(np.float32),
        draw.normal(size=(300, 1)).astype(np.float32),
    )
    found = score(made("regression", None, "spearman"), outputs, truth)
    ranks = np.corrcoef(stats.rankdata(outputs[:, 0]), stats.rankdata(truth))[0, 1]
    assert found == pytest.approx(
        {
            "spearman": ranks,
            "pearson": np.corrcoef(outputs[:, 0].astype(float), truth.astype(float))[0, 1],
        }
    )


def test_the_correlations_by_hand():
    found = score(
        made("regression", None, "spearman"), np.array([[1.0], [2.0], [9.0]]), [1.0, 2.0, 3.0]
    )
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(8 / (2 * 38) ** 0.5)


def test_the_logits_come_first_where_a_model_returns_more():
    outputs = (logits([0, 1, 1]), np.zeros((3, 7, 4)))
    assert score(made(), outputs, [0, 1, 0]) == pytest.approx({"accuracy": 2 / 3})


def test_constant_predictions_score_zero_without_a_warning(recwarn):
    assert score(
        made("regression", None, "spearman"), np.full((4, 1), 0.3), [1.0, 2.0, 3.0, 4.0]
    ) == {"spearman": 0.0, "pearson": 0.0}
    assert score(made("regression", None, "spearman"), np.array([[1.0], [2.0]]), [3.0, 3.0]) == {
        "spearman": 0.0,
        "pearson": 0.0,
    }
    assert score(made(metric="matthews"), logits([0, 0, 0, 0]), [0, 1, 0, 1]) == {
        "accuracy": 0.5,
        "matthews": 0.0,
    }
    assert score(made(metric="f1"), logits([0, 0, 0, 0]), [0, 0, 0, 0]) == {
        "accuracy": 1.0,
        "f1": 0.0,
    }
    assert not [
        warning
        for warning in recwarn
        if issubclass(warning.category, (RuntimeWarning, UserWarning))
    ]


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews"])
def test_an_example_with_nan_outputs_is_wrong(metric):
    outputs = logits([0, 1, 0, 1])
    assert score(made(metric=metric), outputs, [0, 1, 0, 1])[metric] == 1.0
    outputs[0, 1] = np.nan
    found = score(made(metric=metric), outputs, [0, 1, 0, 1])
    assert found["accuracy"] == 0.75 and np.isfinite(found[metric])
    lost = score(made(metric=metric), np.full((4, 2), np.nan), [0, 1, 0, 1])
    assert lost["accuracy"] == 0.0 and lost[metric] == 0.0


def test_the_macro_average_counts_no_class_for_nan_outputs():
    outputs = logits([0, 0, 1, 1, 2, 2], 3)
    outputs[0] = np.nan
    found = score(made(labels="abc", metric="f1"), outputs, [0, 0, 1, 1, 2, 2])["f1"]
    assert found == pytest.approx((2 / 3 + 1 + 1) / 3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_regression_with_outputs_that_are_no_numbers_scores_zero(value):
    outputs = np.array([[1.0], [2.0], [value]])
    assert score(made("regression", None, "spearman"), outputs, [1.0, 2.0, 3.0]) == {
        "spearman": 0.0,
        "pearson": 0.0,
    }


def test_scores_are_plain_floats_that_json_takes():
    found = score(made(metric="f1"), logits([0, 1]).astype(np.float32), [0, 1])
    assert json.loads(json.dumps(found)) == found and all(
        type(value) is float for value in found.values()
    )


def test_examples_can_be_replaced_but_not_changed(in_tmp):
    with pytest.raises(dataclasses.FrozenInstanceError):
        own().metric = "f1"
