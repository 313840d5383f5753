"""A signal to one of two processes during an evaluation stops both; the resumed run repeats it."""

import json
import pathlib
import socket
import subprocess
import sys

import pytest

from scaleup.training.checkpoint import verify
from tests.utils.workspace import ROOT, environment, losses, make_workspace, overrides

pytestmark = pytest.mark.distributed
# argv: the root of the repository, the batch of an evaluation in which rank 1 gets a signal (0 for
# none), and the config.
SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from transformers import TrainerCallback
from scaleup.errors import Preempted
from scaleup.settings import schema
from scaleup.training import distributed, run
from scaleup.training.preflight import CHECKS

class Signal(TrainerCallback):
    batches = 0
    def on_prediction_step(self, args, state, control, **kwargs):
        self.batches += 1
        if self.batches == int(sys.argv[2]) and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

count = Signal()
try:
    run.run(schema.load(None, sys.argv[3:], checks=CHECKS), [count])
except Preempted as stopped:
    print(f"{stopped} after {count.batches} batches", file=sys.stderr, flush=True)
distributed.leave()
"""


def run(batch: int, words: list[str]) -> list[str]:
    """Train on two processes, and return the last line that each of them has written."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(ROOT), str(batch), *words],
            env=environment(**variables, RANK=str(rank), LOCAL_RANK=str(rank)),
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    return [error.splitlines()[-1] if error else "" for error in errors]


def results(out: pathlib.Path) -> dict:
    return json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_two_processes_stop_in_the_same_batch_and_repeat_the_evaluation(tmp_path):
    workspace = make_workspace(tmp_path / "workspace")
    small = (
        "train.disable_tqdm=true",
        "train.per_device_train_batch_size=8",
        "train.per_device_eval_batch_size=4",
    )
    complete = overrides(workspace, tmp_path / "complete", *small)
    stopped = overrides(workspace, tmp_path / "stopped", *small, "train.resume=auto")
    run(0, complete)
    lines = run(6, stopped)  # an evaluation has four batches on each process
    # The signal comes after the vote of batch 6.
    expected = (
        "stopped by SIGTERM at step 8, saved; continue with train.resume=auto after 6 batches"
    )
    assert lines == [expected, expected]
    assert len(losses(tmp_path / "stopped", "eval_loss")) == 1
    run(0, stopped)
    final = [verify(tmp_path / name / "final").tensors for name in ("stopped", "complete")]
    assert final[0] == final[1]
    assert results(tmp_path / "stopped") == results(tmp_path / "complete")
