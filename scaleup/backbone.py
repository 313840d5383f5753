"""The frozen backbone: loading it, and finding where UniPELT goes by the structure of the model.

Sites are found on an empty copy of the model (meta device: no memory, no weights) that runs once on four tokens:
attentions are modules with query, key and value projections, a block is the entry of a layer list that holds them, and a
block is post-LN if it returns the very tensor that its last norm returned.
"""

import copy
import dataclasses
import inspect
import pathlib

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PretrainedConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from scaleup import quantised
from scaleup.config import ConfigError, DataSettings, ModelSettings, Settings
from scaleup.int8 import replace_linears
from scaleup.weights import Weights, checkpoint_folder, load_sharded

# The families whose attentions, norms and masks are under test (tests/test_contract.py). Others may fit by structure, but
# an untested one could lose a submodule silently, so it is refused.
SUPPORTED = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "bart", "mbart")
# Where a cross attention gets the encoder's output: BART, BERT.
ENCODER_ARGUMENTS = ("key_value_states", "encoder_hidden_states")
PROJECTIONS = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"))


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """One attention. Names are paths in the model; `layer` counts the attentions of the same host and kind."""

    name: str
    host: str  # the smallest model around it, the one that gets the padding mask
    cross: bool
    layer: int
    query: str
    value: str
    hidden_size: int
    kv_heads: int
    head_size: int
    causal: bool  # the attention's own mask: queries do not see later keys
    causal_block: bool  # it belongs to a decoder's layer, where nothing may depend on later tokens


@dataclasses.dataclass(frozen=True)
class BlockSite:
    """One layer of the stack. `norm`: path of the closing norm of a post-LN block, None for a pre-LN block."""

    name: str
    host: str
    norm: str | None
    hidden_size: int
    causal: bool


def _empty_copy(model: PreTrainedModel) -> PreTrainedModel:
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    if "quantization_config" in config.__dict__:  # the copy has no weights to quantise
        del config.quantization_config
    with torch.device("meta"):
        return type(model)(config).eval()


def _run_once(model: PreTrainedModel) -> None:
    """Four tokens through the backbone, without a head."""
    tokens = torch.ones(1, 4, dtype=torch.long, device="meta")
    decoder = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        model.base_model(input_ids=tokens, **decoder)


def _first(output: object) -> object:
    return output[0] if isinstance(output, (tuple, list)) else output


def _projections(module: nn.Module) -> tuple[str, str, str] | None:
    children = dict(module.named_children())
    return next((names for names in PROJECTIONS if all(isinstance(children.get(n), nn.Linear) for n in names)), None)


def _enclosing(path: str, candidates: dict[str, nn.Module]) -> str:
    """The longest of the candidates' paths that contains `path`."""
    around = [name for name in candidates if path == name or path.startswith(name + ".") or name == ""]
    return max(around, key=len)


def find_sites(model: nn.Module) -> tuple[list[AttentionSite], list[BlockSite]]:
    """All attentions and blocks of a transformers model, in the order in which they run.

    Works on an adapted model too: names come from an empty copy. Raises ValueError for a model that is not from
    transformers, a family that is not supported, or one in which the structure is not found.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"UniPELT needs a transformers model, got {type(model).__name__}")
    kind = model.config.model_type
    if kind not in SUPPORTED:
        raise ValueError(f"UniPELT does not support the model type {kind} yet; supported: {', '.join(SUPPORTED)}")
    probe = _empty_copy(model)
    modules = dict(probe.named_modules())
    attentions = {name: module for name, module in modules.items() if _projections(module)}
    lists = {f"{name}.{i}": m for name, parent in modules.items() if isinstance(parent, nn.ModuleList) for i, m in enumerate(parent)}
    blocks = {name: lists[name] for name in dict.fromkeys(_enclosing(a, lists) for a in attentions)}
    seen: dict[str, object] = {}  # what each module of interest returned, in running order
    cross: set[str] = set()

    def note_input(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if any(kwargs.get(argument) is not None for argument in ENCODER_ARGUMENTS):
                cross.add(name)

        return hook

    def note_output(name: str):
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            seen[name] = _first(output)

        return hook

    norms = [name for name, module in modules.items() if "Norm" in type(module).__name__]
    for name in attentions:
        modules[name].register_forward_pre_hook(note_input(name), with_kwargs=True)
    for name in [*attentions, *blocks, *norms]:
        modules[name].register_forward_hook(note_output(name))
    _run_once(probe)
    order = list(seen)
    hosts = {name: module for name, module in modules.items() if isinstance(module, PreTrainedModel)}
    causal_blocks = {
        block for block in blocks for name, module in attentions.items()
        if name.startswith(block + ".") and name not in cross and module.is_causal
    }  # fmt: skip
    return (
        _attention_sites(modules, [n for n in order if n in attentions], cross, hosts, blocks, causal_blocks),
        _block_sites(modules, [n for n in order if n in blocks], norms, seen, hosts, causal_blocks),
    )


def _attention_sites(modules, names, cross, hosts, blocks, causal_blocks) -> list[AttentionSite]:
    counts: dict[tuple[str, bool], int] = {}
    sites = []
    for name in names:
        module, host = modules[name], _enclosing(name, hosts)
        query, key, value = _projections(module)
        head_size = next(getattr(module, a) for a in ("head_dim", "attention_head_size") if hasattr(module, a))
        layer = counts.setdefault((host, name in cross), 0)
        counts[host, name in cross] += 1
        sites.append(
            AttentionSite(
                name=name, host=host, cross=name in cross, layer=layer,
                query=f"{name}.{query}", value=f"{name}.{value}",
                hidden_size=modules[f"{name}.{query}"].in_features,
                kv_heads=modules[f"{name}.{key}"].out_features // head_size, head_size=head_size,
                causal=bool(module.is_causal) and name not in cross,
                causal_block=_enclosing(name, blocks) in causal_blocks,
            )  # fmt: skip
        )
    return sites


def _block_sites(modules, names, norms, seen, hosts, causal_blocks) -> list[BlockSite]:
    sites = []
    for name in names:
        closing = [norm for norm in norms if norm.startswith(name + ".") and seen.get(norm) is seen[name]]
        sites.append(
            BlockSite(
                name=name, host=_enclosing(name, hosts), norm=closing[-1] if closing else None,
                hidden_size=seen[name].shape[-1], causal=name in causal_blocks,
            )  # fmt: skip
        )
    if not sites:
        raise ValueError("no transformer blocks found: looked for layer lists that hold query, key and value projections")
    return sites


def mask_arguments(host: nn.Module) -> dict[str, int]:
    """Position of the padding masks among a model's arguments."""
    names = list(inspect.signature(host.forward).parameters)
    return {name: names.index(name) for name in ("attention_mask", "encoder_attention_mask") if name in names}


def head_names(model: nn.Module) -> list[str]:
    """Children with weights that are neither the backbone nor its output embedding: the newly initialised head."""
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return []
    output = model.get_output_embeddings()
    names = []
    for name, child in model.named_children():
        inside = set(map(id, child.modules()))
        if child is model.base_model or next(child.parameters(), None) is None or (output is not None and id(output) in inside):
            continue
        names.append(name)
    return names


def check(sections: dict) -> list[str]:
    """What can be said of the model folder without loading weights: is the family supported? For `config.load`."""
    model, method, data = sections.get("model"), sections.get("method"), sections.get("data")
    if model is None or not pathlib.Path(model.name, "config.json").is_file():
        return []
    try:
        config = AutoConfig.from_pretrained(model.name, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        return [f"model.name: {model.name}/config.json is not a usable model config: {' '.join(str(error).split())[:200]}"]
    problems = []
    if method is not None and method.name == "unipelt" and config.model_type not in SUPPORTED:
        problems.append(
            f"model.name: UniPELT does not support the model type {config.model_type} yet; supported: {', '.join(SUPPORTED)}"
        )
    if not any(found for pattern in ("*.safetensors", "*.bin") for found in pathlib.Path(model.name).glob(pattern)):
        problems.append(f"model.name: {model.name} has no weights (*.safetensors or *.bin)")
    if data is not None and "max_length" in data.model_fields_set:
        problems += length_problems(data, model, config)
    return problems


def length_problems(data: DataSettings, model: ModelSettings, config: PretrainedConfig) -> list[str]:
    """Inputs longer than the model's table of positions would end in an index error in the middle of a run."""
    limit = position_limit(config)
    if limit is None or data.max_length <= limit:
        return []
    return [f"data.max_length: {data.max_length} tokens, but {model.name} has {limit} positions"]


def fit_length(settings: Settings, config: PretrainedConfig) -> Settings:
    """A length the user did not choose shrinks to what the model takes. Raises ConfigError for a chosen one that is too long."""
    limit = position_limit(config)
    if "max_length" not in settings.data.model_fields_set and limit is not None and limit < settings.data.max_length:
        return settings.model_copy(update={"data": settings.data.model_copy(update={"max_length": limit})})
    if problems := length_problems(settings.data, settings.model, config):
        raise ConfigError(problems)
    return settings


def position_limit(config: PretrainedConfig) -> int | None:
    """Most tokens that a model with learned positions takes; None where there is no such table."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    # The RoBERTa family counts positions from padding_idx + 1.
    return positions - config.pad_token_id - 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else positions


def _unreadable(name: str, error: Exception) -> ConfigError:
    return ConfigError(f"model.name: {name} cannot be loaded: {' '.join(str(error).split())[:300]}")


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The backbone's own tokenizer. Raises ConfigError if it cannot be loaded or cannot pad."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            settings.name, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise _unreadable(settings.name, error) from error
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"model.name: the tokenizer of {settings.name} has no padding token")
    return tokenizer


def load_config(settings: ModelSettings) -> PretrainedConfig:
    """The backbone's config. Raises ConfigError if it cannot be loaded."""
    try:
        return AutoConfig.from_pretrained(
            settings.name, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise _unreadable(settings.name, error) from error


def load_model(
    settings: ModelSettings, config: PretrainedConfig, labels: list[str] | None, dtype: torch.dtype, device: torch.device, zero3: bool = False
) -> PreTrainedModel:
    """The backbone with a fresh classification head (`labels` in id order) or regression head (`labels` None).

    Quantised weights are made while loading; the head stays in full precision. `zero3`: each process keeps its share of the
    weights, and 8-bit ones are `Int8Linear`, which can be shared out. Raises ConfigError if it cannot be loaded.
    """
    source = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    try:
        if labels is None:
            config.num_labels, config.problem_type = 1, "regression"
        else:
            config.num_labels, config.problem_type = len(labels), "single_label_classification"
            config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
        empty = empty_model(config, settings.attention, dtype)
        heads = tuple(head_names(empty))
        if zero3 and settings.quantization != "nf4":
            if settings.quantization == "8bit":
                replace_linears(empty, heads, dtype)
            model = empty.eval()
            info = load_sharded(model, Weights(model, checkpoint_folder(settings.name, settings.revision)), device)
        else:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                settings.name, config=config, dtype=dtype, attn_implementation=settings.attention,
                ignore_mismatched_sizes=True, output_loading_info=True, **source, **quantised.arguments(settings.quantization, heads, dtype, None if zero3 else device),
            )  # fmt: skip
            if settings.quantization == "8bit":
                quantised.leave_out_scales(model)
            quantised.renew_heads(model, empty, heads)
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        raise _unreadable(settings.name, error) from error
    _check_loaded(settings.name, heads, info)
    return model


def empty_model(config: PretrainedConfig, attention: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device. Not through `from_config`, which under ZeRO-3 would allocate and share out every weight."""
    cls = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    config._attn_implementation = attention
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = cls(config)
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    return model


def _check_loaded(name: str, heads: tuple[str, ...], info: dict) -> None:
    """A head of another size is replaced; anything else that did not come from the checkpoint would train on noise.

    A pooler may be missing (checkpoints of masked language models have none); it stays as initialised.
    """
    mismatched = {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
    strange = [k for k in sorted({*info["missing_keys"], *mismatched}) if not k.startswith(heads) and ".pooler." not in k]
    if strange:
        raise ConfigError(
            f"model.name: the weights in {name} do not fit its config.json: {len(strange)} tensors are missing or have "
            f"another shape, first {strange[0]}"
        )
