"""Settings of submodules that the library `adapters` needs, beyond those of the paper."""

import pytest
import torch
from peft import PeftModel

from scaleup.export.calibrate import GateObserver
from scaleup.training.callbacks import GateStatistics
from scaleup.unipelt.lora_attention import VALUE
from scaleup.unipelt.lora_linear import LINEAR_CHILD
from scaleup.unipelt.sites import find_sites
from tests.utils.tiny import EOS, adapt, backbone, batch, logits, same

PROJECTION = {"lora_gate_scope": "projection"}
OWN = f".{LINEAR_CHILD}.unipelt_gate.default."
SHARED = ".unipelt_attention.unipelt_gate.default."


def copy_weights(source: PeftModel, target: PeftModel) -> None:
    """Copy what both models have."""
    weights, places = source.state_dict(), target.state_dict()
    target.load_state_dict({n: t for n, t in weights.items() if n in places}, strict=False)


def value_gates(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The parameters of the value projections' own gates."""
    gates = {name: p for name, p in model.named_parameters() if OWN in name}
    assert len(gates) == 2 * len(find_sites(model.get_base_model())[0])
    return gates


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "bart", "t5", "llama"])
def test_equal_gates_of_query_and_value_equal_a_shared_gate(family):
    shared = adapt(backbone(family))
    own = adapt(backbone(family), **PROJECTION)
    copy_weights(shared, own)
    weights = shared.state_dict()
    with torch.no_grad():
        for site in find_sites(own.get_base_model())[0]:
            for part in ("weight", "bias"):
                rows = weights[f"base_model.model.{site.name}{SHARED}{part}"]  # prefix, lora
                value_gates(own)[f"base_model.model.{site.value}{OWN}{part}"].copy_(rows[1:])
    assert (logits(own) - logits(shared)).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "bart", "llama"])
def test_a_closed_gate_of_the_values_leaves_lora_at_the_queries(family):
    model = adapt(backbone(family), submodules=["lora"], gates="learned", **PROJECTION)
    with_values = logits(model)
    with torch.no_grad():
        for name, parameter in value_gates(model).items():
            parameter.fill_(-40.0 if name.endswith("bias") else 0.0)
    closed = logits(model)
    values = {site.value for site in find_sites(model.get_base_model())[0]}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name and any(f".{value}.lora_B" in name for value in values):
                parameter.zero_()
    assert same(logits(model), closed)
    assert (closed - with_values).abs().max() > 1e-3


def test_both_gates_train():
    model = adapt(backbone("bart"), **PROJECTION)
    labels = torch.tensor([0, 2, 1])
    model(**batch(), labels=labels).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in value_gates(model).values())


def test_adapters_of_one_model_may_share_gates_or_not(tmp_path):
    expected = []
    for name, options in (("shared", {}), ("own", PROJECTION)):
        model = adapt(backbone("bert"), **options)
        model.save_pretrained(str(tmp_path / name))
        expected.append(logits(model))
    both = PeftModel.from_pretrained(backbone("bert"), str(tmp_path / "shared"), "shared").eval()
    both.load_adapter(str(tmp_path / "own"), "own")
    for name, alone in zip(("shared", "own", "shared"), (*expected, expected[0])):
        both.set_adapter(name)
        assert same(logits(both), alone)


def test_gates_of_values_are_observed_and_logged_at_their_projection():
    model = adapt(backbone("bart"), **PROJECTION)
    observer, statistics = GateObserver(model), GateStatistics(model)
    logits(model)
    observed, logged = observer.gates(), statistics.drain()
    attentions = find_sites(model.get_base_model())[0]
    assert any(site.cross for site in attentions)
    for site in attentions:
        mean, std = observed[site.value, "lora"]
        assert logged[site.value]["lora"]["mean"] == pytest.approx(mean, abs=1e-5)
        assert (site.name, VALUE) not in observed and std > 0


@pytest.mark.parametrize("pooling", ["auto", "masked", "causal"])
def test_the_values_of_a_cross_attention_are_gated_by_all_tokens_of_the_encoder(pooling):
    gates = {"gate_pooling": pooling, "submodules": ["lora"], "gates": "learned"}
    model = adapt(backbone("bart"), **gates, **PROJECTION)
    (site, *_) = (site for site in find_sites(model.get_base_model())[0] if site.cross)
    projection = model.get_base_model().get_submodule(site.value)
    gate = getattr(projection, LINEAR_CHILD).unipelt_gate["default"]
    calls = []
    projection.register_forward_pre_hook(lambda module, args: calls.append(args[0]))
    gate.register_forward_hook(lambda module, args, gates: calls.append(gates["lora"]))
    inputs = batch()
    model(**inputs)
    states, found = calls
    mask = inputs["attention_mask"]
    per_token = torch.sigmoid(states @ gate.weight[0] + gate.bias[0])
    expected = (per_token * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(found.flatten(), expected)


def test_a_fused_projection_cannot_have_two_gates():
    with pytest.raises(ValueError, match="lora_gate_scope: query and value of .* use attention"):
        adapt(backbone("gpt2"), **PROJECTION)


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_a_post_norm_block_has_no_raw_input(family):
    raw = adapt(backbone(family), adapter_input="raw")
    assert torch.equal(logits(raw), logits(adapt(backbone(family))))


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_raw_input_is_what_normalisation_would_read(family, monkeypatch):
    """A block with normalised input, whose normalisation is undone, is one with raw input."""
    raw = adapt(backbone(family), submodules=["adapter"], gates="learned", adapter_input="raw")
    plain = adapt(backbone(family), submodules=["adapter"], gates="learned")
    expected = logits(raw)
    assert (logits(plain) - expected).abs().max() > 1e-3
    monkeypatch.setattr(torch.nn.functional, "layer_norm", lambda x, *args, **kwargs: x)
    assert same(logits(plain), expected)


def test_counted_positions_move_tokens_away_from_the_queries_of_t5():
    """The bias is the one of a sequence in which the prefix precedes the tokens."""
    model = adapt(backbone("t5", "eager"), submodules=["prefix"], prefix_positions="counted")
    base = model.get_base_model()
    bank, attention = base.encoder.unipelt_bank_self, base.encoder.block[0].layer[0].SelfAttention
    used = []

    def note(*args) -> None:
        used.extend(made for *_, made in bank.passes.current.shared[bank].masks.known)

    attention.register_forward_hook(note)
    logits(model)
    queries, length = batch()["input_ids"].shape[1], 3
    wide = attention.compute_bias(queries, length + queries)
    assert any(bias.shape == wide.shape and torch.equal(bias, wide) for bias in used)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_counted_positions_are_the_same_with_and_without_a_cache(attention):
    options = {**PROJECTION, "adapter_input": "raw", "prefix_positions": "counted"}
    model = adapt(backbone("t5", attention), **options)
    generated = [
        model.generate(
            **batch(),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=EOS + 90,
            use_cache=cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for cache in (True, False)
    ]
    cached, uncached = (torch.stack(result.logits) for result in generated)
    assert (cached - uncached).abs().max() < 1e-4


def test_generation_keeps_the_totals_of_both_gates_of_a_decoder():
    model = adapt(backbone("llama"), submodules=["lora"], gates="learned", **PROJECTION)
    ids = batch((7, 7, 7))["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        start = model(input_ids=ids[:, :4], use_cache=True)
        cache, steps = start.past_key_values, [start.logits]
        for position in range(4, ids.shape[1]):
            step = model(input_ids=ids[:, position : position + 1], past_key_values=cache)
            steps.append(step.logits)
    assert (torch.cat(steps, dim=1) - whole).abs().max() < 1e-4


def test_only_t5_counts_positions_of_a_prefix():
    with pytest.raises(ValueError, match="prefix_positions: only T5 can count them"):
        adapt(backbone("bert"), prefix_positions="counted")
