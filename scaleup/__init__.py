"""UniPELT (Mao et al., ACL 2022) as a scale-out toolkit on PEFT, Accelerate and DeepSpeed.

Importing it registers the PEFT method UNIPELT.
"""

from scaleup.unipelt import UniPeltConfig, UniPeltModel, parameter_counts

__all__ = ["UniPeltConfig", "UniPeltModel", "parameter_counts"]
__version__ = "0.1.0"
