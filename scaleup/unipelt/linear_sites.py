"""Find the linear layers of a block from the run of an empty copy of the model (`probe.py`)."""

from collections.abc import Sequence

from .linears import is_linear, sizes
from .probe import TOKENS, Run, has_experts
from .site_types import AttentionSite, LinearSite


def feed_forward(
    run: Run, block: str, attentions: Sequence[str], hidden_size: int
) -> tuple[str, str] | None:
    """Find the modules at which the feed-forward sublayer of a block begins and ends.

    A mixture of experts is one module, which is both. Otherwise they are projections: the last
    one returns to the hidden size, and the first one is the first projection after the
    attentions that leads from the hidden size to as many units, or twice as many if it is
    gated. In a block without attention, both are in the same child of the block.

    Args:
        run: the run of an empty copy.
        block: path of the block.
        attentions: paths of its attentions.
        hidden_size: width of its output.
    """
    inside = [path for path in run.outputs if path.startswith(block + ".")]
    for name in (f"{block}.{child}" for child, _ in run.modules[block].named_children()):
        attends = any(path == name or path.startswith(name + ".") for path in attentions)
        if name in inside and not attends and has_experts(run.modules[name]):
            return name, name
    start = max(map(inside.index, attentions), default=0)
    after = [path for path in inside[start:] if is_linear(run.modules[path])]
    shapes = {path: sizes(run.modules[path]) for path in after}
    last = next((path for path in reversed(after) if shapes[path][1] == hidden_size), None)
    if last is None:
        return None
    if not attentions:
        child = last.removeprefix(block + ".").partition(".")[0]
        after = [path for path in after if path.startswith(f"{block}.{child}.")]
    units = shapes[last][0]
    wanted = {(hidden_size, units), (hidden_size, 2 * units)}
    first = next((path for path in after if shapes[path] in wanted and path != last), None)
    return None if first is None else (first, last)


def linear_sites(
    run: Run, block: str, attentions: Sequence[AttentionSite], hidden_size: int
) -> tuple[LinearSite, ...]:
    """Group the linear layers of a block by the tensors that they read.

    The projections of queries, keys and values are left out, because they share the gate of their
    attention. A layer is also left out if it did not read one row per token, because a gate is a
    mean over the tokens of an example: position embeddings belong to no example, and tokens that
    are routed to experts have lost theirs. In a state space model of Mamba only the first
    projection stays, because fused kernels read the weights of the others without calling them.

    Args:
        run: the run of an empty copy.
        block: path of the block.
        attentions: its attentions.
        hidden_size: width of its output.
    """
    ran = [path for path in run.inputs if path.startswith(block + ".")]
    ran = [path for path in ran if run.inputs[path].shape[:-1] in ((1, TOKENS), (TOKENS,))]
    ran = [path for path in ran if not _is_bypassed(run, path)]
    projections: set[str] = set()
    outputs: set[str | None] = set()
    for site in attentions:
        own = [path for path in (site.query, site.key, site.value) if path in ran]
        projections |= {*own}
        outputs.add(_attention_output(run, ran, own, hidden_size))
    groups: dict[tuple[int, bool], list[str]] = {}
    for path in ran:
        if path not in projections:
            groups.setdefault((id(run.inputs[path]), path in outputs), []).append(path)
    return tuple(
        LinearSite(tuple(paths), sizes(run.modules[paths[0]])[0], is_output)
        for (_, is_output), paths in groups.items()
    )


def _is_bypassed(run: Run, path: str) -> bool:
    """Tell whether fused kernels of a state space model may leave out the call of a layer."""
    mixer, _, name = path.rpartition(".")
    return {"A_log", "D"} <= run.modules[mixer]._parameters.keys() and name != "in_proj"


def _attention_output(
    run: Run, ran: list[str], projections: list[str], hidden_size: int
) -> str | None:
    """Return the output projection of an attention.

    It is the first layer to run after the attention's projections that does not read their input.
    In BERT it lies outside of the attention.
    """
    read = {id(run.inputs[path]) for path in projections}
    after = ran[max(map(ran.index, projections)) + 1 :]
    path = next((path for path in after if id(run.inputs[path]) not in read), None)
    return path if path is not None and sizes(run.modules[path])[1] == hidden_size else None
