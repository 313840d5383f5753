"""Merging of ungated LoRA, and refusals that say what is true of the adapter."""

import copy

import pytest
import torch

from tests.utils.tiny import adapt, backbone, logits, same


@pytest.mark.parametrize("family", ["bert", "gpt2", "gpt_neox", "phi3", "bart"])
def test_ungated_lora_alone_merges_as_in_peft(family):
    model = adapt(backbone(family), submodules=["lora"])
    expected, bare = logits(model), logits(backbone(family))
    assert not same(bare, expected)
    safe = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert same(logits(safe), expected)
    model.merge_adapter()
    assert same(logits(model), expected)
    model.unmerge_adapter()
    assert same(logits(model), expected)
    merged = model.merge_and_unload()
    assert type(merged) is type(backbone(family)) and same(logits(merged), expected)
    assert not [name for name, _ in merged.named_modules() if "lora" in name or "unipelt" in name]
    assert merged.state_dict().keys() == backbone(family).state_dict().keys()


@pytest.mark.parametrize(
    "settings, says, leaves_out",
    [
        ({}, ["a bottleneck is nonlinear", "a prefix", "gates depend"], []),
        ({"submodules": ["lora"], "gates": "learned"}, ["gates depend"], ["prefix", "bottleneck"]),
        ({"submodules": ["prefix"]}, ["a prefix changes the softmax"], ["gates depend", "bottle"]),
        ({"submodules": ["adapter", "lora"], "gates": "none"}, ["a bottleneck"], ["gates depend"]),
    ],
)
@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_a_refused_merge_says_what_is_true_of_the_adapter(settings, says, leaves_out, method):
    model = adapt(backbone("bert"), **settings)
    expected = logits(model)
    with pytest.raises(ValueError, match="the adapter default cannot be merged exactly") as error:
        getattr(model, method)()
    assert all(text in str(error.value) for text in says)
    assert not any(text in str(error.value) for text in leaves_out)
    assert torch.equal(logits(model), expected)


def test_deberta_sends_positions_through_its_projections_and_is_not_merged():
    model = adapt(backbone("deberta-v2"), submodules=["lora"])
    with pytest.raises(ValueError, match="position embeddings pass through the projection"):
        model.merge_and_unload()


@pytest.mark.parametrize("submodules", [["lora"], ["adapter", "prefix", "lora"]])
def test_adapters_are_not_combined_by_weights(submodules):
    model = adapt(backbone("bert"), submodules=submodules)
    with pytest.raises(
        ValueError, match="train one adapter on all the data, or pass adapter_names"
    ):
        model.add_weighted_adapter(["default"], [1.0], "mixed")
