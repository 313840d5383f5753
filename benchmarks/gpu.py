"""Check the kernels on one GPU, and time training steps, in less than nine minutes.

    python -m benchmarks.gpu --output results/bench/gpu

Parts: checks (benchmarks/gpu_checks.py), then training steps, run eagerly, as CUDA graphs and with
torch.compile. Each part has a time budget; what does not fit is skipped with a line. Every
measurement is a process of its own, so that an error in a kernel ends only that one. Its file is
written as soon as it ends, and summary.json with all ratios is written anew.

--dry-run tries this with one tiny model on a CPU, which cannot record CUDA graphs.
"""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.cases import ROOT, argument_parser, write_result

SECONDS = 520
BOUND, LORA, APL, FULL = "lower-bound", "PEFT LoRA", "APL", "full fine-tuning"
# size → its options of `scaleup bench training`, and its variants
SIZES = {
    "bert-base-16x128": (["--batch", "16"], (BOUND, LORA, APL, FULL)),
    "bert-base-256x128": (["--batch", "256"], (BOUND, LORA, APL, FULL)),
    "bart-large-32x128": (["--geometry", "bart-large", "--batch", "32"], (BOUND, LORA, APL, FULL)),
    # Training all 8 billion parameters does not fit.
    "llama-8b-1x2048": (
        ["--geometry", "llama-8b", "--batch", "1", "--length", "2048", "--rounds", "7"],
        (BOUND, LORA, APL),
    ),
}
TINY = ["--geometry", "tiny", "--batch", "2", "--length", "8", "--rounds", "1"]
# way to run a step → its options of `scaleup bench training`, and the seconds for all sizes
WAYS: dict[str, tuple[list[str], int]] = {
    "eager": ([], 160),
    "graphs": (["--graphs"], 160),
    "compiled": (["--compile"], 300),
}
CHECKS_SECONDS = 90


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A process that writes one file.

    Attributes:
        part: whose budget it uses.
        words: the command, without the interpreter and --output.
    """

    part: str
    name: str
    words: list[str]


# Run a command for at most a number of seconds, and return its exit code, None if time ran out.
Runner = Callable[[list[str], float], int | None]


def measurements(dry_run: bool) -> Iterator[Measurement]:
    """List all measurements in order."""
    device = "cpu" if dry_run else "cuda"
    checks = ["-m", "benchmarks.gpu_checks", "--device", device]
    yield Measurement("checks", "checks", checks)
    for way, (way_words, _) in WAYS.items():
        if dry_run and way == "graphs":
            continue
        for size, (size_words, variants) in list(SIZES.items())[: 1 if dry_run else None]:
            words = ["-m", "scaleup", "bench", "training", "--device", device]
            words += ["--dtype", "bfloat16", *(TINY if dry_run else size_words), *way_words]
            # Compiling takes long, so each variant is a measurement of its own.
            groups = [(v,) for v in variants] if way == "compiled" else [variants]
            for group in groups:
                suffix = f"-{group[0].replace(' ', '-')}" if len(group) == 1 else ""
                only = ["--reference", group[0], "--only", *group]
                yield Measurement(way, f"{way}-{size}{suffix}", [*words, *only])


def run_command(words: list[str], seconds: float) -> int | None:
    """Run a command of this interpreter, and end it with its children when the time is up."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, *words], env=environment, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run(
    planned: Sequence[Measurement], output: pathlib.Path, total: float, runner: Runner = run_command
) -> int:
    """Run the measurements within their budgets.

    Returns:
        1 if one failed, else 0. What was skipped or cut off is no failure.
    """
    for measurement in planned:  # a file of an earlier run is no result of this one
        (output / f"{measurement.name}.json").unlink(missing_ok=True)
    end = time.monotonic() + total
    left = {"checks": float(CHECKS_SECONDS)} | {way: float(s) for way, (_, s) in WAYS.items()}
    failed = 0
    for measurement in planned:
        seconds = min(left[measurement.part], end - time.monotonic())
        if seconds <= 0:
            print(f"{measurement.name}: skipped, the time is used up", flush=True)
            continue
        path = output / f"{measurement.name}.json"
        print(f"{measurement.name} (at most {seconds:.0f} s)", flush=True)
        begin = time.monotonic()
        code = runner([*measurement.words, "--output", str(path)], seconds)
        left[measurement.part] -= time.monotonic() - begin
        if code is None:
            print(f"{measurement.name}: cut off, the time is used up", flush=True)
        elif code:
            failed = 1
            print(f"{measurement.name}: failed with exit code {code}", flush=True)
        write_result(output / "summary.json", summary(output))
    return failed


def summary(output: pathlib.Path) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Collect the files of the measurements.

    Returns:
        size → way → variant → milliseconds; ratio, to the lower bound run the same way;
        peak_mib; peak_ratio, to PEFT LoRA run the same way; and us_per_call of eager steps, which
        is what the host takes for a call if it limits the step. Kernels that are started without
        torch's dispatcher are not counted as calls.
    """
    sizes: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for size in SIZES:
        ways = {way: rows for way in WAYS if (rows := _rows(output, f"{way}-{size}"))}
        if ways:
            sizes[size] = {way: _compared(rows) for way, rows in ways.items()}
    return sizes


def _rows(output: pathlib.Path, name: str) -> dict[str, dict[str, Any]]:
    """Return the rows of all variants, which may be in one file or in several."""
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted(output.glob(f"{name}*.json")):
        rows |= json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def _compared(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    bound, lora = rows.get(BOUND), rows.get(LORA)
    compared = {}
    for name, row in rows.items():
        compared[name] = {"milliseconds": row["milliseconds"]}
        if bound:
            compared[name]["ratio"] = round(row["milliseconds"] / bound["milliseconds"], 3)
        if "peak" in row:
            compared[name]["peak_mib"] = round(row["peak"] / 2**20)
            if lora:
                compared[name]["peak_ratio"] = round(row["peak"] / lora["peak"], 3)
        if "calls" in row:
            compared[name]["us_per_call"] = round(1000 * row["milliseconds"] / row["calls"], 2)
    return compared


def _print(sizes: dict[str, dict[str, dict[str, dict[str, Any]]]]) -> None:
    for size, ways in sizes.items():
        for way, rows in ways.items():
            print(f"{size}, {way}")
            for name, row in rows.items():
                numbers = "  ".join(f"{key} {value:g}" for key, value in row.items())
                print(f"  {name:<18}{numbers}")


def main(arguments: list[str] | None = None, runner: Runner = run_command) -> int:
    """Run everything and print the summary."""
    parser = argument_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on a CPU")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    planned = list(measurements(options.dry_run))
    code = run(planned, options.output, options.seconds, runner)
    _print(summary(options.output))
    return code


if __name__ == "__main__":
    sys.exit(main())
