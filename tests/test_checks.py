"""What is said of model and data before weights are loaded."""

import json

import pytest

from scaleup import config
from scaleup.checks import CHECKS
from tests.workspace import make_workspace, overrides


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def problems(*arguments: str) -> list[str]:
    try:
        config.load(None, list(arguments), checks=CHECKS)
    except config.ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    "content, words",
    [
        ({"model_type": "mpnet"}, "set model.attention=eager"),
        ({"model_type": "mamba"}, "no mamba model for data.task sequence_classification"),
        ({"model_type": "umt5"}, "lets the decoder of umt5 see later tokens); set model.attention=eager"),
    ],
)
def test_a_model_without_the_structure_is_refused(workspace, tmp_path, content, words):
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").touch()
    own = [f"model.name={tmp_path}" if o.startswith("model.name") else o for o in overrides(workspace, tmp_path / "out")]
    assert any(words in problem for problem in problems(*own)), problems(*own)
    if content["model_type"] == "mpnet":
        assert any("its attention cannot be exchanged" in problem for problem in problems(*own, "model.attention=eager"))
    if content["model_type"] != "mamba":
        full = [o for o in own if "method" not in o]
        assert problems(*full, "method=full") == []


def test_the_task_needs_a_model_for_it(workspace, tmp_path):
    own = [o for o in overrides(workspace, tmp_path / "out")]
    found = problems(*own, "data.task=seq2seq", "data.target_column=label", "data.k=40", "data.dev_size=20")
    assert found == ["model.name: transformers has no bert model for data.task seq2seq"]
