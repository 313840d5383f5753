"""Progress bars: they have labels, and they end before a message is printed."""

import types

import pytest

from scaleup.settings.schema import load
from scaleup.training.arguments import training_arguments
from scaleup.training.callbacks import ProgressBars
from scaleup.training.distributed import start

STATE = types.SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=9)
SETS = {"dev": object(), "test": object()}


class Loader(list):
    """Two batches of a data set."""

    def __init__(self, dataset):
        super().__init__([0, 1])
        self.dataset = dataset


def bars() -> ProgressBars:
    return ProgressBars(types.SimpleNamespace(metric="f1", test=SETS["test"]))


def test_bars_that_are_closed_leave_the_next_line_free(capsys):
    shown = bars()
    shown.on_train_begin(None, STATE, None)
    shown.on_prediction_step(None, STATE, None, Loader(SETS["dev"]))
    assert not capsys.readouterr().err.endswith("\n")
    shown.close()
    assert capsys.readouterr().err.endswith("\n")
    shown.close()
    assert not capsys.readouterr().err


def test_the_bars_of_scorings_are_labelled(capsys):
    for name, dataset in SETS.items():
        shown = bars()
        shown.on_prediction_step(None, STATE, None, Loader(dataset))
        shown.close()
        assert capsys.readouterr().err.lstrip("\r").startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("words", "terminal", "disabled"),
    [
        ((), True, False),
        ((), False, True),
        (("train.disable_tqdm=false",), False, False),
        (("train.disable_tqdm=true",), True, True),
    ],
)
def test_bars_are_drawn_on_a_terminal_or_on_request(
    words, terminal, disabled, tmp_path, monkeypatch
):
    stderr = types.SimpleNamespace(isatty=lambda: terminal)
    monkeypatch.setattr("scaleup.training.arguments.sys", types.SimpleNamespace(stderr=stderr))
    settings = load(None, ["data.name=rte", f"train.output_dir={tmp_path}", *words])
    args = training_arguments(settings, start(False), "accuracy", True, None)
    assert args.disable_tqdm == disabled


def test_further_arguments_of_checkpointing_do_not_make_it_reentrant(tmp_path):
    words = [
        f"train.output_dir={tmp_path}",
        "train.gradient_checkpointing=true",
        "train.gradient_checkpointing_kwargs={preserve_rng_state: false}",
    ]
    settings = load(None, ["data.name=rte", *words])
    args = training_arguments(settings, start(False), "accuracy", True, None)
    expected = {"use_reentrant": False, "preserve_rng_state": False}
    assert args.gradient_checkpointing_kwargs == expected
