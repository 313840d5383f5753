"""Check a user's DeepSpeed file with DeepSpeed itself, before a run starts or compiles anything."""

import contextlib
import io
import logging
import os
from typing import Any

import torch

from scaleup.errors import ConfigError, one_line
from scaleup.settings.presets import read_deepspeed
from scaleup.settings.rules import ZERO_PRESETS
from scaleup.settings.schema import TrainSettings


def deepspeed_problems(name: str | None) -> list[str]:
    """Return what is wrong with the file that `train.deepspeed` names."""
    if name is None or name in ZERO_PRESETS:
        return []
    if not os.path.exists(name):
        presets = ", ".join(ZERO_PRESETS)
        return [f"train.deepspeed: {name} is neither a file nor one of {presets}"]
    try:
        config = read_deepspeed(name)
    except ConfigError as error:
        return error.problems
    reason = _refusal(config)
    return [f"train.deepspeed: {name} is refused by DeepSpeed: {reason}"] if reason else []


# A section of a DeepSpeed file → settings that nothing reads if the file has it.
REPLACED = {
    "optimizer": ("gate_learning_rate", "optim", "optim_args"),
    "scheduler": ("gate_learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs"),
}


def section_problems(train: TrainSettings) -> list[str]:
    """Return which settings do not go with the sections of the run's DeepSpeed file."""
    if train.deepspeed is None or train.deepspeed in ZERO_PRESETS:
        return []
    try:
        config = read_deepspeed(train.deepspeed)
    except ConfigError:  # `deepspeed_problems` reports it
        return []
    problems: dict[str, str] = {}
    for section in REPLACED.keys() & config.keys():
        for key in REPLACED[section]:
            default = type(train).model_fields[key].get_default(call_default_factory=True)
            if key in train.model_fields_set and getattr(train, key) != default:
                problems[key] = (
                    f"train.{key}: has no effect, because {train.deepspeed} has a section "
                    f"{section!r} of its own; remove one of them"
                )
    scheduler = config.get("scheduler")
    given = scheduler.get("params") if isinstance(scheduler, dict) else None
    takes_ours = isinstance(given, dict) and given.get("warmup_num_steps") == "auto"
    if takes_ours and train.warmup_steps == 0:
        advice = f"the scheduler of {train.deepspeed} needs at least 1"
        problems["warmup_steps"] = f"train.warmup_steps: {advice}"
    return list(problems.values())


# Optimizers that keep one number for each weight, which `scaleup.training.zero_state` can name.
NAMED = ("adam", "adamw", "lion", "sgd", "rmsprop")


def _refusal(config: dict[str, Any]) -> str | None:
    """Return why DeepSpeed refuses a config, or None."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed guesses, with a warning
    # Slow to import, and optional. It prints every valid setting for some mistakes.
    with contextlib.redirect_stdout(io.StringIO()), _silent_logs():
        try:
            from deepspeed.runtime import config as deepspeed_config
            from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES
        except ImportError:
            return "it is not installed (pip install deepspeed)"
        try:
            chosen = _without_auto(config) | {"train_micro_batch_size_per_gpu": 1}
            chosen = {key: chosen[key] for key in chosen if key not in _BATCH}
            deepspeed_config.DeepSpeedConfig(chosen)
        except Exception as error:  # AssertionError, AttributeError, TypeError, ValidationError, …
            return one_line(error, 300) or type(error).__name__
    optimizer = (chosen.get("optimizer") or {}).get("type", "Adam")
    known = {*deepspeed_config.DEEPSPEED_OPTIMIZERS, *(n.lower() for n in dir(torch.optim))}
    if not isinstance(optimizer, str) or optimizer.lower() not in known:
        return f"unknown optimizer {optimizer!r:.40}"
    if optimizer.lower() not in NAMED:
        names = ", ".join(NAMED)
        return f"no checkpoint could store the state of {optimizer} by name; use one of {names}"
    offload = (chosen.get("zero_optimization") or {}).get("offload_optimizer") or {}
    if offload.get("device") == "nvme" or offload.get("ratio", 1) != 1:
        return "offload_optimizer must be whole and to the device cpu, so that it can be saved"
    scheduler = (chosen.get("scheduler") or {}).get("type", VALID_LR_SCHEDULES[0])
    if scheduler not in VALID_LR_SCHEDULES:
        return f"unknown scheduler {scheduler!r:.40}"
    return None


# Trainer compares these with the run's own settings.
_BATCH = ("train_batch_size", "gradient_accumulation_steps")


def _without_auto(value: Any) -> Any:
    """Return a config without the values that Trainer fills in."""
    if not isinstance(value, dict):
        return value
    return {key: _without_auto(part) for key, part in value.items() if part != "auto"}


@contextlib.contextmanager
def _silent_logs() -> Any:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
