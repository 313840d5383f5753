"""Fused operations of UniPELT and the choice between them."""
