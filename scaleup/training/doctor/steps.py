"""Steps with a time limit, and the meeting of the processes in the run's TCPStore.

No step can hang the doctor: each runs in a thread of its own, and after its time limit the doctor
goes on without it. The processes exchange their reports through the store, which works where a
collective does not.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import DistError, PrefixStore, TCPStore

from scaleup.errors import ConfigError, RunError, ScaleupError, one_line
from scaleup.training import interfaces

Result = TypeVar("Result")
POLL_S = 0.2
ABSENT = "never came"  # stands for the host of a process that has not joined


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among those of the job, as its launcher says."""

    rank: int
    local_rank: int
    size: int
    address: str
    port: int

    @property
    def name(self) -> str:
        return f"rank {self.rank} on host {socket.gethostname()}"


def place() -> Place:
    """Return the place of this process, under torchrun, srun or alone.

    Raises:
        ConfigError: the launcher's variables make no sense.
    """
    _take_over_srun()
    if "MASTER_ADDR" not in os.environ or "RANK" not in os.environ:
        return Place(0, 0, 1, "127.0.0.1", 29500)
    return Place(
        rank=_number("RANK", 0),
        local_rank=_number("LOCAL_RANK", 0),
        size=_number("WORLD_SIZE", 1),
        address=os.environ["MASTER_ADDR"],
        port=_number("MASTER_PORT", 29500),
    )


def _number(variable: str, default: int) -> int:
    """Return the number in an environment variable."""
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise ConfigError(f"{variable}: {text!r} is not a number; unset it, or correct it")
    return int(text)


def _take_over_srun() -> None:
    """Set the variables of a launcher in a task of srun, as launch/slurm/train.sbatch does."""
    env = os.environ
    if "RANK" in env or _number("SLURM_STEP_NUM_TASKS", 1) < 2:
        return
    words = ["scontrol", "show", "hostnames", env.get("SLURM_STEP_NODELIST", "")]
    try:
        shown = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
        first = shown.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        reason = one_line(error, 200)
        raise ConfigError(f"scontrol does not name the hosts of this step: {reason}") from error
    env.setdefault("MASTER_ADDR", first)
    env.setdefault("MASTER_PORT", str(10000 + _number("SLURM_JOB_ID", 0) % 20000))
    env |= {"RANK": env["SLURM_PROCID"], "LOCAL_RANK": env["SLURM_LOCALID"]}
    env["WORLD_SIZE"] = env["SLURM_STEP_NUM_TASKS"]


class Meeting:
    """The processes of the job, as they meet in the store of MASTER_ADDR:MASTER_PORT.

    Attributes:
        failed: is set once a process has left the steps that all take together.
    """

    def __init__(self, place: Place, limit_s: float):
        self.place, self.limit_s = place, limit_s
        self.failed = threading.Event()
        self.hosts = [socket.gethostname()]  # by rank, once all processes have met
        self._over = threading.Event()
        self._store: Any = None
        self._server: TCPStore | None = None
        self._listener: threading.Thread | None = None

    @property
    def alone(self) -> bool:
        return self.place.size == 1

    def connection(self, name: str) -> PrefixStore:
        """Open a connection of its own to the store, for keys that begin with `name`."""
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"scaleup-doctor/{restart}/{name}", self._connect(False))

    def _connect(self, holds: bool) -> TCPStore:
        address, port = self.place.address, self.place.port
        limit = timedelta(seconds=self.limit_s)
        try:
            return TCPStore(address, port, None, holds, limit, wait_for_workers=False)
        except (DistError, OSError, RuntimeError) as error:
            what = "listen there" if holds else "reach rank 0 there"
            raise RunError(
                f"MASTER_ADDR:MASTER_PORT is {address}:{port}, and {self.place.name} cannot {what}"
                f" ({one_line(error, 200)})"
            ) from error

    def open(self) -> None:
        """Join the others. Rank 0 holds the store, unless torchrun does."""
        if self.alone:
            return
        if self.place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            self._server = self._connect(True)
        self._store = self.connection("meeting")
        self._store.set(f"host/{self.place.rank}", self.hosts[0])
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def wait_for_all(self) -> None:
        """Wait until every process has joined.

        Raises:
            RunError: names the ranks that have not come.
        """
        if self.alone:
            return
        deadline = time.monotonic() + self.limit_s
        ranks = range(self.place.size)
        while missing := [r for r in ranks if not self._store.check([f"host/{r}"])]:
            if time.monotonic() > deadline:
                names = ", ".join(map(str, missing[:8])) + ", …" * (len(missing) > 8)
                plural = "s" * (len(missing) > 1)
                raise RunError(
                    f"{len(missing)} of {self.place.size} processes have not connected to"
                    f" {self.place.address}:{self.place.port} within {self.limit_s:g} s:"
                    f" rank{plural} {names}; start them, or find out why they ended (each prints"
                    " its own errors)"
                )
            time.sleep(POLL_S)
        self.hosts = [self._store.get(f"host/{rank}").decode() for rank in ranks]

    def _listen(self) -> None:
        store = self.connection("meeting")
        try:
            while not self._over.wait(POLL_S):
                if store.check(["failed"]):
                    self.failed.set()
        except DistError:
            self.failed.set()

    def note(self, step: str) -> None:
        """Let the others know which step this process takes."""
        if self._store is not None:
            self._store.set(f"at/{self.place.rank}", step)

    def fail(self) -> None:
        """Let the others know that this process takes no more steps together with them."""
        self.failed.set()
        if self._store is not None:
            self._store.set("failed", self.place.name)

    def exchange(self, report: dict[str, Any]) -> list[dict[str, Any]]:
        """Give this process's report. Rank 0 gets those of all, in the order of ranks.

        In place of a report that does not come within twice the time limit there is one that says
        so. Other ranks get an empty list.
        """
        if self._store is None:
            return [report]
        self._store.set(f"report/{self.place.rank}", json.dumps(report))
        if self.place.rank:
            return []
        # A process may have to wait for one more step before it reports.
        deadline = time.monotonic() + 2 * self.limit_s
        reports = []
        for rank in range(self.place.size):
            while not (there := self._store.check([f"report/{rank}"])):
                if time.monotonic() > deadline:
                    break
                time.sleep(POLL_S)
            if there:
                reports.append(json.loads(self._store.get(f"report/{rank}")))
            else:
                reports.append(self._absent(rank))
        return reports

    def _absent(self, rank: int) -> dict[str, Any]:
        if not self._store.check([f"host/{rank}"]):
            return {"rank": rank, "host": ABSENT, "problems": []}  # `wait_for_all` has named it
        host = self._store.get(f"host/{rank}").decode()
        there = self._store.check([f"at/{rank}"])
        step = self._store.get(f"at/{rank}").decode() if there else "the start"
        problem = f"rank {rank} has not reported; its last step was: {step}"
        return {"rank": rank, "host": host, "problems": [problem]}

    def agree(self, code: int | None) -> int:
        """Return the exit code of rank 0, which passes it as `code`, in every process."""
        if self._store is None:
            return code or 0
        if code is not None:
            self._store.set("code", str(code))
            deadline = time.monotonic() + self.limit_s / 2
            while self._store.add("read", 0) < self.place.size - 1 and time.monotonic() < deadline:
                time.sleep(POLL_S)  # the store may end with this process
            return code
        # Rank 0 may wait for one process that is missing, and then has to predict.
        self._store.wait(["code"], timedelta(seconds=4 * self.limit_s))
        agreed = int(self._store.get("code"))
        self._store.add("read", 1)
        return agreed

    def close(self) -> None:
        """End the thread, which would abort a process that leaves it in the store."""
        self._over.set()
        if self._listener is not None:
            self._listener.join(timeout=5 * POLL_S)


class Steps:
    """Runs functions one after another, each with a time limit.

    Attributes:
        problems: what the user has to change, one sentence each.
        stuck: whether a thread of this process still waits for something.
    """

    def __init__(self, meeting: Meeting, limit_s: float):
        self.meeting, self.limit_s = meeting, limit_s
        self.problems: list[str] = []
        self.stuck = False

    def run(
        self,
        name: str,
        waits_for: str,
        function: Callable[[], Result],
        together: bool = False,
        factor: float = 1.0,
    ) -> Result | None:
        """Return what `function` returns, or None if it fails, is left out or takes too long.

        Args:
            name: of the step, for the screen.
            waits_for: what a step that takes too long has waited for.
            together: all processes take this step, so it is left out once one of them has failed.
            factor: multiplies the time limit.
        """
        if together and self.meeting.failed.is_set():
            return None
        if self.meeting.place.rank == 0:
            print(f"doctor: {name}", file=sys.stderr, flush=True)
        outcome: list[Any] = []
        ended = threading.Event()

        def work() -> None:
            try:
                self.meeting.note(name)
                outcome.append(function())
            except BaseException as error:
                outcome.append(_Failure(error))
            ended.set()

        threading.Thread(target=work, name=name, daemon=True).start()
        limit_s = factor * self.limit_s
        deadline = time.monotonic() + limit_s
        while not ended.wait(POLL_S):
            if together and self.meeting.failed.is_set() and not ended.wait(5 * POLL_S):
                self.stuck = True  # another process has said why
                return None
            if time.monotonic() > deadline:
                self.stuck = True
                self.problems.append(f"{name}: waited {limit_s:g} s for {waits_for}")
                self._leave(together)
                return None
        if not isinstance(outcome[0], _Failure):
            return outcome[0]
        self.problems += _described(name, outcome[0].error)
        self._leave(together)
        return None

    def _leave(self, together: bool) -> None:
        if together:
            threading.Thread(target=self.meeting.fail, daemon=True).start()


@dataclasses.dataclass
class _Failure:
    error: BaseException


def _described(name: str, error: BaseException) -> list[str]:
    """Return the problems that an error stands for."""
    if isinstance(error, ConfigError):
        return error.problems
    if isinstance(error, ScaleupError):
        return [str(error)]
    if isinstance(error, RuntimeError) and "gloo" in str(error).lower():
        return [f"{name}: {interfaces.problem(error)}"]
    return [f"{name}: {type(error).__name__}: {one_line(error, 300)}"]
