"""Atomic writes, locks of output folders, and amounts of memory as text."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import re
import resource
import stat
from collections.abc import Iterator
from typing import IO, Any

from scaleup.errors import ConfigError, one_line

LFS_MARK = b"version https://git-lfs.github.com/spec/"
DEVICES = "/dev"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)  # the disk or the user's share of it is full
SAMPLES = 256
LOCK = ".lock"  # the file that a run locks in its output folder

_descriptors: dict[tuple[int, int], int] = {}  # (device, inode) of a locked folder → descriptor


def expand_home(value: Any) -> Any:
    """Replace ~ at the start of a path, which no shell expands in a file or in --output=~/x.

    Values that are no texts are returned as they are.

    Raises:
        ValueError: there is no such user.
    """
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    path = os.path.expanduser(value)
    if path == value:
        user = value.partition("/")[0]
        raise ValueError(f"{user} has no home folder here; write the full path")
    return path


def check_regular_file(path: str | os.PathLike[str]) -> None:
    """Raise OSError unless `path` is a regular file. Opening a pipe would wait for its writer."""
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # a null character
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        problem = "it is a pipe, a socket or a device, not a file"
        raise OSError(errno.EINVAL, problem, str(path))


def read_bytes(path: str | os.PathLike[str], most: int | None = None) -> bytes:
    """Return the content of a regular file.

    Args:
        path: the file.
        most: largest size that is read, bytes.

    Raises:
        OSError: it cannot be read, is not a regular file, or is larger than `most`.
    """
    check_regular_file(path)
    with open(path, "rb") as file:
        content = file.read(-1 if most is None else most + 1)
    if most is not None and len(content) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most // 1024} KiB", str(path))
    return content


def samples(file: IO[bytes], size: int) -> Iterator[bytes]:
    """Yield `SAMPLES` pieces of 1 KiB from all parts of a file, which tell it from another one.

    Args:
        size: of the file in bytes.
    """
    for number in range(SAMPLES):
        file.seek(size * number // SAMPLES)
        yield file.read(1024)


def file_hash(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sample_hash(path: str | os.PathLike[str]) -> str:
    """Return a hash of the size and of samples of a file, which may be too large to read."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        return hashlib.sha256(b"%d " % size + b"".join(samples(file, size))).hexdigest()


def is_lfs_pointer(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is the text that Git LFS keeps in place of a large file."""
    with open(path, "rb") as file:
        return file.read(len(LFS_MARK)) == LFS_MARK


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically, see `write_text`."""
    write_text(path, json.dumps(content, indent=1) + "\n")


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Give the path to write to so that a file never exists half written under its final name.

    A pipe or a device, such as /dev/null, is written to. It must not be replaced by a file, nor
    /dev/stdout, which is a link.
    """
    if _is_stream(path):
        # Without this flag, opening a pipe that no process reads would wait forever.
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        try:
            yield path
        finally:
            os.close(descriptor)
        return
    if path.is_relative_to(DEVICES):
        path = path.resolve()
    part = _part(path)
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def check_output(path: pathlib.Path) -> None:
    """Raise OSError unless a file can be written at `path`, in a folder that exists."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not _is_stream(path):
        part = _part(path.resolve() if path.is_relative_to(DEVICES) else path)
        part.touch()
        part.unlink()


def _part(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".{path.name}.part")


def _is_stream(path: pathlib.Path) -> bool:
    """Return whether a path is a pipe, a socket or a device; raise OSError if it is a disk."""
    if path.is_block_device():
        raise OSError(errno.EINVAL, "it is a disk, not a file", str(path))
    return path.exists() and not path.is_file() and not path.is_dir()


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a file in UTF-8, see `whole_file`."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Return the mapping in a JSON file.

    Raises:
        ValueError: it holds none. The message says why.
        OSError: the file cannot be read, or is not a regular file.
    """
    try:
        content = json.loads(read_bytes(path).decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except (ValueError, RecursionError):  # the latter for values that are nested too deeply
        raise ValueError("not valid JSON") from None
    if not isinstance(content, dict):
        raise ValueError("not a mapping")
    return content


def write_problem(error: Exception) -> str:
    """Return why a file could not be written, from the error that a library has raised."""
    text = getattr(error, "strerror", None) or one_line(error, 200)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    # torch reports "unexpected pos", and safetensors reports an error of Rust.
    too_large = re.search(r"File too large|FileTooLarge|unexpected pos", text)
    if too_large and limit != resource.RLIM_INFINITY:
        return f"a file would be larger than {limit} bytes, the limit of this process (ulimit -f)"
    return text


def hold(
    folder: pathlib.Path, holder: str = "train.output_dir: another run", lock: str = LOCK
) -> bool:
    """Lock an existing folder for this process until the process ends.

    Args:
        folder: folder to lock. It is not an error if this process holds it already.
        holder: start of the error message, which names who holds the folder.
        lock: name of the lock file in the folder, which other hosts see over NFS too. If empty,
            the folder itself is locked, which leaves no file but only this host sees.

    Returns:
        False if the file system has no locks.

    Raises:
        ConfigError: another process holds the folder.
    """
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in _descriptors:
        return True
    if lock:
        descriptor = os.open(folder / lock, os.O_RDWR | os.O_CREAT, 0o666)
    else:
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(
            f"{holder} is writing into {folder}; stop it first, or choose another folder"
        ) from None
    except OSError:
        os.close(descriptor)
        return False
    _descriptors[identity] = descriptor
    return True


UNITS = {"B": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate("KMGT", 1)
    for unit, base in (("", 1024), ("IB", 1024), ("B", 1000))
}


def parse_bytes(text: str, key: str) -> int:
    """Return the number of bytes that a text like 24GiB, 80GB, 512MiB or 24G (GiB) names.

    Args:
        text: an amount of memory with its unit.
        key: the flag or setting that an error message names.

    Raises:
        ConfigError: the text is not an amount of memory.
    """
    match = re.fullmatch(r"(?a)(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    if not match or match[2].upper() not in UNITS or not 0 < float(match[1]) < 1e15:
        raise ConfigError(
            f"{key}: {text} is not an amount of memory; write, for example, 24GiB, 80GB or 512MiB"
        )
    return int(float(match[1]) * UNITS[match[2].upper()])
