"""Contenders of the speed benchmark: one geometry, random weights, every method as its users run it.

Each has weights of its own: who shares them would find them in the cache after another's turn. A contender is a function that does one step. `floor` is what any
method pays that trains inside a frozen backbone: gradients go through all activations and to no weight of it.
With a half type a contender is what a run with `train.bf16` makes of it: frozen weights in that type, what is trained in float32, autocast.

Shapes: B examples, T tokens.
"""

import contextlib
import copy
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Sequence

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from scaleup.backbone.loading import empty_model, load_model
from scaleup.backbone.method import task_type
from scaleup.experiments.meter import allocated_peak, live_bytes
from scaleup.export import fold
from scaleup.export import folder as ship
from scaleup.settings.schema import ModelSettings
from scaleup.training.trainer import ResumableSampler
from scaleup.unipelt.config import UniPeltConfig
from scaleup.unipelt.sites import find_sites, head_names

# Dropout off: with it CPU attention takes a slow path in every contender alike (DESIGN.md, section 6).
GEOMETRIES: dict[str, Callable[[], PretrainedConfig]] = {
    "bert-base": lambda: BertConfig(
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2
    ),
    "bart-large": lambda: BartConfig(dropout=0.0, num_labels=2),
    # BERT-base's layers and modules with next to no arithmetic: what is left is Python's time and torch's bookkeeping.
    "bert-narrow": lambda: BertConfig(
        hidden_size=96,
        intermediate_size=96,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
    ),
    # Llama 3.1 8B's sizes, as a language model; made where it is measured, in a half type.
    "llama-8b": lambda: LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        use_cache=False,
    ),
}
WRITERS = ("llama-8b",)  # the others have a classification head
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
class Variant:
    """step: one training step or forward pass. trained: parameters with gradients. model: for what is counted beside time."""

    step: Callable[[], object]
    trained: int
    model: nn.Module


def chosen(names: Iterable[str], only: list[str]) -> list[str]:
    """Those of `names` that are in `only`, all if it is empty. Raises ValueError for one that is none of them."""
    names = list(names)
    unknown = [name for name in only if name not in names]
    if unknown:
        raise ValueError(f"--only: {unknown[0]} is none of {', '.join(names)}")
    return [name for name in names if not only or name in only]


def model_class(geometry: str) -> type:
    """transformers' class with the geometry's head."""
    return AutoModelForCausalLM if geometry in WRITERS else AutoModelForSequenceClassification


def backbone(
    geometry: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> PreTrainedModel:
    """Random weights, always the same on a device; sdpa attention."""
    torch.manual_seed(0)
    with torch.device(device):
        return model_class(geometry).from_config(
            GEOMETRIES[geometry](), attn_implementation="sdpa", dtype=dtype
        )


def batch(lengths: list[int], width: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Random tokens [B, T], T = `width`; each example closed by EOS, padding behind it."""
    draw = torch.Generator().manual_seed(0)
    ends_B = torch.tensor(lengths)
    input_ids = torch.randint(5, vocabulary, (len(lengths), width), generator=draw)
    mask = (torch.arange(width) < ends_B[:, None]).long()
    input_ids = input_ids * mask + (1 - mask)
    input_ids[torch.arange(len(lengths)), ends_B - 1] = EOS
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "labels": torch.randint(0, 2, (len(lengths),), generator=draw),
    }


def half_padding(count: int, length: int) -> list[int]:
    """Lengths from an eighth of `length` to all of it: half of all tokens are padding."""
    return [
        round(length / 8 + 3 * length / 4 * i / max(1, count - 2)) for i in range(count - 1)
    ] + [length]


def _with_head(model: PreTrainedModel) -> PreTrainedModel:
    """Frozen but for the head."""
    model.requires_grad_(False)
    for name in head_names(model):
        model.get_submodule(name).float().requires_grad_(True)
    return model


def _adapted(base: PreTrainedModel, config: LoraConfig) -> nn.Module:
    """`base` with the method of `config` in it."""
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:  # zero at the start
                parameter.normal_(std=0.02)
    return model


def _unipelt(base: PreTrainedModel, fields: dict) -> nn.Module:
    return _adapted(base, UniPeltConfig(task_type=task_type(base), **fields))


def _peft_lora(base: PreTrainedModel) -> nn.Module:
    targets = [name for site in find_sites(base)[0] for name in (site.query, site.value)]
    return _adapted(
        base, LoraConfig(task_type=task_type(base), r=8, lora_alpha=16, target_modules=targets)
    )


def _biases(base: PreTrainedModel) -> nn.Module:
    for name, parameter in _with_head(base).named_parameters():
        if name.endswith(".bias"):
            parameter.requires_grad = True
    return base


def _floor(base: PreTrainedModel) -> nn.Module:
    def need_gradient(module: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
        return out.requires_grad_()

    for module in _with_head(base).modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == base.config.vocab_size:
            module.register_forward_hook(need_gradient)
    return base


def merged(base: PreTrainedModel, model: nn.Module, folder: pathlib.Path) -> PreTrainedModel:
    """What `launch/export.py --kind merged` makes of the adapted model, gates at one half, written and loaded again."""
    base.save_pretrained(folder / "base")
    model.save_pretrained(str(folder / "bundle"))
    config, tensors = fold.read_bundle(folder / "bundle")
    empty = empty_model(
        copy.deepcopy(base.config), "sdpa", torch.float32, AutoModelForSequenceClassification
    )
    sites = find_sites(empty)
    gates = {key: 0.5 for key in fold.fixed_gates(config, *sites)}
    folded = fold.fold(config, tensors, *sites, gates)
    out = folder / "merged"
    out.mkdir()
    ship.write_config(
        empty, "AutoModelForSequenceClassification", folded, False, torch.float32, out, "bench"
    )
    ship.write_weights(empty, folder / "base", folded, torch.float32, torch.float32, out, 10**11)
    return AutoModelForSequenceClassification.from_pretrained(out, trust_remote_code=True)


def inference(
    geometry: str,
    given: dict[str, torch.Tensor],
    device: str,
    only: list[str],
    compiled: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Variant]:
    """One forward pass: the bare backbone, each method with its gates (prefix collapsed), and APL merged."""
    inputs = {name: tensor.to(device) for name, tensor in given.items() if name != "labels"}
    names = chosen(
        [
            "bare",
            *(name for name in UNIPELT if "MLP" not in name),
            *(["APL merged"] if geometry not in WRITERS else []),
        ],
        only,
    )

    def base() -> PreTrainedModel:
        return backbone(geometry, dtype, device)

    models: dict[str, nn.Module] = {}
    for name in names:
        if name == "APL merged":
            with tempfile.TemporaryDirectory(prefix="bench-") as folder:
                models[name] = merged(
                    backbone(geometry),
                    _unipelt(backbone(geometry), UNIPELT["APL"]),
                    pathlib.Path(folder),
                )
        else:
            models[name] = base() if name == "bare" else _unipelt(base(), UNIPELT[name])

    def step(model: nn.Module) -> Callable[[], object]:
        for parameter in model.parameters():  # those read from a file share its memory
            parameter.data = parameter.data.to(device, dtype, copy=True)
        model.to(device).eval()
        called = torch.compile(model, mode=compiled) if compiled else model

        def run() -> torch.Tensor:
            with torch.inference_mode():
                return called(**inputs).logits

        return run

    return {name: Variant(step(models[name]), 0, models[name]) for name in names}


def _training_step(
    model: nn.Module,
    batches: list[dict[str, torch.Tensor]],
    device: str,
    compiled: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Callable[[], object]:
    """A step of AdamW on each batch."""
    model.to(device).train()
    called = torch.compile(model, mode=compiled) if compiled else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = (
        torch.optim.AdamW(trained, lr=1e-5, fused=True) if trained else None
    )  # the floor of a language model trains nothing
    given = [{name: tensor.to(device) for name, tensor in inputs.items()} for inputs in batches]
    if model.get_output_embeddings() is not None:
        given = [
            inputs
            | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}
            for inputs in given
        ]

    def run() -> None:
        for inputs in given:
            with (
                torch.autocast(device, dtype)
                if dtype != torch.float32
                else contextlib.nullcontext()
            ):
                loss = called(**inputs).loss
            loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

    return run


def _contender(model: nn.Module, step: Callable[[], object]) -> Variant:
    return Variant(step, sum(p.numel() for p in model.parameters() if p.requires_grad), model)


def training(
    geometry: str,
    given: dict[str, torch.Tensor],
    device: str,
    only: list[str],
    compiled: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Variant]:
    """One step of AdamW: full fine-tuning, the floor, biases alone (BitFit), PEFT's LoRA, and each of our methods."""

    def frozen() -> PreTrainedModel:
        return backbone(geometry, dtype, device)

    makers: dict[str, Callable[[], nn.Module]] = {
        "full fine-tuning": lambda: backbone(
            geometry, device=device
        ),  # float32, as what is trained always is
        "floor": lambda: _floor(frozen()),
        "BitFit": lambda: _biases(backbone(geometry, device=device)),
        "PEFT LoRA": lambda: _peft_lora(frozen()),
    } | {name: lambda fields=fields: _unipelt(frozen(), fields) for name, fields in UNIPELT.items()}

    models = {name: makers[name]() for name in chosen(makers, only)}
    return {
        name: _contender(model, _training_step(model, [given], device, compiled, dtype))
        for name, model in models.items()
    }


def ragged(
    geometry: str,
    lengths: list[int],
    size: int,
    width: int,
    device: str,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Variant]:
    """Training steps of APL over the same examples: every batch padded to `width`, to its longest example, and in groups of similar lengths
    (`train.group_by_length`)."""
    count, vocabulary = len(lengths), GEOMETRIES[geometry]().vocab_size
    grouped = list(ResumableSampler(count, 0, lambda: 0, lengths, size))
    orders = {
        f"padded to {width}": (range(count), width),
        "padded to the longest": (range(count), None),
        "length groups": (grouped, None),
    }

    def batches(order: Sequence[int], fixed: int | None) -> list[dict[str, torch.Tensor]]:
        parts = [
            [lengths[i] for i in order[first : first + size]] for first in range(0, count, size)
        ]
        return [batch(part, fixed or max(part), vocabulary) for part in parts]

    def contender(order: Sequence[int], fixed: int | None) -> Variant:
        model = _unipelt(backbone(geometry, dtype, device), FLAT)
        return _contender(model, _training_step(model, batches(order, fixed), device, dtype=dtype))

    return {name: contender(*how) for name, how in orders.items()}


# name → (what is trained, frozen weights, gradient checkpointing)
MEMORY = {
    "full fine-tuning": ("all", "none", False),
    "full fine-tuning, checkpointing": ("all", "none", True),
    "floor": ("head", "none", False),
    "APL": ("APL", "none", False),
    "APL, checkpointing": ("APL", "none", True),
    "APL, 8 bit": ("APL", "8bit", False),
    "APL, 8 bit, checkpointing": ("APL", "8bit", True),
}
TRAINED: dict[str, Callable[[PreTrainedModel], nn.Module]] = {
    "all": lambda base: base,
    "head": _floor,
    "APL": lambda base: _unipelt(base, {}),
}


def memory(
    name: str,
    geometry: str,
    given: dict[str, torch.Tensor],
    device: str,
    dtype: torch.dtype = torch.float32,
) -> dict[str, int]:
    """Bytes of one of MEMORY: `rest` between steps (weights, optimizer), `peak` during the second step. In a process of its own."""
    trained, quantization, checkpointing = MEMORY[name]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        if quantization == "none":
            base = backbone(geometry, torch.float32 if trained == "all" else dtype, device)
        else:  # quantised while they are loaded
            saved = backbone(geometry)
            saved.save_pretrained(folder)
            settings = ModelSettings(name=folder, quantization=quantization)
            base, _ = load_model(
                settings, saved.config, model_class(geometry), dtype, torch.device(device)
            )
            del saved
    model = TRAINED[trained](base)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    contender = _contender(model, _training_step(model, [given], device, dtype=dtype))
    contender.step()
    if device == "cuda":
        rest = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        contender.step()
        peak = torch.cuda.max_memory_allocated()
    else:
        rest = live_bytes()
        peak = rest + allocated_peak(contender.step)
    return {"rest": rest, "peak": peak, "trained": contender.trained}
