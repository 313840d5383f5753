"""Where UniPELT goes in a transformers model, found by the structure of the model.

An empty copy of the model (meta device: no memory, no weights) runs once on four tokens with an attention function that only
takes notes. An attention is a module that called it; a block is the entry of a list of equal layers that holds attentions; a
block is post-LN if it returns the very tensor that its last norm returned, else pre-LN.

Two things structure cannot tell, and two small tables do: how a fused projection lays out its rows, and which models compute
attention by themselves although a prefix can reach them.
"""

import copy
import dataclasses
import inspect

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from scaleup.unipelt.prefix import ATTENTION, PROBE, Call, probing

# The model types whose every submodule is compared with a plain reference (tests/test_contract.py). Others are taken if the
# structure below is found in them.
TESTED = (
    "albert",
    "bart",
    "bert",
    "camembert",
    "deberta-v2",
    "distilbert",
    "electra",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mbart",
    "mistral",
    "modernbert",
    "mt5",
    "opt",
    "pegasus",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "roberta",
    "t5",
    "umt5",
    "xlm-roberta",
)
# Decoders of them that tell by the positions where a packed text begins; OPT makes its mask without them.
PACKS = (
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
)
# Those of them whose sdpa attention does not do: the structure is looked at only to say why.
EAGER_ONLY = ("deberta-v2", "umt5")
# Where a cross attention gets the encoder's output: BART and T5, BERT.
ENCODER_ARGUMENTS = ("key_value_states", "encoder_hidden_states")
# Attention class → its projection of query, key and value in one, and the order of its rows: three parts one after another
# ("parts": all queries, all keys, all values) or three parts for each head ("heads").
FUSED = {
    "GPT2Attention": ("c_attn", "parts"),
    "GPTNeoXAttention": ("query_key_value", "heads"),
    "ModernBertAttention": ("Wqkv", "parts"),
    "Phi3Attention": ("qkv_proj", "parts"),
}
# Attentions that call no exchangeable function but torch's softmax, once, on their scores [B, H, T, S] → the factor of q·k in
# them. DeBERTa's is 1/√(E·n), n: how many kinds of scores it adds up (content to content, and those it names).
BY_SOFTMAX = {
    "DisentangledSelfAttention": lambda module: (
        (module.attention_head_size * (1 + len({"c2p", "p2c"} & set(module.pos_att_type)))) ** -0.5
    )
}
SDPA = ("sdpa", ATTENTION["sdpa"])


@dataclasses.dataclass(frozen=True)
class FusedQKVLayout:
    """What a fused projection's rows are: `order` as in FUSED, heads of queries and of keys, size of a head."""

    order: str
    heads: int
    kv_heads: int
    head_size: int


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """One attention. Names are paths in the model; `layer` counts the attentions of the same host and kind."""

    name: str
    host: str  # the smallest model around it, the one that gets the padding mask
    cross: bool
    layer: int
    query: str  # path of the projection; the same for query and value where they are fused
    value: str
    rows: FusedQKVLayout | None  # of a fused projection
    hidden_size: int
    kv_heads: int
    head_size: int
    causal: bool  # the attention's own mask: queries do not see later keys
    causal_block: bool  # it belongs to a decoder's layer, where nothing may depend on later tokens
    softmax_scale: float | None  # where a prefix enters through the softmax, see BY_SOFTMAX


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
    config._attn_implementation = PROBE if model._can_set_attn_implementation() else "eager"
    if "quantization_config" in config.__dict__:  # the copy has no weights to quantise
        del config.quantization_config
    with torch.device("meta"):
        return type(model)(config).eval()


def _run_once(model: PreTrainedModel) -> None:
    """Four tokens through the backbone, without a head."""
    tokens = torch.ones(1, 4, dtype=torch.long, device="meta")
    inputs = {
        "input_ids": tokens,
        "attention_mask": tokens,
    }  # without a mask, decoders look at values for packed sequences
    if model.config.is_encoder_decoder:
        inputs |= {f"decoder_{name}": tensor for name, tensor in inputs.items()}
    try:
        with torch.no_grad():
            model.base_model(**inputs)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"UniPELT does not support the model type {model.config.model_type}: it does not run without weights ({' '.join(str(error).split())[:100]})"
        ) from error


def _first(output: object) -> object:
    return output[0] if isinstance(output, (tuple, list)) else output


def _projections(module: nn.Module) -> tuple[str, str, str] | None:
    """Names of the query, key and value projection: the only linear children whose names begin with q, k and v."""
    linear = [name for name, child in module.named_children() if isinstance(child, nn.Linear)]
    named = [[name for name in linear if name.startswith(letter)] for letter in "qkv"]
    if all(len(names) == 1 for names in named):
        return tuple(names[0] for names in named)
    fused = FUSED.get(type(module).__name__)
    return (fused[0],) * 3 if fused is not None else None


def _enclosing(path: str, candidates: dict[str, object]) -> str:
    """The longest of the candidates' paths that contains `path`."""
    around = [
        name for name in candidates if path == name or path.startswith(name + ".") or name == ""
    ]
    return max(around, key=len)


def _layers(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Entries of lists whose entries are all of one class: T5 keeps the parts of a layer in a list, too."""
    found = {}
    for name, parent in modules.items():
        if isinstance(parent, nn.ModuleList) and len({type(child) for child in parent}) == 1:
            found |= {f"{name}.{i}": child for i, child in enumerate(parent)}
    return found


class _Notes:
    """What the modules of interest returned, in running order, and which attentions got an encoder's output."""

    def __init__(self) -> None:
        self.outputs: dict[str, object] = {}
        self.cross: set[str] = set()

    def watch(self, name: str, module: nn.Module) -> None:
        def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
            if any(kwargs.get(argument) is not None for argument in ENCODER_ARGUMENTS):
                self.cross.add(name)

        def after(_: nn.Module, args: tuple, output: object) -> None:
            self.outputs[name] = _first(output)

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)


def find_sites(model: nn.Module) -> tuple[list[AttentionSite], list[BlockSite]]:
    """All attentions and blocks of a transformers model, in the order in which they run.

    Works on an adapted model too: names come from an empty copy. Raises ValueError for a model in which the structure is
    not found, with the modules that were looked for.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"UniPELT needs a transformers model, got {type(model).__name__}")
    probe = _empty_copy(model)
    modules = dict(probe.named_modules())
    if not model._can_set_attn_implementation() and not any(
        type(module).__name__ in BY_SOFTMAX for module in modules.values()
    ):
        raise ValueError(
            f"UniPELT does not support the model type {model.config.model_type}: its attention cannot be exchanged in transformers"
        )
    names = {id(module): name for name, module in modules.items()}
    by_softmax = [name for name, module in modules.items() if type(module).__name__ in BY_SOFTMAX]
    notes = _Notes()
    for name, module in modules.items():
        notes.watch(name, module)
    with probing() as calls:
        _run_once(probe)
        calls = {names[id(call.module)]: call for call in calls} | dict.fromkeys(by_softmax)
    attentions = [name for name in notes.outputs if name in calls]
    lists = _layers(modules)
    _refuse_unknown(model, modules, attentions, lists, notes)
    blocks = dict.fromkeys(_enclosing(name, lists) for name in attentions)
    causal = {
        name
        for name in attentions
        if name not in notes.cross and _causal(modules[name], calls[name])
    }
    causal_blocks = {_enclosing(name, lists) for name in causal}
    if model.config._attn_implementation in SDPA and any(
        not getattr(modules[name], "is_causal", True) for name in causal
    ):
        raise ValueError(
            f"transformers' sdpa attention lets the decoder of {model.config.model_type} see later tokens; load it with attn_implementation='eager'"
        )
    hosts = {
        name: module
        for name, module in modules.items()
        if isinstance(module, PreTrainedModel) and mask_arguments(module)
    }
    sites = []
    for name in attentions:
        host, block = _enclosing(name, hosts), _enclosing(name, lists)
        layer = sum(site.host == host and site.cross == (name in notes.cross) for site in sites)
        sites.append(
            _attention_site(
                name,
                modules,
                calls[name],
                host,
                layer,
                name in notes.cross,
                name in causal,
                block in causal_blocks,
            )
        )
    norms = [
        name
        for name, module in modules.items()
        if "Norm" in type(module).__name__ and name in notes.outputs
    ]
    return sites, [
        _block_site(name, norms, notes.outputs, _enclosing(name, hosts), name in causal_blocks)
        for name in blocks
    ]


def _refuse_unknown(
    model: PreTrainedModel, modules: dict, attentions: list[str], lists: dict, notes: _Notes
) -> None:
    """Raises ValueError for a model to which UniPELT could be attached only in part."""
    kind = f"UniPELT does not support the model type {model.config.model_type}"
    if not attentions:
        raise ValueError(
            f"{kind}: looked for attentions that call transformers' exchangeable attention function and found none"
        )
    for name in attentions:
        module = modules[name]
        if _projections(module) is None:
            linear = ", ".join(
                child for child, m in module.named_children() if isinstance(m, (nn.Linear, Conv1D))
            )
            raise ValueError(
                f"{kind}: looked for one query, one key and one value projection in {type(module).__name__}, found {linear}"
            )
        if not any(name.startswith(entry + ".") for entry in lists):
            raise ValueError(f"{kind}: {name} is in no list of equal layers")
    used = {entry.rpartition(".")[0] for entry in (_enclosing(name, lists) for name in attentions)}
    for entry, module in lists.items():
        if (
            entry.rpartition(".")[0] in used
            and entry in notes.outputs
            and not any(name.startswith(entry + ".") for name in attentions)
        ):
            raise ValueError(
                f"{kind}: the layer {entry} ({type(module).__name__}) has no attention"
            )


def _causal(module: nn.Module, call: Call | None) -> bool:
    """By the mask it was given, else by its own word."""
    return (
        bool(getattr(module, "is_causal", False))
        if call is None or call.causal is None
        else call.causal
    )


def _attention_site(
    name: str,
    modules: dict,
    call: Call | None,
    host: str,
    layer: int,
    cross: bool,
    causal: bool,
    causal_block: bool,
) -> AttentionSite:
    module = modules[name]
    query, _, value = _projections(module)
    if call is None:  # BY_SOFTMAX
        call = Call(
            module,
            module.num_attention_heads,
            module.num_attention_heads,
            module.attention_head_size,
            None,
        )
    projection = modules[f"{name}.{query}"]
    fused = FUSED.get(type(module).__name__) if query == value else None
    return AttentionSite(
        name=name,
        host=host,
        cross=cross,
        layer=layer,
        query=f"{name}.{query}",
        value=f"{name}.{value}",
        rows=FusedQKVLayout(fused[1], call.heads, call.kv_heads, call.head_size)
        if fused is not None
        else None,
        hidden_size=projection.nx if isinstance(projection, Conv1D) else projection.in_features,
        kv_heads=call.kv_heads,
        head_size=call.head_size,
        causal=causal,
        causal_block=causal_block,
        softmax_scale=BY_SOFTMAX[type(module).__name__](module)
        if type(module).__name__ in BY_SOFTMAX
        else None,
    )


def _block_site(
    name: str, norms: list[str], outputs: dict[str, object], host: str, causal: bool
) -> BlockSite:
    closing = [
        norm for norm in norms if norm.startswith(name + ".") and outputs[norm] is outputs[name]
    ]
    return BlockSite(
        name=name,
        host=host,
        norm=closing[-1] if closing else None,
        hidden_size=outputs[name].shape[-1],
        causal=causal,
    )


def mask_arguments(host: nn.Module) -> dict[str, int]:
    """Position of the arguments that a gate's pooling reads among a model's: padding masks and positions."""
    names = list(inspect.signature(host.forward).parameters)
    wanted = ("attention_mask", "encoder_attention_mask", "position_ids")
    return (
        {name: names.index(name) for name in wanted if name in names}
        if "attention_mask" in names
        else {}
    )


def head_names(model: nn.Module) -> list[str]:
    """Children with weights that are neither the backbone nor its output embedding: the newly initialised head."""
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return []
    output = model.get_output_embeddings()
    names = []
    for name, child in model.named_children():
        inside = set(map(id, child.modules()))
        if (
            child is model.base_model
            or next(child.parameters(), None) is None
            or (output is not None and id(output) in inside)
        ):
            continue
        names.append(name)
    return names
