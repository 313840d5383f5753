"""The doctor's steps, meeting and report, and the whole command in one process."""

import pathlib
import socket
import threading
import time

import pytest
import torch

from scaleup.cli import main
from scaleup.errors import ConfigError, RunError
from scaleup.memory.plan import make_plan
from scaleup.settings.schema import load
from scaleup.training.distributed import World
from scaleup.training.doctor import estimates, examination, host, report, steps
from scaleup.training.doctor.network import Transfer
from tests.utils.workspace import make_workspace, overrides

LAUNCHER = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in (*LAUNCHER, "SLURM_STEP_NUM_TASKS", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> pathlib.Path:
    return make_workspace(tmp_path_factory.mktemp("doctor"))


def meetings(size: int, limit_s: float = 1.0) -> list[steps.Meeting]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = [steps.Place(rank, rank, size, "127.0.0.1", port) for rank in range(size)]
    return [steps.Meeting(place, limit_s) for place in places]


def alone(limit_s: float = 0.5) -> steps.Steps:
    return steps.Steps(meetings(1)[0], limit_s)


def test_a_step_that_takes_too_long_is_given_up_and_says_what_it_waited_for():
    runner, release = alone(), threading.Event()
    begin = time.monotonic()
    assert runner.run("clocks", "the other processes", release.wait) is None
    assert time.monotonic() - begin < 10 and runner.stuck
    assert runner.problems == ["clocks: waited 0.5 s for the other processes"]
    release.set()
    assert runner.run("next", "nothing", lambda: 3) == 3  # the next step is taken all the same


def test_errors_of_a_step_become_problems_and_end_only_the_steps_of_all_processes():
    runner = alone()

    def refuse():
        raise ConfigError(["a: 1", "b: 2"])

    assert runner.run("config", "files", refuse) is None
    assert runner.run("gloo", "others", lambda: 1 // 0, together=True) is None
    assert runner.problems[:2] == ["a: 1", "b: 2"] and not runner.stuck
    assert runner.problems[2].startswith("gloo: ZeroDivisionError: ")
    runner.meeting.failed.wait(5)
    assert runner.run("vote", "others", lambda: 1, together=True) is None
    assert runner.run("disk", "the disk", lambda: 1) == 1 and len(runner.problems) == 3


def test_processes_that_do_not_come_are_named_and_the_reports_of_the_others_are_printed():
    first, second, _missing = meetings(3)
    first.open()
    second.open()
    with pytest.raises(
        RunError, match=r"1 of 3 processes have not connected .*: rank 2; start them"
    ):
        second.wait_for_all()
    second.note("disk")
    assert second.exchange({"rank": 1}) == []
    reports = first.exchange({"rank": 0})
    assert reports == [{"rank": 0}, {"rank": 1}, {"rank": 2, "host": steps.ABSENT, "problems": []}]
    for meeting in (first, second):
        meeting.close()


def test_a_process_that_does_not_report_is_named_with_its_last_step():
    first, second = meetings(2, limit_s=0.5)
    first.open()
    second.open()
    first.wait_for_all()
    second.note("all-reduce")
    (_, absent) = first.exchange({"rank": 0})
    assert absent["problems"] == ["rank 1 has not reported; its last step was: all-reduce"]
    for meeting in (first, second):
        meeting.close()


def test_a_failure_of_one_process_frees_another_from_the_step_that_it_waits_in():
    first, second = meetings(2, limit_s=60)
    first.open()
    second.open()
    runner, release = steps.Steps(first, 60), threading.Event()
    timer = threading.Timer(0.5, second.fail)
    timer.start()
    assert runner.run("broadcast", "others", release.wait, together=True) is None
    assert runner.problems == []  # the other process says why
    release.set()
    for meeting in (first, second):
        meeting.close()


def test_all_processes_end_with_the_exit_code_of_rank_0():
    first, second = meetings(2)
    first.open()
    second.open()
    codes: list[int] = []
    waiting = threading.Thread(target=lambda: codes.append(second.agree(None)))
    waiting.start()
    assert first.agree(1) == 1
    waiting.join(timeout=30)
    assert codes == [1]
    for meeting in (first, second):
        meeting.close()


def test_a_task_of_srun_takes_its_place_from_slurm(monkeypatch, tmp_path):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$3" = "n[1-2]" ] && printf "n1\\nn2\\n"\n')
    scontrol.chmod(0o755)
    for name, value in {
        "PATH": str(tmp_path),
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "71234",
    }.items():
        monkeypatch.setenv(name, value)
    for name in LAUNCHER:
        monkeypatch.setenv(name, "")  # so that what is set here is undone
        monkeypatch.delenv(name)
    assert steps.place() == steps.Place(3, 1, 4, "n1", 21234)


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "WORLD_SIZE", "MASTER_PORT"])
def test_a_variable_of_a_launcher_that_is_no_number_is_named(monkeypatch, name):
    for variable in LAUNCHER:
        monkeypatch.delenv(variable, raising=False)
    if name != "SLURM_STEP_NUM_TASKS":
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv(name, "many")
    with pytest.raises(ConfigError, match=f"{name}: 'many' is not a number; unset it"):
        steps.place()


@pytest.mark.parametrize(
    ("words", "read"),
    [
        ((), "3.91 M in each process + "),
        (("train.deepspeed=zero3",), "3.91 M in one process + "),
        (("train.fsdp=full",), "1000 K in each process"),
        (("train.fsdp=hybrid",), "1.95 M in each process"),
    ],
)
def test_loading_is_estimated_from_what_each_process_reads(workspace, tmp_path, words, read):
    settings = load(None, overrides(workspace, tmp_path / "run", *words))
    plan = make_plan(settings, 4, device="cpu", configured=True, per_host=2)
    transfer = Transfer(10**6, 1.0)
    names = ("all-reduce", "broadcast", "all-gather")
    speeds = estimates.Speeds(1e9, 1e6, 1e6, 1e6, dict.fromkeys(names, transfer))
    line = estimates.estimates(plan, speeds, 4_096_000, 32)[2]
    assert f" to read {read}" in line and line.endswith("broadcast") == ("+" in read)


def test_differences_between_hosts_and_ranks_are_problems():
    packages = {"torch": "2.13", "peft": None}
    reports = [
        {"rank": 0, "host": "n1", "packages": packages, "precision": "bfloat16", "problems": []},
        {"rank": 1, "host": "n2", "packages": packages | {"torch": "2.12"}, "problems": ["x"]},
        {"rank": 2, "host": "n2", "precision": "float32", "problems": ["x"]},
    ]
    for number, identity in ((0, "a"), (1, "b")):
        reports[number]["model"] = {"identity": identity}
    torch_differs, precision, models = report.differences(reports)
    assert torch_differs.startswith("packages: torch differs: 2.13 on n1, 2.12 on n2; ")
    assert "bfloat16 on rank 0, float32 on rank 2" in precision
    assert "the backbones of n1 and n2 differ" in models
    assert report.problems(reports) == ["n2: x"]
    reports[0]["problems"] = ["x"]
    assert report.problems(reports) == ["every host: x"]
    assert report.differences(reports[:1]) == []


def test_a_lock_that_does_not_hold_and_a_wrong_clock_are_problems_of_the_folder():
    good = {"locks": True, "clock": -0.01}
    assert host.check_folder(good, "runs/a") == []
    lock, clock = host.check_folder({"locks": False, "clock": 90.0}, "runs/a")
    assert "locks in runs/a do not hold" in lock and "by 90 s" in clock


def test_the_probe_of_a_folder_leaves_nothing_behind(tmp_path):
    world = World(0, 0, 1, torch.device("cpu"), False)
    settings = examination.Settings.model_validate(
        {"train": {"output_dir": str(tmp_path / "a" / "b")}}
    )
    found = host.output_folder(settings, world)
    assert found["locks"] and found["shared"] and found["writes"]
    assert found["write"] > 0 and found["free"] > 0 and abs(found["clock"]) < 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_alone_measures_and_estimates(workspace, tmp_path, capsys):
    words = overrides(workspace, tmp_path / "run", "train.deepspeed=zero2")
    assert main(["doctor", *words]) == 0
    shown = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in shown.splitlines() if line)
    assert lines["world"] == "1 process on 1 host" and lines["all"] == "is well"
    assert lines["batch"].startswith("16 = 16 per process x 1 processes")
    assert lines["warning:"].startswith("an epoch has 4 steps (64 examples / 16 a step = 4.00")
    assert "locks hold" in lines["folder"] and "float32" in lines["precision"]
    assert " operations; an epoch of 4 steps: " in lines["step"]
    assert "to write and check" in lines["save"] and "to read" in lines["load"]
    assert "all-reduce" not in shown and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("section", "computed"), [({}, "float32"), ({"dtype": "bfloat16"}, "bfloat16")]
)
def test_the_type_of_the_backbone_is_what_a_run_without_mixed_precision_computes_in(
    section, computed
):
    settings = examination.Settings.model_validate({"model": section, "train": {"bf16": False}})
    assert host.precision(settings, torch.device("cpu")) == computed


def test_the_command_lists_what_has_to_change(workspace, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("")
    words = overrides(workspace, tmp_path, f"model.name={tmp_path / 'none'}")
    assert main(["doctor", *words]) == 1
    shown = capsys.readouterr().out
    assert "2 things to change:\n" in shown
    assert f"  - train.output_dir: {tmp_path} is not empty; " in shown
    assert f"  - model.name: no folder {tmp_path / 'none'}; " in shown
    assert "all is well" not in shown


def test_a_hub_that_cannot_be_reached_is_a_problem(monkeypatch, tmp_path):
    """As on a host without internet whose cache is empty."""
    monkeypatch.setattr(host.datasets.config, "HF_DATASETS_CACHE", str(tmp_path))

    def refuse(*_: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(host.huggingface_hub.HfApi, "dataset_info", refuse)
    settings = examination.Settings.model_validate({"data": {"name": "rte"}})
    with pytest.raises(ConfigError, match=r"nyu-mll/glue .*no route to host.*rte/train.parquet"):
        host.data(settings)
    (tmp_path / "nyu-mll___glue").mkdir()
    assert host.data(settings) == "nyu-mll/glue in the cache of datasets"


def test_a_transfer_gives_the_time_of_another_size():
    assert Transfer(size=100, seconds=2.0).time(250) == 5.0
