"""Reading the tensors of a checkpoint by their names in a model."""

import pytest
import torch
from safetensors import safe_open

from scaleup.backbone.filling import Filler
from scaleup.backbone.weights import Weights
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
