"""Fixtures for the tests of experiments."""

import pytest
from transformers import BertConfig

from scaleup.experiments import variants


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
