"""Time two ways to compute attention with a prefix on a CPU, forward and backward.

    OMP_NUM_THREADS=1 python -m benchmarks.attention --output results/attention/ways.json

One way is torch's fused kernel (with a gate per query, over the real keys only, as
scaleup/unipelt/kernels/lse_attention.py calls it); the other is batched matrix products
(scaleup/unipelt/kernels/short_attention.py). There are 12 heads of size 64 and a prefix of length
10. The ways alternate, and the result has the shortest time and the first quartile of each. It
decides up to how many keys short_attention is used.
"""

import statistics
import time
import types

import torch
from torch import nn

from benchmarks.cases import argument_parser, write_result
from scaleup.unipelt.attention import ATTENTION_CHILD, unipelt_sdpa
from scaleup.unipelt.kernels import short_attention
from scaleup.unipelt.masks import PassMasks

# (examples, tokens)
SHAPES = ((16, 16), (16, 32), (16, 48), (16, 64), (16, 96), (16, 128), (8, 180), (4, 256))
GATES = ("example", "example, dropout", "query")
HEADS, HEAD_SIZE, PREFIX_LENGTH = 12, 64, 10
MOST_KEYS = {"kernel": 0, "products": 10**6}  # way → the most keys for which products are used
LIMITS = ("MOST_KEYS", "MOST_KEYS_PER_QUERY", "MOST_KEYS_WITHOUT_FUSED")
WARM_UP_ROUNDS = 2


class Attention(nn.Module):
    """Stand in for a model's attention whose prefix is ready."""

    def __init__(self, prefix: tuple[torch.Tensor, torch.Tensor], causal: bool):
        super().__init__()
        self.is_causal, self.num_key_value_groups = causal, 1
        child = nn.Module()
        child.prefix_source = types.SimpleNamespace(
            causal=causal, take_prefix=lambda: prefix, masks=PassMasks, observer=lambda: None
        )
        self.add_module(ATTENTION_CHILD, child)


def measure(batch: int, tokens: int, gate: str, rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of each round for both ways. A gate per query implies causality."""
    torch.manual_seed(0)
    per_query, dropout = gate == "query", 0.1 if "dropout" in gate else 0.0
    hidden = [torch.randn(batch, tokens, HEADS * HEAD_SIZE, requires_grad=True) for _ in range(3)]
    prefix = torch.randn(2, HEADS, PREFIX_LENGTH, HEAD_SIZE, requires_grad=True)
    gates = torch.rand(batch, tokens if per_query else 1, 1, requires_grad=True)
    weight = torch.randn(batch, tokens, HEADS, HEAD_SIZE)
    attention = Attention((prefix, gates), causal=per_query)
    milliseconds: dict[str, list[float]] = {way: [] for way in MOST_KEYS}
    for number in range(rounds + WARM_UP_ROUNDS):
        for way, most in MOST_KEYS.items():
            for name in LIMITS:
                setattr(short_attention, name, most)
            for leaf in (*hidden, prefix, gates):
                leaf.grad = None
            began = time.perf_counter()
            heads = [x.view(batch, tokens, HEADS, HEAD_SIZE).transpose(1, 2) for x in hidden]
            out, _ = unipelt_sdpa(attention, *heads, None, dropout=dropout)
            out.backward(weight)
            if number >= WARM_UP_ROUNDS:
                milliseconds[way].append(1000 * (time.perf_counter() - began))
    return milliseconds


def main() -> None:
    """Measure all shapes and kinds of gates."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    rows = []
    for gate in GATES:
        for batch, tokens in SHAPES:
            times = measure(batch, tokens, gate, options.rounds)
            best = {way: min(values) for way, values in times.items()}
            ratio = best["products"] / best["kernel"]
            row = {"gate": gate, "examples": batch, "tokens": tokens, "ratio": round(ratio, 3)}
            for way, values in times.items():
                quartile = statistics.quantiles(values, n=4)[0]
                row[way] = {"best": round(best[way], 2), "quartile": round(quartile, 2)}
            rows.append(row)
            print(
                f"{gate:<17} {batch:3d} x {tokens:3d}: kernel {best['kernel']:7.2f} ms, "
                f"products {best['products']:7.2f} ms, {ratio:.2f}"
            )
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    write_result(options.output, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
