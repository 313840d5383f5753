"""Single generated tokens on the fast path: which weights, masks and cached totals they take."""

import copy

import pytest
import torch
from torch import nn
from transformers import BartForConditionalGeneration

from scaleup.unipelt.kernels import StepSite
from scaleup.unipelt.kernels.target import VARIABLE
from tests.utils.tiny import TARGETS, adapt, backbone, batch, same


def adapted(family: str, **config):
    return adapt(backbone(family), **config)


@pytest.mark.parametrize("mode", ["off", "auto", "reference"])
def test_a_cache_with_a_token_whose_gates_are_not_known_is_refused(mode, monkeypatch):
    monkeypatch.setenv(VARIABLE, mode)
    model = adapted("llama")
    ids = batch((9, 9, 9))["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :6], use_cache=True).past_key_values
        model(input_ids=ids[:, 6:7], past_key_values=cache)
        with model.disable_adapter():
            model(input_ids=ids[:, 7:8], past_key_values=cache)
        with pytest.raises(ValueError, match="filled without this adapter"):
            model(input_ids=ids[:, 8:], past_key_values=cache)


CHANGES = ["in place", "state dict", "other parameters", "other memory", "fused optimizer"]


def alter(model, change: str, ids: torch.Tensor) -> None:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if change == "state dict":
        model.load_state_dict({name: p + 0.1 for name, p in trained.items()}, strict=False)
    if change == "fused optimizer":  # it does not tell torch that it changes weights
        with torch.enable_grad():
            model(input_ids=ids).logits.sum().backward()
        torch.optim.AdamW(trained.values(), lr=0.1, fused=True).step()
    for name, parameter in trained.items():
        module, _, last = name.rpartition(".")
        if change == "in place":
            parameter.add_(0.1)
        elif change == "other memory":
            parameter.data = parameter.data + 0.1
        elif change == "other parameters":
            setattr(model.get_submodule(module), last, nn.Parameter(parameter + 0.1))


@pytest.mark.parametrize("mode", ["off", "auto", "reference"])
@pytest.mark.parametrize("submodules", [["adapter", "lora"], ["prefix"]], ids="+".join)
@pytest.mark.parametrize("change", CHANGES)
def test_tokens_take_the_weights_that_the_model_has_now(change, submodules, mode, monkeypatch):
    model, ids = adapted("llama", submodules=submodules), batch((9, 9, 9))["input_ids"]
    monkeypatch.setenv(VARIABLE, mode)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :6], use_cache=True).past_key_values
        before = model(input_ids=ids[:, 6:7], past_key_values=copy.deepcopy(cache)).logits
        model(input_ids=ids[:, 6:7], past_key_values=cache)
        alter(model, change, ids)
        copied = copy.deepcopy(cache)  # without what is kept beside it
        found = model(input_ids=ids[:, 7:8], past_key_values=cache).logits
        monkeypatch.setenv(VARIABLE, "off")
        expected = model(input_ids=ids[:, 7:8], past_key_values=copied).logits
    assert same(found, expected) and not same(found, before)


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_tokens_take_the_frozen_norms_that_the_model_has_now(mode, monkeypatch):
    model = adapt(backbone("bart", cls=BartForConditionalGeneration))
    given = {"input_ids": batch((9, 9, 9))["input_ids"]}
    monkeypatch.setenv(VARIABLE, mode)
    with torch.no_grad():
        cache = model(**given, decoder_input_ids=TARGETS[:, :3], use_cache=True).past_key_values
        model(**given, decoder_input_ids=TARGETS[:, 3:4], past_key_values=cache)
        for name, parameter in model.named_parameters():
            if "final_layer_norm.base_layer" in name:
                parameter.add_(0.5)
        copied = copy.deepcopy(cache)
        step = given | {"decoder_input_ids": TARGETS[:, 4:5]}
        found = model(**step, past_key_values=cache).logits
        monkeypatch.setenv(VARIABLE, "off")
        assert same(found, model(**step, past_key_values=copied).logits)


def test_compiled_blocks_compute_tokens_by_plain_formulas(monkeypatch):
    model, ids = adapted("llama"), batch((5, 5))["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :3], use_cache=True).past_key_values
        copied = copy.deepcopy(cache)
        expected = model(input_ids=ids[:, 3:4], past_key_values=copied).logits
        for module in model.modules():
            if type(module).__name__ == "LlamaDecoderLayer":
                module.compile(backend="eager")
        monkeypatch.delattr(StepSite, "evaluate")
        assert same(model(input_ids=ids[:, 3:4], past_key_values=cache).logits, expected)


@pytest.mark.parametrize("mode", ["off", "auto", "reference"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_masks_of_whole_numbers_per_query_and_key_are_refused(family, mode, monkeypatch):
    """Nobody can tell whether they multiply or are added."""
    monkeypatch.setenv(VARIABLE, mode)
    model, ids = adapted(family), batch((9, 9, 9))["input_ids"]
    mask = torch.ones(3, 1, 9, 9, dtype=torch.int64).tril()
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"shape \(3, 1, 9, 9\) is torch.int64; pass a bool"):
            model(input_ids=ids, attention_mask=mask)
        found = model(input_ids=ids, attention_mask=mask.bool()).logits
        assert same(found, model(input_ids=ids).logits)


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_a_generated_token_counts_once_whatever_its_mask_is(mode, monkeypatch):
    model, ids = adapted("gpt2"), batch((9, 9, 9))["input_ids"]

    def last(value: int, kernels: str) -> torch.Tensor:
        monkeypatch.setenv(VARIABLE, kernels)
        mask = torch.ones_like(ids)
        mask[:, 7] = value
        with torch.no_grad():
            cache = model(input_ids=ids[:, :7], attention_mask=mask[:, :7]).past_key_values
            for end in (8, 9):
                given = {"input_ids": ids[:, end - 1 : end], "attention_mask": mask[:, :end]}
                out = model(**given, past_key_values=cache).logits
        return out

    for value in (0, 3):
        assert same(last(value, mode), last(value, "off"))
