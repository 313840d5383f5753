"""Reading the tensors of a checkpoint by their names in a model."""

import pytest
import torch
from safetensors import safe_open

from scaleup.backbone.filling import Filler
from scaleup.backbone.weights import Weights, weight_files
from tests.utils.tiny import HYBRID, MIXED, backbone


@pytest.mark.parametrize("family", MIXED)
def test_experts_that_are_apart_in_the_files_are_put_together(family, tmp_path):
    model = backbone(family)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        apart = [name for name in file.keys() if ".experts.3." in name]  # noqa: SIM118
    assert bool(apart) == (family != "gpt_oss")  # whose files have them together
    weights = Weights(model, tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(weights.get([name]), parameter), name


def test_more_than_ten_experts_keep_their_order(tmp_path):
    model = backbone("mixtral", num_local_experts=12)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    weights = Weights(model, tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(weights.get([name]), parameter), name


@pytest.mark.parametrize("family", ["llama", "mixtral", *HYBRID])
def test_the_loader_of_shards_fills_weights_and_the_buffers_of_inner_layers(family, tmp_path):
    model = backbone(family)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = type(model)(model.config)
    loader = Filler(empty, Weights(empty, tmp_path), torch.device("cpu"))
    for prefix, module in empty.named_modules():
        loader.fill(prefix, module)
    loader.finish()
    found = dict(empty.named_parameters()) | dict(empty.named_buffers())
    expected = dict(model.named_parameters()) | dict(model.named_buffers())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_buffer_that_nothing_initialises_is_refused(tmp_path):
    model = backbone("llama")
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = type(model)(model.config)
        empty.model.register_buffer("shift", torch.zeros(3), persistent=False)
    loader = Filler(empty, Weights(empty, tmp_path), torch.device("cpu"))
    for prefix, module in empty.named_modules():
        loader.fill(prefix, module)
    with pytest.raises(ValueError, match=r"model\.shift is not in the checkpoint; use ZeRO-2"):
        loader.finish()


@pytest.mark.parametrize("shards", [False, True])
def test_only_the_files_that_transformers_reads_are_read(shards, tmp_path):
    """People keep copies beside them, and files of another number of shards remain."""
    model, other = backbone("llama"), backbone("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model_old.safetensors")
    model.save_pretrained(tmp_path, max_shard_size="20KB" if shards else "1GB")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    files = weight_files(tmp_path)
    assert len(files) > 3 if shards else [file.name for file in files] == ["model.safetensors"]
    weights, loaded = Weights(model, tmp_path), type(model).from_pretrained(tmp_path)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(weights.get([name]), parameter), name
