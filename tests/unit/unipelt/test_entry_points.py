"""The entry points of transformers and PEFT that work without a `PeftModel`."""

import copy
import inspect
import json
import pathlib
import shutil
import subprocess
import sys

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertModel, pipeline
from transformers.core_model_loading import WeightRenaming

from scaleup.unipelt.config import UniPeltConfig
from scaleup.unipelt.entry_points import CONTAINER
from tests.utils.tiny import adapt, auto_class, backbone, batch, inputs, logits, same

SMALL = {"adapter_size": 6, "prefix_length": 3, "prefix_hidden_size": 8}
ROOT = pathlib.Path(__file__).resolve().parents[3]


@pytest.fixture
def folders(request, tmp_path):
    """Return the family, the folder of its backbone and the folder of a trained adapter."""
    family = request.param
    backbone(family).save_pretrained(tmp_path / "base")
    model = adapt(auto_class(family).from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    return family, tmp_path / "base", tmp_path / "adapter", logits(model)


families = pytest.mark.parametrize("folders", ["bert", "bart", "gpt2", "t5"], indirect=True)
bert = pytest.mark.parametrize("folders", ["bert"], indirect=True)


@families
def test_an_auto_class_loads_an_adapter_folder(folders):
    family, _, adapter, expected = folders
    loaded = auto_class(family).from_pretrained(adapter).eval()
    assert type(loaded) is type(backbone(family)) and same(logits(loaded), expected)


@families
def test_adapters_are_loaded_switched_disabled_and_deleted(folders):
    family, base, adapter, expected = folders
    model = auto_class(family).from_pretrained(base).eval()
    bare = logits(model)
    info = model.load_adapter(adapter, adapter_name="first")
    assert not info.missing_keys and not info.unexpected_keys and not info.mismatched_keys
    assert same(logits(model), expected)
    model.add_adapter(UniPeltConfig(submodules=["prefix"], **SMALL), adapter_name="second")
    assert not same(logits(model.eval()), expected)
    model.disable_adapters()
    assert same(logits(model), bare)
    model.enable_adapters()
    model.delete_adapter("second")
    assert same(logits(model), expected)
    model.delete_adapter("first")
    assert same(logits(model), bare)
    left = [name for name, _ in model.named_parameters() if "first" in name or "second" in name]
    assert not left


@bert
def test_a_head_for_another_number_of_classes_is_one_sentence(folders):
    _, base, adapter, expected = folders
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=expected.shape[-1] + 1, ignore_mismatched_sizes=True
    )
    with pytest.raises(ValueError, match="load the model with num_labels=…"):
        model.load_adapter(adapter)


@bert
def test_an_added_adapter_trains_saves_and_loads(folders, tmp_path):
    _, base, _, _ = folders
    model = AutoModelForSequenceClassification.from_pretrained(base)
    model.add_adapter(UniPeltConfig(**SMALL))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("unipelt_prefix" in name for name in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(3):
        model(**inputs(model, labels=True)).loss.backward()
        optimizer.step()
    assert all(p.grad is not None for p in trained.values())
    model.eval().save_pretrained(tmp_path / "trained")
    plain = AutoModelForSequenceClassification.from_pretrained(base)
    for loaded in (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "trained"),
        PeftModel.from_pretrained(plain, tmp_path / "trained"),
    ):
        assert same(logits(loaded.eval()), logits(model))


def test_a_pipeline_takes_an_adapter_folder(tmp_path):
    for name in ("bert", "best"):
        shutil.copytree(ROOT / "tests/fixtures/format_0_1" / name, tmp_path / name)
    config = json.loads((tmp_path / "best/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "bert")
    (tmp_path / "best/adapter_config.json").write_text(json.dumps(config))
    classes = {"num_labels": 2}  # the backbone's config.json says 3
    bare = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert", **classes)
    model = PeftModel.from_pretrained(bare, tmp_path / "best").eval()
    tokens = AutoTokenizer.from_pretrained(tmp_path / "best")("good film", return_tensors="pt")
    with torch.no_grad():
        expected = model(**tokens).logits.softmax(-1)[0]
        with model.disable_adapter():
            without = model(**tokens).logits.softmax(-1)[0]
    folder = str(tmp_path / "best")
    classify = pipeline("text-classification", model=folder, model_kwargs=classes)
    scores = {found["label"]: found["score"] for found in classify("good film", top_k=None)}
    found = torch.tensor([scores[f"LABEL_{i}"] for i in range(2)])
    assert same(found, expected) and not same(without, expected)


def test_injection_without_a_peft_model_gives_the_same_model():
    config = UniPeltConfig(task_type="SEQ_CLS", **SMALL)
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(backbone("bert"), config).eval()
    torch.manual_seed(1)
    injected = inject_adapter_in_model(config, backbone("bert")).eval()
    assert same(logits(injected), logits(wrapped))


def test_a_caller_of_forward_gets_what_a_caller_of_the_model_gets(tmp_path):
    model = backbone("bert", cls=BertModel)
    bare = model(**batch())[0]
    model.add_adapter(UniPeltConfig(**SMALL))
    randomise(model)
    expected = model(**batch())[0]
    assert not same(bare, expected)
    torch.save(model, tmp_path / "model.pt")
    for other in (
        model,
        copy.deepcopy(model),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        assert same(other.forward(**batch())[0], expected)
        assert same(other(**batch())[0], expected)
    assert "attention_mask" in inspect.signature(model.forward).parameters
    wrapped = peft.get_peft_model(backbone("bert", cls=BertModel), UniPeltConfig(**SMALL))
    assert "forward" not in vars(wrapped.unload())


def randomise(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3, generator=generator)


def test_several_active_adapters_are_refused():
    model = backbone("bert")
    for name in ("first", "second"):
        model.add_adapter(UniPeltConfig(**SMALL), adapter_name=name)
    with pytest.raises(ValueError, match="one adapter at a time; got first, second"):
        model.set_adapter(["first", "second"])


def test_other_methods_are_loaded_as_before(tmp_path):
    backbone("gpt2").save_pretrained(tmp_path / "base")
    model = auto_class("gpt2").from_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    model.add_adapter(config)
    model.eval().save_pretrained(tmp_path / "lora")
    loaded = auto_class("gpt2").from_pretrained(tmp_path / "lora").eval()
    assert same(logits(loaded), logits(model))
    loaded.delete_adapter("default")
    assert not [name for name, _ in loaded.named_parameters() if "lora_" in name]


def test_the_name_of_an_adapter_stands_behind_the_last_of_our_names():
    rename = WeightRenaming(CONTAINER, r"\1.mine").rename_source_key
    for before, after in {
        "bert.unipelt_bank_self.unipelt_prefix.transform.0.weight": "bert.unipelt_bank_self."
        "unipelt_prefix.mine.transform.0.weight",
        "layer.0.unipelt_attention.unipelt_gate.bias": "layer.0.unipelt_attention.unipelt_gate."
        "mine.bias",
        "layer.0.norm.weight": "layer.0.norm.weight",
    }.items():
        assert rename(before)[0] == after


STAND_IN = """
import sys
import torch
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(**torch.load(sys.argv[2])).logits, sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["command", "sitecustomize"])
@bert
def test_a_program_that_does_not_import_scaleup_loads_adapters_in_the_documented_way(
    folders, way, tmp_path
):
    _, _, adapter, expected = folders
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    torch.save(batch(), tmp_path / "batch.pt")
    start, path = ["stand_in.py"], f"{ROOT}:{tmp_path}"
    if way == "command":
        start = [
            "-c",
            "import scaleup, runpy; "
            "runpy.run_module('stand_in', run_name='__main__', alter_sys=True)",
        ]
    else:
        (tmp_path / "with_scaleup").mkdir()
        (tmp_path / "with_scaleup" / "sitecustomize.py").write_text("import scaleup")
        path = f"{tmp_path / 'with_scaleup'}:{ROOT}"
    files = [str(adapter), str(tmp_path / "batch.pt"), str(tmp_path / "logits.pt")]
    subprocess.run(
        [sys.executable, *start, *files],
        check=True,
        timeout=300,
        cwd=tmp_path,
        env={"PYTHONPATH": path, "PATH": "", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert same(torch.load(tmp_path / "logits.pt"), expected)
