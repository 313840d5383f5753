"""Everything that can be said of a config's files before weights are loaded: data, model folder, structure of the model.

    settings = config.load(path, overrides, checks=CHECKS)
"""

from scaleup import backbone, tasks
from scaleup.config import MethodSettings, ModelSettings, Section
from scaleup.sites import EAGER_ONLY, TESTED, find_sites


def structure(sections: dict[str, Section]) -> list[str]:
    """Whether UniPELT finds its places in a model of a family that is not under test here: tried on a model without weights."""
    model, method, data = (sections.get(name) for name in ("model", "method", "data"))
    if not isinstance(model, ModelSettings) or not isinstance(method, MethodSettings) or data is None or method.name != "unipelt":
        return []
    config, auto = backbone.local_config(model), tasks.of(data).auto
    if config is None or type(config) not in auto._model_mapping:
        return []  # the other checks say so
    if config.model_type in TESTED and (model.attention == "eager" or config.model_type not in EAGER_ONLY):
        return []
    try:
        find_sites(backbone.empty_model(config, model.attention, None, auto))
    except ValueError as error:
        said = " ".join(str(error).split())
        if "attn_implementation" in said and model.attention != "eager":  # transformers' words, and scaleup.sites'
            said = f"its {model.attention} attention cannot be used ({said.partition('.')[0].partition(';')[0]}); set model.attention=eager"
        return [f"model.name: {model.name}: {said[:300]}"]
    except (OSError, ImportError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        return [f"model.name: {model.name}: {' '.join(str(error).split())[:300]}"]
    return []


CHECKS = (tasks.check, backbone.check, structure)
