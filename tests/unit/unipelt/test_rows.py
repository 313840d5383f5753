"""Batches in which rows have different adapters, against each row alone."""

import pytest
import torch

from scaleup.unipelt.config import UniPeltConfig
from scaleup.unipelt.kernels.target import VARIABLE
from scaleup.unipelt.rows import switchable
from tests.utils.tiny import adapt, backbone, batch, inputs, task_type

OTHERS = {
    "long": {"submodules": ["prefix"], "prefix_length": 5, "gates": "learned"},
    "ungated": {"submodules": ["adapter", "lora"], "gates": "none", "adapter_size": 4, "r": 2},
    "lora": {"submodules": ["lora"], "r": 3},
}
NAMES = ["long", "default", "__base__", "ungated", "lora", "long"]


def slow(*families):
    return [pytest.param(family, marks=pytest.mark.slow) for family in families]


DECODERS = ["gpt2", "t5", *slow("llama", "mistral", "qwen3_5_text", "falcon_h1", "mixtral")]
FAMILIES = ["bert", "bart", *slow("deberta-v2", "modernbert"), *DECODERS]


@pytest.fixture
def model(family):
    """A model with four adapters whose submodules, gates and sizes differ."""
    model = adapt(backbone(family))
    for seed, (name, settings) in enumerate(OTHERS.items()):
        kind = task_type(model.get_base_model())
        model.add_adapter(name, UniPeltConfig(task_type=kind, prefix_hidden_size=8, **settings))
        generator = torch.Generator().manual_seed(seed)
        for path, parameter in model.named_parameters():
            if f".{name}." in path:
                std = 1.0 if "gate" in path else 0.3
                parameter.data.normal_(std=std, generator=generator)
    return model.eval()


def alone(model, name, function):
    """Call a function with one adapter active, or with none."""
    if name == "__base__":
        with model.disable_adapter():
            return function()
    model.set_adapter(name)
    model.base_model.set_requires_grad(["default", *OTHERS])
    return function()


def six_rows(model):
    return {key: value.repeat(2, 1) for key, value in inputs(model).items()}


def row(tensors, index):
    return {key: value[index : index + 1] for key, value in tensors.items()}


def real(out, tensors):
    """Return logits with 0 at padding, where those of a causal model have no meaning."""
    if out.logits.dim() == 3 and "decoder_input_ids" not in tensors:
        return out.logits * tensors["attention_mask"].unsqueeze(2)
    return out.logits


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_get_the_logits_and_gradients_that_they_get_alone(model, family, checkpointing):
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tensors = six_rows(model)
    model.base_model.set_requires_grad(["default", *OTHERS])
    parameters = {path: p for path, p in model.named_parameters() if p.requires_grad}
    mixed = real(model(**tensors, adapter_names=NAMES), tensors)
    weights = torch.linspace(-1, 1, mixed.numel()).view_as(mixed)
    (mixed * weights).sum().backward()
    gradients = {path: p.grad for path, p in parameters.items()}
    model.zero_grad()
    for index, name in enumerate(NAMES):
        own = row(tensors, index)
        single = alone(model, name, lambda own=own: real(model(**own), own))
        torch.testing.assert_close(mixed[index : index + 1], single, rtol=1e-5, atol=1e-5)
        if single.requires_grad:
            (single * weights[index : index + 1]).sum().backward()
    for path, parameter in parameters.items():
        assert (parameter.grad is None) == (gradients[path] is None), path
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[path], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}],
    ids=["cache", "beams", "no cache", "static"],
)
@pytest.mark.parametrize("family", DECODERS)
def test_rows_generate_what_they_generate_alone(model, family, options):
    tokens = batch((7, 7, 7))["input_ids"].repeat(2, 1)
    tensors = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    tensors["attention_mask"][1, :2] = 0  # padding on the left
    options = {"max_new_tokens": 6, "eos_token_id": None, **options}
    mixed = model.generate(**tensors, adapter_names=NAMES, **options)
    assert len({tuple(tokens) for tokens in mixed.tolist()}) > 1
    for index, name in enumerate(NAMES):
        own = row(tensors, index)
        single = alone(model, name, lambda own=own: model.generate(**own, **options))
        assert torch.equal(mixed[index : index + 1], single), name


@pytest.mark.parametrize("family", ["gpt2"])
def test_scores_of_generated_tokens_are_those_of_each_row_alone(model, family):
    tokens = batch((7, 7, 7))["input_ids"].repeat(2, 1)
    options = {"max_new_tokens": 5, "eos_token_id": None, "output_scores": True}
    options |= {"return_dict_in_generate": True, "attention_mask": torch.ones_like(tokens)}
    mixed = model.generate(tokens, adapter_names=NAMES, **options)
    for index, name in enumerate(NAMES):
        own = options | {"attention_mask": torch.ones_like(tokens[:1])}
        single = alone(model, name, lambda i=index, o=own: model.generate(tokens[i : i + 1], **o))
        for step, scores in enumerate(single.scores):
            torch.testing.assert_close(
                mixed.scores[step][index : index + 1], scores, rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("family", ["bert"])
def test_the_loss_is_that_of_the_whole_batch(model, family):
    tensors, labels = six_rows(model), torch.tensor([0, 2, 1, 0, 1, 2])
    mixed = model(**tensors, labels=labels, adapter_names=NAMES)
    expected = torch.nn.functional.cross_entropy(mixed.logits, labels)
    torch.testing.assert_close(mixed.loss, expected)


@pytest.mark.parametrize("family", ["bert"])
def test_the_fast_path_serves_rows_with_different_adapters(model, family, monkeypatch):
    tensors = six_rows(model)
    with torch.no_grad():
        monkeypatch.setenv(VARIABLE, "off")
        plain = model(**tensors, adapter_names=NAMES).logits
        monkeypatch.setenv(VARIABLE, "reference")
        fast = model(**tensors, adapter_names=NAMES).logits
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert"])
def test_nothing_of_a_divided_batch_remains(model, family):
    layers = switchable(model)
    before = [(layer.active_adapters, layer.disable_adapters) for layer in layers]
    model(**six_rows(model), adapter_names=NAMES)
    assert [(layer.active_adapters, layer.disable_adapters) for layer in layers] == before
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("family", ["bert"])
def test_wrong_names_are_refused(model, family):
    tensors = six_rows(model)
    with pytest.raises(ValueError, match="contains nobody; the model has default, long"):
        model(**tensors, adapter_names=["nobody"] * 6)
    with pytest.raises(ValueError, match="0 names for a batch of 6 rows"):
        model(**tensors, adapter_names=[])
    with pytest.raises(ValueError, match="4 names for a batch of 6 rows"):
        model(**tensors, adapter_names=["default"] * 4)
    with pytest.raises(ValueError, match="3 names for a batch of 6 rows"):
        model(**tensors, adapter_names=["default"] * 3)
    model.get_base_model().set_attn_implementation("unipelt_eager")
    with pytest.raises(ValueError, match="leave output_attentions out"):
        model(**tensors, adapter_names=NAMES, output_attentions=True)
    with pytest.raises(ValueError, match="adapter_names is an argument of PeftModel"):
        model.get_base_model()(**tensors, adapter_names=NAMES)
