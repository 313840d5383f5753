"""What a valid config may still get wrong: combinations that cannot work, and settings that nothing would read."""

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from scaleup.io import LOCK
from scaleup.unipelt.submodules import SUBMODULES

# What the scheduler of a cluster writes into a run's folder itself.
LOGS_OF_OTHERS = (".out", ".err")
# Of a run's folder: unfinished, on its way out, or a probe of who shares it; other hidden files are somebody's.
OURS = re.compile(
    r"\.(checkpoint-\d+|best|final)\.(old|draft|gone)|\.\w+\.(yaml|jsonl?)\.part|\.probe-[0-9a-f]+"
)
ASIDE = re.compile(r"before-(\d+)")  # results of a run that went on under other settings
ZERO_PRESETS = ("zero1", "zero2", "zero3", "zero3_offload")


# Fields of TrainingArguments that the run itself decides, and what to use instead.
MANAGED = {
    "do_train": "a run always trains",
    "do_eval": "a run always evaluates",
    "do_predict": "a run always scores the test set once",
    "resume_from_checkpoint": "use train.resume",
    "load_best_model_at_end": "the best checkpoint is always restored",
    "metric_for_best_model": "use data.metric",
    "greater_is_better": "follows from data.metric",
    "label_names": "follows from the task",
    "remove_unused_columns": "columns are chosen by data.*",
    "prediction_loss_only": "metrics need predictions",
    "include_for_metrics": "metrics need predictions only",
    "batch_eval_metrics": "metrics are computed over the whole set",
    "local_rank": "the launcher sets it",
    "accelerator_config": "scaleup configures Accelerate",
    "data_seed": "use train.seed for the order of batches, data.seed for the choice of examples",
    "push_to_hub": "export the run, then upload the folder",
    "hub_token": "export the run, then upload the folder",
    "hub_private_repo": "export the run, then upload the folder",
    "hub_model_id": "export the run, then upload the folder",
    "hub_strategy": "export the run, then upload the folder",
    "hub_always_push": "export the run, then upload the folder",
    "hub_revision": "export the run, then upload the folder",
    "length_column_name": "lengths are computed by the run",
    "auto_find_batch_size": "it would change the method's batch size silently; set train.per_device_train_batch_size",
    "fsdp": "use train.deepspeed",
    "fsdp_config": "use train.deepspeed",
    "parallelism_config": "use train.deepspeed",
    "use_cache": "no cache is needed in training",
    "ignore_data_skip": "a resumed run always continues with the batch it stopped at",
    "eval_do_concat_batches": "metrics are computed over the whole set",
    "eval_use_gather_object": "predictions are gathered as tensors",
    "restore_callback_states_from_checkpoint": "early stopping always resumes with the run",
    "save_total_limit": "use train.keep_checkpoints",
    "save_on_each_node": "found out by the run",
    "train_sampling_strategy": "use train.group_by_length",
    "save_only_model": "a run can always be resumed",
}


def without_effect(sections: Mapping[str, Any]) -> dict[str, str]:
    """Settings that nothing would read in this run: `section.key` -> why."""
    idle: dict[str, str] = {}
    method, data, train = sections.get("method"), sections.get("data"), sections.get("train")
    if method is not None:
        if method.name != "unipelt":
            idle |= {
                f"method.{k}": f"method.name is {method.name}"
                for k in type(method).model_fields
                if k != "name"
            }
        else:
            for part in SUBMODULES:
                if part not in method.submodules:
                    keys = [
                        k
                        for k in type(method).model_fields
                        if k.startswith(part + "_") or (part == "lora" and k == "r")
                    ]
                    idle |= {f"method.{k}": f"{part} is not among method.submodules" for k in keys}
            if method.prefix_reparameterization == "none":
                idle.setdefault(
                    "method.prefix_hidden_size", "method.prefix_reparameterization is none"
                )
            if method.resolved_gates == "learned":
                idle.setdefault("method.lora_alpha", "a learned gate replaces alpha/r")
            else:
                idle["method.gate_pooling"] = "there are no learned gates"
    if data is not None:
        own_columns = (
            "train_file",
            "validation_file",
            "test_file",
            "text_column",
            "text_pair_column",
            "label_column",
        )
        if data.name is not None:
            idle |= {f"data.{k}": f"data.name is {data.name}" for k in own_columns}
        else:
            idle["data.path"] = "data.name is not set"
        writes = data.task in ("seq2seq", "causal_lm")
        written = ("target_column", "messages_column", "max_target_length", "num_beams", "packing")
        for key in ("text_pair_column", "label_column") if writes else written:
            idle[f"data.{key}"] = f"data.task is {data.task or 'sequence_classification'}"
        if writes and sections.get("model") is not None:
            idle["model.head_bias"] = f"data.task is {data.task}, which has no head"
        if writes and data.messages_column is not None:
            idle |= {
                f"data.{key}": "data.messages_column is set"
                for key in ("text_column", "target_column")
            }
        if writes and data.metric == "loss" or (data.metric is None and data.task == "causal_lm"):
            idle["data.num_beams"] = "data.metric is loss: nothing is written"
            if data.task == "causal_lm":
                idle["data.max_target_length"] = "data.metric is loss: nothing is written"
        if data.packing and train is not None:
            idle["train.group_by_length"] = "data.packing makes every row about the same length"
        if data.k == "all" and (data.name is not None or data.validation_file is not None):
            idle["data.dev_size"] = "with data.k all, the validation set is the development set"
            idle["data.seed"] = "with data.k all, nothing is sampled"
        if data.name is None and data.validation_file is not None:
            idle["data.dev_size"] = "data.validation_file is the development set"
        if data.pad_to_max_length and train is not None:
            idle["train.group_by_length"] = (
                "data.pad_to_max_length makes every batch the same length"
            )
    if train is not None and not train.gradient_checkpointing:
        idle["train.gradient_checkpointing_kwargs"] = "train.gradient_checkpointing is off"
    return idle


def impossible(sections: Mapping[str, Any]) -> list[str]:
    """Combinations that cannot work, across sections; only over the sections that are valid by themselves."""
    problems = []
    model, method, data, train = (
        sections.get(name) for name in ("model", "method", "data", "train")
    )
    if (
        model is not None
        and method is not None
        and model.quantization != "none"
        and method.name != "unipelt"
    ):
        problems.append(
            f"model.quantization: {model.quantization} weights are frozen; method.name {method.name} trains them: use none"
        )
    # os.path answers no where pathlib raises: names too long, folders we may not enter.
    if (
        model is not None
        and os.path.exists(model.name)
        and not os.path.isfile(os.path.join(model.name, "config.json"))
    ):
        problems.append(
            f"model.name: {model.name} has no config.json; give the folder of a transformers model"
        )
    elif (
        model is not None
        and not os.path.exists(model.name)
        and (
            not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model.name)
            or os.path.isdir(
                os.path.dirname(model.name) or "/nowhere"
            )  # a slip in a path beside real folders
        )
    ):
        problems.append(
            f"model.name: no folder {model.name}; give an existing folder or a hub id like facebook/bart-large"
        )
    if data is not None and data.name is None and data.train_file is None:
        problems.append("data: set data.name (a GLUE task) or data.train_file (your own data)")
    if data is not None:
        problems += _task_problems(data, method)
    if train is None:
        return problems
    if train.max_steps == 0:
        problems.append("train.max_steps: 0 steps train nothing; -1 leaves it to num_train_epochs")
    if (
        data is not None
        and train.label_smoothing_factor
        and (data.task == "regression" or data.name == "stsb")
    ):
        problems.append(
            "train.label_smoothing_factor: there are no classes to smooth in a regression; leave it out"
        )
    if data is not None and train.label_smoothing_factor and data.task == "seq2seq":
        problems.append(
            "train.label_smoothing_factor: Trainer takes the targets away before the decoder can read them; leave it out with data.task seq2seq"
        )
    ranges = {
        "dataloader_num_workers": (0, 10**6),
        "eval_accumulation_steps": (1, 10**9),
        "adam_beta1": (0, 1 - 1e-9),
        "adam_beta2": (0, 1 - 1e-9),
    }
    for key, (low, high) in ranges.items():
        value = getattr(train, key)
        if value is not None and not low <= value <= high:
            problems.append(
                f"train.{key}: should be at least {low}{' and below 1' if high < 1 else ''} (got {value})"
            )
    if train.bf16 is True and train.fp16:
        problems.append("train.fp16: train.bf16 is on already; choose one")
    kwargs = train.gradient_checkpointing_kwargs or {}
    if isinstance(kwargs, dict) and kwargs.get("use_reentrant"):
        problems.append(
            "train.gradient_checkpointing_kwargs: use_reentrant loses the gradient of the prefix; leave it out"
        )
    if train.deepspeed is not None:
        if train.deepspeed not in ZERO_PRESETS and not os.path.isfile(train.deepspeed):
            problems.append(
                f"train.deepspeed: {train.deepspeed} is neither a file nor one of {', '.join(ZERO_PRESETS)}"
            )
        if train.use_cpu:
            problems.append(
                "train.use_cpu: Accelerate drops DeepSpeed silently with it; hide GPUs with CUDA_VISIBLE_DEVICES= instead"
            )
    return problems + _output_problems(train)


METRICS = {
    "sequence_classification": ("accuracy", "f1", "matthews"),
    "regression": ("spearman",),
    "seq2seq": ("bleu", "rouge_l", "exact_match", "loss"),
    "causal_lm": ("loss", "bleu", "rouge_l", "exact_match"),
}


def _task_problems(data: Any, method: Any) -> list[str]:
    """Data, task and metric that do not go together."""
    problems = []
    own = "regression" if data.name == "stsb" else "sequence_classification"
    task = data.task or own
    if data.name is not None and task != own:
        return [f"data.task: {data.task} does not fit data.name {data.name}; leave it out"]
    if data.metric is not None and data.metric not in METRICS[task]:
        advice = "leave it out" if data.name is not None else f"it takes {', '.join(METRICS[task])}"
        problems.append(
            f"data.metric: {data.metric} does not fit {f'data.name {data.name}' if data.name else f'data.task {task}'}; {advice}"
        )
    if data.messages_column is not None and data.task == "seq2seq":
        problems.append(
            "data.messages_column: chats are for data.task causal_lm; seq2seq takes text_column and target_column"
        )
    if data.packing and data.task == "seq2seq":
        problems.append("data.packing: texts are packed with data.task causal_lm only")
    if data.packing and data.pad_to_max_length:
        problems.append("data.pad_to_max_length: packed rows need none; leave it out")
    learned = method is not None and method.name == "unipelt" and method.resolved_gates == "learned"
    if learned and method.gate_pooling == "paper" and task in ("seq2seq", "causal_lm"):
        problems.append(
            f"method.gate_pooling: with paper a decoder's gates see later tokens; use auto for data.task {task}"
        )
    return problems


def _output_problems(train: Any) -> list[str]:
    if "\0" in train.output_dir:
        return ["train.output_dir: a path cannot hold a null character"]
    out = pathlib.Path(train.output_dir)
    try:
        nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
        if not nearest.is_dir():
            return [f"train.output_dir: {nearest} is a file"]
        if not os.access(nearest, os.W_OK | os.X_OK):
            return [f"train.output_dir: {nearest} cannot be written to"]
        # A run that died before its first checkpoint leaves files too; nothing of an earlier run is ever overwritten.
        names = (
            [
                path.name
                for path in out.iterdir()
                if path.name != LOCK and not OURS.fullmatch(path.name)
            ]
            if out.is_dir()
            else []
        )
        if names and train.resume == "never":
            return [
                f"train.output_dir: {out} is not empty; choose another, or set train.resume=auto to continue that run"
            ]
        # What a scheduler writes there itself is no run; without config.yaml nothing else is one either.
        others = [name for name in names if pathlib.Path(name).suffix not in LOGS_OF_OTHERS]
        if others and not (out / "config.yaml").is_file():
            return [
                f"train.output_dir: {out} holds {sorted(others)[0]} but no run (no config.yaml); choose another"
            ]
    except OSError as error:
        return [f"train.output_dir: cannot be used: {error.strerror}"]
    return []
