"""The line about kernels names what a run uses, and why parts of it use plain PyTorch."""

from types import SimpleNamespace

import pytest

from scaleup.backbone import kernels
from scaleup.backbone.kernels import check_kernels, kernels_line
from scaleup.errors import ConfigError
from scaleup.unipelt.kernels.target import VARIABLE, mode
from tests.utils.tiny import adapt, backbone


def line(
    model=None, device="cuda", planned=True, packing=False, method="unipelt", dtype="auto", **train
):
    train = {"deepspeed": None, "torch_compile": False, "bf16": "auto", "fp16": False} | train
    settings = SimpleNamespace(
        model=SimpleNamespace(dtype=dtype),
        method=SimpleNamespace(name=method),
        train=SimpleNamespace(**train),
        data=SimpleNamespace(packing=packing),
    )
    return kernels_line(settings, model or adapt(backbone("bert")), device, planned)


def test_a_model_without_exceptions():
    assert line() == "kernels    Triton"
    assert line(device="cpu") is None and line(method="bitfit") is None


@pytest.mark.parametrize(
    "family, attention, config, reason",
    [
        ("bert", "eager", {}, "eager attention takes no prefix"),
        ("bert", "sdpa", {"lora_dropout": 0.1}, "lora_dropout"),
        ("bert", "sdpa", {"gates": "none"}, "gates are constants"),
        ("bert", "sdpa", {"adapter_activation": "gelu_new"}, "no kernel for the activation gelu_"),
        ("mpnet", "eager", {}, "an attention computes its softmax itself"),
        (
            "deberta-v2",
            "eager",
            {"submodules": ["lora"], "gates": "learned"},
            "positions pass through",
        ),
    ],
)
def test_reasons_that_the_model_shows(family, attention, config, reason):
    found = line(adapt(backbone(family, attention), **config))
    assert (
        found.startswith("kernels    Triton; parts in plain PyTorch, because ") and reason in found
    )


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"deepspeed": "zero3"}, "ZeRO-3 shards the trained weights"),
        ({"torch_compile": True}, "torch.compile"),
        ({"packing": True}, "packed rows"),
        ({"deepspeed": "zero2"}, None),
        ({"dtype": "bfloat16", "bf16": False}, "float32 beside a bfloat16 backbone"),
        ({"dtype": "bfloat16"}, None),
    ],
)
def test_reasons_that_the_settings_show(settings, reason):
    found = line(**settings)
    assert found == "kernels    Triton" if reason is None else reason in found


def test_the_environment(monkeypatch):
    monkeypatch.setattr(kernels, "HAS_TRITON", False)
    assert line(planned=False) == "kernels    plain PyTorch (triton is not installed)"
    assert line() == "kernels    Triton"  # where the run will be, it may be installed
    monkeypatch.setenv(VARIABLE, "off")
    assert line() == line(device="cpu") == "kernels    plain PyTorch (SCALEUP_KERNELS=off)"
    monkeypatch.setenv(VARIABLE, "reference")
    assert line(device="cpu") == (
        "kernels    the GPU's path in plain formulas (SCALEUP_KERNELS=reference)"
    )


def test_heads_that_no_kernel_takes():
    assert "the size of attention heads is not a multiple of 8" in line(
        adapt(backbone("bert", num_attention_heads=8))
    )


def test_an_unknown_value_is_a_problem_to_solve_and_an_empty_one_is_the_default(monkeypatch):
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ConfigError, match="SCALEUP_KERNELS must be one of auto, off, reference"):
        check_kernels()
    monkeypatch.setenv(VARIABLE, "")
    check_kernels()
    assert mode() == "auto"
