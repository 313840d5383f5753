"""Rules between valid settings that need no files: impossible combinations, idle settings."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from scaleup.unipelt.submodules import SUBMODULES

ZERO_PRESETS = ("zero1", "zero2", "zero3", "zero3_hpz", "zero3_offload")

METRICS = {
    "sequence_classification": ("accuracy", "f1", "matthews"),
    "regression": ("spearman",),
    "seq2seq": ("bleu", "rouge_l", "exact_match", "loss"),
    "causal_lm": ("loss", "bleu", "rouge_l", "exact_match"),
}
GENERATES = ("seq2seq", "causal_lm")

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
        idle |= {f"data.{key}": reason for key, reason in _idle_data(data).items()}
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
        problems += _data_problems(data, method)
        if data.streaming:
            problems += _streaming_problems(data, train)
    if train is not None:
        problems += _train_problems(train)
    if data is not None and train is not None and train.label_smoothing_factor:
        if data.resolved_task == "regression":
            problems.append(
                "train.label_smoothing_factor: there are no classes to smooth in a regression; "
                "leave it out"
            )
        if data.task == "seq2seq":
            problems.append(
                "train.label_smoothing_factor: Trainer takes the targets away before the decoder "
                "can read them; leave it out with data.task seq2seq"
            )
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
        idle["lora_alpha"] = "a learned gate replaces alpha/r"
    for name, submodule in SUBMODULES.items():
        if name not in method.submodules:
            keys = [field.name for field in dataclasses.fields(submodule.options)]
            idle |= dict.fromkeys(keys, f"{name} is not among method.submodules")
    return idle


def _idle_data(data: Any) -> dict[str, str]:
    own_files = (
        "train_file validation_file test_file text_column text_pair_column label_column "
        "sources subset train_split validation_split test_split"
    )
    of_generation = (
        "target_column messages_column train_on prompt_template max_target_length num_beams packing"
    )
    of_classification = "text_pair_column label_column"
    task, generates = data.task or "sequence_classification", data.task in GENERATES
    idle: dict[str, str] = {}
    if data.name is not None:
        idle |= dict.fromkeys(own_files.split(), f"data.name is {data.name}")
    elif data.path is None:
        of_hub = ("subset", "revision", "train_split", "validation_split", "test_split")
        idle |= dict.fromkeys(of_hub, "data.path is not set")
    keys = of_classification if generates else of_generation
    idle |= dict.fromkeys(keys.split(), f"data.task is {task}")
    if not data.streaming:
        idle["shuffle_buffer"] = "data.streaming is off"
    if generates and data.messages_column is None:
        idle["train_on"] = "data.messages_column is not set"
    if generates and data.messages_column is not None:
        of_texts = ("text_column", "target_column", "prompt_template")
        idle |= dict.fromkeys(of_texts, "data.messages_column is set")
    by_loss = data.metric == "loss" or (data.metric is None and task == "causal_lm")
    if generates and by_loss:
        idle["num_beams"] = "data.metric is loss: nothing is written"
        if task == "causal_lm":
            idle["max_target_length"] = "data.metric is loss: nothing is written"
    own_validation = data.name is None and data.has_validation
    if data.k == "all" and (data.name is not None or own_validation):
        idle["dev_size"] = "with data.k all, the validation set is the development set"
        if not data.streaming:
            idle["seed"] = "with data.k all, nothing is sampled"
    if data.name is not None and data.k == "all":
        idle["test_size"] = "with data.k all, the development set is the test set"
    elif data.name is None and data.test_file is None and data.test_split is None:
        idle["test_size"] = "data.test_file is not set"
    if own_validation:
        key = "validation_file" if data.validation_file is not None else "validation_split"
        idle["dev_size"] = f"data.{key} is the development set"
    return idle


def _data_problems(data: Any, method: Any) -> list[str]:
    problems = []
    places = [key for key in ("train_file", "path", "sources") if getattr(data, key)]
    if data.name is None and not places:
        problems.append(
            "data: set data.name (a GLUE task), data.train_file (your own data), data.path (a data "
            "set on the hub) or data.sources (several of them)"
        )
    if data.name is None and len(places) > 1:
        problems.append(f"data.{places[1]}: data.{places[0]} is set, too; leave one of them out")
    for split in ("validation", "test"):
        if getattr(data, f"{split}_file") and getattr(data, f"{split}_split"):
            problems.append(
                f"data.{split}_split: data.{split}_file is set, too; leave one of them out"
            )
    default_task = "regression" if data.name == "stsb" else "sequence_classification"
    task = data.resolved_task
    if data.name is not None and task != default_task:
        return [f"data.task: {data.task} does not fit data.name {data.name}; leave it out"]
    if data.metric is not None and data.metric not in METRICS[task]:
        subject, advice = f"data.name {data.name}", "leave it out"
        if data.name is None:
            subject, advice = f"data.task {task}", f"it takes {', '.join(METRICS[task])}"
        problems.append(f"data.metric: {data.metric} does not fit {subject}; {advice}")
    if data.messages_column is not None and task == "seq2seq":
        problems.append(
            "data.messages_column: chats are for data.task causal_lm; seq2seq takes text_column "
            "and target_column"
        )
    if data.packing and task == "seq2seq":
        problems.append("data.packing: texts are packed with data.task causal_lm only")
    if data.packing and data.pad_to_max_length:
        problems.append("data.pad_to_max_length: packed rows need no padding; leave it out")
    learned = method is not None and method.name == "unipelt" and method.resolved_gates == "learned"
    if learned and method.gate_pooling == "paper" and task in GENERATES:
        problems.append(
            "method.gate_pooling: with paper, the gates of a decoder see later tokens; use auto "
            f"for data.task {task}"
        )
    return problems


def _streaming_problems(data: Any, train: Any) -> list[str]:
    if data.task not in GENERATES:
        return [
            "data.streaming: reads texts for data.task seq2seq and causal_lm only; leave it out"
        ]
    problems = []
    if not data.has_validation:
        problems.append(
            "data.streaming: nothing can be cut from a stream for development; give "
            "data.validation_file or data.validation_split"
        )
    if data.k != "all":
        problems.append(f"data.k: {data.k} rows cannot be drawn from a stream; use all")
    if train is not None and train.max_steps < 1:
        problems.append("data.streaming: a stream has no end; set train.max_steps")
    if train is not None and train.eval_strategy != "steps":
        problems.append(
            "data.streaming: a stream has no epochs; set train.eval_strategy=steps and "
            "train.eval_steps"
        )
    if train is not None and train.dataloader_num_workers:
        problems.append(
            "train.dataloader_num_workers: the run itself reads a stream; use 0 with data.streaming"
        )
    return problems


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
    if isinstance(arguments, dict) and arguments.get("use_reentrant"):
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
