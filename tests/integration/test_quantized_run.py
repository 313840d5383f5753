"""Whole runs with quantised weights, on the CPU as it is."""

import json
import pathlib
import subprocess
import sys

import pytest

from scaleup.export import export
from scaleup.training.checkpoint import verify
from tests.utils.workspace import ROOT, environment, make_workspace, overrides


def train(*words: str) -> None:
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_evaluating_more_often_and_resuming_leave_an_nf4_run_the_same_bits(tmp_path: pathlib.Path):
    """Its exports pass their verification, too. The other run is evaluated once per epoch."""
    folder = make_workspace(tmp_path)
    shared = (
        "model.quantization=nf4",
        "train.lr_scheduler_type=constant",
        "train.warmup_steps=0",
        "train.max_steps=8",
    )
    often = ("train.eval_strategy=steps", "train.eval_steps=1")
    train(*overrides(folder, folder / "once", *shared))
    train(*overrides(folder, folder / "often", *shared, *often, "train.max_steps=4"))
    train(*overrides(folder, folder / "often", *shared, *often, "train.resume=auto"))
    ends = [verify(folder / name / "final").tensors for name in ("once", "often")]
    assert ends[0] == ends[1]
    for kind in ("exact", "standalone"):
        out = folder / f"out-{kind}"
        options = export.ExportOptions(checkpoint=folder / "often" / "best", kind=kind, output=out)
        proof = export.run(options, print).proof
        assert proof.reload_difference < 1e-5
        results = json.loads((folder / "often" / "results.json").read_text())
        expected = 100 * results["dev"]["accuracy"]
        assert proof.metric.before == pytest.approx(expected, abs=1e-3)
