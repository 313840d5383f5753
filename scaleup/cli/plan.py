"""Predict the memory of a run per process, for FSDP, every ZeRO stage and kind of weights.

    scaleup plan --config configs/bart_large.yaml --world 16 --gpu-memory 24GiB

No weights are loaded and no GPU is needed. Exit codes: 0 the plan is made; 1 the run as configured
does not fit into --gpu-memory; 2 the config, the data or an argument must change (one message lists
everything); 130 interrupted.
"""

import argparse
import functools
import os
import sys
from pathlib import Path

from scaleup.cli.config import add_config_arguments, load_settings
from scaleup.cli.exit_codes import DONE, FAILED
from scaleup.errors import ConfigError
from scaleup.io import check_output, parse_bytes, write_json


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    add_config_arguments(parser)
    add = parser.add_argument
    add("--world", type=int, default=1, metavar="N", help="number of GPU processes (default: 1)")
    add("--gpu-memory", metavar="24GiB", help="memory of one device; the plan says what fits")
    device = "device that the run will use, wherever the plan is made (default: cuda)"
    add("--device", choices=("cuda", "cpu"), default="cuda", help=device)
    per_host = "processes on each host, for fsdp_hybrid and zero3_hpz (default: 8, at most --world)"
    add("--per-host", type=int, default=8, metavar="N", help=per_host)
    configured = "plan only the configured ZeRO stage and kind of weights, which is quicker"
    add("--configured", action="store_true", help=configured)
    add("--json", metavar="FILE", help="also write the numbers to this file")


def run(options: argparse.Namespace) -> int:
    """Print the plan. Returns the exit code."""
    # DeepSpeed is only imported here; without this variable it warns while it looks for devices.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from scaleup.memory.plan import make_plan
    from scaleup.memory.report import as_json, table

    problems, limit = [], None
    if options.world < 1:
        problems.append(f"--world: {options.world} processes; the minimum is 1")
    if options.per_host < 1 or options.world % min(options.per_host, max(options.world, 1)):
        problems.append(f"--per-host: {options.per_host} must divide --world {options.world}")
    if options.json == "":
        problems.append("--json: no file is named")
    elif options.json and not os.path.isdir(os.path.dirname(options.json) or "."):
        problems.append(f"--json: no folder {os.path.dirname(options.json)}")
    elif options.json:
        try:
            check_output(Path(options.json))
        except OSError as error:
            problems.append(f"--json: {options.json} cannot be written: {error.strerror}")
    try:
        limit = parse_bytes(options.gpu_memory, "--gpu-memory") if options.gpu_memory else None
    except ConfigError as error:
        problems += error.problems
    settings = load_settings(options, problems, writes=False)
    report_progress = functools.partial(print, file=sys.stderr, flush=True)
    made = make_plan(
        *(settings, options.world, options.device, limit, options.configured, report_progress),
        per_host=options.per_host,
    )
    print(*table(made), sep="\n")
    if options.json:
        write_json(Path(options.json), as_json(made))
    return DONE if made.fits else FAILED
