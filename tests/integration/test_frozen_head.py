"""Runs with `method.head: frozen`: the head keeps its initial values everywhere, and is saved."""

import json
import pathlib

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from scaleup.backbone.weights import tensor_files
from scaleup.export import export
from scaleup.export.report import ExportOptions
from scaleup.settings import schema
from scaleup.settings.schema import Settings
from scaleup.training import run
from scaleup.training.preflight import CHECKS
from tests.utils.workspace import make_workspace, overrides

METHODS = {
    "lora": ["method.submodules=[lora]"],
    "prefix": ["method.submodules=[prefix]", "method.prefix_hidden_size=16"],
    "adapter": ["method.submodules=[adapter]"],
    "apl": ["method.prefix_hidden_size=16"],
    "bitfit": ["method=bitfit"],
    "full": ["method=full"],
}
FULL = ("bitfit", "full")  # saved as whole models
# `apl` has the prefix and the adapter, too.
CASES = [
    pytest.param(name, marks=pytest.mark.slow if name in ("prefix", "adapter") else ())
    for name in METHODS
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> pathlib.Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def settings(workspace: pathlib.Path, out: pathlib.Path, method: str, *more: str) -> Settings:
    steps = ("train.eval_strategy=steps", "train.eval_steps=2", "train.max_steps=4")
    words = (*METHODS[method], "train.learning_rate=0.01", "train.disable_tqdm=true", *steps)
    return schema.load(None, overrides(workspace, out, *words, *more), checks=CHECKS)


def train(workspace: pathlib.Path, out: pathlib.Path, method: str, *more: str) -> dict:
    return run.run(settings(workspace, out, method, *more))


def tensors(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    (path,) = tensor_files(folder)
    return load_file(path)


def heads(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    return {name: t for name, t in tensors(folder).items() if "classifier." in name}


def logits(folder: pathlib.Path, workspace: pathlib.Path, method: str) -> torch.Tensor:
    """Load the model as a user does, with other random numbers, and return logits [4, 2]."""
    torch.manual_seed(1234)
    model: PreTrainedModel | PeftModel
    if method in FULL or (folder / "config.json").is_file():
        cls = AutoModelForSequenceClassification
        model = cls.from_pretrained(folder, trust_remote_code=True)
    else:
        base = AutoModelForSequenceClassification.from_pretrained(workspace / "bert", num_labels=2)
        model = PeftModel.from_pretrained(base, str(folder))
    ids = torch.randint(5, 15, (4, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("method", CASES)
def test_a_frozen_head_keeps_the_initial_values_that_a_trained_head_leaves(
    method, workspace, tmp_path
):
    """A run whose learning rate vanishes in float32 shows the initial values of the same seed."""
    still = train(workspace, tmp_path / "still", method, "train.learning_rate=1e-60")
    frozen = train(workspace, tmp_path / "frozen", method, "method.head=frozen")
    trained = train(workspace, tmp_path / "trained", method)
    initial = heads(tmp_path / "still" / "final")
    assert len(initial) == 2
    for name in ("best", "final", "checkpoint-2", "checkpoint-4"):
        kept, moved = heads(tmp_path / "frozen" / name), heads(tmp_path / "trained" / name)
        assert kept.keys() == initial.keys() == moved.keys()
        assert all(torch.equal(tensor, initial[key]) for key, tensor in kept.items())
        assert all(not torch.equal(tensor, initial[key]) for key, tensor in moved.items())
    after = {name: tensors(tmp_path / name / "final") for name in ("still", "frozen", "trained")}
    assert after["frozen"].keys() == after["trained"].keys()
    assert any(not torch.equal(t, after["still"][name]) for name, t in after["frozen"].items())
    assert frozen["parameters"] == trained["parameters"] == still["parameters"]
    assert frozen["test"] != trained["test"]


@pytest.mark.parametrize("method", CASES)
def test_the_optimizer_of_a_frozen_head_holds_nothing_of_it(method, workspace, tmp_path):
    sizes = {}
    for head in ("trained", "frozen"):
        train(workspace, tmp_path / head, method, f"method.head={head}")
        state = load_file(tmp_path / head / "checkpoint-4" / "training_state.safetensors")
        sizes[head] = sum(t.numel() for name, t in state.items() if name.startswith("exp_avg/"))
    assert sizes["trained"] - sizes["frozen"] == 32 * 2 + 2


@pytest.mark.parametrize("method", CASES)
def test_a_resumed_run_with_a_frozen_head_equals_an_uninterrupted_one(method, workspace, tmp_path):
    shared = ("method.head=frozen", "train.lr_scheduler_type=constant", "train.warmup_steps=0")
    train(workspace, tmp_path / "whole", method, *shared)
    train(workspace, tmp_path / "parts", method, *shared, "train.max_steps=2")
    train(workspace, tmp_path / "parts", method, *shared, "train.resume=auto")
    whole, parts = (tensors(tmp_path / name / "final") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    assert logits(tmp_path / "whole" / "best", workspace, method).equal(
        logits(tmp_path / "parts" / "best", workspace, method)
    )


def test_a_resumed_run_takes_the_frozen_head_from_its_checkpoint(workspace, tmp_path, monkeypatch):
    """The random numbers of another version of torch may differ."""
    shared = ("method.head=frozen", "train.max_steps=2")
    train(workspace, tmp_path, "lora", *shared)
    before = heads(tmp_path / "final")
    monkeypatch.setattr(run, "set_seed", lambda seed: torch.manual_seed(seed + 1))
    train(workspace, tmp_path, "lora", *shared, "train.max_steps=4", "train.resume=auto")
    after = heads(tmp_path / "final")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    "method, kind",
    [
        ("apl", "exact"),
        pytest.param("apl", "standalone", marks=pytest.mark.slow),
        pytest.param("lora", "merged", marks=pytest.mark.slow),
    ],
)
def test_exports_and_reloaded_adapters_have_the_frozen_head(method, kind, workspace, tmp_path):
    train(workspace, tmp_path / "run", method, "method.head=frozen", "model.head_bias=prior")
    best = tmp_path / "run" / "best"
    assert json.loads((best / "adapter_config.json").read_text())["head"] == "frozen"
    report = export.run(ExportOptions(best, kind, tmp_path / "out"), say=lambda text: None)
    assert report.proof is not None and report.proof.reload_difference < 1e-5
    expected = logits(best, workspace, method)
    assert expected.std() > 0
    found = logits(tmp_path / "out", workspace, method)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_prior_stays_in_the_bias_of_a_frozen_head(workspace, tmp_path):
    data = ("data.task=regression", "data.label_column=score", "model.head_bias=prior")
    train(workspace, tmp_path, "lora", *data, "method.head=frozen")
    (bias,) = (tensor for name, tensor in heads(tmp_path / "best").items() if "bias" in name)
    assert 0.3 < bias.item() < 0.8


def test_a_run_does_not_continue_with_another_head(workspace, tmp_path):
    train(workspace, tmp_path, "lora")
    with pytest.raises(schema.ConfigError, match=r"has a different method\.head"):
        train(workspace, tmp_path, "lora", "method.head=frozen", "train.resume=auto")
