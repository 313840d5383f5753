"""`scaleup doctor` with two real processes, on one host and on two with a network of their own."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks.two_hosts import NAMES, TwoHosts, ranks
from tests.utils.workspace import ROOT, environment, make_workspace, overrides

pytestmark = pytest.mark.distributed
DOCTOR = ("-m", "scaleup", "doctor")
# A process whose clock is five minutes ahead.
AHEAD = (
    "import sys, time; real = time.time; time.time = lambda: real() + 300;"
    "from scaleup.cli import main; sys.exit(main(['doctor', *sys.argv[1:]]))"
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> pathlib.Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def lines_of(output: str) -> dict[str, str]:
    """Return the lines of a report by their first words."""
    return dict(line.split(maxsplit=1) for line in output.splitlines() if " " in line)


def test_two_processes_measure_the_network_and_agree_on_the_exit_code(workspace, tmp_path):
    """This takes long because two processes import everything."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words = overrides(workspace, tmp_path / "run", "train.deepspeed=zero3")
    result = subprocess.run(
        [*torchrun, "--master-port", "29533", *DOCTOR, *words],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(PYTHONPATH=str(ROOT)),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    lines = lines_of(result.stdout)
    assert lines["world"] == "2 processes on 1 host"
    assert re.search(r": rank 0 cpu, rank 1 cpu$", lines["host"])
    for name in ("all-reduce", "broadcast", "all-gather"):
        assert re.match(r"[\d.]+ [KMG]/s: [\d.]+ [KM] in ", lines[name]), lines[name]
    assert "one number over gloo" in lines["vote"]
    assert "shared by all hosts, locks hold, writes " in lines["folder"]
    assert re.search(r" for .* operations \+ .* all-gather and .* all-reduce", lines["step"])
    assert "all-gather of the state" in lines["save"]
    assert "in one process" in lines["load"] and lines["all"] == "is well"
    assert not (tmp_path / "run").exists()


def start(hosts: TwoHosts, host: int, words: list[str], **more: str) -> subprocess.Popen:
    return hosts.start(
        host, [sys.executable, *words], **ranks(host, 29500), PYTHONPATH=str(ROOT), **more
    )


WRONG = "cannot connect to the other processes with gloo ("


@pytest.mark.slow
def test_a_run_that_gloo_cannot_connect_ends_at_once_and_names_the_interface_to_set(
    both: TwoHosts, workspace, tmp_path
):
    """On both hosts gloo is told to use an interface that leads nowhere."""
    words = ["-m", "scaleup", "train", *overrides(workspace, tmp_path / "run")]
    processes = [start(both, host, words, GLOO_SOCKET_IFNAME="lo") for host in (0, 1)]
    assert [process.wait(timeout=240) for process in processes] == [1, 1]
    said = [both.output(host) for host in (0, 1)]
    assert any(WRONG in text for text in said)
    for text, name, end in zip(said, NAMES, both.ends):
        if WRONG in text:
            assert f" on host {name} {WRONG}" in text and "GLOO_SOCKET_IFNAME is lo." in text
            assert f"(here probably {end}, which leads to MASTER_ADDR n01)" in text
        else:
            assert "has stopped with an error (its own output says which)" in text
        assert "Traceback" not in text
    assert not (tmp_path / "run").exists()  # before the model is loaded and the folder is made


@pytest.mark.slow
def test_the_doctor_reports_a_network_that_gloo_cannot_use(both: TwoHosts, workspace, tmp_path):
    words = [*DOCTOR, *overrides(workspace, tmp_path / "run")]
    processes = [start(both, host, words, GLOO_SOCKET_IFNAME="lo") for host in (0, 1)]
    assert [process.wait(timeout=300) for process in processes] == [1, 1]
    report = both.output(0)
    assert "world      2 processes on 2 hosts" in report and WRONG in report
    assert "step       no estimate, because a measurement above is missing" in report
    assert "model      n02: folder " in report  # what needs no network is examined all the same


@pytest.mark.slow
def test_two_hosts_with_disks_of_their_own_and_clocks_five_minutes_apart(
    both: TwoHosts, workspace, tmp_path
):
    for name in ("disk", *NAMES):
        (tmp_path / name).mkdir()
    words = overrides(workspace, tmp_path / "disk" / "run")
    for host, command in enumerate([[*DOCTOR, *words], ["-c", AHEAD, *words]]):
        disk = (tmp_path / NAMES[host], tmp_path / "disk")
        environment_ = ranks(host, 29500) | {"PYTHONPATH": str(ROOT)}
        both.start(host, [sys.executable, *command], disk=disk, **environment_)
    assert [process.wait(timeout=300) for process in both.running] == [1, 1]
    report = both.output(0)
    assert "clocks     at most 5 min apart (n02 is ahead of rank 0's host; error " in report
    assert "  - n01: clocks: that of n02 differs by 300 s" in report
    assert report.count("its own, locks hold, writes ") == 2
    assert "the clock of the file system" in report  # of n02, whose own clock is wrong
    assert not any(os.listdir(tmp_path / name) for name in NAMES)


@pytest.mark.slow
def test_a_process_that_never_comes_is_named_within_the_time_limit(workspace, tmp_path):
    words = [*DOCTOR, "--limit", "10", *overrides(workspace, tmp_path / "run")]
    place = ranks(0, 29534) | {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment(**place),
        cwd=tmp_path,
    )
    assert result.returncode == 1
    expected = "1 of 2 processes have not connected to 127.0.0.1:29534 within 10 s: rank 1;"
    assert expected in result.stdout
