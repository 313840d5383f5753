"""Tags of words, lists of labels and answers: tokens, labels, scores, and mistakes in files."""

import random
import re

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import EvalPrediction, PreTrainedTokenizerFast

from scaleup.data import multi_label, question_answering, token_classification
from scaleup.data.metrics import IGNORED, answer_scores
from tests.utils.examples import problems, settings, write, write_jsonl

TAGS = {"tokens": ["playing", "in", "Rome"], "tags": ["O", "O", "B-LOC"]}
LABELS = {"text": "a warm film", "labels": ["good", "short"]}
ANSWER = {
    "question": "who sings",
    "context": "they say Ann sings",
    "answers": {"text": ["Ann"], "answer_start": [9]},
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per pair of letters, [CLS] and [SEP]; it drops "~"."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'?!"
    pieces = [*letters, *(a + b for a in letters for b in letters)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *pieces, *("##" + piece for piece in pieces)]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(
        models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=99)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace("~", "")]
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **names)


def loaded(module, task: str, rows: list[dict], dev: list[dict] | None = None, **fields):
    """Return the examples of a task with own development rows, and their settings."""
    chosen = settings(
        task=task,
        train_file=write_jsonl("t.jsonl", rows),
        validation_file=write_jsonl("v.jsonl", dev or [*reversed(rows)]),
        **fields,
    )
    return module.load(chosen), chosen


def scores(module, tokens, outputs, rows=None) -> dict[str, float]:
    numbers = np.arange(len(tokens.dev)) if rows is None else rows
    given = EvalPrediction(predictions=outputs, label_ids=numbers)
    return module.compute_metrics(tokens, None)(given)


def test_a_tag_belongs_to_the_first_token_of_its_word(in_tmp, tokenizer):
    examples, chosen = loaded(token_classification, "token_classification", [TAGS, TAGS], [TAGS])
    assert examples.labels == ["O", "B-LOC", "I-LOC"]
    tokens = token_classification.tokenize(examples, tokenizer, chosen)
    row = tokens.dev[0]
    pieces = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert pieces == ["[CLS]", "pl", "##ay", "##in", "##g", "in", "ro", "##me", "[SEP]"]
    no = IGNORED
    assert row["labels"] == [no, 0, no, no, no, 0, 1, no, no] and row["words"] == [1, 5, 6]


def test_words_without_a_token_count_as_predicted_o(in_tmp, tokenizer):
    """The fourth word lies beyond max_length, and the second one has no visible character."""
    dev = {"tokens": ["ab", "~", "cd", "ef"], "tags": ["B-LOC", "O", "O", "B-LOC"]}
    examples, chosen = loaded(
        *(token_classification, "token_classification", [TAGS, dev], [dev]), max_length=4
    )
    tokens = token_classification.tokenize(examples, tokenizer, chosen)
    assert tokens.dev[0]["words"] == [1, -1, 2, -1]
    assert tokens.dev[0]["labels"] == [IGNORED, 1, 0, IGNORED]
    outputs = np.zeros((1, 4, 3))
    outputs[0, 1, 1] = outputs[0, 2, 0] = 9  # all that the model can see is right
    assert scores(token_classification, tokens, outputs) == pytest.approx(
        {"f1": 2 / 3, "precision": 1.0, "recall": 0.5, "accuracy": 0.75}
    )
    (line,) = token_classification.lines(tokens, tokenizer, outputs, np.array([0]))
    assert line == dev | {"tags": ["B-LOC", "O", "O", "O"], "references": dev["tags"]}


def test_a_text_without_any_token_has_a_label_nevertheless(in_tmp, tokenizer):
    dev = {"tokens": ["~", "~~"], "tags": ["B-LOC", "O"]}
    examples, chosen = loaded(token_classification, "token_classification", [TAGS, dev], [dev])
    content = tokenizer.backend_tokenizer.to_str()
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(content), pad_token="[PAD]")
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing("$A", "$A $B")
    row = token_classification.tokenize(examples, bare, chosen).dev[0]
    assert row["input_ids"] == [0] and row["labels"] == [1] and row["words"] == [0, -1]


def test_padding_of_tokens_has_no_label(in_tmp, tokenizer):
    rows = [TAGS, {"tokens": ["in"], "tags": ["O"]}]
    examples, chosen = loaded(token_classification, "token_classification", rows, rows)
    tokens = token_classification.tokenize(examples, tokenizer, chosen)
    batch = token_classification.collator(tokenizer, chosen)([tokens.dev[0], tokens.dev[1]])
    assert batch.keys() == {"input_ids", "attention_mask", "token_type_ids", "labels", "reference"}
    assert batch["labels"][1].tolist() == [IGNORED, 0] + [IGNORED] * 7
    assert batch["attention_mask"].sum(1).tolist() == [9, 3]


def test_the_scores_of_labels_equal_those_of_scikit_learn(in_tmp, tokenizer):
    draw = random.Random(0)
    names = ["bad", "good", "long", "short"]
    rows = [
        {"text": f"text {i}", "labels": [name for name in names if draw.random() < 0.4]}
        for i in range(40)
    ]
    rows[0]["labels"] = names
    examples, chosen = loaded(multi_label, "multi_label_classification", rows)
    tokens = multi_label.tokenize(examples, tokenizer, chosen)
    truth = np.array([[float(n in row["labels"]) for n in names] for row in reversed(rows)])
    assert np.array(tokens.dev["labels"][:]).tolist() == truth.tolist()
    outputs = np.random.default_rng(0).normal(size=truth.shape)
    outputs[:, 3] = -1  # never predicted
    order = np.random.default_rng(1).permutation(40)  # evaluation sorts by length
    found = scores(multi_label, tokens, outputs[order], order)
    guess = outputs > 0  # a probability of more than 0.5
    assert found == pytest.approx(
        {
            "f1": f1_score(truth, guess, average="micro"),
            "macro_f1": f1_score(truth, guess, average="macro", zero_division=0),
        }
    )
    lines = multi_label.lines(tokens, tokenizer, outputs[order], order)
    assert [line["text"] for line in lines] == [row["text"] for row in reversed(rows)]
    assert lines[7]["labels"] == [n for n, value in zip(names, outputs[7]) if value > 0]


def _context(draw: random.Random, words: int) -> str:
    return " ".join("".join(draw.choices("abcdefgh", k=draw.randint(1, 7))) for _ in range(words))


def _questions(count: int, words: int) -> list[dict]:
    draw = random.Random(1)
    rows = []
    for number in range(count):
        context = _context(draw, words)
        start, end = sorted(draw.sample(range(words), 2))
        end = min(end, start + 3)
        pieces = context.split()
        text = " ".join(pieces[start : end + 1])
        begin = len(" ".join(pieces[:start])) + (start > 0)
        answers = {"text": [text], "answer_start": [begin]}
        if number % 4 == 3:
            answers = {"text": [], "answer_start": []}
        rows.append({"question": f"is it {number}?", "context": context, "answers": answers})
    return rows


def test_every_answer_is_found_again_in_a_window_by_its_labels(in_tmp, tokenizer):
    rows = _questions(20, 40)
    examples, chosen = loaded(
        *(question_answering, "question_answering", rows, rows), max_length=48, window_overlap=20
    )
    tokens = question_answering.tokenize(examples, tokenizer, chosen)
    windows = tokens.dev[:]
    assert len(tokens.dev) > 2 * len(rows) and max(windows["length"]) == 48
    found: dict[int, set[str]] = {}
    for example, begins, ends, (first, last), null in zip(
        *(windows[name] for name in ("example", "begins", "ends", "labels", "null"))
    ):
        assert null == 0  # [CLS]
        if (first, last) != (0, 0):
            text = rows[example]["context"][begins[first] : ends[last]]
            found.setdefault(example, set()).add(text)
    expected = {i: set(row["answers"]["text"]) for i, row in enumerate(rows)}
    assert found == {i: texts for i, texts in expected.items() if texts}
    for example, row in enumerate(rows):  # windows overlap, and together they are the context
        parts = [i for i, owner in enumerate(windows["example"]) if owner == example]
        tokens_of = [[b for b in windows["begins"][i] if b >= 0] for i in parts]
        assert set(tokens_of[0][-20:]) == set(tokens_of[1][:20])
        assert set().union(*tokens_of) == _starts(tokenizer, row["context"])


def _starts(tokenizer, text: str) -> set[int]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return {begin for begin, _ in encoded["offset_mapping"]}


def test_answers_equal_a_plain_search_over_all_windows(in_tmp, tokenizer):
    rows = _questions(12, 40)
    examples, chosen = loaded(
        *(question_answering, "question_answering", rows, rows), max_length=48
    )
    assert examples.unanswerable
    tokens = question_answering.tokenize(examples, tokenizer, chosen)
    windows = tokens.dev[:]
    longest = 1 + max(last - first for first, last in tokens.train["labels"][:])
    outputs = np.random.default_rng(0).normal(size=(len(tokens.dev), 48, 2))
    outputs[:, 0] += 2.8  # so that some have no answer
    expected = []
    for example, row in enumerate(rows):
        best, text, none = -np.inf, "", np.inf
        for i in (i for i, owner in enumerate(windows["example"]) if owner == example):
            begins, ends = windows["begins"][i], windows["ends"][i]
            none = min(none, outputs[i, 0, 0] + outputs[i, 0, 1])
            for first in range(len(begins)):
                for last in range(first, min(first + longest, len(begins))):
                    total = outputs[i, first, 0] + outputs[i, last, 1]
                    if begins[first] >= 0 and begins[last] >= 0 and total > best:
                        best, text = total, row["context"][begins[first] : ends[last]]
        expected.append("" if none > best else text)
    assert 0 < expected.count("") < len(rows)
    order = np.random.default_rng(1).permutation(len(tokens.dev))
    lines = question_answering.lines(tokens, tokenizer, outputs[order], order)
    assert [line["answer"] for line in lines] == expected
    references = [row["answers"]["text"] for row in rows]
    found = scores(question_answering, tokens, outputs[order], order)
    assert found == answer_scores(expected, references)


def test_answers_are_compared_as_in_squad():
    """By hand: articles, punctuation and case do not count; words count as often as they occur."""
    given = ["The  Cat!", "a big cat", "", "dog", "no no"]
    references = [["cat"], ["cat", "big dog"], [], ["", "the"], ["no"]]
    found = answer_scores(given, references)
    assert found["exact_match"] == pytest.approx((1 + 0 + 1 + 0 + 0) / 5)
    assert found["f1"] == pytest.approx((1 + 2 / 3 + 1 + 0 + 2 / 3) / 5)


@pytest.mark.parametrize(
    "words, answer", [(3, "~ann"), (40, "~ann"), (3, "sings~"), (40, "sings~")]
)
def test_an_answer_with_an_invisible_end_at_an_end_of_the_context_is_learned(
    in_tmp, tokenizer, words, answer
):
    context = " ".join(["~ann", *["so"] * words, "sings~"])
    answers = {"text": [answer], "answer_start": [context.index(answer)]}
    rows = [ANSWER | {"context": context, "answers": answers}] * 2
    examples, chosen = loaded(
        *(question_answering, "question_answering", rows, [ANSWER]), max_length=24
    )
    tokens = question_answering.tokenize(examples, tokenizer, chosen)
    found = {
        tokenizer.decode(row["input_ids"][first : last + 1]).replace(" ##", "")
        for row in tokens.train
        for first, last in [row["labels"]]
    }
    assert found == {answer.strip("~")} | ({"[CLS]"} if words > 9 else set())


def test_a_question_is_cut_to_half_of_a_window(in_tmp, tokenizer):
    rows = [ANSWER, ANSWER | {"question": "why " * 50}]
    examples, chosen = loaded(question_answering, "question_answering", rows, rows, max_length=24)
    tokens = question_answering.tokenize(examples, tokenizer, chosen)
    cut = [r for r in tokens.dev if r["example"] == 1]
    assert all(row["length"] <= 24 for row in tokens.dev) and cut
    assert tokenizer.decode(cut[0]["input_ids"]).startswith("[CLS] " + "wh ##y " * 4 + "wh [SEP]")


def test_nan_predicts_nothing(in_tmp, tokenizer):
    rows = [ANSWER, ANSWER | {"question": "who"}]
    examples, chosen = loaded(question_answering, "question_answering", rows, rows)
    tokens = question_answering.tokenize(examples, tokenizer, chosen)
    outputs = np.full((2, 24, 2), np.nan)
    assert scores(question_answering, tokens, outputs) == {"f1": 0.0, "exact_match": 0.0}
    examples, chosen = loaded(token_classification, "token_classification", [TAGS, TAGS], [TAGS])
    tokens = token_classification.tokenize(examples, tokenizer, chosen)
    assert scores(token_classification, tokens, np.full((1, 9, 3), np.nan))["accuracy"] == 2 / 3


MISTAKES = {
    "tokens: not a list": (
        TAGS | {"tokens": {"a": 1}},
        "row 2 (line 2), column tokens: holds a dict, not a list",
    ),
    "tokens: a number": (
        TAGS | {"tokens": ["a", 3, "b"]},
        "row 2 (line 2), column tokens: word 2 is 3, not text",
    ),
    "tokens: empty": (TAGS | {"tokens": []}, "row 2 (line 2), column tokens: is an empty list"),
    "tags: too few": (
        TAGS | {"tags": ["O"]},
        "row 2 (line 2), column tags: has 1 tags for 3 words",
    ),
    "tags: missing": ({"tokens": ["a"]}, "row 2 (line 2), column tags: is missing"),
    "tags: another scheme": (
        TAGS | {"tags": ["O", "S-LOC", "O"]},
        "column tags: 'S-LOC' is not a tag of the IOB2 scheme (O, B-<type> or I-<type>)",
    ),
    "tags: IOB1": (
        TAGS | {"tags": ["O", "I-LOC", "I-LOC"]},
        "column tags: 'I-LOC' follows 'O'; an entity begins with 'B-LOC'",
    ),
    "labels: not a name": (
        LABELS | {"labels": ["good", None]},
        "row 2 (line 2), column labels: None is not the name of a label",
    ),
    "labels: a text": (
        LABELS | {"labels": "good"},
        "row 2 (line 2), column labels: is not a list in JSON",
    ),
    "labels: twice": (
        LABELS | {"labels": ["good", "good"]},
        "row 2 (line 2), column labels: names 'good' twice",
    ),
    "labels: by position": (
        LABELS | {"labels": [0, 1, 0]},
        "row 2 (line 2), column labels: names '0' twice; list the names of the labels",
    ),
    "labels: spellings": (
        LABELS | {"labels": ["true", "True"]},
        "data.labels_column: one class has several spellings (True, true); write it in one way",
    ),
    "answers: elsewhere": (
        ANSWER | {"answers": {"text": ["Ann"], "answer_start": [8]}},
        "row 2 (line 2), column answers: the answer 'Ann' is not at answer_start 8; the context "
        "has ' An' there",
    ),
    "answers: not as many": (
        ANSWER | {"answers": {"text": ["Ann"], "answer_start": []}},
        "row 2 (line 2), column answers: has lists answer_start and text of different lengths",
    ),
    "answers: missing": (
        {k: v for k, v in ANSWER.items() if k != "answers"},
        "row 2 (line 2), column answers: is missing; a question without an answer has {text: [], "
        "answer_start: []}",
    ),
    "answers: no object": (
        ANSWER | {"answers": ["Ann"]},
        "row 2 (line 2), column answers: is not an object such as "
        '{"text": ["…"], "answer_start": [7]}',
    ),
    "answers: a word": (
        ANSWER | {"answers": "Ann"},
        'row 2 (line 2), column answers: is not JSON such as {"text": ["…"], "answer_start": [7]}',
    ),
    "answers: empty context": (
        ANSWER | {"context": " "},
        "row 2 (line 2), column context: is empty",
    ),
}
TASK = {
    "tokens": ("token_classification", TAGS),
    "tags": ("token_classification", TAGS),
    "labels": ("multi_label_classification", LABELS),
    "answers": ("question_answering", ANSWER),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_with_file_and_row(in_tmp, name):
    row, expected = MISTAKES[name]
    task, good = TASK[name.partition(":")[0]]
    rows = [good, row, good]
    (problem,) = problems(task=task, train_file=write_jsonl("t.jsonl", rows), dev_size=1)
    assert problem.endswith(expected), problem
    assert problem.startswith(("data.train_file: t.jsonl, ", "data.labels_column: "))


@pytest.mark.parametrize(
    "task, rows, unknown, expected",
    [
        (
            "token_classification",
            TAGS,
            TAGS | {"tags": ["O", "O", "B-PER"]},
            "v.jsonl, row 1 (line 1), column tags: the tag 'B-PER' is none of B-LOC, I-LOC, O",
        ),
        (
            "multi_label_classification",
            LABELS,
            LABELS | {"labels": ["funny"]},
            "v.jsonl, row 1 (line 1), column labels: the label 'funny' is none of good, short",
        ),
    ],
)
def test_what_the_training_set_does_not_have_is_refused(in_tmp, task, rows, unknown, expected):
    files = {
        "train_file": write_jsonl("t.jsonl", [rows, rows]),
        "validation_file": write_jsonl("v.jsonl", [unknown]),
    }
    assert problems(task=task, **files) == [f"data.validation_file: {expected}"]


@pytest.mark.parametrize(
    "task, row, expected",
    [
        ("token_classification", TAGS | {"tags": ["O"] * 3}, "have no entity, only O"),
        ("multi_label_classification", LABELS | {"labels": []}, "have no label at all"),
        (
            "question_answering",
            ANSWER | {"answers": {"text": [], "answer_start": []}},
            "have no answer at all",
        ),
    ],
)
def test_nothing_to_learn_is_refused(in_tmp, task, row, expected):
    file = write_jsonl("t.jsonl", [row] * 3)
    (problem,) = problems(task=task, train_file=file, dev_size=1)
    assert problem.endswith(f"the 2 examples to train on {expected}")


def test_lists_in_csv_are_json(in_tmp):
    rows = ["text,labels", 'a,"[""x"", ""y""]"', "b,[]", 'c,"[""x""]"']
    file = write("t.csv", "\n".join(rows) + "\n")
    chosen = settings(task="multi_label_classification", train_file=file, dev_size=1)
    examples = multi_label.load(chosen)
    assert examples.labels == ["x", "y"] and len(examples.train) == 2


def test_other_columns_and_a_row_of_sources_can_be_named(in_tmp):
    one = write_jsonl("one.jsonl", [{"words": ["a", "b"], "ner": ["B-X", "I-X"]}] * 2)
    two = write_jsonl("two.jsonl", [{"w": ["c"], "ner": ["O"]}] * 2)
    chosen = settings(
        task="token_classification",
        sources=[{"file": one}, {"file": two, "tokens_column": "w"}],
        tokens_column="words",
        tags_column="ner",
        dev_size=1,
    )
    examples = token_classification.load(chosen)
    assert examples.labels == ["O", "B-X", "I-X"] and len(examples.train) == 3


def test_a_batch_of_windows_has_starts_and_ends(in_tmp, tokenizer):
    rows = [ANSWER, ANSWER | {"question": "who is it that sings"}]
    examples, chosen = loaded(question_answering, "question_answering", rows, rows)
    tokens = question_answering.tokenize(examples, tokenizer, chosen)
    batch = question_answering.collator(tokenizer, chosen)([tokens.dev[0], tokens.dev[1]])
    for row, (first, last) in enumerate(batch["labels"].tolist()):
        text = tokenizer.decode(batch["input_ids"][row, first : last + 1])
        assert re.sub("[ #]", "", text) == "ann"
    assert batch["token_type_ids"].max() == 1 and batch["input_ids"].dtype == torch.long


def test_the_loss_of_a_window_does_not_depend_on_its_padding():
    draw = torch.Generator().manual_seed(0)
    logits = {name: torch.randn(2, 6, generator=draw) for name in ("start_logits", "end_logits")}
    labels, mask = torch.tensor([[1, 2], [0, 3]]), torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    found = question_answering.loss(logits, {"attention_mask": mask, "labels": labels})
    plain = []
    for row, length in ((0, 6), (1, 4)):
        for name, column in (("start_logits", 0), ("end_logits", 1)):
            log_shares = logits[name][row, :length].log_softmax(0)
            plain.append(-log_shares[labels[row, column]])
    assert found.item() == pytest.approx(torch.stack(plain).mean().item(), abs=1e-6)
