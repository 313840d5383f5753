"""A run with a damaged checkpoint, log or config is refused in one line before it writes."""

import json
import pathlib
import pickle
import shutil

import pytest
import torch

from scaleup.cli import main
from scaleup.training.callbacks import rewind
from tests.utils.altered import Evil, rehash
from tests.utils.workspace import ROOT, losses

OLD = ROOT / "tests" / "fixtures" / "format_0_1"
WORDS = ["train", "--config", "run/config.yaml", "train.resume=auto"]

pytestmark = pytest.mark.usefixtures("signal_handlers")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> pathlib.Path:
    """A run of an earlier version that was stopped after step 9 of 12."""
    for name in ("bert", "run"):
        shutil.copytree(OLD / name, tmp_path / name)
    for name in ("train.csv", "test.csv"):
        shutil.copy(OLD / name, tmp_path / name)
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


def change(path: pathlib.Path, function) -> None:
    """Change the object in a file of torch."""
    state = torch.load(path, weights_only=False)
    function(state)
    torch.save(state, path)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("damage", ["missing", "empty", "text", "cut", "pickle", "number", "dict"])
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
    elif damage == "pickle":
        path.write_bytes(pickle.dumps(Evil(folder / "executed")))
    else:
        torch.save(7 if damage == "number" else {"x": 1}, path)
    rehash(checkpoint)
    shown = refused(folder, capsys)
    assert f"checkpoint-9/{name}: the file is damaged" in shown
    assert "To continue from the checkpoint before it, remove run/checkpoint-9" in shown
    assert not (folder / "executed").exists()


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("optimizer.pt", lambda s: s["param_groups"][0]["params"].pop()),
        ("optimizer.pt", lambda s: s["param_groups"][0].update(lr="fast")),
        ("optimizer.pt", lambda s: s["param_groups"][0].update(betas=(0.9,))),
        ("optimizer.pt", lambda s: s["param_groups"][0].pop("weight_decay")),
        ("optimizer.pt", lambda s: s["state"][0].update(exp_avg=torch.zeros(3))),
        ("optimizer.pt", lambda s: s["state"].update({0: 5})),
        ("scheduler.pt", lambda s: s.update(last_epoch="nine")),
        ("scheduler.pt", lambda s: s.pop("last_epoch")),
        ("scheduler.pt", lambda s: s.update(base_lrs=["x"])),
        ("rng_state.pth", lambda s: s.pop("python")),
        ("rng_state.pth", lambda s: s.update(cpu=torch.zeros(3, dtype=torch.uint8))),
        ("rng_state.pth", lambda s: s.update(numpy=("MT19937", [1]))),
    ],
)
def test_training_state_that_does_not_fit_is_named(folder, capsys, name, function):
    change(folder / "run" / "checkpoint-9" / name, function)
    rehash(folder / "run" / "checkpoint-9")
    assert f"checkpoint-9/{name}: the file is damaged" in refused(folder, capsys)


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


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "scaler.pt"])
def test_a_listed_file_that_the_run_did_not_write_is_refused(folder, capsys, name):
    checkpoint = folder / "run" / "checkpoint-9"
    (checkpoint / name).write_bytes(pickle.dumps(Evil(folder / "executed")))
    rehash(checkpoint)
    assert f"checkpoint-9/{name}" in refused(folder, capsys)
    assert not (folder / "executed").exists()


def test_a_checkpoint_without_the_tensors_of_the_model_is_refused(folder, capsys):
    from safetensors.torch import load_file, save_file

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
