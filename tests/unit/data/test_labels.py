"""Labels of a classification that are one class in different spellings, or missing values."""

import json

import pytest

from tests.utils.examples import problems, write, write_csv, write_jsonl, write_parquet

DEV = [("x", "0")]


def _csv_problems(*labels: str) -> list[str]:
    train = write_csv("t.csv", [(f"t{i}", label) for i, label in enumerate(labels)])
    return problems(train_file=train, dev_size=1)


@pytest.mark.parametrize(
    "labels",
    [
        ("1", "1.0"),
        ("1", "True"),
        ("1", "01"),
        ("1", "+1"),
        ("1", "1e0"),
        ("1.5", "1.50"),
        ("0", "-0"),
        ("0", "False"),
        ("0", "0.0"),
        ("True", "TRUE"),
        ("False", "false"),
        ("Yes", "yes"),
        ("caf\u00e9", "cafe\u0301"),
        ("1", "\uff11"),  # full width
        ("1", "1\u200b"),  # an invisible space
        ("1", "\ufeff1"),  # a byte order mark
        ("-1", "\u22121"),  # a typographic minus
        ("fit", "\ufb01t"),  # a ligature
        ("a b", "a\u00a0b"),
    ],
)
def test_one_class_in_two_spellings_is_refused_with_its_rows(in_tmp, labels):
    one, other = labels
    found = _csv_problems(one, "2", other, "3", "2", "3", "2", "3")
    assert found == [
        "data.train_file: t.csv, column label: one class has several spellings; write it in one "
        f"way ({one} in row 1 (line 2); {other} in row 3 (line 4))"
    ]


def test_every_spelling_of_a_class_is_named_with_at_most_three_rows(in_tmp):
    found = _csv_problems(*["1"] * 5, "1.0", "True", *["0"] * 4, "0.0")
    assert found == [
        "data.train_file: t.csv, column label: one class has several spellings; write it in one "
        "way (1 in row 1 (line 2), row 2 (line 3), row 3 (line 4) and 2 more; 1.0 in row 6 "
        "(line 7); True in row 7 (line 8))",
        "data.train_file: t.csv, column label: one class has several spellings; write it in one "
        "way (0 in row 8 (line 9), row 9 (line 10), row 10 (line 11) and 1 more; 0.0 in row 12 "
        "(line 13))",
    ]


@pytest.mark.parametrize("word", ["nan", "NaN", "NAN", "-nan", "<NA>", "#N/A", "NaT", "\\N"])
@pytest.mark.parametrize("others", [("0", "1"), ("pos", "neg")])
def test_a_word_for_a_missing_value_is_no_class(in_tmp, word, others):
    one, other = others
    assert _csv_problems(one, other, word, one, other) == [
        f"data.train_file: t.csv, row 3 (line 4), column label: {word!r} stands for a missing "
        "value; leave the row out"
    ]


@pytest.mark.parametrize("word", ["None", "none", "NULL", "NA", "n/a", "?"])
def test_none_is_a_class_among_words_but_not_among_numbers(in_tmp, word):
    assert _csv_problems("pos", "neg", word, "pos", "neg") == []
    found = _csv_problems("0", "1", word, "0", "1")
    assert found == [
        f"data.train_file: t.csv, row 3 (line 4), column label: {word!r} among numbers stands for "
        "a missing value; leave the rows out, or name the class otherwise"
    ]


@pytest.mark.parametrize(
    "labels",
    [
        ("0", "1", "2"),
        ("0.0", "1.0", "2.0"),
        ("True", "False"),
        ("TRUE", "FALSE"),
        ("yes", "no"),
        ("Pos", "pos", "neg"),  # letters may be classes: A and a
        ("none", "some"),
        ("1", "2", "many"),
        ("1", "1.5", "2"),
        ("123456789012345678901", "123456789012345678902"),
        ("1e99999999999999999999", "2"),
    ],
)
def test_labels_in_one_spelling_are_classes(in_tmp, labels):
    assert _csv_problems(*labels * 4) == []


@pytest.mark.parametrize(
    ("labels", "places"),
    [
        ([1, "1"], '1 in row 1 (line 1); "1" in row 2 (line 2)'),
        ([1, 1.0], "1 in row 1 (line 1); 1.0 in row 2 (line 2)"),
        ([1, True], "1 in row 1 (line 1); true in row 2 (line 2)"),
        (["1", True], '"1" in row 1 (line 1); true in row 2 (line 2)'),
        (["True", True], '"True" in row 1 (line 1); true in row 2 (line 2)'),
    ],
)
def test_values_of_different_types_in_json_are_different_spellings(in_tmp, labels, places):
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate([*labels, 2, 3, 2, 3])]
    assert problems(train_file=write_jsonl("t.jsonl", rows), dev_size=1) == [
        "data.train_file: t.jsonl, column label: one class has several spellings; write it in "
        f"one way ({places})"
    ]


def test_spaces_around_a_label_are_no_other_spelling(in_tmp):
    write("t.csv", "text,label\n" + "".join(f"t{i},{' a' if i % 2 else 'a '}\n" for i in range(4)))
    assert not any("spellings" in problem for problem in problems(train_file="t.csv", dev_size=1))


def test_a_column_of_floats_in_parquet_is_one_spelling(in_tmp):
    write_parquet("t.parquet", {"text": list("abcd"), "label": [0.0, 1.0, 0.0, 1.0]})
    assert problems(train_file="t.parquet", dev_size=1) == []


def test_other_spellings_in_development_are_refused_too(in_tmp):
    train = write_csv("t.csv", [("a", "0"), ("b", "1"), ("c", "0")])
    dev = write_csv("d.csv", [("x", "1.0"), ("y", "nan"), ("z", "True")])
    assert problems(train_file=train, validation_file=dev) == [
        "data.validation_file: d.csv, row 1 (line 2), column label: the label '1.0' is none of "
        "0, 1",
        "data.validation_file: d.csv, row 2 (line 3), column label: 'nan' stands for a missing "
        "value; leave the row out",
        "data.validation_file: d.csv, row 3 (line 4), column label: the label 'True' is none of "
        "0, 1",
    ]


def test_a_regression_takes_every_spelling_of_a_number(in_tmp):
    train = write_csv("t.csv", [("a", "1"), ("b", "1.0"), ("c", "2"), ("d", "01")])
    assert problems(train_file=train, dev_size=1, task="regression") == []


def test_json_is_written_as_json_in_the_message(in_tmp):
    rows = [{"text": "a", "label": "é"}, {"text": "b", "label": "e\u0301"}]
    (found,) = problems(train_file=write_jsonl("t.jsonl", rows * 2), dev_size=1)
    assert json.dumps("é") in found
