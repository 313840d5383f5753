"""Texts to write: what is read, what the loss counts, packing, scores."""

import json

import pytest
from transformers import BertTokenizerFast

from scaleup.data import generation as sequences
from scaleup.data.generation import collator, load, tokenize
from scaleup.data.metrics import IGNORED, score
from scaleup.errors import ConfigError
from scaleup.settings.data import DataSettings

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "</s>",
    "<s>",
    *"abcdefghij",
    "user",
    "assistant",
    ":",
]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    made = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"), eos_token="</s>", bos_token="<s>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def write(tmp_path):
    def to(rows: list[dict], name: str = "train.jsonl") -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return to


def pairs(*rows: tuple[str, str]) -> list[dict]:
    return [{"text": text, "target": target} for text, target in rows]


def settings(train: str, task: str = "causal_lm", **values) -> DataSettings:
    return DataSettings(train_file=train, task=task, **({"k": 1, "dev_size": 1} | values))


def words(tokenizer, ids) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens([i for i in ids if i != IGNORED]))


def test_the_loss_counts_the_completion_and_its_end_only(tokenizer, write):
    data = settings(write(pairs(("a b", "c d"), ("a b", "c d"))))
    row = tokenize(load(data), tokenizer, data).train[0]
    assert words(tokenizer, row["input_ids"]) == "<s> a b c d </s>"
    assert row["labels"][:3] == [IGNORED] * 3 and words(tokenizer, row["labels"]) == "c d </s>"


def test_the_prompt_is_made_by_the_template(tokenizer, write):
    rows = pairs(("a b", "c d"), ("a b", "c d"))
    data = settings(write(rows), prompt_template="g {text} h")
    row = tokenize(load(data), tokenizer, data).train[0]
    assert words(tokenizer, row["input_ids"]) == "<s> g a b h c d </s>"
    assert row["labels"][:5] == [IGNORED] * 5
    for wrong in ("g", "{text} {text}"):
        with pytest.raises(ValueError, match="should contain {text} once"):
            settings(write(rows), prompt_template=wrong)


def test_a_prompt_that_is_too_long_loses_its_beginning_not_its_completion(tokenizer, write):
    data = settings(
        write(pairs(("a b c d e f", "g h"), ("a", "b"))),
        max_length=5,
        k=2,
        dev_size=1,
        validation_file=write(pairs(("a", "b")), "dev.jsonl"),
    )
    rows = {
        words(tokenizer, row["input_ids"]): words(tokenizer, row["labels"])
        for row in tokenize(load(data), tokenizer, data).train
    }
    assert rows["e f g h </s>"] == "g h </s>"


def test_without_a_prompt_and_a_beginning_of_sequence_there_is_still_something_to_begin_with(
    tokenizer, write
):
    tokenizer.bos_token = None
    data = settings(write(pairs(("", "c d"), ("", "c d"))))
    encoded = tokenize(load(data), tokenizer, data)
    assert (
        words(tokenizer, encoded.train[0]["input_ids"]) == "</s> c d </s>"
        and words(tokenizer, encoded.train[0]["labels"]) == "c d </s>"
    )
    assert words(tokenizer, encoded.dev[0]["prompt"]) == "</s>"


def test_half_a_character_is_replaced(tokenizer, write):
    data = settings(write([{"text": "a\ud83d", "target": "b\ud83d"}] * 2))
    assert load(data).train[0] == {"text": "a\ufffd", "target": "b\ufffd"}
    chat = [{"role": "user", "content": "a\ud83d"}, {"role": "assistant", "content": "b"}]
    data = settings(write([{"messages": chat}] * 2, "chats.jsonl"), messages_column="messages")
    assert "\ufffd" in json.loads(load(data).train[0]["text"])[0]["content"]


def test_a_sampled_test_set_keeps_all_references_of_its_sources(write):
    rows = pairs(*((source, target) for source in "abcdefgh" for target in "xy"))
    test = write(rows, "test.jsonl")
    examples = load(settings(write(rows), "seq2seq", test_file=test, test_size=3))
    assert len(examples.test) == 3
    assert [examples.references[row] for row in examples.test["reference"]] == [["x", "y"]] * 3


def test_sources_of_dev_that_are_in_train_too_are_counted(write):
    rows = pairs(*((source, target) for source in "abcd" for target in "xyz"))
    assert load(settings(write(rows), "seq2seq", k=6, dev_size=6)).shared["dev", "train"] > 0
    assert (
        load(
            settings(
                write(rows), "seq2seq", k=6, validation_file=write(pairs(("e", "x")), "dev.jsonl")
            )
        ).shared["dev", "train"]
        == 0
    )


@pytest.mark.parametrize("train_on, counted", [("all", "b </s> d e </s>"), ("last", "d e </s>")])
def test_a_chat_is_written_by_the_tokenizers_template_and_its_answers_count(
    tokenizer, write, train_on, counted
):
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d e"},
    ]
    data = settings(write([{"messages": chat}] * 2), messages_column="messages", train_on=train_on)
    tokens = tokenize(load(data), tokenizer, data)
    row = tokens.train[0]
    assert words(tokenizer, row["input_ids"]) == (
        "user : a </s> assistant : b </s> user : c </s> assistant : d e </s>"
    )
    assert words(tokenizer, row["labels"]) == counted
    assert words(tokenizer, tokens.dev[0]["prompt"]).endswith("user : c </s> assistant :")


def test_a_long_chat_loses_its_beginning_with_its_labels(tokenizer, write):
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b c"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e f"},
    ]
    rows = [{"messages": chat}] * 2
    data = settings(write(rows), messages_column="messages", max_length=11)
    row = tokenize(load(data), tokenizer, data).train[0]
    assert words(tokenizer, row["input_ids"]) == "c </s> user : d </s> assistant : e f </s>"
    # No token predicts the first one, so that the loss would be divided by one token too many.
    assert row["labels"][0] == IGNORED and words(tokenizer, row["labels"]) == "</s> e f </s>"


@pytest.mark.parametrize(
    "chat, reason",
    [
        ("no json", "is not JSON"),
        ([{"role": "user", "content": "a"}], "ends with the assistant"),
        ([{"role": "assistant", "content": "a"}], "ends with the assistant"),
        (
            [{"role": "robot", "content": "a"}, {"role": "assistant", "content": "b"}],
            "list of {role, content}",
        ),
        ([{"role": "user"}, {"role": "assistant", "content": "b"}], "list of {role, content}"),
        (None, "is missing"),
    ],
)
def test_a_chat_of_another_shape_is_refused_with_its_row(write, chat, reason):
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ConfigError, match=reason) as error:
        load(
            settings(
                write(
                    [
                        {"m": json.dumps(good)},
                        {"m": chat if isinstance(chat, str | None) else json.dumps(chat)},
                    ]
                ),
                messages_column="m",
            )
        )
    assert "row 2 (line 2), column m" in str(error.value)


def test_missing_columns_and_cells_are_named(write):
    with pytest.raises(
        ConfigError,
        match="data.target_column: .* has no column 'target'; its columns are text, label",
    ):
        load(settings(write([{"text": "a", "label": "b"}])))
    with pytest.raises(ConfigError, match="row 1 .*column text: is missing") as error:
        load(settings(write(pairs((None, "b"), ("a", " ")))))
    assert any(
        "row 2 (line 2), column target: is empty" in problem for problem in error.value.problems
    )


def test_packed_rows_hold_whole_texts_and_positions_begin_anew(tokenizer, write):
    rows = pairs(("a", "b"), ("c d", "e"), ("f", "g h"), ("i", "j"))
    data = settings(
        write(rows), k=4, validation_file=write(rows, "dev.jsonl"), packing=True, max_length=10
    )
    plain = tokenize(load(data), tokenizer, data.model_copy(update={"packing": False})).train
    packed = tokenize(load(data), tokenizer, data).train
    assert (
        sum(packed["input_ids"], []) == sum(plain["input_ids"], [])
        and max(map(len, packed["input_ids"])) <= 10
        and len(packed) < len(plain)
    )
    starts = [i for row in packed["position_ids"] for i in row].count(0)
    assert starts == len(plain)
    for row in packed:
        assert all(
            label == IGNORED
            for label, position in zip(row["labels"], row["position_ids"])
            if position == 0
        )
    for multiple in (4, 8):
        rounded = collator(tokenizer, data, multiple)([dict(packed[0])])
        length = len(packed[0]["input_ids"])
        assert rounded["position_ids"].shape[1] == min(-(-length // multiple) * multiple, 10)
        assert (rounded["labels"][:, length:] == IGNORED).all()
    batch = collator(tokenizer, data)([dict(row) for row in packed])
    assert (
        "attention_mask" not in batch
        and batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape
    )


def test_prompts_are_padded_on_the_left_texts_on_the_right(tokenizer, write):
    rows = pairs(("a b c", "d"), ("e", "f"))
    data = settings(write(rows), k=2, validation_file=write(rows, "dev.jsonl"))
    batch = collator(tokenizer, data)(list(tokenize(load(data), tokenizer, data).dev))
    assert (
        batch["prompt_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
        and batch["attention_mask"].tolist()[1][-1] == 0
    )
    assert batch["reference"].tolist() == [0, 1]
    assert (batch["labels"] == IGNORED).sum() > (batch["attention_mask"] == 0).sum()


def test_a_source_is_scored_once_against_all_its_targets(write):
    dev = write(pairs(("a", "x"), ("b", "y"), ("a", "z")), "dev.jsonl")
    test = write(pairs(("c", "w"), ("a", "v")), "test.jsonl")
    found = load(
        settings(
            write(pairs(("a", "x"), ("a", "z"))),
            "seq2seq",
            k=2,
            validation_file=dev,
            test_file=test,
        )
    )
    assert (
        found.dev["text"][:] == ["a", "b"]
        and found.dev["reference"][:] == [0, 1]
        and found.test["reference"][:] == [2, 3]
    )
    assert found.references == [["x", "z"], ["y"], ["w"], ["v"]] and found.prompts == [
        "a",
        "b",
        "c",
        "a",
    ]
    assert len(found.train) == 2


def test_scores_are_those_of_the_libraries_and_of_plain_counting():
    written = ["the cat sat on the mat", "a dog barks"]
    perfect = score(written, [["x", "the cat sat on the mat"], ["a dog barks"]])
    assert (
        perfect["bleu"] == pytest.approx(1)
        and perfect["rouge_l"] == 1
        and perfect["exact_match"] == 1
    )
    half = score(["a b c d", "e f g h"], [["a b c d"], ["x y z w"]])
    assert (
        half["exact_match"] == 0.5
        and half["rouge_l"] == pytest.approx(0.5)
        and 0 < half["bleu"] < 1
    )
    assert half["rouge_1"] == pytest.approx(0.5)
    assert score(["", ""], [["a"], ["b"]])["bleu"] == 0


def test_a_tokenizer_without_end_or_template_is_refused(tokenizer, write):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data = settings(write([{"m": chat}] * 2), messages_column="m")
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        tokenize(load(data), tokenizer, data)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        tokenize(load(data), tokenizer, data)


def test_e2e_is_read_with_its_several_references(data_dir):
    folder = data_dir / "seq2seq" / "e2e_nlg"
    data = DataSettings(
        task="seq2seq",
        train_file=str(folder / "train.parquet"),
        test_file=str(folder / "validation.parquet"),
        text_column="document",
        target_column="summary",
        k=500,
        dev_size=100,
    )
    found = load(data)
    assert (
        len(found.train) == 500
        and len(found.test) == 630
        and sum(map(len, found.references[-630:])) == 4693
    )
    assert sequences.load(data) is found  # not read twice


@pytest.mark.parametrize("task", ["causal_lm", "seq2seq"])
def test_the_target_is_not_the_text(write, task):
    data = settings(write(pairs(("a", "b"), ("c", "d"))), task, target_column="text")
    with pytest.raises(ConfigError, match="data.target_column: text is the text column, too; the"):
        load(data)
