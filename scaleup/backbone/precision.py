"""Decide the data types of a run: what it computes in, and how weights are stored.

Runs and memory plans decide here and nowhere else.
"""

import torch
from torch import nn

from scaleup.settings.schema import Settings


def half_dtype(settings: Settings, has_bf16: bool) -> torch.dtype | None:
    """Return the data type of mixed precision, or None for float32.

    With `train.bf16: auto` it is bfloat16 if the device computes in it (`has_bf16`).
    """
    train = settings.train
    if train.fp16:
        return torch.float16
    return torch.bfloat16 if (has_bf16 if train.bf16 == "auto" else train.bf16) else None


def device_half_dtype(settings: Settings, device: torch.device) -> torch.dtype | None:
    """Return the data type of mixed precision on `device`, or None for float32."""
    return half_dtype(settings, computes_bf16(device))


def computes_bf16(device: torch.device) -> bool:
    """Return whether `device` is a GPU whose hardware computes in bfloat16.

    torch emulates it on older GPUs, which takes longer than float32 there.
    """
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def backbone_dtype(settings: Settings, half: torch.dtype | None) -> torch.dtype:
    """Return the storage type of the backbone.

    `model.dtype: auto` is bfloat16 if the backbone is frozen and the run computes in bfloat16, else
    float32.
    """
    if settings.model.dtype != "auto":
        return getattr(torch, settings.model.dtype)
    frozen = settings.method.name == "unipelt"
    return torch.bfloat16 if half is torch.bfloat16 and frozen else torch.float32


def trained_dtype(settings: Settings, half: torch.dtype | None) -> torch.dtype | None:
    """Return the storage type of trained parameters; None if they keep the backbone's type.

    DeepSpeed keeps float32 masters and needs the type of mixed precision. Otherwise the head must
    not stay in the type of a frozen backbone: in bfloat16, steps of 1e-4 are rounded away.
    """
    if half is None:
        return None
    if settings.train.deepspeed is not None:
        return half
    return torch.float32 if settings.method.name == "unipelt" else None


def cast_trained(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the trained parameters, and a frozen head that is saved with them, to `dtype`."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or ".modules_to_save." in name:
            parameter.data = parameter.data.to(dtype)


def problems(settings: Settings, half: torch.dtype | None) -> list[str]:
    """Return what is wrong with `model.dtype`. DeepSpeed cannot compute with two half types."""
    dtype, deepspeed = settings.model.dtype, settings.train.deepspeed is not None
    if settings.train.fsdp is not None and half is not None:
        if backbone_dtype(settings, half) is half:
            return []
        problem = f"with train.fsdp, autocast would keep whole copies of {dtype} weights"
        return [f"model.dtype: {problem}; leave it out"]
    if not deepspeed and dtype == "float16" and settings.method.name != "unipelt":
        advice = "leave it out (train.fp16=true computes in float16 all the same)"
        return [f"model.dtype: weights that train cannot be float16; {advice}"]
    computes = str(half or torch.float32).removeprefix("torch.")
    if not deepspeed or dtype in ("auto", "float32", computes):
        return []
    switch = "train.bf16=true" if dtype == "bfloat16" else "train.fp16=true"
    return [f"model.dtype: {dtype} weights under DeepSpeed need {switch}, or leave model.dtype out"]
