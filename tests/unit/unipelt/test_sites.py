"""Finding sites by structure, and refusing models in which it is not found."""

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    UMT5ForConditionalGeneration,
)

from scaleup.unipelt import sites
from scaleup.unipelt.sites import TESTED, find_sites
from tests.utils.tiny import ENCODER, FAMILIES, HYBRID, SPECIAL, VOCABULARY, adapt, backbone


def test_every_family_said_to_be_tested_is_and_no_other():
    assert set(TESTED) == set(FAMILIES) | {"camembert"}  # RoBERTa's code


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_the_same_before_and_after_adapting(family):
    model = backbone(family)
    before = find_sites(model)
    adapt(model)
    assert find_sites(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_its_attentions_and_its_block(family):
    model = backbone(family)
    attentions, blocks = find_sites(model)
    if family == "albert":  # one layer, run three times
        expected = (1, 0, 1)
    else:
        expected = (HYBRID.get(family, 3), 0, 3)
        expected = (4, 2, 4) if model.config.is_encoder_decoder else expected
    assert (
        sum(not site.cross for site in attentions),
        sum(site.cross for site in attentions),
        len(blocks),
    ) == expected
    assert all(site.head_size == 8 and site.hidden_size == 32 for site in attentions)


def test_a_decoder_is_causal_whatever_its_attention_says_of_itself():
    attentions, blocks = find_sites(backbone("umt5"))
    assert [site.causal for site in attentions if not site.cross] == [False, False, True, True]
    assert [block.causal for block in blocks] == [False, False, True, True]


def test_sdpa_that_shows_a_decoder_its_future_is_refused():
    with pytest.raises(
        ValueError,
        match="lets the decoder of umt5 see later tokens; load it with attn_implementation='eager'",
    ):
        adapt(backbone("umt5", "sdpa"))
    config = FAMILIES["umt5"][1](**FAMILIES["umt5"][2])
    config._attn_implementation = "sdpa"
    model = UMT5ForConditionalGeneration(
        config
    ).eval()  # that it does is a bug that may be mended: then this refusal goes
    ids = torch.randint(4, 90, (1, 6))
    with torch.no_grad():
        logits = [
            model(input_ids=ids, decoder_input_ids=torch.tensor([[5, 6, last]])).logits[0, 0]
            for last in (7, 8)
        ]
    assert not torch.equal(*logits)


@pytest.mark.parametrize(
    "kind, auto, values, words",
    [
        (
            "deberta",
            AutoModelForSequenceClassification,
            ENCODER,
            "looked for one query, one key and one value projection in DisentangledSelfAttention",
        ),
        (
            "mamba",
            AutoModelForCausalLM,
            SPECIAL | dict(hidden_size=32, num_hidden_layers=2),
            "does not support the model type mamba",
        ),
        (
            "bloom",
            AutoModelForCausalLM,
            SPECIAL | dict(hidden_size=32, n_layer=2, n_head=4),
            "does not support the model type bloom",
        ),
        (
            "jamba",
            AutoModelForCausalLM,
            ENCODER
            | dict(
                num_key_value_heads=2,
                attn_layer_period=2,
                attn_layer_offset=1,
                use_mamba_kernels=False,
            ),
            "does not support the model type jamba",
        ),
    ],
)
def test_models_without_the_structure_are_refused_with_what_was_looked_for(
    kind, auto, values, words
):
    with torch.device("meta"):
        model = auto.from_config(CONFIG_MAPPING[kind](**values), attn_implementation="eager")
    with pytest.raises(ValueError, match=words):
        find_sites(model)


@pytest.mark.parametrize("kind", ["granite", "olmo2", "cohere", "stablelm"])
def test_families_without_a_test_of_their_own_are_found_by_structure(kind):
    values = ENCODER | dict(num_key_value_heads=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING[kind](**values), attn_implementation="sdpa"
        )
    attentions, blocks = find_sites(model)
    assert len(attentions) == len(blocks) == 3 and all(site.causal for site in attentions)


def gptj():
    """A decoder that computes attention itself, in a way that no prefix reaches."""
    values = SPECIAL | dict(n_embd=32, n_layer=2, n_head=4, n_positions=48, rotary_dim=4)
    torch.manual_seed(0)
    config = CONFIG_MAPPING["gptj"](**values, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def test_an_attention_that_a_prefix_cannot_reach_is_refused_only_with_a_prefix():
    with pytest.raises(
        ValueError,
        match=r"no prefix can be put into transformer\.h\.0\.attn, because .* leave prefix out",
    ):
        adapt(gptj(), submodules=["prefix", "lora"])
    model = adapt(gptj(), submodules=["adapter", "lora"])
    ids = torch.tensor([[5, 6, 7, 8]])
    changed = torch.tensor([[5, 6, 7, 9]])
    with torch.no_grad():
        one, other = model(input_ids=ids).logits, model(input_ids=changed).logits
        bare = gptj()(input_ids=ids).logits
    assert torch.allclose(one[:, :3], other[:, :3], atol=1e-6)  # gates see no later token
    assert not torch.allclose(one, bare, atol=1e-2)


@pytest.mark.parametrize(
    "kind, values, what",
    [
        ("vit", {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}, "image"),
        ("whisper", {"d_model": 32, "vocab_size": VOCABULARY} | SPECIAL, "audio"),
        ("clip", {}, "image"),
    ],
)
def test_a_model_that_reads_something_else_than_text_is_refused_in_one_sentence(kind, values, what):
    sizes = {"num_hidden_layers": 1, "encoder_layers": 1, "decoder_layers": 1}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    with torch.device("meta"):
        model = AutoModel.from_config(CONFIG_MAPPING[kind](**values | sizes))
    words = f"{kind}: it takes {what} input, and UniPELT is a method for text models"
    with pytest.raises(ValueError, match=words):
        find_sites(model)


@pytest.mark.parametrize("family", HYBRID)
def test_layers_without_a_softmax_are_left_alone_and_their_blocks_get_adapters(family):
    model = adapt(backbone(family))
    attentions, blocks = find_sites(backbone(family))
    for name, module in model.get_base_model().named_modules():
        if name.endswith((".linear_attn", ".conv", ".mamba")):
            assert not [part for part, _ in module.named_modules() if "unipelt" in part], name
            assert not [part for part, _ in module.named_modules() if "lora" in part], name
    assert all(site.name.endswith(".self_attn") for site in attentions)
    assert all(
        hasattr(model.get_submodule(f"base_model.model.{block.name}"), "unipelt_block")
        for block in blocks
    )


def test_a_layer_without_attention_is_refused_unless_its_config_says_so(monkeypatch):
    assert len(find_sites(backbone("lfm2"))[1]) == 3
    monkeypatch.setattr(sites, "RECURRENT", ("linear_attention",))
    with pytest.raises(ValueError, match=r"layers\.0 \(Lfm2DecoderLayer, conv\) has no attention"):
        find_sites(backbone("lfm2"))
