"""The K-shot protocol on GLUE, from local folders and from the hub."""

import dataclasses
import hashlib
import os

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from scaleup.data import classification as data
from scaleup.data import prepared
from scaleup.errors import ConfigError
from scaleup.settings.data import DataSettings
from tests.utils.examples import problems, settings, write_csv, write_parquet

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
        prepared._texts.cache_clear()
        return data.load(settings(name="rte", path=glue, k=100, seed=seed)).train["text"][:]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_large_test_set_is_sampled_to_the_same_rows_in_every_run(glue):
    def test_rows(**values):
        examples = data.load(settings(name="rte", path=glue, k=20, **values))
        return list(zip(examples.test["text"], examples.test["text_pair"], examples.test["label"]))

    every, some = test_rows(), test_rows(test_size=30, seed=1)
    assert len(some) == 30 and test_rows(test_size=30, seed=2) == some
    assert set(some) <= set(every) and some != every[:30]
    assert some == sorted(some, key=every.index)
    assert test_rows(test_size=len(every) + 1) == every


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
        f"data.k: 2000 examples to train on and 1000 for development, but "
        f"{glue}/rte/train.parquet has 2490; "
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
        "data.path: ./cola/train.parquet, row 3, column label: the label '7' is none of "
        "acceptable, unacceptable"
    ]


def test_a_folder_that_is_not_there_or_holds_no_such_task_is_named(in_tmp):
    advice = "; give the folder with cola/train.parquet, or leave data.path out to use the hub"
    assert problems(name="cola", path="/nowhere") == [
        f"data.path: there is no folder /nowhere{advice}"
    ]
    missing = "cola/train.parquet and no cola/validation.parquet"
    assert problems(name="cola", path=".") == [f"data.path: . has no {missing}{advice}"]
    os.mkdir("cola")
    write_parquet("cola/train.parquet", {"sentence": ["a", "b"], "label": [0, 1]})
    missing = "cola/validation.parquet"
    assert problems(name="cola", path=".") == [f"data.path: . has no {missing}{advice}"]


def test_check_leaves_the_hub_alone(monkeypatch):
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: pytest.fail("check asked the hub")
    )
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
    def fail(hub_id, name, split, revision, streaming):
        assert (hub_id, name, revision) == ("nyu-mll/glue", "rte", None)
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConfigError) as caught:
        data.load(settings(name="rte"))
    problem, _ = caught.value.problems  # of both splits
    assert problem.startswith(
        "data.path: there is no folder nyu-mll/glue here, and it cannot be loaded from the hub ("
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
                "label": datasets.ClassLabel(names=data.GLUE["mnli"].labels),
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
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split, **__: sets[split])
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
