"""Runs over two hosts with their own network, name and disk, and ranks that die alone."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from benchmarks.two_hosts import NAMES, TwoHosts, ranks, torchrun
from scaleup.training.checkpoint import verify
from tests.utils.workspace import ROOT, environment, losses, make_workspace, overrides

pytestmark = pytest.mark.distributed
# Without dropout, with 16 examples in each step: what 1 x 16 and 2 x 8 compute is the same.
SAME = (
    "train.group_by_length=false",
    "train.lr_scheduler_type=constant",
    "train.warmup_steps=0",
    "train.max_steps=8",
)
TWO = ("train.per_device_train_batch_size=8", "train.disable_tqdm=true")
TRAIN = [sys.executable, str(ROOT / "launch" / "train.py")]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> pathlib.Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def one(workspace, tmp_path_factory) -> list[float]:
    """The losses of one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    result = subprocess.run(
        [*TRAIN, *overrides(workspace, out, *SAME)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return losses(out)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def finish(hosts: TwoHosts, *processes: subprocess.Popen) -> str:
    """Waits for both; what the first host said."""
    for host, process in enumerate(processes):
        assert process.wait(timeout=300) == 0, hosts.output(host)[-3000:]
    return hosts.output(0)


@pytest.mark.slow
def test_zero2_over_two_hosts_with_a_shared_folder_equals_one_process(
    both, workspace, one, tmp_path
):
    """Ranks as srun's wrapper sets them; the rendezvous goes over the link, by host name."""
    words = overrides(workspace, tmp_path / "run", *SAME, *TWO, "train.deepspeed=zero2")
    said = finish(
        both, *(both.start(host, [*TRAIN, *words], **ranks(host, 29500)) for host in (0, 1))
    )
    assert losses(tmp_path / "run") == pytest.approx(one, abs=1e-5)
    for line in (
        "world      2 processes on 2 hosts",
        "n01: rank 0 cpu",
        "n02: rank 1 cpu",
        "8 per process x 2 processes",
        "shared by all hosts",
    ):
        assert line in said, said
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")] == [
        ".lock"
    ]
    verify(tmp_path / "run" / "best")


@pytest.mark.slow
def test_zero3_with_a_disk_of_each_host_equals_one_process_and_resumes(
    both, workspace, one, tmp_path
):
    """Each host starts launch/torchrun.sh, and the same path is another disk on each host.

    The run stops after 4 steps and continues to 8.
    """
    for name in ("disk", *NAMES):
        (tmp_path / name).mkdir()
    out = tmp_path / "disk" / "run"
    (tmp_path / "empty.yaml").write_text("")

    def run(*more: str) -> str:
        command = [
            "launch/torchrun.sh",
            str(tmp_path / "empty.yaml"),
            *overrides(workspace, out, *SAME, *TWO, "train.deepspeed=zero3", *more),
        ]
        starts = (
            both.start(
                host,
                command,
                disk=(tmp_path / NAMES[host], tmp_path / "disk"),
                **torchrun(host, 29500),
            )
            for host in (0, 1)
        )
        return finish(both, *starts)

    assert "one on each host" in run("train.max_steps=4")
    first, second = (verify(tmp_path / name / "run" / "checkpoint-4").files for name in NAMES)
    for name in ("training_state.safetensors", "training_state.json"):
        assert first[name] == second[name]
    run("train.resume=auto")
    assert losses(tmp_path / "n01" / "run") == pytest.approx(one, abs=1e-5)
    for bundle in ("best", "final"):
        first, second = (verify(tmp_path / name / "run" / bundle).tensors for name in NAMES)
        assert first == second and len(first) > 20
    assert not list((tmp_path / "disk").iterdir())  # nobody wrote past its own disk


@pytest.mark.slow
def test_a_link_that_goes_down_is_reported_by_both_sides_within_a_minute(both, workspace, tmp_path):
    words = overrides(
        workspace,
        tmp_path / "run",
        *TWO,
        "train.num_train_epochs=5000",
        "train.eval_strategy=steps",
        "train.eval_steps=10000",
    )
    processes = [both.start(host, [*TRAIN, *words], **ranks(host, 29500)) for host in (0, 1)]
    wait_for_steps(tmp_path / "run", both)
    both.cut()
    cut = time.monotonic()
    assert [process.wait(timeout=60) for process in processes] == [1, 1]
    print(f"both sides had stopped {time.monotonic() - cut:.0f} s after the link went down")
    print(both.output(0).splitlines()[-1], both.output(1).splitlines()[-1], sep="\n")
    assert "error: rank 1 on host n02 has not been heard from for " in both.output(0)
    assert "error: " in both.output(1) and "rank 0 on host n01" in both.output(1)
    for host in (0, 1):
        assert (
            "Traceback" not in both.output(host)
            and both.output(host).count("train.resume=auto") == 1
        )


def wait_for_steps(out: pathlib.Path, hosts: TwoHosts | None = None) -> None:
    deadline = time.monotonic() + 180
    while not ((out / "log.jsonl").exists() and '"step": 3' in (out / "log.jsonl").read_text()):
        assert time.monotonic() < deadline, hosts and hosts.output(0)[-3000:]
        time.sleep(0.2)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_rank_is_named_by_the_other_within_a_minute(workspace, tmp_path, victim):
    """Two ranks on one host without a launcher that would stop the other: SIGKILL to one."""
    words = overrides(
        workspace,
        tmp_path / "run",
        *TWO,
        "train.num_train_epochs=5000",
        "train.eval_strategy=steps",
        "train.eval_steps=10000",
    )
    port = str(free_port())
    places = [
        {
            "RANK": str(r),
            "LOCAL_RANK": str(r),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for r in (0, 1)
    ]
    processes = [
        subprocess.Popen(
            [*TRAIN, *words],
            env=environment(**place),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for place in places
    ]
    try:
        wait_for_steps(tmp_path / "run")
        os.kill(processes[victim].pid, signal.SIGKILL)
        _, said = processes[1 - victim].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[1 - victim].returncode == 1
    assert f"rank {victim} on host {socket.gethostname()}" in said and "Traceback" not in said, said
    assert said.count("train.resume=auto") == 1
