"""What processes find out about each other at the start: hosts, and whose folder the output folder is."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
import torch

from scaleup.training.console import placement
from scaleup.training.distributed import World, gather, hosts, shares_folder

ROOT = pathlib.Path(__file__).resolve().parents[3]

# Three processes, each the first of its host as far as it knows; where each one's folder is, as if it were one path.
SCRIPT = """
import json, pathlib, sys
sys.path.insert(0, sys.argv[1])
from scaleup.training import distributed as runtime
from scaleup.training import watchdog
world = runtime.start(False)
told = {"hosts": runtime.hosts(world)}
for name, places in (("shared", "aaa"), ("own", "bcd"), ("mixed", "eef")):
    folder = pathlib.Path(sys.argv[2], places[world.rank])
    try:
        told[name] = runtime.shares_folder(world, folder, wait_s=1.0)
    except runtime.ConfigError as error:
        told[name] = str(error)
    if name == "own":
        (folder / "deep").mkdir()
        if world.main:
            (folder / "a.bin").write_bytes(bytes(range(256)) * 50), (folder / "empty").touch()
        runtime.copy_from_first(world, folder, chunk=1000)
print(json.dumps(told))
watchdog.stop()
"""


@pytest.mark.distributed
def test_processes_find_out_whose_folder_the_output_folder_is(tmp_path):
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
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    for stdout, _ in said:
        told = json.loads(stdout.splitlines()[-1])
        assert told["hosts"] == [[socket.gethostname(), "cpu"]] * 3
        assert (
            told["shared"] is True
            and told["own"] is False
            and "shared by some processes only" in told["mixed"]
        )
    left = {name: sorted(path.name for path in (tmp_path / name).iterdir()) for name in "abcdef"}
    copied = ["a.bin", "deep", "empty"]
    assert left == {"a": [], "b": copied, "c": copied, "d": copied, "e": [], "f": []}
    for name in "bcd":
        assert (tmp_path / name / "a.bin").read_bytes() == bytes(range(256)) * 50 and (
            tmp_path / name / "empty"
        ).read_bytes() == b""


def test_one_process_asks_nobody(tmp_path):
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
