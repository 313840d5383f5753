"""Fit low-rank updates of a backbone's linear layers to a trained model, in a separate process.

    python -m scaleup.export.distill JOB.json

The updates are first fitted by least squares to the outputs of layers (`least_squares.py`). Then
they are trained for a few epochs, so that the student's predictions approach those of the trained
model. The loss is the KL divergence, or the squared error for a regression. Neither step learns
from the labels of the training texts.

Shapes: B examples, T tokens, V words or classes.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from scaleup.data.metrics import IGNORED
from scaleup.export import least_squares
from scaleup.export.calibrate import MODEL_INPUTS, TrainedJob, load
from scaleup.export.least_squares import Batch
from scaleup.export.low_rank import Student
from scaleup.settings import schema
from scaleup.unipelt.sites import linear_layers

LEARNING_RATE = 1e-4
WARMUP = 0.1  # share of the steps
OUTSIDE = -1e4  # logit of a token that no answer can start at


@dataclasses.dataclass(kw_only=True)
class DistillJob(TrainedJob):
    """The job of fitting updates; `batches` are those of training examples.

    Attributes:
        rank: rank of the updates.
        epochs: passes over the examples for the predictions.
        updates: file to write.
    """

    rank: int
    epochs: int


@dataclasses.dataclass(kw_only=True)
class Fit:
    """How well the updates fit.

    Attributes:
        unexplained: share of the squared change of each block's output that least squares left.
        losses: mean loss of the predictions in each epoch.
    """

    unexplained: dict[str, float]
    losses: list[float]

    def save(self, path: str) -> None:
        torch.save(vars(self), path)

    @classmethod
    def load(cls, path: str) -> "Fit":
        return cls(**torch.load(path))


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Which outputs of a model are its predictions.

    Attributes:
        writes: the model generates text.
        outputs: names of the outputs that are scored.
        several: each class is predicted on its own (multi-label classification).
    """

    writes: bool
    outputs: Sequence[str] = ("logits",)
    several: bool = False

    def of(self, model: Any, batch: Batch, labels: torch.Tensor) -> torch.Tensor:
        """Return the logits [N, V] of the predictions, or the values [B, 1] of a regression.

        Args:
            labels: labels of the batch; only read for text, to find the tokens that are generated.
        """
        found = model(**batch.inputs)
        scored = [found[name].float() for name in self.outputs]
        logits = scored[0]
        if self.writes:
            labels = labels.to(logits.device)
            if not model.config.is_encoder_decoder:  # the logits at a token predict the next one
                logits, labels = logits[:, :-1], labels[:, 1:]
            return logits[labels != IGNORED]
        mask_BT = batch.mask_BT
        if len(scored) > 1:  # the token where an answer starts, and that where it ends
            outside = None if mask_BT is None else ~mask_BT.repeat(len(scored), 1)
            rows = torch.cat(scored)
            return rows if outside is None else rows.masked_fill(outside, OUTSIDE)
        if logits.dim() == 3:  # of each token
            return logits.flatten(0, 1) if mask_BT is None else logits[mask_BT]
        if self.several:
            return torch.stack([logits, torch.zeros_like(logits)], dim=-1).flatten(0, 1)
        return logits


def model_batch(
    model: Any, batch: dict[str, torch.Tensor], writes: bool, device: torch.device
) -> Batch:
    """Return the inputs of a model for a batch; they include the labels only if these are text."""
    inputs: dict[str, Any] = {n: batch[n].to(device) for n in MODEL_INPUTS if n in batch}
    mask_BT = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
    decoder_mask_BT = None
    if writes:
        inputs["use_cache"] = False
    if writes and model.config.is_encoder_decoder:
        inputs["labels"] = batch["labels"].to(device)
        decoder_mask_BT = inputs["labels"] != IGNORED
        inputs["decoder_attention_mask"] = decoder_mask_BT.long()
    return Batch(inputs, mask_BT, decoder_mask_BT)


def distance(wanted_NV: torch.Tensor, given_NV: torch.Tensor) -> torch.Tensor:
    """Return the mean KL divergence, or the mean squared error of a regression."""
    if wanted_NV.shape[-1] == 1:
        return nn.functional.mse_loss(given_NV, wanted_NV)
    given, wanted = given_NV.log_softmax(-1), wanted_NV.log_softmax(-1)
    return nn.functional.kl_div(given, wanted, reduction="batchmean", log_target=True)


def train(
    student: Student,
    batches: list[dict[str, torch.Tensor]],
    predictions: Predictions,
    epochs: int,
    device: torch.device,
) -> list[float]:
    """Bring the student's predictions to those of the trained model.

    Returns:
        The mean loss of each epoch.
    """
    if not epochs:
        return []
    model = student.model
    parameters = [p for update in student.updates.values() for p in update.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    steps, losses = epochs * len(batches), list[float]()

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / (WARMUP * steps), (steps - step) / steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        total = 0.0
        for i in torch.randperm(len(batches), generator=generator).tolist():
            batch = model_batch(model, batches[i], predictions.writes, device)
            labels = batches[i]["labels"]
            with torch.no_grad():
                wanted = predictions.of(model, batch, labels)
            with student.active():
                loss = distance(wanted, predictions.of(model, batch, labels))
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += loss.item()
        losses.append(max(0.0, total / len(batches)))  # rounding can make a divergence negative
    return losses


def main() -> None:
    """Fit updates. The argument is the file of a DistillJob."""
    job = DistillJob.from_json(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))
    logging.disable_progress_bar()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = load(job, device)
    if job.epochs and hasattr(model, "hf_device_map"):
        sys.exit(
            "the model does not fit on the device, and a backward pass needs it whole; use "
            "--epochs 0 for least squares alone, or a device with more memory"
        )
    model.requires_grad_(False)
    names = [name for group in linear_layers(model.get_base_model()).values() for name in group]
    student = Student.untrained(model, names, job.rank, device)
    batches = torch.load(job.batches)
    task = schema.load(job.config).data.resolved_task
    predictions = Predictions(job.writes, job.outputs, task == "multi_label_classification")
    texts = [model_batch(model, batch, job.writes, device) for batch in batches]
    unexplained = least_squares.fit(student, texts, job.rank, device)
    losses = train(student, batches, predictions, job.epochs, device)
    assert job.updates is not None
    student.save(pathlib.Path(job.updates))
    Fit(unexplained=unexplained, losses=losses).save(job.output)


if __name__ == "__main__":
    main()
