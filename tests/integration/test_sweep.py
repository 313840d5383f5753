"""Sweeps: what a file says, who runs which trial, failures, stops and kills; with real runs where they are the point."""

import collections
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import subprocess
import threading
import time

import psutil
import pytest

from scaleup.cli import main
from scaleup.errors import ConfigError
from scaleup.experiments import claims as claiming
from scaleup.experiments import grid, machine, sweep
from scaleup.experiments.claims import Claims
from scaleup.experiments.grid import Sweep, Trial
from scaleup.experiments.sweep import Sweeper
from scaleup.settings import schema as config
from scaleup.settings.schema import to_yaml
from scaleup.training import run as train
from tests.utils.workspace import ROOT, make_workspace


@pytest.fixture(autouse=True)
def places_of_their_own(tmp_path, monkeypatch):
    """A sweep that somebody runs on this machine is nothing to the tests."""
    monkeypatch.setattr(machine, "LOCKS", tmp_path / "places")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> pathlib.Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def sweep_file(workspace: pathlib.Path, folder: pathlib.Path, **changes) -> pathlib.Path:
    """A sweep of tiny runs; JSON is YAML."""
    said = {
        "output": str(folder / "runs"),
        "base": {
            "model": {"name": str(workspace / "bert")},
            "data": {
                "train_file": str(workspace / "train.csv"),
                "test_file": str(workspace / "test.csv"),
                "dev_size": 32,
            },
            "train": {"num_train_epochs": 8, "logging_steps": 1},
        },
        "methods": {"lora": ["method.submodules=[lora]"], "apl": ["method.prefix_hidden_size=16"]},
        "tasks": {"films": []},
        "k": [64],
        "seeds": [0],
    }
    path = folder / "sweep.yaml"
    path.write_text(json.dumps(said | changes))
    return path


# The file


def test_every_combination_is_a_cell_with_its_own_settings_and_the_first_seed_comes_first(
    workspace, tmp_path
):
    made = grid.load(
        str(sweep_file(workspace, tmp_path, k=[32, 64], seeds=[0, 5])), ["train.max_steps=3"]
    )
    assert [trial.name for trial in made.trials] == [
        f"films-{k}-{m}-{s}" for s in (0, 5) for k in (32, 64) for m in ("lora", "apl")
    ]
    settings = made.trials[-2].settings
    assert (
        settings.data.k,
        settings.data.seed,
        settings.train.seed,
        settings.method.submodules,
    ) == (64, 5, 5, ["lora"])
    assert all(
        trial.settings.train.max_steps == 3 and trial.settings.train.resume == "auto"
        for trial in made.trials
    )
    assert {trial.settings.train.output_dir for trial in made.trials} == {
        str(tmp_path / "runs" / trial.name) for trial in made.trials
    }


def test_with_all_examples_the_seed_is_that_of_training_alone(workspace, tmp_path):
    validation = {
        "validation_file": str(workspace / "test.csv"),
        "train_file": str(workspace / "train.csv"),
    }
    base = {"model": {"name": str(workspace / "bert")}, "data": validation}
    trial = grid.load(str(sweep_file(workspace, tmp_path, base=base, k=["all"], seeds=[7]))).trials[
        0
    ]
    assert (
        trial.settings.train.seed == 7 and "data.seed=7" not in trial.arguments
    )  # it would be refused: nothing is sampled


def test_the_base_may_be_a_config_file_beside_the_sweep(workspace, tmp_path):
    (tmp_path / "base.yaml").write_text(
        f"model: {{name: {workspace / 'bert'}}}\ndata: {{train_file: {workspace / 'train.csv'}, dev_size: 32}}\n"
    )
    trial = grid.load(str(sweep_file(workspace, tmp_path, base="base.yaml"))).trials[0]
    assert (
        trial.arguments[:2] == ("--config", str(tmp_path / "base.yaml"))
        and trial.settings.data.dev_size == 32
    )


def test_problems_of_all_cells_are_said_together_and_once(workspace, tmp_path):
    methods = {
        "lora": ["method.submodules=[lora]", "method.adapter_size=3"],
        "apl": ["method.sise=1"],
    }
    with pytest.raises(ConfigError) as caught:
        grid.load(str(sweep_file(workspace, tmp_path, methods=methods, seeds=[0, 1], k=[64, 5000])))
    said = "\n".join(caught.value.problems)
    assert "films-64-lora-0 and 3 more: method.adapter_size: has no effect here" in said
    assert "films-64-apl-0 and 3 more: method.sise: unknown setting" in said
    assert (
        "films-5000-lora-0 and 3 more: data.k: 5000 examples" in said
        and len(caught.value.problems) == 3
    )
    with pytest.raises(
        ConfigError,
        match="every run: train.lerning_rate: unknown setting; did you mean learning_rate",
    ):
        grid.load(str(sweep_file(workspace, tmp_path)), ["train.lerning_rate=1"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seds": [1]}, "seds: unknown setting; did you mean seeds?"),
        ({"seeds": [0, 0]}, "seeds: names a value twice"),
        ({"methods": ["full"]}, "methods: should be names with lists of overrides"),
        ({"methods": {"a-b": []}}, "methods: 'a-b' cannot be part of a folder's name"),
        ({"tasks": {"films": ["train.output_dir=x"]}}, "the sweep decides train.output_dir"),
        ({"threads": 0}, "threads: should be greater than 0"),
        (
            {"output": "~nobody-of-that-name/runs"},
            "output: there is no home of ~nobody-of-that-name here; write the path out",
        ),
        (
            {"k": [64], "seeds": {"0": ["seed=0"], "zero": ["seed=0"]}},
            "films-64-lora-zero and 1 more: the same run as another trial: an override makes",
        ),
        (
            {"methods": {"full": ["method=full", "train.seed=7"]}},
            "every run: train.seed: methods and seeds set it to different values",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_file_is_refused_in_plain_words(workspace, tmp_path, changes, words):
    with pytest.raises(ConfigError) as caught:
        grid.load(str(sweep_file(workspace, tmp_path, **changes)))
    assert words in str(caught.value)


def test_a_folder_with_a_run_of_other_settings_is_refused(workspace, tmp_path):
    path = sweep_file(workspace, tmp_path)
    trial = grid.load(str(path)).trials[0]
    trial.folder.mkdir(parents=True)
    (trial.folder / "config.yaml").write_text(to_yaml(trial.settings))
    assert grid.load(str(path)).trials[0] == trial
    with pytest.raises(
        ConfigError, match="has a run with another train.num_train_epochs; choose another output"
    ):
        grid.load(str(path), ["train.num_train_epochs=2"])
    (trial.folder / "results.json").write_text('{"task": "st')
    with pytest.raises(
        ConfigError, match="results.json is damaged; remove the folder to run it again"
    ):
        grid.load(str(path))


@pytest.mark.parametrize("name", ["my runs #2", "a: b", "{a}", "[a]", "'a' b", "Läufe"])
def test_an_output_may_have_any_name(workspace, tmp_path, name):
    trial = grid.load(str(sweep_file(workspace, tmp_path, output=str(tmp_path / name)))).trials[0]
    assert trial.settings.train.output_dir == str(tmp_path / name / trial.name) == str(trial.folder)


def test_an_override_of_an_axis_that_makes_cells_alike_is_refused(workspace, tmp_path):
    with pytest.raises(
        ConfigError,
        match="films-64-lora-0 and 1 more: the same run as another trial: an override makes",
    ):
        grid.load(str(sweep_file(workspace, tmp_path, k=[32, 64])), ["data.k=48"])


def test_shards_share_the_grid_out_and_patterns_choose_from_it(workspace, tmp_path):
    trials = grid.load(str(sweep_file(workspace, tmp_path, k=[32, 64], seeds=[0, 1]))).trials
    parts = [grid.select(trials, shard=f"{i}/3") for i in (1, 2, 3)]
    assert collections.Counter(
        trial.name for part in parts for trial in part
    ) == collections.Counter(trial.name for trial in trials)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert [trial.name for trial in grid.select(trials, ["*-apl-1", "films-32-lora-0"])] == [
        "films-32-lora-0",
        "films-32-apl-1",
        "films-64-apl-1",
    ]
    for shard in ("0/3", "4/3", "1", "a/b"):
        with pytest.raises(ConfigError, match="is no i/n"):
            grid.select(trials, shard=shard)
    with pytest.raises(
        ConfigError, match="no trial is called films-64-lore-0; did you mean films-64-lora-0"
    ):
        grid.select(trials, ["films-64-lore-0"])


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem
)
def test_a_sweep_that_comes_with_the_project_is_in_order(path, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)  # its runs/… must not meet what lies in the checkout
    local = (
        [f"data.path={request.getfixturevalue('data_dir') / 'glue'}"]
        if path.stem.startswith("minilm")
        else []
    )
    made = grid.load(str(path), local)
    assert (
        str(made.output) == f"runs/{path.stem}" and f"{len(made.trials)} runs" in path.read_text()
    )


# Claims


def test_a_claim_holds_against_everybody_until_it_is_released(tmp_path):
    claims = Claims(tmp_path)
    taken: list[str] = []
    names = [f"trial{i}" for i in range(40)]
    threads = [
        threading.Thread(
            target=lambda: taken.extend(name for name in names if Claims(tmp_path).take(name))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(names)
    claims.release("cell3")
    assert claims.take("cell3") and not claims.take("cell4")


def test_a_claim_is_stale_once_sweep_and_run_are_gone(tmp_path):
    claims, gone = Claims(tmp_path), subprocess.Popen(["sleep", "60"])
    run = subprocess.Popen(["sleep", "60"])
    claims.take("trial")
    path = claims.folder / "trial.json"
    kept = json.loads(path.read_text())
    kept["processes"] = [
        [process.pid, psutil.Process(process.pid).create_time()] for process in (gone, run)
    ]
    path.write_text(json.dumps(kept))
    assert not claims.take("trial") and not claims.of("trial").orphan
    gone.kill()
    gone.wait()
    assert not claims.take("trial") and claims.of("trial").orphan  # the run goes on alone
    run.kill()  # not waited for: a zombie is gone, too
    while psutil.Process(run.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert claims.take("trial") and claims.of("trial").processes[0][0] == os.getpid()
    run.wait()
    kept["processes"] = [[os.getpid(), 12345.0]]  # a process number that is used again
    path.write_text(json.dumps(kept))
    assert claims.take("trial")
    path.write_text(json.dumps({"host": "elsewhere", "processes": [[1, 1.0]]}))
    assert not claims.take("trial")


def test_a_claim_of_another_host_is_stale_once_its_sweep_does_not_touch_it(tmp_path):
    claims = Claims(tmp_path)
    path = claims.folder / "trial.json"
    path.write_text(json.dumps({"host": "elsewhere", "processes": [[1, 1.0]]}))
    long_ago = path.stat().st_mtime - claiming.STALE_S - 5
    os.utime(path, (long_ago, long_ago))
    claims.beat(["trial", "none"])  # not this process's
    claims.release("trial")
    assert not claims.own("trial") and claims.take("trial") and claims.own("trial")
    os.utime(path, (long_ago, long_ago))
    claims.beat(["trial"])
    assert claims.of("trial").age < 60


def test_a_sweep_that_was_suspended_leaves_alone_what_another_host_has_taken_over(fakes):
    made = fakes(1)
    one = sweeper(made)
    trial = made.trials[0]
    assert one.claims.take(trial.name)
    theirs = json.dumps({"host": "elsewhere", "processes": [[os.getpid(), 1.0]]})
    (one.claims.folder / f"{trial.name}.json").write_text(theirs)
    (trial.folder / "checkpoint-8").mkdir(parents=True)
    one._finish(trial)
    assert (trial.folder / "checkpoint-8").is_dir() and (
        one.claims.folder / f"{trial.name}.json"
    ).read_text() == theirs


# Running, with a stand-in for launch/train.py

FAKE = """
import json, os, pathlib, signal, sys, time
out = pathlib.Path(next(word for word in sys.argv if word.startswith("train.output_dir=")).partition("=")[2])
def note(what):
    with (out.parent / "journal").open("a") as file:
        file.write(json.dumps([what, out.name, time.time(), sorted(os.sched_getaffinity(0)), os.environ["OMP_NUM_THREADS"]]) + "\\n")
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
    """Makes a sweep of stand-ins; `plan`: trial → seconds, failures."""
    monkeypatch.setattr(sweep, "needed_bytes", lambda settings: 2**30)

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


def sweeper(made: Sweep, jobs: int | None = 2) -> Sweeper:
    return Sweeper(
        made, made.trials, jobs, say=lambda line: None, entry=made.output.parent / "fake.py"
    )


def journal(made: Sweep) -> list[list]:
    path = made.output / "journal"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def at_once(made: Sweep) -> int:
    """Most runs that were going on together."""
    events = sorted((when, 1 if what == "start" else -1) for what, _, when, *_ in journal(made))
    return max(sum(step for _, step in events[: i + 1]) for i in range(len(events)))


def test_all_cells_run_and_leave_only_results(fakes):
    made = fakes(3, **{"t-1-m-0": {"seconds": 0.3}})
    one = sweeper(made)
    assert one.run() and len(one.done) == 3 and at_once(made) <= 2
    assert all(
        sorted(path.name for path in trial.folder.iterdir())
        == ["results.json", "timing.json", "train.out"]
        for trial in made.trials
    )
    assert list((made.output / ".claims").glob("*.json")) == []
    assert (
        sweeper(made).run() and len([line for line in journal(made) if line[0] == "start"]) == 3
    )  # nothing runs twice


def test_runs_are_pinned_to_cores_of_their_own(fakes):
    made = fakes(4, **{f"t-1-m-{i}": {"seconds": 0.8} for i in range(4)})
    assert sweeper(made, jobs=None).run()
    used = [
        (tuple(cores), threads) for what, _, _, cores, threads in journal(made) if what == "start"
    ]
    assert all(len(cores) == 1 and threads == "1" for cores, threads in used)
    assert len(set(used)) == min(4, len(os.sched_getaffinity(0))) == at_once(made)


def test_what_a_power_cut_left_half_written_stops_nobody(fakes):
    made = fakes(2)
    assert sweeper(made).run()
    for text in ("", '{"seconds": 1}'):
        (made.trials[0].folder / "timing.json").write_text(text)
        (made.output / ".claims" / "t-1-m-1.json").write_text(text)
        shutil.rmtree(made.trials[1].folder)
        assert sweeper(made).run() and made.trials[1].finished


def test_what_a_sweep_with_other_settings_has_left_meanwhile_is_not_counted(workspace, tmp_path):
    made = grid.load(
        str(sweep_file(workspace, tmp_path, methods={"lora": ["method.submodules=[lora]"]}))
    )
    other = grid.load(
        str(sweep_file(workspace, tmp_path, methods={"lora": ["method.submodules=[lora]"]})),
        ["train.learning_rate=0.01"],
    )
    said, trial = [], made.trials[0]
    one = Sweeper(made, made.trials, 1, said.append)
    trial.folder.mkdir(parents=True)
    (trial.folder / "config.yaml").write_text(to_yaml(other.trials[0].settings))
    (trial.folder / "results.json").write_text("{}")
    assert not one.run() and not one.done
    assert (
        "has a run with another train.learning_rate" in one.failed[trial.name]
        and trial.name in said[0]
    )
    assert list((made.output / ".claims").glob("*.json")) == []


def test_keep_best_keeps_the_best_bundle(fakes):
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


def test_a_sweep_whose_cells_another_one_has_is_not_whole(fakes):
    made = fakes(2)
    Claims(made.output)
    (made.output / ".claims" / "t-1-m-1.json").write_text(
        json.dumps({"host": "elsewhere", "processes": [[1, 1.0]]})
    )
    one = sweeper(made)
    assert (
        not one.run()
        and one.done == {"t-1-m-0"}
        and [trial.name for trial in one.elsewhere] == ["t-1-m-1"]
    )
    (made.trials[1].folder).mkdir()
    (made.trials[1].folder / "results.json").write_text("{}")
    assert sweeper(made).run()


def test_done_cells_are_counted_before_the_first_run_is_over(fakes):
    made = fakes(4, **{"t-1-m-0": {"seconds": 1}})
    for trial in made.trials[1:]:
        trial.folder.mkdir()
        (trial.folder / "results.json").write_text("{}")
    shown: list[str] = []
    assert Sweeper(
        made,
        made.trials,
        1,
        say=lambda line: None,
        show=shown.append,
        entry=made.output.parent / "fake.py",
    ).run()
    assert shown[0].startswith("3/4 done; ")


def test_sweeps_on_different_folders_and_orphans_never_share_a_core(fakes, tmp_path):
    made = fakes(2, **{f"t-1-m-{i}": {"seconds": 1.5} for i in range(2)})
    killed = forked(made, jobs=1, entry=made.output.parent / "fake.py")
    wait_for(lambda: journal(made))
    killed.kill()  # its run goes on, on a core that nobody else is given
    killed.join()
    places = machine.Places(None, 1)
    first = journal(made)[0][3]
    taken = [places.take() for _ in places.slots]
    assert [list(slot.cores) for slot, _ in filter(None, taken)] == [
        [core] for core in sorted(os.sched_getaffinity(0)) if [core] != first
    ]
    said = []
    blocked = Sweeper(
        made, made.trials[1:], 1, say=said.append, entry=made.output.parent / "fake.py"
    )
    blocked._start_what_fits()
    blocked._start_what_fits()
    assert said == ["waiting: other sweeps' runs have the rest of the machine"]
    wait_for(lambda: any(what == "end" for what, *_ in journal(made)))
    wait_for(lambda: (found := places.take()) and list(found[0].cores) == first, 10)


def test_the_least_of_all_memory_limits_counts_and_files_in_memory_are_free(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)

    def limit(
        folder: pathlib.Path, names: tuple[str, str], most: str, used: int, cached: str
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{most}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(cached)

    new, old = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
    limit(
        tmp_path / "slurm" / "job", new, "1000", 700, "anon 1\ninactive_file 200\nactive_file 50\n"
    )
    limit(tmp_path / "slurm", new, "max", 900, "")
    assert machine._left_of_cgroups("0::/slurm/job\n") == [550]
    limit(
        tmp_path / "memory" / "a", old, "500", 450, "total_inactive_file 10\ntotal_active_file 0\n"
    )
    assert machine._left_of_cgroups("4:memory:/a\n3:cpuset:/a\n0::/\n") == [60]
    assert machine._left_of_cgroups("3:cpu:/\n0::/\n") == []


def test_no_more_runs_than_memory_holds(fakes, monkeypatch):
    made = fakes(3, **{f"t-1-m-{i}": {"seconds": 0.3} for i in range(3)})
    monkeypatch.setattr(
        sweep, "available_bytes", lambda: 3 * 2**29
    )  # one and a half of what a run is said to need
    monkeypatch.setattr(machine, "resident_bytes", lambda pid: 0)
    first = sweeper(made)
    first.trials, first.waiting = first.trials[:2], collections.deque(first.trials[:2])
    assert first.run() and at_once(made) == 1
    assert first._need(made.trials[2]) == int(1.1 * 100 * 2**20)  # measured by then


def test_what_other_sweeps_runs_will_still_take_is_no_free_memory(fakes, monkeypatch):
    made = fakes(2, **{f"t-1-m-{i}": {"seconds": 1} for i in range(2)})
    monkeypatch.setattr(sweep, "available_bytes", lambda: 3 * 2**29)
    monkeypatch.setattr(machine, "resident_bytes", lambda pid: 2**20)
    (made.output / "other").mkdir()
    (made.output / "other" / "plan.json").write_text("{}")
    other = Sweeper(
        Sweep(made.output / "other", made.trials[1:], False, 1),
        made.trials[1:],
        1,
        say=lambda line: None,
        entry=made.output.parent / "fake.py",
    )
    one = sweeper(made)
    assert one.places.to_come() is None
    one.trials, one.waiting = one.trials[:1], collections.deque(one.trials[:1])
    one._start_each()
    assert len(one.running) == 1 and other.places.to_come() == 2**30 - 2**20
    said: list[str] = []
    other.say = said.append
    other._start_what_fits()
    assert not other.running and said == ["waiting: no memory for more"]
    assert one.run() and other.places.to_come() is None and other.run()


def test_with_less_room_than_places_the_time_left_is_that_of_fewer(fakes):
    made = fakes(4)
    for trial in made.trials[:1]:
        trial.folder.mkdir()
        (trial.folder / "results.json").write_text("{}")
        (trial.folder / "timing.json").write_text('{"seconds": 8.0, "peak_memory_mib": 1}')
    one = sweeper(made, None)
    one.places.count = 4
    assert one.seconds_left() == 8  # three at once
    one.short = "no memory for more"
    assert one.seconds_left() == 24


def test_a_run_that_went_on_does_not_tell_how_long_a_whole_one_takes(fakes):
    made = fakes(1)
    (made.trials[0].folder / "checkpoint-1").mkdir(parents=True)
    one = sweeper(made)
    assert one.run() and not one.measured.seconds and one.measured.memory_mib


def test_the_line_of_progress_tells_the_time_left(fakes):
    made = fakes(3, **{f"t-1-m-{i}": {"seconds": 0.5} for i in range(3)})

    def lines() -> list[str]:
        shown: list[str] = []
        assert Sweeper(
            made,
            made.trials,
            1,
            say=lambda line: None,
            show=shown.append,
            entry=made.output.parent / "fake.py",
        ).run()
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


def test_sigterm_ends_the_runs_in_order_and_a_new_start_goes_on(fakes):
    made = fakes(2, **{f"t-1-m-{i}": {"seconds": 30} for i in range(2)})
    one = sweeper(made)

    def stop() -> None:
        while len(journal(made)) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    assert not one.run() and one.stopping == signal.SIGTERM and not one.failed
    assert [what for what, *_ in journal(made)].count("saved") == 2 and list(
        (made.output / ".claims").glob("*.json")
    ) == []
    (made.output / "plan.json").write_text("{}")
    assert sweeper(made).run()


def forked(made: Sweep, jobs: int = 2, **options) -> multiprocessing.Process:
    """A sweep in a process of its own, which can be killed."""
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


def test_two_sweeps_on_one_folder_share_the_cells(fakes):
    made = fakes(6, **{f"t-1-m-{i}": {"seconds": 0.2} for i in range(6)})
    other = forked(made, jobs=1, entry=made.output.parent / "fake.py")
    assert sweeper(made, jobs=1).run()
    other.join()
    assert sorted(name for what, name, *_ in journal(made) if what == "start") == [
        trial.name for trial in made.trials
    ]


def test_a_run_whose_sweep_was_killed_is_waited_for_not_doubled(fakes):
    made = fakes(2, **{"t-1-m-0": {"seconds": 2}})
    killed = forked(made, jobs=1, entry=made.output.parent / "fake.py")
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
    """The trials without a sweep, one after the other."""
    for trial in made.trials:
        overrides = [word.replace(str(made.output), str(folder)) for word in trial.arguments]
        train.run(config.load(None, overrides))


@pytest.mark.distributed
def test_a_sweep_killed_in_the_middle_ends_with_the_results_of_one_left_alone(workspace, tmp_path):
    """SIGKILL for the sweep, then for the run it left behind, right after its first checkpoint."""
    made = grid.load(str(sweep_file(workspace, tmp_path)))
    alone = multiprocessing.get_context("fork").Process(
        target=run_alone, args=(made, tmp_path / "alone")
    )
    alone.start()
    first, claims = made.trials[0], Claims(made.output)
    killed = forked(made, jobs=1)
    wait_for(
        lambda: (
            first.folder.is_dir()
            and any(path.name.startswith("checkpoint-") for path in first.folder.iterdir())
        )
    )
    killed.kill()
    killed.join()
    assert claims.of(first.name).orphan and not first.finished
    os.kill(claims.of(first.name).processes[1][0], signal.SIGKILL)
    wait_for(lambda: not claims.of(first.name).live)
    again = Sweeper(made, made.trials, say=lambda line: None)
    assert again.run() and len(again.done) == 2
    assert "resume     " in (first.folder / sweep.LOG).read_text()
    alone.join()
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


def script(*arguments: str) -> int:
    return main(["sweep", *arguments])


def test_the_script_says_what_is_missing_and_what_is_wrong(workspace, tmp_path, capsys):
    path = str(sweep_file(workspace, tmp_path))
    (tmp_path / "runs" / "films-64-lora-0").mkdir(parents=True)
    trial = grid.load(path).trials[0]
    (trial.folder / "config.yaml").write_text(to_yaml(trial.settings))
    (trial.folder / "results.json").write_text("{}")
    assert script(path, "--dry-run") == 0
    screen = capsys.readouterr().out
    assert (
        "2 runs, 2 of them here, 1 done" in screen
        and screen.count("missing    ") == 1
        and "missing    films-64-apl-0" in screen
    )
    assert (
        script(path, "--shard", "3/2") == 2
        and "error: 1 problem:\n  - --shard: 3/2" in capsys.readouterr().err
    )
    assert (
        script(path, "model.name=/no/such") == 2
        and "every run: model.name: no folder /no/such" in capsys.readouterr().err
    )
    shutil.rmtree(tmp_path / "runs")
    assert script(path, "--jobs", "0") == 2 and "--jobs: 0 runs at once" in capsys.readouterr().err
