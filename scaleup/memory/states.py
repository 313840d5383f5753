"""What weights, gradients and optimizer states take on one process, by ZeRO stage and kind of frozen weights. No GPU, no data.

Where each term comes from (torch 2.13, transformers 5.17, DeepSpeed 0.19.8; W processes, N trained parameters):

- plain (one process, DDP): AdamW keeps two moments in the parameter's type. DDP copies gradients into buckets, N again.
- DeepSpeed with bf16 or fp16 turns every floating parameter into that type, frozen ones too (engine, `_cast_module_mixed_precision`).
- ZeRO-1, 2: trained parameters lie in flat buffers, whole on every process. Each keeps float32 masters of its share (a clone,
  even of float32 parameters) and two float32 moments. Gradients: ZeRO-1 keeps all of them until the step, ZeRO-2 its share
  and the largest single one, which is reduced whole; both write the share once more, in float32, for the optimizer. ZeRO-3 has
  the larger of the two.
- ZeRO-3: every parameter is cut in W shares. Those with at most `stage3_param_persistence_threshold` elements (10 × hidden size
  under "auto") are kept whole as well. Masters are clones here, too. Gradient shares have a flat buffer of their own.
- ZeRO-3 gathers a layer's weights before use and frees them if they are not needed again within `stage3_max_reuse_distance`
  elements (default 1e9): a backbone below half of that keeps all its weights from the forward to the backward pass.
"""

import dataclasses
import json
import math
import os

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from scaleup.backbone.method import empty_run_model
from scaleup.data import tasks
from scaleup.errors import ConfigError
from scaleup.settings.schema import Settings

MASTER, MOMENTS = 4, 8  # bytes per trained parameter: float32 copy, two float32 moments
HALF = (torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Zero:
    """What of a DeepSpeed config decides memory; sizes in elements. stage 0: no DeepSpeed."""

    stage: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int = 0
    prefetch: int = 0
    persistence: int = 0
    reuse_distance: int = 10**9


@dataclasses.dataclass(frozen=True)
class Piece:
    """One frozen tensor. size: bytes per element. shared: ZeRO-3 cuts it in shares. reused: the backward pass reads it again."""

    numel: int
    size: int
    shared: bool = True
    reused: bool = True

    @property
    def bytes(self) -> int:
        return self.numel * self.size


@dataclasses.dataclass(frozen=True)
class States:
    """Bytes of one process. gradients: the most that are alive at once. buffers: DDP's and ZeRO's own. gathered: weights that ZeRO-3
    holds whole in a step. host: CPU memory of what is offloaded. load: the most while loading, on the device or in CPU memory."""

    backbone: int
    trained: int
    gradients: int
    optimizer: int
    buffers: int
    gathered: int
    host: int
    load: int

    @property
    def resident(self) -> int:
        """What is there all the time, between steps too."""
        return self.backbone + self.trained + self.optimizer + self.buffers


def read_zero(path: str | os.PathLike, hidden_size: int) -> Zero:
    """A DeepSpeed JSON file; "auto" as transformers fills it in. Raises ConfigError for what is no such file."""
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
        zero = config.get("zero_optimization", {})
        offload = {
            part: (zero.get(f"offload_{part}") or {}).get("device", "none") != "none"
            for part in ("optimizer", "param")
        }

        def number(key: str, automatic: int, default: int) -> int:
            value = zero.get(key, default)
            return automatic if value == "auto" else int(float(value))

        return Zero(
            stage=int(zero.get("stage", 0)),
            offload_optimizer=offload["optimizer"],
            offload_parameters=offload["param"],
            bucket=number("reduce_bucket_size", hidden_size**2, 500_000_000),
            prefetch=number("stage3_prefetch_bucket_size", int(0.9 * hidden_size**2), 50_000_000),
            persistence=number("stage3_param_persistence_threshold", 10 * hidden_size, 100_000),
            reuse_distance=number("stage3_max_reuse_distance", 10**9, 10**9),
        )
    except OSError as error:
        raise ConfigError(f"train.deepspeed: {path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"train.deepspeed: {path} is not a DeepSpeed config: {' '.join(str(error).split())[:200]}"
        ) from None


def frozen_pieces(
    model: nn.Module, quantization: str, dtype: torch.dtype | None = None
) -> list[Piece]:
    """The frozen tensors of an adapted model on the meta device as they are stored. dtype: what DeepSpeed turns floats into.

    8bit: a byte per weight and a float32 per output row. nf4: half a byte per weight and a float32 per block of 64
    (bitsandbytes' defaults, no double quantisation). Only linear layers of the backbone are quantised; the head, which
    trains, embeddings, output embeddings and norms are not.
    """
    output = {
        id(out.weight)
        for m in model.modules()
        if isinstance(m, PreTrainedModel) and (out := m.get_output_embeddings()) is not None
    }
    linear = {
        id(m.weight): m
        for m in model.modules()
        if type(m) is nn.Linear and not m.weight.requires_grad and id(m.weight) not in output
    }
    heads = {id(p) for name, p in model.named_parameters() if ".original_module." in name}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    pieces = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        numel, module = parameter.numel(), linear.get(id(parameter))
        if module is None or quantization == "none" or id(parameter) in heads:
            size = (
                dtype.itemsize
                if dtype is not None and parameter.is_floating_point()
                else parameter.element_size()
            )
            pieces.append(Piece(numel, size, reused=id(parameter) not in embeddings))
        elif quantization == "8bit":
            pieces += [Piece(numel, 1), Piece(module.out_features, 4)]
        else:
            pieces += [
                Piece(math.ceil(numel / 2), 1),
                Piece(math.ceil(numel / 64), 4, shared=False),
            ]
    return pieces + [
        Piece(b.numel(), b.element_size(), shared=False, reused=False) for b in model.buffers()
    ]


def _load_peak(
    model: nn.Module, pieces: list[Piece], quantization: str, zero: Zero, world: int
) -> int:
    """transformers fills a model weight by weight from mapped files: the whole backbone as it is stored, and when it quantises
    the largest weight unquantised besides. Under ZeRO-3 each process keeps its share, and one module at a time is whole.
    NF4 weights are loaded whole on every process and shared out afterwards."""
    largest = max(
        m.weight.numel() * m.weight.element_size()
        for m in model.modules()
        if isinstance(m, (nn.Linear, nn.Embedding))
    )
    if zero.stage == 3 and quantization != "nf4":
        return (
            sum(math.ceil(p.numel / (world if p.shared else 1)) * p.size for p in pieces) + largest
        )
    return sum(p.bytes for p in pieces) + (largest if quantization != "none" else 0)


def states(
    model: nn.Module, quantization: str, zero: Zero, world: int, half: torch.dtype | None
) -> States:
    """The bytes of one process for an adapted model on the meta device. half: DeepSpeed's bf16 or fp16, None without."""
    pieces = frozen_pieces(model, quantization, half)
    trained = [p for p in model.parameters() if p.requires_grad]
    size = half.itemsize if half is not None else max(p.element_size() for p in trained)
    count, largest = sum(p.numel() for p in trained), max(p.numel() for p in trained)
    share = math.ceil(count / world)
    load = _load_peak(model, pieces, quantization, zero, world)
    backbone = sum(p.bytes for p in pieces)
    if zero.stage == 0:
        buckets = count * size if world > 1 else 0
        return States(backbone, count * size, count * size, 2 * count * size, buckets, 0, 0, load)
    optimizer = share * (MASTER + MOMENTS)
    if zero.stage < 3:
        reduced = count if zero.stage == 1 else share + largest
        on_host = optimizer + share * MASTER if zero.offload_optimizer else 0
        # Buckets are made in the backward pass and freed after it, so they belong to the gradients.
        gradients = reduced * size + share * MASTER + 2 * min(zero.bucket, count) * size
        return States(
            backbone, count * size, gradients, 0 if on_host else optimizer, 0, 0, on_host, load
        )
    everything = [*pieces, *(Piece(p.numel(), size) for p in trained)]
    persistent = sum(p.bytes for p in everything if p.shared and p.numel <= zero.persistence)
    frozen_share = sum(math.ceil(p.numel / world) * p.size for p in pieces if p.shared)
    whole = sum(p.bytes for p in pieces if not p.shared)
    buffers = persistent + zero.bucket * size
    flat = share * size
    on_host = optimizer + flat + share * MASTER if zero.offload_optimizer else 0
    on_host += frozen_share + share * size if zero.offload_parameters else 0
    return States(
        backbone=whole + (0 if zero.offload_parameters else frozen_share),
        trained=0 if zero.offload_parameters else share * size,
        gradients=max(largest * size, 0 if zero.offload_optimizer else share * MASTER),
        optimizer=0 if zero.offload_optimizer else optimizer,
        buffers=buffers + (0 if zero.offload_optimizer else flat),
        gathered=gathered(everything, zero),
        host=on_host,
        load=load,
    )


def estimate(
    settings: Settings,
    config: PretrainedConfig,
    dtype: torch.dtype,
    deepspeed: str | None,
    world: int,
    half: torch.dtype | None,
) -> States:
    """The states of the run that is about to start, from a model on the meta device. deepspeed: the JSON file, None without."""
    with torch.random.fork_rng(
        devices=[]
    ):  # making the additions draws random numbers, and the run's are not to change
        model = empty_run_model(settings, config, tasks.of(settings.data).auto, dtype)
    zero = Zero() if deepspeed is None else read_zero(deepspeed, config.hidden_size)
    return states(model, settings.model.quantization, zero, world, half)


def gathered(pieces: list[Piece], zero: Zero) -> int:
    """Bytes of the weights that ZeRO-3 holds whole when the backward pass begins: all that it will read again within the reuse
    distance. Forward and backward lie mirrored around that moment, so it counts half. At least the largest weight."""
    moving = [p for p in pieces if p.shared and p.numel > zero.persistence]
    again = [p for p in moving if p.reused]
    elements, size = sum(p.numel for p in again), sum(p.bytes for p in again)
    within = zero.reuse_distance / 2 + zero.prefetch
    kept = size if elements <= within else int(size * within / elements)
    return max(kept, max((p.bytes for p in moving), default=0))
