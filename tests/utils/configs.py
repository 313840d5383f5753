"""Helpers for tests of configs."""

import pathlib

import pytest

from scaleup.errors import ConfigError
from scaleup.settings.schema import load

GLUE = "data.name=rte"


def problems(*overrides: str, path: str | None = None) -> list[str]:
    """Return what a config that cannot be loaded is refused for."""
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return caught.value.problems


def write(folder: pathlib.Path, text: str) -> str:
    """Write a config file and return its path."""
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)
