"""The command line: `scaleup train | plan | doctor | export | sweep | report | bench | schema`.

Each command is one module with a `configure(parser)` and a `run(options)`. The modules import
nothing slow at the top, so that `scaleup --help` answers at once.
"""

from scaleup.cli.entry import main

__all__ = ["main"]
