"""Examine hosts, network and folders before a run, in about 30 seconds.

    torchrun --nproc-per-node 8 -m scaleup doctor --config configs/qwen3_32b.yaml
    srun python -m scaleup doctor --config configs/qwen3_32b.yaml
    scaleup doctor --config configs/quickstart.yaml

Start it as the run will be started: with the same launcher, hosts, config and overrides. It
reports bandwidths, clock differences, package versions, the output folder and its locks, access to
the model and the data, and estimates of the times of a step, a checkpoint and loading. It trains
nothing and leaves nothing behind. No step can hang it. Exit codes: 0 all is well; 1 something has
to change, and a list says what; 2 an argument must change; 130 interrupted.
"""

import argparse
import functools
import math
import os

from scaleup.cli.config import add_config_arguments, load_settings, without_garbage_collection
from scaleup.errors import ConfigError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    add_config_arguments(parser)
    limit = "time limit of each step in seconds (default: 30)"
    parser.add_argument("--limit", type=float, default=30.0, metavar="SECONDS", help=limit)


def run(options: argparse.Namespace) -> int:
    """Print the report. Returns the exit code."""
    if not 1 <= options.limit < math.inf:
        raise ConfigError(f"--limit: {options.limit:g} seconds; the minimum is 1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings are part of the report
    with without_garbage_collection():
        import torch

        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would guess, and warn
        from scaleup.training.doctor import examine
    return examine(functools.partial(load_settings, options), options.limit)
