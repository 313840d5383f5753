"""The script that runs the MPNet sweep on a GPU within a time limit, here tiny runs on a CPU."""

import json
import pathlib
import subprocess
import sys

import pytest

from benchmarks.cases import ROOT
from scaleup.experiments import results
from tests.utils.workspace import environment, make_workspace

pytestmark = pytest.mark.slow


@pytest.fixture
def evidence(tmp_path, data_dir):
    """Return a function that runs the script with the given words."""
    workspace = make_workspace(tmp_path)
    content = {
        "output": "runs/tiny",
        "base": {
            "data": {"dev_size": 4, "test_size": 8, "max_length": 16},
            "train": {"max_steps": 2, "use_cpu": True},
        },
        "methods": {"lora": ["method.submodules=[lora]"], "bitfit": ["method=bitfit"]},
        "tasks": ["rte"],
        "k": [8],
        "seeds": [0],
    }
    (tmp_path / "sweep.yaml").write_text(json.dumps(content))

    def run(output: pathlib.Path, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks.evidence_gpu", "--jobs", "2"]
        command += ["--sweep", str(tmp_path / "sweep.yaml"), "--model", str(workspace / "bert")]
        command += ["--glue", str(data_dir / "glue"), "--output", str(output), *words]
        return subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
        )

    return run


def test_the_table_has_the_trials_that_finished_in_time(evidence, tmp_path):
    run = evidence(tmp_path / "table.csv")
    assert run.returncode == 0, run.stderr
    names = [row.folder.name for row in results.load([str(tmp_path / "table.csv")])]
    assert sorted(names) == ["rte-8-bitfit-0", "rte-8-lora-0"]


def test_a_limit_before_the_first_result_is_reported(evidence, tmp_path):
    run = evidence(tmp_path / "table.csv", "--seconds", "1")
    assert run.returncode == 1 and "error: no trial has finished" in run.stderr
    assert not (tmp_path / "table.csv").exists()
