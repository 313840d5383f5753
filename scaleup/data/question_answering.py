"""Prepare data for extractive question answering: which part of a context answers a question.

A context that is longer than `max_length` allows becomes several windows that overlap by
`window_overlap` tokens. The model scores every token as the start and as the end of the answer. In
a window without the answer, both are at the first special token (index 0 if there is none).

The sets have the columns text (the question), text_pair (the context), answers and starts (of each
answer, in characters); a training example learns its first answer. Among tokens, a row is a window:
`example` is the row of its question, and `begins` and `ends` are the places of each token in the
context, in characters, or -1 outside of it.

Shapes: N windows, T tokens.
"""

import functools
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from transformers import EvalPrediction, PreTrainedTokenizerBase

from scaleup.data import prepared, sources
from scaleup.data.columns import as_list, replace_surrogates
from scaleup.data.examples import Examples
from scaleup.data.metrics import answer_scores
from scaleup.data.padding import EncoderCollator
from scaleup.data.pairs import separate_pairs
from scaleup.data.sets import Cell, Rows, SetReader, fast_tokenizer, number_scored, scored_rows
from scaleup.errors import ConfigError
from scaleup.settings.data import DataSettings
from scaleup.settings.data_rules import overlap_problems

TEXTS, STARTS = pa.list_(pa.string()), pa.list_(pa.int32())
ANSWERS = pa.struct({"text": TEXTS, "answer_start": STARTS})
CELLS = {"question": pa.string(), "context": pa.string(), "answers": ANSWERS}
TYPES = {"text": pa.string(), "text_pair": pa.string(), "answers": TEXTS, "starts": STARTS}
OUTPUTS = ("start_logits", "end_logits")  # of the model
ANSWER = '{"text": ["…"], "answer_start": [7]}'  # how a cell looks
OUTSIDE = -1  # place of a token that is not in the context

sources_of = sources.of_user  # the interface of a task's module: see scaleup.data.tasks


def _clean_answers(cell: Any) -> Cell:
    """Return {text, answer_start}, and the problem with the cell or None."""
    if isinstance(cell, str):
        cell, _ = as_list(f"[{cell}]")
        if cell is None or len(cell) != 1:
            return None, f"is not JSON such as {ANSWER}"
        cell = cell[0]
    if cell is None or cell != cell:
        return None, "is missing; a question without an answer has {text: [], answer_start: []}"
    if not isinstance(cell, dict) or not {"text", "answer_start"} <= cell.keys():
        return None, f"is not an object such as {ANSWER}"
    texts, starts = cell["text"], cell["answer_start"]
    if isinstance(texts, str):  # one answer instead of a list
        texts, starts = [texts], [starts]
    valid = isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)
    if not valid:
        return None, "has lists answer_start and text of different lengths"
    for text, start in zip(texts, starts):
        if not isinstance(text, str) or not text.strip():
            return None, f"the answer {text!r:.40} is not text"
        if type(start) is not int or start < 0:
            return None, f"the answer_start {start!r:.40} is not a place in the context"
    return {"text": list(map(replace_surrogates, texts)), "answer_start": starts}, None


def _clean_cell(cell: Any, role: str) -> Cell:
    if role == "answers":
        return _clean_answers(cell)
    if cell is None or cell != cell:
        return None, "is missing"
    if not isinstance(cell, str):
        return None, f"holds a {type(cell).__name__}, not text"
    return (replace_surrogates(cell), None) if cell.strip() else (None, "is empty")


def _check_row(row: dict[str, Any]) -> tuple[str, str] | None:
    """Return the problem of a row whose answers are not where they are said to be."""
    context, answers = row["context"], row["answers"]
    for text, start in zip(answers["text"], answers["answer_start"]):
        if context[start : start + len(text)] != text:
            found = f"the context has {context[start : start + len(text)]!r:.40} there"
            return "answers", f"the answer {text!r:.40} is not at answer_start {start}; {found}"
    return None


def _read(data: DataSettings, folder: pathlib.Path) -> dict[str, Any]:
    """Write the sets of a run into a folder. Return the other fields of `Examples`."""
    reader = SetReader(data, folder, CELLS)
    unanswerable = False
    for split, parts in sources.of_user(data).items():
        reader.read(split, parts, lambda table: _clean_cell, _check_row)
        if split == "train" and split in reader.counts:
            answered = [bool(a["text"]) for a in reader.training_cells("answers", True)]
            unanswerable = not all(answered)
            if not any(answered):
                place = f"the {len(answered)} examples to train on"
                reader.problems.append(f"data.answers_column: {place} have no answer at all")

    def encode(batch: Rows) -> Rows:
        return {
            "text": batch["question"],
            "text_pair": batch["context"],
            "answers": [cell["text"] for cell in batch["answers"]],
            "starts": [cell["answer_start"] for cell in batch["answers"]],
        }

    fields = reader.fields(reader.write(encode, TYPES), None)
    return fields | {"unanswerable": unanswerable}


def load(data: DataSettings) -> Examples:
    """Read the examples of a run and choose those to train and develop on.

    The ConfigError names every problem in the files.
    """
    return prepared.load(data, _read, sources_of(data))


def _cut(tokenizer: PreTrainedTokenizerBase, question: str, most: int) -> str:
    """Return the beginning of a question that has at most `most` tokens."""
    while True:
        encoded = tokenizer(
            question,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
        )
        if len(encoded["input_ids"]) <= most:
            return question
        # The shorter question may be tokenized differently, so this may need more than one step.
        question = question[: min(encoded["offset_mapping"][most][0], len(question) - 1)]


def _null(ids: list[int], special: int | None) -> int:
    """Return the token that is both start and end where a window has no answer."""
    return ids.index(special) if special in ids else 0


def _label(
    window: dict[str, Any], answers: list[str], starts: list[int], visible: tuple[int, int]
) -> list[int]:
    """Return the first and the last token of the first answer, or `null` twice if it is not whole.

    Args:
        window: the window.
        answers: texts of the answers.
        starts: their places in the context.
        visible: begin and end of what the tokens of all windows cover. Invisible characters around
            it belong to no window, and their absence does not cut an answer.
    """
    begins, ends, null = window["begins"], window["ends"], window["null"]
    if not answers:
        return [null, null]
    text = answers[0]
    start = max(starts[0] + len(text) - len(text.lstrip()), visible[0])
    end = min(starts[0] + len(text.rstrip()), visible[1])
    inside = [i for i, begin in enumerate(begins) if begin != OUTSIDE]
    if not inside or begins[inside[0]] > start or ends[inside[-1]] < end:
        return [null, null]
    tokens = [i for i in inside if ends[i] > start and begins[i] < end]
    return [tokens[0], tokens[-1]] if tokens else [null, null]


def tokenize(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, data: DataSettings
) -> Examples:
    """Replace texts by windows of tokens, with labels (first and last token) and length (tokens).

    A question is cut to half of a window.
    """
    fast_tokenizer(tokenizer, data)
    if problems := overlap_problems(data):  # the model may have reduced max_length
        raise ConfigError(problems)
    tokenizer = separate_pairs(tokenizer)
    special = tokenizer.num_special_tokens_to_add(True)
    room = data.max_length // 2 - special
    if room < 1:
        problem = f"{data.max_length} leaves no room for a question beside {special} special tokens"
        raise ConfigError(f"data.max_length: {problem}")

    def encode(batch: dict[str, list], rows: list[int], scored: bool) -> dict[str, list]:
        encoded = tokenizer(
            [_cut(tokenizer, question, room) for question in batch["text"]],
            batch["text_pair"],
            truncation="only_second",
            max_length=data.max_length,
            stride=data.resolved_overlap,
            split_special_tokens=True,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        owners, offsets = (
            encoded.pop(key) for key in ("overflow_to_sample_mapping", "offset_mapping")
        )
        columns: dict[str, list] = {key: list(values) for key, values in encoded.items()}
        columns |= {"labels": [], "length": []}
        columns |= {"example": [], "begins": [], "ends": [], "null": []} if scored else {}
        masks = [
            [part == 1 and begin < end for part, (begin, end) in zip(parts, places)]
            for parts, places in zip(map(encoded.sequence_ids, range(len(owners))), offsets)
        ]
        visible: dict[int, tuple[int, int]] = {}
        for owner, places, inside in zip(owners, offsets, masks):
            for begin, end in itertools.compress(places, inside):
                first, last = visible.get(owner, (begin, end))
                visible[owner] = min(first, begin), max(last, end)
        for number, (owner, places, inside) in enumerate(zip(owners, offsets, masks)):
            ids = columns["input_ids"][number]
            window = {
                "example": rows[owner],
                "begins": [b if i else OUTSIDE for i, (b, _) in zip(inside, places)],
                "ends": [e if i else OUTSIDE for i, (_, e) in zip(inside, places)],
                "null": _null(ids, tokenizer.cls_token_id),
                "length": len(ids),
            }
            answers, starts = batch["answers"][owner], batch["starts"][owner]
            window["labels"] = _label(window, answers, starts, visible.get(owner, (0, 0)))
            for name, values in columns.items():
                if name in window:
                    values.append(window[name])
        return columns

    def make(name: str, rows: datasets.Dataset, folder: pathlib.Path) -> None:
        path, count = folder / f"{name}.arrow", prepared.workers(data, len(rows))
        function = functools.partial(encode, scored=name != "train")
        options = {"remove_columns": rows.column_names, "with_indices": True}
        prepared.encode(function, rows, path, count, **options)

    return number_scored(prepared.tokens(examples, tokenizer, data, make), examples)


def collator(
    tokenizer: PreTrainedTokenizerBase, data: DataSettings, multiple: int = 1
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Return a function that pads windows to a batch of tensors [N, T]; labels are [N, 2]."""
    return EncoderCollator(tokenizer, data, multiple, label=None)


def loss(outputs: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean cross-entropy of the start and the end over the tokens of each window.

    The models of transformers include the padding in the softmax, so their loss of an example
    depends on the other examples of its batch.
    """
    padding_NT = batch["attention_mask"] == 0
    losses = [
        torch.nn.functional.cross_entropy(
            outputs[name].float().masked_fill(padding_NT, float("-inf")), labels_N
        )
        for name, labels_N in zip(OUTPUTS, batch["labels"].unbind(1))
    ]
    return torch.stack(losses).mean()


def _best_span(
    outputs: np.ndarray, begins: np.ndarray, longest: int
) -> tuple[float, int, int] | None:
    """Return the best sum of the outputs of a start and an end, and both tokens.

    Args:
        outputs: start and end of each token, [T, 2].
        begins: place of each token in the context, [T].
        longest: largest number of tokens of an answer.
    """
    (inside,) = np.nonzero(begins != OUTSIDE)
    if len(inside) == 0:
        return None
    start, end = outputs[inside].T
    sums = start[:, None] + end[None, :]
    later = np.arange(len(inside))[None, :] - np.arange(len(inside))[:, None]
    sums = np.where((later >= 0) & (later < longest), sums, -np.inf)
    first, last = divmod(int(sums.argmax()), len(inside))
    return float(sums[first, last]), int(inside[first]), int(inside[last])


def _longest_answer(examples: Examples) -> int:
    """Return the number of tokens of the longest answer in the training windows."""
    labels = np.array(examples.train["labels"][:])
    return int((labels[:, 1] - labels[:, 0]).max()) + 1


def _answers(
    examples: Examples, outputs: np.ndarray, numbers: np.ndarray
) -> tuple[datasets.Dataset, list[str]]:
    """Return the texts of a set, and the answer to each of its questions.

    An answer is the span with the highest sum in any window, among spans that are no longer than
    the longest answer of the training set. If the training set has questions without an answer, the
    answer is "" where the sum at the token for "no answer" is larger in every window. NaN counts as
    the lowest output.

    Args:
        outputs: start and end logits [N, T, 2].
        numbers: of the windows, [N].
    """
    tokens, texts, rows = scored_rows(examples, numbers)
    longest, columns = _longest_answer(examples), tokens[:]
    outputs = np.where(np.isnan(outputs), -np.inf, outputs)
    best = [(-np.inf, 0, 0)] * len(texts)  # sum, begin, end
    none = np.full(len(texts), np.inf)
    for position, row in enumerate(rows):
        begins = np.array(columns["begins"][row])
        of_window, example = outputs[position, : len(begins)], columns["example"][row]
        none[example] = min(none[example], of_window[columns["null"][row]].sum())
        span = _best_span(of_window, begins, longest)
        if span is not None and span[0] > best[example][0]:
            places = columns["begins"][row][span[1]], columns["ends"][row][span[2]]
            best[example] = (span[0], *places)
    return texts, [
        "" if examples.unanswerable and absent > total else context[begin:end].strip()
        for context, (total, begin, end), absent in zip(texts["text_pair"][:], best, none)
    ]


def compute_metrics(
    examples: Examples, tokenizer: PreTrainedTokenizerBase
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a function that computes SQuAD's exact match and F1 of answers, as shares of 1."""

    def score(prediction: EvalPrediction) -> dict[str, float]:
        numbers = np.asarray(prediction.label_ids).reshape(-1)
        texts, answers = _answers(examples, np.asarray(prediction.predictions), numbers)
        return answer_scores(answers, texts["answers"][:])

    return score


def lines(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, outputs: np.ndarray, numbers: np.ndarray
) -> list[dict[str, Any]]:
    """Return the lines of predictions.jsonl in the order of the set."""
    texts, answers = _answers(examples, outputs, numbers)
    return [
        {"question": row["text"], "context": row["text_pair"], "answer": answer}
        | {"references": row["answers"]}
        for row, answer in zip(texts, answers)
    ]
