"""Files of format 0.1, written by an earlier commit, load and export with equal outputs."""

import csv
import json
import pathlib
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import scaleup  # noqa: F401 (registers the PEFT method)
from scaleup.errors import ConfigError
from scaleup.export import export
from scaleup.export.report import ExportOptions
from scaleup.settings import schema
from scaleup.settings.loading import flat
from scaleup.training import run as training
from scaleup.training.checkpoint import verify
from scaleup.training.preflight import CHECKS
from tests.utils import tiny
from tests.utils.workspace import losses

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "format_0_1"
FAMILIES = sorted(path.name for path in (FIXTURES / "adapters").iterdir())
TOLERANCE = 1e-5

pytestmark = pytest.mark.usefixtures("signal_handlers")


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "expected.safetensors")


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> pathlib.Path:
    """A copy of the fixtures as the working directory: the paths in config.yaml are relative."""
    for name in ("bert", "best", "run", "standalone"):
        shutil.copytree(FIXTURES / name, tmp_path / name)
    for name in ("train.csv", "test.csv"):
        shutil.copy(FIXTURES / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load_adapter(folder: str) -> torch.nn.Module:
    base = AutoModelForSequenceClassification.from_pretrained("bert", num_labels=2)
    return PeftModel.from_pretrained(base, folder)


def load_standalone(folder: str) -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)


def logits(model: torch.nn.Module, folder: str) -> torch.Tensor:
    """Return the logits [16, 2] for the first texts of test.csv."""
    with open("test.csv", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)][:16]
    encoded = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**encoded).logits


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def test_an_old_run_goes_on_from_its_weights_only(workspace):
    def settings(mode: str) -> schema.Settings:
        words = [f"train.resume={mode}", "train.max_steps=2", "train.learning_rate=1e-12"]
        return schema.load("run/config.yaml", words if mode != "auto" else words[:1], checks=CHECKS)

    with pytest.raises(ConfigError, match="its optimizer's state has no names.*weights_only") as no:
        training.run(settings("auto"))
    assert "\n" not in str(no.value)
    training.run(settings("weights_only"))
    new, old = (
        load_file(f"run/{name}/adapter_model.safetensors")
        for name in ("final", "before-1/checkpoint-9")
    )
    for name, tensor in old.items():
        assert_close(new[name], tensor)


def test_a_new_run_with_the_seed_of_an_old_run_has_the_same_gates_and_losses(workspace):
    settings = schema.load("run/config.yaml", ["train.output_dir=new", "train.resume=never"])
    training.run(settings)
    new, old = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (workspace / "new" / "log.jsonl", FIXTURES / "finished_log.jsonl")
    )
    assert len(new) == len(old)
    for key, value in flat(old[0]["gates"]).items():  # they show the initial weights
        assert flat(new[0]["gates"])[key] == pytest.approx(value, abs=TOLERANCE)
    assert losses(workspace / "new") == pytest.approx(
        [line["loss"] for line in old if "loss" in line], abs=TOLERANCE
    )


def test_an_old_adapter_checkpoint_is_whole_and_gives_the_same_logits(workspace, expected):
    manifest = verify(workspace / "best")
    assert manifest.labels == ["bad", "good"] and manifest.backbone["name"] == "bert"
    assert manifest.export is None
    content = (FIXTURES / "best" / "manifest.json").read_text()
    assert manifest.to_json() == content
    assert_close(logits(load_adapter("best"), "best"), expected["best"])


@pytest.mark.parametrize("family", FAMILIES)
def test_old_adapters_of_every_kind_of_family_give_the_same_logits(family, expected):
    folder = FIXTURES / "adapters" / family
    model = PeftModel.from_pretrained(tiny.backbone(family), str(folder)).eval()
    assert_close(tiny.logits(model), expected[family])


def test_an_old_standalone_export_gives_the_same_logits(workspace, expected):
    assert verify(workspace / "standalone").export == "standalone"
    assert_close(logits(load_standalone("standalone"), "standalone"), expected["standalone"])


@pytest.mark.parametrize(
    "kind, load",
    [("exact", load_adapter), pytest.param("standalone", load_standalone, marks=pytest.mark.slow)],
)
def test_an_old_checkpoint_exports_to_the_same_logits(workspace, expected, kind, load):
    options = ExportOptions(
        pathlib.Path("best"), kind, pathlib.Path("out"), config=pathlib.Path("run/config.yaml")
    )
    export.run(options, say=lambda text: None)
    assert_close(logits(load("out"), "out"), expected["best"])
