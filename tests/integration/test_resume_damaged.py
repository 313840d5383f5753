"""A run with a damaged checkpoint, log or config is refused in one line before it writes."""

import json
import os
import pathlib
import pickle
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from scaleup.cli import main
from scaleup.errors import Preempted
from scaleup.settings import schema
from scaleup.training import run
from scaleup.training.callbacks import rewind
from tests.utils.altered import Evil, rehash
from tests.utils.workspace import ROOT, losses

OLD = ROOT / "tests" / "fixtures" / "format_0_1"
WORDS = ["train", "--config", "run/config.yaml", "train.resume=auto"]

pytestmark = pytest.mark.usefixtures("signal_handlers")


class Stop(TrainerCallback):
    """End the run after step 9 of 12."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 9:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> pathlib.Path:
    """A folder with a run that was stopped after step 9, and what it was made from."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(OLD / "bert", folder / "bert")
    for name in ("train.csv", "test.csv", "run/config.yaml"):
        shutil.copy(OLD / name, folder / pathlib.Path(name).name)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Preempted):
        patch.chdir(folder)
        run.run(schema.load("config.yaml", ["train.resume=never"]), [Stop()])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    (folder / "config.yaml").unlink()
    return folder


@pytest.fixture
def folder(stopped, tmp_path, monkeypatch) -> pathlib.Path:
    """A copy of the stopped run as the working directory."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def content(folder: pathlib.Path) -> dict[str, bytes]:
    """Return the content of every file of the run, apart from the lock."""
    files = {p for p in (folder / "run").rglob("*") if p.is_file() and p.name != ".lock"}
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refused(folder: pathlib.Path, capsys) -> str:
    """Return the message of a run that does not start. It must leave every file as it was."""
    before = content(folder)
    code = main(WORDS)
    shown = capsys.readouterr().err
    assert code == 2 and "Traceback" not in shown and len(shown) < 2048, (code, shown)
    assert content(folder) == before
    return shown


def change_tensors(path: pathlib.Path, function) -> None:
    """Change the tensors in a file."""
    tensors = load_file(path)
    function(tensors)
    save_file(tensors, path)


STATE = ("training_state.safetensors", "training_state.json")


@pytest.mark.parametrize("name", STATE)
@pytest.mark.parametrize("damage", ["missing", "empty", "text", "cut", "pickle"])
def test_damaged_training_state_is_named(folder, capsys, name, damage):
    checkpoint = folder / "run" / "checkpoint-9"
    path = checkpoint / name
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("nonsense")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-50])
    else:
        path.write_bytes(pickle.dumps(Evil(folder / "executed")))
    rehash(checkpoint)
    shown = refused(folder, capsys)
    if (name, damage) == (STATE[1], "missing"):  # as earlier versions left it
        assert "its optimizer's state has no names" in shown and "weights_only" in shown
    else:
        assert f"checkpoint-9/{name}: the file is damaged" in shown
        assert "To continue from the checkpoint before it, remove run/checkpoint-9" in shown
    assert not (folder / "executed").exists()


def first(tensors: dict[str, torch.Tensor], key: str) -> str:
    return min(name for name in tensors if name.startswith(f"{key}/"))


@pytest.mark.parametrize(
    "function",
    [
        lambda t: t.update({first(t, "exp_avg"): torch.zeros(3)}),
        lambda t: t.update({first(t, "step"): torch.zeros(3)}),
        lambda t: t.update({"exp_avg/nothing": torch.zeros(3)}),
        lambda t: t.pop("rng/0/python"),
        lambda t: t.update({"rng/0/cpu": torch.zeros(3, dtype=torch.uint8)}),
        lambda t: t.update({"rng/0/numpy": torch.zeros(3)}),
    ],
)
def test_tensors_that_do_not_fit_the_model_are_named(folder, capsys, function):
    path = folder / "run" / "checkpoint-9" / STATE[0]
    change_tensors(path, function)
    rehash(path.parent)
    assert f"checkpoint-9/{STATE[0]}: the file is damaged" in refused(folder, capsys)


@pytest.mark.parametrize(
    "function",
    [
        lambda s: s["groups"][0]["names"].pop(),
        lambda s: s["groups"][0].update(lr="fast"),
        lambda s: s["groups"][0].update(betas=["x"]),
        lambda s: s["groups"][0].pop("lr"),
        lambda s: s.update(schedule=5),
        lambda s: s.update(processes=0),
        lambda s: s.update(more=1),
    ],
)
def test_numbers_that_do_not_fit_are_named(folder, capsys, function):
    path = folder / "run" / "checkpoint-9" / STATE[1]
    state = json.loads(path.read_text())
    function(state)
    path.write_text(json.dumps(state))
    rehash(path.parent)
    assert f"checkpoint-9/{STATE[1]}: the file is damaged" in refused(folder, capsys)


def test_the_state_of_another_optimizer_is_refused(folder, capsys):
    path = folder / "run" / "checkpoint-9" / STATE[0]

    def rename(tensors) -> None:
        for name in [name for name in tensors if name.startswith("exp_avg_sq/")]:
            tensors[name.replace("exp_avg_sq/", "square_avg/")] = tensors.pop(name)

    change_tensors(path, rename)
    rehash(path.parent)
    shown = refused(folder, capsys)
    assert "it has exp_avg, square_avg, step, and this one has exp_avg, exp_avg_sq, step" in shown


@pytest.mark.parametrize(
    "damage",
    [
        b"\xff\xfe",
        b"{",
        b"[]",
        b"{}",
        b"[" * 100_000,
        {"global_step": "9"},
        {"global_step": 8},
        {"best_global_step": "3"},
        {"log_history": 5},
        {"log_history": [5]},
        {"stateful_callbacks": None},
        {"stateful_callbacks": {"EarlyStoppingCallback": {}}},
        {
            "stateful_callbacks": {
                "EarlyStoppingCallback": {"attributes": {"early_stopping_patience_counter": "2"}}
            }
        },
        {"epoch": None},
        {"max_steps": "all"},
    ],
)
def test_a_damaged_trainer_state_is_named(folder, capsys, damage):
    path = folder / "run" / "checkpoint-9" / "trainer_state.json"
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    rehash(path.parent)
    assert "trainer_state.json: the file is damaged" in refused(folder, capsys)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_an_added_file_and_a_link_in_a_checkpoint_are_refused_by_name(folder, capsys, kind):
    path = folder / "run" / "checkpoint-9" / "scaler.pt"
    if kind == "file":
        path.write_bytes(b"x")
    else:
        path.symlink_to("/etc/passwd")
    words = "is not listed in manifest.json" if kind == "file" else "is a symbolic link"
    assert f"checkpoint-9: scaler.pt {words}; remove it" in refused(folder, capsys)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "optimizer.pt"])
def test_a_listed_pickle_that_the_run_did_not_write_is_never_read(folder, name):
    checkpoint = folder / "run" / "checkpoint-9"
    (checkpoint / name).write_bytes(pickle.dumps(Evil(folder / "executed")))
    rehash(checkpoint)
    assert main([*WORDS, "train.max_steps=10"]) == 0
    assert not (folder / "executed").exists()


def test_a_checkpoint_without_the_tensors_of_the_model_is_refused(folder, capsys):
    path = folder / "run" / "checkpoint-9" / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, path)
    rehash(path.parent)
    assert "is missing, and the model needs" in refused(folder, capsys)


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"[]", b"model: [", b"model: {name: 3}\n"])
def test_a_damaged_config_of_the_run_is_named(folder, capsys, damage):
    (folder / "mine.yaml").write_bytes((folder / "run" / "config.yaml").read_bytes())
    (folder / "run" / "config.yaml").write_bytes(damage)
    before = content(folder)
    assert main(["train", "--config", "mine.yaml", "train.resume=auto"]) == 2
    shown = capsys.readouterr().err
    assert "train.resume: run/config.yaml is damaged; put the run's config back" in shown
    assert content(folder) == before


def test_a_damaged_log_does_not_cost_the_resume(folder):
    log = folder / "run" / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    damaged = [b"\xff\xfe\n", b"[" * 99_999 + b"\n", b'{"step": "x"}\n', b'{"step": NaN}\n', b"7\n"]
    log.write_bytes(b"".join([lines[0], *damaged, *lines[1:]]))
    assert main([*WORDS, "train.max_steps=10"]) == 0
    assert len(losses(folder / "run")) == 10


def test_a_log_loses_its_damaged_lines_only(tmp_path):
    log = tmp_path / "log.jsonl"
    good = b'{"step": 1, "text": "\xc3\xa9"}\n'
    log.write_bytes(good + b'{"step": 2, "text": "\xe9"}\n' + b'{"step": 3}\n' + b'{"step": 9}\n')
    rewind(log, 5)
    assert log.read_bytes() == good + b'{"step": 3}\n'


@pytest.mark.parametrize("damage", [b"\xff", b"[]", b"{}", b'{"dev": 3}'])
def test_damaged_results_of_a_finished_run_are_named(folder, capsys, damage):
    (folder / "run" / "results.json").write_bytes(damage)
    path = folder / "run" / "config.yaml"
    path.write_text(path.read_text().replace("resume: never", "resume: auto"))
    assert "results.json is damaged; remove it" in refused(folder, capsys)
