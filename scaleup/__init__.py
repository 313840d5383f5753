"""UniPELT (Mao et al., ACL 2022) as a scale-out toolkit on PEFT, Accelerate and DeepSpeed.

Importing this package registers the PEFT method UNIPELT.

The import law: a package may import only packages to its right.

    cli > experiments > export > training > memory > data > backbone > settings > unipelt

`errors` and `io` may be imported by all of them, except that `unipelt` imports only `errors`, so that
a PEFT user can read and use that folder alone. `make check` enforces the law (import-linter).
"""

from scaleup.unipelt.config import UniPeltConfig
from scaleup.unipelt.model import UniPeltModel, parameter_counts

__all__ = ["UniPeltConfig", "UniPeltModel", "parameter_counts"]
__version__ = "0.1.0"
