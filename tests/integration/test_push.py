"""Runs, checkpoints and exports are uploaded to the hub with a card, or refused in one line."""

import pathlib
import subprocess
import sys

import pytest
import yaml

from tests.utils.hub_uploads import TOKEN, upload_hub
from tests.utils.workspace import ROOT, environment, make_workspace, overrides


def scaleup(command: str, *words: str, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "scaleup", command, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(**({"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"} | more)),
    )


@pytest.fixture
def hub():
    with upload_hub() as uploads:
        yield uploads


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[pathlib.Path, str]:
    """A run that uploaded its best checkpoint, and the last line that it printed."""
    folder = make_workspace(tmp_path_factory.mktemp("push"))
    words = overrides(folder, folder / "run", "train.max_steps=3", "train.push_to_hub=true")
    with upload_hub() as uploads:
        access = {"HF_ENDPOINT": uploads.address, "HF_TOKEN": TOKEN}
        hub_words = ("train.hub_model_id=me/film", "train.hub_private_repo=true")
        done = scaleup("train", *words, *hub_words, **access)
        assert done.returncode == 0, done.stderr[-3000:]
        assert uploads.repositories == {"me/film": True}
        names = set(uploads.files["me/film", "main"])
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= names
    assert not any("training_state" in name for name in names)
    return folder / "run", done.stdout.splitlines()[-1]


def test_a_run_uploads_its_best_checkpoint_and_prints_the_address(trained):
    assert "uploaded   http://127.0.0.1:" in trained[1] and "/me/film/commit/" in trained[1]


@pytest.mark.slow
def test_a_checkpoint_is_uploaded_with_a_card_that_the_hub_can_read(trained, hub):
    access = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
    words = [str(trained[0] / "best"), "--repo", "me/film", "--revision", "v2"]
    done = scaleup("push", *words, **access)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(f"{hub.address}/me/film/commit/")
    assert hub.repositories == {"me/film": False}
    files = hub.files["me/film", "v2"]
    _, front, text = files["README.md"].decode().split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["tags"] == ["unipelt", "scaleup"] and card["library_name"] == "peft"
    assert card["pipeline_tag"] == "text-classification" and card["metrics"] == ["accuracy"]
    (result,) = card["model-index"][0]["results"]
    assert result["metrics"][0]["type"] == "accuracy" and 0 <= result["metrics"][0]["value"] <= 100
    assert "base_model" not in card  # a folder of this machine is no name on the hub
    assert "import scaleup\n" in text


def test_an_export_is_uploaded_as_it_is(trained, hub, tmp_path):
    export = tmp_path / "export"
    words = ["--checkpoint", str(trained[0] / "best"), "--kind", "standalone"]
    done = scaleup("export", *words, "--no-verify", "--output", str(export))
    assert done.returncode == 0, done.stderr[-3000:]
    access = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
    assert scaleup("push", str(export), "--repo", "me/film", **access).returncode == 0
    stored = {
        str(path.relative_to(export)): path.read_bytes()
        for path in export.rglob("*")
        if path.is_file()
    }
    assert hub.files["me/film", "main"] == stored


@pytest.mark.slow
def test_what_cannot_be_uploaded_is_refused_in_one_line(trained, hub, tmp_path):
    best = str(trained[0] / "best")
    access = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
    hub.readable_only.add("me/locked")
    home = {"HF_HOME": str(tmp_path / "home")}
    cases = [
        ([str(tmp_path), "--repo", "me/film"], access, 2, "neither an export"),
        ([best, "--repo", "me/film"], access | {"HF_TOKEN": "wrong"}, 2, "hf auth login"),
        ([best, "--repo", "me/film"], {"HF_ENDPOINT": hub.address} | home, 2, "hf auth login"),
        ([best, "--repo", "me/locked"], access, 2, "may not write to me/locked"),
        ([best, "--repo", "a//b"], access, 2, "not a repository name"),
        ([best, "--repo", "me/film"], access | {"HF_HUB_OFFLINE": "1"}, 2, "HF_HUB_OFFLINE"),
    ]
    for words, more, code, message in cases:
        done = scaleup("push", *words, **more)
        assert done.returncode == code, (words, done.stderr[-2000:])
        assert message in done.stderr and "Traceback" not in done.stderr
    assert hub.files == {}


@pytest.mark.slow
def test_a_run_that_could_not_upload_is_refused_before_it_starts(hub, tmp_path):
    folder = make_workspace(tmp_path)
    words = overrides(folder, folder / "run", "train.push_to_hub=true")
    done = scaleup("train", *words)
    assert done.returncode == 2 and "set train.hub_model_id=USER/NAME" in done.stderr
    access = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "wrong"}
    done = scaleup("train", *words, "train.hub_model_id=me/film", **access)
    assert done.returncode == 2 and "hf auth login" in done.stderr
    assert not (folder / "run").exists()
