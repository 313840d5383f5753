"""Notice a process of the run that is gone, and stop the others with the reason.

    dog = Watchdog(rank, hosts, token, limit_s)  on every rank, once the processes have met
    begin(dog)                                   on every rank, after a barrier
    stop(code)                                   at the end, so that no rank takes this one for dead

A collective waits for a dead process, or for a host behind a broken link, until its own timeout of
half an hour. Therefore each rank writes a beat into the run's TCPStore every few seconds, over its
own connection. Rank 0 reads all beats and leaves a verdict in the store. The other ranks read the
beat of rank 0 and the verdict, so a round costs them two small requests.

Calls on a socket behind a dead link may block for ever, so a guard thread watches the rounds. If
the interpreter lock is never released and neither thread can run, a timer of faulthandler, which
needs no lock, ends the process.
"""

import faulthandler
import math
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta

from torch.distributed import DistError, DistNetworkError, TCPStore

from scaleup.errors import ConfigError

VARIABLE = "SCALEUP_WATCHDOG_S"
ADVICE = "stopping. Continue with train.resume=auto"
STOPPED = "has stopped with an error (its own output says which)"
# What gloo and NCCL report when the other side is gone. gloo raises bare RuntimeErrors, so only
# the message tells.
LOST = re.compile(
    r"gloo/transport|Connection (closed|reset) by (peer|remote)|Broken pipe|Socket closed"
    r"|NCCL (error|communicator)|ncclRemoteError|Application timeout caused pair closure"
    r"|Timed out waiting \d+ms for (recv|send|key)"
)


def limit_from_environment() -> float:
    """Return the seconds of silence after which a rank counts as dead, from SCALEUP_WATCHDOG_S.

    The default is 30. 0 means no watchdog.
    """
    text = os.environ.get(VARIABLE, "30")
    try:
        limit_s = float(text)
    except ValueError:
        limit_s = math.nan
    if limit_s == 0 or 3 <= limit_s < math.inf:
        return limit_s
    raise ConfigError(f"{VARIABLE}={text}: give seconds, 3 or more, or 0 for no watchdog")


def _has_ended(beat: str) -> bool:
    return " end " in beat


def _has_finished(beat: str) -> bool:
    """Return whether the rank ended without an error."""
    return beat.endswith(" end 0")


class Watchdog:
    """The beat thread and the guard thread of one rank.

    Args:
        token: separates the keys of this start from others in the same store.
        limit_s: seconds of silence after which a rank counts as dead.
    """

    def __init__(self, rank: int, hosts: Sequence[str], token: str, limit_s: float):
        self.rank, self.hosts, self.token, self.limit_s = rank, list(hosts), token, limit_s
        self.interval_s = min(2.0, limit_s / 10)
        # Silence that is enough to call a rank dead once a connection is known to be lost.
        self.patience_s = 3 * self.interval_s
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.address = f"{address}:{port}"
        timeout = timedelta(seconds=limit_s)
        self.store = TCPStore(
            address, port, is_master=False, wait_for_workers=False, timeout=timeout
        )
        self.state = "run"  # then "hurt" if a collective failed here, at last "end CODE"
        self.beats = self.rounds = 0
        self.last = time.monotonic()
        self.seen: dict[int, str] = {}  # rank → its newest beat
        self.silence: dict[int, float] = {}  # rank → seconds since that beat came
        self.wake, self.ended = threading.Event(), threading.Event()
        self.reporting = threading.Lock()
        self.threads = [
            threading.Thread(target=f, name=f"watchdog {f.__name__}", daemon=True)
            for f in (self._beat, self._guard)
        ]
        # The keys of all ranks must exist before any rank starts, because a read would block.
        self.store.set(self._key(rank), "0 run")
        if rank == 0:
            self.store.set(self._key("verdict"), "")

    def start(self) -> None:
        self._arm()
        for thread in self.threads:
            thread.start()

    def stop(self, code: int) -> None:
        """Announce the end of this rank. Rank 0, which may hold the store, waits for the others."""
        self.state = f"end {code}"
        self.wake.set()
        self.threads[0].join(timeout=self.limit_s)
        self.ended.set()
        self.threads[1].join(timeout=self.interval_s)
        faulthandler.cancel_dump_traceback_later()

    def wait_for_verdict(self) -> None:
        """Give rank 0 time to find the lost rank and end this process. If it does not, return."""
        self.state = "hurt"
        self.wake.set()
        self.ended.wait(self.patience_s + 4 * self.interval_s)

    def _key(self, name: int | str) -> str:
        return f"scaleup-watchdog/{self.token}/{name}"

    def _name(self, rank: int) -> str:
        return f"rank {rank} on host {self.hosts[rank]}"

    def _beat(self) -> None:
        try:
            while not self.state.startswith("end"):
                self._round()
                self.wake.wait(self.interval_s)
                self.wake.clear()
            self._leave()
        except DistNetworkError:
            # Once rank 0 has finished, there is nothing left to wait for: the end of its store is
            # no loss.
            if self.state != "end 0" and not _has_finished(self.seen.get(0, "")):
                self._report(self._store_lost())
        except DistError:  # the store does not answer in time, and the guard counts how long
            self.ended.wait()
        self.ended.set()

    def _round(self) -> None:
        self._publish()
        reason = self._look_at_all() if self.rank == 0 else self._look_at_first()
        if reason:
            if self.rank == 0:
                self._convict(reason)
            else:
                self.state = "end 1"
                self._publish()  # so that rank 0 does not wait for this rank
            self._report(reason)
        self.rounds += 1

    def _publish(self) -> None:
        self.beats += 1
        self.store.set(self._key(self.rank), f"{self.beats} {self.state}")

    def _read(self, names: Iterable[int | str]) -> list[str]:
        return [value.decode() for value in self.store.multi_get([self._key(n) for n in names])]

    def _look_at_first(self) -> str | None:
        """Return why this rank must stop, or None while all is well."""
        beat, verdict = self._read([0, "verdict"])
        self._count({0: beat})
        if verdict:
            return verdict
        if self.silence[0] > self.limit_s and not _has_finished(beat):
            return self._silent([0])
        return None

    def _look_at_all(self) -> str | None:
        """Return the verdict of rank 0, or None while all is well."""
        others = range(1, len(self.hosts))
        beats = dict(zip(others, self._read(others)))
        self._count(beats)
        hurt = self.state == "hurt" or any(beat.endswith("hurt") for beat in beats.values())
        limit_s = self.patience_s if hurt else self.limit_s
        silent = [r for r, b in beats.items() if not _has_ended(b) and self.silence[r] > limit_s]
        if silent:
            return self._silent(silent)
        # An error that all ranks share ends each of them with its own message. An error of one
        # rank alone is the reason for the others to stop.
        for rank, beat in beats.items():
            failed = _has_ended(beat) and not _has_finished(beat)
            if failed and self.silence[rank] > self.patience_s:
                return f"{self._name(rank)} {STOPPED}"
        return None

    def _count(self, beats: dict[int, str]) -> None:
        """Add up the silence of ranks. A pause of this very process hardly counts."""
        last, self.last = self.last, time.monotonic()
        gap_s = min(self.last - last, 2 * self.interval_s)
        for rank, beat in beats.items():
            changed = self.seen.get(rank) != beat
            self.seen[rank] = beat
            self.silence[rank] = 0.0 if changed else self.silence[rank] + gap_s

    def _silent(self, ranks: list[int]) -> str:
        more = f" (and {len(ranks) - 1} more ranks)" if len(ranks) > 1 else ""
        seconds = self.silence[ranks[0]]
        return f"{self._name(ranks[0])}{more} has not been heard from for {seconds:.0f} s"

    def _store_lost(self) -> str:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun's agent holds the store, and it ends with its processes.
            return (
                f"the launcher on host {self.hosts[0]} ({self.address}) is gone: a process of that"
                " host has failed, or the link to it"
            )
        return f"the connection to {self._name(0)} ({self.address}) is lost"

    def _leave(self) -> None:
        """Publish the last beat. Rank 0 then waits for the last beats of the others."""
        self._publish()
        if self.rank:
            return
        failed = self.state != "end 0"
        patience_s = self.patience_s if failed else self.limit_s
        if not self._wait_for_others(patience_s, patience_s) and failed:
            self._convict(f"{self._name(0)} {STOPPED}")

    def _convict(self, reason: str) -> None:
        self.store.set(self._key("verdict"), reason)
        # The store may end with this process, so the others read the verdict first.
        self._wait_for_others(2 * self.interval_s, self.patience_s)

    def _wait_for_others(self, most_s: float, patience_s: float) -> bool:
        """Wait, at most `most_s`, until every other rank has ended or is silent for `patience_s`.

        Returns:
            Whether all other ranks have ended.
        """
        deadline = time.monotonic() + most_s
        while True:
            self._look_at_all()
            running = [rank for rank, beat in self.seen.items() if not _has_ended(beat)]
            heard = any(self.silence[rank] <= patience_s for rank in running)
            if not heard or time.monotonic() > deadline:
                return not running
            self.rounds += 1
            time.sleep(self.interval_s / 4)

    def _arm(self) -> None:
        # A process that holds its interpreter lock longer than this counts as dead anyway.
        stream = sys.__stderr__ or sys.stderr
        faulthandler.dump_traceback_later(1.5 * self.limit_s, exit=True, file=stream)

    def _guard(self) -> None:
        rounds, silent_s, last = -1, 0.0, time.monotonic()
        while not self.ended.wait(self.interval_s):
            self._arm()
            now = time.monotonic()
            gap_s = min(now - last, 2 * self.interval_s)
            silent_s = silent_s + gap_s if rounds == self.rounds else 0.0
            rounds, last = self.rounds, now
            if silent_s > self.limit_s and not _has_finished(self.seen.get(0, "")):
                self._report(
                    f"{self._name(0)} ({self.address}) has not answered for {silent_s:.0f} s:"
                    " the host or the link to it is down"
                )

    def _report(self, reason: str) -> None:
        if self.reporting.acquire(blocking=False):
            end_process(reason)


def end_process(reason: str) -> None:
    """Print one line and end the process: its main thread may be inside a collective."""
    # A thread that never runs again may hold the lock of sys.stderr, so this bypasses it. The line
    # begins with a line break because a progress bar may be there.
    os.write(2, f"\nerror: {reason}; {ADVICE}\n".encode())
    os._exit(1)


_running: Watchdog | None = None


def begin(watchdog: Watchdog) -> None:
    """Start the threads. Until `stop`, this process exits with code 1 if another rank is gone."""
    global _running
    _running = watchdog
    watchdog.start()


def stop(code: int = 0) -> None:
    """Announce the end of this rank. If its exit code is not 0, the other ranks stop as well."""
    global _running
    if _running is not None:
        watchdog, _running = _running, None
        watchdog.stop(code)


def is_lost(error: BaseException) -> bool:
    """Return whether an error means that another process is gone."""
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and LOST.search(str(error)) is not None
    )


def lost_connection(error: RuntimeError) -> str | None:
    """Return one plain line if the error means that another process is gone, else None.

    If the watchdog finds out within some seconds which process it is, it ends this process.
    """
    if not is_lost(error):
        return None
    if _running is not None:
        _running.wait_for_verdict()
    reason = str(error).strip().splitlines()[0]
    return f"the connection to another process is lost ({reason:.200}); {ADVICE}"
