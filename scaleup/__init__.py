"""UniPELT (Mao et al., ACL 2022) as a scale-out toolkit on PEFT, Accelerate and DeepSpeed.

Importing this package makes PEFT know the method UNIPELT, in either order of the two imports. The
names below are imported when they are first used, so that `import scaleup` takes milliseconds:

    settings = scaleup.load_config("configs/quickstart.yaml", ["train.max_steps=20"])
    results = scaleup.train(settings)
    plan = scaleup.plan(settings, 16)
    report = scaleup.export("runs/mine/best", "exported", kind="standalone")

The import law: a package may import only packages to its right.

    cli > experiments > export > training > memory > data > backbone > settings > unipelt

`errors`, `io` and `machine` may be imported by all of them, except that `unipelt` imports only
`errors`, so that a PEFT user can read and use that folder alone. `make check` enforces the law
(import-linter).
"""

import importlib
from typing import TYPE_CHECKING, Any

from scaleup._registration import register

if TYPE_CHECKING:
    import scaleup.export as export
    from scaleup.memory.plan import make_plan as plan
    from scaleup.settings.schema import load as load_config
    from scaleup.training.run import run as train
    from scaleup.unipelt import UniPeltConfig, UniPeltModel, parameter_counts

__version__ = "0.1.0"
__all__ = [
    "UniPeltConfig",
    "UniPeltModel",
    "__version__",
    "export",
    "load_config",
    "parameter_counts",
    "plan",
    "train",
]

# Public name → module and the name of the object there.
_PUBLIC = {
    "UniPeltConfig": ("scaleup.unipelt", "UniPeltConfig"),
    "UniPeltModel": ("scaleup.unipelt", "UniPeltModel"),
    "parameter_counts": ("scaleup.unipelt", "parameter_counts"),
    "load_config": ("scaleup.settings.schema", "load"),
    "train": ("scaleup.training.run", "run"),
    "plan": ("scaleup.memory.plan", "make_plan"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name == "export":
        return importlib.import_module("scaleup.export")
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
