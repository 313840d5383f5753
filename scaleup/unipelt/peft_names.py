"""The names of PEFT that submodules build on.

The files of this package also run inside exported folders, where PEFT need not be installed. There
the names below are empty classes: nothing is an instance of them, and the code that needs PEFT is
never reached.
"""

try:
    from peft import PrefixEncoder, PrefixTuningConfig
    from peft.tuners.lora.layer import LoraLayer, LoraVariant
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper
except ImportError:
    AuxiliaryTrainingWrapper = type("AuxiliaryTrainingWrapper", (), {})
    BaseTunerLayer = type("BaseTunerLayer", (), {})
    LoraLayer = type("LoraLayer", (), {})
    LoraVariant = type("LoraVariant", (), {})
    PrefixEncoder = type("PrefixEncoder", (), {})
    PrefixTuningConfig = type("PrefixTuningConfig", (), {})

__all__ = [
    "AuxiliaryTrainingWrapper",
    "BaseTunerLayer",
    "LoraLayer",
    "LoraVariant",
    "PrefixEncoder",
    "PrefixTuningConfig",
]
