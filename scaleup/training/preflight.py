"""Checks of a config that read files or build the model without weights.

    settings = load(path, overrides, checks=CHECKS)

Types are checked by the schema, and rules that need no files in `scaleup.settings.rules`.
"""

import copy
import functools
import os
import pathlib
import re
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from scaleup.backbone import loading as backbone
from scaleup.backbone.folder import (
    folder_problems,
    has_tokenizer,
    read_config,
    size_problems,
    state,
)
from scaleup.backbone.kernels import check_kernels
from scaleup.backbone.lengths import length_problems
from scaleup.backbone.method import apply_method, checkpointing_problems
from scaleup.backbone.tokenizer import load_tokenizer
from scaleup.data import tasks
from scaleup.errors import ConfigError, one_line
from scaleup.settings.data import DataSettings
from scaleup.settings.derived import Section
from scaleup.settings.presets import zero_stage
from scaleup.settings.schema import MethodSettings, ModelSettings, Settings, TrainSettings
from scaleup.training.deepspeed_file import deepspeed_problems, section_problems
from scaleup.training.output_folder import output_folder_problems
from scaleup.unipelt.probe import not_for_texts
from scaleup.unipelt.sites import EAGER_ONLY, PACKS, TESTED, head_names
from scaleup.unipelt.submodules import SUBMODULES


def packing_problems(data: DataSettings, config: PretrainedConfig) -> list[str]:
    """Check that packed texts do not see each other in this model."""
    if not data.packing or config.model_type in PACKS:
        return []
    problem = f"{config.model_type} is not known to keep packed texts apart"
    return [f"data.packing: {problem} (known: {', '.join(PACKS)}); leave it out"]


# Settings of the method that not every supported model can have, and the value that all can.
UNEVEN = {"lora_gate_scope": "attention", "prefix_positions": "none"}


def hub_structure(settings: Settings, config: PretrainedConfig) -> list[str]:
    """Check a model of the hub, once its config is loaded, as `model_config` checks a folder."""
    model = settings.model
    local = pathlib.Path(model.name).is_dir()
    return [] if local else _structure_problems(model, settings.method, settings.data, config)


def _structure_problems(
    model: ModelSettings, method: MethodSettings, data: DataSettings, config: PretrainedConfig
) -> list[str]:
    completes, auto = data.resolved_task == "causal_lm", tasks.of(data).auto
    if type(config) not in auto._model_mapping:
        return []  # `model_config` reports a model that cannot do the task
    if method.name != "unipelt" and not completes:
        return _attaching_problems(model, method, config, auto)
    known = config.model_type in TESTED
    eager_only = model.attention != "eager" and config.model_type in EAGER_ONLY
    if not completes and known and not eager_only and model.attention != "flash":
        return _attaching_problems(model, method, config, auto)
    attentions, problem = backbone.find_attentions(config, model.attention, auto)
    if problem is not None and problem.startswith("model.attention"):
        return [problem]
    if problem is not None and model.attention != "eager":
        attentions, eager_problem = backbone.find_attentions(config, "eager", auto)
        reason = problem.partition(".")[0].partition(";")[0]
        problem = eager_problem or (
            f"its {model.attention} attention cannot be used ({reason}); set model.attention=eager"
        )
    if completes and problem is None and not any(site.causal for site in attentions):
        return [
            f"model.name: {model.name} ({config.model_type}) reads in both directions and would see"
            " the tokens that it is to predict; data.task causal_lm needs a decoder like GPT-2,"
            " Llama or Qwen"
        ]
    if method.name != "unipelt":
        return [] if problem is not None else _attaching_problems(model, method, config, auto)
    problems = [] if problem is None else [problem[:300]]
    for name in method.submodules:
        try:
            SUBMODULES[name].check(attentions)
        except ValueError as error:
            problems.append(str(error))
    if not problems:
        return _attaching_problems(model, method, config, auto)
    return [f"model.name: {model.name}: {problem}" for problem in problems]


def _attaching_problems(
    model: ModelSettings, method: MethodSettings, config: PretrainedConfig, auto: Any
) -> list[str]:
    """Attach the method to an empty model, if a setting of it may not suit this model."""
    usual = method.name == "unipelt" and UNEVEN.items() <= method.model_dump().items()
    if method.name == "full" or usual:
        return []
    attention = model.attention if method.name == "unipelt" else "eager"
    empty = backbone.empty_model(copy.deepcopy(config), attention, None, auto)
    try:
        with torch.random.fork_rng(devices=[]):  # a run's random numbers must not change
            apply_method(empty, method)
    except ConfigError as error:
        return error.problems
    except ValueError as error:
        return [f"method.{one_line(error, 300)}"]
    return []


def _head_problems(model: ModelSettings, data: DataSettings, config: PretrainedConfig) -> list[str]:
    """Check that the head has the bias that model.head_bias=prior sets."""
    if model.head_bias != "prior":
        return []
    empty = backbone.empty_model(config, model.attention, None, tasks.of(data).auto)
    linear = [
        module
        for name in head_names(empty)
        for module in empty.get_submodule(name).modules()
        if isinstance(module, nn.Linear)
    ]
    return [backbone.no_bias(type(empty).__name__)] if linear and linear[-1].bias is None else []


@functools.lru_cache(maxsize=64)  # a sweep checks the same model for every trial
def _unusable(settings: str, task: str, _state: tuple[object, ...]) -> tuple[str, ...]:
    """Check that a folder describes a model, and that its tokenizer loads and fits the model.

    Args:
        settings: `ModelSettings` as JSON.
        task: kind of task.
    """
    model, auto = ModelSettings.model_validate_json(settings), tasks.TASKS[task].auto
    config = AutoConfig.from_pretrained(model.name, trust_remote_code=model.trust_remote_code)
    if type(config) not in auto._model_mapping:
        return ()
    try:
        with torch.random.fork_rng(devices=[]):  # a run's random numbers must not change
            backbone.empty_model(copy.deepcopy(config), "eager", None, auto)
    except Exception as error:  # a size of 0, an unknown activation, a pad token out of range, …
        reason = one_line(error, 200) or type(error).__name__
        return (f"model.name: {model.name}/config.json describes no model: {reason}",)
    if has_tokenizer(pathlib.Path(model.name)):
        try:
            load_tokenizer(model, config, auto)
        except ConfigError as error:
            return tuple(error.problems)
    return ()


def model_folder(sections: dict[str, Section]) -> list[str]:
    """Check that model.name is the folder of a model, or looks like the id of one on the hub."""
    model = sections.get("model")
    if not isinstance(model, ModelSettings):
        return []
    name = model.name
    # os.path answers False where pathlib raises: for names too long and folders without access.
    if os.path.exists(name):
        if os.path.isfile(os.path.join(name, "config.json")):
            return []
        return [f"model.name: {name} has no config.json; give the folder of a transformers model"]
    # A name beside existing folders is a misspelt path, even if it looks like a hub id.
    parent = os.path.dirname(name)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not (parent and os.path.isdir(parent)):
        return []
    advice = "give an existing folder or a hub id like facebook/bart-large"
    return [f"model.name: no folder {name}; {advice}"]


def output_folder(sections: dict[str, Section]) -> list[str]:
    """Check that the run can write into its folder."""
    train = sections.get("train")
    return output_folder_problems(train) if isinstance(train, TrainSettings) else []


def deepspeed_file(sections: dict[str, Section]) -> list[str]:
    """Check the DeepSpeed config."""
    train = sections.get("train")
    if not isinstance(train, TrainSettings):
        return []
    problems = deepspeed_problems(train.deepspeed)
    if not problems:
        problems = _writing_problems(sections.get("data"), train)
    return problems + section_problems(train)


def _writing_problems(data: Section | None, train: TrainSettings) -> list[str]:
    """Refuse metrics of written text where each token would gather all weights of the model."""
    metric = tasks.metric(data) if isinstance(data, DataSettings) else None
    engine = "FSDP" if train.fsdp else "ZeRO-3"
    if metric in (None, "loss") or not (train.fsdp or zero_stage(train.deepspeed) == 3):
        return []
    return [
        f"data.metric: for {metric}, {engine} would gather the whole model for each written token; "
        "use data.metric=loss, and afterwards score RUN/best on one device with "
        f"scaleup export --metric {metric}; or use zero2"
    ]


def model_files(sections: dict[str, Section]) -> list[str]:
    """Check the files of a model folder, without code that comes with the model."""
    model = sections.get("model")
    if not isinstance(model, ModelSettings):
        return []
    folder = pathlib.Path(model.name)
    if not os.path.isfile(folder / "config.json"):
        return []
    problems = folder_problems(folder)
    try:
        problems += size_problems(folder, read_config(folder))[:5]
    except ConfigError as error:
        problems = problems or error.problems
    return problems


def model_config(sections: dict[str, Section]) -> list[str]:
    """Check that a model folder is complete, and that data and method can use its model."""
    names = ("model", "method", "data", "train")
    model, method, data, train = (sections.get(name) for name in names)
    if not isinstance(model, ModelSettings):
        return []
    folder = pathlib.Path(model.name)
    if not os.path.isfile(folder / "config.json"):
        return []
    if problems := model_files(sections):
        return problems
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # transformers raises all kinds for a damaged config.json
        reason = one_line(error, 200)
        return [f"model.name: {folder}/config.json is not a usable model config: {reason}"]
    if sizes := size_problems(folder, config.to_dict()):
        return sizes[:5]
    if not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
        problems.append(f"model.name: {folder} has no weights (*.safetensors or *.bin)")
    if not isinstance(data, DataSettings):
        return problems
    if problems:
        return problems
    problems = list(_unusable(model.model_dump_json(), data.resolved_task, state(folder)))
    if problems:
        return problems
    problems += length_problems(data, model, config, defaults=False)
    if type(config) in tasks.of(data).auto._model_mapping:
        problems += packing_problems(data, config) + _head_problems(model, data, config)
    elif not model.trust_remote_code:
        kind = f"{config.model_type} model for data.task {data.resolved_task}"
        why = not_for_texts(config)
        problems.append(f"model.name: transformers has no {kind}" + (f": {why}" if why else ""))
    if isinstance(train, TrainSettings):
        problems += checkpointing_problems(train, config, tasks.of(data).auto)
    if isinstance(method, MethodSettings):
        problems += _structure_problems(model, method, data, config)
    return problems


def environment(sections: dict[str, Section]) -> list[str]:
    """Check the environment variables that choose how a run computes."""
    try:
        check_kernels()
    except ConfigError as error:
        return error.problems
    return []


# `plan` only reads: the output folder may hold a run. `train` checks that folder too.
READING_CHECKS = (environment, model_folder, deepspeed_file, tasks.check, model_config)
CHECKS = (output_folder, *READING_CHECKS)
