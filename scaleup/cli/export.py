"""Turn a checkpoint into a folder for others to load, and measure what the export costs.

    scaleup export --checkpoint RUN/best --output DIR
        exact: a small adapter checkpoint for PEFT with scaleup
    scaleup export --checkpoint RUN/best --kind standalone --output DIR
        a transformers folder that needs neither PEFT nor scaleup
    scaleup export --checkpoint RUN/best --kind merged --output DIR
        such a folder with constant gates, which is faster but not exact
    scaleup export --checkpoint RUN/best --kind plain --output DIR
        a model of the backbone's own class without code, which every engine loads; its weights
        absorb what UniPELT does, approximately
    scaleup export --checkpoint RUN/best --kind lora --output DIR
        the same as a LoRA adapter of PEFT for the backbone

DIR/export.json holds the measurements: logits, metric, agreement, sizes, times and, for merged, the
mean and spread of every gate. The command needs no GPU and no other process.

Exit codes: 0 done; 1 the export failed its verification or lost more than --max-metric-drop, and
nothing was kept; 2 an argument or the checkpoint must change; 130 interrupted; 143 stopped by
SIGTERM, 129 by SIGHUP, and nothing was kept.
"""

import argparse
import functools
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from scaleup.cli.config import add_trust_argument
from scaleup.cli.exit_codes import DONE, Stopped, print_line, raise_on
from scaleup.errors import ConfigError
from scaleup.export.kinds import KINDS
from scaleup.io import parse_bytes

if TYPE_CHECKING:
    from scaleup.export.report import ExportReport, Proof


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    add = parser.add_argument
    checkpoint = "adapter checkpoint: best/, final/ or checkpoint-N/ of a run"
    add("--checkpoint", type=Path, required=True, metavar="RUN/best", help=checkpoint)
    add("--kind", choices=tuple(KINDS), default="exact", help="see above (default: exact)")
    output = "folder to write, which must not exist"
    add("--output", type=Path, required=True, metavar="DIR", help=output)
    config = "config.yaml of the run (default: the one beside the checkpoint)"
    add("--config", type=Path, metavar="FILE", help=config)
    backbone = "folder or hub id of the backbone, if it is no longer where the run had it"
    add("--backbone", metavar="NAME", help=backbone)
    calibrate = (
        "data to measure the gates and the export on: dev, test, or a file with the columns of the "
        "run's data (default: dev)"
    )
    add("--calibrate", metavar="DATA", default="dev", help=calibrate)
    examples = (
        "merged: number of examples to measure the gates on (default: 256); plain, lora: number of "
        "training examples to fit the updates to (default: 1024)"
    )
    add("--examples", type=int, metavar="N", help=examples)
    rank = "plain, lora: rank of the update of each linear layer (default: 32)"
    add("--rank", type=int, metavar="R", help=rank)
    epochs = (
        "plain, lora: passes over these examples that bring the predictions to those of the "
        "trained model (default: 3)"
    )
    add("--epochs", type=int, metavar="N", help=epochs)
    prune = (
        "merged: leave out prefixes and adapters that change less than this share of what they are "
        "added to (default: 0)"
    )
    add("--prune", type=float, metavar="SHARE", help=prune)
    dtype = "type of the weights (default: as the run stored them)"
    add("--dtype", choices=("float32", "bfloat16", "float16"), help=dtype)
    shard = "largest size of a weights file (default: 2GB)"
    add("--max-shard-size", metavar="2GB", help=shard)
    metric = "what to score instead of the run's metric"
    add("--metric", metavar="NAME", help=metric)
    memory = (
        "memory of the device that weights may take while the export is measured; the rest waits "
        "in the memory of the host or in files (default: most of what is free)"
    )
    add("--max-memory", metavar="24GiB", help=memory)
    drop = "largest loss of the metric, in points of 100; of the loss, in hundredths (default: 1.0)"
    add("--max-metric-drop", type=float, metavar="POINTS", help=drop)
    add_trust_argument(parser)
    verify = "load the export in a new process, compare its logits and score it"
    add("--verify", action=argparse.BooleanOptionalAction, default=True, help=verify)


def run(options: argparse.Namespace) -> int:
    """Export, and print what was measured. Returns the exit code."""
    try:
        with raise_on(signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            return _run(options)
    except Stopped as stopped:
        print_line(f"stopped by {stopped}; nothing was kept")
        return 128 + stopped.number


def _run(options: argparse.Namespace) -> int:
    # Of the processes that `accelerate launch` starts, one is enough.
    if os.environ.get("RANK", "0") != "0":
        return DONE
    # DeepSpeed is only imported here; without this variable it warns while it looks for devices.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from scaleup.cli.entry import hide_progress_bars
    from scaleup.export import export

    hide_progress_bars()
    problems = _problems(options)
    chosen = {name: value for name, value in vars(options).items() if value is not None}
    for name in ("max_shard", "max_memory"):
        flag = "--max-shard-size" if name == "max_shard" else "--max-memory"
        text = chosen.pop(flag[2:].replace("-", "_"), None)
        if text is not None:
            try:
                chosen[f"{name}_bytes"] = parse_bytes(text, flag)
            except ConfigError as error:
                problems += error.problems
    if problems:
        raise ConfigError(problems)
    report_progress = functools.partial(print, file=sys.stderr, flush=True)
    report = export.run(export.ExportOptions(**chosen), report_progress)
    print(*_summary(report, options.output), sep="\n")
    return DONE


def _problems(options: argparse.Namespace) -> list[str]:
    """Return what is wrong with the arguments, without a look at the run."""
    problems = [
        f"--{name.replace('_', '-')}: has no effect with --kind {options.kind}; leave it out"
        for name in KINDS[options.kind].idle
        if getattr(options, name) is not None
    ]
    if options.max_metric_drop is not None and not options.verify:
        problems.append(
            "--max-metric-drop: nothing is scored with --no-verify; leave one of them out"
        )
    for flag in ("metric", "max_memory"):
        measures = options.verify or KINDS[options.kind].needs_data
        if getattr(options, flag) is not None and not measures:
            name = flag.replace("_", "-")
            problems.append(f"--{name}: has no effect with --no-verify; leave one of them out")
    for name, least in (("examples", 1), ("rank", 1), ("epochs", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            problems.append(f"--{name}: {value}; it takes at least {least}")
    for name in ("prune", "max_metric_drop"):
        value = getattr(options, name)
        if value is not None and not value >= 0:
            problems.append(f"--{name.replace('_', '-')}: {value:g}; it takes 0 or more")
    if options.calibrate not in ("dev", "test") and not os.path.isfile(options.calibrate):
        problems.append(f"--calibrate: {options.calibrate} is neither dev, test nor a file")
    return problems


def _summary(report: "ExportReport", output: Path) -> list[str]:
    """Return the lines that describe a finished export."""
    sizes = report.bytes
    lines = [
        f"{report.kind:<10} {output}: {sizes['weights'] / 1e6:.1f} MB of weights "
        f"(the checkpoint: {sizes['checkpoint'] / 1e6:.1f} MB), gates {report.gates}"
    ]
    if report.kind == "lora":
        lines.append("loads with PEFT, without scaleup")
    elif report.kind != "exact":
        plain = "plain transformers, no remote code"
        lines.append(f"loads with {'trust_remote_code=True' if report.remote_code else plain}")
    if report.calibration is not None:
        gates = report.calibration.gates
        dropped, examples = sum(gate.dropped for gate in gates), report.calibration.examples
        line = f"gates      {len(gates)} measured on {examples} examples, {dropped} dropped"
        if gates:
            widest = max(gates, key=lambda gate: gate.spread)
            line += f"; widest spread {widest.spread:.3f} ({widest.part} at {widest.site})"
        lines.append(line)
    if (absorption := report.absorption) is not None:
        shares = absorption.unexplained.values()
        line = f"updates    rank {absorption.rank}, fitted to {absorption.examples} examples"
        if absorption.unused:
            line += f" ({absorption.unused} of them left out by data.k)"
        line += (
            f"; least squares left {100 * sum(shares) / len(shares):.1f}% of what UniPELT changes"
        )
        if absorption.losses:
            line += f"; difference of the predictions {absorption.losses[-1]:.2g}"
        lines.append(line)
    if report.proof is not None:
        lines += _verification_lines(report.proof)
    return lines


def _verification_lines(proof: "Proof") -> list[str]:
    metric, milliseconds = proof.metric, proof.milliseconds_per_batch
    logits = proof.logit_difference
    before, after = metric.shown
    score = (
        f"{metric.name:<10} {before} before, {after} after "
        f"on {proof.data} ({proof.examples} examples)"
    )
    if proof.agreement is not None:
        score += f", {100 * proof.agreement:.1f}% of predictions the same"
    return [
        score,
        f"logits     moved by at most {logits['max']:.2g}, {logits['mean']:.2g} on average; "
        f"reloaded to within {proof.reload_difference:.2g}",
        f"time       {milliseconds['before']:.1f} ms per batch of 16 before, "
        f"{milliseconds['after']:.1f} after (one process after the other, not side by side)",
    ]
