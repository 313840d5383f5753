"""The fast path of CUDA, run on a CPU, gives the gradients of the plain path in every family."""

import contextlib
import copy

import pytest
import torch
from peft import PeftModel
from torch.nn.utils.parametrizations import weight_norm

from scaleup.training.callbacks import GateStatistics
from scaleup.unipelt.adapter import BottleneckLayer
from scaleup.unipelt.attention_gates import AttentionGates
from scaleup.unipelt.fast_path import plain_parts
from scaleup.unipelt.kernels import fused
from scaleup.unipelt.kernels.target import VARIABLE
from tests.utils.tiny import FAMILIES, PAD, adapt, backbone, batch, inputs, logits, task_type

EVERYTHING = ["adapter", "prefix", "lora"]
# Attentions that compute their softmax themselves, or send positions through LoRA.
PLAIN_ATTENTION = ("deberta-v2", "mpnet")
SITES = ("_NarrowSite", "_AddProduct", "_Bottleneck")


@pytest.fixture
def mode(monkeypatch):
    """Return a function that sets SCALEUP_KERNELS."""
    return lambda value: monkeypatch.setenv(VARIABLE, value)


@pytest.fixture
def evaluated(monkeypatch):
    """Return a dict that counts how often each function of the fast path is evaluated."""
    counts = dict.fromkeys(SITES, 0)

    def counting(name: str, forward):
        def count(*args):
            counts[name] += 1
            return forward(*args)

        return staticmethod(count)

    for name in SITES:
        function = getattr(fused, name)
        monkeypatch.setattr(function, "forward", counting(name, function.forward))
    return counts


def without_dropout(family: str, **changes) -> dict[str, float]:
    values = backbone(family, **changes).config.to_dict().items()
    return {
        name: 0.0
        for name, value in values
        if isinstance(value, float) and ("dropout" in name or "pdrop" in name)
    }


def trained(family: str, submodules: list[str], **config) -> PeftModel:
    """Return a model in training mode. Its adapters are smooth: ReLU would amplify rounding."""
    smooth = {"adapter_activation": "gelu", "parallel_adapter_activation": "tanh"}
    bare = backbone(family, **without_dropout(family))
    return adapt(bare, submodules=submodules, **({"gates": "learned"} | smooth | config)).train()


def gradients(model, *batches, together: bool = False) -> dict[str, torch.Tensor]:
    """Return the gradients of several batches, accumulated or by one backward pass."""
    model.zero_grad()
    losses = []
    for given in batches:
        losses.append(model(**given).loss)
        if not together:
            losses.pop().backward()
    if together:
        sum(losses).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def worst(found, expected) -> float:
    """Return the greatest difference of any gradient, relative to the greatest gradient."""
    assert found.keys() == expected.keys()
    largest = max(grad.abs().max() for grad in expected.values())
    return max(((found[n] - grad).abs().max() / largest).item() for n, grad in expected.items())


def examples(model) -> list[dict[str, torch.Tensor]]:
    """Return a padded batch and one without padding."""
    padded = inputs(model, labels=True)
    full = batch((8, 8, 8), seed=9)
    kind = task_type(model.get_base_model())
    own = full["input_ids"] if kind == "CAUSAL_LM" else padded["labels"]
    return [padded, full | {"labels": own}]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_the_plain_path(family, mode, evaluated):
    model = trained(family, EVERYTHING)
    padded, full = examples(model)
    mode("off")
    expected = {
        "padded": gradients(model, padded),
        "full": gradients(model, full),
        "both": gradients(model, padded, full),
    }
    assert not any(evaluated.values())
    mode("reference")
    found = {"padded": gradients(model, padded)}
    attentions = [layer for layer in model.modules() if isinstance(layer, AttentionGates)]
    assert evaluated["_Bottleneck"] >= sum(isinstance(m, BottleneckLayer) for m in model.modules())
    if family not in PLAIN_ATTENTION:
        cross = sum(layer.site.cross for layer in attentions)
        assert evaluated["_NarrowSite"] >= len(attentions) + cross
        assert evaluated["_AddProduct"] >= len(attentions)
    found["full"] = gradients(model, full)
    found["both"] = gradients(model, padded, full)
    for name, wanted in expected.items():
        assert worst(found[name], wanted) < 1e-5, name
    assert worst(gradients(model, padded, full, together=True), expected["both"]) < 1e-5
    if family not in ("albert", "mpnet"):  # which have no gradient checkpointing
        model.gradient_checkpointing_enable()
        assert worst(gradients(model, padded), expected["padded"]) < 1e-5


@pytest.mark.parametrize("submodules", [["adapter"], ["prefix"], ["lora"], ["parallel_adapter"]])
@pytest.mark.parametrize("family", ["bert", "bart", "t5", "llama", "gpt2", "opt", "phi3", "mpnet"])
def test_gradients_of_single_submodules_equal_those_of_the_plain_path(family, submodules, mode):
    model = trained(family, submodules)
    padded, _ = examples(model)
    mode("off")
    expected = gradients(model, padded)
    mode("reference")
    assert worst(gradients(model, padded), expected) < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        {"gate_pooling": "paper"},
        {"gate_pooling": "masked"},
        {"gate_pooling": "causal"},
        {"lora_gate": "scale"},
        {"lora_gate_scope": "projection"},
        {"adapter_input": "raw"},
        {"gate_bias": 3.0},
        {"gates": "none"},
        {"lora_dropout": 0.5},
        {"adapter_activation": "gelu_new"},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_settings_give_the_same_gradients_on_both_paths(family, config, mode):
    model = trained(family, EVERYTHING, **config)
    padded, _ = examples(model)
    found = []
    for value in ("off", "reference"):
        mode(value)
        torch.manual_seed(0)
        found.append(gradients(model, padded))
    assert worst(found[1], found[0]) < 1e-5


@pytest.mark.parametrize("family", ["bert", "t5", "llama", "gpt2"])
def test_reentrant_checkpointing_gives_the_same_gradients(family, mode):
    model = trained(family, ["adapter", "lora"])
    padded, _ = examples(model)
    mode("off")
    expected = gradients(model, padded)
    mode("reference")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    assert worst(gradients(model, padded), expected) < 1e-5


@pytest.mark.parametrize("family", ["bert", "bart", "llama"])
def test_logits_without_gradients_equal_those_of_the_plain_path(family, mode, evaluated):
    model = adapt(backbone(family))
    mode("off")
    expected = logits(model)
    mode("reference")
    assert (logits(model) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert all(evaluated.values())
    with torch.inference_mode():
        found = model(**inputs(model)).logits
    assert (found - model(**inputs(model)).logits).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", ["llama", "t5", "gpt2"])
def test_generated_tokens_equal_those_of_the_plain_path(family, mode, evaluated):
    """The prompt takes the fast path. Its gates' totals go on in the cache."""
    model = adapt(backbone(family))
    given = batch()
    if task_type(model.get_base_model()) == "CAUSAL_LM":
        given = {name: tensor.flip(1) for name, tensor in given.items()}

    def generate():
        options = dict(max_new_tokens=6, output_logits=True, return_dict_in_generate=True)
        return model.generate(**given, **options, num_beams=2, pad_token_id=PAD)

    mode("off")
    expected = generate()
    mode("reference")
    found = generate()
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.logits, expected.logits, strict=True):
        assert (a - b).abs().max() < 1e-4
    assert evaluated["_NarrowSite"] > 0
    mode("off")
    uncached = model.generate(**given, max_new_tokens=6, num_beams=2, pad_token_id=PAD)
    assert torch.equal(uncached, expected.sequences)


def test_gates_are_logged_as_on_the_plain_path(mode):
    sums = []
    for value in ("off", "reference"):
        mode(value)
        model = trained("llama", EVERYTHING, lora_gate="scale")
        log = GateStatistics(model)
        model(**examples(model)[0]).loss.backward()
        sums.append(torch.cat([gate.statistics.sums_3N for _, gate in log.gates], dim=1))
    assert torch.allclose(*sums, atol=1e-5)


def test_layers_with_an_observer_take_the_plain_path(mode, evaluated):
    model = adapt(backbone("bert"))
    layers = [m for m in model.modules() if isinstance(m, BottleneckLayer)]
    seen = []
    layers[0].observer = lambda *change: seen.append(change)
    mode("reference")
    logits(model)
    assert len(seen) == 1 and not any(evaluated.values())
    layers[0].observer = None
    logits(model)
    assert all(evaluated.values())


def test_a_trained_norm_gets_its_gradient(mode):
    model = trained("bert", ["adapter"])
    padded, _ = examples(model)
    mode("reference")
    gradients(model, padded)  # while it is frozen
    norm = model.get_base_model().bert.encoder.layer[1].output.LayerNorm.base_layer
    norm.weight.requires_grad_(True)
    found = gradients(model, padded)
    mode("off")
    assert worst(found, gradients(model, padded)) < 1e-5
    assert any("base_layer" in name and grad.abs().max() > 0 for name, grad in found.items())


def test_switched_added_and_deleted_adapters_have_their_own_weights(mode):
    model = trained("bert", EVERYTHING)
    padded, _ = examples(model)
    config = copy.deepcopy(model.peft_config["default"])
    config.submodules, config.r = ["prefix", "lora"], 2

    def check():
        mode("reference")
        found = gradients(model, padded)
        mode("off")
        assert worst(found, gradients(model, padded)) < 1e-5

    check()
    model.add_adapter("second", config)
    check()
    model.set_adapter("second")
    check()
    model.set_adapter("default")
    check()
    model.delete_adapter("second")
    config.r = 3
    model.add_adapter("second", config)
    model.set_adapter("second")
    check()


def test_part_of_the_graph_alone_leaves_no_gradients_behind(mode):
    model = trained("llama", EVERYTHING)
    padded, _ = examples(model)
    mode("off")
    expected = gradients(model, padded)
    mode("reference")
    embedded = model.get_input_embeddings()(padded["input_ids"]).detach().requires_grad_()
    given = {name: padded[name] for name in ("attention_mask", "labels")}
    loss = model(inputs_embeds=embedded, **given).loss
    torch.autograd.grad(loss, embedded, retain_graph=True)
    model.zero_grad()
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert worst(found, expected) < 1e-5


def test_switching_the_kernels_between_forward_and_backward_changes_nothing(mode):
    model = trained("bart", EVERYTHING)
    model.gradient_checkpointing_enable()
    padded, _ = examples(model)
    mode("off")
    expected = gradients(model, padded)
    for first, second in (("off", "reference"), ("reference", "off")):
        model.zero_grad()
        mode(first)
        loss = model(**padded).loss
        mode(second)
        loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert worst(found, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_another_dtype_without_autocast(dtype, mode, evaluated):
    """The frozen weights and the trained ones share it, so that nothing is cast."""
    model = trained("bert", EVERYTHING).to(dtype)
    padded, _ = examples(model)
    mode("reference")
    found = gradients(model, padded)
    assert all(evaluated.values()) and {g.dtype for g in found.values()} == {dtype}
    mode("off")
    assert worst(found, gradients(model, padded)) < (0.1 if dtype == torch.bfloat16 else 1e-6)


def test_float32_weights_beside_a_half_backbone_take_the_plain_path(mode, evaluated):
    """Without autocast, activations are cast to the weights there."""
    model = adapt(backbone("bert").bfloat16())
    mode("reference")
    gradients(model, examples(model)[0])
    assert not any(evaluated.values())
    with torch.autocast("cpu", torch.bfloat16):
        gradients(model, examples(model)[0])
    assert all(evaluated.values())


@contextlib.contextmanager
def compiled_blocks(model):
    blocks = model.get_base_model().bert.encoder.layer
    plain = [block.forward for block in blocks]
    for block in blocks:
        block.forward = torch.compile(block.forward, backend="eager")
    yield
    for block, forward in zip(blocks, plain):
        block.forward = forward


def test_compiled_blocks_take_the_plain_path(mode, evaluated):
    model = trained("bert", EVERYTHING)
    padded, _ = examples(model)
    mode("off")
    expected = gradients(model, padded)
    mode("reference")
    with compiled_blocks(model):
        found = gradients(model, padded)
    assert worst(found, expected) < 1e-5 and not any(evaluated.values())


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_all_tokens_whose_mask_is_not_zero_count_alike(family, mode):
    model = trained(family, EVERYTHING)
    given = inputs(model, labels=True)
    factors = 1 + torch.arange(given["attention_mask"].shape[1]) % 3
    given["attention_mask"] = given["attention_mask"] * factors
    mode("off")
    expected = gradients(model, given)
    mode("reference")
    assert worst(gradients(model, given), expected) < 1e-5


@pytest.mark.parametrize("name", ["unipelt_adapter.default.down", "lora_A.default"])
def test_weights_that_torch_computes_from_others_take_the_plain_path(name, mode):
    model = trained("bert", EVERYTHING)
    linear = next(module for path, module in model.named_modules() if path.endswith(name))
    weight_norm(linear)
    padded, _ = examples(model)
    mode("off")
    expected = gradients(model, padded)
    mode("reference")
    assert worst(gradients(model, padded), expected) < 1e-5
    assert "trained weights are computed from others" in plain_parts(model)


def test_layers_that_a_pass_skips_get_no_gradient(mode):
    """An optimizer with momentum would move them by a gradient of zeros."""
    model = trained("bert", [*EVERYTHING, "parallel_adapter"])
    layer = model.get_base_model().bert.encoder.layer[1]
    layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    padded, _ = examples(model)

    def by_name() -> dict[str, torch.Tensor | None]:
        model.zero_grad()
        model(**padded).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    mode("off")
    expected = by_name()
    mode("reference")
    found = by_name()
    skipped = {name for name, grad in expected.items() if grad is None}
    assert skipped and {name for name, grad in found.items() if grad is None} == skipped
    reached = [name for name in expected if name not in skipped]
    assert worst({n: found[n] for n in reached}, {n: expected[n] for n in reached}) < 1e-5
