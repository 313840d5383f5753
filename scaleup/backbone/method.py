"""Applying the method of a run to a backbone."""

from collections.abc import Sequence

from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel

from scaleup.settings.schema import MethodSettings
from scaleup.unipelt.config import UniPeltConfig
from scaleup.unipelt.sites import head_names


def task_type(model: PreTrainedModel) -> str:
    """PEFT's name for what the model's head does."""
    if model.get_output_embeddings() is None:
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def apply_method(
    model: PreTrainedModel, method: MethodSettings, fresh: Sequence[str] = ()
) -> nn.Module:
    """The model with exactly the parameters of `method` trainable; what is added is float32. The head trains in every method, and so
    do `fresh`, modules of the backbone without pretrained weights."""
    if method.name == "unipelt":
        values = method.model_dump(exclude={"name", "gates"})
        config = UniPeltConfig(
            task_type=task_type(model),
            gates=method.resolved_gates,
            modules_to_save=list(fresh) or None,
            **values,
        )
        return get_peft_model(model, config)
    heads = tuple(f"{name}." for name in (*head_names(model), *fresh))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            method.name == "full" or name.endswith(".bias") or name.startswith(heads)
        )
    return model
