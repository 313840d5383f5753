"""Sums of small products: equal to the plain formula, in every way they are computed, with gradients."""

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


def given(**to) -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    torch.manual_seed(0)
    linear = nn.Linear(R, D)
    nn.init.normal_(linear.bias)
    return torch.randn(B, T, D).to(**to), torch.randn(B, T, R).to(**to), linear.to(**to)


@pytest.mark.parametrize("gate", [1.0, 0.3, "example", "token"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_gated_product_equals_its_formula(gate, dtype):
    z, narrow, linear = given(dtype=dtype)
    gate = torch.rand(B, {"example": 1, "token": T}[gate], 1) if isinstance(gate, str) else gate
    wanted = z.double() + (
        gate.double() if isinstance(gate, torch.Tensor) else gate
    ) * linear.double()(narrow.double())
    linear = linear.to(dtype)
    found = add_gated(z, narrow, gate, linear, own=False)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), wanted, rtol=0, atol=3e-7 if dtype == torch.float64 else 0.06
    )
    other = linear.to(torch.float32)  # another type than the wide side's: the plain way
    found = add_gated(z, narrow.float(), gate, other, own=False)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), wanted, rtol=0, atol=1e-5 if dtype == torch.float64 else 0.06
    )


@pytest.mark.parametrize("size", [1, T], ids=["example", "token"])
def test_gradients_are_those_of_the_formula(size):
    z, narrow, linear = given(dtype=torch.float64)
    leaves = [z, narrow, torch.rand(B, size, 1, dtype=torch.float64), *linear.parameters()]
    for leaf in leaves:
        leaf.requires_grad_()
    wanted = torch.autograd.grad((z + leaves[2] * linear(narrow)).square().sum(), leaves)
    found = torch.autograd.grad(
        add_gated(z, narrow, leaves[2], linear, own=True).square().sum(), leaves
    )
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other)


def test_in_place_only_outside_of_training_and_of_what_is_ones_own():
    z, narrow, linear = given()
    before = z.clone()
    add_gated(z, narrow, 0.5, linear, own=True)
    with torch.no_grad():
        add_gated(z, narrow, 0.5, linear, own=False)
        assert torch.equal(z, before)
        assert add_gated(
            z, narrow, 0.5, linear, own=True
        ).data_ptr() == z.data_ptr() and not torch.equal(z, before)


@pytest.mark.parametrize("size", [1, T], ids=["example", "token"])
def test_a_product_is_added_to_a_frozen_layers_output_with_the_gradients_of_the_formula(size):
    z, narrow, linear = given(dtype=torch.float64)
    frozen = nn.Linear(D, D).double().requires_grad_(False)
    leaves = [z, narrow, linear.weight, torch.rand(B, size, 1, dtype=torch.float64)]
    for leaf in leaves:
        leaf.requires_grad_()
    wanted = torch.autograd.grad(
        (frozen(z) + leaves[-1] * (narrow @ linear.weight.t())).square().sum(), leaves
    )
    output = frozen(z)
    found = add_lora(output, scaled(leaves[-1], narrow), linear, frozen)
    assert found.data_ptr() == output.data_ptr()
    for one, other in zip(torch.autograd.grad(found.square().sum(), leaves), wanted):
        torch.testing.assert_close(one, other)


def test_whoever_needs_what_was_written_over_is_told():
    z, narrow, linear = given()
    output = nn.Linear(D, D)(z)
    kept = output.square()
    add_lora(output, narrow, linear, nn.Linear(D, D))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


@pytest.mark.parametrize("groups", [[[40, 2, 1]], [[40], [2, 1]], [[40], [2], [1]]], ids=str)
def test_products_of_one_input_are_made_together_with_the_gradients_of_each(groups):
    x, _, _ = given(dtype=torch.float64)
    linears = [
        nn.Linear(D, rows).double() for rows in (40, 2, 1)
    ]  # 40: beyond what are few columns
    leaves = [x.requires_grad_(), *(linear.weight for linear in linears)]
    wanted = [x @ linear.weight.t() for linear in linears]
    rest = iter(linears)
    joined = narrow_products(x, *[[next(rest) for _ in rows] for rows in groups])
    assert [part.shape[-1] for part in joined] == [sum(rows) for rows in groups]
    found = [part for whole, rows in zip(joined, groups) for part in whole.split(rows, dim=-1)]
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other)
    wanted, found = (
        torch.autograd.grad(
            sum((1 + i) * part.square().sum() for i, part in enumerate(parts)), leaves
        )
        for parts in (wanted, found)
    )
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other)
    assert narrow_products(x.float(), linears) is None  # types must be one


def test_a_linear_function_put_in_place_of_torchs_is_used(monkeypatch):
    """As DeepSpeed's under ZeRO-3, which also gathers the weights: nothing may reach around it."""
    calls, plain = [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: calls.append(1) or plain(*args))
    z, narrow, linear = given()
    add_gated(z, narrow, 0.5, linear, own=False)
    add_lora(z, narrow, nn.Linear(R, D, bias=False), nn.Linear(D, D))
    assert len(calls) == 2
    assert narrow_products(z, [nn.Linear(D, R)]) is None


@pytest.mark.parametrize("rows", [3, FEW_ROWS], ids=["few", "many"])
def test_few_rows_equal_a_linear_layer_with_its_gradients(rows):
    torch.manual_seed(0)
    linear = nn.Linear(D, 40).double()
    x = (
        torch.randn(D, rows, dtype=torch.float64).t().requires_grad_()
    )  # not contiguous, as what this made itself
    leaves, weight = [x, *linear.parameters()], torch.randn(rows, 40, dtype=torch.float64)
    found, wanted = few_rows(x, linear), linear(x)
    torch.testing.assert_close(found, wanted)
    assert (type(found.grad_fn).__name__ == "_FewRowsBackward") == (rows < FEW_ROWS)
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), leaves),
        torch.autograd.grad((wanted * weight).sum(), leaves),
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, T], ids=["example", "token"])
def test_under_autocast_products_are_of_its_type_and_gradients_of_the_weights(wide, size):
    """Near the formula in float32; what is wide keeps its type, and so do the weights' gradients."""
    z, _, up = given()
    down, gate = nn.Linear(D, R), torch.rand(B, size, 1).requires_grad_()
    leaves = [z.requires_grad_(), gate, down.weight, up.weight, up.bias]
    wanted_out = z + gate * up(nn.functional.linear(z, down.weight))
    wanted = torch.autograd.grad(wanted_out.square().sum(), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        x = z.to(wide)
        (narrow,) = narrow_products(x, [down])
        found_out = add_gated(x, narrow, gate, up, own=False)
    assert (
        narrow.dtype == torch.bfloat16
        and found_out.dtype == wide
        and type(found_out.grad_fn).__name__ == "_AddBackward"
    )
    found = torch.autograd.grad(found_out.float().square().sum(), leaves)
    assert ((found_out - wanted_out).norm() / wanted_out.norm()) < 0.01
    for one, other in zip(found, wanted):
        assert one.dtype == torch.float32 and ((one - other).norm() / other.norm()) < 0.02
