"""Check that the packages and tools that a run needs are installed."""

import importlib.util
import pathlib
import shutil
import tomllib
from importlib import metadata

import torch
from packaging.requirements import Requirement

from scaleup.errors import one_line
from scaleup.settings.schema import Settings


def _requirements() -> list[Requirement]:
    """Return what this package requires, without its optional extras."""
    try:
        lines = metadata.requires("scaleup") or []
    except metadata.PackageNotFoundError:  # a source tree that is not installed
        project = pathlib.Path(__file__).parents[2] / "pyproject.toml"
        lines = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    requirements = map(Requirement, lines)
    return [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


def _unmet(requirement: Requirement) -> str | None:
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is missing"
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return f"{requirement.name} {version} instead of {requirement.specifier}"


def unmet_requirements() -> list[str]:
    """Return which required packages are missing or have another version than required."""
    return [problem for problem in map(_unmet, _requirements()) if problem is not None]


def _deepspeed() -> str:
    """Return whether DeepSpeed imports and whether its CPU operations can be built."""
    try:
        import deepspeed  # slow, and optional
    except (ImportError, OSError, RuntimeError) as error:
        state = f"cannot be imported ({one_line(error, 120)})"
    else:
        state = f"{deepspeed.__version__} imports"
    missing = [name for name in ("g++", "ninja") if shutil.which(name) is None]
    if missing:
        return f"{state}; {' and '.join(missing)} missing: its CPU operations cannot be built"
    return f"{state}; g++ and ninja found for its CPU operations"


def check_requirements(settings: Settings, world: int) -> list[str]:
    """Return one line each on packages, DeepSpeed, bitsandbytes and processes."""
    count, unmet = len(_requirements()), unmet_requirements()
    met = f"{count - len(unmet)} of {count} as required"
    lines = [f"packages   {'; '.join([met, *unmet])}"]
    needed = "; this config needs it"
    if importlib.util.find_spec("deepspeed") is not None:
        lines.append(f"deepspeed  {_deepspeed()}")
    else:
        lines.append(f"deepspeed  is not installed{needed * bool(settings.train.deepspeed)}")
    if settings.model.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        lines.append(f"bitsandbytes is not installed{needed}")
    gpus = torch.cuda.device_count()
    machine = f"{gpus or 'no'} GPU{'s' * (gpus != 1)}"
    lines.append(f"processes  {world} planned; this machine has {machine}")
    return lines
