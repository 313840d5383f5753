"""Load the backbone of a run: its config, and its weights, complete, quantised or sharded."""

import os
import pathlib
import pickle
from typing import Any

import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from scaleup.backbone import quantization, weights
from scaleup.backbone.fsdp import load_fsdp
from scaleup.backbone.int8 import replace_linears
from scaleup.backbone.kernels import check_kernels
from scaleup.backbone.placement import Offload
from scaleup.backbone.sharded import load_sharded, set_values
from scaleup.errors import ConfigError, one_line
from scaleup.settings.data_rules import GENERATES
from scaleup.settings.schema import ModelSettings
from scaleup.unipelt.attention import implementation
from scaleup.unipelt.flash import check_flash
from scaleup.unipelt.kernels.target import mode
from scaleup.unipelt.quantized import leave_out_scales
from scaleup.unipelt.site_types import AttentionSite
from scaleup.unipelt.sites import find_sites, head_names

# What transformers raises for unusable files of weights.
UNREADABLE = (
    OSError,
    ValueError,
    ImportError,
    KeyError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
)


def _unreadable(name: str, error: Exception) -> ConfigError:
    if os.path.isdir(name):
        return ConfigError(f"model.name: {name} cannot be loaded: {one_line(error, 300)}")
    problem = f"it cannot be loaded from the hub: {one_line(error, 300)}"
    if isinstance(error.__cause__, LocalEntryNotFoundError):
        problem = "the hub could not be reached; correct the path, or connect to the hub"
    return ConfigError(f"model.name: there is no folder {name} here, and {problem}")


def source_arguments(settings: ModelSettings) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that say where the model comes from."""
    return {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}


def load_config(settings: ModelSettings) -> PretrainedConfig:
    """Load the backbone's config."""
    try:
        return AutoConfig.from_pretrained(settings.name, **source_arguments(settings))
    except Exception as error:  # transformers raises all kinds for a damaged config.json
        raise _unreadable(settings.name, error) from error


def download(settings: ModelSettings) -> pathlib.Path:
    """Return the local folder with the weights of the backbone, downloaded if it is on the hub."""
    try:
        return weights.checkpoint_folder(settings.name, settings.revision)
    except UNREADABLE as error:
        raise _unreadable(settings.name, error) from error


def fingerprint(settings: ModelSettings, config: PretrainedConfig) -> str:
    """Return what identifies the backbone of a run and of its adapter checkpoints."""
    return weights.fingerprint(settings.name, getattr(config, "_commit_hash", None))


# Task without classes → number of the outputs of its head.
HEADS_WITHOUT_CLASSES = {"regression": 1, "question_answering": 2}
# What transformers calls the problem of a classification head.
PROBLEMS = {
    "sequence_classification": "single_label_classification",
    "multi_label_classification": "multi_label_classification",
    "regression": "regression",
}


def set_labels(config: PretrainedConfig, task: str, labels: list[str] | None) -> None:
    """Set the outputs of a task's head, if it has one, in a model's config.

    Args:
        task: data.task.
        labels: class names in id order; None for tasks without classes.
    """
    if task in GENERATES:
        return
    config.problem_type = PROBLEMS.get(task)
    if labels is None:
        config.num_labels = HEADS_WITHOUT_CLASSES[task]
        return
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}


def empty_model(
    config: PretrainedConfig, attention: str, dtype: torch.dtype | None, auto: Any
) -> PreTrainedModel:
    """Return the model on the meta device.

    transformers' `from_config` would allocate and shard every weight under ZeRO-3.
    """
    cls = auto._model_mapping[type(config)]
    if cls.config_class is type(config.get_text_config()):  # without the images of Qwen3.5
        config = config.get_text_config()
    config._attn_implementation = implementation(attention)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype or default)
    try:
        with torch.device("meta"):
            model = cls(config)
    finally:
        torch.set_default_dtype(default)
    model.tie_weights()
    if attention == "flash":
        try:
            check_flash(model)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    return model


def check_attention(settings: ModelSettings, device: str) -> None:
    """Check that a device has the attention of a run.

    Raises:
        ConfigError: if it has not, or SCALEUP_KERNELS has an unknown value.
    """
    check_kernels()
    usable = mode() == "reference" or (mode() == "auto" and device == "cuda")
    if settings.attention == "flash" and not usable:
        raise ConfigError(
            "model.attention: flash needs a GPU and SCALEUP_KERNELS=auto; set model.attention=sdpa"
        )


def find_attentions(
    config: PretrainedConfig, attention: str, auto: Any
) -> tuple[list[AttentionSite], str | None]:
    """Return the attentions of a model without weights, and the problem with finding them."""
    try:
        with torch.random.fork_rng(devices=[]):  # a run's random numbers must not change
            return find_sites(empty_model(config, attention, None, auto))[0], None
    except (*UNREADABLE, RuntimeError) as error:
        return [], one_line(error)


def load_model(
    settings: ModelSettings,
    config: PretrainedConfig,
    auto: Any,
    dtype: torch.dtype,
    device: torch.device,
    zero3: bool = False,
    prior: list[float] | None = None,
    offload: Offload | None = None,
    mesh: DeviceMesh | None = None,
) -> tuple[PreTrainedModel, list[str]]:
    """Load the backbone, with a newly initialised head if its files have none.

    Heads and output embeddings are not quantised.

    Args:
        auto: transformers' AutoModelFor… class of the task.
        zero3: each process keeps its shard of the weights. Int8 weights are then `Int8Linear`.
        prior: initial bias of the new head, [outputs].
        offload: where to keep weights that do not fit on the device; None: they must fit. Quantised
            weights always have to.
        mesh: the processes among which FSDP shards the weights; as with zero3.

    Returns:
        The model, and the names of its missing modules: poolers that the files lack. They have to
        train and be saved, because they cannot be restored from the backbone's files.
    """
    check_attention(settings, device.type)
    try:
        empty = empty_model(config, settings.attention, dtype, auto)
        heads = tuple(head_names(empty))
        output = empty.get_output_embeddings()
        whole = (*heads, *(name for name, module in empty.named_modules() if module is output))
        if mesh is not None or (zero3 and settings.quantization != "nf4"):
            model, info = _load_shards(settings, empty, whole, dtype, device, mesh)
        else:
            place = None if zero3 else device
            places = quantization.loading_arguments(settings.quantization, whole, dtype, place)
            if offload is not None and settings.quantization == "none":
                places = offload.loading_arguments(empty, heads, device) or places
            random_state = torch.get_rng_state()
            model, info = auto.from_pretrained(
                settings.name,
                config=config,
                dtype=dtype,
                attn_implementation=implementation(settings.attention),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **source_arguments(settings),
                **places,
            )
            if not info["missing_keys"] and not info["mismatched_keys"]:
                # Some classes draw values that they then do not use. `_load_shards` draws none, and
                # what is trained must start from the same values.
                torch.set_rng_state(random_state)
            if settings.quantization == "8bit":
                leave_out_scales(model)
            resized = quantization.initialize_heads(model, empty, heads)
            info["mismatched_keys"] = {*info["mismatched_keys"], *resized}
    except ConfigError:
        raise
    except UNREADABLE as error:
        raise _unreadable(settings.name, error) from error
    missing = set(info["missing_keys"])
    mismatched = {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
    _check_loaded(settings.name, model, heads, missing | mismatched)
    if prior is not None:
        _start_head(model, heads, prior, missing | mismatched)
    keys = (key for key in missing if ".pooler." in key and not key.startswith(heads))
    return model, sorted({key.partition(".pooler.")[0] + ".pooler" for key in keys})


def _load_shards(
    settings: ModelSettings,
    model: PreTrainedModel,
    whole: tuple[str, ...],
    dtype: torch.dtype,
    device: torch.device,
    mesh: DeviceMesh | None,
) -> tuple[PreTrainedModel, dict[str, set[str]]]:
    """Fill an empty model with the shards of this process, of FSDP or (without mesh) of ZeRO-3."""
    # GPT-2 has transposed layers of its own instead of nn.Linear.
    if settings.quantization == "8bit" and replace_linears(model, whole, dtype) == 0:
        where = "under ZeRO-3; use nf4, or zero2" if mesh is None else "and sharded; use none"
        raise ConfigError(
            f"model.quantization: {type(model).__name__} has no linear layers that can be int8 "
            f"{where}"
        )
    folder = weights.checkpoint_folder(settings.name, settings.revision)
    if mesh is None:
        return model.eval(), load_sharded(model, folder, device)
    files = weights.Weights(model, folder)
    return model.eval(), load_fsdp(model, files, device, mesh, head_names(model))


def _check_loaded(
    name: str, model: PreTrainedModel, heads: tuple[str, ...], initialized: set[str]
) -> None:
    """Refuse a model of which more than the head and the pooler did not come from its files.

    A head of another size is replaced. Checkpoints of masked language models have no pooler.
    """
    names = [key for key, _ in model.named_parameters()]
    unfit, all_names = (
        [key for key in keys if not key.startswith(heads) and ".pooler." not in key]
        for keys in (initialized, names)
    )
    if len(unfit) >= len(
        all_names
    ):  # as in LlamaForQuestionAnswering, for the files of other classes
        raise ConfigError(
            f"model.name: {type(model).__name__} finds none of its weights in {name}, because "
            "transformers gives them other names there; use another model for this task"
        )
    if unfit:
        raise ConfigError(
            f"model.name: the weights in {name} do not fit its config.json: {len(unfit)} tensors "
            f"are missing or have another shape, first {min(unfit)}"
        )


def _start_head(
    model: PreTrainedModel, heads: tuple[str, ...], prior: list[float], initialized: set[str]
) -> None:
    """Set the bias of the head's last layer, which is its output if the input tells nothing."""
    layers = [
        name
        for name, module in model.named_modules()
        if name.split(".")[0] in heads
        and isinstance(module, nn.Linear)
        and module.out_features == len(prior)
    ]
    bias = model.get_submodule(layers[-1]).bias if layers else None
    if bias is None:
        raise ConfigError(no_bias(type(model).__name__))
    if f"{layers[-1]}.bias" not in initialized:
        problem = f"the head of {type(model).__name__} comes with the model's weights"
        raise ConfigError(f"model.head_bias: {problem}; leave the setting out")
    set_values(bias, torch.tensor(prior))


def no_bias(model: str) -> str:
    """Return the problem with model.head_bias=prior for a model class."""
    return f"model.head_bias: the head of {model} has no bias; leave the setting out"
