"""The kinds of exports. `scaleup/export/export.py` says what each of them is."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the rest of the package has to know about a kind.

    Attributes:
        idle: options without effect on it.
        needs_data: whether its content depends on data.
        absorbs: whether low-rank updates absorb what UniPELT does.
        with_peft: whether PEFT loads it beside the backbone; the others are transformers folders.
        advice: what loses less of the metric.
    """

    idle: tuple[str, ...]
    needs_data: bool = False
    absorbs: bool = False
    with_peft: bool = False
    advice: str = ""


KINDS = {
    "exact": Kind(
        idle=("examples", "prune", "dtype", "max_shard_size", "rank", "epochs"), with_peft=True
    ),
    "standalone": Kind(
        idle=("examples", "prune", "rank", "epochs"),
        advice="the data type or the quantisation of the weights is the cause: try --dtype float32",
    ),
    "merged": Kind(
        idle=("rank", "epochs"), needs_data=True, advice="--kind standalone keeps the learned gates"
    ),
    "plain": Kind(
        idle=("prune",),
        needs_data=True,
        absorbs=True,
        advice="more --rank, --examples or --epochs lose less, --kind standalone nothing",
    ),
    "lora": Kind(
        idle=("prune", "dtype", "max_shard_size"),
        needs_data=True,
        absorbs=True,
        with_peft=True,
        advice="more --rank, --examples or --epochs lose less, --kind exact nothing",
    ),
}
