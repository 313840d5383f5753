"""Checks of a config that read files or build the model without weights.

    settings = load(path, overrides, checks=CHECKS)

Types are checked by the schema, and rules that need no files in `scaleup.settings.rules`.
"""

import os
import pathlib
import re

import torch
from torch import nn
from transformers import PretrainedConfig

from scaleup.backbone import loading as backbone
from scaleup.data import tasks
from scaleup.settings.rules import ZERO_PRESETS
from scaleup.settings.schema import (
    DataSettings,
    MethodSettings,
    ModelSettings,
    Section,
    Settings,
    TrainSettings,
)
from scaleup.training.output_folder import output_folder_problems
from scaleup.unipelt.sites import EAGER_ONLY, PACKS, TESTED, AttentionSite, find_sites, head_names


def packing_problems(data: DataSettings, config: PretrainedConfig) -> list[str]:
    """Check that packed texts do not see each other in this model."""
    if not data.packing or config.model_type in PACKS:
        return []
    return [
        f"data.packing: {config.model_type} is not known to keep packed texts apart"
        f" (known: {', '.join(PACKS)}); leave it out"
    ]


def structure(sections: dict[str, Section]) -> list[str]:
    """Check that the method finds its places in the model of a local folder."""
    model, method, data = (sections.get(name) for name in ("model", "method", "data"))
    if not isinstance(model, ModelSettings) or not isinstance(method, MethodSettings):
        return []
    config = backbone.local_config(model)
    if not isinstance(data, DataSettings) or config is None:
        return []
    return _structure_problems(model, method, data, config)


def hub_structure(settings: Settings, config: PretrainedConfig) -> list[str]:
    """Check a model of the hub as `structure` checks a folder, once its config is there."""
    if pathlib.Path(settings.model.name).is_dir():
        return []
    return _structure_problems(settings.model, settings.method, settings.data, config)


def _structure_problems(
    model: ModelSettings, method: MethodSettings, data: DataSettings, config: PretrainedConfig
) -> list[str]:
    completes, auto = tasks.name_of(data) == "causal_lm", tasks.of(data).auto
    if (method.name != "unipelt" and not completes) or type(config) not in auto._model_mapping:
        return []  # `tasks.check` reports a model that cannot do the task
    known = config.model_type in TESTED
    eager_only = model.attention != "eager" and config.model_type in EAGER_ONLY
    if not completes and known and not eager_only:
        return []
    attentions, problem = _find_attentions(config, model.attention, auto)
    if problem is not None and model.attention != "eager":
        eager_problem = _find_attentions(config, "eager", auto)[1]
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
    if problem is None or method.name != "unipelt":
        return []
    return [f"model.name: {model.name}: {problem[:300]}"]


def _find_attentions(
    config: PretrainedConfig, attention: str, auto: type
) -> tuple[list[AttentionSite], str | None]:
    """Return the attentions of a model without weights, and the problem with finding them."""
    try:
        with torch.random.fork_rng(devices=[]):  # a run's random numbers must not change
            return find_sites(backbone.empty_model(config, attention, None, auto))[0], None
    except (*backbone.UNREADABLE, RuntimeError) as error:
        return [], " ".join(str(error).split())


def model_features(sections: dict[str, Section]) -> list[str]:
    """Check for what single settings need: a bias in the head, attention by positions."""
    model, data = sections.get("model"), sections.get("data")
    if not isinstance(model, ModelSettings) or not isinstance(data, DataSettings):
        return []
    prior = model.head_bias == "prior"
    config = backbone.local_config(model) if prior or data.packing else None
    auto = tasks.of(data).auto
    if config is None or type(config) not in auto._model_mapping:
        return []
    if not prior:
        return packing_problems(data, config)
    empty = backbone.empty_model(config, model.attention, None, auto)
    linear = [
        module
        for name in head_names(empty)
        for module in empty.get_submodule(name).modules()
        if isinstance(module, nn.Linear)
    ]
    return [backbone.no_bias(type(empty).__name__)] if linear and linear[-1].bias is None else []


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
    return [
        f"model.name: no folder {name}; give an existing folder or a hub id like "
        "facebook/bart-large"
    ]


def training_files(sections: dict[str, Section]) -> list[str]:
    """Check the DeepSpeed config and the output folder."""
    train = sections.get("train")
    if not isinstance(train, TrainSettings):
        return []
    problems = output_folder_problems(train)
    deepspeed = train.deepspeed
    if deepspeed is not None and deepspeed not in ZERO_PRESETS and not os.path.isfile(deepspeed):
        presets = ", ".join(ZERO_PRESETS)
        problems.append(f"train.deepspeed: {deepspeed} is neither a file nor one of {presets}")
    return problems


CHECKS = (model_folder, training_files, tasks.check, backbone.check, structure, model_features)
