"""Fused operations of UniPELT, and the choice between them and the plain formulas.

An exported folder is flat: this file becomes `kernels.py` there, beside the other files of this
folder. They therefore import only each other. A file that others import as a module (`ops`) is also
named in an import here, because transformers follows only imports of the form `from .file import`.
"""

from .fused import add_product, bottleneck, narrow_site
from .fused_attention import Visible, additive_mask, kernel_for
from .lse_attention import is_fast_on_cpu, lse_attention
from .narrow import add_gated, add_lora, few_rows, narrow_products, scaled
from .ops import LIBRARY
from .packed import (
    Entry,
    Narrow,
    PlainPath,
    Plan,
    Site,
    Sites,
    Wide,
    aligned,
    collect_sites,
    parameter,
    require_whole,
    state_of,
)
from .reference import ACTIVATIONS
from .short_attention import attend, is_short
from .step import Decoding, Means, StepSite, means_of_step
from .target import fast_path, mode, planned_for, target_device
from .workspace import Lease, PackedSite, begin

__all__ = [
    "ACTIVATIONS",
    "LIBRARY",
    "Decoding",
    "Entry",
    "Lease",
    "Means",
    "Narrow",
    "PackedSite",
    "PlainPath",
    "Plan",
    "Site",
    "Sites",
    "StepSite",
    "Visible",
    "Wide",
    "add_gated",
    "add_lora",
    "add_product",
    "additive_mask",
    "aligned",
    "attend",
    "begin",
    "bottleneck",
    "collect_sites",
    "fast_path",
    "few_rows",
    "is_fast_on_cpu",
    "is_short",
    "kernel_for",
    "lse_attention",
    "means_of_step",
    "mode",
    "narrow_products",
    "narrow_site",
    "parameter",
    "planned_for",
    "require_whole",
    "scaled",
    "state_of",
    "target_device",
]
