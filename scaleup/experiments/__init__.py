"""Sweeps, tables, figures, gate reports and benchmarks."""
