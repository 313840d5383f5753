"""The folder into which an export is written belongs to one export."""

import fcntl
import os

import pytest

from scaleup.errors import ConfigError
from scaleup.export import export
from scaleup.training.checkpoint import staging_folder


def test_what_a_killed_export_left_is_removed(tmp_path):
    staging = staging_folder(tmp_path / "out")
    (staging / ".work-1").mkdir(parents=True)
    (staging / ".work-1" / "before.json").touch()
    (staging / "config.json").touch()
    (staging / "link").symlink_to(tmp_path)
    assert export._claim(tmp_path / "out") == staging
    assert staging.is_dir() and not list(staging.iterdir())


def test_an_output_that_another_export_writes_is_refused_and_left_alone(tmp_path):
    staging = staging_folder(tmp_path / "out")
    staging.mkdir()
    (staging / "config.json").touch()
    other = os.open(staging, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="--output: another export is writing into"):
        export._claim(tmp_path / "out")
    os.close(other)
    assert [path.name for path in staging.iterdir()] == ["config.json"]


def test_an_output_that_another_export_has_just_written_is_refused(tmp_path, monkeypatch):
    staging, output = staging_folder(tmp_path / "out"), tmp_path / "out"
    output.mkdir()
    with pytest.raises(ConfigError, match="--output: .*out exists; choose another folder"):
        export._claim(output)
    assert not staging.exists() and output.is_dir()

    def renamed(*args, **kwargs):
        staging.rename(tmp_path / "other")
        return True

    monkeypatch.setattr(export.io, "hold", renamed)
    with pytest.raises(ConfigError, match="another export to .*out has just ended; start again"):
        export._claim(tmp_path / "out")
