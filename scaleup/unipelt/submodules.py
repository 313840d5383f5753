"""The list of submodules. Its order is the order in which gates of one site are stored."""

from typing import Any

from .adapter import Adapter
from .lora import Lora
from .parallel_adapter import ParallelAdapter
from .prefix import PrefixSubmodule
from .submodule import Submodule

SUBMODULES: dict[str, Submodule] = {
    submodule.name: submodule
    for submodule in (Adapter(), PrefixSubmodule(), Lora(), ParallelAdapter())
}


def register(submodule: Submodule) -> None:
    """Add a submodule that is defined outside of this package, in every process that uses it.

    Its parameters of construction are its settings: the config of UniPELT has no fields for it.

    Raises:
        ValueError: if its name is taken.
    """
    if submodule.name in SUBMODULES:
        raise ValueError(f"a submodule named {submodule.name} exists already; choose another name")
    SUBMODULES[submodule.name] = submodule


def chosen(config: Any) -> list[Submodule]:
    """Return the submodules that a config asks for, in the order of the list."""
    return [submodule for name, submodule in SUBMODULES.items() if name in config.submodules]
