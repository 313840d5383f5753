"""Watch over the processes of a run until all of them have met. Then the watchdog takes over.

    watch(limit_s)    before the process joins the others: it exits if another one has failed
    met()             once all processes have met
    fail()            in a process that ends with an error: the others learn it if they have not met

torch's rendezvous waits half an hour for a process that has refused its configuration, or that was
killed. Until then each process counts up a key of its own in the run's TCPStore every second, and
rank 0 looks for processes that have stopped counting. A process that has not counted yet is taken
for a slow one.
"""

import contextlib
import os
import socket
import threading
import time
from datetime import timedelta

from torch.distributed import DistError, TCPStore

from scaleup.training import watchdog

INTERVAL_S = 1.0
# How long a process that has failed waits for the others to learn it. It may hold the store.
FAREWELL_S = 45.0

_over = threading.Event()  # this process has met the others, or has failed
_thread: threading.Thread | None = None


def watch(limit_s: float) -> None:
    """Start to watch the other processes, if there are any.

    Args:
        limit_s: seconds of silence after which a process counts as dead; 0 for no watch.
    """
    global _thread
    if limit_s and _size() > 1:
        _thread = threading.Thread(target=_watch, args=(limit_s,), daemon=True)
        _thread.start()


def met() -> None:
    """Stop the watch, because all processes have met, or because this one ends."""
    _over.set()
    if _thread is not None:
        _thread.join(timeout=INTERVAL_S)


def fail() -> None:
    """Tell the other processes that this one has failed, if they may still wait for it."""
    if _over.is_set() or _size() < 2 or os.environ.get(watchdog.VARIABLE) == "0":
        return
    met()  # a thread inside the store would abort this process at its end
    deadline = time.monotonic() + FAREWELL_S
    holds_store = _rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    with contextlib.suppress(DistError, OSError):
        store = _connect(holds_store)
        while store is None and time.monotonic() < deadline:
            time.sleep(INTERVAL_S / 2)
            store = _connect()
        if store is None:
            return
        name = f"rank {_rank()} on host {socket.gethostname()}"
        store.set(_key("failed"), f"{name} {watchdog.STOPPED}")
        store.add(_key("informed"), 1)
        while holds_store and time.monotonic() < deadline:
            if store.add(_key("informed"), 0) >= _size():
                return
            time.sleep(INTERVAL_S / 4)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1")) if "MASTER_ADDR" in os.environ else 1


def _key(name: int | str) -> str:
    # The store of torchrun's agent outlives the processes that it starts again. A store of rank 0
    # does not, and then each host has a count of its own.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if agent else "0"
    return f"scaleup-startup/{start}/{name}"


def _connect(holds_store: bool = False) -> TCPStore | None:
    """Return a connection of its own to the run's store, or None if there is no store yet."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=FAREWELL_S)
    if not holds_store:
        try:  # TCPStore itself would warn about each attempt
            socket.create_connection((address, port), timeout=5).close()
        except OSError:
            return None
    return TCPStore(address, port, None, holds_store, timeout, wait_for_workers=False)


def _watch(limit_s: float) -> None:
    store = None
    try:
        while not _over.wait(INTERVAL_S):
            store = store or _connect()
            if store is not None and (reason := _look(store, limit_s)):
                watchdog.end_process(reason)
    except DistError:
        if not _over.is_set():
            watchdog.end_process("rank 0, or the launcher on its host, has ended")


_counts: dict[int, int] = {}  # rank → its newest count
_silent_s: dict[int, float] = {}  # rank → seconds since that count came


def _look(store: TCPStore, limit_s: float) -> str | None:
    """Count on, and return why this process must end, or None while all is well."""
    rank = _rank()
    store.add(_key(rank), 1)
    for other in range(1, _size()) if rank == 0 else ():
        count = store.add(_key(other), 0)
        silent = count > 0 and _counts.get(other) == count
        _silent_s[other] = _silent_s.get(other, 0.0) + INTERVAL_S if silent else 0.0
        _counts[other] = count
        if _silent_s[other] > limit_s:
            reason = f"rank {other} has not been heard from for {limit_s:g} s"
            store.set(_key("failed"), reason)
    if not store.check([_key("failed")]):
        return None
    reason = store.get(_key("failed")).decode()
    store.add(_key("informed"), 1)
    if rank == 0:
        time.sleep(3 * INTERVAL_S)  # the others learn it from a store that may end with rank 0
    return reason
