"""Show a memory plan as a table for a screen or as JSON."""

import dataclasses
import math
from typing import Any

from scaleup.memory.epochs import few_steps, steps_per_epoch
from scaleup.memory.plan import Plan, Row

COLUMNS = (
    *("stage", "weights", "backbone", "trained", "grads", "optim.", "buffers"),
    *("activ.", "act.cp", "total", "total.cp", "host", "load"),
)
NOTES = (
    "none: one process or DDP.  activ.: the most alive in a step beside all of these.",
    "cp: with gradient checkpointing; – if the model has none.",
    "buffers: of DDP and ZeRO, with what ZeRO-3 or FSDP gathers.  host: offloaded, CPU memory.  "
    "load: most while loading.",
    "What CUDA itself needs (context, kernels, fragmentation) comes on top.",
)


def amount(count: int | None) -> str:
    """Format bytes in at most six characters: 812 K, 34.2 M, 1.25 G (powers of 1024); –: none."""
    if count is None:
        return "–"
    for unit, size in (("G", 2**30), ("M", 2**20), ("K", 2**10)):
        if count >= size:
            digits = 2 if count < 10 * size else 1 if count < 100 * size else 0
            return f"{count / size:.{digits}f} {unit}"
    return str(count)


def batches(plan: Plan) -> str:
    """Explain the size of the global batch and the number of steps."""
    train = plan.settings.train
    per_process, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    line = (
        f"{per_process * plan.world * accumulation} = {per_process} per process x "
        f"{plan.world} processes x {accumulation} accumulation"
    )
    if plan.examples is None:
        return line
    per_epoch = steps_per_epoch(train, plan.examples, plan.world)
    steps = math.ceil(per_epoch * train.num_train_epochs)
    steps = train.max_steps if train.max_steps > 0 else steps
    line += f"; {plan.examples} examples"
    if plan.settings.data.packing:  # only tokens tell how many texts share a row
        return f"{line} before packing, fewer than {per_epoch} steps an epoch"
    return f"{line}, {per_epoch} steps an epoch, {steps} in all"


def warning(plan: Plan) -> str | None:
    """Return the warning about short epochs, if these are short."""
    if plan.examples is None:
        return None
    return few_steps(plan.settings.train, plan.examples, plan.world)


def _cells(plan: Plan, row: Row) -> list[str]:
    states, totals = row.states, (row.total(False), row.total(True))
    checkpointing = None if row.step_checkpointing is None else row.step_checkpointing.peak
    sizes = (
        *(states.backbone, states.trained, states.gradients, states.optimizer),
        *(states.buffers + states.gathered, row.step.peak, checkpointing),
        *(*totals, states.host, states.load),
    )
    verdicts = (plan.verdict(total) or "–" for total in totals) if plan.limit is not None else ()
    return ["*" * row.chosen + row.stage[:14], row.weights, *map(amount, sizes), *verdicts]


def table(plan: Plan) -> list[str]:
    """Return the plan as lines for a screen of 120 columns."""
    settings, counts = plan.settings, plan.counts
    head = [*COLUMNS, *(("fits", "fits.cp") if plan.limit is not None else ())]
    lines = [head, *(_cells(plan, row) for row in plan.rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    formats = [f"{{:{'<' if i < 2 else '>'}{width}}}" for i, width in enumerate(widths)]
    rows = [" ".join(formats).format(*line).rstrip() for line in lines]
    batch, length = settings.train.per_device_train_batch_size, settings.data.max_length
    limit = f", {amount(plan.limit)} a device" if plan.limit is not None else ""
    return [
        f"model      {settings.model.name}: backbone {counts['backbone']:,} parameters, "
        f"head {counts['head']:,}",
        f"method     {settings.method.name}: trained {counts['trained']:,} "
        f"({counts['trained_percent']:.2f}%), stored {counts['stored']:,} "
        f"({counts['stored_percent']:.2f}%)",
        f"batch      {batches(plan)}",
        *filter(None, [warning(plan)]),
        f"planned    for {plan.device}, mixed precision {plan.half}{limit}",
        *filter(None, [plan.kernels]),
        *plan.checks,
        "",
        f"Memory of one process, K/M/G = powers of 1024; every batch {batch} x {length} tokens "
        "(the worst case); * as configured",
        *rows,
        *NOTES,
    ]


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the same numbers for programs, in bytes per process."""
    rows = []
    for row in plan.rows:
        values = {"stage": row.stage, "weights": row.weights, "configured": row.chosen}
        values |= dataclasses.asdict(row.states)
        for suffix, step in (("", row.step), ("_checkpointing", row.step_checkpointing)):
            total = row.total(checkpointing=bool(suffix))
            values |= {
                f"kept{suffix}": None if step is None else step.kept,
                f"activations{suffix}": None if step is None else step.peak,
                f"total{suffix}": total,
                f"fits{suffix}": plan.verdict(total),
            }
        rows.append(values)
    return {
        "world": plan.world,
        "device": plan.device,
        "mixed_precision": plan.half,
        "device_bytes": plan.limit,
        "parameters": plan.counts,
        "batch": batches(plan),
        "warning": warning(plan),
        "kernels": plan.kernels,
        "checks": plan.checks,
        "fits": plan.fits if plan.limit is not None else None,
        "rows": rows,
    }
