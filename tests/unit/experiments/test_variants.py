"""The variants of a benchmark: batches, weights, and what each of them trains and computes."""

import pytest
import torch
from transformers import LlamaConfig

from scaleup.errors import ConfigError
from scaleup.experiments import batches, bench, variants
from scaleup.experiments.batches import random_batch
from scaleup.experiments.variants import BenchOptions
from scaleup.training.graphs import WARM_UPS, StepGraphs


@pytest.fixture(autouse=True)
def tiny_bert(tiny_geometry):
    """Every test here uses a tiny model in place of BERT-base."""


def addresses(variant: variants.Variant) -> list[int]:
    return [p.data_ptr() for p in variant.model.parameters()]


def test_half_padding_is_half():
    lengths = batches.half_padding_lengths(16, 128)
    assert len(lengths) == 16 and lengths[-1] == 128 and 0.45 < sum(lengths) / (16 * 128) < 0.55
    batch = random_batch(lengths, 128, 50)
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert (batch["input_ids"][range(16), [n - 1 for n in lengths]] == batches.EOS).all()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 1).all()


def test_every_training_variant_does_a_step_and_trains_what_it_should():
    created = variants.training_variants(BenchOptions("training"), random_batch([6] * 4, 6, 50))
    named = {"full fine-tuning", "lower-bound", "BitFit", "PEFT LoRA", *variants.UNIPELT}
    assert named == set(created)
    for variant in created.values():
        trained = [p for p in variant.model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        variant.step()
        changed = sum(not torch.equal(a, b) for a, b in zip(before, trained))
        assert changed > 0.7 * len(before)
    used = [address for variant in created.values() for address in addresses(variant)]
    assert len(used) == len(set(used)), "two variants share weights"


def test_recorded_steps_train_as_plain_steps_do(monkeypatch):
    def recorded(parameters, step):
        return StepGraphs(parameters, step, record=lambda f: f, warm_up=lambda f: f())

    monkeypatch.setattr(variants, "StepGraphs", recorded)
    weights = []
    for graphs in (False, True):
        options = BenchOptions("training", only=["APL"], graphs=graphs)
        variant = variants.training_variants(options, random_batch([6] * 4, 6, 50))["APL"]
        for _ in range(WARM_UPS + 3):
            variant.step()
        weights.append([p.detach().clone() for p in variant.model.parameters()])
    assert all(torch.equal(plain, other) for plain, other in zip(*weights))


def test_inference_variants_have_their_own_weights_and_merged_is_what_an_export_writes():
    options = BenchOptions("inference", only=["bare", "APL merged"])
    created = variants.inference_variants(options, random_batch([6] * 4, 6, 50))
    assert list(created) == ["bare", "APL merged"]
    bare, merged = created.values()
    assert not {*addresses(bare)} & {*addresses(merged)}
    assert bare.step().shape == merged.step().shape == (4, 2)
    assert (merged.step() - bare.step()).abs().max() > 1e-6


def test_length_groups_see_the_same_tokens_in_narrower_batches():
    lengths, masks = [3, 12] * 32, {}
    options = BenchOptions("ragged", batch=4, length=12)
    for name, variant in variants.ragged_variants(options, lengths).items():
        seen = masks[name] = []
        variant.model.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs["attention_mask"]),
            with_kwargs=True,
        )
        variant.step()
    assert {int(sum(mask.sum() for mask in seen)) for seen in masks.values()} == {sum(lengths)}
    size = {name: sum(mask.numel() for mask in seen) for name, seen in masks.items()}
    assert size["padded to 12"] == size["padded to the longest"] == 64 * 12
    assert size["padded to 12"] > 1.3 * size["length groups"]


def test_memory_counts_gradients_and_optimizer_of_what_is_trained():
    batch, options = random_batch([6] * 4, 6, 50), BenchOptions("memory")
    full, apl = (bench.measure_memory(n, options, batch) for n in ("full fine-tuning", "APL"))
    state, weights = 8 * full["trained"], 4 * full["trained"]
    assert full["rest"] >= weights + state and full["peak"] >= full["rest"] + weights
    assert apl["peak"] - apl["rest"] >= 4 * apl["trained"]


def test_a_language_model_trains_in_a_half_type_and_has_no_merged_variant(monkeypatch):
    shape = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        use_cache=False,
    )
    monkeypatch.setitem(variants.GEOMETRIES, "llama-8b", lambda: shape)
    batch, names = random_batch([6] * 2, 6, 50), ["lower-bound", "PEFT LoRA", "APL"]
    options = BenchOptions(
        "training", "llama-8b", dtype="bfloat16", only=[*names, "APL, prefix MLP"]
    )
    created = variants.training_variants(options, batch)
    assert created["lower-bound"].trained == 0
    for variant in created.values():
        variant.step()
        dtypes = {p.requires_grad: p.dtype for p in variant.model.parameters()}
        assert dtypes[False] == torch.bfloat16 and dtypes.get(True, torch.float32) == torch.float32
    options = BenchOptions("inference", "llama-8b", dtype="bfloat16")
    created = variants.inference_variants(options, batch)
    assert "APL merged" not in created
    assert {variant.step().dtype for variant in created.values()} == {torch.bfloat16}
    with pytest.raises(ConfigError, match="APL merged"):
        options = BenchOptions("inference", "llama-8b", only=["APL merged"])
        variants.inference_variants(options, batch)
