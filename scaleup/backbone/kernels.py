"""The line about kernels in the header of a run and in a memory plan."""

from torch import nn

from scaleup.backbone.precision import half_dtype
from scaleup.errors import ConfigError
from scaleup.settings.presets import zero_stage
from scaleup.settings.schema import Settings
from scaleup.unipelt.fast_path import plain_parts
from scaleup.unipelt.kernels.target import HAS_TRITON, mode


def check_kernels() -> None:
    """Check the environment variable SCALEUP_KERNELS.

    Raises:
        ConfigError: for an unknown value.
    """
    try:
        mode()
    except ValueError as error:
        raise ConfigError(str(error)) from None


def kernels_line(settings: Settings, model: nn.Module, device: str, planned: bool) -> str | None:
    """Say which kernels a run uses, and why parts of the model use plain PyTorch.

    Args:
        settings: the settings of the run.
        model: the model with its adapter.
        device: "cuda" or "cpu".
        planned: whether the run is only planned, so that this machine does not matter.

    Returns:
        None for methods without kernels, and on a CPU unless SCALEUP_KERNELS is set.
    """
    if settings.method.name != "unipelt" or (device == "cpu" and mode() == "auto"):
        return None
    if mode() == "off":
        return "kernels    plain PyTorch (SCALEUP_KERNELS=off)"
    if mode() == "auto" and not planned and not HAS_TRITON:
        return "kernels    plain PyTorch (triton is not installed)"
    reasons = _of_settings(settings, device)
    reasons += [reason for reason in plain_parts(model) if reason not in reasons]
    name = "Triton"
    if mode() == "reference":
        name = "the GPU's path in plain formulas (SCALEUP_KERNELS=reference)"
    exceptions = f"; parts in plain PyTorch, because {'; '.join(reasons)}" if reasons else ""
    return f"kernels    {name}{exceptions}"


def _of_settings(settings: Settings, device: str) -> list[str]:
    """Return the reasons that the model does not show."""
    reasons, dtype = [], settings.model.dtype
    if dtype not in ("auto", "float32") and half_dtype(settings, device == "cuda") is None:
        reasons.append(f"trained weights are float32 beside a {dtype} backbone")
    if zero_stage(settings.train.deepspeed) == 3:
        reasons.append("ZeRO-3 shards the trained weights")
    if settings.train.torch_compile:
        reasons.append("torch.compile makes its own kernels")
    if settings.data.packing:
        reasons.append("packed rows average gates within each text")
    return reasons
