"""UniPELT as a PEFT method; depends on nothing else in scaleup except errors.

Importing this package registers the method UNIPELT with PEFT.
"""

from scaleup.unipelt.config import UniPeltConfig
from scaleup.unipelt.model import UniPeltModel, parameter_counts

__all__ = ["UniPeltConfig", "UniPeltModel", "parameter_counts"]
