"""What holds for every supported family, subset of submodules and attention implementation."""

import copy

import pytest
import torch
from peft import PeftModel

from scaleup import parameter_counts
from scaleup.backbone import quantization
from scaleup.unipelt.gate import LearnedGate
from scaleup.unipelt.sites import head_names
from tests.utils.plain_any import Plain
from tests.utils.tiny import (
    CASES,
    FAMILIES,
    HYBRID,
    MIXED,
    NO_SDPA,
    SUBSETS,
    adapt,
    backbone,
    implementation,
    inputs,
    logits,
    same,
)

ids = "+".join
families = pytest.mark.parametrize("family", FAMILIES)
subsets = pytest.mark.parametrize("submodules", SUBSETS, ids=ids)
cases = pytest.mark.parametrize("family, attention", CASES, ids=["-".join(case) for case in CASES])


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@cases
@subsets
def test_only_declared_parameters_train_and_all_of_them_get_gradient(family, submodules, attention):
    model = adapt(backbone(family, attention), submodules=submodules)
    model(**inputs(model, labels=True)).loss.backward()
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
    assert any(".unipelt_gate." in name for name, _ in model.named_parameters()) == (
        len(submodules) > 1
    )


@cases
def test_padding_and_batch_neighbours_do_not_move_logits(family, attention):
    model = adapt(backbone(family, attention), gate_pooling="masked")
    together = logits(model)
    wider = logits(model, inputs(model, width=20))
    assert difference(together, wider) < 1e-5
    for i, length in enumerate((11, 7, 9)):
        own = {
            k: v[i : i + 1] if k == "decoder_input_ids" else v[i : i + 1, :length]
            for k, v in inputs(model).items()
        }
        alone = logits(model, own)
        assert difference(together[i : i + 1, : alone.shape[1]], alone) < 1e-5


@families
def test_pooling_as_in_the_paper_does_depend_on_padding(family):
    model = adapt(backbone(family), gate_pooling="paper")
    assert difference(logits(model), logits(model, inputs(model, width=20))) > 1e-4


@cases
def test_gates_at_zero_without_prefix_leave_the_backbone_untouched(family, attention):
    bare = backbone(family, attention)
    model = adapt(copy.deepcopy(bare), submodules=["adapter", "lora"])
    with torch.no_grad():
        for head in head_names(bare):
            getattr(model.get_base_model(), head).modules_to_save["default"].load_state_dict(
                getattr(bare, head).state_dict()
            )
        assert difference(logits(bare), logits(model)) > 1e-2
        for module in model.modules():
            if isinstance(module, LearnedGate):
                module.weight.zero_()
                module.bias.fill_(-1e4)
    assert difference(logits(bare), logits(model)) < 1e-6


@cases
def test_disabled_adapters_give_the_bare_backbone(family, attention):
    bare = backbone(family, attention)
    model = adapt(copy.deepcopy(bare))
    assert difference(logits(bare), logits(model)) > 1e-2
    with model.disable_adapter():
        assert difference(logits(bare), logits(model)) == 0


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NO_SDPA])
def test_sdpa_and_eager_agree(family, keys):
    assert (
        difference(
            logits(adapt(backbone(family, "sdpa"))), logits(adapt(backbone(family, "eager")))
        )
        < 1e-5
    )


@families
@pytest.mark.parametrize(
    "submodules", [["adapter", "lora"], ["prefix"], ["adapter", "prefix", "lora"]], ids=ids
)
def test_save_and_load_give_the_same_logits(family, submodules, tmp_path):
    model = adapt(backbone(family), submodules=submodules)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(backbone(family), tmp_path).eval()
    assert same(logits(model), logits(loaded))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@families
def test_an_adapter_loads_under_another_name(family, tmp_path):
    model = adapt(backbone(family))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(backbone(family), tmp_path, adapter_name="other").eval()
    assert same(logits(model), logits(loaded))


@pytest.mark.parametrize(
    "family, attention",
    [case for case in CASES if case[0] not in ("albert", "mpnet")],  # which have none
    ids=lambda value: value,
)
def test_gradient_checkpointing_changes_nothing(family, attention):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = backbone(family, attention)
        chances = [
            name
            for name, value in model.config.to_dict().items()
            if isinstance(value, float) and ("dropout" in name or "pdrop" in name)
        ]
        model = adapt(backbone(family, attention, **dict.fromkeys(chances, 0.0))).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs(model, labels=True)).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys()
    for name in plain:
        assert torch.allclose(plain[name], recomputed[name], rtol=1e-5, atol=1e-7), name


@families
def test_bf16_autocast_is_close_and_trains(family):
    model = adapt(backbone(family))
    exact = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = logits(model).float()
        loss = model(**inputs(model, labels=True)).loss
    assert difference(exact, rough) < 0.2 * exact.abs().max()
    loss.backward()
    assert all(
        p.grad is not None and torch.isfinite(p.grad).all()
        for p in model.parameters()
        if p.requires_grad
    )


@families
def test_a_bf16_backbone_keeps_float32_adapters(family):
    model = adapt(backbone(family).to(torch.bfloat16))
    assert {
        p.dtype for name, p in model.named_parameters() if "unipelt_" in name or "lora_" in name
    } == {torch.float32}
    out = model(**inputs(model, labels=True))
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@families
def test_copies_and_pickles_of_a_used_model_work(family, tmp_path):
    model = adapt(backbone(family))
    model(**inputs(model)).logits.sum()  # with a graph, so that the running prefix is not a leaf
    before = logits(model)
    model(**inputs(model))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert difference(before, logits(twin)) == 0
    torch.save(twin, tmp_path / "model.pt")
    assert same(before, logits(torch.load(tmp_path / "model.pt", weights_only=False)))


@families
def test_unload_gives_back_the_bare_backbone(family):
    bare = backbone(family)
    unloaded = adapt(copy.deepcopy(bare)).unload()
    assert [
        name for name, _ in unloaded.named_modules() if "unipelt" in name or "lora" in name
    ] == []
    assert unloaded.config._attn_implementation == implementation(family)
    given = inputs(bare)
    with torch.no_grad():
        assert difference(bare.base_model(**given)[0], unloaded.base_model(**given)[0]) == 0


@families
def test_a_second_adapter_is_independent_and_switchable(family):
    model = adapt(backbone(family))
    first = logits(model)
    config = copy.deepcopy(model.peft_config["default"])
    config.submodules, config.modules_to_save = ["prefix", "lora"], None
    model.add_adapter("second", config)
    assert difference(first, logits(model)) == 0
    model.set_adapter("second")
    second = logits(model)
    assert difference(first, second) > 1e-3
    model.set_adapter("default")
    assert difference(first, logits(model)) == 0
    with pytest.raises(ValueError, match="one adapter at a time"):
        model.base_model.set_adapter(["default", "second"])
    model.delete_adapter("second")
    assert difference(first, logits(model)) == 0


@families
def test_loading_with_low_memory_gives_the_same_logits(family, tmp_path):
    model = adapt(backbone(family))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(backbone(family), tmp_path, low_cpu_mem_usage=True).eval()
    assert same(logits(model), logits(loaded))


@cases
def test_logits_equal_the_plain_reference(family, attention):
    bare = backbone(family, attention)
    model = adapt(copy.deepcopy(bare))
    expected = Plain(bare, model, family)
    given = inputs(model)
    with torch.no_grad():
        found, wanted = model(**given).logits, expected(given)
    if found.dim() == 3 and "decoder_input_ids" not in given:
        found, wanted = (x * given["attention_mask"].unsqueeze(2) for x in (found, wanted))
    assert difference(found, wanted) < 1e-5 * max(1.0, wanted.abs().max().item())


@families
def test_trained_parameters_are_as_many_as_counted_by_hand(family):
    """Width 32, bottleneck 6, rank 4, prefix of 3, MLP of 8; grouped heads have 16 values."""
    layers = 1 if family == "albert" else 3
    stacks = (
        [(2, 2, 0), (2, 2, 2)]
        if family in ("bart", "mbart", "pegasus", "t5", "mt5", "umt5")
        else [(layers, HYBRID.get(family, layers), 0)]
    )  # blocks, self attentions, cross attentions
    grouped = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
    values = 16 if family in (*grouped, *MIXED, *HYBRID) else 32
    # Qwen's projection of the queries makes the gate of the attention's output, too.
    queries = 64 if family in ("qwen3_5_text", "qwen3_next") else 32
    adapter = gates = lora = prefix = 0
    for blocks, own, cross in stacks:
        adapter += blocks * (32 * 6 + 6 + 6 * 32 + 32)
        gates += blocks * 33 + (own + cross) * 2 * 33
        lora += (own + cross) * (4 * (32 + queries) + 4 * (32 + values))
        for count in (own, cross):
            prefix += (3 * values + (values * 8 + 8) + (8 + 1) * 2 * count * values) if count else 0
    counts = parameter_counts(adapt(backbone(family)))
    assert counts["trained"] == adapter + gates + lora + prefix
    assert counts["submodules"] == {
        "adapter": adapter,
        "gates": gates,
        "lora": lora,
        "prefix": sum(3 * 2 * count * values for stack in stacks for count in stack[1:]),
    }


@families
def test_an_8bit_backbone_trains_and_is_close(family, tmp_path):
    plain = backbone(family)
    plain.save_pretrained(tmp_path)
    output = plain.get_output_embeddings()
    whole = (
        *head_names(plain),
        *(name for name, module in plain.named_modules() if module is output),
    )
    loaded = type(plain).from_pretrained(
        tmp_path,
        attn_implementation=implementation(family),
        dtype=torch.float32,
        **quantization.loading_arguments("8bit", whole, torch.float32, torch.device("cpu")),
    )
    assert any(type(module).__name__ == "Linear8bitLt" for module in loaded.modules())
    model, exact = adapt(loaded), logits(adapt(plain))
    assert difference(exact, logits(model)) < 0.5 * exact.abs().max()
    model(**inputs(model, labels=True)).loss.backward()
    assert all(
        p.grad is not None and torch.isfinite(p.grad).all()
        for p in model.parameters()
        if p.requires_grad
    )
