"""Contenders of the speed benchmark: one geometry, random weights, every method as its users run it.

In training all share the frozen weights of one backbone, and full fine-tuning has its own; at inference each has its own. A contender is a function that does one step. `floor` is what any
method pays that trains inside a frozen backbone: gradients go through all activations and to no weight of it.

Shapes: B examples, T tokens.
"""

import copy
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, BartConfig, BertConfig, PretrainedConfig, PreTrainedModel

from scaleup import fold, ship
from scaleup.backbone import empty_model, head_names
from scaleup.sites import find_sites
from scaleup.unipelt import UniPeltConfig

# Dropout off: with it CPU attention takes a slow path in every contender alike (DESIGN.md, section 6).
GEOMETRIES: dict[str, Callable[[], PretrainedConfig]] = {
    "bert-base": lambda: BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2),
    "bart-large": lambda: BartConfig(dropout=0.0, num_labels=2),
}
FLAT = {"prefix_reparameterization": "none"}
UNIPELT = {
    "adapter": {"submodules": ["adapter"]},
    "prefix": {"submodules": ["prefix"], **FLAT},
    "lora": {"submodules": ["lora"]},
    "AP": {"submodules": ["adapter", "prefix"], **FLAT},
    "APL": dict(FLAT),
    "APL, prefix MLP": {},
    "NoGate": {"gates": "none", **FLAT},
}
EOS = 2


@dataclasses.dataclass(frozen=True)
class Contender:
    """step: one training step or forward pass. trained: parameters with gradients. model: for what is counted beside time."""

    step: Callable[[], object]
    trained: int
    model: nn.Module


def backbone(geometry: str) -> PreTrainedModel:
    """Random weights, sdpa attention."""
    torch.manual_seed(0)
    config = GEOMETRIES[geometry]()
    config._attn_implementation = "sdpa"
    return AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa")


def batch(size: int, length: int, ragged: bool, vocabulary: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens [B, T], each example closed by EOS; `ragged`: lengths from an eighth to the whole, half of all tokens padding."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.linspace(length / 8, 7 * length / 8, size).round().long() if ragged else torch.full((size,), length)
    if ragged:
        lengths[-1] = length
    input_ids = torch.randint(5, vocabulary, (size, length), generator=draw)
    mask = (torch.arange(length) < lengths[:, None]).long()
    input_ids = input_ids * mask + (1 - mask)
    input_ids[torch.arange(size), lengths - 1] = EOS
    return {"input_ids": input_ids, "attention_mask": mask, "labels": torch.randint(0, 2, (size,), generator=draw)}


def _copy(model: nn.Module) -> nn.Module:
    """A copy with parameters of its own that share the frozen weights' memory."""
    memo = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def _with_head(model: nn.Module) -> nn.Module:
    for name in head_names(model):
        head = copy.deepcopy(model.get_submodule(name))
        model.set_submodule(name, head.requires_grad_(True))
    return model


def _adapted(base: PreTrainedModel, config: LoraConfig) -> nn.Module:
    model = get_peft_model(_copy(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:  # zero at the start
                parameter.normal_(std=0.02)
    return model


def _biases(base: PreTrainedModel) -> nn.Module:
    model = _with_head(_copy(base))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data = parameter.data.clone()  # the others share it
            parameter.requires_grad = True
    return model


def _floor(base: PreTrainedModel) -> nn.Module:
    model = _with_head(_copy(base))

    def need_gradient(module: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
        return out.requires_grad_()

    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == model.config.vocab_size:
            module.register_forward_hook(need_gradient)
    return model


def merged(base: PreTrainedModel, model: nn.Module, folder: pathlib.Path) -> PreTrainedModel:
    """What `launch/export.py --kind merged` makes of the adapted model, gates at one half, written and loaded again."""
    base.save_pretrained(folder / "base")
    model.save_pretrained(str(folder / "bundle"))
    config, tensors = fold.read_bundle(folder / "bundle")
    empty = empty_model(copy.deepcopy(base.config), "sdpa", torch.float32, AutoModelForSequenceClassification)
    sites = find_sites(empty)
    gates = {key: 0.5 for key in fold.fixed_gates(config, *sites)}
    folded = fold.fold(config, tensors, *sites, gates)
    out = folder / "merged"
    out.mkdir()
    ship.write_config(empty, "AutoModelForSequenceClassification", folded, False, torch.float32, out, "bench")
    ship.write_weights(empty, folder / "base", folded, torch.float32, torch.float32, out, 10**11)
    return AutoModelForSequenceClassification.from_pretrained(out, trust_remote_code=True)


def inference(geometry: str, given: dict[str, torch.Tensor], device: str, only: list[str]) -> dict[str, Contender]:
    """One forward pass: the bare backbone, each method with its gates (prefix collapsed), and APL merged."""
    base, inputs = backbone(geometry).eval(), {name: tensor.to(device) for name, tensor in given.items() if name != "labels"}
    models = {"bare": base}
    for name, config in UNIPELT.items():
        if "MLP" not in name and (not only or name in only or name == "APL"):
            models[name] = _adapted(base, UniPeltConfig(task_type="SEQ_CLS", **config))
    if not only or "APL merged" in only:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            models["APL merged"] = merged(base, models["APL"], pathlib.Path(folder))

    def step(model: nn.Module) -> Callable[[], object]:
        for parameter in model.parameters():  # each its own weights: who shares them would find them in the cache after another's turn
            parameter.data = parameter.data.to(device, copy=True)
        model.to(device).eval()

        def run() -> torch.Tensor:
            with torch.inference_mode():
                return model(**inputs).logits

        return run

    return {name: Contender(step(model), 0, model) for name, model in models.items()}


def training(geometry: str, given: dict[str, torch.Tensor], device: str, only: list[str]) -> dict[str, Contender]:
    """One step of AdamW: full fine-tuning, the floor, biases alone (BitFit), PEFT's LoRA, and each of our methods."""
    base, inputs = backbone(geometry), {name: tensor.to(device) for name, tensor in given.items()}
    targets = [name for site in find_sites(base)[0] for name in (site.query, site.value)]
    makers: dict[str, Callable[[], nn.Module]] = {
        "full fine-tuning": lambda: copy.deepcopy(base),
        "floor": lambda: _floor(base),
        "BitFit": lambda: _biases(base),
        "PEFT LoRA": lambda: _adapted(base, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=targets)),
    } | {name: lambda config=config: _adapted(base, UniPeltConfig(task_type="SEQ_CLS", **config)) for name, config in UNIPELT.items()}

    def step(model: nn.Module) -> Callable[[], object]:
        model.to(device).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

        def run() -> float:
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return run

    found = {}
    for name, make in makers.items():
        if not only or name in only:
            model = make()
            found[name] = Contender(step(model), sum(p.numel() for p in model.parameters() if p.requires_grad), model)
    return found
