"""Locks that a killed process has left behind while it compiled an extension of torch.

torch makes a file named `lock` in the folder of an extension while a process compiles it. Every
other process waits without a message until the file is gone. DeepSpeed compiles its extensions at
its first start on a host. If that process is killed, the file stays, and all later starts would
wait for ever.
"""

import contextlib
import fcntl
import os
import pathlib
import time

import psutil

LOCAL_TYPES = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay", "apfs"}
# Seconds without any change in the folder of an extension after which nobody compiles it, if no
# process of this host holds its lock. The process that compiles may be in another container on
# this host, or on another host if the file system can be a shared one.
QUIET_LOCAL_S, QUIET_SHARED_S = 60.0, 900.0
REMOVED = "removed; it was left behind by a process that was killed"


def wait_for_builds(root: pathlib.Path | None = None, interval_s: float = 1.0) -> None:
    """Remove the locks that no living process holds, and wait until the others are released.

    Each lock is reported by the first process of a host. A process that is already waiting for a
    lock expects a complete extension when the lock is gone, so every process must call this before
    anything is compiled.

    Args:
        root: the folder of all extensions. The default is that of torch.
    """
    root = root or _root()
    reported: dict[pathlib.Path, str] = {}
    while locks := [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        for lock in locks:
            try:
                report = _wait_or_remove(lock)
            except FileNotFoundError:  # it was released, or another process has removed it
                continue
            first = os.environ.get("LOCAL_RANK", "0") == "0"
            if reported.get(lock) != report and (first or report == REMOVED):
                print(f"note: {lock}: {report}", flush=True)
            reported[lock] = report
        time.sleep(interval_s)


def _root() -> pathlib.Path:
    if folder := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return pathlib.Path(folder)
    from torch.utils.cpp_extension import get_default_build_root  # imports setuptools

    return pathlib.Path(get_default_build_root())


def _wait_or_remove(lock: pathlib.Path) -> str:
    """Remove a lock if no living process can hold it. Return what has to be said about it."""
    identity = _identity(lock.stat())
    if _is_open(lock):
        return "waiting for the process that compiles this extension"
    local = _file_system(lock) in LOCAL_TYPES
    quiet_s = QUIET_LOCAL_S if local else QUIET_SHARED_S
    newest = max(path.stat().st_mtime for path in (lock, *lock.parent.iterdir()))
    if time.time() - newest < quiet_s:
        return (
            f"no process of this host holds it. It is removed after {quiet_s:g} s without a change"
            " beside it; remove it now if nothing else compiles there"
        )
    with lock.open("r+") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        # Another process may have removed the lock, and may compile now under one of its own.
        if _identity(lock.stat()) != identity:
            raise FileNotFoundError(lock)
        lock.unlink()
    return REMOVED


def _identity(status: os.stat_result) -> tuple[int, int]:
    """Return what tells a file from one that is made later, perhaps with the same inode."""
    return status.st_ino, status.st_ctime_ns


def _is_open(path: pathlib.Path) -> bool:
    """Return whether a process of this host, other than this one, has the file open."""
    name = str(path.resolve())
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # a process of another user, or one that has ended
            if process.pid != os.getpid() and any(f.path == name for f in process.open_files()):
                return True
    return False


def _file_system(path: pathlib.Path) -> str:
    """Return the type of the file system that holds an existing file."""
    parents = {str(parent) for parent in path.resolve().parents}
    holding = [part for part in psutil.disk_partitions(all=True) if part.mountpoint in parents]
    return max(holding, key=lambda part: len(part.mountpoint)).fstype if holding else ""
