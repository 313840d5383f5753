"""Tokens and batches of classification and regression."""

import time

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from scaleup.data import classification as data
from scaleup.errors import ConfigError
from tests.utils.examples import own, settings, write_jsonl


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
    for multiple, length in ((4, 8), (10, 10), (16, 12)):  # never beyond max_length
        rounded = data.collator(tokenizer, fields, multiple)(rows)
        assert rounded["input_ids"].shape == (2, length)
        assert rounded["attention_mask"].sum() == short["attention_mask"].sum()


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
