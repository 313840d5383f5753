"""Pooling against plain loops, the fused projection, statistics."""

import pytest
import torch

from scaleup.unipelt.config import UniPeltConfig
from scaleup.unipelt.gate import ConstantGate, GateMoments, LearnedGate, pool, resolve_pooling
from scaleup.unipelt.sites import find_sites
from scaleup.unipelt.submodules import site_gates
from tests.utils.tiny import adapt, backbone, logits

G = torch.rand(3, 5, 2, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]])


def test_paper_pooling_is_the_mean_over_every_position():
    torch.testing.assert_close(pool(G, "paper", MASK), torch.stack([g.mean(0) for g in G])[:, None])


def test_masked_pooling_is_the_mean_over_real_tokens():
    expected = torch.stack([g[m.bool()].mean(0) for g, m in zip(G, MASK)])[:, None]
    torch.testing.assert_close(pool(G, "masked", MASK), expected)
    torch.testing.assert_close(pool(G, "masked", None), pool(G, "paper", None))


@pytest.mark.parametrize("mask", [None, MASK])
def test_causal_pooling_is_the_mean_over_real_tokens_so_far(mask):
    out = pool(G, "causal", mask)
    for b in range(3):
        for t in range(5):
            seen = [s for s in range(t + 1) if mask is None or mask[b, s]]
            expected = G[b, seen].mean(0) if seen else torch.zeros(2)
            torch.testing.assert_close(out[b, t], expected)


def test_an_example_without_real_tokens_has_a_finite_gate():
    assert torch.isfinite(pool(G, "masked", torch.zeros(3, 5))).all()


def test_masked_never_shows_a_decoder_its_future():
    kinds = {
        (name, causal): resolve_pooling(name, causal)
        for name in ("auto", "masked", "paper", "causal")
        for causal in (False, True)
    }
    assert kinds["auto", False] == kinds["masked", False] == "masked"
    assert kinds["auto", True] == kinds["masked", True] == "causal"
    assert kinds["paper", True] == "paper" and kinds["causal", False] == "causal"


def test_gates_can_start_open_and_be_scaled_while_statistics_stay_within_0_and_1():
    gate = LearnedGate(4, ("prefix", "lora"), "masked", scales=(1.0, 2.0), bias=3.0)
    torch.nn.init.zeros_(gate.weight)
    gate.statistics = GateMoments(2, torch.device("cpu"))
    out, start = gate(torch.randn(3, 5, 4), MASK), torch.sigmoid(torch.tensor(3.0)).item()
    assert out["prefix"].flatten().tolist() == pytest.approx([start] * 3)
    assert out["lora"].flatten().tolist() == pytest.approx([2 * start] * 3)
    assert [mean for mean, _ in gate.statistics.drain()] == pytest.approx([start] * 2)


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart"])
def test_an_open_gate_that_scales_gives_the_lora_that_is_used_alone(family):
    model = adapt(backbone(family), submodules=["lora"], gates="none")
    gated = adapt(
        backbone(family), submodules=["lora"], gates="learned", lora_gate="scale", gate_bias=30.0
    )
    weights = {n: t for n, t in model.state_dict().items() if "unipelt_gate" not in n}
    gated.load_state_dict(weights, strict=False)
    with torch.no_grad():
        for name, parameter in gated.named_parameters():
            if "unipelt_gate" in name:
                parameter.fill_(30.0 if name.endswith("bias") else 0.0)
    assert (logits(gated) - logits(model)).abs().max() < 1e-5
    assert (logits(model) - logits(backbone(family))).abs().max() > 1e-2


def test_one_projection_serves_several_gates():
    gate = LearnedGate(4, ("prefix", "lora"), "masked")
    torch.nn.init.normal_(gate.weight)
    h = torch.randn(3, 5, 4)
    out = gate(h, MASK)
    for i, name in enumerate(("prefix", "lora")):
        single = torch.sigmoid(h @ gate.weight[i] + gate.bias[i])
        expected = torch.stack([s[m.bool()].mean() for s, m in zip(single, MASK)])
        torch.testing.assert_close(out[name].flatten(), expected)
    assert out["lora"].shape == (3, 1, 1)


def test_an_ungated_site_is_a_constant_gate():
    config = UniPeltConfig(submodules=["prefix", "lora"], gates="none", r=8, lora_alpha=16)
    gates = site_gates(config, *find_sites(backbone("bert")))
    assert gates["bert.encoder.layer.0.attention.self"] == {"prefix": 1.0, "lora": 2.0}
    gate = ConstantGate({"prefix": 1.0, "lora": 2.0})
    assert gate(torch.randn(1, 2, 4), None) == {"prefix": 1.0, "lora": 2.0}
    assert not list(gate.parameters())


def test_statistics_are_those_of_the_examples():
    statistics = GateMoments(2, torch.device("cpu"))
    values = torch.rand(4, 3, 1, 2)
    for part in values:
        statistics.add(part, None)
    flat = values.reshape(-1, 2)
    for (mean, std), column in zip(statistics.drain(), flat.T):
        assert mean == pytest.approx(column.mean().item()) and std == pytest.approx(
            column.std(correction=0).item(), abs=1e-6
        )
    assert statistics.drain() == []
