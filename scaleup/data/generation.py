"""Examples of text to write: a target for a source (seq2seq), or a completion of a prompt or a chat (causal_lm).

FusedQKVLayout come from your own files. The loss counts the target's tokens only. Development and test sets are scored by writing an
answer for every different source and comparing it with all targets that the set has for it.

Shapes of a batch: B examples, T tokens.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import sacrebleu
import torch
from jinja2 import TemplateError
from rouge_score.rouge_scorer import RougeScorer
from transformers import EvalPrediction, PreTrainedTokenizerBase

from scaleup.data.files import (
    Examples,
    cut,
    judge_cells,
    no_column,
    own_files,
    read_columns,
    same_state,
    whole_characters,
)
from scaleup.errors import ConfigError
from scaleup.settings.schema import DataSettings, Section

IGNORED = -100  # a label that the loss leaves out
ROLES = ("system", "user", "assistant", "tool")


def _cell(value: Any, role: str) -> tuple[str | None, str | None]:
    """A text, or a chat (role messages) as JSON; or what is wrong with it."""
    if value is None or value != value:
        return None, "is missing"
    if role != "messages" and not isinstance(value, str | int | float):
        return None, f"holds a {type(value).__name__}, not text"
    if role != "messages":
        nothing = role == "target" and not str(value).strip()
        return whole_characters(
            str(value)
        ), "is empty; there would be nothing to learn" if nothing else None
    try:
        turns = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return None, "is not JSON"
    right = (
        isinstance(turns, list)
        and turns
        and all(
            isinstance(turn, dict)
            and turn.get("role") in ROLES
            and isinstance(turn.get("content"), str)
            for turn in turns
        )
    )
    if not right or turns[-1]["role"] != "assistant" or len(turns) < 2:
        return None, "is not a list of {role, content} that ends with the assistant"
    return json.dumps(
        [turn | {"content": whole_characters(turn["content"])} for turn in turns]
    ), None


def _clean(key: str, file: str, parsed: tuple, data: DataSettings) -> list[tuple[str, str]]:
    """(source, target) of every row; of a chat the turns before the last as JSON, and the last. Raises ConfigError with all bad cells."""
    columns, lines, _, _ = parsed
    names = (
        {"messages": data.messages_column}
        if data.messages_column
        else {"text": data.text_column, "target": data.target_column}
    )
    if missing := [
        no_column(f"data.{role}_column", file, name, columns)
        for role, name in names.items()
        if name not in columns
    ]:
        raise ConfigError(missing)
    found, problems = {}, []
    for role, name in names.items():
        found[role], bad = judge_cells(
            columns, name, lines, f"{key}: {file}", functools.partial(_cell, role=role)
        )
        problems += bad
    if problems or not next(iter(found.values())):
        raise ConfigError(problems or f"{key}: {file} has no rows")
    if data.messages_column:
        chats = map(json.loads, found["messages"])
        return [(json.dumps(turns[:-1]), turns[-1]["content"]) for turns in chats]
    return list(zip(found["text"], found["target"]))


def _by_source(rows: list[tuple[str, str]]) -> dict[str, list[str]]:
    """source → all its targets, in order."""
    found: dict[str, list[str]] = {}
    for source, target in rows:
        found.setdefault(source, []).append(target)
    return found


def _scored(groups: dict[str, list[str]], first: int) -> datasets.Dataset:
    """One row for each source, with the number of its references; `first`: of the first row."""
    rows = range(first, first + len(groups))
    return datasets.Dataset.from_dict(
        {
            "text": list(groups),
            "target": [targets[0] for targets in groups.values()],
            "reference": list(rows),
        }
    )


@functools.lru_cache(maxsize=1)  # load finds what check has read
def _load(settings: str, _state: tuple) -> Examples:
    data, parts, sources, problems = DataSettings.model_validate_json(settings), {}, [], []
    for split, (key, file) in own_files(data).items():
        try:
            parsed = read_columns(key, file)
            parts[split] = _clean(key, file, parsed, data)
            sources.append({"split": split, "rows": len(parts[split]), **parsed[3]})
            if split == "train":
                train, dev = cut(data, len(parts[split]), file)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    rows = parts["train"]
    chosen = [rows[row] for row in train]
    dev_groups = _by_source([rows[row] for row in dev] if dev else parts["validation"])
    test_groups = _by_source(parts.get("test", []))
    return Examples(
        train=datasets.Dataset.from_dict(
            {"text": [source for source, _ in chosen], "target": [target for _, target in chosen]}
        ),
        dev=_scored(dev_groups, 0),
        test=_scored(test_groups, len(dev_groups)) if test_groups else None,
        labels=None,
        metric=data.metric or ("bleu" if data.task == "seq2seq" else "loss"),
        task=data.task,
        test_is_dev=False,
        sources=sources,
        references=[*dev_groups.values(), *test_groups.values()],
        prompts=[*dev_groups, *test_groups],
        known=len(dev_groups.keys() & {source for source, _ in chosen}),
    )


def load(data: DataSettings) -> Examples:
    """`k` rows of the training file shuffled by `seed`, the next `dev_size` for development unless there is a validation file.

    Raises ConfigError with all problems found.
    """
    return _load(data.model_dump_json(), same_state(file for _, file in own_files(data).values()))


def check(sections: dict[str, Section]) -> list[str]:
    """What is wrong with the data that a config names: one sentence per problem."""
    data = sections.get("data")
    try:
        if isinstance(data, DataSettings) and data.train_file is not None:
            load(data)
    except ConfigError as error:
        return error.problems
    return []


def _texts(
    tokenizer: PreTrainedTokenizerBase, data: DataSettings, source: str, target: str
) -> tuple[list[int], list[int]]:
    """Tokens of the prompt and of its completion."""
    if not data.messages_column:
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        plain = functools.partial(tokenizer, add_special_tokens=False, split_special_tokens=True)
        return begin + plain(source)["input_ids"], plain(target)["input_ids"] + [
            tokenizer.eos_token_id
        ]
    turns = [*json.loads(source), {"role": "assistant", "content": target}]
    try:
        prompt = tokenizer.apply_chat_template(
            turns[:-1], add_generation_prompt=True, return_dict=False
        )
        whole = tokenizer.apply_chat_template(turns, return_dict=False)
    except (ValueError, TemplateError) as error:
        raise ConfigError(
            f"data.messages_column: the tokenizer's chat template refuses a chat: {' '.join(str(error).split())[:200]}"
        ) from None
    if whole[: len(prompt)] != prompt:
        raise ConfigError(
            "data.messages_column: with this tokenizer's chat template a chat does not begin with its prompt, so the answer cannot be told from it"
        )
    return prompt, whole[len(prompt) :]


def _encode_pairs(
    batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, data: DataSettings
) -> dict[str, list]:
    """seq2seq: the source for the encoder, the target as labels."""
    cut_off = functools.partial(tokenizer, truncation=True, split_special_tokens=True)
    found = cut_off(
        [text[: 100 * data.max_length] for text in batch["text"]], max_length=data.max_length
    )
    labels = cut_off(
        text_target=[text[: 100 * data.max_target_length] for text in batch["target"]],
        max_length=data.max_target_length,
    )["input_ids"]
    columns = {name: found[name] for name in ("input_ids", "attention_mask")}
    return columns | {"labels": labels, "length": [len(ids) for ids in columns["input_ids"]]}


def _encode_texts(
    batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, data: DataSettings
) -> dict[str, list]:
    """causal_lm: prompt and completion in one; labels only at the completion. A prompt that is too long loses its beginning."""
    columns: dict[str, list] = {"input_ids": [], "labels": [], "length": []} | (
        {"prompt": []} if "reference" in batch else {}
    )
    for source, target in zip(batch["text"], batch["target"]):
        prompt, completion = _texts(tokenizer, data, source, target)
        completion = completion[: data.max_length - 1]
        prompt = prompt[max(0, len(prompt) + len(completion) - data.max_length) :] or [
            tokenizer.eos_token_id
        ]  # something to begin with
        ids = [*prompt, *completion][: data.max_length]
        columns["input_ids"].append(ids)
        columns["labels"].append(([IGNORED] * len(prompt) + completion)[: data.max_length])
        if "prompt" in columns:  # only what is scored has to be answered
            columns["prompt"].append(prompt)
        columns["length"].append(len(ids))
    return columns


def _pack(rows: datasets.Dataset, length: int) -> datasets.Dataset:
    """Whole texts joined in rows of at most `length` tokens, in their order; positions begin anew with each text."""
    packed: list[dict[str, list[int]]] = []
    for ids, labels in zip(rows["input_ids"], rows["labels"]):
        if not packed or len(packed[-1]["input_ids"]) + len(ids) > length:
            packed.append({"input_ids": [], "labels": [], "position_ids": []})
        packed[-1]["input_ids"] += ids
        packed[-1]["labels"] += [
            IGNORED,
            *labels[1:],
        ]  # its first token is no continuation of the text before it
        packed[-1]["position_ids"] += range(len(ids))
    columns = {
        name: [row[name] for row in packed] for name in ("input_ids", "labels", "position_ids")
    }
    return datasets.Dataset.from_dict(
        columns | {"length": [len(ids) for ids in columns["input_ids"]]}
    )


def tokenize(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, data: DataSettings
) -> Examples:
    """Texts to tokens; adds length (tokens). Raises ConfigError where the tokenizer lacks what the task needs."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model.name: the tokenizer of {tokenizer.name_or_path} has no end-of-sequence token; set one and save it"
        )
    if data.messages_column and tokenizer.chat_template is None:
        raise ConfigError(
            f"data.messages_column: the tokenizer of {tokenizer.name_or_path} has no chat template; use an instruction-tuned model"
        )
    encode = _encode_pairs if examples.task == "seq2seq" else _encode_texts
    function = functools.partial(encode, tokenizer=tokenizer, data=data)
    encoded = functools.partial(
        datasets.Dataset.map,
        function=function,
        batched=True,
        remove_columns=["text", "target"],
        new_fingerprint="ids",
    )
    train = encoded(examples.train)
    return dataclasses.replace(
        examples,
        train=_pack(train, data.max_length) if data.packing else train,
        dev=encoded(examples.dev),
        test=examples.test and encoded(examples.test),
    )


class _Collator:
    """Examples to a batch of tensors [B, T], padded to the longest of them. Prompts to be answered are padded on the left."""

    def __init__(self, pad: int, length: int):
        """`length`: tokens that every row has at least."""
        self.fill = {"input_ids": pad, "attention_mask": 0, "labels": IGNORED, "prompt": pad}
        self.length = length

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = {}
        for name in features[0]:
            values = [feature[name] for feature in features]
            if name == "reference":
                batch[name] = torch.tensor(values)
            elif name == "position_ids":  # padding is a text of its own
                longest = self._longest(values)
                batch[name] = torch.tensor([[*row, *range(longest - len(row))] for row in values])
            elif name != "length":
                batch[name] = self._pad(values, self.fill[name], left=name == "prompt")
        if "prompt" in batch:
            batch["prompt_mask"] = self._pad(
                [[1] * len(f["prompt"]) for f in features], 0, left=True
            )
        if "attention_mask" not in batch and "position_ids" not in batch:
            batch["attention_mask"] = self._pad([[1] * len(f["input_ids"]) for f in features], 0)
        return batch

    def _longest(self, rows: list[list[int]]) -> int:
        return max(*map(len, rows), self.length)

    def _pad(self, rows: list[list[int]], fill: int, left: bool = False) -> torch.Tensor:
        longest = max(map(len, rows)) if left else self._longest(rows)
        return torch.tensor(
            [
                [fill] * (longest - len(row)) + row if left else row + [fill] * (longest - len(row))
                for row in rows
            ]
        )


def collator(
    tokenizer: PreTrainedTokenizerBase, data: DataSettings
) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
    """Examples to a batch, padded to the longest of them or to max_length."""
    return _Collator(tokenizer.pad_token_id, data.max_length if data.pad_to_max_length else 0)


def decode(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> list[str]:
    """What was written, without special tokens and outer blanks."""
    tokens = np.where(tokens == IGNORED, tokenizer.pad_token_id, tokens)
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def score(written: list[str], references: list[list[str]]) -> dict[str, float]:
    """BLEU (sacrebleu, corpus), ROUGE-1, -2 and -L (F1, mean over examples) and exact matches, as shares of 1.

    Of several references BLEU takes all, the others the best one.
    """
    most = max(map(len, references))
    columns = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    rouge = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    scores = [rouge.score_multi(refs, text) for text, refs in zip(written, references)]
    found = {
        name: float(np.mean([s[key].fmeasure for s in scores]))
        for name, key in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL"))
    }
    exact = [text in {ref.strip() for ref in refs} for text, refs in zip(written, references)]
    return {
        "bleu": sacrebleu.corpus_bleu(written, columns).score / 100,
        **found,
        "exact_match": float(np.mean(exact)),
    }


def compute_metrics(
    examples: Examples, tokenizer: PreTrainedTokenizerBase
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Scores of what was written: predictions are tokens, label_ids rows of `examples.references`."""

    def _score(prediction: EvalPrediction) -> dict[str, float]:
        return score(
            decode(tokenizer, prediction.predictions),
            [examples.references[row] for row in np.asarray(prediction.label_ids).reshape(-1)],
        )

    return _score
