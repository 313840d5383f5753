"""What Trainer is told of a run: our config and our defaults as TrainingArguments."""

import pathlib

import torch
from transformers import TrainingArguments

from scaleup.errors import ConfigError
from scaleup.settings.schema import ZERO_PRESETS, Settings
from scaleup.training.distributed import World

PRESETS = pathlib.Path(__file__).parents[1] / "settings" / "deepspeed"


def training_arguments(
    settings: Settings,
    world: World,
    metric: str,
    token_mean: bool,
    shared: bool,
    half: torch.dtype | None,
) -> TrainingArguments:
    """TrainingArguments of a run.

    metric: of the best checkpoint; token_mean: see scaleup.data.tasks; shared: all hosts see one output folder; half: mixed precision.
    Raises ConfigError with Trainer's own words for values it refuses.
    """
    train = settings.train
    passed = train.training_arguments
    strategy = passed.pop("eval_strategy", None) or "epoch"
    if strategy == "no":
        raise ConfigError(
            "train.eval_strategy: no development scores, no best checkpoint; use epoch or steps"
        )
    if strategy == "steps":
        passed.setdefault("eval_steps", train.logging_steps)  # as Trainer does
        passed.setdefault("save_steps", passed["eval_steps"])
        if (
            passed.get("save_strategy") in (None, "steps")
            and passed["save_steps"] != passed["eval_steps"]
        ):
            raise ConfigError(
                f"train.save_steps: {passed['save_steps']:g}, but dev is scored every {passed['eval_steps']:g} steps, and the best checkpoint must have"
                " been saved; leave it out, or set train.save_strategy=best"
            )
    passed.setdefault(
        "gradient_checkpointing_kwargs",
        {"use_reentrant": False} if train.gradient_checkpointing else None,
    )
    passed.setdefault("save_strategy", strategy)
    passed.setdefault("ddp_find_unused_parameters", False)
    # A loss that does not divide by the step's tokens, as a classifier's, would be multiplied by the number of processes.
    passed.setdefault("average_tokens_across_devices", token_mean)
    passed.setdefault("disable_tqdm", False)
    passed.setdefault(
        "logging_nan_inf_filter", False
    )  # a loss that is not a number ends the run instead of being smoothed over
    passed.setdefault("dataloader_pin_memory", world.device.type == "cuda")
    if world.device.type == "cpu":
        passed.setdefault(
            "use_cpu", True
        )  # what Trainer wants to hear before it allows bfloat16 on CPU
    group = train.group_by_length and not settings.data.pad_to_max_length
    try:
        args = TrainingArguments(
            **passed,
            eval_strategy=strategy,
            learning_rate=settings.learning_rate,
            bf16=half is torch.bfloat16,
            deepspeed=deepspeed_file(train.deepspeed),
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
        args._n_gpu = min(
            args.n_gpu, 1
        )  # one process drives one GPU; nn.DataParallel would copy modules without their hooks
        return args
    except (ValueError, ImportError, TypeError, KeyError) as error:
        raise ConfigError(f"train: {' '.join(str(error).split())}") from error


def deepspeed_file(name: str | None) -> str | None:
    """The JSON file that `train.deepspeed` stands for."""
    return str(PRESETS / f"{name}.json") if name in ZERO_PRESETS else name
