"""Compare memory plans with what two processes on a CPU hold.

    python -m benchmarks.plan_memory --output results/zero/plan.json [section.key=value …]

A model of BERT-base geometry with random weights (or your own: model.name=…) trains for three steps
with every engine of `CASES`. Every process measures its third step:

- rest: the bytes of all tensors before the step.
- peak: the most bytes during it, as the CPU allocator records them.

The script writes the JSON file and a Markdown table beside it. It fails if a plan is more than a
tenth away.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.cases import ROOT, argument_parser, command, write_result
from benchmarks.zero_memory import MIB, save_model_and_data

TOLERANCE = 0.1
PROCESSES = 2
CASES = {
    "FSDP full, float32": ["train.fsdp=full"],
    "FSDP full, bf16": ["train.fsdp=full", "train.bf16=true"],
    "FSDP full, bf16, int8": ["train.fsdp=full", "train.bf16=true", "model.quantization=8bit"],
    "FSDP hybrid, bf16": ["train.fsdp=hybrid", "train.bf16=true"],
    "ZeRO-3 hpZ, bf16": ["train.deepspeed=zero3_hpz", "train.bf16=true"],
    "ZeRO-3 hpZ, bf16, int8": [
        *("train.deepspeed=zero3_hpz", "train.bf16=true"),
        "model.quantization=8bit",
    ],
}
SETTINGS = [
    "train.max_steps=5",
    "train.per_device_train_batch_size=4",
    "train.disable_tqdm=true",
    "data.k=40",
    "data.dev_size=8",
    "data.max_length=64",
    "data.pad_to_max_length=true",
]


class Measured(Exception):
    """Ends the run after the measurement."""


def bucket_bytes(model: Any) -> int:
    """Return the bytes of the buckets of DDP, which no Python object refers to."""
    from torch.nn.parallel import DistributedDataParallel

    if not isinstance(model, DistributedDataParallel):
        return 0
    sizes = model._get_ddp_logging_data()["bucket_sizes"]
    return sum(int(size) for size in sizes.split(","))


def worker(out: str, *overrides: str) -> None:
    """Train under torchrun, and write OUT.<rank>.json with `rest`, `peak` and the batch's shape."""
    from scaleup.experiments.meter import allocated_peak, live_bytes
    from scaleup.settings import schema
    from scaleup.training import distributed, run

    steps = 0
    training_step = run.RunTrainer.training_step

    def measured_step(self, model, inputs, *args, **kwargs):
        nonlocal steps
        steps += 1
        if steps < 3:
            return training_step(self, model, inputs, *args, **kwargs)
        rest = live_bytes() + bucket_bytes(model)
        peak = rest + allocated_peak(lambda: training_step(self, model, inputs, *args, **kwargs))
        row = {"rest": rest, "peak": peak, "shape": list(inputs["input_ids"].shape)}
        pathlib.Path(f"{out}.{os.environ['RANK']}.json").write_text(json.dumps(row))
        raise Measured

    run.RunTrainer.training_step = measured_step  # type: ignore[method-assign]
    try:
        run.run(schema.load(None, overrides))
    except Measured:
        distributed.leave()


def measure(out: pathlib.Path, overrides: list[str], **options: Any) -> list[dict[str, Any]]:
    """Measure one case in processes of their own, and return the row of every rank.

    Args:
        out: the beginning of the paths of their results.
        options: arguments of subprocess.run.

    Raises:
        RuntimeError: a process failed.
    """
    words = command("benchmarks.plan_memory", ["--worker", str(out), *overrides], PROCESSES)
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, **options)
    paths = [pathlib.Path(f"{out}.{rank}.json") for rank in range(PROCESSES)]
    if not all(path.is_file() for path in paths):
        raise RuntimeError(f"the processes failed: {result.stderr[-3000:]}")
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Make the Markdown table, with the largest rank of each measurement."""
    lines = [
        f"{PROCESSES} processes on a CPU, MiB per process (the largest rank). ratio: planned / "
        "measured.",
        "",
        "| engine | rest, planned | measured | ratio | peak, planned | measured | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = []
        for key in ("rest", "peak"):
            planned, measured = row["planned"][key], max(rank[key] for rank in row["ranks"])
            cells += [f"{planned / MIB:.1f}", f"{measured / MIB:.1f}", f"{planned / measured:.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all cases, or do the work of one process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if sys.argv[1:2] == ["--worker"]:
        return worker(*sys.argv[2:])
    from scaleup.memory.plan import make_plan
    from scaleup.settings import schema

    parser = argument_parser(__doc__)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="plan-") as name:
        folder = pathlib.Path(name)
        common = [*save_model_and_data(folder), *SETTINGS, *options.overrides]
        for number, (case, changes) in enumerate(CASES.items()):
            words = [*common, f"train.output_dir={folder / str(number)}", *changes]
            row = make_plan(schema.load(None, words), PROCESSES, "cpu", configured=True).rows[0]
            planned = {"rest": row.states.resident, "peak": row.total(False)}
            rows[case] = {"planned": planned, "ranks": measure(folder / f"m{number}", words)}
            print(case, rows[case], flush=True)
    write_result(options.output, rows)
    page = table(rows)
    options.output.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)
    ratios = [
        row["planned"][key] / rank[key]
        for row in rows.values()
        for rank in row["ranks"]
        for key in ("rest", "peak")
    ]
    worst = max(abs(ratio - 1) for ratio in ratios)
    if worst > TOLERANCE:
        sys.exit(f"plan_memory: a plan is {worst:.0%} away from the measurement")
    return None


if __name__ == "__main__":
    main()
