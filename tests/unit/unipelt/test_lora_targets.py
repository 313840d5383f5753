"""LoRA on attentions and on all linear layers, with one gate per input."""

import copy
import itertools
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import (
    _check_lora_target_modules_mamba,
    _maybe_include_all_linear_layers,
)

from scaleup import UniPeltConfig, parameter_counts
from scaleup.backbone import quantization
from scaleup.export import calibrate
from scaleup.unipelt.fast_path import plain_parts
from scaleup.unipelt.gate import ConstantGate, LearnedGate
from scaleup.unipelt.model import site_of
from scaleup.unipelt.sites import find_sites, head_names
from tests.utils.exports import exported
from tests.utils.plain_any import LINEARS, Plain
from tests.utils.tiny import FAMILIES, adapt, backbone, inputs, logits, same, task_type

TARGETS = ("qv", "attention", "all-linear")
# Families that differ in what matters here; the tests of the others are slow ones.
FEW = ("bert", "bart", "t5", "gpt2", "llama")
targets = pytest.mark.parametrize("targets", TARGETS)


def few_of(families, *settings) -> list:
    """Return all cases; those of other families than FEW are slow, and so are those of `qv`."""
    return [
        pytest.param(*case, marks=[] if case[0] in FEW and case[1] != "qv" else pytest.mark.slow)
        for case in itertools.product(families, *settings)
    ]


wider = pytest.mark.parametrize("targets", TARGETS[1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_finds_what_peft_finds_inside_the_blocks(family):
    model = backbone(family)
    config = LoraConfig(target_modules="all-linear", task_type=task_type(model))
    found = _maybe_include_all_linear_layers(config, model).target_modules
    attentions, blocks = find_sites(model)
    inside = tuple(f"{block.name}." for block in blocks)
    expected = set()
    for name in (name for name in found if name.startswith(inside)):
        try:
            _check_lora_target_modules_mamba(config, model, name.rpartition(".")[2])
        except ValueError:  # PEFT refuses it, but an attention has a layer of that name, too
            if ".mamba." in name:
                continue
        expected.add(name)
    projections = [path for site in attentions for path in (site.query, site.key, site.value)]
    others = [path for block in blocks for site in block.linears for path in site.linears]
    assert len(set(others)) == len(others) and set(others).isdisjoint(projections)
    assert {*projections, *others} == expected
    outputs = [site for block in blocks for site in block.linears if site.attention_output]
    assert len(outputs) == len(attentions) and all(len(site.linears) == 1 for site in outputs)


def assert_equals_the_plain_reference(family: str, **options) -> None:
    """Compare logits and gradients with those of the reference."""
    bare = backbone(family)
    model = adapt(copy.deepcopy(bare), **options).double()
    plain = Plain(bare, model, family, trains=True)
    given = inputs(model)
    found, expected = model(**given).logits, plain(given)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)).double()
    if found.dim() == 3 and "decoder_input_ids" not in given:
        weights = weights * given["attention_mask"].unsqueeze(2)
    assert ((found - expected) * (weights != 0)).abs().max() < 1e-5 * max(1, expected.abs().max())
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    largest = max(w.grad.abs().max() for w in plain.w.values() if w.grad is not None)
    for name, parameter in model.get_base_model().named_parameters():
        if parameter.requires_grad and ".modules_to_save." not in name:
            wanted = plain.w[name].grad
            assert wanted is not None and wanted.abs().max() > 0, name
            tolerance = 1e-4 * wanted.abs().max() + 1e-6 * largest  # gates are float32
            assert (parameter.grad - wanted).abs().max() < tolerance, name


@pytest.mark.parametrize("family, targets", few_of(LINEARS, TARGETS))
def test_logits_and_gradients_equal_the_plain_reference(family, targets):
    assert_equals_the_plain_reference(family, lora_targets=targets)


PROJECTION = {"lora_gate_scope": "projection"}
UNFUSED = ("bert", "bart", "t5", "llama")


@pytest.mark.parametrize(
    "family, targets",
    [*itertools.product(UNFUSED, TARGETS), ("deberta-v2", "qv"), ("mpnet", "all-linear")],
)
def test_gates_of_projections_equal_the_plain_reference(family, targets):
    assert_equals_the_plain_reference(family, lora_targets=targets, **PROJECTION)


@pytest.mark.parametrize(
    "family, targets, problem",
    [
        ("gpt2", "qv", "query and value of .* are one projection; use attention"),
        ("deberta-v2", "attention", "positions pass through the key projection of .*; use"),
    ],
)
def test_projections_that_cannot_have_gates_are_refused_in_one_line(family, targets, problem):
    with pytest.raises(ValueError, match=f"^lora_gate_scope: {problem}"):
        adapt(backbone(family), lora_targets=targets, **PROJECTION)


@wider
@pytest.mark.parametrize("family", FEW)
def test_parameters_are_as_many_as_counted_by_hand(family, targets):
    """Width 32, rank 4; keys and values of Llama have 16 columns."""
    units = {"gpt2": 128}.get(family, 64)
    kv, gated = (16, 2) if family == "llama" else (32, 1)
    blocks, cross = (4, 2) if family in ("bart", "t5") else (3, 0)
    attentions = blocks + cross
    lora = attentions * 4 * (2 * (32 + 32) + 2 * (32 + kv))
    gates = attentions * 33
    if targets == "all-linear":
        lora += blocks * 4 * (gated + 1) * (32 + units)
        gates += blocks * (33 + units + 1)
    counts = parameter_counts(adapt(backbone(family), lora_targets=targets))
    without = parameter_counts(adapt(backbone(family)))
    assert counts["submodules"]["lora"] == lora
    assert counts["submodules"]["gates"] == without["submodules"]["gates"] + gates


@targets
@pytest.mark.parametrize("family", ("bert", "t5"))
def test_ungated_lora_is_that_of_peft(family, targets):
    options = {"r": 4, "lora_alpha": 24, "use_rslora": True}
    model = adapt(backbone(family), submodules=["lora"], lora_targets=targets, **options)
    kept = ("lora_", "modules_to_save")
    state = {n: p for n, p in model.state_dict().items() if any(mark in n for mark in kept)}
    paths = {n.split(".lora_")[0].removeprefix("base_model.model.") for n in state if "lora_" in n}
    bare = backbone(family)
    config = LoraConfig(target_modules=paths, task_type=task_type(bare), **options)
    other = get_peft_model(bare, config).eval()
    assert not other.load_state_dict(state, strict=False).unexpected_keys
    assert same(logits(model), logits(other))


def test_rank_stabilised_scaling_divides_by_the_root_of_the_rank():
    for rslora, factor in ((False, 24 / 4), (True, 24 / math.sqrt(4))):
        options = {"lora_alpha": 24, "use_rslora": rslora, "lora_targets": "attention"}
        constant = adapt(backbone("bert"), submodules=["lora"], **options)
        values = [m.values["lora"] for m in constant.modules() if isinstance(m, ConstantGate)]
        assert values == [factor] * 6
        learned = adapt(backbone("bert"), lora_gate="scale", **options)
        scales = {s for m in learned.modules() if isinstance(m, LearnedGate) for s in m.scales}
        assert scales == {1.0, factor}
    with pytest.raises(ValueError, match="use_rslora must be true or false"):
        UniPeltConfig(use_rslora="yes")


@pytest.mark.parametrize(
    "family, targets, scope",
    [
        ("mpnet", "attention", "attention"),
        ("opt", "all-linear", "attention"),
        ("bart", "all-linear", "projection"),
        pytest.param("llama", "all-linear", "projection", marks=pytest.mark.slow),
        *(
            pytest.param(family, "all-linear", "attention", marks=pytest.mark.slow)
            for family in ("bert", "deberta-v2", "mpnet", "gpt2", "llama", "glm4_moe")
        ),
    ],
)
def test_adapters_with_different_targets_keep_their_logits(family, targets, scope, tmp_path):
    """The second adapter wraps layers that carry modules and hooks of the first."""
    submodules = ["adapter", "prefix", "lora", "parallel_adapter"]
    first = adapt(backbone(family), submodules=submodules)
    options = {"lora_targets": targets, "lora_gate_scope": scope, "gate_bias": 1.0}
    second = adapt(backbone(family), submodules=submodules, **options)
    alone = logits(first), logits(second)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    for order in (("first", "second"), ("second", "first")):
        model = PeftModel.from_pretrained(
            backbone(family), tmp_path / order[0], adapter_name=order[0]
        ).eval()
        model.load_adapter(tmp_path / order[1], adapter_name=order[1])
        for name, expected in zip(("first", "second"), alone):
            model.set_adapter(name)
            assert same(logits(model), expected)
        model.save_pretrained(tmp_path / "again")
        for name, expected in zip(("first", "second"), alone):
            again = PeftModel.from_pretrained(backbone(family), tmp_path / "again" / name).eval()
            assert same(logits(again), expected)
        unloaded = model.unload()
        assert not [n for n, _ in unloaded.named_modules() if "unipelt" in n or "lora" in n]
        given, bare = inputs(unloaded), backbone(family)
        with torch.no_grad():
            hidden = [m.base_model(**given)[0] for m in (unloaded.eval(), bare)]
        assert same(*hidden)


@pytest.mark.parametrize("family", ("bert", "llama"))
def test_layers_of_one_input_share_one_gate_that_runs_once(family):
    model = adapt(backbone(family), lora_targets="all-linear")
    calls = []
    for name, module in model.named_modules():
        if isinstance(module, LearnedGate):
            module.register_forward_hook(lambda *_, name=name: calls.append(site_of(name)))
    logits(model)
    assert len(calls) == len(set(calls)) == 3 * 5  # attention, its output, up, down, adapter


def test_experts_and_layers_that_kernels_bypass_are_left_out():
    for family, left_out in (("mixtral", "mlp.experts"), ("falcon_h1", "mamba.out_proj")):
        model = adapt(backbone(family), lora_targets="all-linear")
        assert not [n for n, _ in model.named_parameters() if left_out in n and "lora_" in n]


def gradients(model) -> dict[str, torch.Tensor]:
    model(**inputs(model, labels=True)).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    largest = max(grad.abs().max() for grad in expected.values())
    for name, grad in expected.items():
        tolerance = 1e-4 * grad.abs().max() + 5e-6 * largest
        assert (found[name] - grad).abs().max() < tolerance, name


@pytest.mark.parametrize(
    "family, targets, scope",
    [
        *few_of((*FEW, "gpt_neox", "phi3"), TARGETS[1:], ["attention"]),
        *few_of(UNFUSED, ["qv", "all-linear"], ["projection"]),
    ],
)
def test_the_fast_path_covers_every_layer_with_the_same_gradients(
    family, targets, scope, monkeypatch
):
    def run(kernels: str) -> dict[str, torch.Tensor]:
        monkeypatch.setenv("SCALEUP_KERNELS", kernels)
        model = adapt(backbone(family), lora_targets=targets, lora_gate_scope=scope)
        assert plain_parts(model) == []
        return gradients(model)

    assert_close(run("reference"), run("off"))


@pytest.mark.parametrize("family, targets", few_of((*FEW, "opt", "glm4_moe"), ["all-linear"]))
def test_gradient_checkpointing_gives_the_same_gradients(family, targets):
    dropout = {"dropout_rate": 0.0} if family == "t5" else {}
    model = adapt(backbone(family, **dropout), lora_targets=targets)
    expected = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    chances = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    model.train().gradient_checkpointing_enable()
    for module in chances:
        module.p = 0.0
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    assert_close(gradients(model), expected)


@pytest.mark.parametrize(
    "family, kernels, scope",
    [
        ("llama", "auto", "attention"),
        ("llama", "reference", "attention"),
        ("llama", "reference", "projection"),
        ("gpt2", "reference", "attention"),
        ("t5", "auto", "attention"),
        ("t5", "auto", "projection"),
        ("t5", "reference", "projection"),
        *(
            pytest.param(family, kernels, "attention", marks=pytest.mark.slow)
            for family in ("mt5", "opt", "glm4_moe", "qwen3_next", "falcon_h1", "lfm2")
            for kernels in ("auto", "reference")
        ),
    ],
)
def test_generating_with_a_cache_gives_the_logits_of_the_whole_text(
    family, kernels, scope, monkeypatch
):
    monkeypatch.setenv("SCALEUP_KERNELS", kernels)
    model = adapt(backbone(family), lora_targets="all-linear", lora_gate_scope=scope)
    given = inputs(model)
    name = "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"
    ids, cache = given.pop(name)[:2], None
    rest = {key: value[:2] for key, value in given.items()} if name != "input_ids" else {}
    with torch.no_grad():
        expected, found = model(**{name: ids}, **rest).logits, []
        for part in (ids[:, :3], *ids[:, 3:].split(1, dim=1)):
            out = model(**{name: part}, **rest, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
    assert (torch.cat(found, dim=1) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    "family, targets, scope",
    [
        *few_of((*FEW, "deberta-v2", "mpnet", "phi3", "glm4_moe"), TARGETS[1:], ["attention"]),
        *few_of(UNFUSED, ["all-linear"], ["projection"]),
        *few_of(["deberta-v2"], ["qv"], ["projection"]),
    ],
)
def test_exports_with_learned_and_with_constant_gates_have_the_same_logits(
    family, targets, scope, tmp_path
):
    options = {"lora_targets": targets, "lora_gate_scope": scope}
    submodules = ["adapter", "prefix", "lora", "parallel_adapter"]
    model = adapt(backbone(family), submodules=submodules, **options)
    (tmp_path / "learned").mkdir()
    assert same(logits(exported(model, family, tmp_path / "learned", None)), logits(model))
    batch = inputs(model, labels=True)
    writes = batch["labels"].dim() > 1
    observer = calibrate.observe_gates(model, [batch], 3, torch.device("cpu"), writes=writes)
    gates = {key: mean for key, (mean, _) in observer.gates().items()}
    (tmp_path / "constant").mkdir()
    loaded = exported(model, family, tmp_path / "constant", gates)
    calibrate.freeze(model, gates, set())
    assert same(logits(loaded), logits(model))
    if family != "deberta-v2":  # where positions pass through the projections
        assert not [name for name, _ in loaded.named_modules() if "lora" in name]


@wider
@pytest.mark.parametrize("family", ("bert", "t5", "gpt2"))
def test_a_bf16_backbone_trains_with_float32_adapters(family, targets):
    model = adapt(backbone(family).to(torch.bfloat16), lora_targets=targets)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    assert all(torch.isfinite(grad).all() for grad in gradients(model).values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("8bit", "nf4"))
@pytest.mark.parametrize("family", ("bert", "gpt2", "llama", "t5"))
def test_a_quantised_backbone_trains_and_is_close(family, kind, tmp_path):
    plain = backbone(family)
    plain.save_pretrained(tmp_path)
    output = plain.get_output_embeddings()
    whole = (*head_names(plain), *(n for n, m in plain.named_modules() if m is output))
    arguments = quantization.loading_arguments(kind, whole, torch.float32, torch.device("cpu"))
    loaded = type(plain).from_pretrained(tmp_path, dtype=torch.float32, **arguments)
    model = adapt(loaded, lora_targets="all-linear")
    exact = logits(adapt(plain, lora_targets="all-linear"))
    assert (exact - logits(model)).abs().mean() < exact.abs().mean()
    for name, grad in gradients(model).items():
        assert grad is not None and torch.isfinite(grad).all(), name
