"""Finding sites by structure, and refusing backbones that would train on noise or fail in the middle of a run."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from scaleup.backbone import check, find_sites, head_names, load_config, load_model, position_limit
from scaleup.config import ConfigError, DataSettings, MethodSettings, ModelSettings
from tests.tiny import FAMILIES, adapt, backbone


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_the_same_before_and_after_adapting(family):
    model = backbone(family)
    before = find_sites(model)
    adapt(model)
    assert find_sites(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_its_attentions_and_its_block(family):
    attentions, blocks = find_sites(backbone(family))
    layers = 3 if family not in ("bart", "mbart") else 4
    assert len(blocks) == layers and len(attentions) == (3 if layers == 3 else 2 + 2 * 2)
    assert sum(site.cross for site in attentions) == (0 if layers == 3 else 2)
    assert all(site.kv_heads * site.head_size == site.hidden_size == 32 for site in attentions)


def test_heads_are_found_without_their_names():
    assert head_names(backbone("bert")) == ["classifier"] and head_names(backbone("bart")) == ["classification_head"]
    assert head_names(backbone("bert").base_model) == []


def test_position_limits_count_roberta_from_its_padding():
    assert position_limit(backbone("bert").config) == 48
    assert position_limit(backbone("roberta").config) == 46
    model = backbone("roberta")
    model(input_ids=torch.full((1, 46), 5))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model(input_ids=torch.full((1, 47), 5))


@pytest.fixture
def folder(tmp_path):
    backbone("bert").save_pretrained(tmp_path)
    return tmp_path


def load(folder, labels=("a", "b")):
    settings = ModelSettings(name=str(folder))
    return load_model(settings, load_config(settings), list(labels), torch.float32, torch.device("cpu"))


def test_a_head_of_another_size_is_replaced_and_named(folder):
    model = load(folder)
    assert model.classifier.out_features == 2 and model.config.id2label == {0: "a", 1: "b"}
    assert torch.equal(model.bert.pooler.dense.weight, backbone("bert").bert.pooler.dense.weight)


def test_weights_that_do_not_fit_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["bert.encoder.layer.1.attention.self.query.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="do not fit its config.json: 1 tensors .* first bert.encoder.layer.1"):
        load(folder)


def test_a_damaged_weight_file_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load(folder)


def problems(name, method="unipelt", **data):
    return check({
        "model": ModelSettings(name=str(name)), "method": MethodSettings(name=method), "data": DataSettings(name="rte", **data)
    })  # fmt: skip


def test_a_folder_is_judged_before_weights_are_loaded(folder):
    assert problems(folder) == []
    assert "has 48 positions" in problems(folder, max_length=49)[0]
    (folder / "model.safetensors").unlink()
    assert "has no weights" in problems(folder)[0]
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    assert "does not support the model type gpt2" in problems(folder)[0]
    assert not any("does not support" in p for p in problems(folder, method="full"))
    (folder / "config.json").write_text("{nonsense")
    assert "not a usable model config" in problems(folder)[0]
