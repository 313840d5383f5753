"""Fits low-rank updates of a backbone's linear layers to a trained model, in its own process.

    python -m scaleup.export.distill JOB.json

First by least squares on the outputs of layers (`least_squares.py`). Then a few epochs bring the
predictions of the student to those of the trained model: KL divergence, or squared error for a
regression. Both take training texts without their labels.

Shapes: B examples, T tokens, V words or classes.
"""

import dataclasses
import pathlib
import sys
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from scaleup.data.metrics import IGNORED
from scaleup.export import least_squares
from scaleup.export.calibrate import MODEL_INPUTS, TrainedJob, load
from scaleup.export.least_squares import Batch
from scaleup.export.low_rank import Student
from scaleup.unipelt.sites import linear_layers

LEARNING_RATE = 1e-4
WARMUP = 0.1  # share of the steps


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


def model_batch(model: Any, batch: dict[str, torch.Tensor], device: torch.device) -> Batch:
    """Return what a model gets of a batch, without labels where they are no text."""
    is_text = batch["labels"].dim() > 1
    inputs: dict[str, Any] = {n: batch[n].to(device) for n in MODEL_INPUTS if n in batch}
    mask_BT = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
    decoder_mask_BT = None
    if is_text:
        inputs["use_cache"] = False
    if is_text and model.config.is_encoder_decoder:
        inputs["labels"] = batch["labels"].to(device)
        decoder_mask_BT = inputs["labels"] != IGNORED
        inputs["decoder_attention_mask"] = decoder_mask_BT.long()
    return Batch(inputs, mask_BT, decoder_mask_BT)


def predictions(model: Any, batch: Batch, labels: torch.Tensor) -> torch.Tensor:
    """Return the logits [B, V], or of text those of its label tokens [tokens, V]."""
    logits = model(**batch.inputs).logits.float()
    if labels.dim() == 1 or logits.dim() == 2:
        return logits
    labels = labels.to(logits.device)
    if not model.config.is_encoder_decoder:  # the logits at a token predict the next one
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits[labels != IGNORED]


def distance(wanted_BV: torch.Tensor, given_BV: torch.Tensor) -> torch.Tensor:
    """Return the mean KL divergence, or the mean squared error of a regression."""
    if wanted_BV.shape[-1] == 1:
        return nn.functional.mse_loss(given_BV, wanted_BV)
    given, wanted = given_BV.log_softmax(-1), wanted_BV.log_softmax(-1)
    return nn.functional.kl_div(given, wanted, reduction="batchmean", log_target=True)


def train(
    student: Student, batches: list[dict[str, torch.Tensor]], epochs: int, device: torch.device
) -> list[float]:
    """Bring the student's predictions to those of the trained model.

    Returns:
        The mean loss of each epoch.
    """
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
            batch, labels = model_batch(model, batches[i], device), batches[i]["labels"]
            with torch.no_grad():
                wanted = predictions(model, batch, labels)
            with student.active():
                loss = distance(wanted, predictions(model, batch, labels))
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += loss.item()
        losses.append(total / len(batches))
    return losses


def main() -> None:
    """Fit updates. The argument is the file of a DistillJob."""
    job = DistillJob.from_json(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))
    logging.disable_progress_bar()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = load(job, device)
    model.requires_grad_(False)
    names = [name for group in linear_layers(model.get_base_model()).values() for name in group]
    student = Student.untrained(model, names, job.rank, device)
    batches = torch.load(job.batches)
    texts = [model_batch(model, batch, device) for batch in batches]
    unexplained = least_squares.fit(student, texts, job.rank, device)
    losses = train(student, batches, job.epochs, device)
    assert job.updates is not None
    student.save(pathlib.Path(job.updates))
    Fit(unexplained=unexplained, losses=losses).save(job.output)


if __name__ == "__main__":
    main()
