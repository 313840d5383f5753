"""Unusual characters survive every file format."""

import json
import random

import pytest

from scaleup.data import classification as data
from tests.utils.examples import problems, quoted, settings, write, write_jsonl, write_parquet

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
    assert problems(train_file=name, dev_size=2) == []
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
