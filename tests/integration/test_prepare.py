"""`scaleup prepare`, and the run that finds what it has made."""

import pytest

from scaleup.cli.entry import main
from scaleup.data import prepared
from scaleup.settings.schema import load
from scaleup.training.run import run
from tests.utils.workspace import make_workspace


@pytest.fixture
def words(tmp_path, monkeypatch):
    make_workspace(tmp_path)
    monkeypatch.chdir(tmp_path)
    return [
        "model.name=bert",
        "data.train_file=train.csv",
        "data.dev_size=20",
        "data.cache_dir=cache",
        "train.output_dir=out",
        "train.max_steps=1",
        "train.disable_tqdm=true",
    ]


def test_a_run_trains_on_what_was_prepared(words, capsys, monkeypatch, signal_handlers):
    assert main(["prepare", *words]) == 0
    output = capsys.readouterr().out
    assert "train 100, dev 20, test 0 examples" in output and "cache: prepared in" in output
    monkeypatch.setattr(prepared, "write", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(prepared, "encode", lambda *_, **__: pytest.fail("tokenized again"))
    assert run(load(None, words))["examples"] == {"train": 100, "dev": 20, "test": 0}


def test_mistakes_are_reported_and_nothing_is_left(words, capsys, tmp_path):
    assert main(["prepare", *words, "data.label_column=lable", "train.output_dir=out"]) == 2
    assert "train.csv has no column 'lable'" in capsys.readouterr().err
    assert not list(tmp_path.glob("cache/texts-*")) and not (tmp_path / "out").exists()
