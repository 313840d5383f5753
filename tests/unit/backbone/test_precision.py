"""Which types a run takes, from its config and the device."""

import pytest
import torch
from torch import nn

from scaleup.backbone import precision
from scaleup.settings.schema import Settings

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def settings(**sections) -> Settings:
    return Settings.model_validate(
        {"model": {"name": "x"}, "data": {"name": "rte"}, "train": {"output_dir": "x"}} | sections
    )


@pytest.mark.parametrize(
    "train, has_bf16, half",
    [
        ({}, True, BF16),
        ({}, False, None),
        ({"bf16": False}, True, None),
        ({"bf16": True}, False, BF16),
        ({"fp16": True, "bf16": False}, True, FP16),
        ({"fp16": True}, True, FP16),
    ],
)
def test_mixed_precision_follows_the_config_and_auto_the_device(train, has_bf16, half):
    assert precision.half_dtype(settings(train={"output_dir": "x"} | train), has_bf16) is half


def test_auto_asks_for_hardware_that_computes_in_bfloat16(monkeypatch):
    """torch emulates bfloat16 on GPUs without it, and says then that it is supported."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    gpu = torch.device("cuda", 0)
    assert precision.device_half_dtype(settings(), gpu) is None
    assert precision.device_half_dtype(settings(train={"bf16": True}), gpu) is BF16


@pytest.mark.parametrize(
    "model, method, half, frozen",
    [
        ("auto", "unipelt", BF16, BF16),
        ("auto", "unipelt", None, FP32),
        ("auto", "unipelt", FP16, FP32),
        ("auto", "full", BF16, FP32),
        ("auto", "bitfit", BF16, FP32),
        ("bfloat16", "unipelt", None, BF16),
    ],
)
def test_a_frozen_backbone_is_stored_in_bfloat16_where_bfloat16_computes(
    model, method, half, frozen
):
    chosen = settings(model={"name": "x", "dtype": model}, method={"name": method})
    assert precision.backbone_dtype(chosen, half) is frozen


def test_only_what_trains_is_cast():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    precision.cast_trained(model, BF16)
    assert (model[0].weight.dtype, model[1].weight.dtype) == (BF16, FP32)


@pytest.mark.parametrize(
    "method, half, refused",
    [("full", FP16, True), ("bitfit", None, True), ("unipelt", FP16, False)],
)
def test_float16_weights_cannot_train(method, half, refused):
    assert (
        bool(
            precision.problems(
                settings(model={"name": "x", "dtype": "float16"}, method={"name": method}), half
            )
        )
        == refused
    )


@pytest.mark.parametrize(
    "dtype, half, refused",
    [
        ("bfloat16", None, True),
        ("bfloat16", BF16, False),
        ("float32", BF16, False),
        ("float16", BF16, True),
        ("auto", BF16, False),
    ],
)
def test_deepspeed_refuses_a_backbone_in_another_half_precision(dtype, half, refused):
    chosen = settings(
        model={"name": "x", "dtype": dtype}, train={"output_dir": "x", "deepspeed": "zero2"}
    )
    assert bool(precision.problems(chosen, half)) == refused
