"""Batches of random tokens for benchmarks.

Shapes: B examples, T tokens.
"""

from typing import Any

import torch

EOS = 2
Batch = dict[str, torch.Tensor]


def random_batch(lengths: list[int], width: int, vocabulary: int) -> Batch:
    """Draw random tokens [B, T] with T = `width`. EOS closes each example; padding follows."""
    generator = torch.Generator().manual_seed(0)
    lengths_B = torch.tensor(lengths)
    input_ids = torch.randint(5, vocabulary, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) < lengths_B[:, None]).long()
    input_ids = input_ids * mask + (1 - mask)
    input_ids[torch.arange(len(lengths)), lengths_B - 1] = EOS
    labels = torch.randint(0, 2, (len(lengths),), generator=generator)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def with_labels(batch: Batch, model: Any) -> Batch:
    """Return the batch with the labels that the head of `model` needs: classes or tokens."""
    if model.get_output_embeddings() is None:
        return batch
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def half_padding_lengths(count: int, width: int) -> list[int]:
    """Spread lengths from an eighth of `width` to `width`: half of all tokens are padding."""
    steps = max(1, count - 2)
    return [round(width / 8 + 3 * width / 4 * i / steps) for i in range(count - 1)] + [width]
