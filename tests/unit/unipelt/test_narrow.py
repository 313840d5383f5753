"""Narrow products: values and gradients equal those of the plain formula, on every path."""

import pytest
import torch
from torch import nn

from scaleup.unipelt.kernels.narrow import (
    FEW_ROWS,
    add_gated,
    add_lora,
    few_rows,
    narrow_products,
    scaled,
)

B, T, D, R = 2, 5, 16, 3


def inputs(**to) -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    torch.manual_seed(0)
    linear = nn.Linear(R, D)
    nn.init.normal_(linear.bias)
    return torch.randn(B, T, D).to(**to), torch.randn(B, T, R).to(**to), linear.to(**to)


@pytest.mark.parametrize("gate", [1.0, 0.3, "example", "token"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_gated_product_equals_its_formula(gate, dtype):
    z, narrow, linear = inputs(dtype=dtype)
    gate = torch.rand(B, {"example": 1, "token": T}[gate], 1) if isinstance(gate, str) else gate
    expected = z.double() + (
        gate.double() if isinstance(gate, torch.Tensor) else gate
    ) * linear.double()(narrow.double())
    linear = linear.to(dtype)
    actual = add_gated(z, narrow, gate, linear, may_overwrite=False)
    assert actual.dtype == dtype
    torch.testing.assert_close(
        actual.double(), expected, rtol=0, atol=3e-7 if dtype == torch.float64 else 0.06
    )
    other = linear.to(torch.float32)  # a dtype that differs from the wide side's: the plain formula
    actual = add_gated(z, narrow.float(), gate, other, may_overwrite=False)
    assert actual.dtype == dtype
    torch.testing.assert_close(
        actual.double(), expected, rtol=0, atol=1e-5 if dtype == torch.float64 else 0.06
    )


@pytest.mark.parametrize("size", [1, T], ids=["example", "token"])
def test_gradients_equal_those_of_the_formula(size):
    z, narrow, linear = inputs(dtype=torch.float64)
    leaves = [z, narrow, torch.rand(B, size, 1, dtype=torch.float64), *linear.parameters()]
    for leaf in leaves:
        leaf.requires_grad_()
    expected = torch.autograd.grad((z + leaves[2] * linear(narrow)).square().sum(), leaves)
    actual = torch.autograd.grad(
        add_gated(z, narrow, leaves[2], linear, may_overwrite=True).square().sum(), leaves
    )
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other)


def test_z_is_overwritten_only_if_allowed_and_without_gradients():
    z, narrow, linear = inputs()
    before = z.clone()
    add_gated(z, narrow, 0.5, linear, may_overwrite=True)
    with torch.no_grad():
        add_gated(z, narrow, 0.5, linear, may_overwrite=False)
        assert torch.equal(z, before)
        assert add_gated(
            z, narrow, 0.5, linear, may_overwrite=True
        ).data_ptr() == z.data_ptr() and not torch.equal(z, before)


@pytest.mark.parametrize("size", [1, T], ids=["example", "token"])
def test_add_lora_overwrites_a_frozen_layers_output_and_has_the_formulas_gradients(size):
    z, narrow, linear = inputs(dtype=torch.float64)
    frozen = nn.Linear(D, D).double().requires_grad_(False)
    leaves = [z, narrow, linear.weight, torch.rand(B, size, 1, dtype=torch.float64)]
    for leaf in leaves:
        leaf.requires_grad_()
    expected = torch.autograd.grad(
        (frozen(z) + leaves[-1] * (narrow @ linear.weight.t())).square().sum(), leaves
    )
    output = frozen(z)
    actual = add_lora(output, scaled(leaves[-1], narrow), linear, may_overwrite=True)
    assert actual.data_ptr() == output.data_ptr()
    for one, other in zip(torch.autograd.grad(actual.square().sum(), leaves), expected):
        torch.testing.assert_close(one, other)


def test_a_backward_pass_that_needs_an_overwritten_output_raises():
    z, narrow, linear = inputs()
    output = nn.Linear(D, D)(z)
    kept = output.square()
    add_lora(output, narrow, linear, may_overwrite=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


@pytest.mark.parametrize("groups", [[[40, 2, 1]], [[40], [2, 1]], [[40], [2], [1]]], ids=str)
def test_joined_products_have_the_values_and_gradients_of_separate_ones(groups):
    x, _, _ = inputs(dtype=torch.float64)
    # 40 outputs are more than FEW_COLUMNS.
    linears = [nn.Linear(D, rows).double() for rows in (40, 2, 1)]
    leaves = [x.requires_grad_(), *(linear.weight for linear in linears)]
    expected = [x @ linear.weight.t() for linear in linears]
    rest = iter(linears)
    joined = narrow_products(x, *[[next(rest) for _ in rows] for rows in groups])
    assert [part.shape[-1] for part in joined] == [sum(rows) for rows in groups]
    actual = [part for whole, rows in zip(joined, groups) for part in whole.split(rows, dim=-1)]
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other)
    expected, actual = (
        torch.autograd.grad(
            sum((1 + i) * part.square().sum() for i, part in enumerate(parts)), leaves
        )
        for parts in (expected, actual)
    )
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other)
    assert narrow_products(x.float(), linears) is None  # dtypes must be equal


def test_second_derivatives_are_refused_and_not_wrong():
    """What is saved for the backward pass is no longer connected with the inputs."""
    z, narrow, linear = (part.requires_grad_() for part in inputs())
    products = narrow_products(z, [nn.Linear(D, R), nn.Linear(D, 1)])[0]
    for result in (products, add_gated(z, narrow, 0.5, linear, may_overwrite=False)):
        (grad,) = torch.autograd.grad(result.square().sum(), z, retain_graph=True)
        assert grad.isfinite().all()
        with pytest.raises(RuntimeError, match="have no second derivatives; leave out create_g"):
            torch.autograd.grad(result.square().sum(), z, create_graph=True)
    (grad,) = torch.autograd.grad(
        few_rows(narrow[0], linear).square().sum(), narrow, create_graph=True
    )
    (second,) = torch.autograd.grad(grad.sum(), narrow)
    torch.testing.assert_close(
        second[0], (2 * linear.weight.t() @ linear.weight).sum(0).expand(T, R)
    )


def test_a_replaced_linear_function_is_used(monkeypatch):
    """DeepSpeed replaces it under ZeRO-3 and gathers the weights around its calls."""
    calls, plain = [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: calls.append(1) or plain(*args))
    z, narrow, linear = inputs()
    add_gated(z, narrow, 0.5, linear, may_overwrite=False)
    add_lora(z, narrow, nn.Linear(R, D, bias=False), may_overwrite=True)
    assert len(calls) == 2
    assert narrow_products(z, [nn.Linear(D, R)]) is None


@pytest.mark.parametrize("rows", [3, FEW_ROWS], ids=["few", "many"])
def test_few_rows_equal_a_linear_layer_with_its_gradients(rows):
    torch.manual_seed(0)
    linear = nn.Linear(D, 40).double()
    # Not contiguous, like the output of few_rows.
    x = torch.randn(D, rows, dtype=torch.float64).t().requires_grad_()
    leaves, weight = [x, *linear.parameters()], torch.randn(rows, 40, dtype=torch.float64)
    actual, expected = few_rows(x, linear), linear(x)
    torch.testing.assert_close(actual, expected)
    assert (type(actual.grad_fn).__name__ == "_FewRowsBackward") == (rows < FEW_ROWS)
    for one, other in zip(
        torch.autograd.grad((actual * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, T], ids=["example", "token"])
def test_under_autocast_products_have_its_dtype_and_gradients_that_of_the_weights(wide, size):
    """The result is close to float32; the wide side and the weights' gradients keep their dtype."""
    z, _, up = inputs()
    down, gate = nn.Linear(D, R), torch.rand(B, size, 1).requires_grad_()
    leaves = [z.requires_grad_(), gate, down.weight, up.weight, up.bias]
    expected_out = z + gate * up(nn.functional.linear(z, down.weight))
    expected = torch.autograd.grad(expected_out.square().sum(), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        x = z.to(wide)
        (narrow,) = narrow_products(x, [down])
        actual_out = add_gated(x, narrow, gate, up, may_overwrite=False)
    assert (
        narrow.dtype == torch.bfloat16
        and actual_out.dtype == wide
        and type(actual_out.grad_fn).__name__ == "_AddBackward"
    )
    actual = torch.autograd.grad(actual_out.float().square().sum(), leaves)
    assert ((actual_out - expected_out).norm() / expected_out.norm()) < 0.01
    for one, other in zip(actual, expected):
        assert one.dtype == torch.float32 and ((one - other).norm() / other.norm()) < 0.02
