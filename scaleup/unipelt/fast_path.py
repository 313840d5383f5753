"""Why parts of a model do not take the fast path of `kernels/`."""

from torch import nn

from .attention import ATTENTION, models_with_own_config
from .kernels import collect_sites
from .layers import SiteLayer
from .prefix_bank import PrefixTuning


def plain_parts(model: nn.Module) -> list[str]:
    """Return the reasons why parts of a model with UniPELT take the plain path, in plain words."""
    modules = list(model.modules())
    reasons = collect_sites(m for m in modules if isinstance(m, SiteLayer))[1]
    if any(isinstance(m, PrefixTuning) for m in modules) and any(
        part.config._attn_implementation == ATTENTION["eager"]
        for part in models_with_own_config(model)
    ):
        reasons.append("eager attention takes no prefix in a kernel")
    if any(isinstance(m, PrefixTuning) and m.relative is not None for m in modules):
        reasons.append("the position bias of attentions counts the prefix")
    if any(m.head_size % 8 for m in modules if isinstance(m, PrefixTuning)):
        reasons.append("the size of attention heads is not a multiple of 8")
    return reasons
