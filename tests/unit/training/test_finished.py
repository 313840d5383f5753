"""What a finished run left."""

import hashlib

import pytest

from scaleup.training import finished


@pytest.mark.parametrize(("content", "expected"), [('{"seconds": 3.4}', 3.4), ("{", None)])
def test_the_time_of_a_finished_run_is_that_of_its_file(tmp_path, content, expected):
    assert finished.seconds(tmp_path) is None
    (tmp_path / "timing.json").write_text(content)
    assert finished.seconds(tmp_path) == expected


def test_files_that_have_changed_since_a_run_are_found(tmp_path):
    same, edited = tmp_path / "same.csv", tmp_path / "edited.csv"
    for file in (same, edited):
        file.write_text("text,label")
    digest = hashlib.sha256(b"text,label").hexdigest()
    files = [same, edited, tmp_path / "missing.csv"]
    results = {"sources": [{"file": str(file), "sha256": digest} for file in files]}
    assert finished.changed_files(results) == []
    edited.write_text("text,topic")
    assert finished.changed_files(results) == [edited]
    assert finished.changed_files({"sources": [{"name": "hub"}, 3]}) == []
    assert finished.changed_files({}) == []
