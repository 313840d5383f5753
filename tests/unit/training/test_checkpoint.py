"""A checkpoint is whole or it is refused, and nothing half written gets a final name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from scaleup.errors import CheckpointError
from scaleup.training.checkpoint import (
    commit_checkpoint,
    create_staging_folder,
    expected_tensors,
    verify,
)
from scaleup.training.manifest import Manifest
from tests.utils.tiny import adapt, backbone

MANIFEST = Manifest(
    method={"name": "unipelt", "submodules": ["adapter", "prefix", "lora"]},
    backbone={"name": "bert", "revision": None, "quantization": "none", "fingerprint": "sha256 0"},
    task="sequence_classification",
    labels=["a", "b"],
    data=[],
    run={"processes": 1, "zero_stage": 0},
)


@pytest.fixture
def checkpoint(tmp_path):
    model = adapt(backbone("bert"))
    staging = create_staging_folder(tmp_path / "best")
    model.save_pretrained(staging)
    (staging / "training_args.bin").write_bytes(b"pickle")
    commit_checkpoint(staging, tmp_path / "best", expected_tensors(model), MANIFEST)
    return tmp_path / "best"


def rewrite(checkpoint, change) -> None:
    path = checkpoint / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_committed_checkpoint_verifies_and_holds_no_pickle(checkpoint):
    manifest = verify(checkpoint)
    assert (
        manifest.labels == ["a", "b"]
        and manifest.tensors.keys() == load_file(checkpoint / "adapter_model.safetensors").keys()
    )
    assert [path.name for path in checkpoint.parent.iterdir()] == ["best"] and not list(
        checkpoint.glob("*.bin")
    )


def test_every_trained_tensor_is_expected():
    model = adapt(backbone("bart"))
    sizes = [torch.Size(shape).numel() for shape in expected_tensors(model).values()]
    assert sum(sizes) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop(sorted(t)[0]), "the checkpoint was altered"),
        (lambda t: t.update({sorted(t)[0]: t[sorted(t)[0]] + 1}), "the checkpoint was altered"),
        (lambda t: t[sorted(t)[0]].fill_(float("nan")), "not finite"),
    ],
    ids=["missing", "changed", "nan"],
)
def test_an_altered_checkpoint_is_refused(checkpoint, change, words):
    rewrite(checkpoint, change)
    with pytest.raises(CheckpointError, match=words):
        verify(checkpoint)


def test_a_truncated_file_is_refused(checkpoint):
    path = checkpoint / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        verify(checkpoint)


def test_another_format_and_a_foreign_folder_are_refused(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="no manifest.json"):
        verify(tmp_path)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="format version 99"):
        verify(checkpoint)


@pytest.mark.parametrize("damage", ["missing", "shape", "nan"])
def test_what_was_not_written_whole_never_gets_the_name(tmp_path, damage):
    expected = {"weight": [2, 3]}
    tensors = {
        "missing": {"other": torch.ones(1)},
        "shape": {"weight": torch.ones(0, 3)},
        "nan": {"weight": torch.full((2, 3), torch.nan)},
    }
    staging = create_staging_folder(tmp_path / "best")
    save_file(tensors[damage], staging / "model.safetensors")
    with pytest.raises(CheckpointError, match="nothing was kept"):
        commit_checkpoint(staging, tmp_path / "best", expected, MANIFEST)
    assert not (tmp_path / "best").exists()


def test_committing_again_replaces_the_older_checkpoint(tmp_path):
    for value in (1.0, 2.0):
        staging = create_staging_folder(tmp_path / "best")
        save_file({"weight": torch.full((2,), value)}, staging / "model.safetensors")
        commit_checkpoint(staging, tmp_path / "best", {"weight": [2]}, MANIFEST)
    assert load_file(tmp_path / "best" / "model.safetensors")["weight"][0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
