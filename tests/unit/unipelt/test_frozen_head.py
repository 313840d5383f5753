"""A frozen head in PEFT: nothing that PEFT does on its way turns its gradients on."""

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from scaleup.backbone.method import apply_method
from scaleup.settings.schema import MethodSettings
from scaleup.unipelt.config import UniPeltConfig
from tests.utils.tiny import LABELS, adapt, backbone, batch, logits


def frozen_head(subset: tuple[str, ...] = ("lora",), randomise: bool = True) -> PeftModel:
    return adapt(backbone("bert"), randomise, submodules=list(subset), head="frozen")


def trained_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def has_trained_head(model: nn.Module) -> bool:
    return any("classifier" in name for name in trained_names(model))


def test_a_head_trains_unless_it_is_frozen():
    trained, frozen = adapt(backbone("bert"), submodules=["lora"]), frozen_head()
    assert has_trained_head(trained) and not has_trained_head(frozen)
    assert [n for n in trained_names(trained) if "classifier" not in n] == trained_names(frozen)
    assert dict(trained.named_parameters()).keys() == dict(frozen.named_parameters()).keys()


def test_the_backbone_below_a_frozen_head_gets_gradients():
    model = frozen_head(("adapter", "prefix", "lora"))
    model(**batch(), labels=LABELS).loss.backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert names and names <= set(trained_names(model))
    assert any("lora_A" in name for name in names)


def test_switching_an_adapter_leaves_its_head_frozen():
    model = frozen_head()
    with model.disable_adapter():
        assert not has_trained_head(model)
    assert not has_trained_head(model)
    model.set_adapter("default")
    assert not has_trained_head(model)
    model.set_requires_grad("default")
    assert not has_trained_head(model)


def test_each_adapter_has_a_head_of_its_own_kind():
    model = frozen_head()
    sizes = {"r": 4, "task_type": "SEQ_CLS", "submodules": ["lora"]}
    model.add_adapter("second", UniPeltConfig(**sizes))
    model.set_adapter("second")
    assert "base_model.model.classifier.modules_to_save.second.weight" in trained_names(model)
    assert not any("default" in name for name in trained_names(model))
    model.set_adapter("default")
    assert not has_trained_head(model)


def test_a_frozen_head_is_saved_and_stays_frozen_when_training_goes_on(tmp_path):
    model = frozen_head(randomise=False)
    with torch.no_grad():  # a new process would initialise another head
        model.base_model.model.classifier.modules_to_save["default"].weight.normal_()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(backbone("bert"), str(tmp_path), is_trainable=True)
    assert trained_names(loaded) == trained_names(model)
    assert logits(loaded.eval()).equal(expected)
    assert not logits(backbone("bert")).equal(expected)
    head = loaded.base_model.model.classifier.modules_to_save["default"].weight
    assert loaded.unload().classifier.weight.equal(head)


def test_a_pooler_without_pretrained_weights_is_frozen_with_the_head():
    for name in ("unipelt", "full", "bitfit"):
        method = MethodSettings(name=name, head="frozen", submodules=["lora"])
        names = trained_names(apply_method(backbone("bert"), method, ["bert.pooler"]))
        assert names and not any("pooler" in n or "classifier" in n for n in names)
        kept = trained_names(apply_method(backbone("bert"), method))
        assert any("pooler" in n for n in kept) == (name != "unipelt")


def test_a_model_without_a_head_ignores_the_setting():
    model = get_peft_model(backbone("t5"), UniPeltConfig(task_type="SEQ_2_SEQ_LM", head="frozen"))
    assert trained_names(model)
