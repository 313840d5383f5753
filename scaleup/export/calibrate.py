"""Measure a trained model and its gates over prepared batches, in a separate process.

    python -m scaleup.export.calibrate JOB.json

Shapes: B examples, T tokens, D hidden size.
"""

import contextlib
import dataclasses
import functools
import pathlib
import sys
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from scaleup.backbone import loading
from scaleup.backbone.method import load_run_model
from scaleup.backbone.placement import Offload
from scaleup.data import tasks
from scaleup.data.metrics import IGNORED
from scaleup.export.low_rank import Student
from scaleup.export.measure import Job, Measurements, measure
from scaleup.settings import schema
from scaleup.unipelt.gate import ConstantGate, GateMoments, LearnedGate, pool
from scaleup.unipelt.layers import SiteLayer
from scaleup.unipelt.lora_attention import VALUE
from scaleup.unipelt.model import site_of
from scaleup.unipelt.submodule import Gates

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
Place = tuple[str, str]  # path of a site, name of a submodule


@dataclasses.dataclass(kw_only=True)
class TrainedJob(Job):
    """The job of measuring a trained model.

    Attributes:
        config: config.yaml of the run.
        checkpoint: the adapter checkpoint.
        labels: class names in id order, None for other tasks.
        with_peft: load the checkpoint with PEFT alone, as a user does, instead of as in training.
        full_precision: load the backbone of a quantised run without quantisation.
        dtype: data type of the backbone, None for the one that the run kept it in.
        examples: number of examples to measure the gates on; 0: do not measure gates.
        gates: (site, submodule, constant) to put in place of each gate, None to keep the gates.
        dropped: (site, submodule) pairs that are left out.
        updates: a file of low-rank updates; measure the bare backbone with them instead.
    """

    config: str
    checkpoint: str
    labels: list[str] | None
    with_peft: bool = False
    full_precision: bool = False
    dtype: str | None = None
    examples: int = 0
    gates: list[tuple[str, str, float]] | None = None
    dropped: list[Place] = dataclasses.field(default_factory=list)
    updates: str | None = None


@dataclasses.dataclass(kw_only=True)
class TrainedMeasurements(Measurements):
    """What was measured of a trained model.

    Attributes:
        dtype: data type of the backbone.
        gates: mean and standard deviation of each gate over examples.
        effects: norm of the change by each submodule, relative to the value that it changes.
    """

    dtype: str
    gates: dict[Place, tuple[float, float]] = dataclasses.field(default_factory=dict)
    effects: dict[Place, float] = dataclasses.field(default_factory=dict)


def load(job: TrainedJob, device: torch.device) -> nn.Module:
    """Load the trained model in evaluation mode, to compute on `device`."""
    settings = schema.load(job.config)
    changes: dict[str, str] = {"attention": settings.model.portable_attention}
    if job.full_precision:
        changes["quantization"] = "none"
    settings = settings.model_copy(update={"model": settings.model.model_copy(update=changes)})
    source: dict[str, Any] = {
        "adapter" if job.with_peft else "weights": pathlib.Path(job.checkpoint)
    }
    model = load_run_model(
        settings,
        loading.load_config(settings.model),
        tasks.of(settings.data).auto,
        job.labels,
        device,
        dtype=None if job.dtype is None else getattr(torch, job.dtype),
        offload=Offload(pathlib.Path(job.offload), job.memory),
        **source,
    )
    in_place = hasattr(model, "hf_device_map")
    return (model if in_place else model.to(device)).eval()


class GateObserver:
    """Collects gate values per example, and how much each submodule changes its value."""

    def __init__(self, model: nn.Module):
        self.moments: dict[Place, Any] = {}  # [3, 1]: count, sum and sum of squares of a gate
        self.squares: dict[Place, Any] = {}  # [2]: sums of squares of the change and of the value
        self.handles: list[Any] = []
        self.layers: list[SiteLayer] = []
        for name, module in model.named_modules():
            if isinstance(module, LearnedGate):
                hook = functools.partial(self._add_gates, site_of(name))
                self.handles.append(module.register_forward_hook(hook, with_kwargs=True))
            elif isinstance(module, SiteLayer):
                site = site_of(f"{name}.unipelt_")
                module.observer = functools.partial(self._add_effect, module, site)
                self.layers.append(module)

    def remove(self) -> None:
        """Stop observing."""
        for handle in self.handles:
            handle.remove()
        for layer in self.layers:
            layer.observer = None

    def _add_gates(
        self,
        site: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        gates: dict[str, torch.Tensor],
    ) -> None:
        is_encoder = len(args) > 2 or "pooling" in kwargs  # the values of a cross-attention
        for name, g_BT1 in gates.items():
            if is_encoder and name != "lora":
                continue
            mask_BT = args[1] if g_BT1.shape[1] > 1 else None
            g_B = pool(g_BT1.float(), "masked", mask_BT)[:, 0, 0].double()
            sums = torch.stack([torch.ones_like(g_B), g_B, g_B.square()]).sum(1, keepdim=True).cpu()
            key = site, VALUE if is_encoder else name
            self.moments[key] = self.moments.get(key, 0) + sums

    def _add_effect(
        self,
        layer: SiteLayer,
        site: str,
        submodule: str,
        change_BTD: torch.Tensor,
        whole_BTD: torch.Tensor,
    ) -> None:
        norms = [tensor.float().square().sum(-1) for tensor in (change_BTD, whole_BTD)]
        squares_2BT = torch.stack(norms)
        mask_BT = layer.passes.current.real(whole_BTD.shape[1])
        if mask_BT is not None:
            squares_2BT = squares_2BT * mask_BT
        sums = squares_2BT.sum(dim=(1, 2)).double().cpu()
        self.squares[site, submodule] = self.squares.get((site, submodule), 0) + sums

    def gates(self) -> dict[Place, tuple[float, float]]:
        """Return mean and standard deviation of every gate."""
        return {key: GateMoments.moments(sums)[0] for key, sums in self.moments.items()}

    def effects(self) -> dict[Place, float]:
        """Return the norm of every submodule's change, relative to the value that it changes."""
        return {
            key: (change / value).sqrt().item() for key, (change, value) in self.squares.items()
        }


def observe_gates(
    model: Any,
    batches: list[dict[str, torch.Tensor]],
    examples: int,
    device: torch.device,
    *,
    writes: bool,
) -> GateObserver:
    """Run a model over the first examples of the batches and observe its gates.

    Args:
        writes: the model generates text.
    """
    observer, remaining = GateObserver(model), examples
    with torch.inference_mode():
        for batch in batches:
            if remaining <= 0:
                break
            labels = batch["labels"]
            names = [name for name in MODEL_INPUTS if name in batch]
            if writes and model.config.is_encoder_decoder:
                names.append("labels")
            inputs = {name: batch[name][:remaining].to(device) for name in names}
            if "labels" in inputs:  # the padding of targets belongs to no example
                inputs["decoder_attention_mask"] = (inputs["labels"] != IGNORED).long()
            remaining -= len(labels)
            model(**inputs, **({"use_cache": False} if writes else {}))
    observer.remove()
    return observer


def freeze(model: nn.Module, gates: Gates, dropped: set[Place]) -> None:
    """Replace every gate by constants, and leave out the submodules that are dropped at a site."""
    kinds = LearnedGate | ConstantGate
    for name, gate in [(n, m) for n, m in model.named_modules() if isinstance(m, kinds)]:
        site = site_of(name)
        parts = [part for part in (*gate.names, VALUE) if (site, part) in gates]
        kept = {part: gates[site, part] for part in parts if (site, part) not in dropped}
        model.set_submodule(name, ConstantGate(kept))


def main() -> None:
    """Measure a trained model. The argument is the file of a TrainedJob."""
    job = TrainedJob.from_json(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))
    logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = load(job, device)
    batches = torch.load(job.batches)
    observer = None
    if job.examples:
        observer = observe_gates(model, batches, job.examples, device, writes=job.writes)
    if job.gates is not None:
        constants = {(site, part): value for site, part, value in job.gates}
        freeze(model, constants, {(site, part) for site, part in job.dropped})
    changed: Any = contextlib.nullcontext()
    if job.updates is not None:
        changed = Student.load(model, pathlib.Path(job.updates), device).active()
    with changed:
        measured = measure(model, batches, job, device)
    measurements = TrainedMeasurements(
        **vars(measured),
        dtype=str(model.get_base_model().dtype).removeprefix("torch."),
        gates=observer.gates() if observer else {},
        effects=observer.effects() if observer else {},
    )
    measurements.save(job.output)


if __name__ == "__main__":
    main()
