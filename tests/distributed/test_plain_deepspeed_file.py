"""A DeepSpeed file of one line trains, and its folder does not block a repetition."""

import json
import subprocess
import sys

import pytest

from scaleup.training.checkpoint import verify
from tests.utils.workspace import ROOT, environment, make_workspace, overrides

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def train(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_plain_stage_trains(tmp_path, stage):
    make_workspace(tmp_path)
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    words = overrides(tmp_path, tmp_path / "run", f"train.deepspeed={tmp_path / 'zero.json'}")
    result = train(*words, "train.max_steps=2")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "results.json").exists()
    verify(tmp_path / "run" / "best")


def test_a_file_that_is_refused_leaves_nothing(tmp_path):
    make_workspace(tmp_path)
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 5}}')
    words = overrides(tmp_path, tmp_path / "run", f"train.deepspeed={tmp_path / 'zero.json'}")
    result = train(*words)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "its ZeRO stage is none of 0, 1, 2, 3" in result.stderr
    assert not (tmp_path / "run").exists()
