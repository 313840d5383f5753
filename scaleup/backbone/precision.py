"""Which type a run computes in, and which one its frozen weights are stored in. A run and the plan for it decide here."""

import torch
from torch import nn

from scaleup.settings.schema import Settings


def half_dtype(settings: Settings, has_bf16: bool) -> torch.dtype | None:
    """The type of mixed precision, None for float32. `train.bf16: auto` is bfloat16 where the device computes in it (`has_bf16`)."""
    train = settings.train
    if train.fp16:
        return torch.float16
    return torch.bfloat16 if (has_bf16 if train.bf16 == "auto" else train.bf16) else None


def backbone_dtype(settings: Settings, half: torch.dtype | None) -> torch.dtype:
    """Storage type of the backbone. auto: bfloat16 with bf16 training of a frozen backbone, else float32."""
    if settings.model.dtype != "auto":
        return getattr(torch, settings.model.dtype)
    return (
        torch.bfloat16
        if half is torch.bfloat16 and settings.method.name == "unipelt"
        else torch.float32
    )


def cast_trained(model: nn.Module, dtype: torch.dtype) -> None:
    """DeepSpeed keeps float32 masters itself and wants one type, that of mixed precision, among what it trains."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def problems(settings: Settings, half: torch.dtype | None) -> list[str]:
    """DeepSpeed computes in one type; a backbone stored in another would meet it in the middle of the model."""
    computes = str(half or torch.float32).removeprefix("torch.")
    if (
        settings.train.deepspeed is None
        and settings.model.dtype == "float16"
        and settings.method.name != "unipelt"
    ):
        return [
            "model.dtype: weights that train cannot be float16; leave it out (train.fp16=true computes in float16 all the same)"
        ]
    if settings.train.deepspeed is None or settings.model.dtype in ("auto", "float32", computes):
        return []
    switch = "train.bf16=true" if settings.model.dtype == "bfloat16" else "train.fp16=true"
    return [
        f"model.dtype: {settings.model.dtype} weights under DeepSpeed need {switch}, or leave model.dtype out"
    ]
