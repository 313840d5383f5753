"""Files: atomic writes, locks of output folders, amounts of memory as text."""

import fcntl
import json
import os
import pathlib
import re

from scaleup.errors import ConfigError

LOCK = ".lock"  # of the run that writes into the folder


def write_json(path: pathlib.Path, content: dict) -> None:
    """As `write_text`."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Never half written under its final name."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


_held: dict[tuple[int, int], int] = {}  # folder (device, inode) → descriptor that locks it


def hold(
    folder: pathlib.Path, who: str = "train.output_dir: another run", lock: str = LOCK
) -> bool:
    """Locks an existing output folder for this process until it ends, by a file in it, which other hosts see over NFS too; with lock ""
    by the folder itself, which they do not. False where the file system has no locks. Raises ConfigError if another process holds it."""
    found = os.stat(folder)
    if (found.st_dev, found.st_ino) in _held:
        return True
    descriptor = (
        os.open(folder / lock, os.O_RDWR | os.O_CREAT, 0o666)
        if lock
        else os.open(folder, os.O_RDONLY)
    )
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(
            f"{who} is writing into {folder}; stop it first, or choose another folder"
        ) from None
    except OSError:
        os.close(descriptor)
        return False
    _held[found.st_dev, found.st_ino] = descriptor
    return True


UNITS = {"B": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate("KMGT", 1)
    for unit, base in (("", 1024), ("IB", 1024), ("B", 1000))
}


def parse_bytes(text: str) -> int:
    """24GiB, 80GB, 512MiB, 24G (GiB) as bytes. Raises ConfigError."""
    found = re.fullmatch(r"(?a)(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    if not found or found[2].upper() not in UNITS or not 0 < float(found[1]) < 1e15:
        raise ConfigError(
            f"--gpu-memory: {text} is no amount of memory; write 24GiB, 80GB or 512MiB"
        )
    return int(float(found[1]) * UNITS[found[2].upper()])
