"""The watchdog with plain processes: what it reports, what it tolerates, and a normal end."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from scaleup.errors import ConfigError
from scaleup.training import watchdog

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT = 6.0  # seconds; the interval is a tenth

# Ranks without a process group: they meet through the store alone. Importing takes seconds, so they
# are forked from one process that has imported torch and only the watchdog of this package. A line
# of JSON starts three ranks, and the process answers with their pids.
NURSERY = """
import ctypes, datetime, json, os, sys, time, types
sys.modules["scaleup"] = package = types.ModuleType("scaleup")
package.__path__ = [sys.argv[1] + "/scaleup"]
from torch.distributed import TCPStore
from scaleup.training import watchdog

def live(rank, what, seconds, limit, port):
    os.environ["MASTER_PORT"] = port
    minute = datetime.timedelta(seconds=60)
    meet = TCPStore("127.0.0.1", int(port), None, rank == 0, minute, wait_for_workers=False)
    made = watchdog.Watchdog(rank, ["n01", "n01", "n02"], "token", limit)
    meet.add("here", 1)
    while meet.add("here", 0) < 3: time.sleep(0.05)
    watchdog.begin(made)
    code = 0
    if what == "hold":                       # the interpreter lock is held all the time
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))
    elif what == "fail":
        code = 3
    elif what == "lost":                     # gloo noticed a closed connection
        time.sleep(seconds)
        error = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
        print("error:", watchdog.lost_connection(error), file=sys.stderr)
        code = 1
    else:
        time.sleep(seconds)
    watchdog.stop(code)
    sys.stderr.flush()
    os._exit(code)

for line in sys.stdin:
    wanted = json.loads(line)
    pids = []
    for rank, (what, seconds) in enumerate(wanted["whats"]):
        group, told = os.pipe()
        if os.fork() == 0:                   # stays to see how its rank ends
            pid = os.fork()
            if pid == 0:
                file = open(f"{wanted['folder']}/{rank}.err", "wb")
                os.dup2(file.fileno(), 2)
                live(rank, what, seconds, wanted["limit"], wanted["port"])
            os.write(told, str(pid).encode())
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with open(f"{wanted['folder']}/{rank}.part", "w") as file: file.write(str(code))
            os.rename(f"{wanted['folder']}/{rank}.part", f"{wanted['folder']}/{rank}.code")
            os._exit(0)
        pids.append(int(os.read(group, 20)))
        os.close(group), os.close(told)
    print(json.dumps(pids), flush=True)
"""


class Ranks:
    """Three ranks, each with its own task."""

    def __init__(
        self,
        nursery: subprocess.Popen,
        folder: pathlib.Path,
        *whats: tuple[str, float],
        limit: float = LIMIT,
    ):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.folder = folder
        nursery.stdin.write(
            json.dumps({"whats": whats, "limit": limit, "port": port, "folder": str(folder)}) + "\n"
        )
        nursery.stdin.flush()
        self.pids = json.loads(nursery.stdout.readline())
        self.began = time.monotonic()

    def signal(self, rank: int, number: int, after: float = 1.5) -> None:
        """Sends a signal once the ranks have met, `after` seconds from now."""
        time.sleep(after)
        os.kill(self.pids[rank], number)
        self.began = time.monotonic()

    def end(self, *ranks: int, within: float) -> list[tuple[int, str]]:
        """Return exit code and error lines of each rank, without torch's own warnings."""
        found = []
        for rank in ranks:
            code = self.folder / f"{rank}.code"
            while not code.exists():
                assert time.monotonic() - self.began < within, (
                    f"rank {rank} still runs after {within} s"
                )
                time.sleep(0.05)
            stderr = (self.folder / f"{rank}.err").read_text()
            found.append(
                (
                    int(code.read_text()),
                    "\n".join(line for line in stderr.splitlines() if line.startswith("error")),
                )
            )
        return found


@pytest.fixture(scope="module")
def nursery():
    """The process that forks ranks."""
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    env.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    with subprocess.Popen(
        [sys.executable, "-c", NURSERY, str(ROOT)],
        env=env,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        yield process
        process.kill()


@pytest.fixture
def ranks(nursery, tmp_path):
    """Starts ranks; none is left after the test."""
    made = []

    def start(*whats, **more) -> Ranks:
        made.append(Ranks(nursery, tmp_path, *whats, **more))
        return made[-1]

    yield start
    for group in made:
        for rank, pid in enumerate(group.pids):
            if not (tmp_path / f"{rank}.code").exists():
                os.kill(pid, signal.SIGKILL)


def test_a_normal_end_says_nothing_whoever_is_first(ranks):
    """Rank 0, which holds the store, is done long before the others and then waits for them."""
    group = ranks(("run", 0.1), ("run", 3), ("run", 6))
    assert group.end(0, 1, 2, within=20) == [(0, "")] * 3


def test_a_killed_rank_is_named_by_all_others_within_the_limit(ranks):
    group = ranks(*[("run", 60)] * 3)
    group.signal(2, signal.SIGKILL)
    for code, line in group.end(0, 1, within=LIMIT + 6):
        assert code == 1
        assert line.startswith(
            "error: rank 2 on host n02 has not been heard from for "
        ) and line.endswith("Continue with train.resume=auto")


def test_a_killed_rank_0_takes_the_store_along_and_is_named(ranks):
    group = ranks(*[("run", 60)] * 3)
    group.signal(0, signal.SIGKILL)
    for code, line in group.end(1, 2, within=LIMIT + 6):
        assert code == 1 and "rank 0 on host n01" in line and "is lost; stopping" in line


def test_a_stopped_rank_0_whose_store_does_not_answer_is_named(ranks):
    """The calls of the others block, as behind a dead link."""
    group = ranks(*[("run", 60)] * 3)
    group.signal(0, signal.SIGSTOP)
    for code, line in group.end(1, 2, within=2 * LIMIT + 6):
        assert code == 1 and "rank 0 on host n01" in line


@pytest.mark.parametrize(
    "failing, words",
    [(1, "rank 1 on host n01 has stopped with an error"), (0, "rank 0 on host n01")],
)
def test_a_rank_that_fails_alone_stops_the_others(ranks, failing, words):
    group = ranks(*[("fail", 0) if rank == failing else ("run", 60) for rank in range(3)])
    (own, nothing), *others = group.end(failing, *({0, 1, 2} - {failing}), within=LIMIT + 6)
    assert (own, nothing) == (3, "")
    for code, line in others:
        assert code == 1 and words in line


def test_an_error_of_all_ranks_ends_each_with_its_own_code(ranks):
    group = ranks(*[("fail", 0)] * 3)
    assert group.end(0, 1, 2, within=LIMIT + 6) == [(3, "")] * 3


def test_after_a_lost_connection_the_dead_rank_is_named_sooner(ranks):
    group = ranks(("lost", 2), ("lost", 2), ("run", 90), limit=30)
    group.signal(2, signal.SIGKILL)
    for code, line in group.end(0, 1, within=25):
        assert code == 1 and line.startswith(
            "error: rank 2 on host n02 has not been heard from for "
        )
        assert line.count("\n") == 0


def test_a_lost_connection_among_the_living_is_told_as_it_came(ranks):
    group = ranks(*[("lost", 0.5)] * 3)
    for code, line in group.end(0, 1, 2, within=30):
        assert (
            code == 1
            and "Connection closed by peer" in line
            and "the connection to another process is lost" in line
        )


def test_a_held_interpreter_lock_is_tolerated_below_the_limit(ranks):
    group = ranks(("run", 7), ("hold", 0.7 * LIMIT), ("run", 7))
    assert group.end(0, 1, 2, within=25) == [(0, "")] * 3


def test_a_lock_that_is_never_given_back_ends_the_process(ranks):
    """Neither thread can run there; the others name it, and its own timer ends it."""
    group = ranks(("run", 60), ("hold", 60), ("run", 60))
    (code, line), (other, _) = group.end(0, 1, within=2 * LIMIT + 8)
    assert (code, other) == (1, 1) and "rank 1 on host n01 has not been heard from" in line


def test_only_errors_of_the_network_are_explained():
    assert watchdog.lost_connection(RuntimeError("CUDA out of memory")) is None
    assert (
        watchdog.lost_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    )
    line = watchdog.lost_connection(
        RuntimeError(
            "[../third_party/gloo/gloo/transport/tcp/pair.cc:547]"
            " Connection closed by peer [10.0.0.2]:4711"
        )
    )
    assert "[10.0.0.2]:4711" in line and "train.resume=auto" in line


@pytest.mark.parametrize("text, seconds", [("30", 30.0), ("0", 0.0), ("3.5", 3.5)])
def test_the_limit_comes_from_the_environment(monkeypatch, text, seconds):
    monkeypatch.setenv(watchdog.VARIABLE, text)
    assert watchdog.limit_from_environment() == seconds


@pytest.mark.parametrize("text", ["", "soon", "-1", "1", "inf", "nan"])
def test_a_limit_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv(watchdog.VARIABLE, text)
    with pytest.raises(ConfigError, match=watchdog.VARIABLE):
        watchdog.limit_from_environment()
