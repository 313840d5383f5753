"""Single generated tokens on the fast path: which weights, masks and cached totals they take."""

import pytest
import torch
from torch import nn

from scaleup.unipelt.kernels.target import VARIABLE
from tests.utils.tiny import adapt, backbone, batch, same


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


@pytest.mark.parametrize("change", ["in place", "state dict", "other parameters"])
def test_tokens_take_the_weights_that_the_model_has_now(change, monkeypatch):
    model = adapted("llama", submodules=["adapter", "lora"])
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    ids = batch((9, 9, 9))["input_ids"]

    def alter() -> None:
        if change == "state dict":
            model.load_state_dict({n: p + 0.1 for n, p in before.items()}, strict=False)
            return
        for name in before:
            module, _, last = name.rpartition(".")
            if change == "in place":
                model.get_parameter(name).add_(0.1)
            else:
                changed = nn.Parameter(before[name] + 0.1)
                setattr(model.get_submodule(module), last, changed)

    def tokens(mode: str) -> torch.Tensor:
        monkeypatch.setenv(VARIABLE, mode)
        model.load_state_dict(before, strict=False)
        cache = model(input_ids=ids[:, :6], use_cache=True).past_key_values
        model(input_ids=ids[:, 6:7], past_key_values=cache)
        alter()
        return model(input_ids=ids[:, 7:8], past_key_values=cache).logits

    with torch.no_grad():
        expected = tokens("off")
        assert same(tokens("auto"), expected) and same(tokens("reference"), expected)


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
