"""launch/slurm on a real Slurm: ranks, requeueing, time limits, preemption, lost nodes, arrays.

Every job that is interrupted must end with the weights, losses and results of a job that was not.
`make test-slurm` runs these tests; benchmarks/slurm.py describes the cluster.
"""

import csv
import os
import pathlib
import re
import signal
import sys
import time
from collections.abc import Iterator

import pytest

from benchmarks.kill import compare
from benchmarks.slurm import RECORD, SlurmCluster, missing, wait_until
from scaleup.experiments import grid
from tests.utils.slurm_jobs import Job, last_step
from tests.utils.sweeps import sweep_file
from tests.utils.workspace import ROOT, make_workspace, overrides

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.distributed]
TRAIN, SWEEP = "launch/slurm/train.sbatch", "launch/slurm/sweep.sbatch"
STEPS = 120
SETTINGS = (
    "train.per_device_train_batch_size=8",
    f"train.max_steps={STEPS}",
    "train.eval_strategy=steps",
    "train.save_strategy=steps",
    "train.eval_steps=50",
    "train.save_steps=50",
    "train.early_stopping_patience=0",
    "train.disable_tqdm=true",
)
# Stands in for the interpreter: every step also sleeps, so that an idle machine does not finish a
# run of the tiny model before the test has interrupted it.
PACED = """#!{python}
import os, runpy, sys, time
from transformers import Trainer
step = Trainer.training_step
def paced(*args, **more):
    time.sleep(float(os.environ["PACE_S"]))
    return step(*args, **more)
Trainer.training_step = paced
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> pathlib.Path:
    """Models and data, an empty configuration and the paced interpreter."""
    folder = make_workspace(tmp_path_factory.mktemp("workspace"))
    (folder / "empty.yaml").write_text("")
    (folder / "python").write_text(PACED.format(python=sys.executable))
    (folder / "python").chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    """A running Slurm. SIGTERM ends the tests as Ctrl-C does, so that no daemon is left behind."""
    if problem := missing():
        pytest.skip(f"make test-slurm installs what is missing: {problem}")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with SlurmCluster() as running:
            yield running
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture
def record(request):
    """Append the stories of a test's jobs to the record."""
    jobs: list[Job] = []
    yield jobs.append
    if path := os.environ.get(RECORD):
        with open(path, "a", encoding="utf-8") as file:
            for job in jobs:
                file.write(f"== {request.node.name}\n\n{job.story()}\n")


@pytest.fixture(scope="module")
def train(cluster, workspace, tmp_path_factory):
    """Submits a run of 120 steps on two nodes; returns the job and its output folder."""

    def submit(*more: str, options: tuple[str, ...] = (), pace_s: float = 0.05, **env: str):
        folder = tmp_path_factory.mktemp("job")
        out = folder / "run"
        shape = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
        words = [str(workspace / "empty.yaml"), *overrides(workspace, out, *SETTINGS, *more)]
        env = {"PYTHON": str(workspace / "python"), "PACE_S": str(pace_s)} | env
        job = Job.submit(cluster, folder, *shape, "--time=30", *options, TRAIN, *words, **env)
        return job, out

    return submit


@pytest.fixture(scope="module")
def whole(train) -> pathlib.Path:
    """The folder of a run that nobody interrupts."""
    job, out = train(pace_s=0)
    found = job.finish()
    assert found["Restarts"] == "0" and "world      2 processes on 2 hosts" in job.said()
    return out


def same(whole: pathlib.Path, out: pathlib.Path) -> None:
    """The run ended like the one that nobody interrupted; both took part as two processes."""
    found = compare(whole, out, tolerance=1e-6)
    assert found["passed"], found


def test_every_task_of_two_nodes_has_its_rank(train, record):
    job, out = train("train.max_steps=2", options=("--ntasks-per-node=2", "--gpus-per-node=2"))
    record(job)
    job.finish()
    for line in (
        "world      4 processes on 2 hosts",
        "n01: rank 0 cpu, rank 1 cpu",
        "n02: rank 2 cpu, rank 3 cpu",
    ):
        assert line in job.said(), job.story()
    assert last_step(out) == 2


def test_a_job_that_an_operator_requeues_saves_and_continues(train, whole, record):
    job, out = train()
    record(job)
    job.wait_for_step(out, 10)
    job.scontrol("scontrol", "requeue", job.id)
    assert job.finish()["Restarts"] == "1"
    same(whole, out)


def test_a_job_that_gets_usr1_saves_and_requeues_itself(train, whole, record):
    job, out = train()
    record(job)
    job.wait_for_step(out, 10)
    job.scontrol("scancel", "--batch", "--signal=USR1", job.id)
    assert job.finish()["Restarts"] == "1"
    assert "stopped by SIGUSR1 at step" in job.said(), job.story()
    same(whole, out)


def test_a_job_near_its_time_limit_saves_and_requeues_itself(train, whole, record):
    """The new limit is less than two minutes away, so the signal of the script is due at once."""
    job, out = train(pace_s=0.4)
    record(job)
    job.wait_for_step(out, 10)
    minutes = int(time.monotonic() - job.start) // 60 + 2
    job.scontrol("scontrol", "update", f"JobId={job.id}", f"TimeLimit={minutes}")
    job.wait_for("the job is queued again", lambda found: found["Restarts"] == "1")
    assert "stopped by SIGUSR1 at step" in job.said(), job.story()
    job.scontrol("scontrol", "update", f"JobId={job.id}", "TimeLimit=30")
    assert job.finish()["Restarts"] == "1"
    same(whole, out)


@pytest.mark.parametrize(
    "line, number",
    [("", "SIGTERM"), ("SlurmctldParameters=preempt_send_user_signal", "SIGUSR1")],
    ids=["term", "usr1"],
)
def test_a_preempted_job_saves_within_its_grace_time_and_continues(
    cluster, train, whole, record, line, number
):
    cluster.reconfigure(line)
    job, out = train()
    record(job)
    job.wait_for_step(out, 10)
    options = ("--partition=urgent", "--nodes=2", "--exclusive")
    urgent = Job.submit(cluster, job.folder, *options, "--wrap", "sleep 5")
    record(urgent)
    job.wait_for("the job was preempted", lambda found: found["JobState"] != "RUNNING")
    urgent.finish()
    assert job.finish()["Restarts"] == "1"
    assert f"stopped by {number} at step" in job.said(), job.story()
    same(whole, out)


def test_a_job_on_a_node_that_is_set_down_continues_when_it_is_back(cluster, train, whole, record):
    """The job waits its two minutes: Slurm kills what it started on the node after `KillWait`."""
    job, out = train()
    record(job)
    job.wait_for_step(out, 60)
    job.scontrol("scontrol", "update", "NodeName=n02", "State=DOWN", "Reason=test")
    job.wait_for("the job is queued again", lambda found: found["JobState"] == "PENDING")
    job.scontrol("scontrol", "update", "NodeName=n02", "State=RESUME")
    wait_until(lambda: cluster.node_states() == ["idle", "idle"], "both nodes are idle")
    assert job.finish(hurry=False)["Restarts"] == "1"
    same(whole, out)


def test_a_job_whose_node_dies_requeues_itself_before_slurm_notices(cluster, train, whole, record):
    """The usual SlurmdTimeout of 300 s is longer than the 120 s for which srun waits.

    The job waits its two minutes: until then, Slurm repeats the signals that the node has missed.
    """
    job, out = train()
    record(job)
    job.wait_for_step(out, 60)
    cluster.kill_node(1)
    job.note("slurmd and all processes on n02 were killed")
    job.wait_for("the job is queued again", lambda found: found["Restarts"] == "1")
    assert f"job {job.id} goes back into the queue" in job.said(), job.story()
    cluster.restart_node(1)
    wait_until(lambda: cluster.node_states() == ["idle", "idle"], "both nodes are idle", 120)
    assert job.finish(hurry=False)["Restarts"] == "1"
    same(whole, out)


def test_a_wrong_setting_fails_the_job_without_requeueing_it(train, record):
    job, out = train("train.learning_rate=-1")
    record(job)
    found = job.finish("FAILED")
    assert found["ExitCode"] == "2:0" and found["Restarts"] == "0", job.story()
    assert "train.learning_rate" in job.said() and not out.exists()


def test_tasks_run_inside_apptainer_if_an_image_is_given(train, tmp_path, record):
    """A stand-in for apptainer notes its arguments and runs what follows the image."""
    program = tmp_path / "apptainer"
    program.write_text(
        '#!/bin/bash\necho "apptainer $*" | head -n 1\n'
        'while [ "$1" != /images/scaleup.sif ]; do shift; done\nshift\nexec "$@"\n'
    )
    program.chmod(0o755)
    job, out = train(
        "train.max_steps=2",
        SCALEUP_APPTAINER="/images/scaleup.sif",
        SCALEUP_MOUNTS="/data:/data",
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    record(job)
    job.finish()
    words = f"exec --nv --bind {ROOT}:{ROOT},/data:/data --pwd {ROOT} /images/scaleup.sif bash -c"
    assert job.said().count(f"apptainer {words}") == 2, job.story()
    assert last_step(out) == 2 and "world      2 processes on 2 hosts" in job.said()


def rows(table: pathlib.Path) -> dict[str, dict[str, str]]:
    """The results of every trial in a sweep's table."""
    with table.open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    names = [row["trial"] for row in found]
    assert len(set(names)) == len(names)
    return {
        row["trial"]: {key: value for key, value in row.items() if key.startswith("results.")}
        for row in found
    }


def test_an_array_completes_a_sweep_although_one_of_its_tasks_is_interrupted(
    cluster, workspace, tmp_path, record
):
    for name in ("array", "alone"):
        (tmp_path / name).mkdir()
    file, alone = (
        sweep_file(workspace, tmp_path / name, seeds=[0, 1]) for name in ("array", "alone")
    )
    shape = ["--array=1-2", "--gpus=1", "--cpus-per-task=1", "--time=30"]
    submitted = Job.submit(
        cluster, tmp_path, *shape, SWEEP, str(file), name="%A_%a", PYTHON=sys.executable
    )
    parts = [Job(cluster, tmp_path, f"{submitted.id}_{number}") for number in (1, 2)]
    parts[0].events += submitted.events
    for part in parts:
        record(part)
    trials = grid.load(str(file)).trials
    first = trials[0].folder / "log.jsonl"
    parts[0].wait_for("the first trial logs its steps", lambda _: first.exists())
    parts[0].scontrol("scancel", "--batch", "--signal=USR1", parts[0].id)
    found = [part.finish() for part in parts]
    assert [job["Restarts"] for job in found] == ["1", "0"]
    for part, shard in zip(parts, ("1/2", "2/2"), strict=True):
        done = re.findall(r"^(\S+): done in", part.said(), re.MULTILINE)
        assert sorted(done) == sorted(trial.name for trial in grid.select(trials, shard=shard))
    table = rows(tmp_path / "array" / "runs" / "results.csv")
    assert table.keys() == {trial.name for trial in trials}

    command = [sys.executable, "-m", "scaleup", "sweep", str(alone), "--jobs", "2"]
    cluster.run(*command, timeout_s=900)
    assert table == rows(tmp_path / "alone" / "runs" / "results.csv")
