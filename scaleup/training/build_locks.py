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


def wait_for_builds(root: pathlib.Path | None = None, interval_s: float = 1.0) -> None:
    """Remove the locks that no living process holds, and wait until the others are released.

    Each lock is reported. A process that is already waiting for a lock expects a complete extension
    when the lock is gone, so this must be called before anything is compiled.

    Args:
        root: the folder of all extensions. The default is that of torch.
    """
    root = root or _root()
    reported: dict[pathlib.Path, str] = {}
    while locks := [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        for lock in locks:
            with contextlib.suppress(FileNotFoundError):  # it was released in this moment
                report = _wait_or_remove(lock)
                if reported.get(lock) != report:
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
    return _remove(lock)


def _remove(lock: pathlib.Path) -> str:
    """Remove this very lock file, and no other one that a process has made meanwhile."""
    with lock.open("r+") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_ino == lock.stat().st_ino:
            lock.unlink()
    return "removed; it was left behind by a process that was killed"


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
