"""What processes learn about each other at the start: hosts, and who shares the output folder."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
import torch

from scaleup.settings.schema import TrainSettings
from scaleup.training.console import placement
from scaleup.training.distributed import World, gather, host_problems, hosts, shares_folder

ROOT = pathlib.Path(__file__).resolve().parents[3]

# Started in three processes, each with LOCAL_RANK 0. Each process has its own folders, as if they
# were the same path on three hosts.
SCRIPT = """
import json, pathlib, sys
sys.path.insert(0, sys.argv[1])
from scaleup.training import distributed as runtime
from scaleup.training import watchdog
world = runtime.start(False)
answers = {"hosts": runtime.hosts(world)}
for name, places in (("shared", "aaa"), ("separate", "bcd"), ("mixed", "eef")):
    folder = pathlib.Path(sys.argv[2], places[world.rank])
    try:
        answers[name] = runtime.shares_folder(world, folder, wait_s=1.0)
    except runtime.ConfigError as error:
        answers[name] = str(error)
    if name == "separate":
        (folder / "deep").mkdir()
        if world.main:
            (folder / "a.bin").write_bytes(bytes(range(256)) * 50), (folder / "empty").touch()
        runtime.copy_from_first(world, folder, chunk=1000)
print(json.dumps(answers))
watchdog.stop()
"""


@pytest.mark.distributed
@pytest.mark.slow
def test_processes_detect_which_of_them_share_the_output_folder(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {
        "WORLD_SIZE": "3",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(ROOT), str(tmp_path)],
            env=os.environ | shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    for stdout, _ in outputs:
        answers = json.loads(stdout.splitlines()[-1])
        assert answers["hosts"] == [[socket.gethostname(), "cpu"]] * 3
        assert answers["shared"] is True and answers["separate"] is False
        assert "shared by some processes only" in answers["mixed"]
    contents = {
        name: sorted(path.name for path in (tmp_path / name).iterdir()) for name in "abcdef"
    }
    copied = ["a.bin", "deep", "empty"]
    assert contents == {"a": [], "b": copied, "c": copied, "d": copied, "e": [], "f": []}
    for name in "bcd":
        assert (tmp_path / name / "a.bin").read_bytes() == bytes(range(256)) * 50
        assert (tmp_path / name / "empty").read_bytes() == b""


def test_a_single_process_needs_no_communication(tmp_path):
    world = World(0, 0, 1, torch.device("cpu"), False)
    assert shares_folder(world, tmp_path / "none") and not (tmp_path / "none").exists()
    assert gather(world, 3) == [3] and hosts(world) == [(socket.gethostname(), "cpu")]
    assert world.local_main and world.writes(True) and world.writes(False)


def test_the_screen_names_the_device_of_every_rank():
    lines = placement(
        [("n01", "cuda:0 (H200)"), ("n01", "cuda:1 (H200)"), ("n02", "cuda:0 (H200)")]
    )
    assert lines == [
        "world      3 processes on 2 hosts",
        "host       n01: rank 0 cuda:0 (H200), rank 1 cuda:1 (H200)",
        "host       n02: rank 2 cuda:0 (H200)",
    ]


def test_a_gpu_cannot_be_declined_by_a_setting():
    world = World(0, 0, 1, torch.device("cuda"), deepspeed=False)
    (problem,) = host_problems(TrainSettings(use_cpu=True), world)
    assert problem.startswith("train.use_cpu: ") and "CUDA_VISIBLE_DEVICES=" in problem
    assert (
        host_problems(TrainSettings(use_cpu=True), World(0, 0, 1, torch.device("cpu"), False)) == []
    )
