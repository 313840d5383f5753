"""What a valid config may still get wrong: combinations that cannot work, and settings that nothing would read."""

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

SUBMODULES = ("adapter", "prefix", "lora")
ZERO_PRESETS = ("zero1", "zero2", "zero3", "zero3_offload")


def without_effect(sections: Mapping[str, Any]) -> dict[str, str]:
    """Settings that nothing would read in this run: `section.key` -> why."""
    idle: dict[str, str] = {}
    method, data, train = sections.get("method"), sections.get("data"), sections.get("train")
    if method is not None:
        if method.name != "unipelt":
            idle |= {f"method.{k}": f"method.name is {method.name}" for k in type(method).model_fields if k != "name"}
        else:
            for part in SUBMODULES:
                if part not in method.submodules:
                    keys = [k for k in type(method).model_fields if k.startswith(part + "_") or (part == "lora" and k == "r")]
                    idle |= {f"method.{k}": f"{part} is not among method.submodules" for k in keys}
            if method.prefix_reparameterization == "none":
                idle.setdefault("method.prefix_hidden_size", "method.prefix_reparameterization is none")
            if method.resolved_gates == "learned":
                idle.setdefault("method.lora_alpha", "a learned gate replaces alpha/r")
            else:
                idle["method.gate_pooling"] = "there are no learned gates"
    if data is not None:
        own_columns = ("train_file", "validation_file", "test_file", "text_column", "text_pair_column", "label_column")
        if data.name is not None:
            idle |= {f"data.{k}": f"data.name is {data.name}" for k in own_columns}
        else:
            idle["data.path"] = "data.name is not set"
        if data.k == "all" and (data.name is not None or data.validation_file is not None):
            idle["data.dev_size"] = "with data.k all, the validation set is the development set"
            idle["data.seed"] = "with data.k all, nothing is sampled"
        if data.name is None and data.validation_file is not None:
            idle["data.dev_size"] = "data.validation_file is the development set"
        if data.pad_to_max_length and train is not None:
            idle["train.group_by_length"] = "data.pad_to_max_length makes every batch the same length"
    if train is not None and not train.gradient_checkpointing:
        idle["train.gradient_checkpointing_kwargs"] = "train.gradient_checkpointing is off"
    return idle


def impossible(sections: Mapping[str, Any]) -> list[str]:
    """Combinations that cannot work, across sections; only over the sections that are valid by themselves."""
    problems = []
    model, method, data, train = (sections.get(name) for name in ("model", "method", "data", "train"))
    if model is not None and method is not None and model.quantization != "none" and method.name != "unipelt":
        problems.append(f"model.quantization: {model.quantization} weights are frozen; method.name {method.name} trains them: use none")
    # os.path answers no where pathlib raises: names too long, folders we may not enter.
    if model is not None and os.path.exists(model.name) and not os.path.isfile(os.path.join(model.name, "config.json")):
        problems.append(f"model.name: {model.name} has no config.json; give the folder of a transformers model")
    elif model is not None and not os.path.exists(model.name) and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model.name):
        problems.append(f"model.name: no folder {model.name}; give an existing folder or a hub id like facebook/bart-large")
    if data is not None and data.name is None and data.train_file is None:
        problems.append("data: set data.name (a GLUE task) or data.train_file (your own data)")
    if data is not None and data.name is not None:
        if data.task is not None and (data.task == "regression") != (data.name == "stsb"):
            problems.append(f"data.task: {data.task} does not fit data.name {data.name}; leave it out")
        if data.metric is not None and (data.metric == "spearman") != (data.name == "stsb"):
            problems.append(f"data.metric: {data.metric} does not fit data.name {data.name}; leave it out")
    elif data is not None and data.metric is not None and (data.metric == "spearman") != (data.task == "regression"):
        problems.append(f"data.metric: {data.metric} does not fit data.task {data.task or 'sequence_classification'}")
    if train is None:
        return problems
    if train.bf16 is True and train.fp16:
        problems.append("train.fp16: train.bf16 is on already; choose one")
    kwargs = train.gradient_checkpointing_kwargs or {}
    if isinstance(kwargs, dict) and kwargs.get("use_reentrant"):
        problems.append("train.gradient_checkpointing_kwargs: use_reentrant loses the gradient of the prefix; leave it out")
    if train.deepspeed is not None:
        if train.deepspeed not in ZERO_PRESETS and not os.path.isfile(train.deepspeed):
            problems.append(f"train.deepspeed: {train.deepspeed} is neither a file nor one of {', '.join(ZERO_PRESETS)}")
        if train.use_cpu:
            problems.append("train.use_cpu: Accelerate drops DeepSpeed silently with it; hide GPUs with CUDA_VISIBLE_DEVICES= instead")
    return problems + _output_problems(train)


def _output_problems(train: Any) -> list[str]:
    if "\0" in train.output_dir:
        return ["train.output_dir: a path cannot hold a null character"]
    out = pathlib.Path(train.output_dir)
    try:
        if out.exists() and not out.is_dir():
            return [f"train.output_dir: {out} is a file"]
        # A run that died before its first checkpoint leaves files too; nothing of an earlier run is ever overwritten.
        if out.is_dir() and any(out.iterdir()) and train.resume == "never":
            return [f"train.output_dir: {out} is not empty; choose another, or set train.resume=auto to continue that run"]
    except OSError as error:
        return [f"train.output_dir: cannot be used: {error.strerror}"]
    return []
