"""What a process finds out about its launcher, its machine and the folder it writes into."""

import multiprocessing
import os
import pathlib
import subprocess
import sys
import time

import psutil
import pytest
import torch

from scaleup import io, machine
from scaleup.errors import ConfigError
from scaleup.training import distributed
from tests.utils.workspace import environment

ROOT = pathlib.Path(__file__).resolve().parents[3]
ACCELERATE = str(pathlib.Path(sys.executable).with_name("accelerate"))
PROBE = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
parent = os.getppid()
import torch
from scaleup.training import distributed
"""


def launch(tmp_path, code: str, *flags: str, **variables: str) -> subprocess.Popen:
    """Start a script with `accelerate launch` on a machine without GPUs."""
    script = tmp_path / "script.py"
    script.write_text(PROBE + code)
    clean = {k: v for k, v in environment().items() if k not in ("OMP_NUM_THREADS", "MASTER_ADDR")}
    return subprocess.Popen(
        [ACCELERATE, "launch", *flags, str(script), "--num_processes", "7", "train.max_steps=1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean | variables,
    )


@pytest.fixture
def alone(monkeypatch):
    """The variables that `accelerate launch` leaves for a single process."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


def test_several_processes_under_accelerate_on_cpu_are_refused_with_the_script_to_use(tmp_path):
    code = """
try:
    distributed.check_launcher()
except distributed.ConfigError as error:
    print("refused:", error)
"""
    stdout, stderr = launch(tmp_path, code, "--num_processes", "3").communicate(timeout=300)
    assert stdout.startswith("refused: accelerate launch starts several processes only"), stderr
    assert "launch/torchrun.sh" in stdout and stdout.count("\n") == 1


def test_one_process_under_accelerate_on_cpu_takes_all_cores(tmp_path):
    code = "distributed.check_launcher(); print(torch.get_num_threads())"
    stdout, stderr = launch(tmp_path, code, "--num_processes", "1").communicate(timeout=300)
    assert int(stdout) == os.cpu_count(), stderr


def test_several_machines_under_accelerate_on_cpu_are_refused(monkeypatch, alone):
    monkeypatch.setenv("MASTER_ADDR", "n01")
    with pytest.raises(ConfigError, match="torchrun"):
        distributed.check_launcher()


def test_threads_that_the_user_chose_and_processes_with_a_rank_are_left_alone(monkeypatch, alone):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        distributed.check_launcher()
        assert torch.get_num_threads() == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setenv("MASTER_ADDR", "n01")
        distributed.check_launcher()
        monkeypatch.delenv("LOCAL_RANK")
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
        distributed.check_launcher()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_the_environment_names_versions_device_and_commit():
    cpu = torch.device("cpu")
    content = machine.environment(cpu, 1)
    assert content["packages"]["torch"] == torch.__version__
    assert content["device"].startswith("cpu: ") and content["processes"] == 1
    assert machine.peak_memory_mib(cpu) > 50


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path):
    fork = multiprocessing.get_context("fork")
    outcomes, held = fork.Queue(), fork.Event()

    def hold(seconds: float) -> None:
        try:
            io.hold(tmp_path)
        except ConfigError as error:
            outcomes.put(str(error))
            return
        outcomes.put("held")
        held.set()
        time.sleep(seconds)

    def start(seconds: float = 0) -> multiprocessing.Process:
        process = fork.Process(target=hold, args=(seconds,))
        process.start()
        return process

    start().join()
    held.clear()
    holder = start(600)
    assert held.wait(60)
    start().join()
    holder.kill()
    holder.join()
    start().join()
    refused = ["another run is writing into" in outcomes.get(timeout=60) for _ in range(4)]
    assert refused == [False, False, True, False]


def test_a_run_ends_with_the_launcher_that_started_it(tmp_path):
    """`accelerate launch` does not forward SIGTERM."""
    code = (
        "distributed.die_with_launcher(parent); print(os.getpid(), flush=True)\n"
        "import time; time.sleep(60)\n"
    )
    launcher = launch(tmp_path, code, "-q", "--num_processes", "1")
    child = int(launcher.stdout.readline())
    launcher.terminate()
    launcher.wait()
    for _ in range(100):
        if not psutil.pid_exists(child):
            break
        time.sleep(0.1)
    assert not psutil.pid_exists(child)


def test_a_process_without_a_launcher_outlives_its_parent(tmp_path):
    code = (
        "distributed.die_with_launcher(parent)\n"
        "print(os.getpid(), flush=True)\n"
        "import time; time.sleep(60)\n"
    )
    (tmp_path / "script.py").write_text(PROBE + code)
    shell = subprocess.Popen(
        ["bash", "-c", f"{sys.executable} {tmp_path / 'script.py'} & wait"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    child = psutil.Process(int(shell.stdout.readline()))
    shell.kill()
    shell.wait()
    time.sleep(1)
    try:
        assert child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    finally:
        child.kill()
