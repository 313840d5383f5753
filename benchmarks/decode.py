"""Count the torch operations that one generated token costs a Llama, with and without UniPELT.

    python -m benchmarks.decode --output results/decode/kernels.json

On a GPU an operation is a kernel launch. Views are not counted. The operations of a layer are the
difference between models of four and of three layers; their number does not depend on the
width.

bare: no UniPELT. ungated: constant gates. gated: learned gates with running totals in the cache. no
past: learned gates without the totals of earlier tokens, which is wrong but shows what a gate for
the current token alone would cost.
"""

import collections

import torch
from transformers import DynamicCache

from benchmarks.cases import argument_parser, write_result
from scaleup.experiments.meter import CallCounter
from tests.utils.tiny import adapt, backbone

KINDS = ("bare", "ungated", "no past", "gated")


def count_token(kind: str, layers: int) -> collections.Counter[str]:
    """Count the operations of the fifth token."""
    model = backbone("llama", num_hidden_layers=layers)
    if kind != "bare":
        gates = "none" if kind == "ungated" else "learned"
        model = adapt(model, gates=gates, prefix_reparameterization="none")
    if kind == "no past":
        for module in model.modules():
            if hasattr(module, "running"):
                module.running.slots = {}
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7, 8]]), past_key_values=cache, use_cache=True)
        with CallCounter() as counter:
            model(input_ids=torch.tensor([[9]]), past_key_values=cache, use_cache=True)
    del counter.calls["_unsafe_view"]  # a view, although torch does not mark it as one
    return counter.calls


def main() -> None:
    """Count all kinds."""
    options = argument_parser(__doc__).parse_args()
    rows = {}
    for kind in KINDS:
        four = count_token(kind, 4)
        layer = four - count_token(kind, 3)
        once = four.total() - 4 * layer.total()
        calls = dict(sorted(layer.items()))
        rows[kind] = {"layer": layer.total(), "once": once, "layer_calls": calls}
        print(f"{kind}: {layer.total()} per layer, {once} once")
    write_result(options.output, rows)


if __name__ == "__main__":
    main()
