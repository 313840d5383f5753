"""Register UNIPELT with PEFT in either order of the two imports, without importing PEFT.

If PEFT has been imported, `register` registers at once. Otherwise a finder on `sys.meta_path` waits
for PEFT: it leaves the search to the other finders and only makes the loader that they return
import `scaleup.unipelt` after it has executed PEFT.
"""

import importlib
import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTERS = "scaleup.unipelt"  # importing this package registers UNIPELT


class _PeftFinder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return PEFT's own spec, whose loader then also registers; loads nothing."""
        if name != "peft":
            return None
        finders = (finder for finder in sys.meta_path if not isinstance(finder, _PeftFinder))
        specs = (finder.find_spec(name, path, target) for finder in finders)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                # If scaleup.unipelt is what imports PEFT, it registers when its import goes on.
                if REGISTERS not in sys.modules:
                    importlib.import_module(REGISTERS)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register UNIPELT now if PEFT is imported already, else as soon as it is."""
    if "peft" in sys.modules:
        importlib.import_module(REGISTERS)
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())
