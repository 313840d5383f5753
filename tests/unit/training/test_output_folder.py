"""Checks of paths before a run: its output folder, its DeepSpeed config and its model folder."""

import pytest

from scaleup.cli import main
from scaleup.errors import ConfigError, RunError
from scaleup.memory import plan
from scaleup.settings.schema import TrainSettings, load
from scaleup.training.output_folder import output_folder_problems
from scaleup.training.preflight import deepspeed_file, model_folder, output_folder


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def check(*overrides):
    return load(
        None, ["data.name=rte", *overrides], checks=[model_folder, output_folder, deepspeed_file]
    )


def problems(*overrides):
    with pytest.raises(ConfigError) as caught:
        check(*overrides)
    return caught.value.problems


def test_a_path_that_the_system_refuses_is_one_problem():
    long = "a" * 5000
    assert problems(f"model.name={long}/{long}/{long}")[0].startswith("model.name: no folder")
    assert problems(f"train.deepspeed={long}")[0].startswith("train.deepspeed")
    assert problems(f"train.output_dir={long}")[0].startswith("train.output_dir")
    null = problems('train.output_dir="a\\0b"')
    assert null == ["train.output_dir: a path cannot hold a null character"]


def test_the_folder_of_an_earlier_run_is_refused_unless_the_run_resumes(tmp_path):
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "config.yaml").write_text("x")
    (tmp_path / "file").write_text("x")
    assert "is not empty" in problems("train.output_dir=done")[0]
    assert check("train.output_dir=done", "train.resume=auto").train.resume == "auto"
    assert "is a file" in problems("train.output_dir=file", "train.resume=auto")[0]


def test_a_folder_without_a_run_is_refused_even_to_resume(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    (problem,) = problems("train.output_dir=other", "train.resume=auto")
    assert "holds notes.txt but no run" in problem


def test_an_output_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    train = TrainSettings(output_dir=str(tmp_path / "file" / "run"))
    assert output_folder_problems(train) == [f"train.output_dir: {tmp_path / 'file'} is a file"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.name=./nowhere/at/all", "no folder"),
        ("model.name=folder", "has no config.json"),
        ("model.name=folder/misspelt", "no folder"),
        ("train.deepspeed=zero4", "is neither a file nor one of zero1"),
    ],
)
def test_a_path_that_does_not_exist_is_refused(tmp_path, override, words):
    (tmp_path / "folder").mkdir()
    (problem,) = problems(override)
    assert problem.startswith(override.partition("=")[0] + ": ") and words in problem


def test_a_hub_id_and_a_deepspeed_file_are_accepted(tmp_path):
    (tmp_path / "zero.json").write_text("{}")
    check("model.name=org/model", "train.deepspeed=zero.json")


@pytest.mark.parametrize("name", ["new/" + "a" * 300, "a" * 300 + "/new"])
def test_a_name_that_no_file_system_takes_is_refused_before_it_is_made(name):
    (found,) = output_folder_problems(TrainSettings(output_dir=name))
    assert found.startswith("train.output_dir: ")


def test_a_plan_only_reads_so_that_the_output_folder_may_hold_a_run(tmp_path, monkeypatch, capsys):
    def stop(*arguments, **options):
        raise RunError("the settings were accepted")

    monkeypatch.setattr(plan, "make_plan", stop)
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "config.yaml").write_text("x")
    assert main(["plan", "data.name=rte", "model.name=org/model", "train.output_dir=done"]) == 1
    assert capsys.readouterr().err == "error: the settings were accepted\n"
