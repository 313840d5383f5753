"""Says what a run will need, before it starts: memory per process for every ZeRO stage and kind of weights, and what is amiss.

    python launch/plan.py --config configs/bart_large.yaml --world 16 --gpu-memory 24GiB train.per_device_train_batch_size=32

No weights are loaded and no GPU is needed. Exit codes: 0 the plan is made; 1 the run as configured does not fit into
--gpu-memory; 2 something in the config, the data or the arguments must change (one message with everything); 130 interrupted.
"""

import argparse
import functools
import os
import pathlib
import sys
import warnings


sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from scaleup import errors, io  # noqa: E402
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings(
    "ignore", category=FutureWarning, module="torch.distributed"
)  # between torch and DeepSpeed


def main() -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file with the sections model, method, data, train")
    parser.add_argument(
        "--world", type=int, default=1, metavar="N", help="processes, one for each GPU (default: 1)"
    )
    parser.add_argument(
        "--gpu-memory", metavar="24GiB", help="memory of one device: says what fits"
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="what the run will use, wherever the plan is made (default: cuda)",
    )
    parser.add_argument(
        "--configured",
        action="store_true",
        help="only what the config says, not every stage and kind of weights: quicker",
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers there, too")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that override the file"
    )
    options = parser.parse_intermixed_args()

    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # DeepSpeed is only imported, and warns while it finds out by itself
    from transformers.utils import logging

    from scaleup.memory import plan
    from scaleup.settings import schema as config
    from scaleup.training.preflight import CHECKS

    logging.set_verbosity_error()
    try:
        problems, limit = [], None
        if options.world < 1:
            problems.append(f"--world: {options.world} processes; it takes at least 1")
        if options.json is not None and (
            not options.json or not os.path.isdir(os.path.dirname(options.json) or ".")
        ):
            problems.append(
                f"--json: no folder {os.path.dirname(options.json)}"
                if options.json
                else "--json: no file is named"
            )
        try:
            limit = io.parse_bytes(options.gpu_memory) if options.gpu_memory is not None else None
        except errors.ConfigError as error:
            problems += error.problems
        settings = config.load(
            options.config, options.overrides, checks=(*CHECKS, lambda sections: problems)
        )
        say = functools.partial(print, file=sys.stderr, flush=True)
        made = plan.make_plan(
            settings, options.world, options.device, limit, options.configured, say
        )
        print(*plan.table(made), sep="\n")
        if options.json is not None:
            io.write_json(pathlib.Path(options.json), plan.as_json(made))
    except errors.ConfigError as error:
        count = len(error.problems)
        print(
            f"error: {count} problem{'s' * (count > 1)}:"
            + "".join(f"\n  - {p}" for p in error.problems),
            file=sys.stderr,
        )
        return 2
    except OSError as error:
        print(
            f"error: {error.strerror or error}{': ' + str(error.filename) if error.filename else ''}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130
    return 0 if made.fits else 1


if __name__ == "__main__":
    sys.exit(main())
