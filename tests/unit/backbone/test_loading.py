"""Loading a backbone; refusing those that would train on noise or fail in the middle of a run."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertTokenizerFast

from scaleup.backbone.loading import load_config, load_model, set_labels
from scaleup.backbone.method import apply_method
from scaleup.backbone.tokenizer import load_tokenizer
from scaleup.errors import ConfigError
from scaleup.settings.data import DataSettings
from scaleup.settings.schema import MethodSettings, ModelSettings
from scaleup.training.preflight import model_config
from scaleup.unipelt.attention import FLASH
from scaleup.unipelt.model import parameter_counts
from scaleup.unipelt.sites import head_names
from tests.utils.tiny import backbone, logits, same


def test_heads_are_found_without_their_names():
    assert head_names(backbone("bert")) == ["classifier"] and head_names(backbone("bart")) == [
        "classification_head"
    ]
    assert head_names(backbone("bert").base_model) == []


@pytest.fixture
def folder(tmp_path):
    backbone("bert").save_pretrained(tmp_path)
    return tmp_path


def load(folder, labels=("a", "b")):
    settings = ModelSettings(name=str(folder))
    config = load_config(settings)
    set_labels(config, "sequence_classification", list(labels))
    return load_model(
        settings, config, AutoModelForSequenceClassification, torch.float32, torch.device("cpu")
    )[0]


def test_a_head_of_another_size_is_replaced_and_named(folder):
    model = load(folder)
    assert model.classifier.out_features == 2 and model.config.id2label == {0: "a", 1: "b"}
    assert torch.equal(model.bert.pooler.dense.weight, backbone("bert").bert.pooler.dense.weight)


def test_a_pooler_without_pretrained_weights_trains_and_is_saved(folder, tmp_path):
    """Checkpoints of masked language models have no pooler.

    If it were frozen, every process that loads the backbone would have a different one.
    """
    state = {
        name: tensor
        for name, tensor in backbone("bert").state_dict().items()
        if ".pooler." not in name
    }
    backbone("bert").save_pretrained(folder, state_dict=state)
    settings = ModelSettings(name=str(folder))
    config = load_config(settings)
    set_labels(config, "sequence_classification", ["a", "b"])
    arguments = (
        settings,
        config,
        AutoModelForSequenceClassification,
        torch.float32,
        torch.device("cpu"),
    )
    model, fresh = load_model(*arguments)
    assert fresh == ["bert.pooler"]
    model = apply_method(model, MethodSettings(), fresh)
    names = {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".pooler." in name
    }
    assert len(names) == 2
    counts = parameter_counts(model)
    assert counts["head"] == 32 * 2 + 2 + 32 * 32 + 32 and counts["stored"] == sum(
        counts["submodules"].values()
    )
    model.save_pretrained(str(tmp_path / "bundle"))
    torch.manual_seed(7)
    again = PeftModel.from_pretrained(load_model(*arguments)[0], str(tmp_path / "bundle")).eval()
    assert same(logits(again), logits(model.eval()))


def test_a_tokenizer_that_is_missing_or_of_another_model_is_refused(folder):
    settings = ModelSettings(name=str(folder))
    with pytest.raises(ConfigError, match="has no tokenizer files|cannot be loaded"):
        load_tokenizer(settings, load_config(settings))
    for count, ok in ((90, True), (200, False)):  # the model has 97
        (folder / "vocab.txt").write_text(
            "\n".join(
                ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(count - 5))]
            )
        )
        BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
        if ok:
            assert len(load_tokenizer(settings, load_config(settings))) == count
        else:
            with pytest.raises(
                ConfigError, match="has 200 tokens, its model 97; they do not belong together"
            ):
                load_tokenizer(settings, load_config(settings))


def test_weights_that_do_not_fit_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["bert.encoder.layer.1.attention.self.query.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match="do not fit its config.json: 1 tensors .* first bert.encoder.layer.1"
    ):
        load(folder)


def test_a_damaged_weight_file_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load(folder)


def test_a_misspelt_folder_that_looks_like_a_hub_id_is_named_as_such(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config(ModelSettings(name="quickstrat/model"))
    assert str(caught.value).startswith(
        "model.name: there is no folder quickstrat/model here, and the hub could not be reached; "
    )


def problems(name, method="unipelt", attention="sdpa", **data):
    return model_config(
        {
            "model": ModelSettings(name=str(name), attention=attention),
            "method": MethodSettings(name=method),
            "data": DataSettings(name="rte", **data),
        }
    )


def test_a_folder_is_judged_before_weights_are_loaded(folder):
    assert problems(folder) == []
    assert "has 48 positions" in problems(folder, max_length=49)[0]
    (folder / "model.safetensors").unlink()
    assert "has no weights" in problems(folder)[0]
    (folder / "config.json").write_text("{nonsense")
    assert "not a usable model config" in problems(folder)[0]


def test_flash_attention_is_refused_for_models_without_it_and_on_a_cpu(
    folder, tmp_path, monkeypatch
):
    assert problems(folder, attention="flash") == []
    settings = ModelSettings(name=str(folder), attention="flash")

    def loaded():
        arguments = AutoModelForSequenceClassification, torch.float32, torch.device("cpu")
        return load_model(settings, load_config(settings), *arguments)[0]

    with pytest.raises(ConfigError, match="^model.attention: flash needs a GPU"):
        loaded()
    monkeypatch.setenv("SCALEUP_KERNELS", "reference")
    assert loaded().config._attn_implementation == FLASH
    backbone("t5").save_pretrained(tmp_path / "t5")
    refused = problems(tmp_path / "t5", attention="flash")
    assert len(refused) == 1 and refused[0].startswith("model.attention: flash: t5 does not")


@pytest.mark.parametrize(
    "family, quantization",
    [
        ("bert", "none"),
        ("roberta", "none"),
        ("bart", "none"),
        ("t5", "none"),
        ("distilbert", "none"),
        ("bert", "8bit"),
    ],
)
def test_the_bias_of_a_fresh_head_starts_at_the_prior(family, quantization, tmp_path):
    """The head in the files has another number of classes, or there is none."""
    backbone(family).save_pretrained(tmp_path)
    settings = ModelSettings(name=str(tmp_path), quantization=quantization)
    config = load_config(settings)
    set_labels(config, "sequence_classification", ["a", "b"])
    model, _ = load_model(
        settings,
        config,
        AutoModelForSequenceClassification,
        torch.float32,
        torch.device("cpu"),
        prior=[-1.0, -2.0],
    )
    found = [
        parameter
        for name, parameter in model.named_parameters()
        if name.endswith("bias") and parameter.shape == (2,)
    ]
    assert len(found) == 1 and found[0].tolist() == [-1.0, -2.0] and found[0].requires_grad


@pytest.mark.parametrize(
    "family, labels, why",
    [
        ("gpt2", ["a", "b"], "has no bias"),
        ("bert", ["a", "b", "c"], "comes with the model's weights"),
    ],
)
def test_a_head_without_a_fresh_bias_takes_no_prior(family, labels, why, tmp_path):
    backbone(family).save_pretrained(tmp_path)
    settings = ModelSettings(name=str(tmp_path))
    config = load_config(settings)
    set_labels(config, "sequence_classification" if labels else "regression", labels)
    with pytest.raises(
        ConfigError, match=f"model.head_bias: the head of .* {why}; leave the setting out"
    ):
        load_model(
            settings,
            config,
            AutoModelForSequenceClassification,
            torch.float32,
            torch.device("cpu"),
            prior=[-1.0] * len(labels),
        )
