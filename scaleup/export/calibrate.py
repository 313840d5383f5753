"""Runs a trained model over prepared batches in a process of its own, and takes its gates' means there.

    python -m scaleup.export.calibrate JOB.json

JOB: config (YAML of the run), checkpoint (a bundle), weights ("trained": as training loads them, "user": as a user of PEFT does),
full_precision (of a quantised run: load the backbone as it was before), dtype (of the backbone; null: as the run kept it), labels, batches, calibrate (examples, 0: none), gates (constants
to put in the gates' place, null: none), dropped (sites and parts to leave out), generate, output (a file).

Shapes: B examples, T tokens, D hidden size.
"""

import json
import pathlib
import sys

import torch
from torch import nn
from transformers.utils import logging

from scaleup.backbone import loading as backbone
from scaleup.backbone.method import load_run_model
from scaleup.data import tasks
from scaleup.export.fold import Gates
from scaleup.export.measure import measure
from scaleup.settings import schema as config
from scaleup.unipelt.adapter import AdapterLayer, Bottleneck, PostNormAdapter
from scaleup.unipelt.attention_site import AttentionGates
from scaleup.unipelt.gate import ConstantGate, LearnedGate, pool
from scaleup.unipelt.prefix import CHILD, watching

VALUE = "value"  # the LoRA gate of a cross attention's values


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
    """Where a child of ours sits: the path of an attention, of a post-LN block's norm or of a pre-LN block."""
    return name.removeprefix("base_model.model.").split(".unipelt_", 1)[0]


class _Watch:
    """Sums of gate values per example, and of what each prefix and adapter changes against what it is added to."""

    def __init__(self, model: nn.Module):
        self.gates: dict[tuple[str, str], torch.Tensor] = {}  # count, sum, sum of squares
        self.effects: dict[
            tuple[str, str], torch.Tensor
        ] = {}  # squares of the change, of the changed
        self.handles, self.names = [], {}
        for name, module in model.named_modules():
            site = _site(name)
            if isinstance(module, LearnedGate):
                self.handles.append(
                    module.register_forward_hook(
                        lambda m, args, kwargs, out, site=site: self._gate(site, args, kwargs, out),
                        with_kwargs=True,
                    )
                )
            elif isinstance(module, AttentionGates):
                self.names[id(module)] = site
            elif isinstance(module, AdapterLayer):
                self._watch_adapter(model, name, site, module)

    def _gate(self, site: str, args: tuple, kwargs: dict, out: dict[str, torch.Tensor]) -> None:
        other = len(args) > 2 or "pooling" in kwargs
        for name, g_BT1 in out.items():
            mask_BT = args[1] if g_BT1.shape[1] > 1 else None
            g_B = pool(g_BT1.float(), "masked", mask_BT)[:, 0, 0].double()
            sums = torch.stack([torch.ones_like(g_B).sum(), g_B.sum(), g_B.square().sum()]).cpu()
            if name == "lora" or not other:
                key = (site, VALUE if other else name)
                self.gates[key] = self.gates.get(key, 0) + sums

    def _watch_adapter(self, model: nn.Module, name: str, site: str, layer: AdapterLayer) -> None:
        state: dict[str, torch.Tensor] = {}
        bottleneck = next(m for m in layer.modules() if isinstance(m, Bottleneck))
        gate = next(m for m in layer.modules() if isinstance(m, LearnedGate | ConstantGate))

        def note_gate(module: nn.Module, args: tuple, out: dict) -> None:
            state["gate"] = out["adapter"]

        def note_update(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
            state["update"] = state["gate"] * module.up(out)

        def keep_sum(module: nn.Module, args: tuple) -> None:
            state["sum"] = args[0].clone()  # the update is added in place

        def note_sum(z_BTD: torch.Tensor) -> None:
            mask_BT = layer._tokens[0].real(z_BTD.shape[1])
            self._effect(site, "adapter", state["update"], z_BTD, mask_BT)

        self.handles += [
            gate.register_forward_hook(note_gate),
            bottleneck.register_forward_hook(note_update),
        ]
        if isinstance(layer, PostNormAdapter):
            self.handles += [
                layer.register_forward_pre_hook(keep_sum),
                layer.register_forward_hook(lambda m, args, out: note_sum(state["sum"])),
            ]
        else:  # after our own hook on the block
            block = model.get_submodule(name.rpartition(".")[0])
            self.handles.append(
                block.register_forward_hook(
                    lambda m, args, out: note_sum(out[0] if isinstance(out, tuple) else out)
                )
            )

    def prefix(
        self, attention: nn.Module, out_BTHE: torch.Tensor, without_BTHE: torch.Tensor
    ) -> None:
        """For `watching`."""
        child = attention._modules[CHILD]
        mask_BT = child._tokens[0].real(out_BTHE.shape[1])
        self._effect(
            self.names[id(child)],
            "prefix",
            (out_BTHE - without_BTHE).flatten(2),
            out_BTHE.flatten(2),
            mask_BT,
        )

    def _effect(
        self,
        site: str,
        part: str,
        change_BTD: torch.Tensor,
        whole_BTD: torch.Tensor,
        mask_BT: torch.Tensor | None,
    ) -> None:
        squares = torch.stack(
            [change_BTD.float().square().sum(-1), whole_BTD.float().square().sum(-1)]
        )
        sums = (squares if mask_BT is None else squares * mask_BT).sum(dim=(1, 2)).double().cpu()
        self.effects[site, part] = self.effects.get((site, part), 0) + sums

    def summary(self) -> dict:
        """JSON: gates [site, part, mean, spread], effects [site, part, relative change]."""
        gates = []
        for (site, part), (count, total, squares) in self.gates.items():
            mean = total / count
            gates.append(
                [site, part, mean.item(), (squares / count - mean**2).clamp(min=0).sqrt().item()]
            )
        return {
            "gates": gates,
            "effects": [
                [*key, (change / whole).sqrt().item()]
                for key, (change, whole) in self.effects.items()
            ],
        }


def calibrate(model: nn.Module, batches: list[dict[str, torch.Tensor]], examples: int) -> dict:
    """Gates and effects over the first `examples` of the batches."""
    watch, seen = _Watch(model), 0
    device = next(model.parameters()).device
    with torch.inference_mode(), watching(watch.prefix):
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
    for handle in watch.handles:
        handle.remove()
    return watch.summary() | {"examples": seen}


class _Frozen(ConstantGate):
    """A gate's constants; of a cross attention's values another one."""

    def __init__(self, values: dict[str, float], of_values: float | None):
        super().__init__(values)
        self.of_values = of_values

    def forward(
        self,
        h_BTD: torch.Tensor,
        mask_BT: torch.Tensor | None,
        pooling: str | None = None,
        running: object = None,
        wh_BTN: torch.Tensor | None = None,
    ) -> dict[str, float]:
        return self.values if pooling is None else {"lora": self.of_values}


def freeze(model: nn.Module, gates: Gates, dropped: set[tuple[str, str]]) -> None:
    """Constants in the place of gates; a prefix that is dropped is not handed out, an adapter that is dropped adds nothing."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, LearnedGate | ConstantGate)
    ]
    for name, gate in found:
        site = _site(name)
        names = gate.names if isinstance(gate, LearnedGate) else tuple(gate.values)
        values = {
            part: gates[site, part]
            for part in names
            if part != "prefix" or (site, part) not in dropped
        }
        if (site, "adapter") in dropped:
            values = {"adapter": 0.0}
        model.set_submodule(name, _Frozen(values, gates.get((site, VALUE))))


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
