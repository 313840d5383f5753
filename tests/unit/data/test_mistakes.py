"""Each mistake in a data file is reported as one plain sentence with its place."""

import os
import random

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scaleup.data import classification as data
from scaleup.data import tasks
from scaleup.errors import ConfigError
from scaleup.settings.schema import load as load_config
from tests.utils.examples import (
    ROWS,
    problems,
    settings,
    write,
    write_csv,
    write_jsonl,
    write_parquet,
)

GOOD_CSV = "text,label\ngood,a\nbad,b\n"

MISTAKES = {
    "missing column": (
        "t.csv",
        "text,label_id\nx,a\ny,b\n",
        "data.label_column: t.csv has no column 'label'; its columns are text, label_id; did "
        "you mean label_id",
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
        "data.train_file: t.txt has an unknown extension; use .csv, .tsv, .jsonl, .json "
        "(lines) or .parquet",
    ),
    "column twice": (
        "t.csv",
        "text,label,text\nx,a,y\n",
        "data.train_file: t.csv has the column text more than once",
    ),
    "too many fields": (
        "t.csv",
        "text,label\nx,a\nwell, well,b\n",
        "data.train_file: t.csv, line 3: 3 fields under a header of 2; a text with a comma or "
        "line break needs quotes",
    ),
    "too few fields": (
        "t.csv",
        'text,label\n"two\nlines",a\nx\n',
        "data.train_file: t.csv, line 4: 1 fields under a header of 2; a text with a comma or "
        "line break needs quotes",
    ),
    "tab in a TSV": (
        "t.tsv",
        "text\tlabel\nx\ta\ny\tz\tb\n",
        "data.train_file: t.tsv, line 3: 3 fields under a header of 2; no text may hold a tab",
    ),
    "open quote": (
        "t.csv",
        'text,label\nx,a\n"y,b\nz,b\n',
        "data.train_file: t.csv, line 3: not valid CSV (unexpected end of data); a quote "
        "inside a quoted field is doubled",
    ),
    "stray quote": (
        "t.csv",
        'text,label\n"a "b" c",a\n',
        "data.train_file: t.csv, line 2: not valid CSV (',' expected after '\"'); a quote "
        "inside a quoted field is doubled",
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
        "data.train_file: t.csv, row 1 (line 2), row 2 (line 3), row 3 (line 4) and 1 more, "
        "column label: is missing",
    ),
    "JSON syntax": (
        "t.jsonl",
        '{"text": "x", "label": "a"}\n{"text": "y" "label": "b"}\n',
        "data.train_file: t.jsonl, line 2: not one JSON object (Expecting ',' delimiter); write "
        "one object per line",
    ),
    "JSON array": (
        "t.json",
        '[{"text": "x", "label": "a"}]',
        "data.train_file: t.json, line 1: not one JSON object (it is a list); write one "
        "object per line",
    ),
    "two objects on a line": (
        "t.jsonl",
        '{"text": "x"} {"text": "y"}',
        "data.train_file: t.jsonl, line 1: not one JSON object (Extra data); write one "
        "object per line",
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
        "data.validation_file: dev.csv, row 2 (line 3), column label: the label 'neutral' is "
        "none of neg, pos",
        "data.test_file: test.csv, row 1 (line 2), column label: the label 'Pos' is none of "
        "neg, pos",
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
        "data.validation_file: v.parquet, row 2, column label: the label 'neutral' is none of "
        "neg, pos"
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
        '{"text": "x", "label": NaN}\n{"text": "y", "label": true}\n{"text": "z", "label": '
        "Infinity}\n",
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
        "data.label_column: v.csv has no column 'label'; its columns are body, lable; did you "
        "mean lable",
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
        train_file=write_csv("t.csv", scores), validation_file=write_csv("v.csv", scores[1:])
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
    assert tasks.check({}) == tasks.check({"data": settings()}) == []
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["data.train_file=nowhere.csv", "data.k=0"], checks=[tasks.check])
    assert len(caught.value.problems) == 1, "an invalid section is not checked further"
    with pytest.raises(ConfigError, match="data.train_file: nowhere.csv cannot be read"):
        load_config(None, ["data.train_file=nowhere.csv"], checks=[tasks.check])


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
