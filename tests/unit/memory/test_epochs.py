"""The number of steps in an epoch, and the warning where there are few."""

import re

import pytest
import torch
from torch.utils.data import DataLoader

from scaleup.memory.epochs import FEW, few_steps, steps_per_epoch
from scaleup.settings.schema import TrainSettings


def train(batch: int, accumulation: int = 1):
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    return TrainSettings.model_validate(sizes)


@pytest.mark.parametrize("examples", [1, 5, 63, 64, 65, 500])
@pytest.mark.parametrize(("batch", "accumulation", "world"), [(16, 1, 1), (8, 2, 3), (4, 8, 2)])
def test_steps_are_counted_as_by_a_loader_of_whole_batches(examples, batch, accumulation, world):
    passes = len(DataLoader(torch.zeros(examples), batch_size=batch * world))
    expected = len(range(0, passes, accumulation))
    assert steps_per_epoch(train(batch, accumulation), examples, world) == expected


def test_an_incomplete_last_batch_counts_only_if_it_is_not_dropped():
    settings = train(8).model_copy(update={"dataloader_drop_last": True})
    assert steps_per_epoch(train(8), 108, 2) == 7 and steps_per_epoch(settings, 108, 2) == 6


def test_a_job_with_one_step_an_epoch_is_told_the_arithmetic_and_a_batch_size_that_helps():
    warning = few_steps(train(16), 500, 32)
    assert warning.startswith(
        "warning: an epoch has 1 step (500 examples / 512 a step = 0.98, with 512 = 16 per process"
        " x 32 processes x 1 accumulation): "
    )
    assert "train.per_device_train_batch_size=3 with train.gradient_accumulation_steps=1" in warning


@pytest.mark.parametrize("world", [1, 3, 32])
def test_the_batch_size_or_number_of_processes_of_the_advice_gives_five_steps(world):
    for examples in range(FEW, 300):
        warning = few_steps(train(10_000), examples, world)
        if size := re.search(r"batch_size=(\d+)", warning):
            assert steps_per_epoch(train(int(size[1])), examples, world) >= FEW
            larger = int(size[1]) + 1
            assert steps_per_epoch(train(larger), examples, world) < FEW
        else:
            most = int(re.search(r"at most (\d+) process", warning)[1])
            assert most < world and steps_per_epoch(train(1), examples, most) >= FEW


def test_five_steps_are_enough_and_four_examples_are_not():
    assert few_steps(train(16), 65, 1) is None and "= 1.00" in few_steps(train(16), 16, 1)
    assert few_steps(train(1), 4, 1).endswith("5 steps need at least 5 examples")
