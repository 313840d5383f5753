"""What a run prints: its header before the first step and its summary at the end."""

import pathlib
import statistics
from typing import Any

from scaleup.data.examples import Examples
from scaleup.memory.epochs import few_steps
from scaleup.memory.states import States
from scaleup.settings.schema import Settings
from scaleup.training.context import Run

SHOWN = 10  # names of classes


def header(run: Run, counts: dict[str, Any]) -> list[str]:
    """Return the lines about backbone, method, counts, data, batch size and device.

    Args:
        counts: as `scaleup.unipelt.model.parameter_counts` returns them.
    """
    settings, examples, world = run.settings, run.examples, run.world
    model, train = settings.model, settings.train
    backend = "one process"
    if world.size > 1 or world.deepspeed:
        backend = "deepspeed" if world.deepspeed else "DDP"
    if train.deepspeed:
        backend += f", {train.deepspeed}"
    if train.fsdp:
        backend = f"FSDP2, {train.fsdp}"
    quantized = "" if model.quantization == "none" else f", {model.quantization}"
    parts = ", ".join(f"{name} {count:,}" for name, count in counts["submodules"].items() if count)
    per_process, passes = run.args.per_device_train_batch_size, run.args.gradient_accumulation_steps
    processes = "1 process" if world.size == 1 else f"{world.size} processes"
    frozen = " (frozen)" if settings.method.head == "frozen" else ""
    # Only the prefix's MLP is trained and not stored.
    mlp = ", with the prefix's MLP" if counts["trained"] > counts["stored"] else ""
    rows = examples.train_rows
    batch = {"per_device_train_batch_size": per_process, "gradient_accumulation_steps": passes}
    few = None if rows is None else few_steps(train.model_copy(update=batch), rows, world.size)
    lines = [
        f"backbone   {model.name} ({counts['backbone']:,} parameters{quantized})",
        f"method     {settings.method.name}{f' ({parts})' if parts else ''}",
        f"trained    {counts['trained']:,} parameters ({counts['trained_percent']:.2f}%{mlp}),"
        f" stored {counts['stored']:,} ({counts['stored_percent']:.2f}%),"
        f" head {counts['head']:,}{frozen}",
        _data_line(settings, examples),
    ]
    if shared := _shared_line(settings, examples):
        lines.append(shared)
    if run.task.notes is not None:
        lines += run.task.notes(examples)
    if examples.task == "regression":
        lines.append(_label_line(settings, examples))
    if examples.labels is not None:
        lines.append(_names_line(examples.labels))
    return [
        *lines,
        f"batch      {per_process * passes * world.size} = {per_process} per process x {processes}"
        f" x {passes} accumulation; learning rate"
        f" {settings.learning_rate:g}",
        *([few] if few else []),
        f"device     {world.device.type}, {backend}; bf16 {'on' if run.args.bf16 else 'off'}",
        f"output     {train.output_dir}",
    ]


def _data_line(settings: Settings, examples: Examples) -> str:
    test = "none" if examples.test is None else str(examples.count("test"))
    if examples.test_is_dev:
        test = "the dev set"
    rows = " packed rows" if settings.data.packing else ""
    rows = " windows" if examples.task == "question_answering" else rows
    count = f"{examples.train_rows}{rows}"
    if examples.train_rows is None:
        count = f"a stream in the order of data.seed {settings.data.seed}"
    once = " (a source with several targets counts once)" if examples.references else ""
    return (
        f"data       train {count}, dev {examples.count('dev')}, test {test}{once};"
        f" metric {examples.metric}"
    )


def _shared_line(settings: Settings, examples: Examples) -> str | None:
    """Return a note about texts that occur in several sets, if there are any."""
    sizes = {name: examples.count(name) for name in ("dev", "test")}
    parts = [
        f"{count} of {sizes[name]} {name} rows have texts that are in {other} too"
        for (name, other), count in examples.shared.items()
        if count
    ]
    if not parts:
        return None
    cut = examples.shared.get(("dev", "train")) and not settings.data.has_validation
    cut = cut and settings.data.name is None
    advice = "; give data.validation_file to keep dev apart" if cut else ""
    return f"note: {', '.join(parts)}{advice}"


def _label_line(settings: Settings, examples: Examples) -> str:
    """Describe the labels of a regression and where the head starts.

    If the head starts far from the labels, a small run learns little more than their mean.
    """
    labels = examples.train["labels"][:]
    starts = "a new head starts at 0, and with model.head_bias=prior at the mean"
    if settings.model.head_bias == "prior":
        starts = "the mean is where the head starts"
    mean, std = statistics.fmean(labels), statistics.pstdev(labels)
    return f"labels     mean {mean:.4g}, standard deviation {std:.4g}; {starts}"


def _names_line(labels: list[str]) -> str:
    """Name the classes, of which a misspelt label would be one."""
    shown = ", ".join(f"{label:.40}" for label in labels[:SHOWN])
    more = f", and {len(labels) - SHOWN} more" if len(labels) > SHOWN else ""
    return f"labels     {len(labels)}: {shown}{more}"


def placement(hosts: list[tuple[str, str]]) -> list[str]:
    """Return one line per host, with the device of each of its ranks.

    Args:
        hosts: host name and device by rank (`distributed.hosts`).
    """
    by_host: dict[str, list[str]] = {}
    for rank, (host, device) in enumerate(hosts):
        by_host.setdefault(host, []).append(f"rank {rank} {device}")
    processes = f"{len(hosts)} process{'es' * (len(hosts) > 1)}"
    lines = [f"world      {processes} on {len(by_host)} host{'s' * (len(by_host) > 1)}"]
    return [*lines, *(f"host       {host}: {', '.join(ranks)}" for host, ranks in by_host.items())]


def memory_line(states: States) -> str:
    """Return the line about weights, gradients and optimizer. Activations are not included."""
    total = states.resident + states.gathered + states.gradients
    names = ("backbone", "trained", "gradients", "optimizer")
    parts = {name: getattr(states, name) for name in names}
    if states.buffers:
        parts["buffers"] = states.buffers
    if states.gathered:
        parts["gathered weights"] = states.gathered
    amounts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in parts.items())
    host = f"; {states.host / 2**20:,.0f} in CPU memory" if states.host else ""
    return (
        f"memory     {total / 2**20:,.0f} MiB per process before activations: {amounts}{host}"
        " (scaleup plan counts all)"
    )


def finished_note(settings: Settings, results: dict[str, Any]) -> str:
    """Return what is said instead of training if a run has ended, and how to train on."""
    train = settings.train
    by_steps = train.max_steps > 0
    end, reached = train.num_train_epochs, results["epochs"]
    if by_steps:
        end, reached = train.max_steps, results["steps"]
    key = "max_steps" if by_steps else "num_train_epochs"
    if train.early_stopping_patience and reached < end:
        key = "early_stopping_patience"
    return f"this run is finished; to train on, raise train.{key}."


def summary(results: dict[str, Any], out: pathlib.Path, seconds: float | None) -> list[str]:
    """Return the last lines: the score, the counts, and where everything is.

    Args:
        seconds: how long the run took; None if this is not known.
    """
    metric, counts, test = results["metric"], results["parameters"], results["test"]
    score, best_step, steps = results["dev"][metric], results["best_step"], results["steps"]
    epoch = round(results["epochs"] * best_step / steps, 2) if steps else 0
    at = f"step {best_step} of {steps}, epoch {epoch:g}"
    first = f"dev {metric}  {score:.4f} (best, at {at})"
    if test is not None:
        first = f"test {metric}  {test[metric]:.4f}  (dev {metric} {score:.4f} at {at})"
    return [
        "",
        first,
        f"parameters  trained {counts['trained']:,}, stored {counts['stored']:,}"
        f" ({counts['stored_percent']:.2f}% of the model)",
        f"results     {out / 'results.json'}; best checkpoint {out / 'best'};"
        f" log {out / 'log.jsonl'}{'' if seconds is None else f'; {seconds:.0f} s'}",
    ]
