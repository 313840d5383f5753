"""Fixtures for the tests of experiments."""

import pathlib

import pytest
from transformers import BertConfig

from scaleup.experiments import variants
from tests.utils.finished_runs import leave_run


@pytest.fixture
def tiny_geometry(monkeypatch) -> None:
    """Replace the benchmark's BERT-base by a tiny BERT without dropout."""
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=50,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
    )
    monkeypatch.setitem(variants.GEOMETRIES, "bert-base", lambda: config)


@pytest.fixture
def small(tmp_path) -> pathlib.Path:
    """Leave runs of two tasks, K = 100, two seeds, three methods; UniPELT lacks a seed on MRPC."""
    scores = {
        "full": (0.10, 0.14, 0.80, 0.84),
        "adapter": (0.20, 0.30, 0.70, 0.72),
        "apl": (0.30, 0.32, 0.84, None),
    }
    for method, (cola0, cola1, mrpc0, mrpc1) in scores.items():
        leave_run(tmp_path / "runs", "cola", 100, method, 0, cola0, 0.4)
        leave_run(tmp_path / "runs", "cola", 100, method, 1, cola1, 0.6)
        leave_run(tmp_path / "runs", "mrpc", 100, method, 0, mrpc0)
        if mrpc1 is not None:
            leave_run(tmp_path / "runs", "mrpc", 100, method, 1, mrpc1)
    return tmp_path / "runs"
