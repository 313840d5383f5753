"""Writing files, and amounts of memory as text."""

import os
import pathlib

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
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    io.write_text(pipe, "text")
    assert os.read(reader, 100) == b"text" and pipe.is_fifo()
    os.close(reader)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_pipe_that_no_process_reads_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="No such device"):
        io.write_text(tmp_path / "pipe", "text")


def test_a_disk_is_not_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(pathlib.Path, "is_block_device", lambda path: path.name == "disk")
    (tmp_path / "disk").write_text("all my files")
    for write in (io.check_output, lambda path: io.write_text(path, "text")):
        with pytest.raises(OSError, match="it is a disk"):
            write(tmp_path / "disk")
    assert (tmp_path / "disk").read_text() == "all my files"


def test_a_link_among_the_devices_is_not_replaced(tmp_path, monkeypatch):
    """/dev/stdout leads to a file where a shell redirects the output."""
    monkeypatch.setattr(io, "DEVICES", str(tmp_path / "dev"))
    (tmp_path / "dev").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "dev" / "stdout").symlink_to(tmp_path / "file")
    io.check_output(tmp_path / "dev" / "stdout")
    io.write_text(tmp_path / "dev" / "stdout", "text")
    assert (tmp_path / "dev" / "stdout").is_symlink()
    assert (tmp_path / "file").read_text() == "text"


def test_nothing_remains_of_a_file_that_could_not_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    for write in (io.check_output, lambda path: io.write_text(path, "text")):
        with pytest.raises(OSError, match="Is a directory"):
            write(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
