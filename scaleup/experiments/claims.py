"""Who runs what: a claim for each trial of a sweep, so that no two sweeps on the same folder run the same one.

    claims = Claims(output)
    if claims.take(name): …                  the claim names this process
    claims.hand_over(name, pid)              and the process of the run, which may outlive it
    claims.release(name)

A claim is a file, OUTPUT/.claims/<name>.json, with a host and the processes that stand behind it. It is live as long as one of
them is. What a killed sweep left is taken over once its processes are gone. Those of another host cannot be looked at from
here: their sweep touches its claims every BEAT_S seconds, and after STALE_S without that they are taken over. (If only the sweep died there
and its run goes on, the run's own lock in its folder keeps a second one out.)
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator

import psutil

from scaleup.io import write_json

BEAT_S = 60
STALE_S = 900


@dataclasses.dataclass(frozen=True)
class Claim:
    """processes: (pid, when it started, seconds since 1970) of the sweep and, once there is one, of the run. age: seconds since the last sign of it."""

    host: str
    processes: tuple[tuple[int, float], ...]
    age: float

    @property
    def here(self) -> bool:
        """Whether its processes can be looked at."""
        return self.host == socket.gethostname()

    @property
    def live(self) -> bool:
        return any(map(_lives, self.processes)) if self.here else self.age < STALE_S

    @property
    def orphan(self) -> bool:
        """A run on this host whose sweep is gone."""
        return self.here and not _lives(self.processes[0]) and any(map(_lives, self.processes[1:]))


class Claims:
    """The claims below one folder."""

    def __init__(self, output: pathlib.Path):
        """Raises OSError where the folder cannot be made."""
        self.folder = output / ".claims"
        self.folder.mkdir(parents=True, exist_ok=True)

    def take(self, name: str) -> bool:
        """Whether the trial is this process's now. False: somebody else has it."""
        with self._alone():
            before = self.of(name)
            if before is not None and before.live:
                return False
            self._write(name, [os.getpid()])
        return True

    def hand_over(self, name: str, pid: int) -> None:
        """The claim lives on with the process `pid`."""
        with self._alone():
            self._write(name, [os.getpid(), pid])

    def beat(self, names: list[str]) -> None:
        """A sign that this process lives, on those of these claims that are still its own."""
        with self._alone():
            for name in filter(self.own, names):
                os.utime(self.folder / f"{name}.json")

    def release(self, name: str) -> None:
        """Unless it is somebody else's by now."""
        with self._alone():
            if self.own(name):
                (self.folder / f"{name}.json").unlink()

    def own(self, name: str) -> bool:
        """Whether the claim is this process's. One that was suspended for STALE_S finds another host's where its own was."""
        found = self.of(name)
        return found is not None and found.here and found.processes[0][0] == os.getpid()

    def of(self, name: str) -> Claim | None:
        """The claim of a trial, live or not; None also for one that a machine without power has left half written."""
        path, now = self.folder / f"{name}.json", self.folder / "now"
        try:
            found, seen = json.loads(path.read_text(encoding="utf-8")), path.stat().st_mtime
            host, processes = (
                found["host"],
                tuple((int(pid), float(started)) for pid, started in found["processes"]),
            )
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        now.touch()  # by the clock of whoever keeps the files, as the claim's own time is
        return Claim(host, processes, now.stat().st_mtime - seen)

    def _write(self, name: str, pids: list[int]) -> None:
        processes = [[pid, psutil.Process(pid).create_time()] for pid in pids]
        write_json(
            self.folder / f"{name}.json", {"host": socket.gethostname(), "processes": processes}
        )

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time, also over NFS; the kernel lets go of the lock when its holder dies."""
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _lives(process: tuple[int, float]) -> bool:
    """A process number is used again after a while; the time of its start tells the two apart (a clock that is set moves it a little)."""
    pid, started = process
    try:
        found = psutil.Process(pid)
        return abs(found.create_time() - started) < 60 and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
