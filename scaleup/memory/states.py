"""Predict what weights, gradients and optimizer states need on one process, without GPU or data.

The rules, as of torch 2.13, transformers 5.17 and DeepSpeed 0.19.8, for W processes and N trained
parameters:

- One process or DDP: AdamW keeps two moments in the parameter's type. DDP copies gradients into
  buckets, which hold N again.
- DeepSpeed with bf16 or fp16 converts every floating parameter to that type, frozen ones too.
- ZeRO-1 and ZeRO-2: trained parameters lie in flat buffers, complete on every process. Each process
  keeps float32 masters of its share (a copy even of float32 parameters) and two float32 moments.
  ZeRO-1 keeps all gradients until the step; ZeRO-2 keeps its share and the largest single gradient,
  which is reduced as a whole. Both write the share once more, in float32, for the optimizer. ZeRO-3
  needs the larger of these two.
- ZeRO-3: every parameter is cut into W shares. Parameters with at most
  `stage3_param_persistence_threshold` elements ("auto": 10 × hidden size) are also kept whole.
  Masters are copies here, too. Gradient shares have a flat buffer of their own.
- ZeRO-3 gathers a layer's weights before use and frees them if they are not needed again within
  `stage3_max_reuse_distance` elements (default 1e9). A backbone smaller than half of that keeps all
  its weights from the forward to the backward pass.
- hpZ: the processes of a host share a second copy of what is not kept whole, made in the first
  step.
- FSDP: frozen matrices are cut into shares; vectors, the head and what is trained are whole. The
  weights of the root unit stay gathered in a step. Beside them, the backward pass holds those of a
  block and of the next one.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from scaleup.backbone.fsdp import units
from scaleup.backbone.method import empty_run_model
from scaleup.backbone.precision import backbone_dtype
from scaleup.data import tasks
from scaleup.errors import ConfigError, one_line
from scaleup.settings.presets import HPZ, read_deepspeed
from scaleup.settings.schema import Settings

MASTER, MOMENTS = 4, 8  # bytes per trained parameter: float32 copy, two float32 moments


@dataclasses.dataclass(frozen=True)
class Zero:
    """What of a DeepSpeed config decides memory. Sizes are in elements. Stage 0: no DeepSpeed."""

    stage: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int = 0
    prefetch: int = 0
    persistence: int = 0
    reuse_distance: int = 10**9
    hpz: int = 1  # processes that share a second copy of the weights


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor."""

    numel: int
    size: int  # bytes per element
    shared: bool = True  # ZeRO-3 cuts it into shares
    reused: bool = True  # the backward pass reads it again
    key: int = 0  # the id of the parameter; buffers have none

    @property
    def bytes(self) -> int:
        return self.numel * self.size


@dataclasses.dataclass(frozen=True)
class States:
    """Bytes of one process."""

    backbone: int
    trained: int
    gradients: int  # the most alive at once
    optimizer: int
    buffers: int  # of DDP and ZeRO
    gathered: int  # weights that ZeRO-3 or FSDP holds whole in a step
    host: int  # CPU memory of what is offloaded
    load: int  # the most while loading, on the device or in CPU memory
    moved: int  # that ZeRO-3 or FSDP gathers in the passes over one batch
    checkpoint: int  # on disk, for resuming; of all processes together
    first: int = 0  # what FSDP gathers beside `gathered` before there are activations

    @property
    def resident(self) -> int:
        """What is allocated all the time, between steps too."""
        return self.backbone + self.trained + self.optimizer + self.buffers


def read_zero(name: str, hidden_size: int, per_host: int = 1) -> Zero:
    """Read a DeepSpeed preset or JSON file, with "auto" resolved as transformers does.

    Args:
        per_host: processes on each host.
    """
    zero = read_deepspeed(name, per_host).get("zero_optimization", {})
    try:

        def offloads(part: str) -> bool:
            return (zero.get(f"offload_{part}") or {}).get("device", "none") != "none"

        def number(key: str, automatic: int, default: int) -> int:
            value = zero.get(key, default)
            return automatic if value == "auto" else int(float(value))

        return Zero(
            stage=int(zero.get("stage", 0)),
            offload_optimizer=offloads("optimizer"),
            offload_parameters=offloads("param"),
            bucket=number("reduce_bucket_size", hidden_size**2, 500_000_000),
            prefetch=number("stage3_prefetch_bucket_size", int(0.9 * hidden_size**2), 50_000_000),
            persistence=number("stage3_param_persistence_threshold", 10 * hidden_size, 100_000),
            reuse_distance=number("stage3_max_reuse_distance", 10**9, 10**9),
            hpz=number(HPZ, per_host, 1),
        )
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        reason = one_line(error, 200)
        raise ConfigError(f"train.deepspeed: {name} is not a DeepSpeed config: {reason}") from None


def frozen_pieces(
    model: nn.Module, quantization: str, dtype: torch.dtype | None = None
) -> list[Piece]:
    """Return the frozen tensors of an adapted model on the meta device as they are stored.

    Int8 weights need a byte per weight and a float32 per output row; NF4 weights half a byte per
    weight and a float32 per block of 64 (bitsandbytes' defaults, without double quantisation). Only
    linear layers of the backbone are quantised, but not the head and the output embeddings.

    Args:
        dtype: the type to which DeepSpeed converts floating parameters.
    """
    modules = list(model.modules())
    outputs = [m.get_output_embeddings() for m in modules if isinstance(m, PreTrainedModel)]
    whole = {id(output.weight) for output in outputs if output is not None}
    heads = (".original_module.", ".modules_to_save.")
    whole |= {id(p) for n, p in model.named_parameters() if any(head in n for head in heads)}
    linear = {id(m.weight): m for m in modules if type(m) is nn.Linear}
    embeddings = {id(m.weight) for m in modules if isinstance(m, nn.Embedding)}
    pieces = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        numel, key = parameter.numel(), id(parameter)
        if quantization == "none" or key not in linear or key in whole:
            stored = dtype if dtype is not None and parameter.is_floating_point() else None
            size = (stored or parameter.dtype).itemsize
            pieces.append(Piece(numel, size, reused=key not in embeddings, key=key))
        elif quantization == "8bit":
            pieces += [Piece(numel, 1, key=key), Piece(linear[key].out_features, 4, key=key)]
        else:
            scales = Piece(math.ceil(numel / 64), 4, shared=False)
            pieces += [Piece(math.ceil(numel / 2), 1), scales]
    buffers = [Piece(b.numel(), b.element_size(), False, False) for b in model.buffers()]
    return pieces + buffers


def _load_peak(
    model: nn.Module, pieces: list[Piece], quantization: str, zero: Zero, world: int
) -> int:
    """Return the most bytes while loading.

    transformers fills a model weight by weight from mapped files. It holds the backbone as it is
    stored and, if it quantises, the largest weight unquantised. Under ZeRO-3 each process keeps its
    share, and one module at a time is whole. NF4 weights are loaded completely on every process and
    sharded afterwards.
    """
    largest = max(
        m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)
    )
    if zero.stage == 3 and quantization != "nf4":
        shares = (math.ceil(p.numel / (world if p.shared else 1)) * p.size for p in pieces)
        return sum(shares) + largest
    return sum(p.bytes for p in pieces) + (largest if quantization != "none" else 0)


def states(
    model: nn.Module, quantization: str, zero: Zero, world: int, half: torch.dtype | None
) -> States:
    """Return the bytes of each of `world` processes for an adapted model on the meta device.

    Args:
        quantization: how frozen weights are stored: "none", "8bit" or "nf4".
        half: DeepSpeed's bf16 or fp16; None without.
    """
    pieces = frozen_pieces(model, quantization, half)
    trained = [p for p in model.parameters() if p.requires_grad]
    size = half.itemsize if half is not None else max(p.element_size() for p in trained)
    count, largest = sum(p.numel() for p in trained), max(p.numel() for p in trained)
    share = math.ceil(count / world)
    optimizer, masters = share * (MASTER + MOMENTS), share * MASTER
    common = States(
        backbone=sum(p.bytes for p in pieces),
        trained=count * size,
        gradients=count * size,
        optimizer=2 * count * size,
        buffers=count * size if world > 1 else 0,
        gathered=0,
        host=0,
        load=_load_peak(model, pieces, quantization, zero, world),
        moved=0,
        checkpoint=3 * count * size,  # the weights and their two moments
    )
    if zero.stage == 0:
        return common
    # Masters are stored where the weights are not float32 themselves.
    stored = size + MOMENTS + (MASTER if size < MASTER else 0)
    common = dataclasses.replace(common, checkpoint=count * stored)
    offload = zero.offload_optimizer
    if zero.stage < 3:
        reduced = count if zero.stage == 1 else share + largest
        # Buckets are made in the backward pass and freed after it, so they belong to the gradients.
        buckets = 2 * min(zero.bucket, count) * size
        return dataclasses.replace(
            common,
            gradients=reduced * size + masters + buckets,
            optimizer=0 if offload else optimizer,
            buffers=0,
            host=optimizer + masters if offload else 0,
        )
    everything = [*pieces, *(Piece(p.numel(), size) for p in trained)]
    persistent = sum(p.bytes for p in everything if p.shared and p.numel <= zero.persistence)
    frozen_share = sum(math.ceil(p.numel / world) * p.size for p in pieces if p.shared)
    unshared = sum(p.bytes for p in pieces if not p.shared)
    if zero.hpz > 1:
        unshared += sum(
            math.ceil(p.numel / zero.hpz) * p.size
            for p in everything
            if p.shared and p.numel > zero.persistence
        )
    flat_gradients = share * size
    host = optimizer + flat_gradients + masters if offload else 0
    if zero.offload_parameters:
        host += frozen_share + share * size
    return dataclasses.replace(
        common,
        backbone=unshared + (0 if zero.offload_parameters else frozen_share),
        trained=0 if zero.offload_parameters else share * size,
        gradients=max(largest * size, 0 if offload else masters),
        optimizer=0 if offload else optimizer,
        buffers=persistent + zero.bucket * size + (0 if offload else flat_gradients),
        gathered=gathered(everything, zero),
        host=host,
        moved=_moved(everything, zero),
    )


def gathered(pieces: Sequence[Piece], zero: Zero) -> int:
    """Return the bytes of the weights that ZeRO-3 holds whole when the backward pass begins.

    These are the weights that it reads again within the reuse distance, at least the largest one.
    The passes mirror each other around that moment, so half of the distance counts.
    """
    moving = _moving(pieces, zero)
    return max(_kept(moving, zero), max((p.bytes for p in moving), default=0))


def _moving(pieces: Sequence[Piece], zero: Zero) -> list[Piece]:
    """Return what ZeRO-3 gathers before use and frees afterwards."""
    return [p for p in pieces if p.shared and p.numel > zero.persistence]


def _kept(moving: Sequence[Piece], zero: Zero) -> int:
    """Return the bytes that stay whole from the forward to the backward pass."""
    again = [p for p in moving if p.reused]
    elements, size = sum(p.numel for p in again), sum(p.bytes for p in again)
    within = zero.reuse_distance / 2 + zero.prefetch
    return size if elements <= within else int(size * within / elements)


def _moved(pieces: Sequence[Piece], zero: Zero) -> int:
    """Return the bytes that ZeRO-3 gathers in a forward and a backward pass.

    The backward pass gathers again what it reads and what was not kept.
    """
    moving = _moving(pieces, zero)
    again = sum(p.bytes for p in moving if p.reused)
    return sum(p.bytes for p in moving) + again - _kept(moving, zero)


def fsdp_states(model: nn.Module, quantization: str, world: int, shards: int) -> States:
    """Return the bytes of each of `world` processes if FSDP shards frozen weights.

    Args:
        model: an adapted model on the meta device.
        shards: number of processes that share the weights.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    heads = (".original_module.", ".modules_to_save.")
    whole = {
        id(p) for n, p in model.named_parameters() if p.dim() < 2 or any(h in n for h in heads)
    }
    parts = units(base)
    pieces = frozen_pieces(model, quantization)
    sharded = [p for p in pieces if p.key and p.key not in whole]
    keys = [{id(p) for p in part.parameters()} for part in parts]
    sizes = [sum(p.bytes for p in sharded if p.key in of_part) for of_part in keys]
    root = sum(p.bytes for p in sharded) - sum(sizes)
    is_embedding = [isinstance(part, nn.Embedding) for part in parts]
    blocks = [size for size, embedding in zip(sizes, is_embedding) if not embedding]
    block = max(blocks, default=0)
    backbone = sum(p.bytes for p in pieces) - sum(p.bytes for p in sharded)
    backbone += sum(math.ceil(p.numel / shards) * p.size for p in sharded)
    largest = max(math.ceil(p.numel / shards) * (p.size + 2) for p in sharded)
    return dataclasses.replace(
        states(model, quantization, Zero(), world, None),
        backbone=backbone,
        gathered=root + 2 * block,
        moved=root + sum(sizes) + sum(blocks),
        first=2 * (max(sizes, default=0) - block),
        load=backbone + largest,
    )


def estimate(
    settings: Settings,
    config: PretrainedConfig,
    world: int,
    half: torch.dtype | None,
    per_host: int = 1,
) -> States:
    """Return the states of a run that is about to start.

    Args:
        world: number of processes.
        per_host: processes on each host.
        half: data type of mixed precision; None for float32.
    """
    dtype, quantization = backbone_dtype(settings, half), settings.model.quantization
    # Making the model draws random numbers, which must not change those of the run.
    with torch.random.fork_rng(devices=[]):
        model = empty_run_model(settings, config, tasks.of(settings.data).auto, dtype)
    if settings.train.fsdp is not None:
        shards = world if settings.train.fsdp == "full" else per_host
        return fsdp_states(model, quantization, world, shards)
    if settings.train.deepspeed is None:
        return states(model, quantization, Zero(), world, None)
    zero = read_zero(settings.train.deepspeed, config.hidden_size, per_host)
    return states(model, quantization, zero, world, half)
