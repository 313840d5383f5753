"""Fill a folder once, on one process per file system, while other processes wait for it.

    folder = fill_once(folder, make)    make(part) writes the files into the new folder `part`

The work is done in a hidden folder beside the final one, which is renamed when it is complete. A
process that waits polls files, so that no collective times out. The lock is a lease that its holder
renews: if the holder is killed, or its host is gone, another process takes over within `LEASE_S`.
Should two processes work after all, because one was paused for longer, the first result stays.
"""

import contextlib
import os
import pathlib
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from filelock import SoftFileLease

from scaleup.errors import ConfigError, RunError, one_line
from scaleup.io import NO_SPACE, read_json, write_json, write_problem

KEY = "data.cache_dir"
LEASE_S, POLL_S = 30.0, 0.2
PATIENCE_S = 10.0  # after which a process says that it waits
SIZES = "sizes.json"  # the files of a complete folder with their sizes, bytes


def is_complete(folder: pathlib.Path) -> bool:
    """Return whether a folder has all files with which it was made, in their sizes.

    Files may be missing after a power failure, or where a cluster removes what is old.
    """
    try:
        sizes = read_json(folder / SIZES)
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def fill_once(folder: pathlib.Path, make: Callable[[pathlib.Path], None]) -> None:
    """Make a folder if it is missing or incomplete, or wait until another process has made it.

    Args:
        folder: the final name. Its parents are made.
        make: writes the files into the folder that it gets.

    Raises:
        ConfigError: `make` raised it, here or in the process that this one has waited for; or the
            folder cannot be written.
        RunError: the same, for example because the disk is full.
    """
    if is_complete(folder):
        return
    path = folder.with_name(f".{folder.name}.failed.json")
    with _explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        earlier, waiting = _read_failure(path), _Waiting(folder)

        lock = SoftFileLease(
            folder.with_name(f".{folder.name}.lock"), lease_duration=LEASE_S, poll_interval=POLL_S
        )
        try:
            lock.acquire(cancel_check=waiting.is_over)
        except TimeoutError:
            return
    try:
        failure = _read_failure(path)
        if is_complete(folder):
            return
        if waiting.since and failure is not None and failure != earlier:
            kind = ConfigError if failure["refused"] else RunError
            raise kind("\n".join(failure["problems"]) if kind is RunError else failure["problems"])
        _make(folder, make)
        path.unlink(missing_ok=True)
    except (ConfigError, RunError) as error:
        _write_failure(path, error)
        raise
    finally:
        lock.release()


class _Waiting:
    """Waits for another process that makes a folder."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.since, self.told = folder, 0.0, os.environ.get("RANK", "0") != "0"

    def is_over(self) -> bool:
        """Return whether the folder is there. After some seconds, say once why nothing happens."""
        self.since = self.since or time.monotonic()
        if not self.told and time.monotonic() - self.since > PATIENCE_S:
            print(f"note: another process prepares data in {self.folder.parent}", flush=True)
            self.told = True
        return is_complete(self.folder)


def _read_failure(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _write_failure(path: pathlib.Path, error: ConfigError | RunError) -> None:
    """Tell the processes that wait why the folder could not be made."""
    refused = isinstance(error, ConfigError)
    problems = error.problems if isinstance(error, ConfigError) else [str(error)]
    content = {"refused": refused, "problems": problems, "token": secrets.token_hex(8)}
    with contextlib.suppress(OSError):
        write_json(path, content)


def _make(folder: pathlib.Path, make: Callable[[pathlib.Path], None]) -> None:
    prefix = f".{folder.name}.part-"
    with _explained(folder):
        for left_over in folder.parent.glob(f"{prefix}*"):  # of a process that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        part = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
        old = part.with_name(f"{part.name}-old")
        try:
            part.chmod(0o777 & ~_umask())  # mkdtemp admits only this user
            make(part)
            sizes = {path.name: path.stat().st_size for path in part.iterdir()}
            write_json(part / SIZES, sizes)
            if folder.exists() and not is_complete(folder):
                folder.rename(old)
            if not folder.exists():  # else another process was faster
                part.rename(folder)
        finally:
            for path in (part, old):
                shutil.rmtree(path, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _explained(folder: pathlib.Path) -> Iterator[None]:
    """Raise one line that names the setting if the folder cannot be written."""
    try:
        yield
    except OSError as error:
        where = f"{KEY}: {folder.parent}"
        if error.errno in NO_SPACE or "No space left" in str(error):
            advice = "free space there, or name a folder on another disk"
            raise RunError(f"{where}: {write_problem(error)}; {advice}") from error
        advice = "name a folder that can be written"
        reason = error.strerror or one_line(error, 200)
        raise ConfigError(f"{where}: {reason}; {advice}") from error
