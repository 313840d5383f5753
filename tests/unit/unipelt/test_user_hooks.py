"""Hooks of users on the layers of the backbone see and replace what these layers return."""

import pytest
import torch

from scaleup.unipelt.kernels.target import VARIABLE
from tests.utils.tiny import adapt, backbone, batch, same

MODES = pytest.mark.parametrize("mode", ["off", "auto", "reference"])


def frozen_projections(model) -> list:
    return [module for name, module in model.named_modules() if name.endswith(".base_layer")]


def last_token(model) -> torch.Tensor:
    """Return the logits of a token after cached ones, which takes packed weights."""
    ids = batch((9, 9, 9))["input_ids"]
    cache = model(input_ids=ids[:, :8], use_cache=True).past_key_values
    return model(input_ids=ids[:, 8:], past_key_values=cache).logits


@MODES
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_kept_output_does_not_become_the_sum_with_lora(family, context, mode, monkeypatch):
    monkeypatch.setenv(VARIABLE, mode)
    model, kept = adapt(backbone(family)), []
    for projection in frozen_projections(model):
        projection.register_forward_hook(lambda *call: kept.append((call, call[2].clone())))
    with context():
        last_token(model)
    assert kept and all(torch.equal(call[2], output) for call, output in kept)


@MODES
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_replaced_output_may_have_any_layout(family, mode, monkeypatch):
    def reorder(module, args, output):
        return output.transpose(0, -1).contiguous().transpose(0, -1)

    monkeypatch.setenv(VARIABLE, mode)
    model = adapt(backbone(family))
    with torch.no_grad():
        expected = last_token(model)
        for projection in frozen_projections(model):
            projection.register_forward_hook(reorder)
        assert same(last_token(model), expected)
