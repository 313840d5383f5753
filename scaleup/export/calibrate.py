"""Runs a trained model over prepared batches in a process of its own, and takes its gates' means there.

    python -m scaleup.export.calibrate JOB.json

JOB: config (YAML of the run), checkpoint (a bundle), weights ("trained": as training loads them, "user": as a user of PEFT does),
full_precision (of a quantised run: load the backbone as it was before), dtype (of the backbone; null: as the run kept it), labels, batches, calibrate (examples, 0: none), gates (constants
to put in the gates' place, null: none), dropped (sites and parts to leave out), generate, output (a file).

Shapes: B examples, T tokens, D hidden size.
"""

import functools
import json
import pathlib
import sys

import torch
from torch import nn
from transformers.utils import logging

from scaleup.backbone import loading as backbone
from scaleup.backbone.method import load_run_model
from scaleup.data import tasks
from scaleup.export.measure import measure
from scaleup.settings import schema as config
from scaleup.unipelt.gate import ConstantGate, LearnedGate, pool
from scaleup.unipelt.layers import SiteLayer
from scaleup.unipelt.lora import VALUE
from scaleup.unipelt.submodule import Gates


def load(job: dict) -> nn.Module:
    """The trained model on this machine's device, in evaluation mode."""
    settings = config.load(job["config"])
    if job["full_precision"]:
        model_settings = settings.model.model_copy(update={"quantization": "none"})
        settings = settings.model_copy(update={"model": model_settings})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_run_model(
        settings,
        backbone.load_config(settings.model),
        tasks.of(settings.data).auto,
        job["labels"],
        device,
        dtype=job["dtype"] and getattr(torch, job["dtype"]),
        **{"adapter" if job["weights"] == "user" else "weights": pathlib.Path(job["checkpoint"])},
    )
    return model.to(device).eval()


def _site(name: str) -> str:
    """Return the path of the site at which one of UniPELT's modules sits."""
    return name.removeprefix("base_model.model.").split(".unipelt_", 1)[0]


class _Measurement:
    """Gate values per example, and by how much each submodule changes what it is added to."""

    def __init__(self, model: nn.Module):
        self.gates: dict[tuple[str, str], torch.Tensor] = {}  # count, sum, sum of squares
        self.effects: dict[
            tuple[str, str], torch.Tensor
        ] = {}  # squares of the change, of the whole
        self.handles = []
        for name, module in model.named_modules():
            if isinstance(module, LearnedGate):
                hook = functools.partial(self._add_gates, _site(name))
                self.handles.append(module.register_forward_hook(hook, with_kwargs=True))
            elif isinstance(module, SiteLayer):
                module.observer = functools.partial(
                    self._add_effect, module, _site(f"{name}.unipelt_")
                )

    def _add_gates(
        self,
        site: str,
        module: nn.Module,
        args: tuple,
        kwargs: dict,
        gates: dict[str, torch.Tensor],
    ) -> None:
        of_encoder = len(args) > 2 or "pooling" in kwargs  # a cross attention's values
        for name, g_BT1 in gates.items():
            mask_BT = args[1] if g_BT1.shape[1] > 1 else None
            g_B = pool(g_BT1.float(), "masked", mask_BT)[:, 0, 0].double()
            sums = torch.stack([torch.ones_like(g_B).sum(), g_B.sum(), g_B.square().sum()]).cpu()
            if not of_encoder or name == "lora":
                key = (site, VALUE if of_encoder else name)
                self.gates[key] = self.gates.get(key, 0) + sums

    def _add_effect(
        self,
        layer: SiteLayer,
        site: str,
        submodule: str,
        change_BTD: torch.Tensor,
        whole_BTD: torch.Tensor,
    ) -> None:
        parts = [change_BTD.float().square().sum(-1), whole_BTD.float().square().sum(-1)]
        squares = torch.stack(parts)
        mask_BT = layer.tokens.real(whole_BTD.shape[1])
        sums = (squares if mask_BT is None else squares * mask_BT).sum(dim=(1, 2)).double().cpu()
        self.effects[site, submodule] = self.effects.get((site, submodule), 0) + sums

    def summary(self) -> dict:
        """Return JSON: gates [site, part, mean, spread], effects [site, part, relative change]."""
        gates = []
        for (site, part), (count, total, squares) in self.gates.items():
            mean = total / count
            spread = (squares / count - mean**2).clamp(min=0).sqrt()
            gates.append([site, part, mean.item(), spread.item()])
        effects = [
            [*key, (part / whole).sqrt().item()] for key, (part, whole) in self.effects.items()
        ]
        return {"gates": gates, "effects": effects}


def calibrate(model: nn.Module, batches: list[dict[str, torch.Tensor]], examples: int) -> dict:
    """Gates and effects over the first `examples` of the batches."""
    measurement, seen = _Measurement(model), 0
    device = next(model.parameters()).device
    with torch.inference_mode():
        for batch in batches:
            if seen >= examples:
                break
            take = min(len(batch["labels"]), examples - seen)
            seen += take
            inputs = {
                n: v[:take].to(device)
                for n, v in batch.items()
                if n in ("input_ids", "attention_mask", "token_type_ids", "position_ids")
            }
            if batch["labels"].dim() > 1 and model.config.is_encoder_decoder:
                inputs["labels"] = batch["labels"][:take].to(device)
            model(**inputs, **({"use_cache": False} if batch["labels"].dim() > 1 else {}))
    for handle in measurement.handles:
        handle.remove()
    return measurement.summary() | {"examples": seen}


def freeze(model: nn.Module, gates: Gates, dropped: set[tuple[str, str]]) -> None:
    """Replace every gate by constants, and leave out the submodules that are dropped at a site."""
    learned = LearnedGate | ConstantGate
    for name, gate in [(n, m) for n, m in model.named_modules() if isinstance(m, learned)]:
        site = _site(name)
        names = [part for part in (*gate.names, VALUE) if (site, part) in gates]
        kept = {part: gates[site, part] for part in names if (site, part) not in dropped}
        model.set_submodule(name, ConstantGate(kept))


def main() -> None:
    """Command line: the job's file."""
    job = json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))
    logging.disable_progress_bar()
    model, batches = load(job), torch.load(job["batches"])
    found = calibrate(model, batches, job["calibrate"]) if job["calibrate"] else {}
    if job["gates"] is not None:
        freeze(
            model,
            {(site, part): value for site, part, value in job["gates"]},
            {tuple(key) for key in job["dropped"]},
        )
    kept_in = str(model.get_base_model().dtype).removeprefix("torch.")
    torch.save(found | measure(model, batches, job["generate"]) | {"dtype": kept_in}, job["output"])


if __name__ == "__main__":
    main()
