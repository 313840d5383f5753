"""Running sweeps: locks, failures, stops and kills, with a stand-in for training or real runs."""

import collections
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import sys
import threading
import time

import psutil
import pytest
from filelock import FileLock, Timeout

from scaleup.cli import main
from scaleup.experiments import grid, results, sweep
from scaleup.experiments.grid import Sweep, Trial
from scaleup.experiments.sweep import Sweeper
from scaleup.settings import schema as config
from scaleup.settings.schema import to_yaml
from scaleup.training import run as train
from scaleup.training.signals import SAVE_SIGNALS
from tests.utils.sweeps import sweep_file
from tests.utils.workspace import make_workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> pathlib.Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


# With a stand-in for training

FAKE = """
import fcntl, json, os, pathlib, signal, sys, time
(out,) = (word for word in sys.argv if word.startswith("train.output_dir="))
out = pathlib.Path(out.partition("=")[2])
def note(what):
    with (out.parent / "journal").open("a") as file:
        gpu, threads = (os.environ.get(key) for key in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"))
        print(json.dumps([what, out.name, time.time(), gpu, threads]), file=file)
lock = (out / ".lock").open("w")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as training does
def stop(*_):
    note("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
plan = json.loads((out.parent / "plan.json").read_text()).get(out.name, {})
note("start")
(out / "checkpoint-1").mkdir(exist_ok=True)
(out / "best").mkdir(exist_ok=True)
time.sleep(plan.get("seconds", 0.05))
starts = (out.parent / "journal").read_text().count(f'"start", "{out.name}"')
if starts <= plan.get("failures", 0):
    print("error: no luck")
    sys.exit(1)
(out / "results.json").write_text("{}")
(out / "timing.json").write_text(json.dumps({"seconds": 7.0, "peak_memory_mib": 100.0}))
note("end")
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Return a function that makes a sweep of stand-ins; `plan`: trial -> seconds, failures."""
    monkeypatch.setattr(sweep, "check_same_run", lambda settings, folder: None)

    def make(count: int, keep: bool | str = False, **plan) -> Sweep:
        folder = tmp_path / "runs"
        folder.mkdir(exist_ok=True)
        (tmp_path / "fake.py").write_text(FAKE)
        (folder / "plan.json").write_text(json.dumps(plan))
        names = [f"t-1-m-{i}" for i in range(count)]
        return Sweep(
            folder,
            [
                Trial(*name.split("-"), folder / name, (f"train.output_dir={folder / name}",), None)
                for name in names
            ],
            keep,
            1,
        )

    return make


def stand_in(made: Sweep) -> list[str]:
    return [sys.executable, str(made.output.parent / "fake.py")]


def sweeper(made: Sweep, jobs: int = 2, **options) -> Sweeper:
    options = {"say": lambda line: None, "command": stand_in(made)} | options
    return Sweeper(made, made.trials, jobs, **options)


def locked(made: Sweep) -> list[str]:
    """Return the trials whose lock is held."""
    names = []
    for trial in made.trials:
        try:
            with FileLock(made.output / ".locks" / f"{trial.name}.lock", timeout=0):
                pass
        except Timeout:
            names.append(trial.name)
    return names


def journal(made: Sweep) -> list[list]:
    path = made.output / "journal"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def at_once(made: Sweep) -> int:
    """Return the largest number of trials that ran at the same time."""
    events = sorted((when, 1 if what == "start" else -1) for what, _, when, *_ in journal(made))
    return max(sum(step for _, step in events[: i + 1]) for i in range(len(events)))


def test_all_trials_run_and_leave_only_results(fakes):
    made = fakes(3, **{"t-1-m-0": {"seconds": 0.3}})
    one = sweeper(made)
    assert one.run() and len(one.done) == 3 and at_once(made) <= 2
    assert all(
        sorted(path.name for path in trial.folder.iterdir())
        == ["results.json", "timing.json", "train.out"]
        for trial in made.trials
    )
    assert locked(made) == []
    assert (
        sweeper(made).run() and len([line for line in journal(made) if line[0] == "start"]) == 3
    )  # nothing runs twice


def test_files_that_a_power_cut_left_half_written_do_no_harm(fakes):
    made = fakes(2)
    assert sweeper(made).run()
    for text in ("", '{"seconds": 1}'):
        (made.trials[0].folder / "timing.json").write_text(text)
        shutil.rmtree(made.trials[1].folder)
        assert sweeper(made).run() and made.trials[1].finished


def test_results_that_a_sweep_with_other_settings_left_meanwhile_do_not_count(workspace, tmp_path):
    made = grid.load(
        str(sweep_file(workspace, tmp_path, methods={"lora": ["method.submodules=[lora]"]}))
    )
    other = grid.load(
        str(sweep_file(workspace, tmp_path, methods={"lora": ["method.submodules=[lora]"]})),
        ["train.learning_rate=0.01"],
    )
    lines, trial = [], made.trials[0]
    one = Sweeper(made, made.trials, 1, lines.append)
    trial.folder.mkdir(parents=True)
    (trial.folder / "config.yaml").write_text(to_yaml(other.trials[0].settings))
    (trial.folder / "results.json").write_text("{}")
    assert not one.run() and not one.done
    assert (
        "has a run with another train.learning_rate" in one.failed[trial.name]
        and trial.name in lines[0]
    )
    assert locked(made) == []


def test_keep_best_keeps_the_best_checkpoint(fakes):
    made = fakes(1, keep="best")
    assert sweeper(made).run()
    assert (made.trials[0].folder / "best").is_dir() and not (
        made.trials[0].folder / "checkpoint-1"
    ).exists()


def test_a_failed_run_is_tried_once_more_and_reported_and_never_counted(fakes):
    made = fakes(3, **{"t-1-m-0": {"failures": 1}, "t-1-m-1": {"failures": 9}})
    one = sweeper(made)
    assert not one.run()
    assert one.done == {"t-1-m-0", "t-1-m-2"} and one.failed == {
        "t-1-m-1": "exit code 1: error: no luck"
    }
    assert collections.Counter(name for what, name, *_ in journal(made) if what == "start") == {
        "t-1-m-0": 2,
        "t-1-m-1": 2,
        "t-1-m-2": 1,
    }
    assert not made.trials[1].finished and "1 failed" in one.progress()


def test_a_sweep_is_not_complete_while_another_one_runs_its_trials(fakes):
    made = fakes(2)
    one = sweeper(made)
    with FileLock(made.output / ".locks" / "t-1-m-1.lock"):
        assert not one.run() and one.done == {"t-1-m-0"}
        assert [trial.name for trial in one.elsewhere] == ["t-1-m-1"]
        assert "1 elsewhere" in one.progress()
        made.trials[1].folder.mkdir()
        (made.trials[1].folder / "results.json").write_text("{}")
        assert sweeper(made).run()
    assert sweeper(made).run()


def test_each_slot_has_its_own_gpu_and_the_threads_of_the_file(fakes, monkeypatch):
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    made = fakes(4, **{f"t-1-m-{i}": {"seconds": 0.8} for i in range(4)})
    assert sweeper(made, jobs=2).run() and at_once(made) == 2
    starts = [(gpu, threads) for what, _, _, gpu, threads in journal(made) if what == "start"]
    assert sorted(starts) == [("3", "1"), ("3", "1"), ("5", "1"), ("5", "1")]


def test_finished_trials_are_counted_before_the_first_run_is_over(fakes):
    made = fakes(4, **{"t-1-m-0": {"seconds": 1}})
    for trial in made.trials[1:]:
        trial.folder.mkdir()
        (trial.folder / "results.json").write_text("{}")
    shown: list[str] = []
    assert sweeper(made, 1, show=shown.append).run()
    assert shown[0].startswith("3/4 done; ")


def test_the_time_of_a_resumed_run_is_not_used_for_estimates(fakes):
    made = fakes(1)
    (made.trials[0].folder / "checkpoint-1").mkdir(parents=True)
    one = sweeper(made)
    assert one.run() and not one.seconds


def test_the_progress_line_shows_the_time_left(fakes):
    made = fakes(3, **{f"t-1-m-{i}": {"seconds": 0.5} for i in range(3)})

    def lines() -> list[str]:
        shown: list[str] = []
        assert sweeper(made, 1, show=shown.append).run()
        return shown

    first = lines()
    assert first[0] == "0/3 done; time left not known yet; 1 running (t-1-m-0 0 s)" and first[
        -1
    ].startswith("3/3 done; ")
    assert any(
        re.fullmatch(r"2/3 done; about \d+ s left; 1 running \(t-1-m-2 \d s\)", line)
        for line in first
    )
    for trial in made.trials[1:]:
        (trial.folder / "results.json").unlink()
    assert (
        lines()[0] == "1/3 done; about 14 s left; 1 running (t-1-m-1 0 s)"
    )  # an earlier run says that it took 7 s


@pytest.mark.parametrize("number", SAVE_SIGNALS)
def test_a_signal_lets_runs_save_and_a_new_start_continues(fakes, number):
    made = fakes(2, **{f"t-1-m-{i}": {"seconds": 30} for i in range(2)})
    one = sweeper(made)

    def stop() -> None:
        while len(journal(made)) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)
        if number == signal.SIGHUP:  # systemd sends both when a session ends
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    assert not one.run() and one.stopping in (number, signal.SIGTERM) and not one.failed
    assert [what for what, *_ in journal(made)].count("saved") == 2 and locked(made) == []
    (made.output / "plan.json").write_text("{}")
    assert sweeper(made).run()


def forked(made: Sweep, jobs: int = 2, **options) -> multiprocessing.Process:
    """Start a sweep in its own process, so that it can be killed."""
    process = multiprocessing.get_context("fork").Process(
        target=lambda: Sweeper(made, made.trials, jobs, say=lambda line: None, **options).run()
    )
    process.start()
    return process


def wait_for(condition, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_two_sweeps_on_one_folder_share_its_trials(fakes):
    made = fakes(6, **{f"t-1-m-{i}": {"seconds": 0.2} for i in range(6)})
    other = forked(made, jobs=1, command=stand_in(made))
    sweeper(made, jobs=1).run()
    other.join()
    assert sweeper(made).run()
    assert sorted(name for what, name, *_ in journal(made) if what == "start") == [
        trial.name for trial in made.trials
    ]


def test_a_run_whose_sweep_was_killed_is_waited_for_not_doubled(fakes):
    made = fakes(2, **{"t-1-m-0": {"seconds": 2}})
    killed = forked(made, jobs=1, command=stand_in(made))
    wait_for(lambda: journal(made))
    killed.kill()
    killed.join()
    again = sweeper(made)
    assert again.run() and again.done == {"t-1-m-0", "t-1-m-1"}
    assert sorted(name for what, name, *_ in journal(made) if what == "start") == [
        "t-1-m-0",
        "t-1-m-1",
    ]
    assert not (
        made.trials[0].folder / "checkpoint-1"
    ).exists()  # tidied by the one that found it finished


# Real runs


def run_alone(made: Sweep, folder: pathlib.Path) -> None:
    """Run the trials without a sweep, one after the other."""
    for trial in made.trials:
        overrides = [word.replace(str(made.output), str(folder)) for word in trial.arguments]
        train.run(config.load(None, overrides))


@pytest.mark.distributed
def test_a_killed_sweep_ends_with_the_results_of_an_uninterrupted_one(workspace, tmp_path):
    """SIGKILL for the sweep, then for the run it left behind, right after its first checkpoint."""
    made = grid.load(str(sweep_file(workspace, tmp_path)))
    alone = multiprocessing.get_context("fork").Process(
        target=run_alone, args=(made, tmp_path / "alone")
    )
    alone.start()
    first = made.trials[0]
    killed = forked(made, jobs=1)
    wait_for(lambda: list(first.folder.glob("checkpoint-*")))
    killed.kill()
    killed.join()
    assert not first.finished and sweep._runs_without_sweep(first.folder)
    (orphan,) = [
        process
        for process in psutil.process_iter(["cmdline"])
        if f'train.output_dir="{first.folder}"' in (process.info["cmdline"] or [])
    ]
    orphan.kill()
    wait_for(lambda: not sweep._runs_without_sweep(first.folder))
    again = Sweeper(made, made.trials, say=lambda line: None)
    assert again.run() and len(again.done) == 2
    assert "resume     " in (first.folder / sweep.LOG).read_text()
    alone.join()
    table = results.load([str(sweep.save_table(made))])
    assert [run.folder.name for run in table] == sorted(trial.name for trial in made.trials)
    for trial in made.trials:
        assert (trial.folder / "results.json").read_bytes() == (
            tmp_path / "alone" / trial.name / "results.json"
        ).read_bytes()
        left = {path.name for path in trial.folder.iterdir()}
        assert left == {
            "results.json",
            "timing.json",
            "config.yaml",
            "environment.json",
            "log.jsonl",
            sweep.LOG,
        }


# The script


def test_a_sweep_goes_on_elsewhere_from_the_table_of_an_earlier_one(workspace, tmp_path, capsys):
    path = str(sweep_file(workspace, tmp_path))
    quick = "train.max_steps=2"
    assert command(path, "--only", "*-lora-*", quick) == 0
    table = shutil.move(tmp_path / "runs" / "results.csv", tmp_path / "earlier.csv")
    (row,) = results.load([str(table)])
    shutil.rmtree(tmp_path / "runs")
    capsys.readouterr()
    assert command(path, "--done", str(table), "train.max_steps=3") == 2
    assert "earlier.csv/films-64-lora-0 has a different train.max_steps" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert command(path, "--done", str(table), quick) == 0
    assert "2 runs, 2 of them here, 1 done" in capsys.readouterr().out
    assert not (tmp_path / "runs" / "films-64-lora-0").exists()
    first, second = results.load([str(tmp_path / "runs" / "results.csv")])
    assert (first.results, first.settings, first.facts) == (row.results, row.settings, row.facts)
    assert second.folder.name == "films-64-apl-0"


def command(*arguments: str) -> int:
    return main(["sweep", *arguments])


def test_the_command_reports_what_is_missing_and_what_is_wrong(workspace, tmp_path, capsys):
    path = str(sweep_file(workspace, tmp_path))
    (tmp_path / "runs" / "films-64-lora-0").mkdir(parents=True)
    trial = grid.load(path).trials[0]
    (trial.folder / "config.yaml").write_text(to_yaml(trial.settings))
    (trial.folder / "results.json").write_text("{}")
    assert command(path, "--dry-run") == 0
    screen = capsys.readouterr().out
    assert (
        "2 runs, 2 of them here, 1 done" in screen
        and screen.count("missing    ") == 1
        and "missing    films-64-apl-0" in screen
    )
    assert (
        command(path, "--shard", "3/2") == 2
        and "error: 1 problem:\n  - --shard: 3/2" in capsys.readouterr().err
    )
    assert (
        command(path, "model.name=/no/such") == 2
        and "every run: model.name: no folder /no/such" in capsys.readouterr().err
    )
    assert command(path, "--only", trial.name) == 1, "a table that was not made is no success"
    assert "table      not written: " in capsys.readouterr().out
    shutil.rmtree(tmp_path / "runs")
    assert command(path, "--jobs", "0") == 2 and "--jobs: 0 runs at once" in capsys.readouterr().err
