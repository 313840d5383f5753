"""What a run will need before it starts: memory per process for every ZeRO stage and kind of frozen weights, and preflight checks.

    plan = make_plan(settings, world=16, device="cuda", limit=24 * 2**30)
    print(*table(plan), sep="\\n")

Nothing is loaded: the model is built on the meta device. States are computed by the rules in `scaleup.memory.states`, activations by
running the model on tensors without data (`scaleup.memory.activations`), for the largest batch there can be:
`train.per_device_train_batch_size` examples of `data.max_length` tokens.

    total = backbone + trained + optimizer + buffers + gathered weights (ZeRO-3) + max(activations, gradients)

Activations shrink in the backward pass while gradients grow, so the larger of the two counts; with gradient accumulation,
gradients are there from the second pass on, and both count. What CUDA itself takes (context, kernels, fragmentation) is in none
of it: a run is called tight from 90% of the limit on.
"""

import dataclasses
import importlib.util
import math
import pathlib
import re
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from scaleup.backbone import loading as backbone
from scaleup.backbone import precision
from scaleup.backbone.method import empty_run_model
from scaleup.data import classification as data
from scaleup.data import tasks
from scaleup.errors import ConfigError
from scaleup.memory.activations import Kernels, Step, trace
from scaleup.memory.states import States, Zero, read_zero, states
from scaleup.settings.rules import ZERO_PRESETS
from scaleup.settings.schema import Settings
from scaleup.unipelt.model import parameter_counts

ROOT = pathlib.Path(__file__).parents[2]
WEIGHTS = ("none", "8bit", "nf4")
TIGHT = 0.9  # of the limit: the plan is tested to 10%


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to run it. stage: none (one process, DDP), a ZeRO preset or the config's own file; chosen: what the config says."""

    stage: str
    weights: str
    states: States
    step: Step
    step_checkpointing: Step
    accumulate: bool
    chosen: bool

    def total(self, checkpointing: bool) -> int:
        """Most bytes on the device at once."""
        peak = (self.step_checkpointing if checkpointing else self.step).peak
        states = self.states
        return (
            states.resident
            + states.gathered
            + (peak + states.gradients if self.accumulate else max(peak, states.gradients))
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """All of it, bytes per process. limit: memory of a device, None if it was not said."""

    settings: Settings
    world: int
    device: str
    half: str  # bf16, fp16 or no
    limit: int | None
    examples: int | None  # for training; None where the data set is on the hub
    counts: dict[str, Any]
    rows: list[Row]
    checks: list[str]

    def verdict(self, total: int) -> str:
        """Does it fit: yes, tight (above 90%) or no; empty without a limit."""
        if self.limit is None:
            return ""
        return "no" if total > self.limit else "tight" if total > TIGHT * self.limit else "yes"

    @property
    def fits(self) -> bool:
        """Whether the run as it is configured stays within the limit."""
        checkpointing = self.settings.train.gradient_checkpointing
        return all(
            self.verdict(row.total(checkpointing)) != "no" for row in self.rows if row.chosen
        )


def _labels(settings: Settings) -> tuple[int, int | None]:
    """Outputs of the head, and training examples. GLUE's classes are known without its data."""
    name, path = settings.data.name, settings.data.path
    examples = (
        tasks.of(settings.data).module.load(settings.data)
        if name is None or (path is not None and pathlib.Path(path).exists())
        else None
    )
    if examples is not None:
        return len(examples.labels or [None]), len(examples.train)
    return len(data.GLUE[name][2] or [None]), settings.data.k if isinstance(
        settings.data.k, int
    ) else None


def _builder(
    settings: Settings, dtype: torch.dtype, trained: torch.dtype | None
) -> Callable[[PretrainedConfig], nn.Module]:
    def make(config: PretrainedConfig) -> nn.Module:
        model = empty_run_model(settings, config, tasks.of(settings.data).auto, dtype)
        if trained is not None:
            precision.cast_trained(model, trained)
        return model

    return make


def _stages(settings: Settings, hidden_size: int) -> dict[str, Zero]:
    found = {"none": Zero()}
    found |= {
        name: read_zero(ROOT / "scaleup" / "settings" / "deepspeed" / f"{name}.json", hidden_size)
        for name in ZERO_PRESETS
    }
    own = settings.train.deepspeed
    if own is not None and own not in ZERO_PRESETS:
        found[pathlib.Path(own).name] = read_zero(own, hidden_size)
    return found


def _kernels(
    stage: int,
    weights: str,
    device: str,
    half: torch.dtype | None,
    checkpointing: bool,
    deepspeed: bool,
) -> Kernels:
    linear = weights
    if weights == "none":
        linear = "zero3" if stage == 3 else "plain"
    elif weights == "8bit" and stage == 3:
        linear = "int8"
    return Kernels(device, None if deepspeed else half, linear, checkpointing)


def make_plan(
    settings: Settings,
    world: int,
    device: str = "cuda",
    limit: int | None = None,
    configured: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Everything about a checked config. world: processes. device: cuda or cpu. limit: bytes of one device. configured: only
    the row of the config itself, which is quicker.

    `progress` hears what is being computed. Raises ConfigError if model or data cannot be read or do not fit together.
    """
    config = backbone.load_config(settings.model)
    settings = backbone.fit_length(settings, config)
    config.num_labels, examples = _labels(settings)
    if config.pad_token_id is None:
        config.pad_token_id = 0  # a run takes the tokenizer's; any does here
    half = precision.half_dtype(settings, has_bf16=device == "cuda")
    if problems := precision.problems(settings, half):
        raise ConfigError(problems)
    own = settings.train.deepspeed
    chosen = "none" if own is None else own if own in ZERO_PRESETS else pathlib.Path(own).name
    makers: dict[bool, tuple] = {}
    for deepspeed in (False, True):
        full_half = half if deepspeed else None
        make = _builder(settings, full_half or precision.backbone_dtype(settings, half), full_half)
        makers[deepspeed] = (make, _adapted(make, config, settings), full_half)
    counts = parameter_counts(makers[False][1])
    rows, steps = [], {}
    for name, zero in _stages(settings, config.hidden_size).items():
        make, model, full_half = makers[name != "none"]
        for weights in WEIGHTS if settings.method.name == "unipelt" else WEIGHTS[:1]:
            own_row = (name, weights) == (chosen, settings.model.quantization)
            if configured and not own_row:
                continue
            pair = []
            for checkpointing in (False, True):
                kernels = _kernels(zero.stage, weights, device, half, checkpointing, name != "none")
                key = (kernels, full_half)
                if key not in steps:
                    progress(
                        f"activations: {name}, weights {weights}{', checkpointing' * checkpointing}"
                    )
                    steps[key] = trace(
                        make,
                        config,
                        kernels,
                        settings.train.per_device_train_batch_size,
                        settings.data.max_length,
                        settings.data.max_target_length,
                    )
                pair.append(steps[key])
            rows.append(
                Row(
                    name,
                    weights,
                    states(model, weights, zero, world, full_half),
                    *pair,
                    settings.train.gradient_accumulation_steps > 1,
                    own_row,
                )
            )
    shown = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "no"}[half]
    return Plan(
        settings, world, device, shown, limit, examples, counts, rows, checks(settings, world)
    )


def _adapted(
    make: Callable[[PretrainedConfig], nn.Module], config: PretrainedConfig, settings: Settings
) -> nn.Module:
    try:
        return make(config)
    except (ValueError, KeyError, ImportError) as error:
        raise ConfigError(
            f"model.name: {settings.model.name}: {' '.join(str(error).split())[:300]}"
        ) from error


def checks(settings: Settings, world: int) -> list[str]:
    """One line each: package versions against requirements.txt, DeepSpeed and what builds its CPU operations, processes."""
    lines, wrong = [], []
    requirements = ROOT / "requirements.txt"
    pins = (
        re.findall(r"^([\w.-]+)==([\w.]+)", requirements.read_text(encoding="utf-8"), re.M)
        if requirements.is_file()
        else []
    )
    for name, wanted in pins:
        try:
            if version(name).partition("+")[0] != wanted:
                wrong.append(f"{name} {version(name)} instead of {wanted}")
        except PackageNotFoundError:
            wrong.append(f"{name} is missing")
    lines.append(
        f"packages   {len(pins) - len(wrong)} of {len(pins)} as in requirements.txt"
        + "".join(f"; {w}" for w in wrong)
    )
    if importlib.util.find_spec("deepspeed") is None:
        lines.append(
            "deepspeed  is not installed"
            + "; this config needs it" * (settings.train.deepspeed is not None)
        )
    else:
        tools = {name: shutil.which(name) is not None for name in ("g++", "ninja")}
        missing = [name for name, found in tools.items() if not found]
        state = (
            f"{' and '.join(missing)} missing: its CPU operations cannot be built"
            if missing
            else "g++ and ninja found for its CPU operations"
        )
        lines.append(f"deepspeed  {_imported()}; {state}")
    if settings.model.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        lines.append("bitsandbytes is not installed; this config needs it")
    gpus = torch.cuda.device_count()
    lines.append(
        f"processes  {world} planned; this machine has {gpus or 'no'} GPU{'s' * (gpus != 1)}"
    )
    return lines


def _imported() -> str:
    try:
        import deepspeed  # slow, and not needed by anything else here
    except (ImportError, OSError, RuntimeError) as error:
        return f"cannot be imported ({' '.join(str(error).split())[:120]})"
    return f"{deepspeed.__version__} imports"


def amount(count: int) -> str:
    """Bytes in at most six characters: 812 K, 34.2 M, 1.25 G (powers of 1024)."""
    for unit, size in (("G", 2**30), ("M", 2**20), ("K", 2**10)):
        if count >= size:
            return f"{count / size:.{2 if count < 10 * size else 1 if count < 100 * size else 0}f} {unit}"
    return str(count)


def batches(plan: Plan) -> str:
    """The arithmetic of the global batch, and how many steps it makes."""
    train = plan.settings.train
    size = train.per_device_train_batch_size * plan.world * train.gradient_accumulation_steps
    line = f"{size} = {train.per_device_train_batch_size} per process x {plan.world} processes x {train.gradient_accumulation_steps} accumulation"
    if plan.examples is None:
        return line
    per_epoch = max(
        math.ceil(
            math.ceil(plan.examples / (train.per_device_train_batch_size * plan.world))
            / train.gradient_accumulation_steps
        ),
        1,
    )
    steps = (
        train.max_steps if train.max_steps > 0 else math.ceil(per_epoch * train.num_train_epochs)
    )
    if plan.settings.data.packing:  # how many texts share a row only their tokens tell
        return f"{line}; {plan.examples} examples before packing, fewer than {per_epoch} steps an epoch"
    return f"{line}; {plan.examples} examples, {per_epoch} steps an epoch, {steps} in all"


def table(plan: Plan) -> list[str]:
    """The plan for a screen of 120 columns."""
    counts, train = plan.counts, plan.settings.train
    batch, length = train.per_device_train_batch_size, plan.settings.data.max_length
    head = (
        "stage",
        "weights",
        "backbone",
        "trained",
        "grads",
        "optim.",
        "buffers",
        "activ.",
        "act.cp",
        "total",
        "total.cp",
        "host",
        "load",
    )
    head += ("fits", "fits.cp") if plan.limit is not None else ()
    lines = [head]
    for row in plan.rows:
        s, plain, less = row.states, row.total(False), row.total(True)
        numbers = (
            s.backbone,
            s.trained,
            s.gradients,
            s.optimizer,
            s.buffers + s.gathered,
            row.step.peak,
            row.step_checkpointing.peak,
        )
        numbers += (plain, less, s.host, s.load)
        verdicts = (plan.verdict(plain), plan.verdict(less)) if plan.limit is not None else ()
        lines.append(
            (
                ("*" if row.chosen else "") + row.stage[:14],
                row.weights,
                *map(amount, numbers),
                *verdicts,
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    rows = [
        " ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    ]
    return [
        f"model      {plan.settings.model.name}: backbone {counts['backbone']:,} parameters, head {counts['head']:,}",
        f"method     {plan.settings.method.name}: trained {counts['trained']:,} ({counts['trained_percent']:.2f}%),"
        f" stored {counts['stored']:,} ({counts['stored_percent']:.2f}%)",
        f"batch      {batches(plan)}",
        f"planned    for {plan.device}, mixed precision {plan.half}"
        + (f", {amount(plan.limit)} a device" if plan.limit is not None else ""),
        *plan.checks,
        "",
        f"Memory of one process, K/M/G = powers of 1024; every batch {batch} x {length} tokens (the worst case); * as configured",
        *rows,
        "none: one process or DDP.  activ.: most alive in a step beside all of these.  cp: with gradient checkpointing.",
        "buffers: of DDP and ZeRO, with what ZeRO-3 gathers.  host: CPU memory of what is offloaded.  load: most while loading.",
        "What CUDA takes itself (context, kernels, fragmentation) comes on top.",
    ]


def as_json(plan: Plan) -> dict[str, Any]:
    """The same numbers for programs: bytes per process."""
    return {
        "world": plan.world,
        "device": plan.device,
        "mixed_precision": plan.half,
        "device_bytes": plan.limit,
        "parameters": plan.counts,
        "batch": batches(plan),
        "checks": plan.checks,
        "fits": plan.fits if plan.limit is not None else None,
        "rows": [
            {
                "stage": row.stage,
                "weights": row.weights,
                "configured": row.chosen,
                **dataclasses.asdict(row.states),
            }
            | {
                f"{key}{suffix}": value
                for suffix, cp, step in (
                    ("", False, row.step),
                    ("_checkpointing", True, row.step_checkpointing),
                )
                for key, value in (
                    ("kept", step.kept),
                    ("activations", step.peak),
                    ("total", row.total(cp)),
                    ("fits", plan.verdict(row.total(cp))),
                )
            }
            for row in plan.rows
        ],
    }
