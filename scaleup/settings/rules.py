"""Rules between valid settings that need no files: impossible combinations, idle settings."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from scaleup.settings.data_rules import (
    GENERATES,
    data_problems,
    head_bias_problems,
    idle_data,
    smoothing_problems,
    streaming_problems,
)
from scaleup.unipelt.submodules import SUBMODULES

ZERO_PRESETS = ("zero1", "zero2", "zero3", "zero3_hpz", "zero3_offload")

_INSTEAD = {
    "a run always trains": "do_train",
    "a run always evaluates": "do_eval",
    "a run always scores the test set once": "do_predict",
    "use train.resume": "resume_from_checkpoint",
    "the best checkpoint is always restored": "load_best_model_at_end",
    "use data.metric": "metric_for_best_model",
    "it follows from data.metric": "greater_is_better",
    "it follows from the task": "label_names",
    "columns are chosen by data.*": "remove_unused_columns",
    "metrics need predictions": "prediction_loss_only",
    "metrics need predictions only": "include_for_metrics",
    "metrics are computed over the whole set": "batch_eval_metrics eval_do_concat_batches",
    "the launcher sets it": "local_rank",
    "processes talk through NCCL on GPUs and through gloo on CPUs": "ddp_backend",
    "scaleup configures Accelerate": "accelerator_config",
    "use train.seed for the order of batches and data.seed for the choice of examples": "data_seed",
    "log in with `hf auth login`, or set HF_TOKEN": "hub_token",
    "the best checkpoint is uploaded at the end, to the branch main; use scaleup push for others": (
        "hub_strategy hub_always_push hub_revision"
    ),
    "the run computes the lengths": "length_column_name",
    "it would change the batch size of the method silently; "
    "set train.per_device_train_batch_size": "auto_find_batch_size",
    "use train.fsdp or train.deepspeed": "fsdp_config parallelism_config",
    "training needs no cache": "use_cache",
    "a resumed run always continues with the batch at which it stopped": "ignore_data_skip",
    "predictions are gathered as tensors": "eval_use_gather_object",
    "early stopping always resumes with the run": "restore_callback_states_from_checkpoint",
    "use train.keep_checkpoints": "save_total_limit",
    "the run finds out whether hosts share the folder": "save_on_each_node",
    "use train.group_by_length": "train_sampling_strategy",
    "a run can always be resumed": "save_only_model",
    "a run saves on SIGTERM anyway": "enable_jit_checkpoint",
}
MANAGED = {name: reason for reason, names in _INSTEAD.items() for name in names.split()}
"""Fields of TrainingArguments that the run itself decides → the reason, or what to use instead."""


def without_effect(sections: Mapping[str, Any]) -> dict[str, str]:
    """Return each setting that nothing reads in this run as `section.key` → the reason."""
    model, method, data, train = _unpack(sections)
    idle: dict[str, str] = {}
    if method is not None:
        idle |= {f"method.{key}": reason for key, reason in _idle_method(method).items()}
    if data is not None:
        idle |= {f"data.{key}": reason for key, reason in idle_data(data).items()}
    if data is not None and data.task in GENERATES:
        reason = f"data.task is {data.task}, which has no head"
        if model is not None:
            idle["model.head_bias"] = reason
        if method is not None:
            idle["method.head"] = reason
    if data is not None and train is not None:
        key = "train.group_by_length"
        if data.packing:
            idle[key] = "data.packing makes every row about the same length"
        if data.pad_to_max_length:
            idle[key] = "data.pad_to_max_length makes every batch the same length"
        if data.streaming:
            idle[key] = "data.streaming takes the rows as they come"
            idle["train.num_train_epochs"] = "with data.streaming, train.max_steps ends training"
    if train is not None and not train.push_to_hub:
        keys = ("train.hub_model_id", "train.hub_private_repo")
        idle |= dict.fromkeys(keys, "train.push_to_hub is off")
    learned = method is None or (method.name == "unipelt" and method.resolved_gates == "learned")
    if train is not None and not learned:
        idle["train.gate_learning_rate"] = "there are no learned gates"
    if train is not None and train.eval_strategy != "steps":
        reason = "train.eval_strategy is not steps"
        idle |= dict.fromkeys(("train.eval_steps", "train.save_steps"), reason)
    if train is not None and not train.gradient_checkpointing:
        idle["train.gradient_checkpointing_kwargs"] = "train.gradient_checkpointing is off"
    return idle


def impossible(sections: Mapping[str, Any]) -> list[str]:
    """Return one sentence for each combination of settings that cannot work.

    Rules about sections that are missing are skipped.
    """
    model, method, data, train = _unpack(sections)
    problems = []
    quantized = model is not None and model.quantization != "none"
    if quantized and method is not None and method.name != "unipelt":
        problems.append(
            f"model.quantization: {model.quantization} weights are frozen; method.name "
            f"{method.name} trains them: use none"
        )
    if model is not None and train is not None and model.attention == "flash":
        problems += _flash_problems(model, data, train)
    if train is not None and train.cuda_graphs:
        problems += _graph_problems(train, quantized)
    if train is not None and train.fsdp is not None:
        problems += _fsdp_problems(train, model, method)
    if data is not None:
        problems += data_problems(data, method)
        if data.streaming:
            problems += streaming_problems(data, train)
        if model is not None:
            problems += head_bias_problems(model, data)
    if train is not None:
        problems += _train_problems(train)
    if data is not None and train is not None and train.label_smoothing_factor:
        problems += smoothing_problems(data)
    return problems


def _flash_problems(model: Any, data: Any, train: Any) -> list[str]:
    problems = []
    if not (train.bf16 or train.fp16 or model.dtype in ("bfloat16", "float16")):
        problems.append(
            "model.attention: flash computes in half precision; set train.bf16=true, or "
            "model.attention=sdpa"
        )
    if data is not None and data.packing and (train.torch_compile or train.cuda_graphs):
        name = "train.torch_compile" if train.torch_compile else "train.cuda_graphs"
        problems.append(
            f"data.packing: with {name}, flash attention takes one text per row; set "
            "model.attention=sdpa"
        )
    return problems


def _unpack(sections: Mapping[str, Any]) -> tuple[Any, Any, Any, Any]:
    return tuple(sections.get(name) for name in ("model", "method", "data", "train"))  # type: ignore[return-value]


def _idle_method(method: Any) -> dict[str, str]:
    if method.name != "unipelt":
        return {
            key: f"method.name is {method.name}"
            for key in type(method).model_fields
            if key not in ("name", "head")
        }
    idle: dict[str, str] = {}
    if method.prefix_reparameterization == "none":
        idle["prefix_hidden_size"] = "method.prefix_reparameterization is none"
    if method.resolved_gates != "learned":
        of_gates = ("gate_pooling", "gate_bias", "lora_gate")
        idle |= dict.fromkeys(of_gates, "there are no learned gates")
    elif method.lora_gate == "replace":
        idle |= dict.fromkeys(("lora_alpha", "use_rslora"), "a learned gate replaces alpha/r")
    for name, submodule in SUBMODULES.items():
        if name not in method.submodules:
            keys = [field.name for field in dataclasses.fields(submodule.options)]
            idle |= dict.fromkeys(keys, f"{name} is not among method.submodules")
    return idle


def _graph_problems(train: Any, quantized: bool) -> list[str]:
    others = {
        "train.deepspeed": train.deepspeed is not None,
        "train.gradient_checkpointing": train.gradient_checkpointing,
        "train.torch_compile": train.torch_compile,
        "train.use_cpu": train.use_cpu,
        "model.quantization": quantized,
    }
    problem = "cannot record steps with"
    return [
        f"train.cuda_graphs: {problem} {name}; leave one of them out"
        for name, wanted in others.items()
        if wanted
    ]


def _fsdp_problems(train: Any, model: Any, method: Any) -> list[str]:
    others = {
        "train.deepspeed": train.deepspeed is not None,
        "train.cuda_graphs": train.cuda_graphs,
        "train.torch_compile": train.torch_compile,
        "train.fp16 (it computes in bfloat16 or float32)": train.fp16,
    }
    problems = [
        f"train.fsdp: cannot be combined with {name}; leave one of them out"
        for name, wanted in others.items()
        if wanted
    ]
    if model is not None and model.quantization == "nf4":
        problems.append(
            "train.fsdp: cannot shard the nf4 weights of bitsandbytes; use model.quantization=8bit,"
            " for which scaleup has a layer of its own, or train.deepspeed=zero3"
        )
    if method is not None and method.name != "unipelt":
        problems.append(
            f"train.fsdp: shards frozen weights, and method.name {method.name} trains those of the "
            "backbone; use train.deepspeed=zero3"
        )
    return problems


def _train_problems(train: Any) -> list[str]:
    problems = []
    if train.max_steps == 0:
        problems.append("train.max_steps: 0 steps train nothing; -1 leaves it to num_train_epochs")
    if train.push_to_hub and train.hub_model_id is None:
        problems.append("train.push_to_hub: set train.hub_model_id=USER/NAME, the repository")
    if train.bf16 is True and train.fp16:
        problems.append("train.fp16: train.bf16 is on already; choose one")
    arguments = train.gradient_checkpointing_kwargs
    if isinstance(arguments, str):  # Trainer reads a text as JSON
        problems.append("train.gradient_checkpointing_kwargs: write a mapping, not a text")
    elif arguments and arguments.get("use_reentrant", False) is not False:
        problems.append(
            "train.gradient_checkpointing_kwargs: use_reentrant loses the gradient of the prefix; "
            "leave it out"
        )
    if train.deepspeed is not None and train.use_cpu:
        problems.append(
            "train.use_cpu: Accelerate drops DeepSpeed silently with it; hide GPUs with "
            "CUDA_VISIBLE_DEVICES= instead"
        )
    return problems
