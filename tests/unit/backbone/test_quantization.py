"""Frozen weights in 4 and 8 bit: an evaluation changes neither them nor the gradients through them.

On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights at the first pass for inference.
Here every CPU counts as one of those: bitsandbytes' own check for the feature is answered by yes,
and the repacking itself is plain torch code that runs everywhere.
"""

import pathlib
import sys
from collections.abc import Callable

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, PreTrainedModel

from scaleup import UniPeltConfig
from scaleup.backbone import loading
from scaleup.backbone.method import apply_method
from scaleup.settings.schema import MethodSettings, ModelSettings
from scaleup.unipelt.quantized import keep_layout
from tests.utils import tiny

LAYERS = {"nf4": bnb.nn.Linear4bit, "8bit": bnb.nn.Linear8bitLt}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SMALL = {"adapter_size": 6, "prefix_length": 3, "prefix_hidden_size": 8}


@pytest.fixture(autouse=True)
def avx512bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every new layer believe that the CPU has the feature."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)


@pytest.fixture
def repacked(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Record the weights that bitsandbytes wants to repack, and leave them as they are."""
    found: list[torch.Tensor] = []

    def note(weight: torch.Tensor, state: object) -> tuple[torch.Tensor, object]:
        found.append(weight)
        return weight, state

    monkeypatch.setattr(bnb.nn.modules, "_convert_weight_packed_for_cpu", note)
    return found


def linear4bit() -> bnb.nn.Linear4bit:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(
        128, 64, compute_dtype=torch.float32, compress_statistics=False, quant_type="nf4"
    )
    return layer.requires_grad_(False).to("cpu")


def save(folder: pathlib.Path, hidden_size: int) -> pathlib.Path:
    """Save a tiny BERT without dropout and return its folder."""
    sizes = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size}
    tiny.backbone("bert", **STILL, **sizes).save_pretrained(folder / "base")
    return folder / "base"


def as_run(folder: pathlib.Path, kind: str) -> nn.Module:
    """Load the model as training, resuming, calibrating and plotting do."""
    settings = ModelSettings(name=str(folder), quantization=kind)
    model, fresh = loading.load_model(
        settings,
        loading.load_config(settings),
        AutoModelForSequenceClassification,
        torch.float32,
        torch.device("cpu"),
    )
    return apply_method(model, MethodSettings(**SMALL), fresh)


def by_user(folder: pathlib.Path, kind: str) -> PreTrainedModel:
    """Load a backbone with transformers alone."""
    kinds = {
        "nf4": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.float32,
        },
        "8bit": {"load_in_8bit": True},
    }
    config = BitsAndBytesConfig(**kinds[kind], llm_int8_skip_modules=["classifier"])
    return AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config
    )


def as_user(folder: pathlib.Path, kind: str) -> nn.Module:
    """Attach UniPELT through PEFT's Python API."""
    return get_peft_model(by_user(folder, kind), UniPeltConfig(task_type="SEQ_CLS", **SMALL))


def as_checkpoint(folder: pathlib.Path, kind: str) -> nn.Module:
    """Load an adapter checkpoint with PEFT to train it further."""
    as_user(folder, kind).save_pretrained(str(folder.parent / "adapter"))
    return PeftModel.from_pretrained(
        by_user(folder, kind), folder.parent / "adapter", is_trainable=True
    )


def frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copy the frozen weights and their scales."""
    found = {n: p.data.clone() for n, p in model.named_parameters() if not p.requires_grad}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            found[f"{name}.absmax"] = module.weight.quant_state.absmax.clone()
        elif isinstance(module, bnb.nn.Linear8bitLt):
            scale = module.state.SCB if module.weight.SCB is None else module.weight.SCB
            found[f"{name}.SCB"] = scale.clone()
    return found


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients of one pass in training mode, without dropout in the head."""
    model.train().zero_grad()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model(**tiny.batch(), labels=tiny.LABELS).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that differ in any bit or that only one side has."""
    both = one.keys() & other.keys()
    moved = {name for name in both if not torch.equal(one[name], other[name])}
    return sorted((one.keys() ^ other.keys()) | moved)


# What bitsandbytes does, on which `keep_layout` rests


def test_bitsandbytes_asks_the_flag_of_the_layer_before_it_repacks(repacked):
    layer, x = linear4bit().eval(), torch.ones(2, 128)
    assert vars(layer)["support_avx512bf16_for_cpu"] is True
    with torch.no_grad():
        layer(x)
    assert len(repacked) == 1, "bitsandbytes repacks no more: keep_layout can go"
    layer.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        layer(x)
    assert len(repacked) == 1, "bitsandbytes asks something else now: mend keep_layout"


def test_repacking_marks_the_weights_and_changes_them_for_good():
    layer = linear4bit()
    before = layer.weight.data.clone(), layer.weight.quant_state.absmax.clone()
    convert = bnb.nn.modules._convert_weight_packed_for_cpu
    layer.weight.data, state = convert(layer.weight.data, layer.weight.quant_state)
    assert state is layer.weight.quant_state and state.packing_format_for_cpu is True
    assert layer.weight.data.shape != before[0].shape and state.absmax.dtype == torch.bfloat16
    back, state = bnb.nn.modules._convert_weight_packed_for_cpu_inverse(layer.weight.data, state)
    assert torch.equal(back, before[0])
    assert not torch.equal(state.absmax.float().flatten(), before[1].flatten()), (
        "bitsandbytes restores the scales now: keep_layout need not refuse repacked weights"
    )


# What must hold for what is loaded


@pytest.mark.parametrize("hidden_size", [32, 64], ids=["repacking fails", "repacking works"])
@pytest.mark.parametrize("kind", ["nf4", "8bit"])
@pytest.mark.parametrize("load", [as_run, as_user, as_checkpoint])
def test_an_evaluation_changes_no_frozen_weight_and_no_gradient(
    load: Callable[[pathlib.Path, str], nn.Module],
    kind: str,
    hidden_size: int,
    tmp_path: pathlib.Path,
):
    model = load(save(tmp_path, hidden_size), kind)
    assert sum(isinstance(module, LAYERS[kind]) for module in model.modules()) >= 18
    weights, first = frozen(model), gradients(model)
    model.eval()
    with torch.no_grad():
        evaluated = model(**tiny.batch()).logits
    again = gradients(model)
    assert len(first) > 40 and differing(first, again) == []
    assert differing(weights, frozen(model)) == []
    trained = model(**tiny.batch()).logits
    assert trained.grad_fn is not None
    if kind == "nf4":  # bitsandbytes' 8 bit rounds activations too, but only for inference
        assert torch.equal(trained, evaluated)
    model.eval()  # a gradient is there in evaluation mode as well
    model(**tiny.batch(), labels=tiny.LABELS).loss.backward()


def test_every_layer_passes_a_gradient_after_an_evaluation(tmp_path):
    model = as_user(save(tmp_path, 64), "nf4").eval()
    with torch.no_grad():
        model(**tiny.batch())
    model.train()
    for layer in [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]:
        x = torch.ones(2, layer.in_features, requires_grad=True)
        layer(x).sum().backward()
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        torch.testing.assert_close(x.grad, weight.sum(0).expand(2, -1), rtol=1e-4, atol=1e-4)


def test_weights_that_are_repacked_already_are_refused(tmp_path):
    model = by_user(save(tmp_path, 64), "nf4")
    weight = model.bert.encoder.layer[1].output.dense.weight
    convert = bnb.nn.modules._convert_weight_packed_for_cpu
    weight.data, weight.quant_state = convert(weight.data, weight.quant_state)
    with pytest.raises(ValueError, match="encoder.layer.1.output.dense .* load the model again"):
        get_peft_model(model, UniPeltConfig(task_type="SEQ_CLS", **SMALL))


def test_a_model_that_is_not_quantised_is_left_alone(monkeypatch):
    model = nn.Sequential(nn.Linear(2, 2))
    keep_layout(model)
    monkeypatch.delitem(sys.modules, "bitsandbytes")  # as where the optional package is missing
    keep_layout(model)
    assert not hasattr(model[0], "support_avx512bf16_for_cpu")
