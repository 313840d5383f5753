"""What Accelerate leaves behind, and what is read back from it."""

import multiprocessing
import os
import pathlib
import subprocess
import sys
import time

import psutil
import pytest
import torch

from scaleup import io
from scaleup.training import distributed as runtime

ROOT = pathlib.Path(__file__).resolve().parents[3]
ACCELERATE = str(pathlib.Path(sys.executable).with_name("accelerate"))


def launched(tmp_path, *flags: str, **variables: str) -> str:
    """What a script started by `accelerate launch` reads of its launcher."""
    script = tmp_path / "probe.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom scaleup import runtime\nprint(runtime.launcher())\n"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE", "OMP_"))}
    command = [
        ACCELERATE,
        "launch",
        *flags,
        str(script),
        "--num_processes",
        "7",
        "train.max_steps=1",
    ]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=clean | variables
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("said", "env", "found"),
    [
        (("--num_processes", "3"), {}, "processes=3, machines=1, threads_chosen=False"),
        pytest.param(
            ("--num_processes=1",),
            {"OMP_NUM_THREADS": "1"},
            "processes=1, machines=1, threads_chosen=True",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["three", "one"],
)
def test_the_number_of_processes_comes_from_accelerates_own_arguments(tmp_path, said, env, found):
    assert found in launched(tmp_path, *said, **env)


def test_without_accelerate_there_is_no_launcher(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert runtime.launcher() is None


def test_several_machines_without_ranks_are_refused(monkeypatch):
    monkeypatch.setattr(runtime, "launcher", lambda: runtime.Launcher(4, 2, False))
    with pytest.raises(runtime.ConfigError, match="torchrun"):
        runtime.respawn("script.py", [])


def test_one_process_takes_the_cores_that_nobody_chose(monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        monkeypatch.setattr(runtime, "launcher", lambda: runtime.Launcher(1, 1, True))
        runtime.respawn("script.py", [])
        assert torch.get_num_threads() == 1
        monkeypatch.setattr(runtime, "launcher", lambda: runtime.Launcher(1, 1, False))
        runtime.respawn("script.py", [])
        assert torch.get_num_threads() == os.cpu_count()
    finally:
        torch.set_num_threads(before)


def test_the_environment_names_versions_device_and_commit():
    world = runtime.World(0, 0, 1, torch.device("cpu"), False)
    found = runtime.environment(world)
    assert (
        found["packages"]["torch"] == torch.__version__
        and found["device"].startswith("cpu: ")
        and found["processes"] == 1
    )
    assert runtime.peak_memory_mib(world) > 50


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path):
    fork = multiprocessing.get_context("fork")
    said, held = fork.Queue(), fork.Event()

    def hold(seconds: float) -> None:
        try:
            io.hold(tmp_path)
        except runtime.ConfigError as error:
            said.put(str(error))
            return
        said.put("mine")
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
    assert ["another run is writing into" in said.get(timeout=60) for _ in range(4)] == [
        False,
        False,
        True,
        False,
    ]


def test_a_run_ends_with_the_launcher_that_started_it(tmp_path):
    """`accelerate launch` passes SIGTERM to nobody."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r}); parent = os.getppid()\n"
        "from scaleup import runtime\n"
        "runtime.die_with_launcher(parent); print(os.getpid(), flush=True); time.sleep(60)\n"
    )
    launcher = subprocess.Popen(
        [
            str(pathlib.Path(sys.executable).with_name("accelerate")),
            "launch",
            "-q",
            "--num_processes",
            "1",
            str(script),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    child = int(launcher.stdout.readline())
    launcher.terminate()
    launcher.wait()
    for _ in range(100):
        if not psutil.pid_exists(child):
            break
        time.sleep(0.1)
    assert not psutil.pid_exists(child)
