"""Predict the memory of a run per process, for FSDP, every ZeRO stage and kind of frozen weights.

    plan = make_plan(settings, world=16, device="cuda", limit=24 * 2**30)
    print(*report.table(plan), sep="\\n")

Nothing is loaded: the model is built on the meta device. States follow the rules in
`scaleup.memory.states`. Activations come from running the model on tensors without data
(`scaleup.memory.activations`), for the largest possible batch: `train.per_device_train_batch_size`
examples of `data.max_length` tokens.

    total = backbone + trained + optimizer + buffers + gathered + max(activations, gradients, first)

Activations shrink in the backward pass while gradients grow, so the larger of the two counts. With
gradient accumulation, gradients exist from the second pass on, and both count. What CUDA itself
needs (context, kernels, fragmentation) is not included: a run is called tight above 90% of the
limit.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from scaleup.backbone import precision
from scaleup.backbone.kernels import kernels_line
from scaleup.backbone.lengths import fit_length
from scaleup.backbone.loading import check_attention, load_config, set_labels
from scaleup.backbone.method import checkpointing_problems, empty_run_model
from scaleup.backbone.tokenizer import pad_tokens, set_pad_token
from scaleup.data import tasks
from scaleup.data.glue import GLUE
from scaleup.errors import ConfigError, one_line
from scaleup.memory.activations import Kernels, Step
from scaleup.memory.requirements import check_requirements
from scaleup.memory.states import States, Zero, fsdp_states, read_zero, states
from scaleup.memory.trace import trace
from scaleup.settings.rules import ZERO_PRESETS
from scaleup.settings.schema import Settings, TrainSettings
from scaleup.unipelt.model import parameter_counts

WEIGHTS = ("none", "8bit", "nf4")
FSDP = ("fsdp_full", "fsdp_hybrid")
PER_HOST = 8  # GPUs of a host
TIGHT = 0.9  # share of the limit; plans are tested to 10%


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to run the config."""

    # none (one process or DDP), fsdp_full, fsdp_hybrid, a ZeRO preset or the config's own file
    stage: str
    weights: str
    states: States
    step: Step
    step_checkpointing: Step | None  # None if the model has no gradient checkpointing
    accumulate: bool
    chosen: bool  # this is what the config says

    def total(self, checkpointing: bool) -> int | None:
        """Return the most bytes on the device at once, None without a step to count."""
        step = self.step_checkpointing if checkpointing else self.step
        if step is None:
            return None
        peak, gradients = max(step.peak, self.states.first), self.states.gradients
        transient = peak + gradients if self.accumulate else max(peak, gradients)
        return self.states.resident + self.states.gathered + transient


@dataclasses.dataclass(frozen=True)
class Plan:
    """A plan; all sizes are bytes per process."""

    settings: Settings
    world: int
    per_host: int  # processes on each host
    device: str
    half: str  # bf16, fp16 or no
    limit: int | None  # memory of a device; None if unknown
    examples: int | None  # for training; None if the data set is on the hub
    counts: dict[str, Any]
    rows: list[Row]
    kernels: str | None  # a line about them; None if there is nothing to say
    checks: list[str]

    def verdict(self, total: int | None) -> str:
        """Return whether it fits: yes, tight (above 90%) or no; empty without limit or total."""
        if self.limit is None or total is None:
            return ""
        return "no" if total > self.limit else "tight" if total > TIGHT * self.limit else "yes"

    @property
    def fits(self) -> bool:
        """Return whether the run as configured stays within the limit."""
        checkpointing = self.settings.train.gradient_checkpointing
        totals = [row.total(checkpointing) for row in self.rows if row.chosen]
        return all(self.verdict(total) != "no" for total in totals)


def _labels_and_examples(settings: Settings) -> tuple[list[str] | None, int | None]:
    """Return the class names, and the number of training examples if data is local."""
    data = settings.data
    if data.name is None or (data.path is not None and pathlib.Path(data.path).exists()):
        examples = tasks.of(data).module.load(data)
        return examples.labels, examples.train_rows
    return GLUE[data.name].labels, data.k if isinstance(data.k, int) else None


def _stage_name(train: TrainSettings) -> str:
    if train.fsdp is not None:
        return f"fsdp_{train.fsdp}"
    if train.deepspeed is None or train.deepspeed in ZERO_PRESETS:
        return train.deepspeed or "none"
    return pathlib.Path(train.deepspeed).name


def _stages(settings: Settings, hidden_size: int, per_host: int) -> dict[str, Zero]:
    """Return FSDP, every preset and the config's own file by the name of its row."""
    found = {"none": Zero()}
    if settings.method.name == "unipelt":
        found |= {stage: Zero() for stage in FSDP}
    found |= {name: read_zero(name, hidden_size, per_host) for name in ZERO_PRESETS}
    if settings.train.deepspeed is not None:
        name = _stage_name(settings.train)
        found[name] = read_zero(settings.train.deepspeed, hidden_size, per_host)
    return found


def _is_deepspeed(stage: str) -> bool:
    return stage not in ("none", *FSDP)


@dataclasses.dataclass
class _Planner:
    """Computes the rows of a plan and remembers what several rows share."""

    settings: Settings
    config: PretrainedConfig
    device: Any
    half: torch.dtype | None
    world: int
    per_host: int
    progress: Callable[[str], None]

    def __post_init__(self) -> None:
        self.steps: dict[tuple[Kernels, bool], Step] = {}
        # DeepSpeed converts the model to half precision. Otherwise autocast computes in it.
        self.models = {deepspeed: self._first_model(deepspeed) for deepspeed in (False, True)}

    def _make(self, config: PretrainedConfig, deepspeed: bool) -> nn.Module:
        """Build the adapted model on the meta device."""
        half = self.half if deepspeed else None
        dtype = half or precision.backbone_dtype(self.settings, self.half)
        auto = tasks.of(self.settings.data).auto
        model = empty_run_model(self.settings, config, auto, dtype)
        if half is not None:
            precision.cast_trained(model, half)
        return model

    def _first_model(self, deepspeed: bool) -> nn.Module:
        try:
            return self._make(self.config, deepspeed)
        except ConfigError:
            raise
        except (ValueError, KeyError, ImportError) as error:
            name = self.settings.model.name
            raise ConfigError(f"model.name: {name}: {one_line(error, 300)}") from error

    def _step(self, stage: str, zero: Zero, weights: Any, checkpointing: bool) -> Step:
        deepspeed, linear = _is_deepspeed(stage), weights
        if weights == "none":
            linear = "zero3" if zero.stage == 3 else "plain"
        elif weights == "8bit" and (zero.stage == 3 or stage in FSDP):
            linear = "int8"
        kernels = Kernels(self.device, None if deepspeed else self.half, linear, checkpointing)
        key = (kernels, deepspeed and self.half is not None)
        if key not in self.steps:
            suffix = ", checkpointing" if checkpointing else ""
            self.progress(f"activations: {stage}, weights {weights}{suffix}")
            data, batch = self.settings.data, self.settings.train.per_device_train_batch_size
            lengths = data.max_length, data.max_target_length
            make = functools.partial(self._make, deepspeed=deepspeed)
            whole = self.models[deepspeed]
            self.steps[key] = trace(make, self.config, kernels, batch, *lengths, whole)
        return self.steps[key]

    def _states(self, stage: str, zero: Zero, weights: str) -> States:
        deepspeed = _is_deepspeed(stage)
        model = self.models[deepspeed]
        if stage in FSDP:
            shards = self.world if stage == "fsdp_full" else self.per_host
            return fsdp_states(model, weights, self.world, shards)
        return states(model, weights, zero, self.world, self.half if deepspeed else None)

    def row(self, stage: str, zero: Zero, weights: str, chosen: bool) -> Row:
        checkpoints: Any = self.models[_is_deepspeed(stage)].supports_gradient_checkpointing
        return Row(
            stage=stage,
            weights=weights,
            states=self._states(stage, zero, weights),
            step=self._step(stage, zero, weights, False),
            step_checkpointing=self._step(stage, zero, weights, True) if checkpoints else None,
            accumulate=self.settings.train.gradient_accumulation_steps > 1,
            chosen=chosen,
        )


def make_plan(
    settings: Settings,
    world: int,
    device: str = "cuda",
    limit: int | None = None,
    configured: bool = False,
    progress: Callable[[str], None] = lambda line: None,
    per_host: int = PER_HOST,
) -> Plan:
    """Plan the memory of a checked config.

    Args:
        world: number of processes.
        device: cuda or cpu.
        limit: bytes of one device; None if unknown.
        configured: plan only the configured stage and kind of weights, which is quicker.
        progress: is called with a line about each slow computation.
        per_host: processes on each host, if there are so many.
    """
    per_host = min(per_host, world)
    check_attention(settings.model, device)
    config = load_config(settings.model)
    settings = fit_length(settings, config)
    labels, examples = _labels_and_examples(settings)
    set_labels(config, settings.data.resolved_task, labels)
    if not pad_tokens(config):
        set_pad_token(config, 0)  # a run uses the tokenizer's; here any token will do
    half = precision.half_dtype(settings, has_bf16=device == "cuda")
    auto = tasks.of(settings.data).auto
    problems = [
        *precision.problems(settings, half),
        *checkpointing_problems(settings.train, config, auto),
    ]
    if problems:
        raise ConfigError(problems)
    planner = _Planner(settings, config, device, half, world, per_host, progress)
    configuration = (_stage_name(settings.train), settings.model.quantization)
    kinds = WEIGHTS if settings.method.name == "unipelt" else WEIGHTS[:1]
    rows = [
        planner.row(stage, zero, weights, (stage, weights) == configuration)
        for stage, zero in _stages(settings, config.hidden_size, per_host).items()
        for weights in kinds
        if (not configured or (stage, weights) == configuration)
        and not (stage in FSDP and weights == "nf4")
    ]
    return Plan(
        settings=settings,
        world=world,
        per_host=per_host,
        device=device,
        half={torch.bfloat16: "bf16", torch.float16: "fp16", None: "no"}[half],
        limit=limit,
        examples=examples,
        counts=parameter_counts(planner.models[False]),
        rows=rows,
        kernels=kernels_line(settings, planner.models[False], device, planned=True),
        checks=check_requirements(settings, world),
    )
