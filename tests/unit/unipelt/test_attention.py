"""Prefix attention against an explicit softmax, for every kind of mask and gate."""

import math
import types

import pytest
import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from scaleup.unipelt.attention import ATTENTION, ATTENTION_CHILD, unipelt_sdpa
from scaleup.unipelt.kernels import fast_path
from scaleup.unipelt.masks import PassMasks, alignment_padding, widen_mask
from scaleup.unipelt.passes import Passes
from scaleup.unipelt.prefix_bank import PrefixTuning

B, T, S, H, E, L = 2, 4, 6, 4, 8, 3


class Site(nn.Module):
    """An attention module with a prefix waiting in it."""

    def __init__(self, prefix, causal=False, groups=1):
        super().__init__()
        self.is_causal, self.num_key_value_groups = causal, groups
        child = nn.Module()
        child.prefix_source = types.SimpleNamespace(
            causal=causal,
            take_prefix=lambda: (prefix, PassMasks(fast_path(prefix[0]))),
            observer=lambda: None,
        )
        self.add_module(ATTENTION_CHILD, child)


def explicit(query, key, value, allowed, keys, values, gate, groups) -> torch.Tensor:
    """[B, T, H, E] in float64, one softmax per example, head and query."""
    out = torch.zeros(B, query.shape[2], H, E, dtype=torch.float64)
    for b in range(B):
        for t in range(query.shape[2]):
            g = gate if isinstance(gate, float) else gate[b, t if gate.shape[1] > 1 else 0].double()
            seen = allowed[b, t].nonzero().flatten()
            for h in range(H):
                k = torch.cat([g * keys[h // groups].double(), key[b, h // groups, seen].double()])
                v = torch.cat(
                    [g * values[h // groups].double(), value[b, h // groups, seen].double()]
                )
                out[b, t, h] = torch.softmax(k @ query[b, h, t].double() / math.sqrt(E), 0) @ v
    return out


@pytest.mark.parametrize("gate", ["constant", "example", "token"])
@pytest.mark.parametrize("mask", ["none", "bool", "additive", "causal"])
@pytest.mark.parametrize("groups", [1, 2], ids=["mha", "gqa"])
def test_equals_an_explicit_softmax(keys, gate, mask, groups):
    torch.manual_seed(0)
    length = T if mask == "causal" else S
    query, key, value = (
        torch.randn(B, H, T, E),
        torch.randn(B, H // groups, length, E),
        torch.randn(B, H // groups, length, E),
    )
    own_keys, own_values = torch.randn(H // groups, L, E), torch.randn(H // groups, L, E)
    gates = {"constant": 0.7, "example": torch.rand(B, 1, 1), "token": torch.rand(B, T, 1)}[gate]
    allowed = torch.rand(B, T, length) > 0.3
    allowed[..., 0] = True
    if mask == "none":
        allowed[:] = True
        given = None
    elif mask == "causal":
        allowed = torch.ones(B, T, T, dtype=torch.bool).tril()
        given = None
    else:
        given = (
            allowed[:, None]
            if mask == "bool"
            else torch.zeros(B, 1, T, length).masked_fill(~allowed[:, None], -torch.inf)
        )
    site = Site(
        (torch.stack([own_keys, own_values]), gates), causal=mask == "causal", groups=groups
    ).eval()
    out, _ = unipelt_sdpa(site, query, key, value, given)
    torch.testing.assert_close(
        out.double(),
        explicit(query, key, value, allowed, own_keys, own_values, gates, groups),
        rtol=0,
        atol=2e-6,
    )


def test_a_mask_is_widened_in_its_own_kind():
    query, key = torch.zeros(B, H, T, E), torch.zeros(B, H, S, E)
    boolean = widen_mask(torch.zeros(B, 1, T, S, dtype=torch.bool), L, query, key, False)
    assert boolean.dtype == torch.bool and boolean[..., :L].all() and not boolean[..., L:].any()
    additive = widen_mask(torch.full((B, 1, T, S), -9.0), L, query, key, False)
    assert (additive[..., :L] == 0).all() and (additive[..., L:] == -9).all()
    assert widen_mask(None, L, query, key, False) is None
    assert widen_mask(None, L, query[:, :, :1], key, True) is None


@pytest.mark.parametrize("causal", [False, True])
def test_alignment_padding_are_seen_by_nobody(causal):
    query, key = torch.zeros(B, H, T, E), torch.zeros(B, H, T, E)
    plain = torch.ones(T, T, dtype=torch.bool)
    seen = plain.tril() if causal else plain
    for mask, allowed in (
        (None, lambda wide: wide),
        (seen[None, None], lambda wide: wide),
        (torch.zeros(1, 1, T, T).masked_fill(~seen, -torch.inf), lambda wide: wide == 0),
    ):
        wide = allowed(widen_mask(mask, L, query, key, causal, padding=5)).expand(1, 1, T, -1)[0, 0]
        assert (
            not wide[:, :5].any()
            and wide[:, 5 : 5 + L].all()
            and torch.equal(wide[:, 5 + L :], seen)
        )


def test_keys_are_brought_to_a_multiple_of_16_where_torch_is_faster_so():
    query, key = torch.zeros(B, H, T, E), torch.zeros(B, H, 128, E)
    assert (
        alignment_padding(query, key, 10, 0.0) == 6
        and alignment_padding(query, key[:, :, :118], 10, 0.0) == 0
    )
    assert (
        alignment_padding(query, key, 10, 0.1)
        == alignment_padding(query[:, :, :1], key, 10, 0.0)
        == alignment_padding(query.to("meta"), key, 10, 0.0)
        == 0
    )


@pytest.mark.parametrize("reparameterization", ["mlp", "none"])
def test_the_layout_is_the_authors(reparameterization):
    """Layer i takes entry 2i of [2 N, heads, size] for keys and 2i + 1 for values."""
    bank = PrefixTuning(nn.Linear(1, 1), Passes({}), layers=2, kv_heads=H, head_size=E)
    encoder = bank.encoder(L, 5, reparameterization)
    flat = encoder(torch.arange(L)).view(L, 2 * 2, H, E)
    for layer in range(2):
        for kind in range(2):
            torch.testing.assert_close(
                bank.keys_values(encoder)[layer, kind], flat[:, 2 * layer + kind].transpose(0, 1)
            )


def test_both_registries_of_transformers_know_the_attentions():
    """Without its mask function, transformers would silently pass a mask of None."""
    for ours in ATTENTION.values():
        assert ours in ALL_ATTENTION_FUNCTIONS and ours in ALL_MASK_ATTENTION_FUNCTIONS
    sizes = dict(batch_size=2, q_length=4, kv_length=4, device=torch.device("cpu"))
    padding = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    for plain, ours in ATTENTION.items():
        masks = (ALL_MASK_ATTENTION_FUNCTIONS[name] for name in (plain, ours))
        expected, made = (mask(**sizes, attention_mask=padding, config=None) for mask in masks)
        assert torch.equal(expected, made)


@pytest.mark.parametrize("reparameterization", ["mlp", "none"])
def test_a_fresh_prefix_is_small_beside_real_keys(reparameterization):
    """The start is the authors'. With PEFT's, entries near 1 outweigh short inputs."""
    torch.manual_seed(0)
    bank = PrefixTuning(nn.Linear(H * E, H * E), Passes({}), layers=2, kv_heads=H, head_size=E)
    fresh = bank.keys_values(bank.encoder(10, 512, reparameterization))
    assert 0 < fresh.std() < 0.03
