"""What holds for every supported family, subset of submodules and attention implementation."""

import copy

import pytest
import torch
from peft import PeftModel

from scaleup.gate import LearnedGate
from tests.tiny import FAMILIES, LABELS, SUBSETS, adapt, backbone, batch

ids = "+".join
families = pytest.mark.parametrize("family", FAMILIES)
subsets = pytest.mark.parametrize("submodules", SUBSETS, ids=ids)
attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@families
@subsets
@attentions
def test_only_declared_parameters_train_and_all_of_them_get_gradient(family, submodules, attention):
    model = adapt(backbone(family, attention), submodules=submodules)
    model(**batch(), labels=LABELS).loss.backward()
    marks = {"adapter": ".unipelt_adapter.", "prefix": ".unipelt_prefix.", "lora": ".lora_"}
    for name, parameter in model.named_parameters():
        part = next((part for part, mark in marks.items() if mark in name), None)
        gate, head = ".unipelt_gate." in name, ".modules_to_save." in name
        assert parameter.requires_grad == (part is not None or gate or head), name
        assert part is None or part in submodules, name
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name
    assert any(".unipelt_gate." in name for name, _ in model.named_parameters()) == (len(submodules) > 1)


@families
@attentions
def test_padding_and_batch_neighbours_do_not_move_logits(family, attention):
    model = adapt(backbone(family, attention), gate_pooling="masked")
    together = logits(model, batch())
    wider = logits(model, batch(width=20))
    alone = torch.cat([logits(model, {k: v[i : i + 1, : (11, 7, 9)[i]] for k, v in batch().items()}) for i in range(3)])
    assert difference(together, wider) < 1e-5
    assert difference(together, alone) < 1e-5


@families
def test_the_papers_pooling_does_depend_on_padding(family):
    model = adapt(backbone(family), gate_pooling="paper")
    assert difference(logits(model, batch()), logits(model, batch(width=20))) > 1e-4


@families
@attentions
def test_gates_at_zero_without_prefix_leave_the_backbone_untouched(family, attention):
    bare = backbone(family, attention)
    model = adapt(copy.deepcopy(bare), submodules=["adapter", "lora"])
    head = next(name for name, _ in bare.named_children() if name in ("classifier", "classification_head"))
    with torch.no_grad():
        getattr(model.get_base_model(), head).modules_to_save["default"].load_state_dict(getattr(bare, head).state_dict())
        assert difference(logits(bare, batch()), logits(model, batch())) > 1e-2
        for module in model.modules():
            if isinstance(module, LearnedGate):
                module.weight.zero_()
                module.bias.fill_(-1e4)
    assert difference(logits(bare, batch()), logits(model, batch())) < 1e-6


@families
@attentions
def test_disabled_adapters_give_the_bare_backbone(family, attention):
    bare = backbone(family, attention)
    model = adapt(copy.deepcopy(bare))
    assert difference(logits(bare, batch()), logits(model, batch())) > 1e-2
    with model.disable_adapter():
        assert difference(logits(bare, batch()), logits(model, batch())) == 0


@families
def test_sdpa_and_eager_agree(family):
    assert difference(logits(adapt(backbone(family, "sdpa")), batch()), logits(adapt(backbone(family, "eager")), batch())) < 1e-5


@families
@subsets
def test_save_and_load_give_the_same_logits(family, submodules, tmp_path):
    model = adapt(backbone(family), submodules=submodules)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(backbone(family), tmp_path).eval()
    assert difference(logits(model, batch()), logits(loaded, batch())) == 0
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@families
def test_an_adapter_loads_under_another_name(family, tmp_path):
    model = adapt(backbone(family))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(backbone(family), tmp_path, adapter_name="other").eval()
    assert difference(logits(model, batch()), logits(loaded, batch())) == 0


@families
@attentions
def test_gradient_checkpointing_changes_nothing(family, attention):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = adapt(backbone(family, attention, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                               dropout=0.0, activation_dropout=0.0, attention_dropout=0.0, classifier_dropout=0.0)).train()  # fmt: skip
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch(), labels=LABELS).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys()
    for name in plain:
        assert torch.allclose(plain[name], recomputed[name], rtol=1e-5, atol=1e-7), name


@families
def test_bf16_autocast_is_close_and_trains(family):
    model = adapt(backbone(family))
    exact = logits(model, batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**batch(), labels=LABELS)
    assert difference(exact, out.logits.float()) < 0.15 * exact.abs().max()
    out.loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@families
def test_a_bf16_backbone_keeps_float32_adapters(family):
    model = adapt(backbone(family).to(torch.bfloat16))
    assert {p.dtype for name, p in model.named_parameters() if "unipelt_" in name or "lora_" in name} == {torch.float32}
    out = model(**batch(), labels=LABELS)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@families
def test_copies_and_pickles_of_a_used_model_work(family, tmp_path):
    model = adapt(backbone(family))
    before = model(**batch()).logits.detach()  # with a graph, so that the running prefix is not a leaf
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert difference(before, logits(twin, batch())) == 0
    torch.save(twin, tmp_path / "model.pt")
    assert difference(before, logits(torch.load(tmp_path / "model.pt", weights_only=False), batch())) == 0


@families
def test_unload_gives_back_the_bare_backbone(family):
    bare = backbone(family)
    unloaded = adapt(copy.deepcopy(bare)).unload()
    assert [name for name, _ in unloaded.named_modules() if "unipelt" in name or "lora" in name] == []
    assert unloaded.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert difference(bare.base_model(**batch())[0], unloaded.base_model(**batch())[0]) == 0


@families
def test_a_second_adapter_is_independent_and_switchable(family):
    model = adapt(backbone(family))
    first = logits(model, batch())
    config = copy.deepcopy(model.peft_config["default"])
    config.submodules, config.modules_to_save = ["prefix", "lora"], None
    model.add_adapter("second", config)
    assert difference(first, logits(model, batch())) == 0
    model.set_adapter("second")
    second = logits(model, batch())
    assert difference(first, second) > 1e-3
    model.set_adapter("default")
    assert difference(first, logits(model, batch())) == 0
    with pytest.raises(ValueError, match="one adapter at a time"):
        model.base_model.set_adapter(["default", "second"])
    model.delete_adapter("second")
    assert difference(first, logits(model, batch())) == 0


@families
def test_loading_with_low_memory_gives_the_same_logits(family, tmp_path):
    model = adapt(backbone(family))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(backbone(family), tmp_path, low_cpu_mem_usage=True).eval()
    assert difference(logits(model, batch()), logits(loaded, batch())) == 0
