"""What is said of model and data before weights are loaded."""

import json

import pytest
import torch
from transformers import BertConfig, ViTConfig, ViTModel

from scaleup import errors
from scaleup.settings import schema as config
from scaleup.training.preflight import CHECKS, hub_structure
from tests.utils.weights import sparse_weights
from tests.utils.workspace import add_writer, make_workspace, overrides, writing


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def problems(*arguments: str) -> list[str]:
    try:
        config.load(None, list(arguments), checks=CHECKS)
    except errors.ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    "model_type, setting, words",
    [
        ("bert", "prefix_positions=counted", "method.prefix_positions: only T5 can count them"),
        ("bert", "lora_gate_scope=projection", None),
        ("t5", "prefix_positions=counted", None),
        (
            "gpt2",
            "lora_gate_scope=projection",
            "method.lora_gate_scope: query and value of transformer.h.0.attn are one projection",
        ),
    ],
)
def test_a_setting_that_does_not_suit_the_model_is_refused_before_the_run(
    workspace, tmp_path, model_type, setting, words
):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "pad_token_id": 0}))
    sparse_weights(tmp_path)
    own = [
        f"model.name={tmp_path}" if o.startswith("model.name") else o
        for o in overrides(workspace, tmp_path / "out", f"method.{setting}")
    ]
    found = problems(*own)
    assert found == [] if words is None else [p.startswith(words) for p in found] == [True], found


def test_the_check_of_a_model_of_the_hub_does_not_change_where_its_weights_start():
    """A run makes it after the seed is set, and only if the model is no folder."""
    words = ["data.name=rte", "model.name=me/bert", "method.lora_gate_scope=projection"]
    before = torch.get_rng_state()
    assert hub_structure(config.load(None, words), BertConfig()) == []
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "content, words",
    [
        ({"model_type": "mpnet"}, "set model.attention=eager"),
        (
            {"model_type": "megatron-bert"},
            "no prefix can be put into bert.encoder.layer.0.attention.self, because this model "
            "type computes attention itself; leave prefix out of submodules",
        ),
        ({"model_type": "mamba"}, "no mamba model for data.task sequence_classification"),
        (
            {"model_type": "umt5"},
            "lets the decoder of umt5 see later tokens); set model.attention=eager",
        ),
    ],
)
def test_a_model_without_the_structure_is_refused(workspace, tmp_path, content, words):
    (tmp_path / "config.json").write_text(json.dumps(content))
    sparse_weights(tmp_path)
    own = [
        f"model.name={tmp_path}" if o.startswith("model.name") else o
        for o in overrides(workspace, tmp_path / "out")
    ]
    assert any(words in problem for problem in problems(*own)), problems(*own)
    if "no prefix" in words:
        assert any("set model.attention=eager" in problem for problem in problems(*own))
        without = [o for o in own if not o.startswith("method.prefix")]
        without += ["model.attention=eager", "method.submodules=[adapter,lora]"]
        assert problems(*without) == []
    if content["model_type"] != "mamba":
        full = [o for o in own if "method" not in o]
        assert problems(*full, "method=full") == []


@pytest.mark.parametrize(
    "model_type, words",
    [
        ("bert", "reads in both directions"),
        ("roberta", "reads in both directions"),
        ("mamba", "found none"),
        ("gpt2", None),
    ],
)
@pytest.mark.parametrize("method", [[], ["method=full"]], ids=["unipelt", "full"])
def test_completing_texts_needs_a_model_that_does_not_read_ahead(
    workspace, tmp_path, model_type, words, method
):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    sparse_weights(tmp_path)
    data = [
        "data.task=causal_lm",
        f"data.train_file={workspace / 'train.csv'}",
        "data.target_column=label",
        "data.k=40",
        "data.dev_size=20",
    ]
    found = problems(
        f"model.name={tmp_path}", *data, f"train.output_dir={tmp_path / 'out'}", *method
    )
    if words is None or (method and model_type == "mamba"):
        assert found == []
    else:
        assert len(found) == 1 and words in found[0], found


def test_a_head_without_a_bias_cannot_start_at_the_labels_mean(workspace, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    sparse_weights(tmp_path)
    own = [o for o in overrides(workspace, tmp_path / "out") if not o.startswith("model.name")]
    assert problems(*own, f"model.name={tmp_path}", "model.head_bias=prior") == [
        "model.head_bias: the head of GPT2ForSequenceClassification has no bias;"
        " leave the setting out"
    ]
    assert problems(*own, f"model.name={workspace / 'bert'}", "model.head_bias=prior") == []


@pytest.mark.parametrize("model_type, packs", [("gpt2", True), ("opt", False), ("biogpt", False)])
def test_packing_needs_a_model_that_keeps_texts_apart(workspace, tmp_path, model_type, packs):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    sparse_weights(tmp_path)
    data = [
        "data.task=causal_lm",
        f"data.train_file={workspace / 'train.csv'}",
        "data.target_column=label",
        "data.k=40",
        "data.dev_size=20",
    ]
    found = problems(
        f"model.name={tmp_path}",
        *data,
        f"train.output_dir={tmp_path / 'out'}",
        "method=full",
        "data.packing=true",
    )
    assert packs == (
        not any(
            problem.startswith(f"data.packing: {model_type} is not known to keep")
            for problem in found
        )
    ), found


@pytest.mark.parametrize(
    "more, words",
    [
        (
            ["data.task=causal_lm", "data.metric=bleu", "data.max_length=1000"],
            "prompts of up to 1000 tokens and data.max_target_length 128 written after them",
        ),
        (["data.task=causal_lm", "data.max_length=1000"], None),
        (["data.task=causal_lm", "data.metric=bleu", "data.max_length=800"], None),
    ],
)
def test_what_is_written_needs_positions_too(workspace, tmp_path, more, words):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    sparse_weights(tmp_path)
    data = [
        f"data.train_file={workspace / 'train.csv'}",
        "data.target_column=label",
        "data.k=40",
        "data.dev_size=20",
    ]
    found = problems(
        f"model.name={tmp_path}",
        *data,
        *more,
        f"train.output_dir={tmp_path / 'out'}",
        "method=full",
    )
    assert found == [] if words is None else any(words in problem for problem in found), found


def test_the_task_needs_a_model_for_it(workspace, tmp_path):
    own = overrides(workspace, tmp_path / "out")
    found = problems(
        *own, "data.task=seq2seq", "data.target_column=label", "data.k=40", "data.dev_size=20"
    )
    assert found == ["model.name: transformers has no bert model for data.task seq2seq"]


@pytest.mark.parametrize(
    "engine, name", [("train.deepspeed=zero3", "ZeRO-3"), ("train.fsdp=full", "FSDP")]
)
def test_written_text_is_not_scored_where_weights_are_sharded(workspace, engine, name):
    texts = ["data.task=seq2seq", "data.target_column=label"]
    arguments = overrides(workspace, workspace / "unused", *texts)

    def refusals(*more: str) -> list[str]:
        return [p for p in problems(*arguments, *more) if f"{name} would gather" in p]

    (problem,) = refusals(engine)
    assert "use data.metric=loss" in problem and "scaleup export --metric bleu" in problem
    assert not refusals(engine, "data.metric=loss")
    assert not refusals("train.deepspeed=zero2")


@pytest.mark.parametrize(("family", "task"), [("llama", "causal_lm"), ("t5", "seq2seq")])
def test_bitfit_is_refused_for_a_model_without_biases(tmp_path, family, task):
    add_writer(tmp_path, family)
    own = writing(tmp_path, tmp_path / "out", family, task, "method.name=bitfit")
    own = [word for word in own if not word.startswith("method.prefix")]
    (found,) = problems(*own)
    assert found.startswith("method.name: bitfit trains biases, and ") and "none here" in found


def test_gradient_checkpointing_that_a_model_does_not_have_is_refused(workspace, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mpnet"}))
    sparse_weights(tmp_path)
    own = [o for o in overrides(workspace, tmp_path / "out") if not o.startswith("model.name")]
    own += [f"model.name={tmp_path}", "model.attention=eager"]
    assert problems(*own) == []
    assert problems(*own, "train.gradient_checkpointing=true") == [
        "train.gradient_checkpointing: transformers has none for mpnet; leave it out"
    ]


def test_an_unknown_value_of_the_environment_is_reported_with_the_rest(
    workspace, tmp_path, monkeypatch
):
    monkeypatch.setenv("SCALEUP_KERNELS", "fast")
    found = problems(*overrides(workspace, tmp_path / "out"), "data.label_column=lable")
    assert any("no column 'lable'" in problem for problem in found)
    assert "SCALEUP_KERNELS must be one of auto, off, reference; got 'fast'" in found


def test_a_model_of_images_is_refused_as_none_for_texts(workspace, tmp_path):
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=16)).save_pretrained(tmp_path / "vit")
    found = problems(*overrides(workspace, tmp_path / "out"), f"model.name={tmp_path / 'vit'}")
    why = "it takes image input, and UniPELT is a method for text models"
    assert found == [
        f"model.name: transformers has no vit model for data.task sequence_classification: {why}"
    ]
