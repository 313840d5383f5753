"""Pad examples to batches."""

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from scaleup.data.metrics import IGNORED
from scaleup.settings.data import DataSettings


def padded_length(longest: int, multiple: int, most: int) -> int:
    """Round the length of a batch's longest example up.

    Args:
        longest: tokens of the longest example.
        multiple: the result is a multiple of it, unless that exceeds `most`.
        most: the length to which examples are cut.
    """
    return max(min(-(-longest // multiple) * multiple, most), longest)


class TextCollator:
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


class EncoderCollator:
    """Pad tokens to tensors [B, T] on the right, whatever the tokenizer's padding side.

    Args:
        label: fills up labels that belong to tokens; None: they belong to examples.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        data: DataSettings,
        multiple: int,
        label: int | None,
    ):
        self.fill = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0}
        self.fill["token_type_ids"] = tokenizer.pad_token_type_id
        self.fill |= {} if label is None else {"labels": label}
        self.data, self.multiple = data, multiple

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = self.data.max_length
        if not self.data.pad_to_max_length:
            longest = max(len(row["input_ids"]) for row in rows)
            length = padded_length(longest, self.multiple, length)
        batch = {}
        for name in (*self.fill, "labels", "reference"):
            if name in rows[0]:
                values = [row[name] for row in rows]
                if name in self.fill:
                    values = [row + [self.fill[name]] * (length - len(row)) for row in values]
                batch[name] = torch.tensor(values)
        return batch
