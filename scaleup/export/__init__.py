"""Exports of trained runs. The package can be called: `scaleup.export(…)` makes an export."""

import importlib
import os
import pathlib
import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(
        self, checkpoint: str | os.PathLike[str], output: str | os.PathLike[str], **options: Any
    ) -> Any:
        """Export an adapter checkpoint as the folder `output`.

        Args:
            checkpoint: best/, final/ or checkpoint-N/ of a run.
            output: folder to write, which must not exist.
            options: other fields of `scaleup.export.report.ExportOptions`. The kind is exact by
                default.

        Returns:
            The ExportReport.
        """
        export = importlib.import_module("scaleup.export.export")
        paths = {"checkpoint": pathlib.Path(checkpoint), "output": pathlib.Path(output)}
        return export.run(export.ExportOptions(**{"kind": "exact"} | paths | options))


sys.modules[__name__].__class__ = _CallablePackage
