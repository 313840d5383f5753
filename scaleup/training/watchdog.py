"""Notices a process of the run that is gone, and stops the others with the reason.

    start(rank, hosts, token, limit_s)     on every rank, once the processes have met (runtime.start does it)
    stop(code)                             at the end: says that this rank is done, so that nobody takes it for dead

A collective waits for a process that died, or for a host behind a broken link, until its own timeout: half an hour. So each
rank beats into the run's TCPStore every few seconds, over a connection of its own. Rank 0 looks at all beats and leaves its
verdict in the store; the others look at rank 0 and the verdict, so one round is two small requests on every rank but rank 0.
Calls on a socket behind a dead link may block without end: a guard thread watches the rounds themselves. And if the
interpreter lock is never given back, so that neither thread runs, faulthandler's timer, which needs no lock, ends the process.
"""

import faulthandler
import math
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import DistError, DistNetworkError, TCPStore

from scaleup.errors import ConfigError

VARIABLE = "SCALEUP_WATCHDOG_S"
ADVICE = "stopping. Continue with train.resume=auto"
# What gloo and NCCL say when the other side is gone. gloo raises bare RuntimeErrors, so only the words tell.
LOST = re.compile(
    r"gloo/transport|Connection (closed|reset) by (peer|remote)|Broken pipe|Socket closed|NCCL (error|communicator)|ncclRemoteError"
    r"|Application timeout caused pair closure|Timed out waiting \d+ms for (recv|send|key)"
)


def limit_from_environment() -> float:
    """Seconds of silence after which a rank counts as dead: SCALEUP_WATCHDOG_S, 30 without it, 0 for no watchdog.

    Raises ConfigError for anything that is not a number of seconds: 0, or 3 and more.
    """
    text = os.environ.get(VARIABLE, "30")
    try:
        limit_s = float(text)
    except ValueError:
        limit_s = math.nan
    if limit_s == 0 or 3 <= limit_s < math.inf:
        return limit_s
    raise ConfigError(f"{VARIABLE}={text}: give seconds, 3 or more, or 0 for no watchdog")


class Watchdog:
    """The beat and guard threads of one rank. `hosts`: the host name of every rank."""

    def __init__(self, rank: int, hosts: Sequence[str], token: str, limit_s: float):
        self.rank, self.hosts, self.token, self.limit_s = rank, list(hosts), token, limit_s
        self.interval_s = min(2.0, limit_s / 10)
        self.patience_s = (
            3 * self.interval_s
        )  # enough to call a rank dead once a connection is known to be lost
        self.address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        self.store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=limit_s),
        )
        self.state = "run"  # run, hurt (a collective failed here), end CODE
        self.beats = self.rounds = 0
        self.last = time.monotonic()
        self.seen: dict[int, str] = {}
        self.silence: dict[
            int, float
        ] = {}  # rank → seconds without a new beat, or since it ended with an error
        self.wake, self.ended, self.reporting = (
            threading.Event(),
            threading.Event(),
            threading.Lock(),
        )
        self.threads = [
            threading.Thread(target=f, name=f"watchdog {f.__name__}", daemon=True)
            for f in (self._beat, self._guard)
        ]

    # The first beat comes before any look, so no key is ever missing: missing keys would be waited for.
    def first_beat(self) -> None:
        """Makes this rank's keys. Every rank has to have done so before any of them starts its threads."""
        self.store.set(self._key(self.rank), "0 run")
        if self.rank == 0:
            self.store.set(self._key("verdict"), "")

    def start(self) -> None:
        self._arm()
        for thread in self.threads:
            thread.start()

    def stop(self, code: int) -> None:
        """Says that this rank is done and ends the threads. Rank 0, whose process may hold the store, lets the others go first."""
        self.state = f"end {code}"
        self.wake.set()
        self.threads[0].join(timeout=self.limit_s)
        self.ended.set()
        self.threads[1].join(timeout=self.interval_s)
        faulthandler.cancel_dump_traceback_later()

    def wait_for_verdict(self) -> None:
        """After a collective failed here: gives rank 0 time to find who is gone. Ends the process if it does; else returns."""
        self.state = "hurt"
        self.wake.set()
        self.ended.wait(self.patience_s + 4 * self.interval_s)

    def _key(self, what: int | str) -> str:
        return f"scaleup-watchdog/{self.token}/{what}"

    def _name(self, rank: int) -> str:
        return f"rank {rank} on host {self.hosts[rank]}"

    def _gap(self) -> float:
        """Seconds since the last call. A pause of this very process (a held interpreter, a suspended machine) hardly counts."""
        last, self.last = self.last, time.monotonic()
        return min(self.last - last, 2 * self.interval_s)

    def _beat(self) -> None:
        try:
            while not self.state.startswith("end"):
                self._round()
                self.wake.wait(self.interval_s)
                self.wake.clear()
            self._leave()
        except DistNetworkError:
            # Once rank 0 is done there is nothing left to wait for together, so the end of its store is no loss.
            if self.state != "end 0" and not self.seen.get(0, "").endswith(" end 0"):
                self._report(self._store_lost())
        except DistError:  # the store does not answer in time: the guard counts how long
            self.ended.wait()
        self.ended.set()

    def _round(self) -> None:
        self._publish()
        if self.rank == 0:
            reason = self._look_at_all()
            if reason:
                self._convict(reason)
                self._report(reason)
        else:
            reason = self._look_at_first()
            if reason:
                self.state = "end 1"
                self._publish()  # so that rank 0 need not wait for this one
                self._report(reason)
        self.rounds += 1

    def _publish(self) -> None:
        self.beats += 1
        self.store.set(self._key(self.rank), f"{self.beats} {self.state}")

    def _look_at_first(self) -> str | None:
        beat, verdict = (
            value.decode() for value in self.store.multi_get([self._key(0), self._key("verdict")])
        )
        self._count({0: beat}, self._gap())
        if verdict:
            return verdict
        if self.silence[0] > self.limit_s and not beat.endswith(" end 0"):
            return self._silent([0])
        return None

    def _look_at_all(self) -> str | None:
        """The verdict of rank 0, or None while all is well."""
        others = range(1, len(self.hosts))
        beats = dict(
            zip(
                others,
                (
                    value.decode()
                    for value in self.store.multi_get([self._key(rank) for rank in others])
                ),
            )
        )
        self._count(beats, self._gap())
        hurt = self.state == "hurt" or any(beat.endswith("hurt") for beat in beats.values())
        limit_s = self.patience_s if hurt else self.limit_s
        silent = [
            rank
            for rank, beat in beats.items()
            if " end " not in beat and self.silence[rank] > limit_s
        ]
        if silent:
            return self._silent(silent)
        # An error that all ranks share ends each of them with its own message; one that ended alone is the others' reason.
        failed = [
            rank
            for rank, beat in beats.items()
            if " end " in beat
            and not beat.endswith(" end 0")
            and self.silence[rank] > self.patience_s
        ]
        return (
            f"{self._name(failed[0])} has stopped with an error (its own output says which)"
            if failed
            else None
        )

    def _count(self, beats: dict[int, str], gap_s: float) -> None:
        for rank, beat in beats.items():
            changed = self.seen.get(rank) != beat
            self.seen[rank] = beat
            self.silence[rank] = 0.0 if changed else self.silence[rank] + gap_s

    def _silent(self, ranks: list[int]) -> str:
        more = f" (and {len(ranks) - 1} more ranks)" if len(ranks) > 1 else ""
        return f"{self._name(ranks[0])}{more} has not been heard from for {self.silence[ranks[0]]:.0f} s"

    def _store_lost(self) -> str:
        if (
            os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        ):  # torchrun's agent holds the store, and ends with its processes
            return f"the launcher on host {self.hosts[0]} ({self.address}) is gone: a process of that host has failed, or the link to it"
        return f"the connection to {self._name(0)} ({self.address}) is lost"

    def _leave(self) -> None:
        """The last words. Rank 0 stays until the others have said theirs, at most for the limit."""
        self._publish()
        if self.rank:
            return
        failed = self.state != "end 0"
        patience_s = self.patience_s if failed else self.limit_s
        if not self._wait_for_others(patience_s, patience_s) and failed:
            self._convict(f"{self._name(0)} has stopped with an error (its own output says which)")

    def _convict(self, reason: str) -> None:
        self.store.set(self._key("verdict"), reason)
        self._wait_for_others(
            2 * self.interval_s, self.patience_s
        )  # the store may end with this process

    def _wait_for_others(self, most_s: float, patience_s: float) -> bool:
        """Until every other rank has ended or been silent for `patience_s`, or `most_s` have passed; whether all have ended."""
        deadline = time.monotonic() + most_s
        while True:
            self._look_at_all()
            running = [rank for rank, beat in self.seen.items() if " end " not in beat]
            if (
                not any(self.silence[rank] <= patience_s for rank in running)
                or time.monotonic() > deadline
            ):
                return not running
            self.rounds += 1
            time.sleep(self.interval_s / 4)

    def _arm(self) -> None:
        # Needs no interpreter lock to fire; a process whose lock is held longer counts as dead to the others anyway.
        faulthandler.dump_traceback_later(1.5 * self.limit_s, exit=True, file=sys.__stderr__)

    def _guard(self) -> None:
        rounds, silent_s, last = -1, 0.0, time.monotonic()
        while not self.ended.wait(self.interval_s):
            self._arm()
            now = time.monotonic()
            silent_s = (
                silent_s + min(now - last, 2 * self.interval_s) if rounds == self.rounds else 0.0
            )
            rounds, last = self.rounds, now
            if silent_s > self.limit_s and not self.seen.get(0, "").endswith(" end 0"):
                self._report(
                    f"{self._name(0)} ({self.address}) has not answered for {silent_s:.0f} s: the host or the link to it is down"
                )

    def _report(self, reason: str) -> None:
        """One line, then the end of the process: its main thread may be inside a collective that never returns."""
        if self.reporting.acquire(blocking=False):
            # Not through sys.stderr: its lock may be held by a thread that never gives it back. A bar may be on the line.
            os.write(2, f"\nerror: {reason}; {ADVICE}\n".encode())
            os._exit(1)


_running: Watchdog | None = None


def prepare(rank: int, hosts: Sequence[str], token: str, limit_s: float) -> Watchdog:
    """This rank's watchdog with its first beat done, not started: `begin` starts it once all ranks are here."""
    watchdog = Watchdog(rank, hosts, token, limit_s)
    watchdog.first_beat()
    return watchdog


def begin(watchdog: Watchdog) -> None:
    """Starts the threads. Until `stop`, the process ends with exit code 1 if another rank is gone."""
    global _running
    _running = watchdog
    watchdog.start()


def stop(code: int = 0) -> None:
    """The end of this rank with its exit code; nothing without a watchdog. A code other than 0 stops the other ranks."""
    global _running
    if _running is not None:
        watchdog, _running = _running, None
        watchdog.stop(code)


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process is gone: torch's own types, or gloo's words in a RuntimeError."""
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and LOST.search(str(error)) is not None
    )


def lost_connection(error: RuntimeError) -> str | None:
    """One plain line if the error says that another process is gone, else None.

    Waits some seconds for the watchdog to find out which one; it then says so and ends the process.
    """
    if not is_lost(error):
        return None
    if _running is not None:
        _running.wait_for_verdict()
    return f"the connection to another process is lost ({str(error).strip().splitlines()[0]:.200}); {ADVICE}"
