"""The learning rate of the gates, apart from that of everything else."""

import pathlib

import pytest
import torch
from safetensors.torch import load_file

from scaleup.settings import schema
from scaleup.training import run
from scaleup.training.preflight import CHECKS
from tests.utils.workspace import make_workspace, overrides


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> pathlib.Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def trained(workspace: pathlib.Path, out: pathlib.Path, *more: str) -> dict[str, torch.Tensor]:
    words = ("method.prefix_hidden_size=16", "train.max_steps=3", "train.disable_tqdm=true", *more)
    run.run(schema.load(None, overrides(workspace, out, *words), checks=CHECKS))
    return load_file(out / "best" / "adapter_model.safetensors")


def test_gates_take_steps_of_their_own_size(workspace, tmp_path):
    plain = trained(workspace, tmp_path / "plain", "train.learning_rate=1e-3")
    rates = ("train.learning_rate=1e-12", "train.gate_learning_rate=0.5")
    apart = trained(workspace, tmp_path / "apart", *rates)
    for name, tensor in apart.items():
        moved = (tensor - plain[name]).abs().max()
        if ".unipelt_gate." in name:
            assert moved > 0.05, name
        else:
            assert moved < 0.01, name
