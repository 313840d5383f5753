"""A node is lost for good, and the run goes on with the rest."""

import pathlib
import socket
import subprocess
import sys
import time

import psutil
import pytest

from benchmarks.cases import start_cases
from tests.utils.workspace import ROOT, environment, losses, make_workspace, overrides

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
STEPS = (
    "train.max_steps=40",
    "train.eval_strategy=steps",
    "train.eval_steps=10",
    "train.lr_scheduler_type=constant",
    "train.warmup_steps=0",
    "train.learning_rate=1e-4",
    "train.early_stopping_patience=0",
    "train.disable_tqdm=true",
)


def kill(node: subprocess.Popen) -> None:
    """Send SIGKILL to a launcher and its processes, as if the host lost its power."""
    launcher = psutil.Process(node.pid)
    for process in [launcher, *launcher.children(recursive=True)]:
        process.kill()
    node.wait()


def wait_for(path: pathlib.Path, nodes: list[subprocess.Popen], log: pathlib.Path) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        running = [node.poll() for node in nodes] == [None] * len(nodes)
        assert running and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


def test_a_run_survives_the_loss_of_a_node(tmp_path):
    workspace = make_workspace(tmp_path)
    assert start_cases(
        {"one": overrides(workspace, tmp_path / "one", *STEPS)},
        tmp_path / "cases.json",
        1,
        timeout=500,
        env=environment(),
    ) == {"one": None}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    (tmp_path / "empty.yaml").write_text("")
    out, half = tmp_path / "run", "train.per_device_train_batch_size=8"
    command = [str(ROOT / "launch" / "torchrun.sh"), str(tmp_path / "empty.yaml")]
    command += overrides(workspace, out, *STEPS, half)
    env = environment(
        NNODES="1:4",
        NPROC="1",
        MASTER_ADDR="localhost",
        MASTER_PORT=port,
        LAST_CALL="5",
        PYTHON=sys.executable,
        PET_LOCAL_ADDR="127.0.0.1",
        GLOO_SOCKET_IFNAME="lo",
    )
    nodes: list[subprocess.Popen] = []
    logs = [tmp_path / f"node{number}.log" for number in range(2)]
    try:
        for log in logs:
            with log.open("w") as file:
                nodes.append(
                    subprocess.Popen(
                        command, stdout=file, stderr=subprocess.STDOUT, env=env, cwd=ROOT
                    )
                )
            time.sleep(1)  # the first one holds the rendezvous
        wait_for(out / "checkpoint-10", nodes, logs[0])
        kill(nodes[1])
        assert nodes[0].wait(timeout=400) == 0, logs[0].read_text()[-3000:]
    finally:
        for node in nodes:
            if node.poll() is None:
                kill(node)
    said = "".join(log.read_text() for log in logs)
    assert "world      2 processes on 1 host" in said
    assert "1 per process" not in said and "so that a step keeps its 16 examples" in said
    assert losses(out, "step") == losses(tmp_path / "one", "step")
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
