"""Processes of a run of which one fails before all have met: the others end within a minute.

There is no launcher that would end them, as if each process were on a host of its own.
"""

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from benchmarks.cases import command
from scaleup.training import startup
from tests.utils.workspace import ROOT, environment, make_workspace, overrides

pytestmark = pytest.mark.distributed
# A process that is ready to train, up to the point where it waits for the others.
WAIT = """
import sys
sys.path.insert(0, sys.argv[1])
from scaleup.training import distributed
print("ready", flush=True)
distributed.start(False)
"""
# A process that refuses its configuration.
REFUSE = ["-m", "scaleup", "train", "train.learning_rate=-1"]
STOPPED = "has stopped with an error (its own output says which); stopping"


class Ranks:
    """Processes of one run, each started with its own command."""

    def __init__(self, size: int):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = str(probe.getsockname()[1])
        self.size, self.processes = size, []

    def start(self, rank: int, *words: str) -> subprocess.Popen:
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(self.size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": self.port,
            "SCALEUP_WATCHDOG_S": "5",
        }
        process = subprocess.Popen(
            [sys.executable, *(words or ("-c", WAIT, str(ROOT)))],
            env=environment(**variables),
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.processes.append(process)
        return process


@pytest.fixture
def ranks():
    """Make groups of ranks; no process is left after the test."""
    groups = []

    def make(size: int) -> Ranks:
        groups.append(Ranks(size))
        return groups[-1]

    yield make
    for process in (process for group in groups for process in group.processes):
        process.kill()
        process.communicate()


def end(process: subprocess.Popen, within: float = 60) -> tuple[int, str]:
    """Return the exit code and the error output."""
    _, stderr = process.communicate(timeout=within)
    return process.returncode, stderr


@pytest.mark.parametrize("failing", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_refuses_its_configuration_ends_those_that_wait(ranks, failing):
    group = ranks(2)
    waiting = group.start(1 - failing)
    assert waiting.stdout.readline() == "ready\n"
    code, stderr = end(group.start(failing, *REFUSE), within=120)
    assert code == 2 and "train.learning_rate" in stderr
    code, stderr = end(waiting)
    assert code == 1
    assert f"error: rank {failing} on host {socket.gethostname()} {STOPPED}" in stderr


def test_ranks_that_all_refuse_do_not_wait_for_each_other(ranks):
    group = ranks(2)
    processes = [group.start(rank, *REFUSE) for rank in range(2)]
    for process in processes:
        assert process.stderr.readline().startswith("error: ")
    begin = time.monotonic()
    assert [end(process)[0] for process in processes] == [2, 2]
    assert time.monotonic() - begin < startup.FAREWELL_S - 10


def let_wait(*processes):
    """Return when the processes have been waiting for another rank for some seconds."""
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    time.sleep(8)


@pytest.mark.slow
def test_a_rank_that_is_killed_while_another_is_missing_ends_those_that_wait(ranks):
    """Rank 2 never starts."""
    group = ranks(3)
    waiting, killed = group.start(0), group.start(1)
    let_wait(waiting, killed)
    assert waiting.poll() is None  # a rank that is only slow is waited for
    os.kill(killed.pid, signal.SIGKILL)
    code, stderr = end(waiting)
    assert code == 1 and "error: rank 1 has not been heard from for 5 s; stopping" in stderr


@pytest.mark.slow
def test_a_rank_0_that_is_killed_while_another_is_missing_ends_those_that_wait(ranks):
    group = ranks(3)
    killed, waiting = group.start(0), group.start(1)
    let_wait(waiting, killed)
    os.kill(killed.pid, signal.SIGKILL)
    code, stderr = end(waiting)
    assert code == 1


@pytest.mark.slow  # compiles an extension of DeepSpeed
def test_a_run_that_was_killed_at_its_first_start_of_deepspeed_can_start_again(tmp_path):
    workspace = make_workspace(tmp_path / "workspace")
    words = ["train.max_steps=2", "train.deepspeed=zero2", "train.disable_tqdm=true"]
    arguments = overrides(workspace, tmp_path / "run", *words, "train.resume=auto")
    launch = command(ROOT / "launch" / "train.py", arguments, 2)
    options = {"env": environment(TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions")), "cwd": ROOT}
    first = subprocess.Popen(launch, **options)
    deadline = time.monotonic() + 240
    while not (locks := [*(tmp_path / "extensions").glob("*/lock")]):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    for process in [*psutil.Process(first.pid).children(recursive=True), first]:
        process.kill()
    first.wait()
    for path in locks[0].parent.iterdir():  # as if the next start came later
        os.utime(path, (0, 0))
    again = subprocess.run(launch, capture_output=True, text=True, timeout=580, **options)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"note: {locks[0]}: removed; it was left behind" in again.stdout
    assert (tmp_path / "run" / "results.json").exists()


# Rank 1 comes later than collectives may take.
LATE = """
import sys, time
sys.path.insert(0, sys.argv[1])
from scaleup.training import distributed
world = distributed.start(False, timeout_s=3)
begin = time.monotonic()
time.sleep(7 * world.rank)
distributed.wait_for_all(world)
print(time.monotonic() - begin > 6, distributed.gather(world, world.rank), flush=True)
distributed.leave()
"""


@pytest.mark.slow
def test_processes_wait_for_a_late_one_longer_than_a_collective_may_take(ranks):
    group = ranks(2)
    both = [group.start(rank, "-c", LATE, str(ROOT)) for rank in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [out.splitlines()[-1] for out, _ in outputs] == ["True [0, 1]"] * 2, outputs
