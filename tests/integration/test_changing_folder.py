"""The output folder changes while a run writes: the run ends in one line or with right results."""

import json
import pathlib
import shutil

import pytest
from transformers import TrainerCallback

from scaleup.errors import CheckpointError, RunError
from scaleup.settings import schema
from scaleup.training.checkpoint import verify
from scaleup.training.preflight import CHECKS
from scaleup.training.run import run
from tests.utils.workspace import make_workspace, overrides


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> pathlib.Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def _replace_by_file(path: pathlib.Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.write_text("x")


def _replace_by_folder(path: pathlib.Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir(exist_ok=True)
    (path / "mine.txt").write_text("x")


CHANGES = {
    "the folder is removed": shutil.rmtree,
    "the folder becomes a file": _replace_by_file,
    "the folder is renamed": lambda out: out.rename(out.with_name("elsewhere")),
    "the best checkpoint is removed": lambda out: shutil.rmtree(out / "checkpoint-4"),
    "the best checkpoint is emptied": lambda out: [
        path.unlink() for path in (out / "checkpoint-4").iterdir()
    ],
    "the best weights are removed": lambda out: (
        out / "checkpoint-4" / "adapter_model.safetensors"
    ).unlink(),
    "the best weights are cut": lambda out: (
        out / "checkpoint-4" / "adapter_model.safetensors"
    ).write_bytes(b"x"),
    "the log becomes a folder": lambda out: _replace_by_folder(out / "log.jsonl"),
    "the staging folder is a file": lambda out: (out / ".checkpoint-8.draft").write_text("x"),
    "results.json is a folder": lambda out: _replace_by_folder(out / "results.json"),
}
# The run replaces what lies under the names that it writes.
HARMLESS = {
    "the next checkpoint is there": lambda out: _replace_by_folder(out / "checkpoint-8"),
    "the next checkpoint is a file": lambda out: (out / "checkpoint-8").write_text("x"),
    "best is a file": lambda out: (out / "best").write_text("x"),
}


class _Change(TrainerCallback):
    """Change the folder after the first checkpoint, which has the best score."""

    def __init__(self, out: pathlib.Path, how: str):
        self.out, self.how = out, how

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        metrics["eval_accuracy"] = 1.0 / state.global_step

    def on_save(self, args, state, control, **kwargs) -> None:
        if state.global_step == 4:
            (CHANGES | HARMLESS)[self.how](self.out)


def train(workspace: pathlib.Path, out: pathlib.Path, how: str) -> None:
    settings = schema.load(
        None, overrides(workspace, out, "train.disable_tqdm=true"), checks=CHECKS
    )
    run(settings, [_Change(out, how)])


@pytest.mark.parametrize("how", CHANGES)
def test_a_changed_folder_ends_the_run_in_one_line(workspace, tmp_path, how):
    with pytest.raises((RunError, CheckpointError, OSError)) as caught:
        train(workspace, tmp_path / "run", how)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    results = tmp_path / "run" / "results.json"
    assert not results.is_file()


@pytest.mark.parametrize("how", HARMLESS)
def test_what_lies_under_a_name_of_the_run_is_replaced(workspace, tmp_path, how):
    train(workspace, tmp_path / "run", how)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["best_step"] == 4
    verify(tmp_path / "run" / "best")
