"""Where UniPELT goes in a transformers model, found by the structure of the model.

An empty copy of the model (meta device: no memory, no weights) runs once on four tokens, with an
attention function that only records its callers. An attention is a module that called it. A block
is the entry of a list of equal layers that contains attentions. A block is post-LN if it returns
the very tensor that its last norm returned, otherwise pre-LN.

A model that computes attention itself has its attentions where one query, one key and one value
projection are siblings. Structure does not tell how a fused projection lays out its rows, and which
of these attentions a prefix can reach. Two small tables do (FUSED, BY_SOFTMAX).
"""

import copy
import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .attention import ATTENTION, PROBE, Call, models_with_own_config, probing
from .site_types import ENCODER_ARGUMENTS, AttentionSite, BlockSite, FusedQKVLayout, mask_arguments
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
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mbart",
    "mistral",
    "modernbert",
    "mpnet",
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
# Tested decoders that recognise by the positions where a packed text begins. OPT's mask ignores
# them.
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
# Tested model types whose sdpa attention does not work; find_sites says why.
EAGER_ONLY = ("deberta-v2", "mpnet", "umt5")
# Attention class → its fused projection and the order of its rows: three parts one after another
# ("parts": all queries, all keys, all values) or three parts for each head ("heads").
FUSED = {
    "GPT2Attention": ("c_attn", "parts"),
    "GPTNeoXAttention": ("query_key_value", "heads"),
    "ModernBertAttention": ("Wqkv", "parts"),
    "Phi3Attention": ("qkv_proj", "parts"),
}
SDPA = ("sdpa", ATTENTION["sdpa"])


def head_names(model: nn.Module) -> list[str]:
    """Return the children that form the newly initialised task head.

    They have weights and are neither the backbone nor its output embedding.
    """
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return []
    output = model.get_output_embeddings()
    names = []
    for name, child in model.named_children():
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


class _Search:
    """The run of an empty copy, and what it shows about the structure of the model."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        probe = _empty_copy(model)
        self.modules: dict[str, nn.Module] = dict(probe.named_modules())
        self.outputs: dict[str, Any] = {}  # in the order in which modules finished
        self.cross: set[str] = set()
        for name, module in self.modules.items():
            self._watch(name, module)
        paths = {id(module): name for name, module in self.modules.items()}
        with probing() as calls:
            self._run(probe)
            self.calls: dict[str, Call | None] = {paths[id(call.module)]: call for call in calls}
        if not model._can_set_attn_implementation():
            self.calls = {n: None for n, m in self.modules.items() if _computes_attention(m)}
        self.attentions = [name for name in self.outputs if name in self.calls]
        self.lists = _equal_layers(self.modules)
        self._refuse_unknown()

    def sites(self) -> tuple[list[AttentionSite], list[BlockSite]]:
        """Return the attentions and blocks."""
        causal = {n for n in self.attentions if n not in self.cross and self._is_causal(n)}
        causal_blocks = {_enclosing(name, self.lists) for name in causal}
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
        blocks = dict.fromkeys(_enclosing(name, self.lists) for name in self.attentions)
        return attentions, [
            self._block(name, _enclosing(name, parents), name in causal_blocks) for name in blocks
        ]

    def _watch(self, name: str, module: nn.Module) -> None:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if any(kwargs.get(argument) is not None for argument in ENCODER_ARGUMENTS):
                self.cross.add(name)

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.outputs[name] = output[0] if isinstance(output, (tuple, list)) else output

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)

    def _run(self, probe: PreTrainedModel) -> None:
        """Run four tokens through the backbone, without a head."""
        tokens = torch.ones(1, 4, dtype=torch.long, device="meta")
        # Without a mask, decoders look at values to find packed sequences.
        inputs = {"input_ids": tokens, "attention_mask": tokens}
        if probe.config.is_encoder_decoder:
            inputs |= {f"decoder_{name}": tensor for name, tensor in inputs.items()}
        try:
            with torch.no_grad():
                probe.base_model(**inputs)
        except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:100]
            raise ValueError(
                f"{self._unsupported()}: it does not run without weights ({reason})"
            ) from error

    def _unsupported(self) -> str:
        return f"UniPELT does not support the model type {self.model.config.model_type}"

    def _refuse_unknown(self) -> None:
        """Raise ValueError for a model to which UniPELT could be attached only in part."""
        if not self.attentions:
            raise ValueError(
                f"{self._unsupported()}: looked for attentions that call transformers' "
                "exchangeable attention function, or have one query, one key and one value "
                "projection, and found none"
            )
        for name in self.attentions:
            module = self.modules[name]
            if _projections(module) is None:
                linear = ", ".join(n for n, m in module.named_children() if _is_linear(m))
                raise ValueError(
                    f"{self._unsupported()}: looked for one query, one key and one value "
                    f"projection in {type(module).__name__}, found {linear}"
                )
            if not any(name.startswith(entry + ".") for entry in self.lists):
                raise ValueError(f"{self._unsupported()}: {name} is in no list of equal layers")
        used = {_enclosing(name, self.lists).rpartition(".")[0] for name in self.attentions}
        for entry, module in self.lists.items():
            without = not any(name.startswith(entry + ".") for name in self.attentions)
            if entry.rpartition(".")[0] in used and entry in self.outputs and without:
                raise ValueError(
                    f"{self._unsupported()}: the layer {entry} ({type(module).__name__}) "
                    "has no attention"
                )

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
        query, _, value = projections
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
            value=f"{name}.{value}",
            layout=layout,
            hidden_size=_sizes(self.modules[f"{name}.{query}"])[0],
            kv_heads=call.kv_heads,
            head_size=call.head_size,
            causal=causal,
            causal_block=causal_block,
            softmax_scale=own.scale(module) if own else None,
            output=f"{name}.{own.output}" if own and own.output else None,
            projects_positions=own is not None and own.projects_positions,
        )

    def _block(self, name: str, parent: str, causal: bool) -> BlockSite:
        inside = [path for path in self.outputs if path.startswith(name + ".")]
        output = self.outputs[name]
        closing = [
            path
            for path in inside
            if "Norm" in type(self.modules[path]).__name__ and self.outputs[path] is output
        ]
        feed_forward = self._feed_forward(inside, output.shape[-1])
        return BlockSite(
            name=name,
            parent=parent,
            norm=closing[-1] if closing else None,
            feed_forward=feed_forward,
            hidden_size=output.shape[-1],
            causal=causal,
            flat=feed_forward is not None and self.outputs[feed_forward[1]].dim() == 2,
        )

    def _feed_forward(self, inside: list[str], hidden_size: int) -> tuple[str, str] | None:
        """Find the projections around the feed-forward sublayer's inner units.

        The last one returns to the hidden size. The first one is the first projection after the
        attentions that leads from the hidden size to as many units, or twice as many if it is
        gated.
        """
        last_attention = max(inside.index(n) for n in self.attentions if n in inside)
        after = [path for path in inside[last_attention:] if _is_linear(self.modules[path])]
        sizes = {path: _sizes(self.modules[path]) for path in after}
        last = next((path for path in reversed(after) if sizes[path][1] == hidden_size), None)
        if last is None:
            return None
        units = sizes[last][0]
        wanted = {(hidden_size, units), (hidden_size, 2 * units)}
        first = next((path for path in after if sizes[path] in wanted and path != last), None)
        return None if first is None else (first, last)


def _empty_copy(model: PreTrainedModel) -> PreTrainedModel:
    config = copy.deepcopy(model.config)
    config._attn_implementation = PROBE if model._can_set_attn_implementation() else "eager"
    if "quantization_config" in config.__dict__:  # the copy has no weights to quantise
        del config.quantization_config
    with torch.device("meta"):
        probe = type(model)(config).eval()
    # The mask of eager attention looks at values, which the copy does not have.
    for part in models_with_own_config(probe):
        part.config._attn_implementation = PROBE
    return probe


def _computes_attention(module: nn.Module) -> bool:
    """Tell whether a module is an attention that calls no exchangeable function."""
    projections = _projections(module)
    separate = projections is not None and len(set(projections)) == 3
    return separate or type(module).__name__ in BY_SOFTMAX


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _sizes(projection: Any) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a projection."""
    if isinstance(projection, Conv1D):
        return projection.nx, projection.nf
    return projection.in_features, projection.out_features


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
