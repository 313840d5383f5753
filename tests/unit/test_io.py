"""Writing files, and amounts of memory as text."""

import os
import threading

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


def test_a_pipe_or_device_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    io.write_text(pipe, "text")
    reader.join(timeout=10)
    assert received == ["text"] and pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
