"""Files that are given twice under different names, and rows that several sets share."""

import os
import shutil

import pytest

from scaleup.data import classification, generation, tasks
from scaleup.training.console import _shared_line as shared_line
from tests.utils.examples import ROWS, problems, settings, write_csv, write_jsonl


class _Run:
    """The part of a run's settings that the note reads."""

    def __init__(self, data):
        self.data = data


@pytest.fixture
def train(in_tmp):
    return write_csv("train.csv")


def _copy(train: str, how: str) -> str:
    if how == "the file itself":
        return train
    if how == "another path":
        return os.path.join("..", os.path.basename(os.getcwd()), train)
    {"a copy": shutil.copy, "a symlink": os.symlink, "a hard link": os.link}[how](train, "c.csv")
    return "c.csv"


@pytest.mark.parametrize(
    "how", ["the file itself", "another path", "a copy", "a symlink", "a hard link"]
)
@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("kind", ["classification", "causal_lm"])
def test_the_training_file_is_no_other_split(train, how, split, kind):
    file = _copy(train, how)
    fields = {f"{split}_file": file, "dev_size": 2} if split == "test" else {f"{split}_file": file}
    if kind == "causal_lm":
        fields |= {"task": kind, "target_column": "label"}
    assert problems(train_file=train, **fields) == [
        f"data.{split}_file: {file} has the same content as train.csv, which is trained on; give "
        "other examples, or leave it out"
    ]


def test_the_development_file_is_no_test_file(train):
    write_csv("dev.csv", ROWS[:2])
    shutil.copy("dev.csv", "test.csv")
    assert problems(train_file=train, validation_file="dev.csv", test_file="test.csv") == [
        "data.test_file: test.csv has the same content as dev.csv, which picks the best "
        "checkpoint; give other examples, or leave it out"
    ]


def test_three_times_the_same_file_is_one_problem(train):
    (problem,) = problems(train_file=train, validation_file=train, test_file=train)
    assert problem.startswith("data.validation_file: ")


def test_identical_files_are_reported_with_the_other_problems(train):
    found = problems(train_file=train, validation_file=train, label_column="lable")
    assert len(found) == 3 and found[-1].startswith("data.validation_file: train.csv has the same")


def test_files_that_differ_in_one_letter_are_no_copies(train):
    write_csv("dev.csv", [*ROWS[:-1], ("poor movi", "neg")])
    assert os.path.getsize("dev.csv") != 0
    assert problems(train_file=train, validation_file="dev.csv") == []


def test_glue_files_of_ones_own_are_checked_too(glue, in_tmp):
    os.mkdir("rte")
    for split in ("train", "validation"):
        shutil.copy(os.path.join(glue, "rte", "validation.parquet"), f"rte/{split}.parquet")
    found = problems(name="rte", path=".", k=50, dev_size=50)
    assert found == [
        "data.path: ./rte/validation.parquet has the same content as ./rte/train.parquet, which "
        "is trained on; give other examples, or leave it out"
    ]


def test_rows_that_sets_share_are_counted_and_noted(in_tmp):
    train = write_csv("t.csv")
    dev = write_csv("d.csv", [*ROWS[:2], ("new film", "pos")])
    test = write_csv("s.csv", [*ROWS[:4], ("new film", "neg")])
    data = settings(train_file=train, validation_file=dev, test_file=test)
    examples = classification.load(data)
    assert examples.shared == {("dev", "train"): 2, ("test", "train"): 4, ("test", "dev"): 3}
    assert shared_line(_Run(data), examples) == (
        "note: 2 of 3 dev rows have texts that are in train too, 4 of 5 test rows have texts that "
        "are in train too, 3 of 5 test rows have texts that are in dev too"
    )


def test_a_pair_is_shared_only_as_a_whole(in_tmp):
    header = ("text", "pair", "label")
    train = write_csv("t.csv", [("a", "b", 0), ("c", "d", 1)], header)
    dev = write_csv("d.csv", [("a", "d", 0), ("c", "d", 1)], header)
    data = settings(train_file=train, validation_file=dev, text_pair_column="pair")
    assert classification.load(data).shared == {("dev", "train"): 1}


def test_sets_that_share_nothing_need_no_note(in_tmp):
    data = settings(train_file=write_csv("t.csv"), dev_size=2)
    assert shared_line(_Run(data), classification.load(data)) is None


def test_a_development_set_cut_from_training_can_share_texts(in_tmp):
    rows = [{"text": "a", "target": str(i)} for i in range(6)]
    data = settings(
        train_file=write_jsonl("t.jsonl", rows), task="seq2seq", dev_size=2, metric="loss"
    )
    note = shared_line(_Run(data), generation.load(data))
    assert note == (
        "note: 1 of 1 dev rows have texts that are in train too; give data.validation_file to "
        "keep dev apart"
    )


def test_a_pipe_in_place_of_data_is_refused_at_once(in_tmp):
    os.mkfifo("t.csv")
    expected = "t.csv cannot be read: it is a pipe, a socket or a device, not a file"
    assert problems(train_file="t.csv", dev_size=2) == [f"data.train_file: {expected}"]
    os.mkfifo("t.parquet")
    found = tasks.check({"data": settings(train_file=write_csv("x.csv"), test_file="t.parquet")})
    assert "data.test_file: t.parquet cannot be read: it is a pipe" in found[-1]
