"""The PEFT method: counts, BART against a plain reference, quantised backbones, refusals."""

import copy
import json
import pathlib
import subprocess
import sys

import pytest
import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    MambaConfig,
    MambaModel,
)

from scaleup import parameter_counts
from scaleup.backbone.method import apply_method
from scaleup.settings.schema import MethodSettings
from scaleup.unipelt.config import UniPeltConfig
from scaleup.unipelt.lora import LoraMember
from scaleup.unipelt.sites import find_sites
from tests.utils.plain import PlainBart
from tests.utils.tiny import LABELS, adapt, backbone, batch, inputs, same


@pytest.fixture(scope="module")
def bert_base():
    return BertForSequenceClassification(BertConfig())


@pytest.mark.parametrize(
    "submodules, trained, stored",
    [
        (["adapter"], 894_528, 894_528),
        (["prefix"], 9_857_024, 184_320),
        (["lora"], 294_912, 294_912),
        (["adapter", "prefix"], 10_770_008, 1_097_304),
        (["adapter", "prefix", "lora"], 11_074_148, 1_401_444),
    ],
)
def test_counts_on_bert_base_are_the_papers(bert_base, submodules, trained, stored):
    counts = parameter_counts(
        get_peft_model(copy.deepcopy(bert_base), UniPeltConfig(submodules=submodules))
    )
    assert (counts["trained"], counts["stored"]) == (trained, stored)
    assert counts["backbone"] == 109_482_240 and counts["head"] == 768 * 2 + 2
    assert sum(counts["submodules"].values()) == stored


def test_percentages_are_those_of_table_4(bert_base):
    ap = parameter_counts(
        get_peft_model(copy.deepcopy(bert_base), UniPeltConfig(submodules=["adapter", "prefix"]))
    )
    apl = parameter_counts(get_peft_model(copy.deepcopy(bert_base), UniPeltConfig()))
    assert f"{ap['stored_percent']:.2f} {apl['stored_percent']:.2f}" == "0.99 1.26"


def test_bitfit_trains_the_papers_biases_and_the_head(bert_base):
    model = apply_method(copy.deepcopy(bert_base), MethodSettings(name="bitfit"))
    counts = parameter_counts(model)
    pooler = sum(
        p.numel() for name, p in model.named_parameters() if p.requires_grad and "pooler" in name
    )
    assert counts["trained"] - pooler == 102_144 and pooler == 768 and counts["head"] == 768 * 2 + 2
    assert all(
        p.requires_grad for name, p in model.named_parameters() if name.startswith("classifier")
    )


def test_full_fine_tuning_trains_everything(bert_base):
    counts = parameter_counts(apply_method(copy.deepcopy(bert_base), MethodSettings(name="full")))
    assert counts["trained"] == counts["backbone"] == counts["stored"] == 109_482_240


def test_without_reparameterization_trained_equals_stored(bert_base):
    counts = parameter_counts(
        get_peft_model(copy.deepcopy(bert_base), UniPeltConfig(prefix_reparameterization="none"))
    )
    assert counts["trained"] == counts["stored"] == 1_401_444


def test_defaults_are_the_papers():
    config = UniPeltConfig()
    values = (
        config.r,
        config.lora_alpha,
        config.adapter_size,
        config.prefix_length,
        config.prefix_hidden_size,
    )
    assert values == (8, 16, 48, 10, 512)
    assert (config.gates, config.gate_pooling, config.prefix_reparameterization) == (
        "learned",
        "auto",
        "mlp",
    )
    assert UniPeltConfig(submodules=["lora"]).gates == "none"
    assert UniPeltConfig(submodules="lora", gates="learned").gates == "learned"


def test_new_gates_start_near_one_half():
    model = adapt(backbone("bert"), randomise=False)
    gates = [m for m in model.modules() if type(m).__name__ == "LearnedGate"]
    values = torch.cat(
        [g.flatten() for m in gates for g in m(torch.randn(5, 7, 32), None).values()]
    )
    assert len(gates) == 6 and (values - 0.5).abs().max() < 0.15


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["bart", "mbart"])
def test_bart_equals_a_plain_reference(family, attention):
    adapted = adapt(backbone(family, attention))
    inputs = batch() | {"decoder_input_ids": batch((6, 6, 6), seed=5)["input_ids"]}
    with torch.no_grad():
        out = adapted.get_base_model().model(**inputs)
        states, hidden = PlainBart(adapted, heads=4, prefix_length=3, pre_norm=family == "mbart")(
            **inputs
        )
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(
        out.encoder_last_hidden_state[real].double(), states[real], rtol=0, atol=1e-5
    )
    torch.testing.assert_close(out.last_hidden_state.double(), hidden, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["bart", "mbart"])
def test_prefix_reaches_all_three_attentions_of_bart(family):
    model = adapt(backbone(family), submodules=["prefix"])
    banks = sorted(name for name, m in model.named_modules() if type(m).__name__ == "PrefixTuning")
    assert [name.removeprefix("base_model.model.model.") for name in banks] == [
        "decoder.unipelt_bank_cross",
        "decoder.unipelt_bank_self",
        "encoder.unipelt_bank_self",
    ]
    model(**batch(), labels=LABELS).loss.backward()
    for name, parameter in model.named_parameters():
        if (
            ".unipelt_prefix." in name and "transform.2" in name
        ):  # one row per layer, keys and values, and channel
            assert (
                parameter.grad.reshape(parameter.shape[0], -1).abs().sum(1) > 0
            ).float().mean() > 0.99, name


@pytest.mark.parametrize("family", ["bart", "mbart"])
def test_a_later_decoder_token_never_moves_an_earlier_state(family):
    model = adapt(backbone(family)).get_base_model().model
    inputs = batch() | {"decoder_input_ids": batch((8, 8, 8), seed=5)["input_ids"]}
    changed = inputs | {"decoder_input_ids": inputs["decoder_input_ids"].clone()}
    changed["decoder_input_ids"][:, -1] = 50
    with torch.no_grad():
        before, after = model(**inputs)[0], model(**changed)[0]
    assert (before[:, :-1] - after[:, :-1]).abs().max() < 1e-6
    assert (before[:, -1] - after[:, -1]).abs().max() > 1e-3


def test_mbart_is_pre_norm_and_bart_post_norm():
    assert {block.norm is None for block in find_sites(backbone("mbart"))[1]} == {True}
    assert [block.norm for block in find_sites(backbone("bart"))[1]] == [
        f"model.{stack}.layers.{i}.final_layer_norm"
        for stack in ("encoder", "decoder")
        for i in range(2)
    ]


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_8bit_backbone_trains_saves_and_loads(family, tmp_path):
    backbone(family).save_pretrained(tmp_path / "backbone")
    heads = ["classifier", "classification_head"]
    quantised = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=heads)

    def load():
        return type(backbone(family)).from_pretrained(
            tmp_path / "backbone", quantization_config=quantised
        )

    model = adapt(load())
    int8 = [m for m in model.modules() if type(m).__name__ == "Linear8bitLt"]
    assert int8 and all(m.weight.dtype == torch.int8 for m in int8)
    with torch.no_grad():
        exact, rough = adapt(backbone(family))(**batch()).logits, model(**batch()).logits
    assert 0 < (exact - rough).abs().max() < 0.1 * exact.abs().max()
    model(**batch(), labels=LABELS).loss.backward()
    assert all(
        p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad
    )
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert same(loaded(**batch()).logits, model.eval()(**batch()).logits)


def test_loads_in_a_new_process_after_importing_scaleup_and_not_before(tmp_path):
    model = adapt(backbone("bert"))
    with torch.no_grad():
        expected = model(**batch()).logits
    model.get_base_model()  # the backbone itself is saved from an untouched copy
    backbone("bert").save_pretrained(tmp_path / "backbone")
    model.peft_config["default"].base_model_name_or_path = "backbone"
    model.save_pretrained(tmp_path / "adapter")
    torch.save({"inputs": batch(), "logits": expected}, tmp_path / "expected.pt")
    script = (
        "{}\n"
        "import torch\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        "saved = torch.load('expected.pt')\n"
        "models = [Auto.from_pretrained('adapter').eval()]\n"  # the first import of PEFT
        "from peft import PeftModel\n"
        "backbone = Auto.from_pretrained('backbone')\n"
        "models.append(PeftModel.from_pretrained(backbone, 'adapter').eval())\n"
        "found = torch.stack([model(**saved['inputs']).logits for model in models])\n"
        "print((found - saved['logits']).abs().max().item())\n"
    )
    root = str(pathlib.Path(__file__).resolve().parents[3])

    def run(extra: str) -> subprocess.CompletedProcess:
        command = [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {root!r})\n" + script.format(extra),
        ]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    with_import = run("import scaleup")
    assert with_import.returncode == 0, with_import.stderr
    assert float(with_import.stdout) < 1e-6
    without = run("")
    assert without.returncode != 0 and "UNIPELT" in without.stderr


def test_config_survives_json(tmp_path):
    config = UniPeltConfig(
        submodules=["lora", "prefix"], gate_pooling="causal", r=3, prefix_length=4
    )
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "UNIPELT"
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert (
        PeftType("UNIPELT") is PeftType.UNIPELT
        and PeftType.UNIPELT.value == "UNIPELT"
        and PeftType.UNIPELT in list(PeftType)
    )


def test_the_head_trains_without_a_task_type():
    model = get_peft_model(backbone("bart"), UniPeltConfig())
    assert [
        p.requires_grad
        for name, p in model.named_parameters()
        if "classification_head.modules_to_save" in name
    ] == [True] * 4


@pytest.mark.parametrize(
    "values, words",
    [
        ({"submodules": ["adaptor"]}, "submodules must name"),
        ({"submodules": []}, "at least one"),
        ({"submodules": ["lora", "lora"]}, "at most once"),
        ({"gates": "maybe"}, "gates must be one of learned, none"),
        ({"gate_pooling": "max"}, "gate_pooling must be one of"),
        ({"prefix_reparameterization": "conv"}, "prefix_reparameterization must be one of"),
        ({"adapter_activation": "rely"}, "adapter_activation must be one of"),
        ({"adapter_size": 0}, "adapter_size must be a positive whole number"),
        ({"r": 2.5}, "r must be a positive whole number"),
        ({"use_dora": True}, "leave out use_dora"),
        ({"target_modules": ["key"]}, "leave out target_modules"),
        ({"bias": "all"}, "leave out bias"),
        ({"init_lora_weights": "pissa"}, "leave out init_lora_weights"),
    ],
)
def test_config_refuses(values, words):
    with pytest.raises(ValueError, match=words):
        UniPeltConfig(**values)


def test_merging_is_refused_in_plain_words():
    with pytest.raises(ValueError, match="cannot be merged exactly"):
        adapt(backbone("bert")).merge_and_unload()


def test_changing_the_attention_afterwards_is_an_error_not_a_lost_prefix():
    model = adapt(backbone("bert"))
    model.get_base_model().set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="attention ignored its prefix"):
        model(**batch())
    model.get_base_model().set_attn_implementation("unipelt_eager")
    model(**batch())


def test_reentrant_checkpointing_is_refused():
    model = adapt(backbone("bert")).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="reentrant gradient checkpointing loses"):
        model(**batch(), labels=LABELS).loss.backward()


def test_unknown_architectures_are_refused():
    with pytest.raises(
        ValueError, match="does not support the model type mamba: looked for attentions"
    ):
        get_peft_model(
            MambaModel(MambaConfig(num_hidden_layers=1, hidden_size=8, vocab_size=9)),
            UniPeltConfig(),
        )
    with pytest.raises(ValueError, match="needs a transformers model, got Linear"):
        get_peft_model(torch.nn.Linear(2, 2), UniPeltConfig())


@pytest.mark.parametrize(
    "values, words",
    [
        ({"gates": False}, "gates must be one of"),
        ({"gates": ""}, "gates must be one of"),
        ({"lora_alpha": 0}, "lora_alpha must be above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"lora_dropout": 1.5}, "lora_dropout must be at least 0"),
        ({"lora_dropout": -0.5}, "lora_dropout"),
        ({"submodules": 5}, "submodules must name"),
        ({"submodules": [["lora"]]}, "submodules must name"),
    ],
)
def test_values_outside_the_documented_ones_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        UniPeltConfig(**values)


def test_a_mask_that_is_not_two_dimensional_is_refused():
    with pytest.raises(ValueError, match="padding mask of shape"):
        adapt(backbone("bert"))(
            input_ids=batch()["input_ids"], attention_mask=torch.ones(3, 1, 11, 11)
        )


@pytest.mark.parametrize(
    "family",
    [
        "bert",
        "llama",
        pytest.param("bart", marks=pytest.mark.slow),
        pytest.param("t5", marks=pytest.mark.slow),
    ],
)
def test_torch_compile_has_no_graph_break(family):
    model = adapt(backbone(family))
    given = inputs(model)
    with torch.no_grad():
        expected = model.get_base_model().base_model(**given)[0]
        compiled = torch.compile(model.get_base_model().base_model, fullgraph=True, backend="eager")
        assert (compiled(**given)[0] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["bert", "bart", "llama", "gpt2", "deberta-v2"])
def test_lora_reads_what_one_product_made_with_the_gates(family, monkeypatch):
    """But in cross attention, whose values come from elsewhere; and not with dropout before A."""
    seen, plain = [], LoraMember.low_rank

    def low_rank(self, role, x, lora_a, dropout):
        calls = []
        handle = lora_a.register_forward_hook(lambda *_: calls.append(role))
        found = plain(self, role, x, lora_a, dropout)
        handle.remove()
        of_encoder = self.layer.site.cross and role == "value"
        seen.append(of_encoder == bool(calls))
        return found

    monkeypatch.setattr(LoraMember, "low_rank", low_rank)
    model = adapt(backbone(family), lora_dropout=0.5)
    model.eval()(**inputs(model))
    assert seen and all(seen)
    seen.clear()
    model.train()(**inputs(model))
    assert seen and not all(seen)


def test_a_field_that_is_set_after_the_config_was_made_is_refused():
    config = UniPeltConfig(task_type="CAUSAL_LM")
    config.trainable_token_indices = {"embed_tokens": [5]}  # as TRL does for new tokens
    with pytest.raises(ValueError, match="leave out trainable_token_indices"):
        get_peft_model(backbone("llama"), config)
