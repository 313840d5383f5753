"""A DeepSpeed file of one line trains, and its folder does not block a repetition."""

import json
import subprocess
import sys

import pytest

from scaleup.training.checkpoint import verify
from tests.utils.workspace import ROOT, environment, losses, make_workspace, overrides

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


def test_a_schedule_of_the_file_is_filled_in_for_the_length_of_the_run(tmp_path):
    make_workspace(tmp_path)
    content = {
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW"},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_min_lr": 0}},
    }
    (tmp_path / "zero.json").write_text(json.dumps(content))
    words = overrides(tmp_path, tmp_path / "run", f"train.deepspeed={tmp_path / 'zero.json'}")
    result = train(*words, "train.max_steps=4", "train.warmup_steps=0.5")
    assert result.returncode == 0, result.stderr
    rates = losses(tmp_path / "run", "learning_rate")
    assert rates == pytest.approx([0, 5e-4, 5e-4, 2.5e-4])  # two steps up, two steps down


def test_a_file_that_is_refused_leaves_nothing(tmp_path):
    make_workspace(tmp_path)
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 5}}')
    words = overrides(tmp_path, tmp_path / "run", f"train.deepspeed={tmp_path / 'zero.json'}")
    result = train(*words)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "its ZeRO stage must be 0, 1, 2 or 3" in result.stderr
    assert not (tmp_path / "run").exists()
