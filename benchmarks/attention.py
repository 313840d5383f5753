"""Times both ways of a CPU's attention with a prefix, forwards and backwards: torch's fused kernel, and batched products (scaleup.unipelt.kernels.short_attention).

    OMP_NUM_THREADS=1 python -m tests.attention --output results/attention

12 heads of 64, a prefix of 10; the two ways by turns, each one's shortest time and quartile. From these come the numbers of keys up to which
scaleup.unipelt.kernels.short_attention is the way.
"""

import argparse
import json
import pathlib
import statistics
import time
import types

import torch
from torch import nn

from scaleup.unipelt.kernels import short_attention as short
from scaleup.unipelt.prefix import CHILD, unipelt_sdpa, widen_mask

SIZES = (
    (16, 16),
    (16, 32),
    (16, 48),
    (16, 64),
    (16, 96),
    (16, 128),
    (8, 180),
    (4, 256),
)  # examples, tokens
GATES, HEADS, SIZE, LENGTH = ("example", "example, dropout", "query"), 12, 64, 10
WAYS = {"kernel": 0, "products": 10**6}


class Attention(nn.Module):
    """Stands for the attention of a model: its prefix waits in it."""

    def __init__(self, prefix, causal: bool):
        super().__init__()
        self.is_causal, self.num_key_value_groups = causal, 1
        child = nn.Module()
        child.site, child.take_prefix, child.widened = (
            types.SimpleNamespace(causal=causal),
            lambda: prefix,
            widen_mask,
        )
        self.add_module(CHILD, child)


def times(batch: int, tokens: int, gate: str, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each round by way. A gate per query stands in causal attention."""
    torch.manual_seed(0)
    hidden = [torch.randn(batch, tokens, HEADS * SIZE, requires_grad=True) for _ in range(3)]
    own = torch.randn(2, HEADS, LENGTH, SIZE, requires_grad=True)
    gates = torch.rand(batch, tokens if gate == "query" else 1, 1, requires_grad=True)
    weight, attention = (
        torch.randn(batch, tokens, HEADS, SIZE),
        Attention((own, gates), causal=gate == "query"),
    )
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 2):
        for way, most in WAYS.items():
            short.MOST_KEYS = short.MOST_KEYS_BESIDE_SLOW = most
            for leaf in (*hidden, own, gates):
                leaf.grad = None
            began = time.perf_counter()
            heads = [x.view(batch, tokens, HEADS, SIZE).transpose(1, 2) for x in hidden]
            out, _ = unipelt_sdpa(
                attention, *heads, None, dropout=0.1 if "dropout" in gate else 0.0
            )
            out.backward(weight)
            if number >= 2:  # two rounds to warm up
                found[way].append(1000 * (time.perf_counter() - began))
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    rows = []
    for gate in GATES:
        for batch, tokens in SIZES:
            found = times(batch, tokens, gate, options.rounds)
            best = {way: min(values) for way, values in found.items()}
            rows.append(
                {
                    "gate": gate,
                    "examples": batch,
                    "tokens": tokens,
                    "ratio": round(best["products"] / best["kernel"], 3),
                }
            )
            rows[-1] |= {
                way: {
                    "best": round(best[way], 2),
                    "quartile": round(statistics.quantiles(values, n=4)[0], 2),
                }
                for way, values in found.items()
            }
            print(
                f"{gate:<17} {batch:3d} x {tokens:3d}: kernel {best['kernel']:7.2f} ms, products {best['products']:7.2f} ms, {rows[-1]['ratio']:.2f}"
            )
    options.output.mkdir(parents=True, exist_ok=True)
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    (options.output / "ways.json").write_text(
        json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
