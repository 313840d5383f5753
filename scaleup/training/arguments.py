"""Translate a run's config into transformers' TrainingArguments."""

import sys
from typing import Any

import torch
from transformers import TrainingArguments

from scaleup.data import tasks
from scaleup.errors import ConfigError, one_line
from scaleup.settings.presets import read_deepspeed
from scaleup.settings.schema import Settings, TrainSettings
from scaleup.training.distributed import World


def training_arguments(
    settings: Settings, world: World, metric: str, shared: bool, half: torch.dtype | None
) -> TrainingArguments:
    """Return the TrainingArguments of a run. A value that Trainer refuses is a ConfigError.

    Args:
        metric: picks the best checkpoint.
        shared: whether all hosts see one output folder.
        half: data type of mixed precision, or None for float32.
    """
    train = settings.train
    passed = train.training_arguments
    strategy = _set_evaluation(passed, train)
    if train.gradient_checkpointing:  # without this one, torch would take the reentrant kind
        arguments = passed.get("gradient_checkpointing_kwargs") or {}
        passed["gradient_checkpointing_kwargs"] = {"use_reentrant": False} | arguments
    defaults = {
        "save_strategy": strategy,
        "ddp_find_unused_parameters": False,
        # If True, Trainer multiplies a loss that is a mean over the batch by the process count.
        "average_tokens_across_devices": tasks.of(settings.data).by_token,
        # In a file, each redrawing of a bar would be one more line.
        "disable_tqdm": sys.stderr is None or not sys.stderr.isatty(),
        "logging_nan_inf_filter": False,  # a loss that is not finite must end the run
        "dataloader_pin_memory": world.device.type == "cuda",
        "use_cpu": world.device.type == "cpu",  # Trainer allows bfloat16 on CPU only with this
    }
    group = train.group_by_length and not settings.data.pad_to_max_length
    try:
        args = TrainingArguments(
            **(defaults | passed),
            eval_strategy=strategy,
            learning_rate=settings.learning_rate,
            bf16=half is torch.bfloat16,
            deepspeed=train.deepspeed and read_deepspeed(train.deepspeed, world.per_host),
            train_sampling_strategy="group_by_length" if group else "random",
            length_column_name="length",
            load_best_model_at_end=True,
            metric_for_best_model=metric,
            greater_is_better=metric != "loss",
            remove_unused_columns=False,
            save_on_each_node=not shared,
            label_names=["labels"],
            accelerator_config={"use_configured_state": True},
        )
    except (ValueError, ImportError, TypeError, KeyError) as error:
        raise ConfigError(f"train: {one_line(error)}") from error
    # One process drives one GPU. nn.DataParallel would copy modules without their hooks.
    args._n_gpu = min(args.n_gpu, 1)
    return args


def _set_evaluation(passed: dict[str, Any], train: TrainSettings) -> str:
    """Complete the steps of scoring and saving in `passed`, and return the eval strategy."""
    strategy = passed.pop("eval_strategy", None) or "epoch"
    if strategy == "no":
        problem = "without development scores there is no best checkpoint"
        raise ConfigError(f"train.eval_strategy: {problem}; use epoch or steps")
    if strategy == "steps":
        passed.setdefault("eval_steps", train.logging_steps)  # Trainer's own default
        passed.setdefault("save_steps", passed["eval_steps"])
        saves_in_steps = passed.get("save_strategy") in (None, "steps")
        if saves_in_steps and passed["save_steps"] != passed["eval_steps"]:
            raise ConfigError(
                f"train.save_steps: {passed['save_steps']:g}, but dev is scored every"
                f" {passed['eval_steps']:g} steps, and the best checkpoint must have been saved;"
                " leave it out, or set train.save_strategy=best"
            )
    return strategy
