"""Prepare data for generation: a target for a source (seq2seq), or a completion of a prompt or a
chat (causal_lm).

The examples come from the user's files. The loss counts only the tokens of the target. On the
development and test sets the model writes an answer for every distinct source, which is compared
with all targets that the set has for it.

Shapes of a batch: B examples, T tokens.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import datasets
import torch
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from scaleup.data import files
from scaleup.data.files import Examples, Table
from scaleup.data.metrics import IGNORED, text_metrics
from scaleup.data.padding import padded_length
from scaleup.errors import ConfigError, one_line
from scaleup.settings.schema import DataSettings

ROLES = ("system", "user", "assistant", "tool")
DEFAULT_METRIC = {"seq2seq": "bleu", "causal_lm": "loss"}

# The interface of a task's module: see scaleup.data.tasks.
source_files, compute_metrics = files.user_files, text_metrics


def _is_turn(turn: Any) -> bool:
    valid = isinstance(turn, dict) and turn.get("role") in ROLES
    return valid and isinstance(turn.get("content"), str)


def _clean_chat(cell: Any) -> tuple[str | None, str | None]:
    """Return a chat as JSON, and the problem with the cell or None."""
    try:
        turns = json.loads(cell) if isinstance(cell, str) else cell
    except ValueError:
        return None, "is not JSON"
    valid = isinstance(turns, list) and len(turns) >= 2 and all(map(_is_turn, turns))
    if not valid or turns[-1]["role"] != "assistant":
        return None, "is not a list of {role, content} that ends with the assistant"
    turns = [turn | {"content": files.replace_surrogates(turn["content"])} for turn in turns]
    return json.dumps(turns), None


def _clean_cell(cell: Any, role: str) -> tuple[str | None, str | None]:
    """Return a text, or a chat (role "messages") as JSON, and the problem with the cell or None."""
    if cell is None or cell != cell:
        return None, "is missing"
    if role == "messages":
        return _clean_chat(cell)
    if not isinstance(cell, str | int | float):
        return None, f"holds a {type(cell).__name__}, not text"
    if role == "target" and not str(cell).strip():
        return None, "is empty; there would be nothing to learn"
    return files.replace_surrogates(str(cell)), None


def _pairs(table: Table, data: DataSettings) -> list[tuple[str, str]]:
    """Return (source, target) of every row.

    The source of a chat is the JSON of all turns before the last; the target is the last one.
    """
    if not data.messages_column:
        columns = {"text": data.text_column, "target": data.target_column}
        values = files.clean_columns(table, columns, _clean_cell)
        return list(zip(values["text"], values["target"]))
    values = files.clean_columns(table, {"messages": data.messages_column}, _clean_cell)
    chats = map(json.loads, values["messages"])
    return [(json.dumps(turns[:-1]), turns[-1]["content"]) for turns in chats]


def _by_source(pairs: list[tuple[str, str]]) -> dict[str, list[str]]:
    """Return all targets of each source, in order."""
    targets: dict[str, list[str]] = {}
    for source, target in pairs:
        targets.setdefault(source, []).append(target)
    return targets


def _scored(groups: dict[str, list[str]], first: int) -> datasets.Dataset:
    """Return one row per source, with the index of its references, which begin at `first`."""
    columns = {
        "text": list(groups),
        "target": [targets[0] for targets in groups.values()],
        "reference": list(range(first, first + len(groups))),
    }
    return datasets.Dataset.from_dict(columns)


@functools.lru_cache(maxsize=1)  # preflight checks and the run share one reading
def _load(settings: str, _state: tuple) -> Examples:
    data, parts, sources, problems = DataSettings.model_validate_json(settings), {}, [], []
    if not data.messages_column and data.target_column == data.text_column:
        advice = "the text would tell the target"
        problems.append(
            f"data.target_column: {data.target_column} is the text column, too; {advice}"
        )
    for split, (key, file) in files.user_files(data).items():
        try:
            table = files.read_columns(key, file)
            parts[split] = _pairs(table, data)
            sources.append({"split": split, "rows": len(parts[split]), **table.source})
            if split == "train":
                train, dev = files.choose_rows(data, len(parts[split]), file)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    texts, targets = zip(*(parts["train"][row] for row in train))
    dev_pairs = [parts["train"][row] for row in dev] if dev else parts["validation"]
    dev_groups, test_groups = _by_source(dev_pairs), _by_source(parts.get("test", []))
    test_sources = list(test_groups)
    kept = [test_sources[row] for row in files.choose_test_rows(data, len(test_sources))]
    test_groups = {source: test_groups[source] for source in kept}
    train_set = datasets.Dataset.from_dict({"text": list(texts), "target": list(targets)})
    dev_set = _scored(dev_groups, 0)
    test_set = _scored(test_groups, len(dev_groups)) if test_groups else None
    return Examples(
        train=train_set,
        dev=dev_set,
        test=test_set,
        labels=None,
        metric=data.metric or DEFAULT_METRIC[data.resolved_task],
        task=data.task or "seq2seq",
        test_is_dev=False,
        sources=sources,
        references=[*dev_groups.values(), *test_groups.values()],
        prompts=[*dev_groups, *test_groups],
        shared=files.shared_texts(train_set, dev_set, test_set),
    )


def load(data: DataSettings) -> Examples:
    """Read the examples of a run and choose those to train and develop on.

    The first `k` rows of the training file, shuffled by `seed`, are for training. The next
    `dev_size` rows are for development unless there is a validation file. The ConfigError names
    every problem in the files.
    """
    return _load(data.model_dump_json(), files.file_states(files.user_files(data)))


def _prompt_and_completion(
    tokenizer: PreTrainedTokenizerBase, data: DataSettings, source: str, target: str
) -> tuple[list[int], list[int]]:
    """Return the tokens of a prompt and of its completion."""
    if not data.messages_column:
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        plain = functools.partial(tokenizer, add_special_tokens=False, split_special_tokens=True)
        source = data.prompt_template.replace("{text}", source)
        completion = plain(target)["input_ids"] + [tokenizer.eos_token_id]
        return begin + plain(source)["input_ids"], completion
    turns = [*json.loads(source), {"role": "assistant", "content": target}]
    render = functools.partial(tokenizer.apply_chat_template, return_dict=False)
    try:
        prompt, chat = render(turns[:-1], add_generation_prompt=True), render(turns)
    except (ValueError, TemplateError) as error:
        problem = f"the tokenizer's chat template refuses a chat: {one_line(error, 200)}"
        raise ConfigError(f"data.messages_column: {problem}") from None
    if chat[: len(prompt)] != prompt:
        raise ConfigError(
            "data.messages_column: with this tokenizer's chat template a chat does not begin with "
            "its prompt, so the answer cannot be told from it"
        )
    return prompt, chat[len(prompt) :]


def _encode_pairs(
    batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, data: DataSettings
) -> dict[str, list]:
    """Encode rows for seq2seq: the source for the encoder, the target as labels."""
    encode = functools.partial(tokenizer, truncation=True, split_special_tokens=True)
    sources = [
        data.prompt_template.replace("{text}", text[: 100 * data.max_length])
        for text in batch["text"]
    ]
    targets = [text[: 100 * data.max_target_length] for text in batch["target"]]
    inputs = encode(sources, max_length=data.max_length)
    labels = encode(text_target=targets, max_length=data.max_target_length)["input_ids"]
    columns = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return columns | {"labels": labels, "length": [len(ids) for ids in columns["input_ids"]]}


def _encode_texts(
    batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, data: DataSettings
) -> dict[str, list]:
    """Encode rows for causal_lm as prompt and completion, with labels at the completion.

    A prompt that is too long loses its beginning.
    """
    columns: dict[str, list] = {"input_ids": [], "labels": [], "length": []}
    if "reference" in batch:  # only what is scored has to be answered
        columns["prompt"] = []
    for source, target in zip(batch["text"], batch["target"]):
        prompt, completion = _prompt_and_completion(tokenizer, data, source, target)
        completion = completion[: data.max_length - 1]
        excess = max(0, len(prompt) + len(completion) - data.max_length)
        prompt = prompt[excess:] or [tokenizer.eos_token_id]  # generation needs a first token
        ids = [*prompt, *completion][: data.max_length]
        row = {
            "input_ids": ids,
            "labels": ([IGNORED] * len(prompt) + completion)[: data.max_length],
            "length": len(ids),
            "prompt": prompt,
        }
        for name, values in columns.items():
            values.append(row[name])
    return columns


def _pack(rows: datasets.Dataset, length: int) -> datasets.Dataset:
    """Join complete texts, in order, to rows of at most `length` tokens.

    Positions restart with each text. The first token of a text is not a continuation of the text
    before it, so it has no label.
    """
    packed: list[dict[str, list[int]]] = []
    for ids, labels in zip(rows["input_ids"], rows["labels"]):
        if not packed or len(packed[-1]["input_ids"]) + len(ids) > length:
            packed.append({"input_ids": [], "labels": [], "position_ids": []})
        packed[-1]["input_ids"] += ids
        packed[-1]["labels"] += [IGNORED, *labels[1:]]
        packed[-1]["position_ids"] += range(len(ids))
    return datasets.Dataset.from_list([row | {"length": len(row["input_ids"])} for row in packed])


def tokenize(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, data: DataSettings
) -> Examples:
    """Replace texts by tokens and add the column length (tokens)."""
    lacks = f"the tokenizer of {tokenizer.name_or_path} has no"
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.name: {lacks} end-of-sequence token; set one and save it")
    if data.messages_column and tokenizer.chat_template is None:
        advice = "use an instruction-tuned model"
        raise ConfigError(f"data.messages_column: {lacks} chat template; {advice}")
    encode = _encode_pairs if examples.task == "seq2seq" else _encode_texts
    encoded = functools.partial(
        datasets.Dataset.map,
        function=functools.partial(encode, tokenizer=tokenizer, data=data),
        batched=True,
        remove_columns=["text", "target"],
        new_fingerprint="ids",  # otherwise `map` would pickle the tokenizer to compute one
    )
    train = encoded(examples.train)
    return dataclasses.replace(
        examples,
        train=_pack(train, data.max_length) if data.packing else train,
        dev=encoded(examples.dev),
        test=examples.test and encoded(examples.test),
    )


class _Collator:
    """Pad examples to tensors [B, T] on the right, but prompts for `generate` on the left.

    transformers' DataCollatorForSeq2Seq knows neither prompts nor positions of packed texts.
    """

    def __init__(self, pad: int, data: DataSettings, multiple: int):
        """Take the id of the padding token, and the number whose multiples lengths shall be."""
        self.fill = {"input_ids": pad, "attention_mask": 0, "labels": IGNORED, "prompt": pad}
        self.data, self.multiple = data, multiple

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        columns = {name: [row[name] for row in features] for name in features[0]}
        columns.pop("length", None)
        batch: dict[str, torch.Tensor] = {}
        if "reference" in columns:
            batch["reference"] = torch.tensor(columns.pop("reference"))
        if "prompt" in columns:
            ones = [[1] * len(prompt) for prompt in columns["prompt"]]
            batch["prompt_mask"] = self._pad(ones, 0, left=True)
        if "position_ids" in columns:  # the padding of a packed row counts as a text of its own
            rows = columns.pop("position_ids")
            length = self._length(max(map(len, rows)), self.data.max_length)
            rows = [[*row, *range(length - len(row))] for row in rows]
            batch["position_ids"] = torch.tensor(rows)
        elif "attention_mask" not in columns:
            columns["attention_mask"] = [[1] * len(ids) for ids in columns["input_ids"]]
        targets = self.data.task == "seq2seq"
        for name, rows in columns.items():
            most = self.data.max_length
            if name == "labels" and targets and not self.data.pad_to_max_length:
                most = self.data.max_target_length
            batch[name] = self._pad(rows, self.fill[name], most, left=name == "prompt")
        return batch

    def _length(self, longest: int, most: int) -> int:
        if self.data.pad_to_max_length:
            return max(longest, most)
        return padded_length(longest, self.multiple, most)

    def _pad(
        self, rows: list[list[int]], fill: int, most: int = 0, left: bool = False
    ) -> torch.Tensor:
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        if left:
            return pad_sequence(tensors, True, fill, padding_side="left")
        padded = pad_sequence(tensors, True, fill)
        missing = self._length(padded.shape[1], most) - padded.shape[1]
        return torch.nn.functional.pad(padded, (0, missing), value=fill)


def collator(
    tokenizer: PreTrainedTokenizerBase, data: DataSettings, multiple: int = 1
) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
    """Return a function that pads examples to the longest of the batch, or to max_length.

    The lengths of a batch are rounded up to multiples of `multiple`.
    """
    return _Collator(tokenizer.pad_token_id, data, multiple)
