"""Estimate the times of a step, of saving and of loading, from a plan and from measurements.

Sizes and numbers of operations are those of `scaleup plan`. Every speed has been measured in the
same minute, with all processes at work. What is in neither is left out: operations other than
matrix products, the hub, evaluation, compilation, and the time of imports.
"""

import dataclasses
from typing import Any

from scaleup.memory.epochs import steps_per_epoch
from scaleup.memory.plan import Plan, Row
from scaleup.memory.report import amount
from scaleup.memory.states import read_zero
from scaleup.training.doctor.network import Transfer


@dataclasses.dataclass(frozen=True)
class Speeds:
    """What was measured, for the slowest process; None if it could not be measured."""

    compute: float | None  # floating-point operations per second
    write: float | None  # bytes per second, into the output folder
    check: float | None  # bytes per second, reading back and hashing
    read: float | None  # bytes per second of weight files, in each process
    transfers: dict[str, Transfer]  # empty if there is one process


def estimates(plan: Plan, speeds: Speeds, weight_bytes: int, width: int) -> list[str]:
    """Return the lines about the times of the configured run.

    Args:
        weight_bytes: size of the backbone's weight files; 0 if they are not here.
        width: hidden size of the backbone.
    """
    row = next(row for row in plan.rows if row.chosen)
    zero3 = stage(plan, width) == 3
    return [
        _step(plan, row, speeds, width),
        _save(plan, row, speeds, zero3),
        _load(plan, row, speeds, weight_bytes, zero3),
    ]


def stage(plan: Plan, width: int) -> int:
    """Return the ZeRO stage of the configured run."""
    name = plan.settings.train.deepspeed
    return read_zero(name, width).stage if name else 0


def seconds(value: float) -> str:
    """Format a time: 12 ms, 3.4 s, 85 s, 12 min, 5.2 h."""
    if value < 1:
        return f"{value * 1000:.2g} ms" if value < 0.01 else f"{value * 1000:.0f} ms"
    if value < 120:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def count(number: float) -> str:
    """Format a number of operations with three digits and powers of 1000: 46.6 G."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def _sum(first: float, second: float) -> str:
    """Return how an equation of two times begins; without the second it is one time."""
    return f"{seconds(first + second)} = {seconds(first)}" if second else seconds(first)


def communication(plan: Plan, row: Row, zero_stage: int) -> dict[str, int]:
    """Return the bytes that the collectives of one optimizer step move, by collective.

    DDP sums the gradients. ZeRO-1 and ZeRO-2 also gather the new weights. FSDP and ZeRO-3 gather
    the weights of layers in every pass. ZeRO-3 scatters sums of gradients, which is counted as an
    all-reduce (it is part of one).
    """
    if plan.world == 1:
        return {}
    passes = plan.settings.train.gradient_accumulation_steps
    trained = row.states.trained * (plan.world if zero_stage == 3 else 1)
    if zero_stage == 3:
        return {"all-gather": row.states.moved * passes, "all-reduce": trained * passes}
    if row.states.moved:  # by FSDP
        return {"all-gather": row.states.moved * passes, "all-reduce": trained}
    return {"all-reduce": trained} | ({"all-gather": trained} if zero_stage else {})


def _moving(sizes: dict[str, int], transfers: dict[str, Transfer]) -> tuple[float, str] | None:
    """Return the seconds that collectives take, and in words which they are; None if unknown."""
    if not all(name in transfers for name in sizes):
        return None
    total = sum(transfers[name].time(size) for name, size in sizes.items())
    return total, " and ".join(f"{amount(size)} {name}" for name, size in sizes.items())


def _step(plan: Plan, row: Row, speeds: Speeds, width: int) -> str:
    train = plan.settings.train
    passes = train.gradient_accumulation_steps
    moving = _moving(communication(plan, row, stage(plan, width)), speeds.transfers)
    if speeds.compute is None or moving is None:
        return "step       no estimate, because a measurement above is missing"
    chosen = row.step_checkpointing if train.gradient_checkpointing else row.step
    assert chosen is not None  # checkpointing that the model lacks is refused before
    operations = chosen.operations * passes
    compute_s, (moving_s, what) = operations / speeds.compute, moving
    line = f"step       {_sum(compute_s, moving_s)} for {count(operations)} operations"
    if what:
        line += f" + {seconds(moving_s)} for {what} (less if both overlap)"
        if moving_s > compute_s:
            line += "; the network takes longer than computing"
    if plan.examples is not None and not plan.settings.data.packing:
        per_epoch = steps_per_epoch(train, plan.examples, plan.world)
        line += f"; an epoch of {per_epoch} steps: {seconds(per_epoch * (compute_s + moving_s))}"
    return line


def _save(plan: Plan, row: Row, speeds: Speeds, zero3: bool) -> str:
    """Estimate a checkpoint: written, synced, read back with hashes.

    Under ZeRO-3 what is written is gathered before.
    """
    sizes = {"all-gather": row.states.checkpoint} if zero3 and plan.world > 1 else {}
    moving = _moving(sizes, speeds.transfers)
    if speeds.write is None or speeds.check is None or moving is None:
        return "save       no estimate, because a measurement above is missing"
    size = row.states.checkpoint
    write_s, (moving_s, what) = size / speeds.write + size / speeds.check, moving
    line = f"save       {_sum(write_s, moving_s)} to write and check {amount(size)}"
    return f"{line} + {seconds(moving_s)} for {what} of the state" if what else line


def _load(plan: Plan, row: Row, speeds: Speeds, weight_bytes: int, zero3: bool) -> str:
    """Estimate loading.

    Each process reads all weights and gets those of rank 0. Under ZeRO-3, rank 0 alone reads them.
    Under FSDP, each process reads its own rows and gets nothing.
    """
    fsdp = plan.settings.train.fsdp
    if fsdp is not None:
        weight_bytes //= plan.world if fsdp == "full" else plan.per_host
    sizes = {"broadcast": row.states.backbone * (plan.world if zero3 else 1)}
    moving = _moving(sizes if plan.world > 1 and fsdp is None else {}, speeds.transfers)
    if not weight_bytes:
        return "load       no estimate, because the weights are not on this host"
    if speeds.read is None or moving is None:
        return "load       no estimate, because a measurement above is missing"
    read_s, (moving_s, what) = weight_bytes / speeds.read, moving
    line = f"load       {_sum(read_s, moving_s)} to read {amount(weight_bytes)}"
    if plan.world > 1:
        line += " in one process" if zero3 else " in each process"
    return f"{line} + {seconds(moving_s)} for {what}" if what else line


def needed_space(plan: Plan) -> int:
    """Return the bytes of disk that a run's checkpoints need at once.

    These are the newest ones, the best one, and the one that is being written. best/ and final/
    hold weights only, and less than one checkpoint together.
    """
    row = next(row for row in plan.rows if row.chosen)
    return row.states.checkpoint * (plan.settings.train.keep_checkpoints + 3)


def as_speeds(reports: list[dict[str, Any]], transfers: dict[str, Transfer]) -> Speeds:
    """Return the speeds of the slowest process in reports; None where one process has none."""

    def slowest(key: str, among: list[dict[str, Any]]) -> float | None:
        values = [report.get(key) for report in among]
        known = [value for value in values if value is not None]
        return min(known) if known and len(known) == len(values) else None

    writers = [report["folder"] for report in reports if report.get("folder", {}).get("writes")]
    return Speeds(
        compute=slowest("compute", reports),
        write=slowest("write", writers),
        check=slowest("check", writers),
        read=slowest("read", reports),
        transfers=transfers,
    )
