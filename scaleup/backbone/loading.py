"""The frozen backbone: what can be said of it before it is loaded, and loading it, whole, quantised or as a share of it."""

import pathlib

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from scaleup.backbone import quantization as quantised
from scaleup.backbone import sharded as weights
from scaleup.backbone.int8 import replace_linears
from scaleup.backbone.sharded import Weights, checkpoint_folder, load_sharded, set_values
from scaleup.errors import ConfigError
from scaleup.settings.schema import DataSettings, ModelSettings, Settings
from scaleup.unipelt.quantized import keep_layout, leave_out_scales
from scaleup.unipelt.sites import head_names

UNREADABLE = (
    OSError,
    ValueError,
    ImportError,
    KeyError,
    TypeError,
    AttributeError,
)  # what a bad config.json raises


def local_config(model: ModelSettings) -> PretrainedConfig | None:
    """The config of a model folder; None for a hub id, and where it cannot be read, which `check` says."""
    if not pathlib.Path(model.name, "config.json").is_file():
        return None
    try:
        return AutoConfig.from_pretrained(model.name, trust_remote_code=model.trust_remote_code)
    except UNREADABLE:
        return None


def check(sections: dict) -> list[str]:
    """What can be said of the model folder without loading weights. For `config.load`."""
    model, data = sections.get("model"), sections.get("data")
    if model is None or not pathlib.Path(model.name, "config.json").is_file():
        return []
    try:
        config = AutoConfig.from_pretrained(model.name, trust_remote_code=model.trust_remote_code)
    except UNREADABLE as error:
        return [
            f"model.name: {model.name}/config.json is not a usable model config: {' '.join(str(error).split())[:200]}"
        ]
    problems = []
    if not any(
        found
        for pattern in ("*.safetensors", "*.bin")
        for found in pathlib.Path(model.name).glob(pattern)
    ):
        problems.append(f"model.name: {model.name} has no weights (*.safetensors or *.bin)")
    if data is not None:
        problems += (
            length_problems(data, model, config) if "max_length" in data.model_fields_set else []
        )
        problems += target_problems(data, model, config)
    return problems


def target_problems(
    data: DataSettings, model: ModelSettings, config: PretrainedConfig
) -> list[str]:
    """The same for what is written: by a decoder of its own, or after the prompt. For lengths that the user chose, or that `fit_length` has fitted."""
    limit, written = position_limit(config), data.max_target_length
    if limit is None or getattr(config, "relative_attention_num_buckets", None):
        return []
    if (
        data.task == "seq2seq"
        and config.is_encoder_decoder
        and "max_target_length" in data.model_fields_set
        and written > limit
    ):
        return [f"data.max_target_length: {written} tokens, but {model.name} has {limit} positions"]
    if (
        _writes_on(data)
        and "max_length" in data.model_fields_set
        and data.max_length + written > limit
    ):
        return [
            f"data.max_length: prompts of up to {data.max_length} tokens and data.max_target_length {written} written after them, but {model.name} has {limit} positions"
        ]
    return []


def _writes_on(data: DataSettings) -> bool:
    """Whether text is written behind the prompt, in the same positions."""
    return data.task == "causal_lm" and data.metric not in (None, "loss")


def length_problems(
    data: DataSettings, model: ModelSettings, config: PretrainedConfig
) -> list[str]:
    """Inputs longer than the model's table of positions would end in an index error in the middle of a run."""
    limit = position_limit(config)
    if limit is None or data.max_length <= limit:
        return []
    return [f"data.max_length: {data.max_length} tokens, but {model.name} has {limit} positions"]


def fit_length(settings: Settings, config: PretrainedConfig) -> Settings:
    """A length the user did not choose shrinks to what the model takes. Raises ConfigError for a chosen one that is too long."""
    limit, data, fitted = position_limit(config), settings.data, {}
    if limit is not None:
        room = {"max_length": limit - data.max_target_length * _writes_on(data)}
        room |= (
            {"max_target_length": limit}
            if data.task == "seq2seq"
            and not getattr(config, "relative_attention_num_buckets", None)
            else {}
        )
        fitted = {
            key: most
            for key, most in room.items()
            if key not in data.model_fields_set and 0 < most < getattr(data, key)
        }
    data = data.model_copy(update=fitted)
    if problems := length_problems(data, settings.model, config) + target_problems(
        data, settings.model, config
    ):
        raise ConfigError(problems)
    return settings.model_copy(update={"data": data})


def position_limit(config: PretrainedConfig) -> int | None:
    """Most tokens that a model with learned positions takes; None where there is no such table."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    # The RoBERTa family counts positions from padding_idx + 1.
    return (
        positions - config.pad_token_id - 1
        if config.model_type in ("roberta", "xlm-roberta", "camembert")
        else positions
    )


def _unreadable(name: str, error: Exception) -> ConfigError:
    return ConfigError(f"model.name: {name} cannot be loaded: {' '.join(str(error).split())[:300]}")


def load_tokenizer(settings: ModelSettings, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """The backbone's own tokenizer. One without a padding token, as decoders have, pads with its end-of-sequence token, which
    masks hide. Raises ConfigError if it cannot be loaded, has neither, or does not fit the model of `config`.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            settings.name, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise _unreadable(settings.name, error) from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"model.name: the tokenizer of {settings.name} has no padding token")
    # transformers makes an empty one where the files are missing, and every text would become unknown tokens.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ConfigError(
            f"model.name: {settings.name} has no tokenizer files; save the backbone's tokenizer there"
        )
    words = getattr(config.get_text_config(), "vocab_size", None)
    if words is not None and max(tokenizer.get_vocab().values()) >= words:
        raise ConfigError(
            f"model.name: the tokenizer of {settings.name} has {len(tokenizer)} tokens, its model {words}; they do not belong together"
        )
    return tokenizer


def load_config(settings: ModelSettings) -> PretrainedConfig:
    """The backbone's config. Raises ConfigError if it cannot be loaded."""
    try:
        return AutoConfig.from_pretrained(
            settings.name, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise _unreadable(settings.name, error) from error


def fingerprint(settings: ModelSettings, config: PretrainedConfig) -> str:
    """Identity of the backbone whose config was loaded, by which a run and its bundles know it again."""
    return weights.fingerprint(settings.name, getattr(config, "_commit_hash", None))


def load_model(
    settings: ModelSettings,
    config: PretrainedConfig,
    auto: type,
    dtype: torch.dtype,
    device: torch.device,
    zero3: bool = False,
    prior: list[float] | None = None,
) -> tuple[PreTrainedModel, list[str]]:
    """The backbone as the class that `auto` (transformers' AutoModelFor…) has for it, with a fresh head where its files have none; and
    the poolers that its files lack, which are fresh too: frozen, they could not be had again from the backbone's files.

    Quantised weights are made while loading; heads and output embeddings stay in full precision. `zero3`: each process keeps its share of the
    weights, and 8-bit ones are `Int8Linear`, which can be shared out. `prior`: where the fresh head's bias starts, [outputs]. Raises ConfigError if
    it cannot be loaded, or has no such bias.
    """
    source = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    try:
        empty = empty_model(config, settings.attention, dtype, auto)
        heads = tuple(head_names(empty))
        output = empty.get_output_embeddings()
        whole = (
            *heads,
            *(name for name, module in empty.named_modules() if module is output),
        )  # not quantised
        if zero3 and settings.quantization != "nf4":
            if settings.quantization == "8bit":
                if (
                    replace_linears(empty, whole, dtype) == 0
                ):  # GPT-2 has transposed layers of its own
                    raise ConfigError(
                        f"model.quantization: {type(empty).__name__} has no linear layers that 8 bit can be had of under ZeRO-3; use nf4, or zero2"
                    )
            model = empty.eval()
            info = load_sharded(
                model, Weights(model, checkpoint_folder(settings.name, settings.revision)), device
            )
        else:
            model, info = auto.from_pretrained(
                settings.name,
                config=config,
                dtype=dtype,
                attn_implementation=settings.attention,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **source,
                **quantised.arguments(
                    settings.quantization, whole, dtype, None if zero3 else device
                ),
            )
            if settings.quantization == "8bit":
                leave_out_scales(model)
            keep_layout(model)
            quantised.renew_heads(model, empty, heads)
    except ConfigError:
        raise
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        raise _unreadable(settings.name, error) from error
    _check_loaded(settings.name, heads, info)
    if prior is not None:
        _start_head(
            model,
            heads,
            prior,
            {
                *info["missing_keys"],
                *(key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]),
            },
        )
    fresh = dict.fromkeys(
        key[: key.index(".pooler.") + len(".pooler")]
        for key in sorted(info["missing_keys"])
        if ".pooler." in key and not key.startswith(heads)
    )
    return model, list(fresh)


def _start_head(
    model: PreTrainedModel, heads: tuple[str, ...], prior: list[float], fresh: set[str]
) -> None:
    """Sets the bias of the head's last layer, which is the model's output where nothing else is known of an example."""
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
    if f"{layers[-1]}.bias" not in fresh:
        raise ConfigError(
            f"model.head_bias: the head of {type(model).__name__} comes with the model's weights; leave the setting out"
        )
    set_values(bias, torch.tensor(prior))


def no_bias(model: str) -> str:
    """The problem with model.head_bias=prior for such a model. model: its class."""
    return f"model.head_bias: the head of {model} has no bias; leave the setting out"


def set_labels(config: PretrainedConfig, labels: list[str] | None) -> None:
    """A classification head (`labels` in id order) or a regression head (None) for the model to be made from the config."""
    if labels is None:
        config.num_labels, config.problem_type = 1, "regression"
    else:
        config.num_labels, config.problem_type = len(labels), "single_label_classification"
        config.id2label, config.label2id = (
            dict(enumerate(labels)),
            {label: i for i, label in enumerate(labels)},
        )


def empty_model(
    config: PretrainedConfig, attention: str, dtype: torch.dtype | None, auto: type
) -> PreTrainedModel:
    """The model on the meta device. Not through `from_config`, which under ZeRO-3 would allocate and share out every weight."""
    cls = auto._model_mapping[type(config)]
    config._attn_implementation = attention
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        with torch.device("meta"):
            model = cls(config)
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    return model


def _check_loaded(name: str, heads: tuple[str, ...], info: dict) -> None:
    """A head of another size is replaced; anything else that did not come from the checkpoint would train on noise.

    A pooler may be missing (checkpoints of masked language models have none).
    """
    mismatched = {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
    strange = [
        k
        for k in sorted({*info["missing_keys"], *mismatched})
        if not k.startswith(heads) and ".pooler." not in k
    ]
    if strange:
        raise ConfigError(
            f"model.name: the weights in {name} do not fit its config.json: {len(strange)} tensors are missing or have "
            f"another shape, first {strange[0]}"
        )
