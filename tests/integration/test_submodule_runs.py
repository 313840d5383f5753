"""Runs with all submodules of the list: training, resuming, exporting and reporting."""

import json
import pathlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from scaleup.settings import schema
from scaleup.training import run
from scaleup.training.preflight import CHECKS
from scaleup.unipelt.submodules import SUBMODULES
from tests.utils.workspace import ROOT, add_writer, environment, make_workspace, overrides, writing

TASKS = {"t5": "seq2seq", "llama": "causal_lm", "gpt2": "causal_lm"}
SLOW = ("bert", "t5", "gpt2")
ALL = f"method.submodules=[{','.join(SUBMODULES)}]"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> pathlib.Path:
    folder = make_workspace(tmp_path_factory.mktemp("workspace"))
    for family in TASKS:
        add_writer(folder, family, **({"dropout_rate": 0.0} if family == "t5" else {}))
    return folder


def train(folder: pathlib.Path, family: str, out: pathlib.Path, *more: str) -> dict:
    shared = ("train.lr_scheduler_type=constant", "train.warmup_steps=0", "data.max_length=16")
    shared = (ALL, "train.save_strategy=steps", "train.save_steps=2", *shared, *more)
    shared += ("train.eval_strategy=steps", "train.eval_steps=2", "train.disable_tqdm=true")
    if family in TASKS:
        words = writing(folder, out, family, TASKS[family], *shared, "data.metric=loss")
    else:
        words = overrides(folder, out, *shared, family=family)
    return run.run(schema.load(None, words, checks=CHECKS))


@pytest.mark.parametrize(
    "family", ["bart", "llama", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_a_resumed_run_of_all_submodules_equals_an_uninterrupted_one(family, workspace, tmp_path):
    results = train(workspace, family, tmp_path / "whole", "train.max_steps=4")
    counts = results["parameters"]["submodules"]
    assert all(counts[name] > 0 for name in SUBMODULES)
    reported = {part for site in results["gates"].values() for part in site}
    assert reported == set(SUBMODULES)
    train(workspace, family, tmp_path / "parts", "train.max_steps=2")
    train(workspace, family, tmp_path / "parts", "train.max_steps=4", "train.resume=auto")
    whole, parts = (
        load_file(tmp_path / name / "final" / "adapter_model.safetensors")
        for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def scaleup(*words: str) -> str:
    command = [sys.executable, "-m", "scaleup", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_all_submodules_are_exported_pruned_and_reported(workspace, tmp_path):
    out = tmp_path / "run"
    train(workspace, "bert", out, "train.max_steps=8", "train.learning_rate=0.01")
    prunable = {name for name, submodule in SUBMODULES.items() if submodule.prunable}
    for kind, more in (("exact", ()), ("standalone", ()), ("merged", ("--prune", "1e9"))):
        folder = tmp_path / kind
        words = ("--max-metric-drop", "100", "--output", str(folder), *more)
        scaleup("export", "--checkpoint", str(out / "best"), "--kind", kind, *words)
        report = json.loads((folder / "export.json").read_text())
        assert report["proof"]["reload_difference"] < 1e-4
        if kind == "merged":
            gates = report["calibration"]["gates"]
            assert {gate["part"] for gate in gates if gate["dropped"]} == prunable
            assert not report["remote_code"]  # LoRA alone is left, in the weights
    table = scaleup("report", "gates", "--run", str(out))
    assert all(name in table for name in SUBMODULES)
