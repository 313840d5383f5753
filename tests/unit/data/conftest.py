"""Fixtures of the tests of `scaleup.data`."""

import pytest
from transformers import BertTokenizerFast


@pytest.fixture
def glue(data_dir) -> str:
    return str(data_dir / "glue")


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Change to an empty folder, so that messages name files the way the test writes them."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer():
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*specials, "good", "bad", "fine", "dull", "great", "poor", "film", *"abcd"]
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
