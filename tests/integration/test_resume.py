"""Stop and resume: signals, damaged and foreign checkpoints, full disks, retention.

The runs are in this process, with the real training loop.
"""

import json
import os
import pathlib
import resource as limits
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from scaleup.backbone.method import load_weights
from scaleup.errors import CheckpointError, ConfigError, Preempted, RunError
from scaleup.settings import schema as config
from scaleup.settings.schema import TrainSettings
from scaleup.training import resume
from scaleup.training import run as train
from scaleup.training.callbacks import rewind
from scaleup.training.checkpoint import verify
from scaleup.training.output_folder import output_folder_problems
from scaleup.training.preflight import CHECKS
from tests.utils.workspace import losses, make_workspace, overrides


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> pathlib.Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(autouse=True)
def signals():
    """Restore the signal handlers that a run replaces."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(workspace: pathlib.Path, out: pathlib.Path, *more: str, callbacks=()) -> dict:
    arguments = overrides(workspace, out, "train.disable_tqdm=true", *more)
    return train.run(config.load(None, arguments, checks=CHECKS), callbacks)


class At(TrainerCallback):
    """Call `action` at the end of a step."""

    def __init__(self, step: int, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            self.action()


@pytest.fixture(scope="module")
def finished(workspace, tmp_path_factory) -> pathlib.Path:
    """Three epochs of four steps, never stopped."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run(workspace, out)
    return out


@pytest.fixture
def copy(finished, tmp_path) -> pathlib.Path:
    """The finished run as it was before it came to its end."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "results.json").unlink()
    return out


def weights(checkpoint: pathlib.Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "adapter_model.safetensors")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stopped_run_saves_and_goes_on_to_the_same_end(workspace, finished, tmp_path, number):
    """In the middle of an epoch: step 6 of 12."""
    out = tmp_path / "run"
    with pytest.raises(
        Preempted,
        match=f"stopped by {signal.Signals(number).name} at step 6, saved;"
        " continue with train.resume=auto",
    ):
        run(workspace, out, callbacks=[At(5, lambda: os.kill(os.getpid(), number))])
    assert verify(out / "checkpoint-6").run == {"processes": 1, "zero_stage": 0}
    assert not (out / "final").exists() and not (out / "results.json").exists()
    assert (
        losses(out, "eval_loss") == losses(finished, "eval_loss")[:1]
    )  # nothing is scored in the middle of an epoch
    run(workspace, out, "train.resume=auto")
    assert verify(out / "final").tensors == verify(finished / "final").tensors
    assert (out / "results.json").read_bytes() == (finished / "results.json").read_bytes()


def test_a_finished_run_started_again_has_nothing_to_do(workspace, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    results = run(workspace, finished, "train.resume=auto")
    assert results == json.loads((finished / "results.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    screen = capsys.readouterr().out
    assert "this run is finished; to train on, raise train.num_train_epochs." in screen
    seconds = json.loads((finished / "timing.json").read_text())["seconds"]
    assert screen.endswith(f"; {seconds:.0f} s\n") and seconds > 0


def test_early_stopping_counts_on_and_a_run_that_was_stopping_stops(workspace, tmp_path):
    """Killed after the checkpoint of the last epoch, before the end: not one step more."""
    out, patience = tmp_path / "run", "train.early_stopping_patience=1"
    slow = (
        "train.num_train_epochs=9",
        "train.learning_rate=1e-9",
        patience,
    )  # no epoch is better than the first
    run(workspace, out, *slow)
    stopped = json.loads((out / "results.json").read_text())
    assert stopped["steps"] == 8
    (out / "results.json").unlink()
    shutil.rmtree(out / "final")
    run(workspace, out, *slow, "train.resume=auto")
    assert json.loads((out / "results.json").read_text()) == stopped


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda folder: (folder / "training_state.safetensors").write_bytes(b"x"),
            "training_state.safetensors is missing or differs",
        ),
        (
            lambda folder: (folder / "trainer_state.json").unlink(),
            "trainer_state.json is missing or differs",
        ),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(
                (folder / "adapter_model.safetensors").read_bytes()[:-9]
            ),
            "damaged",
        ),
        (
            lambda folder: (folder / "manifest.json").write_text('{"format_version": 1}'),
            "format version 1; this scaleup reads",
        ),
        (
            lambda folder: (folder / "manifest.json").unlink(),
            "this is not a finished checkpoint of scaleup",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(workspace, copy, damage, words):
    damage(copy / "checkpoint-12")
    with pytest.raises(CheckpointError, match=words) as caught:
        run(workspace, copy, "train.resume=auto")
    assert "\n" not in str(caught.value) and f"remove {copy / 'checkpoint-12'}" in str(caught.value)


def test_another_backbone_is_refused(workspace, copy, tmp_path):
    """The same path and settings, other weights behind it."""
    moved = workspace / "bert"
    saved = tmp_path / "bert"
    shutil.copytree(moved, saved)
    try:
        (moved / "config.json").write_text(
            (moved / "config.json")
            .read_text()
            .replace('"hidden_act": "gelu"', '"hidden_act": "relu"')
        )
        with pytest.raises(CheckpointError, match="trained on another backbone"):
            run(workspace, copy, "train.resume=auto")
    finally:
        shutil.rmtree(moved)
        shutil.copytree(saved, moved)


@pytest.mark.parametrize(
    "change, words",
    [
        ("train.learning_rate=0.05", "train.learning_rate"),
        ("train.seed=7", "train.seed"),
        ("train.dataloader_drop_last=true", "train.dataloader_drop_last"),
        ("method.r=4", "method.r"),
    ],
)
def test_settings_with_which_it_would_be_another_run_are_refused(workspace, copy, change, words):
    with pytest.raises(
        ConfigError, match=f"config.yaml has a different .*{words}; resume with that config"
    ):
        run(workspace, copy, "train.resume=auto", change)


def test_data_that_changed_since_is_refused(tmp_path):
    own = make_workspace(tmp_path / "own")
    run(own, tmp_path / "run", "train.max_steps=4")
    (tmp_path / "run" / "results.json").unlink()
    path = own / "train.csv"
    path.write_text(
        path.read_text().replace("good", "tmp").replace("bad", "good").replace("tmp", "bad")
    )
    with pytest.raises(CheckpointError, match="trained on other data; a file has changed since"):
        run(own, tmp_path / "run", "train.max_steps=4", "train.resume=auto")


def test_a_folder_that_is_no_run_is_left_alone(workspace, tmp_path):
    foreign = tmp_path / "foreign"
    (foreign / ".config.old").mkdir(parents=True)
    for name in (".bashrc.old", ".thesis.part", "notes.txt"):
        (foreign / name).touch()
    with pytest.raises(
        ConfigError, match=r"holds .* but no run \(no config.yaml\); choose another"
    ):
        run(workspace, foreign, "train.resume=auto")
    assert {path.name for path in foreign.iterdir()} == {
        ".config.old",
        ".bashrc.old",
        ".thesis.part",
        "notes.txt",
    }


def test_a_run_that_was_killed_at_its_first_file_goes_on(workspace, tmp_path):
    for name in (".config.yaml.part", ".lock", "train.out"):
        (tmp_path / name).touch()
    assert output_folder_problems(TrainSettings(output_dir=str(tmp_path), resume="auto")) == []
    (tmp_path / "train.out").unlink()
    assert output_folder_problems(TrainSettings(output_dir=str(tmp_path))) == []
    (tmp_path / "notes.txt").touch()
    assert "is not empty" in output_folder_problems(TrainSettings(output_dir=str(tmp_path)))[0]


def test_only_names_that_a_run_makes_are_cleared(tmp_path):
    ours = (
        ".checkpoint-3.draft",
        ".best.gone",
        ".results.json.part",
        ".log.jsonl.part",
        ".probe-0123abcd",
    )
    theirs = (".bashrc.old", ".thesis.part", ".cfg.gone", ".probe-mine.txt")
    for name in (*ours, *theirs):
        (tmp_path / name).touch()
    resume.clear_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(theirs)


def test_without_its_best_checkpoint_a_run_cannot_go_on(workspace, copy, monkeypatch):
    newest = resume.checkpoints(copy)[-1]
    state = json.loads((newest / "trainer_state.json").read_text())
    best = next(path for path in resume.checkpoints(copy) if path != newest)
    state["best_global_step"] = int(best.name.partition("-")[2])  # whichever it was
    monkeypatch.setattr(resume, "trainer_state", lambda folder: state)
    shutil.rmtree(best)
    with pytest.raises(
        CheckpointError, match="It was the best so far, and the run has to end with it"
    ):
        run(workspace, copy, "train.resume=auto")


def test_weights_only_begins_anew_where_the_training_is_another(workspace, copy):
    before = len(resume.checkpoints(copy))
    assert before
    run(
        workspace,
        copy,
        "train.resume=weights_only",
        "train.per_device_train_batch_size=4",
        "train.max_steps=4",
    )
    assert len(resume.checkpoints(copy / "before-1")) == before
    assert json.loads((copy / "results.json").read_text())["steps"] == 4


@pytest.mark.parametrize("mode", ["weights_only", "auto"])
def test_a_run_that_began_from_old_weights_does_so_again_if_it_died_before_its_first_checkpoint(
    workspace, copy, mode, capsys
):
    more = ("train.per_device_train_batch_size=4", "train.max_steps=4", "train.learning_rate=1e-12")
    run(workspace, copy, "train.resume=weights_only", *more)
    old = weights(copy / "before-1" / "checkpoint-12")
    for path in ("checkpoint-4", "best", "final"):
        shutil.rmtree(copy / path)
    (copy / "results.json").unlink()
    capsys.readouterr()
    run(workspace, copy, f"train.resume={mode}", *more)
    new = weights(copy / "final")
    assert max((old[name] - new[name]).abs().max().item() for name in old) < 1e-6
    assert "before-1/checkpoint-12, from step 0" in capsys.readouterr().out


def test_a_run_that_goes_on_at_its_end_takes_no_more_steps(workspace, tmp_path):
    """Stopped by max_steps in the middle of an epoch of four, and killed while it was scored."""
    more = ("train.max_steps=6", "train.eval_strategy=steps", "train.eval_steps=3")
    first = run(workspace, tmp_path / "run", *more)
    end = weights(tmp_path / "run" / "final")
    (tmp_path / "run" / "results.json").unlink()
    again = run(workspace, tmp_path / "run", *more, "train.resume=auto")
    now = weights(tmp_path / "run" / "final")
    assert (
        again == first
        and again["steps"] == 6
        and all(torch.equal(now[name], end[name]) for name in end)
    )
    assert [path.name for path in resume.checkpoints(tmp_path / "run")] == [
        "checkpoint-3",
        "checkpoint-6",
    ]


def test_the_best_checkpoint_must_have_been_saved(workspace, tmp_path):
    with pytest.raises(ConfigError, match="train.save_steps: 4, but dev is scored every 2 steps"):
        run(
            workspace,
            tmp_path / "run",
            "train.eval_strategy=steps",
            "train.eval_steps=2",
            "train.save_steps=4",
        )
    results = run(
        workspace,
        tmp_path / "other",
        "train.eval_strategy=steps",
        "train.logging_steps=2",
        "train.max_steps=4",
    )
    assert [path.name for path in resume.checkpoints(tmp_path / "other")] == [
        "checkpoint-2",
        "checkpoint-4",
    ] and results["best_step"] in (2, 4)


def test_weights_of_a_whole_model_go_where_they_belong_and_are_refused_where_they_do_not(tmp_path):
    model = torch.nn.BatchNorm1d(3)
    state = {"weight": torch.tensor([1.0, 2, 3]), "running_mean": torch.tensor([4.0, 5, 6])}
    save_file(state, tmp_path / "model.safetensors")
    load_weights(model, tmp_path)
    assert torch.equal(model.weight, state["weight"]) and torch.equal(
        model.running_mean, state["running_mean"]
    )
    save_file({"weight": torch.zeros(4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="do not fit this model: weight is"):
        load_weights(model, tmp_path)
    save_file({"gone": torch.zeros(4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="do not fit this model"):
        load_weights(model, tmp_path)


def test_a_damaged_log_loses_its_bad_lines(tmp_path):
    (tmp_path / "log.jsonl").write_text(
        '{"step": 1, "loss": 1.0}\nnonsense\n{"loss": 2}\n{"step": 2}'
    )
    rewind(tmp_path / "log.jsonl", 5)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'


def test_damaged_results_are_named(workspace, tmp_path):
    run(workspace, tmp_path / "run", "train.max_steps=4")
    (tmp_path / "run" / "results.json").write_text("")
    with pytest.raises(CheckpointError, match="results.json is damaged; remove it"):
        run(workspace, tmp_path / "run", "train.max_steps=4", "train.resume=auto")


def test_another_global_batch_is_refused_and_weights_only_goes_on(workspace, copy):
    change = "train.per_device_train_batch_size=4"
    with pytest.raises(
        ConfigError,
        match="it had 16 examples in an optimizer step, and this run has"
        " 4 per process x 1 process x 1 accumulation = 4. .*train.resume=weights_only",
    ):
        run(workspace, copy, "train.resume=auto", change)
    old = weights(copy / "checkpoint-12")
    still = ("train.resume=weights_only", "train.learning_rate=1e-12", change)
    run(workspace, copy, *still)
    new = weights(copy / "final")
    assert max((old[name] - new[name]).abs().max().item() for name in old) < 1e-6
    assert (copy / "before-1" / "checkpoint-12").is_dir() and (
        copy / "before-1" / "log.jsonl"
    ).is_file()
    assert len(resume.checkpoints(copy)) == 3
    (copy / "results.json").unlink()
    run(workspace, copy, *still)  # the same command after a requeue resumes what it started
    assert not (copy / "before-2").exists()


def hidden(out: pathlib.Path) -> list[str]:
    return [path.name for path in out.glob(".*")]


def test_a_disk_that_takes_no_more_ends_the_run_and_keeps_the_last_good_checkpoint(
    workspace, tmp_path
):
    out = tmp_path / "run"
    before = limits.getrlimit(limits.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(
            RunError,
            match=r"checkpoint-8 could not be written: .*"
            r"The last good checkpoint is .*checkpoint-4",
        ):
            run(
                workspace,
                out,
                callbacks=[
                    At(6, lambda: limits.setrlimit(limits.RLIMIT_FSIZE, (20_000, before[1])))
                ],
            )
    finally:
        limits.setrlimit(limits.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.name for path in resume.checkpoints(out)] == ["checkpoint-4"] and hidden(out) == [
        ".lock"
    ]
    run(workspace, out, "train.resume=auto")
    assert hidden(out) == [".lock"]


def test_a_loss_that_is_not_a_number_names_step_and_batch_and_keeps_the_last_good_checkpoint(
    workspace, tmp_path
):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
            if state.global_step == 5:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(torch.nan)

    with pytest.raises(
        RunError,
        match=r"not a number at step 6 \(its batch 1, rank 0\)\. "
        r"The last good checkpoint is .*checkpoint-4",
    ):
        run(workspace, tmp_path / "run", "train.logging_steps=4", callbacks=[Poison()])


def test_old_checkpoints_go_and_the_best_stays(tmp_path):
    for step in (4, 8, 12, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    resume.keep_newest(tmp_path, 1, step=100, best_step=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-8"]


def test_a_later_checkpoint_that_other_hosts_lack_does_not_count_as_the_newest(tmp_path):
    for step in (4, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
    resume.keep_newest(tmp_path, 1, step=6, best_step=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-6", "checkpoint-8"]


def test_what_a_killed_run_left_half_written_is_cleared(tmp_path):
    for name in (".checkpoint-8.draft", ".checkpoint-4.gone", ".best.old", "checkpoint-8"):
        (tmp_path / name).mkdir()
    (tmp_path / ".results.json.part").write_text("{")
    (tmp_path / ".mine").write_text("")
    resume.clear_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "best", "checkpoint-8"]


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 4}\n{"step": 5}\n{"st')
    rewind(log, 4)
    assert log.read_text() == '{"step": 1}\n{"step": 4}\n'


def test_a_finished_run_whose_data_has_changed_is_refused(workspace, tmp_path):
    file = tmp_path / "mine.csv"
    content = (workspace / "train.csv").read_text()
    file.write_text(content)
    more = (f"data.train_file={file}", "train.max_steps=2", "train.resume=auto")
    first = run(workspace, tmp_path / "run", *more)
    assert run(workspace, tmp_path / "run", *more) == first
    file.write_text(content.replace("film", "plot"))
    with pytest.raises(ConfigError, match=r"is finished, and .*mine.csv has changed since"):
        run(workspace, tmp_path / "run", *more)
