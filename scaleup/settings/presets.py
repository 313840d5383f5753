"""The DeepSpeed presets of this package."""

from importlib import resources

from scaleup.settings.rules import ZERO_PRESETS


def deepspeed_file(name: str | None) -> str | None:
    """Return the JSON file that `train.deepspeed` names: a preset of this package, or a path."""
    if name not in ZERO_PRESETS:
        return name
    return str(resources.files("scaleup.settings").joinpath("deepspeed", f"{name}.json"))
