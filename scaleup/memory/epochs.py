"""The number of optimizer steps in an epoch, and a warning where there are few."""

import math

from scaleup.settings.schema import TrainSettings

FEW = 5


def steps_per_epoch(train: TrainSettings, examples: int, world: int) -> int:
    """Return the optimizer steps of an epoch as Trainer counts them.

    Args:
        examples: rows of the training set.
        world: number of processes.
    """
    batches = examples / (train.per_device_train_batch_size * world)
    passes = math.floor(batches) if train.dataloader_drop_last else math.ceil(batches)
    return max(math.ceil(passes / train.gradient_accumulation_steps), 1)


def few_steps(train: TrainSettings, examples: int, world: int) -> str | None:
    """Return a warning with the arithmetic if an epoch has fewer than five steps, else None.

    Args:
        examples: rows of the training set, at most.
        world: number of processes.
    """
    steps = steps_per_epoch(train, examples, world)
    if steps >= FEW:
        return None
    batch, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    per_step = batch * world * accumulation
    sum_ = f"{examples} examples / {per_step} a step = {examples / per_step:.2f}"
    parts = f"{batch} per process x {world} process{'es' * (world > 1)} x {accumulation}"
    parts += " accumulation"
    effect = "the learning rate changes in few, large jumps, and evaluations take most of the time"
    plural = "s" * (steps > 1)
    warning = f"warning: an epoch has {steps} step{plural} ({sum_}, with {per_step} = {parts})"
    return f"{warning}: {effect}; {_advice(examples, world)}"


def _advice(examples: int, world: int) -> str:
    """Return how an epoch gets five steps: a smaller batch or, if that is not enough, fewer GPUs.

    More than four batches are at least five steps.
    """
    most = (examples - 1) // (FEW - 1)  # examples of a step
    if most >= world:
        size = f"train.per_device_train_batch_size={most // world}"
        return f"{size} with train.gradient_accumulation_steps=1 gives at least {FEW} steps"
    if most:
        plural = "es" * (most > 1)
        return f"start at most {most} process{plural}, with a batch of 1 and no accumulation"
    return f"{FEW} steps need at least {FEW} examples"
