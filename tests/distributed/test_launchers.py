"""The launch scripts for several nodes, with stand-ins for the programs of a cluster."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.utils.workspace import ROOT, environment, make_workspace, overrides

LAUNCH = ROOT / "launch"
TORCHRUN = LAUNCH / "torchrun.sh"
SBATCH, SWEEP, STEP = (LAUNCH / "slurm" / n for n in ("train.sbatch", "sweep.sbatch", "step.sh"))
# Stands in for the interpreter: what it is started with, and the ranks it sees.
PYTHON = (
    '#!/bin/sh\necho "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT'
    ' $OMP_NUM_THREADS:" "$@"\n'
)
SCONTROL = (
    '#!/bin/sh\nif [ "$1" = show ]; then printf "gpu07\\ngpu08\\n"; else echo "scontrol $*"; fi\n'
)
# Two nodes with two tasks each, one after the other; its own options come before "bash".
SRUN = """#!/bin/bash
echo "srun $1 $2 $3 $4"
while [ "$1" != bash ]; do shift; done
for task in 0 1 2 3; do
  SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) SLURM_NTASKS=4 \\
    SLURM_STEP_TASKS_PER_NODE="2(x2)" "$@"
done
"""


def run(
    command: list, folder: pathlib.Path | None = None, **more: str
) -> subprocess.CompletedProcess:
    drop = (
        "NNODES",
        "NODE_RANK",
        "NPROC",
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "LOCAL_WORLD_SIZE",
        "OMP_NUM_THREADS",
    )
    env = {k: v for k, v in environment().items() if k not in drop}
    if folder is not None:
        env["PATH"] = f"{folder}:{env['PATH']}"
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=300,
        env=env | more,
        cwd=ROOT,
    )


@pytest.fixture
def programs(tmp_path) -> pathlib.Path:
    """A folder for PATH with stand-ins for scontrol, srun, nvidia-smi and the interpreter."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (
        ("scontrol", SCONTROL),
        ("srun", SRUN),
        ("python", PYTHON),
        ("nvidia-smi", "#!/bin/sh\nexit 9\n"),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize("script", [TORCHRUN, SBATCH, SWEEP], ids=lambda p: p.name)
def test_scripts_are_bash_and_say_how_they_are_used(script):
    assert run(["bash", "-n", script]).returncode == 0
    result = run(["bash", script])
    assert result.returncode == 2 and "[section.key=value" in result.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say_about_the_scripts():
    result = run(["shellcheck", "--external-sources", TORCHRUN, SBATCH, SWEEP, STEP])
    assert result.returncode == 0, result.stdout


JOB_VARIABLES = {
    "SLURM_JOB_ID": "71234",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_SUBMIT_DIR": str(ROOT),
    "SLURM_CPUS_PER_TASK": "6",
}


def slurm(
    programs, *arguments: str, script: pathlib.Path = SBATCH, **more: str
) -> subprocess.CompletedProcess:
    variables = {"PYTHON": str(programs / "python")} | JOB_VARIABLES | more
    return run(["bash", script, *arguments], programs, **variables)


def test_every_slurm_task_derives_its_rank_inside_srun(programs):
    result = slurm(
        programs, "configs/bart_large.yaml", "train.deepspeed=zero2", "data.text_column=two words"
    )
    assert result.returncode == 0, result.stderr
    first, *tasks = result.stdout.splitlines()
    assert first.startswith(
        "srun --kill-on-bad-exit=0 --wait=120 --gpu-bind=none --distribution=block"
    )
    command = (
        "launch/train.py --config configs/bart_large.yaml train.deepspeed=zero2"
        " data.text_column=two words"
    )
    assert tasks == [f"{rank} {rank % 2} 4 2 gpu07 21234 6: {command}" for rank in range(4)]


def test_a_requeued_slurm_job_continues_its_run(programs):
    assert "train.resume" not in slurm(programs, "c.yaml").stdout
    assert (
        slurm(programs, "c.yaml", SLURM_RESTART_COUNT="1")
        .stdout.splitlines()[1]
        .endswith("c.yaml train.resume=auto")
    )


def test_a_slurm_job_near_its_time_limit_stops_its_step_and_goes_back_into_the_queue(programs):
    (programs / "srun").write_text(
        "#!/bin/bash\ntrap 'echo the step was told; exit 0' USR1\n"
        "trap 'echo killed; exit 1' TERM\nkill -USR1 $PPID\n"
        "for i in $(seq 100); do sleep 0.1; done\n"
    )
    result = slurm(programs, "c.yaml")
    assert result.returncode == 0
    assert (
        "the step was told" in result.stdout
        and "killed" not in result.stdout
        and "scontrol requeue 71234" in result.stdout
    )


def test_a_slurm_step_that_saved_and_stopped_is_queued_again(programs):
    (programs / "srun").write_text("#!/bin/sh\nexit 75\n")
    result = slurm(programs, "c.yaml")
    assert result.returncode == 0 and "scontrol requeue 71234" in result.stdout


@pytest.mark.parametrize("states", ["mixed", "", "allocated\\nmixed"])
def test_a_failed_slurm_step_fails_the_job(programs, states):
    (programs / "srun").write_text("#!/bin/sh\nexit 7\n")
    add_sinfo(programs, states)
    result = slurm(programs, "c.yaml")
    assert result.returncode == 7 and "requeue" not in result.stdout


def add_sinfo(programs, states: str) -> None:
    (programs / "sinfo").write_text(f"#!/bin/sh\nprintf '{states}\\n'\n")
    (programs / "sinfo").chmod(0o755)


@pytest.mark.parametrize("states", ["mixed\\nmixed*", "down\\nmixed", "down*"])
def test_a_slurm_step_that_lost_a_node_is_queued_again(programs, states):
    (programs / "srun").write_text("#!/bin/sh\nexit 1\n")
    add_sinfo(programs, states)
    result = slurm(programs, "c.yaml")
    assert result.returncode == 0 and "scontrol requeue 71234" in result.stdout


@pytest.mark.parametrize("code", [0, 2])
def test_a_slurm_step_that_is_done_or_refused_its_settings_is_not_queued_again(programs, code):
    (programs / "srun").write_text(f"#!/bin/sh\nexit {code}\n")
    add_sinfo(programs, "down")
    result = slurm(programs, "c.yaml")
    assert result.returncode == code and "requeue" not in result.stdout


@pytest.mark.parametrize("script, seconds", [(SBATCH, 120), (SWEEP, 180)], ids=["train", "sweep"])
def test_slurm_directives_ask_for_requeueing_and_a_signal(script, seconds):
    lines = script.read_text().splitlines()
    for directive in ("--requeue", f"--signal=B:USR1@{seconds}", "--open-mode=append"):
        assert f"#SBATCH {directive}" in lines


ARRAY = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "32", "SLURM_ARRAY_TASK_COUNT": "32"}


def test_a_task_of_a_slurm_array_runs_its_part_of_a_sweep(programs):
    (programs / "srun").write_text(
        '#!/bin/bash\nwhile [ "$1" != bash ]; do shift; done\nexec "$@"\n'
    )
    words = ("configs/sweeps/table1.yaml", "--jobs", "2")
    result = slurm(programs, *words, script=SWEEP, SLURM_ARRAY_TASK_ID="3", **ARRAY)
    assert result.returncode == 0, result.stderr
    command = "-m scaleup sweep configs/sweeps/table1.yaml --jobs 2 --shard 3/32\n"
    assert result.stdout.partition(": ")[2] == command


@pytest.mark.parametrize(
    "array", [{}, ARRAY | {"SLURM_ARRAY_TASK_MIN": "0"}, ARRAY | {"SLURM_ARRAY_TASK_COUNT": "2"}]
)
def test_a_slurm_array_that_would_leave_out_parts_of_a_sweep_is_refused(programs, array):
    result = slurm(programs, "s.yaml", script=SWEEP, SLURM_ARRAY_TASK_ID="3", **array)
    assert result.returncode == 2 and result.stderr == "error: start this with sbatch --array=1-N\n"


def test_slurm_tasks_run_in_a_container_of_pyxis(programs):
    (programs / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@" "PYTHON=$PYTHON"\n')
    more = {"SCALEUP_PYXIS": "/images/a b.sqsh", "SCALEUP_MOUNTS": "/data:/data", "PYTHON": ""}
    result = run(["bash", SBATCH, "c.yaml"], programs, **(JOB_VARIABLES | more))
    lines = result.stdout.splitlines()
    options = [
        "--container-image=/images/a b.sqsh",
        f"--container-mounts={ROOT}:{ROOT},/data:/data",
        f"--container-workdir={ROOT}",
    ]
    start = lines.index(options[0])
    assert lines[start : start + 5] == [*options, "bash", "-c"] and lines[-1] == "PYTHON=python3"


def test_slurm_tasks_run_in_one_kind_of_container(programs):
    result = slurm(programs, "c.yaml", SCALEUP_PYXIS="a.sqsh", SCALEUP_APPTAINER="a.sif")
    assert result.returncode == 2 and "not both" in result.stderr


TORCH = "-m torch.distributed.run"


@pytest.mark.parametrize(
    "env, words",
    [
        (
            {},
            "--nnodes 1 --nproc_per_node 1 --node_rank 0 --master_addr 127.0.0.1"
            " --master_port 29500",
        ),
        (
            {
                "NNODES": "4",
                "NODE_RANK": "3",
                "MASTER_ADDR": "n01",
                "MASTER_PORT": "1234",
                "NPROC": "8",
            },
            "--nnodes 4 --nproc_per_node 8 --node_rank 3 --master_addr n01 --master_port 1234",
        ),
        (
            {
                "PET_NNODES": "2",
                "PET_NODE_RANK": "1",
                "PET_MASTER_ADDR": "p-0",
                "PET_MASTER_PORT": "99",
                "PET_NPROC_PER_NODE": "gpu",
            },
            "--nnodes 2 --nproc_per_node 1 --node_rank 1 --master_addr p-0 --master_port 99",
        ),
        (
            {"PET_NNODES": "1:4", "PET_RDZV_ENDPOINT": "p-0:99", "PET_RDZV_BACKEND": "c10d"},
            "--nnodes 1:4 --nproc_per_node 1",
        ),
        (
            {"NNODES": "1:4", "MASTER_ADDR": "n01", "NPROC": "2", "LAST_CALL": "5"},
            "--nnodes 1:4 --nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint n01:29500"
            " --rdzv_id scaleup --rdzv_conf last_call_timeout=5 --max_restarts 10",
        ),
        (
            {"JOB_COMPLETION_INDEX": "3"},
            "--nnodes 1 --nproc_per_node 1 --node_rank 0 --master_addr 127.0.0.1"
            " --master_port 29500",
        ),
        (
            {"JOB_COMPLETION_INDEX": "1", "NNODES": "2", "MASTER_ADDR": "scaleup-0.scaleup"},
            "--nnodes 2 --nproc_per_node 1 --node_rank 1 --master_addr scaleup-0.scaleup"
            " --master_port 29500",
        ),
    ],
    ids=[
        *("alone", "plain", "kubeflow", "kubeflow elastic", "elastic"),
        *("indexed job of single runs", "indexed job"),
    ],
)
def test_torchrun_takes_its_place_from_the_environment(programs, env, words):
    result = run(
        ["bash", TORCHRUN, "c.yaml", "a.b=two words"],
        programs,
        PYTHON=str(programs / "python"),
        **env,
    )
    assert result.returncode == 0, result.stderr
    # Processes of an elastic run are started again with the same arguments.
    resume = " train.resume=auto" if ":" in words.split()[1] else ""
    assert (
        result.stdout.partition(": ")[2]
        == f"{TORCH} {words} --signals_to_handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
        f" {ROOT}/launch/train.py --config c.yaml a.b=two words{resume}\n"
    )


def test_torchrun_counts_gpus(programs):
    (programs / "nvidia-smi").write_text("#!/bin/sh\nprintf 'GPU 0: H200\\nGPU 1: H200\\n'\n")
    assert (
        "--nproc_per_node 2 "
        in run(["bash", TORCHRUN, "c.yaml"], programs, PYTHON=str(programs / "python")).stdout
    )


def test_torchrun_inside_a_launched_process_becomes_it(programs):
    result = run(
        ["bash", TORCHRUN, "c.yaml"],
        programs,
        PYTHON=str(programs / "python"),
        RANK="3",
        LOCAL_RANK="1",
    )
    assert result.stdout.partition(": ")[2] == f"{ROOT}/launch/train.py --config c.yaml\n"


def test_torchrun_refuses_several_nodes_without_an_address(programs):
    result = run(["bash", TORCHRUN, "c.yaml"], programs, NNODES="2")
    assert result.returncode == 2 and "MASTER_ADDR" in result.stderr


@pytest.mark.distributed
def test_torchrun_trains_on_one_host(tmp_path):
    words = overrides(make_workspace(tmp_path), tmp_path / "run", "train.max_steps=2")
    (tmp_path / "empty.yaml").write_text("")
    port = str(20000 + os.getpid() % 10000)
    result = run(
        [TORCHRUN, tmp_path / "empty.yaml", *words],
        NPROC="2",
        MASTER_PORT=port,
        PYTHON=sys.executable,
        OMP_NUM_THREADS="1",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (
        "world      2 processes on 1 host\n" in result.stdout
        and (tmp_path / "run" / "results.json").exists()
    )
