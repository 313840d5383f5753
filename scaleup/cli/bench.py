"""Compare the speed or memory of the methods on one model with random weights.

    scaleup bench inference --batch 16 --length 128 --output results/bench/inference.json
    scaleup bench training --length 32 --reference lower-bound --only lower-bound APL
    scaleup bench ragged --texts cola ../shared/data/glue quickstart/model
    scaleup bench memory --geometry bart-large

`scaleup bench MEASUREMENT --help` lists the options of a measurement. OMP_NUM_THREADS sets the
number of threads (default: all cores). Exit codes: 0 done; 1 the baseline library ended early; 2 an
argument must change; 130 interrupted.
"""

import argparse
import functools
import os
import sys
from pathlib import Path
from typing import Any

# Copies of the names in scaleup/experiments, whose import takes seconds (a test compares them).
GEOMETRIES = ("bert-base", "bart-large", "tiny", "llama-8b", "smollm2-135m")
# The C library reads these when a process starts. By default it returns large tensors to the system
# and fetches them again page by page, which hits variants at random (up to a tenth of a step).
STEADY_ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "16000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


def positive(word: str) -> int:
    """Parse a positive integer of the command line."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word} is not a positive integer")
    return int(word)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand per measurement, each with the options that affect it.

    The defaults are those of `BenchOptions`.
    """
    options_parser = functools.partial(
        argparse.ArgumentParser, add_help=False, argument_default=argparse.SUPPRESS
    )
    model = options_parser()
    geometry = "sizes of the model (default: bert-base). llama-8b: needs --dtype bfloat16"
    model.add_argument("--geometry", choices=GEOMETRIES, help=geometry)
    model.add_argument("--batch", type=positive, help="examples per step (default: 16)")
    model.add_argument("--length", type=positive, help="tokens (default: 128)")
    model.add_argument("--device", choices=("cpu", "cuda"), help="default: cpu")
    dtype = (
        "default: float32; bfloat16: frozen weights in bfloat16, trained weights in float32, "
        "autocast"
    )
    model.add_argument("--dtype", choices=("float32", "bfloat16"), help=dtype)

    timed = options_parser()
    timed.add_argument("--rounds", type=positive, help="timed rounds (default: 15)")
    timed.add_argument("--reference", help="variant to divide by (default: the first)")

    chosen = options_parser()
    chosen.add_argument("--only", nargs="+", metavar="VARIANT", help="the variants that take part")

    step = options_parser()
    step.add_argument("--ragged", action="store_true", help="make half of all tokens padding")
    way = step.add_mutually_exclusive_group()
    modes = ("default", "reduce-overhead")
    compiled = "run each model through torch.compile; reduce-overhead: as CUDA graphs"
    way.add_argument("--compile", nargs="?", const="default", choices=modes, help=compiled)
    graphs = "record the steps as CUDA graphs, as train.cuda_graphs does (only training)"
    way.add_argument("--graphs", action="store_true", help=graphs)
    profile = "time each operation instead of whole steps"
    way.add_argument("--profile", action="store_true", help=profile)
    baseline = "interpreter of an environment with the library `adapters`, whose UniPELT takes part"
    way.add_argument("--baseline", metavar="PYTHON", help=baseline)

    padding = options_parser()
    metavars = ("TASK", "DATA", "TOKENIZER")
    texts = "use the lengths of a GLUE task's texts (default: half of all tokens are padding)"
    padding.add_argument("--texts", nargs=3, metavar=metavars, help=texts)
    padding.add_argument("--examples", type=positive, help="how many (default: 256)")

    written = options_parser()
    written.add_argument("--output", type=Path, help="the JSON file to write")
    counted = options_parser()
    counted.add_argument("--baseline", metavar="PYTHON", help=baseline)
    launched = options_parser()
    launched.add_argument("--rounds", type=positive, help="timed rounds (default: 60)")
    launch = "microseconds that launching a kernel takes the host (default: 10)"
    launched.add_argument("--launch-us", type=positive, help=launch)

    generated = options_parser()
    folder = "folder of a causal language model (default: SmolLM2-135M with random weights)"
    generated.add_argument("--model", metavar="FOLDER", help=folder)
    generated.add_argument("--batch", type=positive, help="number of prompts (default: 4)")
    generated.add_argument("--length", type=positive, help="tokens of a prompt (default: 16)")
    generated.add_argument("--ragged", action="store_true", help="make half of all tokens padding")
    generated.add_argument("--tokens", type=positive, help="tokens to generate (default: 16)")
    generated.add_argument("--rounds", type=positive, help="timed rounds (default: 8)")
    functions = "list the functions that take longest"
    generated.add_argument("--profile", action="store_true", help=functions)

    measurements = parser.add_subparsers(dest="what", required=True, metavar="MEASUREMENT")
    common: Any = {"formatter_class": parser.formatter_class, "allow_abbrev": False}
    for name, parents, summary in (
        ("inference", [model, timed, chosen, step, written], "time forward passes"),
        ("training", [model, timed, chosen, step, written], "time training steps"),
        ("ragged", [model, timed, padding, written], "time padding and groups of lengths"),
        ("memory", [model, chosen, written], "measure the peak memory of a training step"),
        ("calls", [counted, written], "count the calls of a layer that a GPU has to wait for"),
        ("decode", [generated, written], "time the host while a language model generates"),
        ("host", [launched, written], "time the host in a training step whose kernels are empty"),
    ):
        description = f"{summary[0].upper()}{summary[1:]}."
        measurements.add_parser(
            name, parents=parents, help=summary, description=description, **common
        )


def run(options: argparse.Namespace) -> int:
    """Measure, in a process whose environment has the settings of the allocator."""
    if not STEADY_ALLOCATOR.keys() <= os.environ.keys():
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, STEADY_ALLOCATOR | os.environ)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # PEFT imports DeepSpeed, which is not measured
    from scaleup.backbone.kernels import check_kernels
    from scaleup.experiments import bench, decoding, overhead

    check_kernels()
    measurements: dict[str, tuple[Any, Any]] = {
        "calls": (overhead.CallOptions, overhead.run_calls),
        "decode": (decoding.DecodeOptions, decoding.run),
        "host": (overhead.HostOptions, overhead.run_host),
    }
    options_class, measure = measurements.get(options.what, (bench.BenchOptions, bench.run))
    fields = options_class.__dataclass_fields__
    measure(options_class(**{k: v for k, v in vars(options).items() if k in fields}))
    return 0
