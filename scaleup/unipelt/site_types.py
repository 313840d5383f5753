"""The sites of a model at which UniPELT is attached, and what a parent model says about tokens."""

import dataclasses
import inspect

from torch import nn

# Where a cross attention gets the encoder's output: BART and T5, BERT.
ENCODER_ARGUMENTS = ("key_value_states", "encoder_hidden_states")
TOKEN_ARGUMENTS = ("input_ids", "inputs_embeds")  # [B, T] or [B, T, D]; a pass has one of them


@dataclasses.dataclass(frozen=True)
class FusedQKVLayout:
    """The rows of a fused projection: `order` as in FUSED, the numbers of heads, the head size."""

    order: str
    heads: int
    kv_heads: int
    head_size: int


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """One attention of a model. Names are paths in the model.

    Attributes:
        name: path of the attention.
        parent: path of the smallest model around it, which gets the padding mask.
        cross: whether it attends to the encoder.
        layer: its number among the attentions of the same parent model and kind.
        query, key, value: paths of the projections; equal if they are fused.
        layout: of a fused projection, else None.
        hidden_size: width of its input.
        heads: number of query heads.
        kv_heads, head_size: number and size of the key-value heads. All three are 0 if no prefix
            can take part in its softmax.
        causal: whether its mask hides later keys from a query.
        causal_block: whether it belongs to a decoder's layer, where nothing may depend on later
            tokens.
        softmax_scale: the factor of q·k where a prefix enters through the softmax (BY_SOFTMAX),
            else None.
        output: path of the projection through which the prefix's context passes there, None if the
            context is added to the attention's output.
        projects_positions: whether position embeddings pass through its projections too.
    """

    name: str
    parent: str
    cross: bool
    layer: int
    query: str
    key: str
    value: str
    layout: FusedQKVLayout | None
    hidden_size: int
    heads: int
    kv_heads: int
    head_size: int
    causal: bool
    causal_block: bool
    softmax_scale: float | None = None
    output: str | None = None
    projects_positions: bool = False

    @property
    def takes_prefix(self) -> bool:
        return self.kv_heads > 0


@dataclasses.dataclass(frozen=True)
class LinearSite:
    """Linear layers of a block that read the same input, apart from queries, keys and values.

    Attributes:
        linears: their paths in the model, in the order in which they run.
        hidden_size: width of the input.
        attention_output: whether this is the output projection of an attention.
    """

    linears: tuple[str, ...]
    hidden_size: int
    attention_output: bool

    @property
    def name(self) -> str:
        """The path of the first layer, by which the site is reported."""
        return self.linears[0]


@dataclasses.dataclass(frozen=True)
class BlockSite:
    """One layer of the stack. Names are paths in the model.

    Attributes:
        name: path of the block.
        parent: path of the smallest model around it.
        norm: path of the closing norm of a post-LN block, None for a pre-LN block.
        feed_forward: paths of the first and the last projection of its feed-forward sublayer, twice
            that of the sublayer if it is a mixture of experts, None if they were not found.
        hidden_size: width of its output.
        causal: whether nothing in it may depend on later tokens.
        flat: whether the feed-forward sublayer gets the tokens of all examples as one matrix
            [B·T, D].
        linears: its linear layers that are no projections of queries, keys or values.
    """

    name: str
    parent: str
    norm: str | None
    feed_forward: tuple[str, str] | None
    hidden_size: int
    causal: bool
    flat: bool = False
    linears: tuple[LinearSite, ...] = ()


def mask_arguments(parent: nn.Module) -> dict[str, int]:
    """Return the positions of the arguments from which pooling learns about examples and tokens.

    Empty for a model that takes no attention mask.
    """
    names = list(inspect.signature(parent.forward).parameters)
    wanted = ("attention_mask", "encoder_attention_mask", "position_ids", *TOKEN_ARGUMENTS)
    if "attention_mask" not in names:
        return {}
    return {name: names.index(name) for name in wanted if name in names}
