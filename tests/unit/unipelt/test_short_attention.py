"""Attention over few keys: values, gradients, every kind of mask and gate, and when it is used."""

import pytest
import torch

from scaleup.unipelt.kernels import short_attention as short

B, T, S, H, E, L = 2, 4, 6, 3, 8, 5


def given(per_query: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(B, H, T, E), (B, H, S, E), (B, H, S, E), (2, H, L, E)]
    leaves = [torch.randn(shape, dtype=torch.float64) for shape in shapes] + [
        torch.rand(B, T if per_query else 1, 1, dtype=torch.float64)
    ]
    return [leaf.requires_grad_() for leaf in leaves]


def masks() -> dict[str, torch.Tensor | None]:
    seen = torch.rand(B, 1, 1, L + S) > 0.4
    seen[..., :L] = True
    causal = torch.ones(T, L + S, dtype=torch.bool).tril(diagonal=L)[None, None]
    return {
        "none": None,
        "padding": seen,
        "causal": causal,
        "additive": torch.zeros(B, 1, 1, L + S)
        .double()
        .masked_fill(~seen, torch.finfo(torch.float64).min),
    }


def formula(query, key, value, own, gate, mask, kept) -> torch.Tensor:
    """[B, T, H, E]; kept: 0 or 1/(1 - p) for each weight."""
    gate = gate.unsqueeze(1)  # [B, 1, 1 or T, 1]
    scores = (
        torch.cat([gate * (query @ own[0].transpose(1, 2)), query @ key.transpose(2, 3)], dim=-1)
        / E**0.5
    )
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    weights = scores.softmax(-1) * kept
    return (gate * (weights[..., :L] @ own[1]) + weights[..., L:] @ value).transpose(1, 2)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("mask", ["none", "padding", "causal", "additive"])
@pytest.mark.parametrize("per_query", [False, True], ids=["example", "query"])
def test_output_and_gradients_are_those_of_the_formula(per_query, mask, dropout):
    leaves = given(per_query)
    mask = masks()[mask]
    torch.manual_seed(1)
    found = short.attend(*leaves, mask, E**-0.5, dropout)
    torch.manual_seed(1)
    kept = torch.empty(B, H, T, L + S, dtype=torch.bool).bernoulli_(1 - dropout).double() / (
        1 - dropout
    )
    wanted = formula(*leaves, mask, kept)
    assert found.shape == (B, T, H, E) and found.is_contiguous()
    torch.testing.assert_close(found, wanted)
    weight = torch.randn(found.shape, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), leaves),
        torch.autograd.grad((wanted * weight).sum(), leaves),
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("per_query", [False, True], ids=["example", "query"])
def test_a_graph_can_be_gone_through_twice(per_query):
    leaves = given(per_query)
    loss = short.attend(*leaves, None, E**-0.5, 0.0).square().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(
        torch.equal(one, other) for one, other in zip(first, torch.autograd.grad(loss, leaves))
    )


def test_only_what_needs_a_gradient_gets_one():
    leaves = given(False)
    for number in (0, 1, 4):
        leaves[number].requires_grad_(False)
    wanted = torch.autograd.grad(formula(*leaves, None, 1.0).square().sum(), [leaves[2], leaves[3]])
    for one, other in zip(
        torch.autograd.grad(
            short.attend(*leaves, None, E**-0.5, 0.0).square().sum(), [leaves[2], leaves[3]]
        ),
        wanted,
    ):
        torch.testing.assert_close(one, other)


def test_a_constant_gate_is_a_gate_of_that_size():
    leaves = given(False)
    leaves[4] = torch.full((B, 1, 1), 2.0, dtype=torch.float64)
    assert torch.equal(
        short.attend(*leaves, None, 1.0, 0.0), short.attend(*leaves[:4], 2.0, None, 1.0, 0.0)
    )


def test_second_derivatives_are_refused_and_not_wrong():
    leaves = given(False)
    loss = short.attend(*leaves, None, E**-0.5, 0.0).square().sum()
    with pytest.raises(RuntimeError, match="no second derivatives; leave out create_graph=True"):
        torch.autograd.grad(loss, leaves, create_graph=True)


def test_it_is_the_way_for_few_keys_in_float32_on_a_cpu(monkeypatch):
    monkeypatch.setenv("SCALEUP_KERNELS", "auto")
    limits = (short.MOST_KEYS, short.MOST_KEYS_PER_QUERY, short.MOST_KEYS_WITHOUT_FUSED)
    query, few, several, more = (
        torch.zeros(2, H, tokens, E) for tokens in (T, *(limit - L for limit in limits))
    )

    def way(query, key, value=None, mask=None, length=L, dropout=0.0, per_query=False) -> bool:
        return short.is_short(
            query, key, key if value is None else value, mask, length, dropout, per_query
        )

    for keys, slow in ((few, {}), (more, {"dropout": 0.1}), (several, {"per_query": True})):
        assert way(query, keys, **slow) and not way(query, keys, length=L + 1, **slow)
    monkeypatch.setenv("SCALEUP_KERNELS", "off")  # there, lse_attention does not take the others
    assert way(query, more, per_query=True) and not way(query, more, length=L + 1, per_query=True)
    monkeypatch.setenv("SCALEUP_KERNELS", "auto")
    for other in (query[:, :, :1], query.bfloat16(), query.to("meta"), query[:, :1], query[:1]):
        assert not way(other, few)
    assert not way(query, few, value=few.bfloat16())
    assert not way(query, few, dropout=1.0)
    mask = torch.zeros(1, 1, 1, few.shape[2])
    assert way(query, few, mask=mask) and not way(query, few, mask=mask.requires_grad_())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not way(query, few)
