"""Locks of extensions that are compiled: those of the dead go, those of the living stay."""

import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from torch.utils.file_baton import FileBaton

from scaleup.training import build_locks, distributed

HOLD = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def lock(tmp_path) -> pathlib.Path:
    """The path of an extension's lock."""
    folder = tmp_path / "py311_cpu" / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    return folder / "lock"


@pytest.fixture
def holder(lock):
    """A process that compiles, as far as torch's lock can tell."""
    words = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def age(lock: pathlib.Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(lock, (then, then))


def test_the_lock_of_a_killed_process_is_reported_and_removed(lock, holder, tmp_path, capsys):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert not FileBaton(str(lock)).try_acquire()  # every later start would wait here
    age(lock, build_locks.QUIET_LOCAL_S + 1)
    build_locks.wait_for_builds(tmp_path, interval_s=0.01)
    output = capsys.readouterr().out
    assert output == f"note: {lock}: removed; it was left behind by a process that was killed\n"
    assert FileBaton(str(lock)).try_acquire()


def test_the_lock_of_a_living_process_stays_however_old_it_is(lock, holder, tmp_path, capsys):
    age(lock, 1e6)
    waiting = threading.Thread(target=build_locks.wait_for_builds, args=(tmp_path, 0.01))
    waiting.start()
    time.sleep(1.0)
    assert waiting.is_alive() and lock.exists()
    holder.kill()
    holder.wait()
    waiting.join(timeout=60)
    assert not waiting.is_alive() and not lock.exists()
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"note: {lock}: waiting for the process that compiles this extension"
    assert second.endswith("removed; it was left behind by a process that was killed")


@pytest.mark.parametrize(
    ("kind", "quiet_s"),
    [("ext4", build_locks.QUIET_LOCAL_S), ("nfs4", build_locks.QUIET_SHARED_S), ("", 900.0)],
)
def test_a_lock_that_another_host_may_hold_stays_while_its_folder_changes(
    lock, tmp_path, monkeypatch, capsys, kind, quiet_s
):
    monkeypatch.setattr(build_locks, "_file_system", lambda path: kind)
    lock.touch()
    age(lock, 2 * quiet_s)
    written = lock.with_name("kernel.o")
    written.touch()
    age(written, quiet_s - 30)
    assert "no process of this host holds it" in build_locks._wait_or_remove(lock)
    assert lock.exists()
    age(written, quiet_s + 30)
    assert "removed" in build_locks._wait_or_remove(lock) and not lock.exists()


def test_a_lock_that_another_process_has_taken_meanwhile_stays(lock, monkeypatch):
    """Two processes find the same old lock. One removes it and compiles, before the other does."""
    lock.touch()
    age(lock, 1e6)

    def replace(path: pathlib.Path) -> bool:
        path.unlink()
        path.touch()
        age(path, 1e6)
        return False

    monkeypatch.setattr(build_locks, "_is_open", replace)
    with pytest.raises(FileNotFoundError):
        build_locks._wait_or_remove(lock)
    assert lock.exists()


def test_the_file_system_of_a_file_is_that_of_its_nearest_mount():
    assert build_locks._file_system(pathlib.Path("/proc/self/status")) == "proc"


def _start(environment: dict[str, str]) -> None:
    os.environ.update(environment)
    distributed.start(deepspeed=True)


def test_a_start_of_deepspeed_removes_the_lock_first(lock, tmp_path):
    lock.touch()
    age(lock, 1000)
    variables = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "py311_cpu"), "CUDA_VISIBLE_DEVICES": ""}
    process = multiprocessing.get_context("spawn").Process(target=_start, args=(variables,))
    process.start()
    deadline = time.monotonic() + 120
    while lock.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.join()
    assert not lock.exists()
