"""Where UniPELT goes in a transformers model, found by the structure of the model.

An empty copy of the model runs once on four tokens, with an attention function that only records
its callers (`probe.py`). An attention is a module that called it. A block is an entry of a list of
equal layers that contains attentions. A block is post-LN if it returns the very tensor that its
last norm returned, otherwise pre-LN. In a hybrid model, some entries of that list mix tokens
without a softmax (RECURRENT): they are blocks without an attention.

A model that computes attention itself has its attentions where one query, one key and one value
projection are siblings. Structure does not tell how a fused projection lays out its rows, and which
of these attentions a prefix can reach. Two small tables do (FUSED, BY_SOFTMAX).
"""

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .attention import ATTENTION, Call
from .linear_sites import feed_forward, linear_sites
from .linears import is_linear, sizes
from .probe import probe, unsupported
from .site_types import AttentionSite, BlockSite, FusedQKVLayout, mask_arguments
from .softmax_prefix import BY_SOFTMAX

# Model types whose submodules are all compared with a plain reference (the contract tests). Others
# are accepted if the structure below is found in them.
TESTED = (
    "albert",
    "bart",
    "bert",
    "camembert",
    "deberta-v2",
    "distilbert",
    "electra",
    "falcon_h1",
    "gemma2",
    "gemma3_text",
    "glm4_moe",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "lfm2",
    "llama",
    "mbart",
    "mistral",
    "mixtral",
    "modernbert",
    "mpnet",
    "mt5",
    "opt",
    "pegasus",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "roberta",
    "t5",
    "umt5",
    "xlm-roberta",
)
# Tested decoders that recognise by the positions where a packed text begins. The masks of OPT and
# GPT-OSS ignore them, and so do layers without a softmax.
PACKS = (
    "gemma2",
    "gemma3_text",
    "glm4_moe",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "mixtral",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
)
# Tested model types whose sdpa attention does not work; find_sites says why.
EAGER_ONLY = ("deberta-v2", "gpt_oss", "mpnet", "umt5")
# Attention class → its fused projection and the order of its rows: three parts one after another
# ("parts": all queries, all keys, all values) or three parts for each head ("heads").
FUSED = {
    "GPT2Attention": ("c_attn", "parts"),
    "GPTNeoXAttention": ("query_key_value", "heads"),
    "ModernBertAttention": ("Wqkv", "parts"),
    "Phi3Attention": ("qkv_proj", "parts"),
}
# Kinds of layers, in a config's layer_types, that mix tokens without a softmax.
RECURRENT = ("linear_attention", "conv")
SDPA = ("sdpa", ATTENTION["sdpa"])


def head_names(model: nn.Module) -> list[str]:
    """Return the children that form the newly initialised task head.

    They have weights and are neither the backbone nor its output embedding. T5's model for question
    answering has the parts of the backbone as children, and a linear layer beside them.
    """
    if not isinstance(model, PreTrainedModel):
        return []
    in_parts = model.base_model is model
    if in_parts and not type(model).__name__.endswith("ForQuestionAnswering"):
        return []
    output = model.get_output_embeddings()
    names = []
    for name, child in model.named_children():
        if in_parts and not isinstance(child, nn.Linear):
            continue
        inside = set(map(id, child.modules()))
        is_output = output is not None and id(output) in inside
        if (
            child is not model.base_model
            and any(True for _ in child.parameters())
            and not is_output
        ):
            names.append(name)
    return names


def find_sites(model: nn.Module) -> tuple[list[AttentionSite], list[BlockSite]]:
    """Find all attentions and blocks of a transformers model, in the order in which they run.

    This works on an adapted model too, because the names come from an empty copy.

    Raises:
        ValueError: for a model in which the structure is not found; it names what was looked for.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"UniPELT needs a transformers model, got {type(model).__name__}")
    return _Search(model).sites()


def linear_layers(model: PreTrainedModel) -> dict[str, list[str]]:
    """Return the linear layers of each block, in the order in which they finish.

    This works on an adapted model too. Experts whose weights are one tensor are no linear layers.
    """
    run = probe(model)
    linear = [name for name in run.outputs if is_linear(run.modules[name])]
    return {
        site.name: [name for name in linear if name.startswith(site.name + ".")]
        for site in find_sites(model)[1]
    }


class _Search:
    """What the run of an empty copy shows about the structure of the model."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        run = self.run = probe(model)
        self.modules, self.outputs, self.cross = run.modules, run.outputs, run.cross
        self.calls: dict[str, Call | None] = dict(run.calls)
        if not model._can_set_attn_implementation():
            self.calls = {n: None for n, m in self.modules.items() if _computes_attention(m)}
        self.attentions = [name for name in self.outputs if name in self.calls]
        self.lists = _equal_layers(self.modules)
        self._refuse_unknown()
        stacks = self._stacks(self.attentions)
        # In the order in which they finished.
        self.blocks = [n for n in self.outputs if n in self.lists and _list_of(n) in stacks]
        self._refuse_blocks_without_attention()

    def sites(self) -> tuple[list[AttentionSite], list[BlockSite]]:
        """Return the attentions and blocks."""
        causal = {n for n in self.attentions if n not in self.cross and self._is_causal(n)}
        stacks = self._stacks(causal)
        causal_blocks = {name for name in self.blocks if _list_of(name) in stacks}
        sees_later = any(not getattr(self.modules[name], "is_causal", True) for name in causal)
        if self.model.config._attn_implementation in SDPA and sees_later:
            raise ValueError(
                "transformers' sdpa attention lets the decoder of "
                f"{self.model.config.model_type} see later tokens; "
                "load it with attn_implementation='eager'"
            )
        parents = {
            name: module
            for name, module in self.modules.items()
            if isinstance(module, PreTrainedModel) and mask_arguments(module)
        }
        attentions: list[AttentionSite] = []
        for name in self.attentions:
            parent, cross = _enclosing(name, parents), name in self.cross
            layer = sum(site.parent == parent and site.cross == cross for site in attentions)
            in_causal_block = _enclosing(name, self.lists) in causal_blocks
            attentions.append(self._attention(name, parent, layer, name in causal, in_causal_block))
        return attentions, [
            self._block(name, _enclosing(name, parents), name in causal_blocks, attentions)
            for name in self.blocks
        ]

    def _refuse_unknown(self) -> None:
        """Raise ValueError for a model to which UniPELT could be attached only in part."""
        if not self.attentions:
            raise ValueError(
                f"{unsupported(self.model)}: looked for attentions that call transformers' "
                "exchangeable attention function, or have one query, one key and one value "
                "projection, and found none"
            )
        for name in self.attentions:
            module = self.modules[name]
            if _projections(module) is None:
                linear = ", ".join(n for n, m in module.named_children() if is_linear(m))
                raise ValueError(
                    f"{unsupported(self.model)}: looked for one query, one key and one value "
                    f"projection in {type(module).__name__}, found {linear}"
                )
            if not any(name.startswith(entry + ".") for entry in self.lists):
                raise ValueError(
                    f"{unsupported(self.model)}: {name} is in no list of layers of one class"
                )

    def _refuse_blocks_without_attention(self) -> None:
        """Raise ValueError unless the config says that these layers have no softmax."""
        kinds = getattr(self.model.config.get_text_config(), "layer_types", None) or []
        for name in self.blocks:
            if any(attention.startswith(name + ".") for attention in self.attentions):
                continue
            number = int(name.rpartition(".")[2])
            kind = kinds[number] if number < len(kinds) else None
            if kind not in RECURRENT:
                found = type(self.modules[name]).__name__ + (f", {kind}" if kind else "")
                raise ValueError(
                    f"{unsupported(self.model)}: the layer {name} ({found}) has no attention"
                )

    def _stacks(self, attentions: Iterable[str]) -> set[str]:
        """Return the paths of the lists of blocks that contain attentions."""
        return {_list_of(_enclosing(name, self.lists)) for name in attentions}

    def _is_causal(self, name: str) -> bool:
        """Decide by the mask that the attention got, or else by its own attribute."""
        call, module = self.calls[name], self.modules[name]
        if call is not None and call.causal is not None:
            return call.causal
        return bool(getattr(module, "is_causal", call is None and self._takes_cache(module)))

    def _takes_cache(self, module: nn.Module) -> bool:
        """Tell whether an attention that hides its mask belongs to a decoder."""
        names = inspect.signature(module.forward).parameters
        decoder = getattr(self.model.config, "is_decoder", True)
        return decoder and not {"past_key_values", "layer_past"}.isdisjoint(names)

    def _attention(
        self, name: str, parent: str, layer: int, causal: bool, causal_block: bool
    ) -> AttentionSite:
        module: Any = self.modules[name]
        kind = type(module).__name__
        projections, call = _projections(module), self.calls[name]
        assert projections is not None
        query, key, value = projections
        own = BY_SOFTMAX.get(kind) if call is None else None
        if call is None:
            heads, size = (
                (module.num_attention_heads, module.attention_head_size) if own else (0, 0)
            )
            call = Call(module, heads, heads, size, None)
        layout = None
        if query == value:
            layout = FusedQKVLayout(FUSED[kind][1], call.heads, call.kv_heads, call.head_size)
        return AttentionSite(
            name=name,
            parent=parent,
            cross=name in self.cross,
            layer=layer,
            query=f"{name}.{query}",
            key=f"{name}.{key}",
            value=f"{name}.{value}",
            layout=layout,
            hidden_size=sizes(self.modules[f"{name}.{query}"])[0],
            heads=call.heads,
            kv_heads=call.kv_heads,
            head_size=call.head_size,
            causal=causal,
            causal_block=causal_block,
            softmax_scale=own.scale(module) if own else None,
            output=f"{name}.{own.output}" if own and own.output else None,
            projects_positions=own is not None and own.projects_positions,
        )

    def _block(
        self, name: str, parent: str, causal: bool, attentions: list[AttentionSite]
    ) -> BlockSite:
        inside = [path for path in self.outputs if path.startswith(name + ".")]
        output = self.outputs[name]
        closing = [
            path
            for path in inside
            if "Norm" in type(self.modules[path]).__name__ and self.outputs[path] is output
        ]
        attending = [site for site in attentions if site.name.startswith(name + ".")]
        names, width = [site.name for site in attending], output.shape[-1]
        sublayer = feed_forward(self.run, name, names, width)
        return BlockSite(
            name=name,
            parent=parent,
            norm=closing[-1] if closing else None,
            feed_forward=sublayer,
            hidden_size=width,
            causal=causal,
            flat=sublayer is not None and self.outputs[sublayer[1]].dim() == 2,
            linears=linear_sites(self.run, name, attending, width),
        )


def _computes_attention(module: nn.Module) -> bool:
    """Tell whether a module is an attention that calls no exchangeable function."""
    projections = _projections(module)
    separate = projections is not None and len(set(projections)) == 3
    return separate or type(module).__name__ in BY_SOFTMAX


def _projections(module: nn.Module) -> tuple[str, str, str] | None:
    """Return the names of the query, key and value projections.

    They are the only linear children whose names begin with q, k and v, or one fused projection.
    """
    linear = [name for name, child in module.named_children() if isinstance(child, nn.Linear)]
    q, k, v = ([name for name in linear if name.startswith(letter)] for letter in "qkv")
    if len(q) == len(k) == len(v) == 1:
        return q[0], k[0], v[0]
    fused = FUSED.get(type(module).__name__)
    return (fused[0],) * 3 if fused is not None else None


def _list_of(entry: str) -> str:
    """Return the path of the list of an entry."""
    return entry.rpartition(".")[0]


def _enclosing(path: str, candidates: dict[str, Any]) -> str:
    """Return the longest of the candidates' paths that contains a path."""
    around = [n for n in candidates if path == n or path.startswith(n + ".") or n == ""]
    return max(around, key=len)


def _equal_layers(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the entries of lists of one class. T5 also keeps the parts of a layer in a list."""
    layers: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1:
            layers |= {f"{name}.{i}": child for i, child in enumerate(module)}
    return layers
