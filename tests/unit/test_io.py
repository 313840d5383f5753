"""Amounts of memory as text."""

import pytest

from scaleup import errors, io


@pytest.mark.parametrize(
    "text, size",
    [("24GiB", 24 * 2**30), ("80GB", 80 * 10**9), ("512 MiB", 2**29), ("1.5G", 3 * 2**29)],
)
def test_amounts_of_memory(text, size):
    assert io.parse_bytes(text, "--gpu-memory") == size


@pytest.mark.parametrize("text", ["24", "GiB", "-1GiB", "0GiB", "24 bananas", "", "1e3G"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(errors.ConfigError, match="--max-shard-size"):
        io.parse_bytes(text, "--max-shard-size")
