"""What a run says if a file cannot be written because the disk is full."""

import argparse
import errno
import os
import types

import pytest

from scaleup.cli import train
from scaleup.errors import RunError
from scaleup.training import run
from scaleup.training.failures import shutil, write_failure

AGAIN = "and run the same command with train.resume=auto"


@pytest.mark.parametrize(("free", "cause"), [(0, "the disk is full"), (2**30, "No space left on")])
def test_a_checkpoint_that_does_not_fit_is_answered_with_advice(tmp_path, monkeypatch, free, cause):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    message = write_failure(tmp_path / "checkpoint-9", error)
    assert message.startswith(f"{tmp_path / 'checkpoint-9'} could not be written: {cause}")
    assert message.endswith(f". There is no earlier checkpoint. Free space {AGAIN}")
    (tmp_path / "checkpoint-6").mkdir()
    message = write_failure(tmp_path / "checkpoint-9", error)
    assert f". The last good checkpoint is {tmp_path / 'checkpoint-6'}. Free" in message


def test_another_reason_is_not_taken_for_a_full_disk(tmp_path):
    error = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    message = write_failure(tmp_path / "checkpoint-9", error)
    assert "Permission denied. There is" in message and message.endswith(f". Solve this {AGAIN}")


def test_a_log_or_result_that_does_not_fit_is_answered_with_advice(monkeypatch):
    def fail(settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run, "run", fail)
    words = ["data.name=rte", "model.name=org/model", "train.output_dir=new-folder"]
    options = argparse.Namespace(config=None, overrides=words, print_config=False)
    message = f"new-folder: No space left on device; free space {AGAIN}"
    with pytest.raises(RunError, match=message):
        train._train(options)
