"""Load the model of a run: the backbone with the tensors that the run's method adds.

Training, export, planning and reports all build a run's model here, so that they agree on labels,
pad token, data types and trained parameters.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PretrainedConfig, PreTrainedModel

from scaleup.backbone import loading, precision
from scaleup.backbone.placement import Offload, materialize_trained
from scaleup.backbone.sharded import set_values, whole_shape
from scaleup.backbone.tokenizer import load_tokenizer, pad_tokens
from scaleup.backbone.weights import read_once, tensor_files
from scaleup.errors import CheckpointError, ConfigError
from scaleup.settings.schema import MethodSettings, Settings, TrainSettings
from scaleup.unipelt.config import UniPeltConfig
from scaleup.unipelt.sites import head_names


def checkpointing_problems(train: TrainSettings, config: PretrainedConfig, auto: Any) -> list[str]:
    """Check that a model has the gradient checkpointing that is asked for."""
    if not train.gradient_checkpointing or type(config) not in auto._model_mapping:
        return []
    if auto._model_mapping[type(config)].supports_gradient_checkpointing:
        return []
    problem = f"transformers has none for {config.model_type}; leave it out"
    return [f"train.gradient_checkpointing: {problem}"]


def task_type(model: PreTrainedModel) -> str | None:
    """Return PEFT's name for what the model's head does.

    It is None for question answering: PEFT's model for QUESTION_ANS takes token_type_ids and
    position_ids, and does not pass them on.
    """
    if model.get_output_embeddings() is None:
        kinds = {"ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": None}
        name = type(model).__name__
        return next((kind for end, kind in kinds.items() if name.endswith(end)), "SEQ_CLS")
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def apply_method(
    model: PreTrainedModel, method: MethodSettings, missing: Sequence[str] = ()
) -> nn.Module:
    """Return the model with exactly the parameters of `method` trainable.

    Added parameters are float32. The head trains in every method unless `method.head` is frozen.

    Args:
        missing: modules of the backbone without pretrained weights. They are treated as the head.

    Raises:
        ConfigError: nothing would be trained.
    """
    if method.name == "unipelt":
        values = method.model_dump(exclude={"name", "gates"}) | {"gates": method.resolved_gates}
        kept = list(missing) or None
        config = UniPeltConfig(task_type=task_type(model), modules_to_save=kept, **values)
        return get_peft_model(model, config)
    heads = tuple(f"{name}." for name in (*head_names(model), *missing))
    for name, parameter in model.named_parameters():
        if name.startswith(heads):
            parameter.requires_grad_(method.head == "trained")
        else:
            parameter.requires_grad_(method.name == "full" or name.endswith(".bias"))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        problem = f"bitfit trains biases, and {type(model).__name__} has none here"
        raise ConfigError(f"method.name: {problem}; use unipelt")
    return model


def complete_config(
    settings: Settings, config: PretrainedConfig, auto: Any, labels: list[str] | None
) -> None:
    """Set the labels of the head and the pad token in the backbone's config, in place.

    Args:
        auto: transformers' AutoModelFor… class of the task.
        labels: class names in id order, or None for tasks without classes.
    """
    loading.set_labels(config, settings.data.resolved_task, labels)
    if not pad_tokens(config):
        load_tokenizer(settings.model, config, auto)  # sets it


def load_run_model(
    settings: Settings,
    config: PretrainedConfig,
    auto: Any,
    labels: list[str] | None,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    prior: list[float] | None = None,
    zero3: bool = False,
    mesh: DeviceMesh | None = None,
    for_training: bool = False,
    weights: pathlib.Path | None = None,
    adapter: pathlib.Path | None = None,
    offload: Offload | None = None,
) -> nn.Module:
    """Load the backbone of a run and apply the run's method to it.

    Args:
        config, auto, labels: as for `complete_config`.
        dtype: storage type of the backbone, by default that of `precision.backbone_dtype`.
        prior: initial bias of a newly initialised head, [outputs].
        zero3: each process keeps its share of the backbone's weights.
        mesh: the processes among which FSDP shards them.
        for_training: cast the trained parameters to the type that mixed precision trains them in.
        weights: a checkpoint whose trained tensors replace the newly initialised ones.
        adapter: an adapter checkpoint to load with PEFT alone, as a user does.
        offload: as for `loading.load_model`. It needs `weights` or `adapter`.
    """
    complete_config(settings, config, auto, labels)
    half = precision.device_half_dtype(settings, device)
    dtype = dtype or precision.backbone_dtype(settings, half)
    model, missing = loading.load_model(
        *(settings.model, config, auto, dtype, device),
        zero3=zero3,
        prior=prior,
        offload=offload,
        mesh=mesh,
    )
    waits = any(parameter.device.type == "meta" for parameter in model.parameters())
    if adapter is not None and not waits:
        return PeftModel.from_pretrained(model, str(adapter)).to(device)
    if adapter is not None:  # PEFT would leave its own tensors where those of the model are
        adapter_config = UniPeltConfig.from_pretrained(adapter)
        adapter_config.inference_mode = False  # which marks the trained tensors
        model, weights = get_peft_model(model, adapter_config), adapter
    else:
        model = apply_method(model, settings.method, missing)
    if waits:
        materialize_trained(model, device)
    trained = precision.trained_dtype(settings, half) if for_training else None
    if trained is not None:
        precision.cast_trained(model, trained)
    if weights is not None:
        load_weights(model, weights)
    return model


def saved_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every trained parameter and those of the head, by their names in a checkpoint."""
    parameters = dict(model.named_parameters())
    if isinstance(model, PeftModel):
        return get_peft_model_state_dict(model, state_dict=parameters, save_embedding_layers=False)
    heads = tuple(f"{name}." for name in head_names(model))
    return {name: p for name, p in parameters.items() if p.requires_grad or name.startswith(heads)}


def saved_content(model: nn.Module) -> dict[str, Any]:
    """Return what a checkpoint has of a model, by the names of its `state_dict`.

    That is what is trained of an adapter, and its head; of other methods it is the whole model.
    """
    content = model.state_dict(keep_vars=True)
    if isinstance(model, PeftModel):
        kept = {id(p) for p in saved_parameters(model).values()}
        return {name: tensor for name, tensor in content.items() if id(tensor) in kept}
    names = {id(p): name for name, p in model.named_parameters()}  # tied weights have one
    return {name: t for name, t in content.items() if names.get(id(t), name) == name}


def load_weights(model: nn.Module, folder: pathlib.Path) -> None:
    """Load the trained tensors of a checkpoint, also into a model that ZeRO has sharded.

    Rank 0 reads the files, and all processes call this.
    """
    places: dict[str, torch.Tensor] = dict(model.named_buffers())
    places |= saved_parameters(model) if isinstance(model, PeftModel) else model.named_parameters()
    for name, value in read_once(tensor_files(folder)):
        place = places.get(name)
        if place is None or value.shape != whole_shape(place):
            problem = (
                "is none of its tensors" if place is None else f"is {tuple(value.shape)} there"
            )
            message = f"its weights do not fit this model: {name} {problem}"
            raise CheckpointError(f"{folder}: {message}")
        set_values(place, value)


def empty_run_model(
    settings: Settings, config: PretrainedConfig, auto: Any, dtype: torch.dtype
) -> nn.Module:
    """Return the run's model with its backbone on the meta device, for counting and planning."""
    model = loading.empty_model(config, settings.model.attention, dtype, auto)
    return apply_method(model, settings.method)
