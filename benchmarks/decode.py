"""Counts what one generated token costs a Llama in calls of torch operations (on a GPU: kernel launches), with and without UniPELT.

    python -m tests.decode --output results/decode

A layer's calls are the difference between models of four and of three layers; their number does not depend on the width. Views
do not count. `gated`: learned gates as they generate, running totals in the cache; `no past`: the same gates without the
totals of earlier tokens (wrong, but what a gate per token alone would cost); `ungated`: constant gates.
"""

import argparse
import collections
import json
import pathlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from tests.utils.tiny import adapt, backbone

VIEWS = {
    "view",
    "_unsafe_view",
    "transpose",
    "t",
    "permute",
    "slice",
    "select",
    "expand",
    "unsqueeze",
    "squeeze",
    "detach",
    "alias",
    "split",
    "split_with_sizes",
    "unbind",
    "lift_fresh",
    "_reshape_alias",
    "unflatten",
}


class Count(TorchDispatchMode):
    """Calls by the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


def token(kind: str, layers: int) -> collections.Counter[str]:
    """The calls of the fifth token."""
    model = backbone("llama", num_hidden_layers=layers)
    if kind != "bare":
        # The prefix as it is stored: at inference no MLP is behind it.
        model = adapt(
            model,
            gates="none" if kind == "ungated" else "learned",
            prefix_reparameterization="none",
        )
    if kind == "no past":
        for module in model.modules():
            if hasattr(module, "running"):
                module.running.slots = {}
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7, 8]]), past_key_values=cache, use_cache=True)
        with Count() as count:
            model(input_ids=torch.tensor([[9]]), past_key_values=cache, use_cache=True)
    return count.calls


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=pathlib.Path, required=True)
    options = parser.parse_args()
    rows = {}
    for kind in ("bare", "ungated", "no past", "gated"):
        four, three = token(kind, 4), token(kind, 3)
        rows[kind] = {
            "layer": (four - three).total(),
            "once": four.total() - 4 * (four - three).total(),
            "layer_calls": dict(sorted((four - three).items())),
        }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "kernels.json").write_text(
        json.dumps(rows, indent=1) + "\n", encoding="utf-8"
    )
    print(
        *(f"{kind}: {row['layer']} per layer, {row['once']} besides" for kind, row in rows.items()),
        sep="\n",
    )


if __name__ == "__main__":
    main()
