"""Fused operations of UniPELT, and the choice between them and the plain formulas.

An exported folder is flat: this file becomes `kernels.py` there, beside `narrow.py` and
`short_attention.py`. Files in this folder therefore import only each other.
"""

from .narrow import add_gated, add_lora, few_rows, narrow_products, scaled
from .short_attention import attend, is_short
from .target import planned_for, target_device

__all__ = [
    "add_gated",
    "add_lora",
    "attend",
    "few_rows",
    "is_short",
    "narrow_products",
    "planned_for",
    "scaled",
    "target_device",
]
