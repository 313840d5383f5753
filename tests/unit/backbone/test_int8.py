"""`Int8Linear` compared with bitsandbytes and with plain arithmetic."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from scaleup.backbone.int8 import Int8Linear, dequantize, replace_linears
from scaleup.backbone.quantization import quantize_rows


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 24)


@pytest.fixture
def int8_linear(linear) -> Int8Linear:
    layer = Int8Linear(48, 24, True, torch.float32)
    weight, scale = quantize_rows(linear.weight.data)
    layer.weight, layer.scale = (
        nn.Parameter(weight, requires_grad=False),
        nn.Parameter(scale, requires_grad=False),
    )
    layer.bias = nn.Parameter(linear.bias.data.clone())
    return layer


def test_forward_and_gradient_equal_bitsandbytes_in_training(linear, int8_linear):
    reference = bnb.nn.Linear8bitLt(48, 24, has_fp16_weights=False, threshold=6.0)
    reference.load_state_dict(linear.state_dict())
    reference = reference.to("cpu").train()
    x, y = (
        torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
        for _ in range(2)
    )
    one, other = int8_linear(x), reference(y)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    one.square().sum().backward()
    other.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)


def test_linear_layers_outside_those_left_out_are_counted():
    model = nn.Sequential(nn.Embedding(2, 2), nn.Linear(2, 2))
    assert (
        replace_linears(model, ("1",), torch.float32) == 0
        and replace_linears(model, (), torch.float32) == 1
    )


def test_the_error_is_that_of_int8_rounding(linear, int8_linear):
    restored = dequantize(int8_linear.weight, int8_linear.scale, torch.float32)
    step = linear.weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((restored - linear.weight).abs() <= 0.51 * step + 1e-4).all()


def test_the_gradient_is_exact_for_the_dequantized_weight(int8_linear):
    plain = nn.Linear(48, 24).double()
    plain.weight.data, plain.bias.data = (
        dequantize(int8_linear.weight, int8_linear.scale, torch.float64),
        int8_linear.bias.data.double(),
    )
    x = torch.randn(4, 48, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    int8_linear(x).sin().sum().backward()
    plain(y).sin().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-6, atol=1e-6)


def test_nothing_but_the_parameter_itself_is_kept_for_the_backward_pass(int8_linear):
    """Otherwise ZeRO-3 could not free the gathered weight between forward and backward."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        out = int8_linear(torch.randn(2, 48, requires_grad=True))
    assert not [tensor for tensor in kept if tensor.numel() >= int8_linear.weight.numel()]
    empty, whole = torch.empty(0, dtype=torch.int8), int8_linear.weight.data
    int8_linear.weight.data = empty
    int8_linear.weight.data = whole  # gathered again, as ZeRO-3 does before the backward pass
    out.sum().backward()


def test_under_autocast_it_computes_in_bfloat16(int8_linear):
    with torch.autocast("cpu", torch.bfloat16):
        assert int8_linear(torch.randn(2, 48)).dtype == torch.bfloat16


def test_only_plain_linears_outside_the_skipped_modules_are_replaced():
    model = nn.ModuleDict(
        {"a": nn.Linear(4, 4), "head": nn.Sequential(nn.Linear(4, 2)), "emb": nn.Embedding(3, 4)}
    )
    before = copy.deepcopy(model)
    replace_linears(model, ("head",), torch.float32)
    assert (
        isinstance(model["a"], Int8Linear)
        and model["a"].weight.dtype == torch.int8
        and model["a"].in_features == 4
    )
    assert type(model["head"][0]) is nn.Linear and type(model["emb"]) is type(before["emb"])


def test_an_evaluation_changes_neither_weight_nor_gradient(int8_linear):
    weights = copy.deepcopy(int8_linear.state_dict())

    def gradient() -> torch.Tensor:
        x = torch.linspace(-1, 1, 96).view(2, 48).requires_grad_()
        int8_linear.train()(x).square().sum().backward()
        return x.grad

    before = gradient()
    with torch.inference_mode():
        int8_linear.eval()(torch.ones(2, 48))
    assert torch.equal(gradient(), before) and before.any()
    assert all(
        torch.equal(value, weights[name]) for name, value in int8_linear.state_dict().items()
    )
