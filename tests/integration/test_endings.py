"""How runs end: without a best checkpoint, by signals during an evaluation, at a file-size limit.

The runs are in this process, with the real training loop: three epochs of four steps.
"""

import json
import math
import os
import pathlib
import resource
import shutil
import signal

import pytest
from transformers import TrainerCallback

from scaleup.errors import ConfigError, Preempted, RunError
from scaleup.settings import schema
from scaleup.training import run as training
from scaleup.training.checkpoint import verify
from scaleup.training.preflight import CHECKS
from scaleup.training.trainer import RunTrainer
from tests.utils.workspace import losses, make_workspace, overrides

STEPS = ("train.eval_strategy=steps", "train.eval_steps=4")
# Logged at other steps than saved.
BEST = ("train.save_strategy=best", "train.eval_strategy=steps", "train.eval_steps=2")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> pathlib.Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(autouse=True)
def signals():
    """Restore the signal handlers that a run replaces."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(workspace: pathlib.Path, out: pathlib.Path, *more: str, callbacks=()) -> dict:
    small = ("train.disable_tqdm=true", "train.per_device_eval_batch_size=8")
    arguments = overrides(workspace, out, *small, *more)
    return training.run(schema.load(None, arguments, checks=CHECKS), callbacks)


class Signal(TrainerCallback):
    """Send a signal to this process at the end of a step, or in a batch of an evaluation."""

    def __init__(self, number: int, step: int = 0, batch: int = 0):
        self.number, self.step, self.batch, self.batches = number, step, batch, 0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)

    def on_prediction_step(self, args, state, control, **kwargs) -> None:
        self.batches += 1
        if self.batches == self.batch:
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def finished(workspace, tmp_path_factory) -> dict[tuple[str, ...], pathlib.Path]:
    """Runs that were never stopped, by what is special about them."""
    folder, runs = tmp_path_factory.mktemp("finished"), {}
    for number, more in enumerate(((), STEPS, (*BEST, "train.logging_steps=3"))):
        runs[more] = folder / str(number)
        run(workspace, runs[more], *more)
    return runs


def lines(out: pathlib.Path) -> list[dict]:
    """Return the lines of log.jsonl without times."""
    content = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    timed = ("runtime", "per_second", "preparation_time")
    return [{k: v for k, v in line.items() if not k.endswith(timed)} for line in content]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("train.eval_delay=4",), "4 epochs, but training ends after 3"),
        (("train.eval_delay=2", "train.max_steps=6"), "2 epochs, but training ends after 1.5"),
        ((*STEPS, "train.eval_delay=13"), "13 steps, but training ends after 12"),
    ],
)
def test_an_evaluation_that_would_never_come_is_refused(workspace, tmp_path, settings, words):
    with pytest.raises(ConfigError, match=f"train.eval_delay: {words}"):
        run(workspace, tmp_path / "run", *settings)
    assert not any((tmp_path / "run").iterdir())  # nothing is in the way of the next try


def test_a_delayed_evaluation_at_the_very_end_is_enough(workspace, tmp_path):
    assert run(workspace, tmp_path / "run", "train.eval_delay=3")["best_step"] == 12


def test_without_one_dev_score_that_is_a_number_no_model_is_the_best(
    workspace, tmp_path, monkeypatch
):
    evaluate = RunTrainer.evaluate

    def fail(self, *args, **kwargs) -> dict[str, float]:
        return evaluate(self, *args, **kwargs) | {"eval_accuracy": math.nan}

    monkeypatch.setattr(RunTrainer, "evaluate", fail)
    with pytest.raises(RunError, match="the dev accuracy was never a number, so there is no"):
        run(workspace, tmp_path / "run", "train.max_steps=4")
    assert not (tmp_path / "run" / "best").exists()
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("step", [5, 6, 8])
def test_the_log_of_a_resumed_run_is_that_of_an_uninterrupted_one(
    workspace, finished, tmp_path, step
):
    """The summary line has the mean training loss over all steps."""
    for number, (more, complete) in enumerate(finished.items()):
        out = tmp_path / str(number)
        with pytest.raises(Preempted):
            run(workspace, out, *more, callbacks=[Signal(signal.SIGTERM, step=step - 1)])
        run(workspace, out, *more, "train.resume=auto")
        (expected,) = losses(complete, "train_loss")
        assert losses(out, "train_loss") == [pytest.approx(expected, abs=1e-12)]
        if "train.save_strategy=best" not in more:
            assert lines(out)[:-1] == lines(complete)[:-1]


def test_the_state_of_trainer_does_not_grow_with_the_log(finished):
    for more in ((), STEPS):
        states = finished[more].glob("checkpoint-*/trainer_state.json")
        sizes = {path.parent.name: path.stat().st_size for path in states}
        assert sizes.keys() == {"checkpoint-4", "checkpoint-8", "checkpoint-12"}
        assert max(sizes.values()) - min(sizes.values()) < 50 and max(sizes.values()) < 2000


def test_sighup_saves_like_sigterm(workspace, tmp_path):
    with pytest.raises(Preempted, match="stopped by SIGHUP at step 6, saved"):
        run(workspace, tmp_path / "run", callbacks=[Signal(signal.SIGHUP, step=5)])
    verify(tmp_path / "run" / "checkpoint-6")


def test_sighup_stays_ignored_under_nohup(workspace, tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    results = run(
        workspace, tmp_path / "run", "train.max_steps=4", callbacks=[Signal(signal.SIGHUP, step=2)]
    )
    assert results["steps"] == 4


@pytest.mark.parametrize("more", [(), STEPS, (*BEST, "train.logging_steps=3")])
@pytest.mark.parametrize("batch", [5, 10])
def test_a_signal_ends_an_evaluation_which_the_resumed_run_repeats(
    workspace, finished, tmp_path, more, batch
):
    """An evaluation has four batches. The signal comes when a batch has been evaluated."""
    out, count = tmp_path / "run", Signal(signal.SIGTERM, batch=batch)
    interval = 2 if "train.save_strategy=best" in more else 4
    step = interval * math.ceil(batch / 4)
    with pytest.raises(Preempted, match=f"stopped by SIGTERM at step {step}, saved"):
        run(workspace, out, *more, callbacks=[count])
    assert count.batches == batch
    verify(out / f"checkpoint-{step}")
    assert len(losses(out, "eval_loss")) == math.ceil(batch / 4) - 1
    run(workspace, out, *more, "train.resume=auto")
    complete = finished[more]
    assert verify(out / "final").tensors == verify(complete / "final").tensors
    assert (out / "results.json").read_bytes() == (complete / "results.json").read_bytes()
    assert losses(out, "eval_loss") == losses(complete, "eval_loss")
    assert losses(out, "train_loss") == pytest.approx(losses(complete, "train_loss"), abs=1e-12)
    if "train.save_strategy=best" not in more:
        assert lines(out)[:-1] == lines(complete)[:-1]


@pytest.mark.parametrize("more", [(), ("train.eval_strategy=steps", "train.eval_steps=3")])
def test_dropout_goes_on_after_a_repeated_evaluation(workspace, tmp_path, more):
    """Reading the examples of an evaluation draws from the random state, also a second time."""
    shutil.copytree(workspace, tmp_path / "with-dropout")
    path = tmp_path / "with-dropout" / "bert" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_dropout_prob": 0.1}))
    more = ("train.num_train_epochs=2", *more)
    run(path.parents[1], tmp_path / "complete", *more)
    with pytest.raises(Preempted):
        callbacks = [Signal(signal.SIGTERM, batch=2)]
        run(path.parents[1], tmp_path / "run", *more, callbacks=callbacks)
    run(path.parents[1], tmp_path / "run", *more, "train.resume=auto")
    assert losses(tmp_path / "run") == losses(tmp_path / "complete")


def test_a_signal_in_the_last_step_leaves_the_last_evaluation_to_the_resumed_run(
    workspace, tmp_path
):
    """The run ends after step 6, in the middle of an epoch of four steps."""
    out, end = tmp_path / "run", "train.max_steps=6"
    expected = run(workspace, tmp_path / "complete", end)
    with pytest.raises(Preempted, match="at step 6, saved"):
        run(workspace, out, end, callbacks=[Signal(signal.SIGTERM, step=5)])
    assert run(workspace, out, end, "train.resume=auto") == expected
    assert losses(out, "eval_loss") == losses(tmp_path / "complete", "eval_loss")


def test_a_resumed_run_does_not_repeat_the_evaluation_at_the_start(workspace, tmp_path):
    """It would count as one more evaluation without a better score."""
    out, more = tmp_path / "run", ("train.eval_on_start=true", "train.num_train_epochs=2")
    run(workspace, tmp_path / "complete", *more)
    with pytest.raises(Preempted):
        run(workspace, out, *more, callbacks=[Signal(signal.SIGTERM, step=5)])
    run(workspace, out, *more, "train.resume=auto")
    assert lines(out)[:-1] == lines(tmp_path / "complete")[:-1]


def test_early_stopping_that_a_repeated_evaluation_decides_takes_no_more_steps(workspace, tmp_path):
    more = ("train.early_stopping_patience=1", "train.learning_rate=1e-9")
    expected = run(workspace, tmp_path / "complete", *more)
    assert expected["steps"] == 8
    with pytest.raises(Preempted):
        run(workspace, tmp_path / "run", *more, callbacks=[Signal(signal.SIGTERM, batch=6)])
    assert run(workspace, tmp_path / "run", *more, "train.resume=auto") == expected


def test_a_resumed_run_may_stop_early_although_it_began_without(workspace, tmp_path):
    out, slow = tmp_path / "run", "train.learning_rate=1e-9"  # no epoch is better than the first
    run(workspace, out, slow, "train.num_train_epochs=1", "train.early_stopping_patience=0")
    more = ("train.early_stopping_patience=1", "train.resume=auto")
    assert run(workspace, out, slow, *more)["steps"] == 8


@pytest.mark.parametrize("batch", [13, 18])
def test_a_signal_ends_the_final_scoring_which_the_resumed_run_repeats(
    workspace, finished, tmp_path, batch
):
    out, count = tmp_path / "run", Signal(signal.SIGTERM, batch=batch)
    with pytest.raises(Preempted, match="stopped by SIGTERM .*; continue with train.resume=auto"):
        run(workspace, out, callbacks=[count])
    assert count.batches == batch and not (out / "results.json").exists()
    run(workspace, out, "train.resume=auto")
    complete = finished[()]
    assert (out / "results.json").read_bytes() == (complete / "results.json").read_bytes()


def test_an_interrupted_run_ends_its_bar_and_starts_anew_if_nothing_was_saved(
    workspace, tmp_path, capsys
):
    # A shell lets the programs that it starts in the background ignore this signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out, short = tmp_path / "run", "train.max_steps=3"
    with pytest.raises(KeyboardInterrupt):
        bars = "train.disable_tqdm=false"
        run(workspace, out, short, bars, callbacks=[Signal(signal.SIGINT, step=2)])
    bar = capsys.readouterr().err
    assert "/3 [" in bar.splitlines()[-1] and bar.endswith("\n")
    run(workspace, out, short, "train.resume=auto")
    line = f"resume     no checkpoint in {out}, so the run starts from the beginning"
    assert line in capsys.readouterr().out.splitlines()


def test_a_file_size_limit_is_named(workspace, finished, tmp_path):
    """A limit on the size of files (ulimit -f) has another cure than a full disk."""
    out = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    shutil.copytree(finished[()], out)
    shutil.rmtree(out / "checkpoint-12")
    (out / "results.json").unlink()
    for limit in (20_000, 100_000):  # the adapter, or only the optimizer's state
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(
                RunError,
                match=rf"checkpoint-12 could not be written: a file would be larger than {limit}"
                r" bytes, the limit of this process \(ulimit -f\)\. The last good checkpoint",
            ):
                run(workspace, out, "train.resume=auto")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_batch_that_no_epoch_fills_is_refused(workspace, tmp_path):
    for end in ("train.max_steps=2", "train.num_train_epochs=1"):
        problem = r"^train.dataloader_drop_last: 5 rows are less than a batch of 16"
        with pytest.raises(ConfigError, match=problem):
            few = ("data.k=5", "train.per_device_train_batch_size=16")
            run(workspace, tmp_path / "run", *few, "train.dataloader_drop_last=true", end)


def test_a_run_that_was_stopped_while_it_trained_on_is_not_taken_for_finished(workspace, tmp_path):
    out, longer = tmp_path / "run", ("train.num_train_epochs=2", "train.resume=auto")
    run(workspace, out, "train.num_train_epochs=1")
    with pytest.raises(Preempted):
        run(workspace, out, *longer, callbacks=[Signal(signal.SIGTERM, step=5)])
    assert run(workspace, out, *longer)["epochs"] == 2
