"""Exports a trained run for others to load, and measures what the export costs.

    python launch/export.py --checkpoint RUN/best --output DIR                       exact: a small bundle for PEFT with scaleup
    python launch/export.py --checkpoint RUN/best --kind standalone --output DIR     a transformers folder that needs neither
    python launch/export.py --checkpoint RUN/best --kind merged --output DIR         such a folder with constant gates: quicker, not exact

DIR/export.json holds what was measured: logits, metric, agreement, sizes, times, and for merged every gate's mean and spread. Needs no
GPU and no other process. Exit codes: 0 done; 1 the export failed its proof or lost more than --max-metric-drop, and nothing was
kept; 2 something in the arguments must change; 130 interrupted.
"""

import argparse
import os
import pathlib
import sys
import warnings


sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from scaleup import errors, io  # noqa: E402
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault(
    "DS_ACCELERATOR", "cpu"
)  # DeepSpeed is only imported, and warns while it finds out by itself
warnings.filterwarnings(
    "ignore", category=FutureWarning, module="torch.distributed"
)  # between torch and DeepSpeed

ONLY_MERGED = ("examples", "prune")
NOT_EXACT = ("dtype", "max_shard_size")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint",
        type=pathlib.Path,
        required=True,
        metavar="RUN/best",
        help="a bundle: best/, final/ or checkpoint-N/ of a run",
    )
    parser.add_argument(
        "--kind",
        choices=("exact", "merged", "standalone"),
        default="exact",
        help="see above (default: exact)",
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        required=True,
        metavar="DIR",
        help="folder to write, not there yet",
    )
    parser.add_argument(
        "--config",
        type=pathlib.Path,
        help="config.yaml of the run (default: beside the checkpoint)",
    )
    parser.add_argument(
        "--backbone",
        metavar="NAME",
        help="folder or hub id of the backbone, if it is no longer where the run had it",
    )
    parser.add_argument(
        "--calibrate",
        metavar="DATA",
        default="dev",
        help="dev, test, or a file with the columns of the run's own: gates are counted and the export is scored on it (default: dev)",
    )
    parser.add_argument(
        "--examples",
        type=int,
        metavar="N",
        help="merged: examples to count gates on (default: 256)",
    )
    parser.add_argument(
        "--prune",
        type=float,
        metavar="SHARE",
        help="merged: leave out prefixes and adapters that change less than this share of what they are added to (default: 0)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the weights (default: as the run stored them)",
    )
    parser.add_argument(
        "--max-shard-size", metavar="2GB", help="largest weights file (default: 2GB)"
    )
    parser.add_argument(
        "--max-metric-drop",
        type=float,
        metavar="POINTS",
        help="most that the metric may lose, in points of 100 (default: 1.0)",
    )
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="load the export in a fresh process, compare and score it",
    )
    return parser


def _problems(options: argparse.Namespace) -> list[str]:
    """What is wrong with the arguments by themselves."""
    found = [
        f"--{name.replace('_', '-')}: has no effect with --kind {options.kind}; leave it out"
        for name in (ONLY_MERGED if options.kind != "merged" else ())
        if getattr(options, name) is not None
    ]
    found += [
        f"--{name.replace('_', '-')}: has no effect with --kind exact; leave it out"
        for name in (NOT_EXACT if options.kind == "exact" else ())
        if getattr(options, name) is not None
    ]
    if options.max_metric_drop is not None and not options.verify:
        found.append("--max-metric-drop: nothing is scored with --no-verify; leave one of them out")
    if options.examples is not None and options.examples < 1:
        found.append(f"--examples: {options.examples}; it takes at least 1")
    found += [
        f"--{name.replace('_', '-')}: {value:g}; it takes 0 or more"
        for name in ("prune", "max_metric_drop")
        if (value := getattr(options, name)) is not None and not value >= 0
    ]
    if options.calibrate not in ("dev", "test") and not os.path.isfile(options.calibrate):
        found.append(f"--calibrate: {options.calibrate} is neither dev, test nor a file")
    return found


def _show(report: dict, output: pathlib.Path) -> None:
    sizes = report["bytes"]
    print(
        f"{report['kind']:<10} {output}: {sizes['weights'] / 1e6:.1f} MB of weights (the checkpoint: {sizes['checkpoint'] / 1e6:.1f} MB), gates {report['gates']}"
    )
    if report["kind"] != "exact":
        print(
            f"loads with {'trust_remote_code=True' if report['remote_code'] else 'plain transformers, no remote code'}"
        )
    if report["calibration"] is not None:
        gates = report["calibration"]["gates"]
        dropped = sum(gate["dropped"] for gate in gates)
        widest = max(gates, key=lambda gate: gate["spread"], default=None)
        words = (
            f"; widest spread {widest['spread']:.3f} ({widest['part']} at {widest['site']})"
            if widest
            else ""
        )
        print(
            f"gates      {len(gates)} counted on {report['calibration']['examples']} examples, {dropped} dropped{words}"
        )
    if "proof" in report:
        proof = report["proof"]
        metric, ms = proof["metric"], proof["milliseconds_per_batch"]
        agreement = (
            ""
            if proof["agreement"] is None
            else f", {100 * proof['agreement']:.1f}% of predictions the same"
        )
        print(
            f"{metric['name']:<10} {metric['before']:.2f} before, {metric['after']:.2f} after on {proof['data']} ({proof['examples']} examples){agreement}"
        )
        print(
            f"logits     moved by at most {proof['logit_difference']['max']:.2g}, {proof['logit_difference']['mean']:.2g} on average; reloaded to within {proof['reload_difference']:.2g}"
        )
        print(
            f"time       {ms['before']:.1f} ms a batch of 16 before, {ms['after']:.1f} after (one process after the other, not side by side)"
        )


def main() -> int:
    """Command line; the exit code."""
    options = _parser().parse_args()
    if (
        os.environ.get("RANK", "0") != "0"
    ):  # of `accelerate launch` with several processes one is enough
        return 0

    import datasets
    from transformers.utils import logging

    from scaleup.export import export

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        problems, size = _problems(options), None
        try:
            size = (
                io.parse_bytes(options.max_shard_size)
                if options.max_shard_size is not None
                else None
            )
        except errors.ConfigError as error:
            problems += [
                problem.replace("--gpu-memory", "--max-shard-size") for problem in error.problems
            ]
        if problems:
            raise errors.ConfigError(problems)
        given = {
            "examples": options.examples,
            "prune": options.prune,
            "max_shard_bytes": size,
            "max_metric_drop": options.max_metric_drop,
        }
        chosen = export.Options(
            checkpoint=options.checkpoint,
            kind=options.kind,
            output=options.output,
            config=options.config,
            backbone=options.backbone,
            calibrate=options.calibrate,
            dtype=options.dtype,
            verify=options.verify,
            **{name: value for name, value in given.items() if value is not None},
        )
        _show(
            export.run(chosen, lambda line: print(line, file=sys.stderr, flush=True)),
            options.output,
        )
    except errors.ConfigError as error:
        count = len(error.problems)
        print(
            f"error: {count} problem{'s' * (count > 1)}:"
            + "".join(f"\n  - {p}" for p in error.problems),
            file=sys.stderr,
        )
        return 2
    except (errors.ExportError, errors.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"error: {error.strerror or error}{': ' + str(error.filename) if error.filename else ''}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
