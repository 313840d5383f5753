"""Everything that can be said of a config's files before weights are loaded: data, model folder, structure of the model.

settings = config.load(path, overrides, checks=CHECKS)
"""

import pathlib

from torch import nn
from transformers import PretrainedConfig

from scaleup.backbone import loading as backbone
from scaleup.data import tasks
from scaleup.settings.schema import MethodSettings, ModelSettings, Section, Settings
from scaleup.unipelt.sites import EAGER_ONLY, PACKS, TESTED, AttentionSite, find_sites, head_names


def reads_ahead(name: str, model_type: str) -> str:
    """The problem with a model that would be shown the very tokens it is to predict."""
    return f"model.name: {name} ({model_type}) reads in both directions and would see the tokens that it is to predict; data.task causal_lm needs a decoder like GPT-2, Llama or Qwen"


def keeps_apart(data: Section, config: PretrainedConfig) -> list[str]:
    """Whether packed texts do not see each other in this model."""
    if not data.packing or config.model_type in PACKS:
        return []
    return [
        f"data.packing: {config.model_type} is not known to keep packed texts apart (known: {', '.join(PACKS)}); leave it out"
    ]


def structure(sections: dict[str, Section]) -> list[str]:
    """Check a model folder: whether the method finds its places in the model. Needs no weights."""
    model, method, data = (sections.get(name) for name in ("model", "method", "data"))
    if (
        not isinstance(model, ModelSettings)
        or not isinstance(method, MethodSettings)
        or data is None
    ):
        return []
    config = backbone.local_config(model)
    return [] if config is None else _structure_problems(model, method, data, config)


def hub_structure(settings: Settings, config: PretrainedConfig) -> list[str]:
    """Check a model of the hub as `structure` checks a folder, once its config is downloaded."""
    if pathlib.Path(settings.model.name).is_dir():
        return []
    return _structure_problems(settings.model, settings.method, settings.data, config)


def _structure_problems(
    model: ModelSettings, method: MethodSettings, data: Section, config: PretrainedConfig
) -> list[str]:
    completes, auto = tasks.name_of(data) == "causal_lm", tasks.of(data).auto
    if (method.name != "unipelt" and not completes) or type(config) not in auto._model_mapping:
        return []  # the other checks report a model that cannot do the task
    if (
        not completes
        and config.model_type in TESTED
        and (model.attention == "eager" or config.model_type not in EAGER_ONLY)
    ):
        return []
    attentions, problem = _look(config, model.attention, auto)
    if problem is not None and model.attention != "eager":
        in_the_way = _look(config, "eager", auto)[1]
        reason = problem.partition(".")[0].partition(";")[0]
        advice = (
            f"its {model.attention} attention cannot be used ({reason}); set model.attention=eager"
        )
        problem = advice if in_the_way is None else in_the_way
    if completes and problem is None and not any(site.causal for site in attentions):
        return [reads_ahead(model.name, config.model_type)]
    if problem is None or method.name != "unipelt":
        return []
    return [f"model.name: {model.name}: {problem[:300]}"]


def settings_that_need_more(sections: dict[str, Section]) -> list[str]:
    """Whether the model has what single settings need: a bias in its head, for model.head_bias; attention by positions, for data.packing."""
    model, data = sections.get("model"), sections.get("data")
    if (
        not isinstance(model, ModelSettings)
        or data is None
        or not (model.head_bias == "prior" or data.packing)
    ):
        return []
    config, auto = backbone.local_config(model), tasks.of(data).auto
    if config is None or type(config) not in auto._model_mapping:
        return []
    if model.head_bias != "prior":
        return keeps_apart(data, config)
    empty = backbone.empty_model(config, model.attention, None, auto)
    linear = [
        module
        for name in head_names(empty)
        for module in empty.get_submodule(name).modules()
        if isinstance(module, nn.Linear)
    ]
    return [backbone.no_bias(type(empty).__name__)] if linear and linear[-1].bias is None else []


def _look(
    config: PretrainedConfig, attention: str, auto: type
) -> tuple[list[AttentionSite], str | None]:
    """The attentions of a model of this config, and what stands in the way of finding them."""
    try:
        return find_sites(backbone.empty_model(config, attention, None, auto))[0], None
    except (
        OSError,
        ImportError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        ValueError,
    ) as error:
        return [], " ".join(str(error).split())


CHECKS = (tasks.check, backbone.check, structure, settings_that_need_more)
