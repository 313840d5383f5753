"""The state that a run continues from is checked without executing code."""

import pathlib
import pickle
import shutil

import pytest
import torch

from scaleup.errors import CheckpointError
from scaleup.training.manifest import Manifest
from scaleup.training.resume_state import check_state
from tests.utils.altered import Evil
from tests.utils.workspace import ROOT

OLD = ROOT / "tests" / "fixtures" / "format_0_1" / "run" / "checkpoint-9"


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """A checkpoint with the files of DeepSpeed instead of optimizer.pt."""
    folder = shutil.copytree(OLD, tmp_path / "checkpoint-9")
    (folder / "optimizer.pt").unlink()
    (folder / "latest").write_text("global_step9\n")
    (folder / "global_step9").mkdir()
    torch.save({"module": {"weight": torch.ones(2)}}, folder / "global_step9" / "model_states.pt")
    return folder


def manifest() -> Manifest:
    run = {"processes": 1, "zero_stage": 2}
    return Manifest(method={}, backbone={}, task="", labels=None, data=[], run=run)


def test_deepspeeds_own_classes_of_state_are_accepted(folder):
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    state = {
        "loss_scaler": [LossScaler(1.0), DynamicLossScaler(16.0, 2.0, 1000, 1.0, 1, False)],
        "zero_stage": ZeroStageEnum.gradients,
        "param_slice_mappings": fragment_address(numel=2, start=0),
        "state": {0: {"exp_avg": torch.ones(2)}},
    }
    torch.save(state, folder / "global_step9" / "optim_states.pt")
    check_state(folder, manifest())


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_other_classes_in_files_of_deepspeed_are_refused_and_not_executed(folder, tmp_path, form):
    path, evil = folder / "global_step9" / "optim_states.pt", Evil(tmp_path / "executed")
    if form == "pickle":
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save({"state": evil}, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match="optim_states.pt: the file is damaged") as caught:
        check_state(folder, manifest())
    assert "\n" not in str(caught.value) and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["../elsewhere", "global_step8", "", b"\xff", None])
def test_deepspeed_is_not_led_to_another_folder(folder, name):
    (folder.parent / "elsewhere").mkdir()
    if name is None:
        (folder / "latest").unlink()
    else:
        (folder / "latest").write_bytes(name.encode() if isinstance(name, str) else name)
    with pytest.raises(CheckpointError, match="checkpoint-9/latest: the file is damaged"):
        check_state(folder, manifest())
