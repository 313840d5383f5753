"""A run folder of another person executes no code and adds nothing to an export."""

import json
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from scaleup.cli import main
from scaleup.errors import CheckpointError
from scaleup.export import export
from scaleup.export.report import ExportOptions
from tests.utils.altered import Evil, rehash
from tests.utils.workspace import ROOT, environment

OLD = ROOT / "tests" / "fixtures" / "format_0_1"
HIDDEN = json.loads((OLD / "bert" / "config.json").read_text())["hidden_size"]
KINDS = ("exact", "standalone", "merged")
EVIL = """
import pathlib
from transformers import BertConfig
pathlib.Path({marker!r}).touch()
class Evil(BertConfig): pass
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> pathlib.Path:
    """A run of an earlier version; the paths in its config.yaml are relative."""
    for name in ("bert", "best", "run"):
        shutil.copytree(OLD / name, tmp_path / name)
    for name in ("train.csv", "test.csv"):
        shutil.copy(OLD / name, tmp_path / name)
    shutil.move(tmp_path / "best", tmp_path / "run" / "best")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(kind: str, *words: str) -> list[str]:
    return ["export", "--checkpoint", "run/best", "--output", "out", "--kind", kind, *words]


def ask_for_code(folder: pathlib.Path) -> pathlib.Path:
    """Let the backbone's config name code that makes a file, and make every hash fit.

    Returns:
        The file.
    """
    marker = folder / "executed"
    config = json.loads((folder / "bert" / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (folder / "bert" / "config.json").write_text(json.dumps(config))
    (folder / "bert" / "evil.py").write_text(EVIL.format(marker=str(marker)))
    path = folder / "run" / "config.yaml"
    path.write_text(path.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    return marker


@pytest.mark.parametrize("words", [[], ["--no-verify"]])
@pytest.mark.parametrize("kind", KINDS)
def test_export_executes_no_code_that_only_the_run_folder_allows(folder, capsys, kind, words):
    marker = ask_for_code(folder)
    assert main(command(kind, *words)) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: 1 problem:\n  - --trust-remote-code: run/config.yaml asks to")
    assert len(shown.splitlines()) == 2 and not marker.exists() and not (folder / "out").exists()


def test_report_gates_executes_no_code_that_only_the_run_folder_allows(folder, capsys):
    marker = ask_for_code(folder)
    results = json.loads((OLD / "finished_results.json").read_text())
    (folder / "run" / "results.json").write_text(json.dumps(results))
    for words in ([], ["--data", "dev"], ["--data", "test.csv"]):
        assert main(["report", "gates", "--run", "run", "--output", "out", *words]) == 2
        shown = capsys.readouterr().err
        assert "--trust-remote-code: run/config.yaml asks to run Python code" in shown
    assert not marker.exists() and not (folder / "out").exists()


@pytest.mark.parametrize("name", ["train", "plan"])
def test_the_config_in_a_run_folder_is_no_permission_to_execute_code(folder, capsys, name):
    marker = ask_for_code(folder)
    words = [name, "--config", "run/config.yaml", "train.output_dir=new"]
    assert main(words) == 2
    assert "model.trust_remote_code: run/config.yaml is the config of a run" in (
        capsys.readouterr().err
    )
    assert not marker.exists() and not (folder / "new").exists()
    main([*words, "model.trust_remote_code=true"])  # the permission, on the command line
    assert marker.exists()


def test_with_the_permission_the_code_runs(folder, capsys):
    marker = ask_for_code(folder)
    assert main(command("exact", "--trust-remote-code")) == 2
    assert "is not the backbone that was trained on" in capsys.readouterr().err
    assert marker.exists()


def test_a_tokenizer_that_names_code_is_refused(folder, capsys):
    marker, best = folder / "executed", folder / "run" / "best"
    path = best / "tokenizer_config.json"
    content = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    path.write_text(json.dumps(content))
    (best / "evil.py").write_text(EVIL.format(marker=str(marker)))
    rehash(best)
    for kind in KINDS:
        assert main(command(kind)) == 2
        assert "best/tokenizer_config.json asks to run Python code" in capsys.readouterr().err
    assert not marker.exists() and not (folder / "out").exists()


def test_code_of_a_tokenizer_or_a_backbone_does_not_reach_the_export(folder):
    """People load exports with trust_remote_code=True."""
    best = folder / "run" / "best"
    (best / "tokenizer_evil.py").write_text("raise SystemExit")
    rehash(best)
    config = json.loads((folder / "bert" / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "evil.Evil"}, "custom_pipelines": {"x": {"impl": "e.E"}}}
    (folder / "bert" / "config.json").write_text(json.dumps(config))
    fit_backbone(folder)
    options = ExportOptions(best, "standalone", folder / "out", verify=False)
    export.run(options, print)
    written = json.loads((folder / "out" / "config.json").read_text())
    assert "custom_pipelines" not in written and "evil" not in json.dumps(written["auto_map"])
    assert not (folder / "out" / "tokenizer_evil.py").exists()


def fit_backbone(folder: pathlib.Path) -> None:
    """Let the manifest name the backbone as it is now."""
    from scaleup.backbone.weights import fingerprint

    best = folder / "run" / "best"
    manifest = json.loads((best / "manifest.json").read_text())
    manifest["backbone"]["fingerprint"] = fingerprint(str(folder / "bert"), None)
    (best / "manifest.json").write_text(json.dumps(manifest))


def test_a_generation_config_that_is_a_link_to_another_file_is_not_copied(folder, capsys):
    (folder / "secret").write_text("root:x:0:0")
    (folder / "bert" / "generation_config.json").symlink_to(folder / "secret")
    assert main(command("standalone", "--no-verify")) == 2
    assert "generation_config.json is not valid JSON" in capsys.readouterr().err
    assert not (folder / "out").exists()


@pytest.mark.parametrize("words", [[], ["--no-verify"]])
def test_an_added_tokenizer_file_and_a_link_are_refused_by_name(folder, capsys, words):
    best = folder / "run" / "best"
    (best / "special_tokens_map.json").write_text('{"pad_token": "x"}')
    assert main(command("exact", *words)) == 2
    assert "special_tokens_map.json is not listed in manifest.json" in capsys.readouterr().err
    (best / "special_tokens_map.json").unlink()
    (best / "tokenizer_x").symlink_to("/etc/passwd")
    assert main(command("exact", *words)) == 2
    assert "tokenizer_x is a symbolic link" in capsys.readouterr().err
    assert not (folder / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", ["none", "one missing", "another shape", "one more"])
def test_without_verification_the_tensors_are_still_those_that_the_model_needs(
    folder, kind, change
):
    best = folder / "run" / "best"
    path = best / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    if change == "none":
        tensors = {"other": tensors[name]}
    elif change == "one missing":
        del tensors[name]
    elif change == "another shape":
        tensors[name] = tensors[name][..., :1].contiguous()
    else:  # it would replace a weight of the backbone
        weight = "bert.encoder.layer.0.attention.self.query.weight"
        tensors[f"base_model.model.{weight}"] = torch.ones(HIDDEN, HIDDEN)
    save_file(tensors, path)
    rehash(best)
    words = "has no place for" if change == "one more" else "the model needs"
    with pytest.raises(CheckpointError, match=words):
        export.run(ExportOptions(best, kind, folder / "out", verify=False), print)
    assert not (folder / "out").exists() and not (folder / ".out.draft").exists()


def test_without_verification_the_backbone_has_the_shapes_that_its_config_needs(folder, capsys):
    tensors = load_file("bert/model.safetensors")
    name = next(name for name in tensors if name.endswith("attention.self.key.weight"))
    save_file(tensors | {name: tensors[name][:1].contiguous()}, "bert/model.safetensors")
    fit_backbone(folder)
    assert main(command("standalone", "--no-verify")) == 1
    assert f"has the shape [1, {HIDDEN}], and the model needs" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_a_config_that_was_changed_after_the_run_is_noticed(folder, capsys):
    from scaleup.settings import schema
    from scaleup.training.manifest import setting_hashes

    path = folder / "run" / "config.yaml"
    rehash(folder / "run" / "best", config=setting_hashes(schema.load(str(path))))
    path.write_text(path.read_text().replace("max_length: 48", "max_length: 12"))
    assert main(command("exact", "--no-verify")) == 2
    assert "trained with a different data.max_length;" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [b"\xff", b"[]", b"{}", b'{"model": 3}'])
def test_a_damaged_tokenizer_and_damaged_results_are_named(folder, capsys, damage):
    (folder / "run" / "results.json").write_bytes(damage)
    assert main(command("exact")) == 2
    assert "results.json is damaged; remove it" in capsys.readouterr().err
    (folder / "run" / "results.json").unlink()
    (folder / "run" / "best" / "tokenizer.json").write_bytes(damage)
    rehash(folder / "run" / "best")
    assert main(command("exact")) == 2
    assert "its tokenizer cannot be loaded" in capsys.readouterr().err
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_child_processes_and_removes_all_folders(folder, number):
    process = subprocess.Popen(
        [sys.executable, "-m", "scaleup", *command("merged")],
        env=environment(PYTHONPATH=str(ROOT)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
        running: list[str] = []
        deadline = time.monotonic() + 120
        while not running and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
            measured = list(folder.glob(".out.draft/.work-*/before.json"))
            running = children.read_text().split() if measured else []
        assert running, process.communicate()[1][-2000:]
        process.send_signal(number)
        _, shown = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert "Traceback" not in shown
    if number != signal.SIGINT:
        assert f"stopped by {number.name}; nothing was kept" in shown
    assert not any(pathlib.Path(f"/proc/{child}").exists() for child in running)
    assert not (folder / "out").exists() and not (folder / ".out.draft").exists()


def test_modules_in_the_current_folder_are_not_imported(folder):
    """The current folder may be another person's run."""
    names = ("torch", "numpy", "transformers", "peft", "scaleup", "sitecustomize")
    for name in names:
        (folder / f"{name}.py").write_text(f"open({str(folder / 'executed')!r}, 'w')")
    assert main(command("exact")) == 0
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("name", ["train", "plan"])
def test_a_link_to_the_config_in_a_run_folder_is_no_permission_either(folder, capsys, name):
    marker = ask_for_code(folder)
    (folder / "mine.yaml").symlink_to("run/config.yaml")
    assert main([name, "--config", "mine.yaml", "train.output_dir=new"]) == 2
    assert "mine.yaml is the config of a run" in capsys.readouterr().err
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["pickle", "pointer", "pipe"])
def test_weights_of_the_backbone_are_checked_before_they_are_read(folder, capsys, kind):
    path, marker = folder / "bert" / "model.safetensors", folder / "executed"
    path.unlink()
    if kind == "pickle":
        path = path.with_name("pytorch_model.bin")
        path.write_bytes(pickle.dumps(Evil(marker)))
        fit_backbone(folder)
    elif kind == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n")
    else:
        os.mkfifo(path)
    for words in ([], ["--no-verify"]):
        assert main(command("standalone", *words)) == 2
        shown = capsys.readouterr().err
        assert path.name in shown and len(shown.splitlines()) == 2, shown
    assert not marker.exists() and not (folder / "out").exists()


@pytest.mark.parametrize("name", ["", "bert", "bert.encoder"])
def test_an_adapter_that_saves_modules_of_the_backbone_is_refused(folder, capsys, name):
    path = folder / "run" / "best" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": [name]}))
    rehash(path.parent)
    assert main(command("exact", "--no-verify")) == 2
    assert f"adapter_config.json: modules_to_save names {name!r}" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["a" * 250, "new/" + "a" * 250, "file/out"])
def test_an_output_that_cannot_be_made_is_refused_before_work_begins(folder, capsys, output):
    (folder / "file").touch()
    before = sorted(folder.rglob("*"))
    assert main(["export", "--checkpoint", "run/best", "--output", output]) == 2
    assert capsys.readouterr().err.startswith(f"error: 1 problem:\n  - --output: {output} ")
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("option", ["--checkpoint", "--config", "--backbone"])
def test_a_name_that_is_too_long_is_refused_like_one_that_does_not_exist(folder, capsys, option):
    assert main(command("exact", option, "a" * 300)) == 2
    assert "aaa" in capsys.readouterr().err and not (folder / "out").exists()
