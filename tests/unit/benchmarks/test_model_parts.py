"""Copies of a model folder with weights in files of limited size."""

import sys

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel

from benchmarks import model_parts
from scaleup.errors import ConfigError


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    BertModel(config).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "vocab.txt").write_text("words")
    return tmp_path / "model"


def test_the_copy_has_files_of_limited_size_and_loads_like_the_original(folder, tmp_path):
    parts = model_parts.write_parts(folder, tmp_path / "parts", 66_000)
    assert len(parts) == 3
    assert all(part.stat().st_size < 66_000 + 5_000 for part in parts)
    assert (tmp_path / "parts" / "vocab.txt").read_text() == "words"
    copy, report = AutoModel.from_pretrained(tmp_path / "parts", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    original = AutoModel.from_pretrained(folder)
    for (name, tensor), other in zip(original.named_parameters(), copy.parameters()):
        assert torch.equal(tensor, other), name


def test_parts_in_bfloat16_load_in_bfloat16(folder, tmp_path):
    (part,) = model_parts.write_parts(folder, tmp_path / "parts", 10**6, "bfloat16")
    copy = AutoModel.from_pretrained(tmp_path / "parts")
    assert copy.dtype == torch.bfloat16
    original = AutoModel.from_pretrained(folder)
    weight = "encoder.layer.1.output.dense.weight"
    assert torch.equal(original.get_parameter(weight).bfloat16(), copy.get_parameter(weight))


def test_parts_can_be_divided_again(folder, tmp_path):
    model_parts.write_parts(folder, tmp_path / "three", 66_000)
    (part,) = model_parts.write_parts(tmp_path / "three", tmp_path / "one", 10**6)
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        "config.json",
        "model.safetensors",
        "vocab.txt",
    }


def test_a_tensor_larger_than_a_part_is_refused_and_nothing_is_written(folder, tmp_path):
    with pytest.raises(ConfigError, match="--max-size: the tensor embeddings.position_embeddings"):
        model_parts.write_parts(folder, tmp_path / "parts", 60_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("problem", ["no weights", "exists"])
def test_a_problem_with_a_folder_is_one_line_and_exit_code_2(
    folder, tmp_path, problem, monkeypatch, capsys
):
    source = tmp_path if problem == "no weights" else folder
    output = folder if problem == "exists" else tmp_path / "parts"
    monkeypatch.setattr(sys, "argv", ["model_parts", str(source), str(output)])
    assert model_parts.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    expected = "exists already" if problem == "exists" else "has no model.safetensors"
    assert line.startswith("error: ") and expected in line


def test_the_command_prints_the_number_and_the_size_of_the_parts(
    folder, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "parts"
    arguments = ["model_parts", str(folder), str(output), "--max-size", "66kB"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert model_parts.main() == 0
    assert capsys.readouterr().out == f"{output}: 3 parts, the largest has 0.1 MB\n"
