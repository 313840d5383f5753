"""The header of a run is in plain words."""

import types

import pytest
import torch

from scaleup.settings.schema import load
from scaleup.training.console import header


def lines(trained: int, *words: str, labels: list[str] | None = None) -> list[str]:
    """Return the header of a regression run that stores 100 parameters, or of a classification."""
    counts = {"backbone": 1000, "head": 5, "submodules": {"prefix": 100}, "trained": trained}
    counts |= {"stored": 100, "trained_percent": trained / 11, "stored_percent": 100 / 11}
    train = {"labels": [1.0, 2.0, 4.5]}
    examples = types.SimpleNamespace(
        train=train, train_rows=3, dev=[], test=None, test_is_dev=False, references=None,
        metric="spearman", shared={}, labels=labels,
        task="regression" if labels is None else "classification", count=lambda split: 0,
    )  # fmt: skip
    world = types.SimpleNamespace(size=1, deepspeed=False, device=torch.device("cpu"))
    run = types.SimpleNamespace(
        settings=load(None, ["data.name=stsb", *words]),
        examples=examples,
        world=world,
        task=types.SimpleNamespace(notes=None),
        args=types.SimpleNamespace(
            bf16=False, per_device_train_batch_size=16, gradient_accumulation_steps=1
        ),
    )
    return header(run, counts)


def test_the_mlp_of_the_prefix_is_named_only_if_it_is_trained():
    (line,) = [line for line in lines(220) if line.startswith("trained")]
    assert line.startswith("trained    220 parameters (20.00%, with the prefix's MLP), stored 100")
    (line,) = [line for line in lines(100) if line.startswith("trained")]
    assert line.startswith("trained    100 parameters (9.09%), stored 100")


@pytest.mark.parametrize(
    ("words", "start"),
    [
        ((), "a new head starts at 0, and with model.head_bias=prior at the mean"),
        (("model.head_bias=prior",), "the mean is where the head starts"),
    ],
)
def test_the_labels_of_a_regression_are_described_in_words(words, start):
    assert f"labels     mean 2.5, standard deviation 1.472; {start}" in lines(100, *words)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(3, "3: c0, c1, c2"), (12, f"12: {', '.join(f'c{i}' for i in range(10))}, and 2 more")],
)
def test_the_classes_are_named(count, expected):
    assert f"labels     {expected}" in lines(100, labels=[f"c{i}" for i in range(count)])
