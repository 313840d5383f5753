"""What a run says about the folder that it continues, or cannot continue."""

import shutil

import pytest

from scaleup.errors import ConfigError
from scaleup.settings.schema import load
from scaleup.training import resume
from scaleup.training.console import finished_note
from scaleup.training.manifest import Manifest
from scaleup.training.training_state import TrainingState
from tests.utils.workspace import ROOT

OLD = ROOT / "tests" / "fixtures" / "format_0_1" / "run"


@pytest.mark.parametrize(
    ("batch", "examples", "processes", "shares"),
    [
        (16, 16, 1, (16, 1)),
        (16, 16, 2, (8, 1)),
        (4, 16, 1, (4, 4)),
        (4, 16, 2, (4, 2)),
        (6, 32, 4, (4, 2)),
        (16, 14, 2, (7, 1)),
        (16, 16, 3, None),
        (16, 2, 4, None),
    ],
)
def test_the_examples_of_a_step_are_shared_out_to_any_number_of_processes(
    batch, examples, processes, shares
):
    words = ["data.name=rte", f"train.per_device_train_batch_size={batch}"]
    assert resume.fit_batch(load(None, words).train, examples, processes) == shares


def test_a_step_that_cannot_be_shared_out_is_refused_with_the_numbers(tmp_path, monkeypatch):
    manifest = Manifest({}, {}, "", None, [], {}, files={"training_state.json": {}})
    monkeypatch.setattr(resume, "_check", lambda folder, now: manifest)
    state = TrainingState.model_construct(examples=16, loss_scale=None)
    monkeypatch.setattr(resume, "read_state", lambda folder: state)
    (tmp_path / "checkpoint-3").mkdir()
    settings = load(None, ["data.name=rte", "train.resume=auto", f"train.output_dir={tmp_path}"])
    with pytest.raises(ConfigError) as caught:
        resume.choose(settings, tmp_path, manifest, [["checkpoint-3"]] * 3)
    assert "3 processes cannot share its 16 examples of an optimizer step" in str(caught.value)
    assert "train.resume=weights_only" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "offered"), [("train.learning_rate=0.05", True), ("method.r=7", False)]
)
def test_weights_only_is_offered_where_it_can_continue_the_run(tmp_path, change, offered):
    shutil.copy(OLD / "config.yaml", tmp_path / "config.yaml")
    words = [change, "train.resume=auto", f"train.output_dir={tmp_path}"]
    (problem,) = resume.changes(load(str(tmp_path / "config.yaml"), words))
    key = change.partition("=")[0]
    assert f"config.yaml has a different {key}; resume with that config" in problem
    assert ("use train.resume=weights_only" in problem) == offered


@pytest.mark.parametrize(
    ("words", "reached", "key"),
    [
        ((), (30, 3.0), "num_train_epochs"),
        ((), (20, 2.0), "early_stopping_patience"),
        (("train.early_stopping_patience=0",), (30, 3.0), "num_train_epochs"),
        (("train.max_steps=30",), (30, 3.0), "max_steps"),
        (("train.max_steps=50",), (30, 3.0), "early_stopping_patience"),
    ],
)
def test_a_finished_run_names_the_setting_that_ended_it(words, reached, key):
    settings = load(None, ["data.name=rte", "train.num_train_epochs=3", *words])
    note = finished_note(settings, dict(zip(("steps", "epochs"), reached)))
    assert note == f"this run is finished; to train on, raise train.{key}."
