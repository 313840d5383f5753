"""Models give the same with log-sum-exp attention (reference) as without (off)."""

import pytest
import torch
from transformers import BartForConditionalGeneration

from scaleup.unipelt.kernels import ops
from tests.utils.tiny import EOS, adapt, backbone, inputs

FAMILIES = (
    "bert",
    "modernbert",
    "bart",
    "t5",
    "gpt2",
    "opt",
    "llama",
    "mistral",
    "gemma3_text",
    "phi",
)


@pytest.fixture
def merges(monkeypatch) -> list[float]:
    """Record the dropout of each attention whose prefix is joined by log-sum-exp."""
    calls: list[float] = []
    merge = ops.merge_forward

    def record(query, out, lse, prefix, gate, scale, keep=None, dropout=0.0) -> None:
        calls.append(dropout)
        merge(query, out, lse, prefix, gate, scale, keep, dropout)

    monkeypatch.setattr(ops, "merge_forward", record)
    return calls


def batches(model, rows: str) -> dict[str, torch.Tensor]:
    given = inputs(model, labels=True)
    if rows == "full":
        given.pop("attention_mask")
        given["input_ids"] = given["input_ids"].clamp(min=4)
        given["input_ids"][:, -1] = EOS
    if rows == "left padding":
        for name in ("input_ids", "attention_mask"):
            given[name] = given[name].flip(1)
    return given


def results(model, given, monkeypatch, mode: str, steps: int = 1, **arguments):
    """Return the logits and the gradients of all trained weights."""
    monkeypatch.setenv("SCALEUP_KERNELS", mode)
    model.zero_grad()
    outs = [model(**given, **arguments) for _ in range(steps)]
    for out in outs:
        out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    real = outs[-1].logits
    if (
        "attention_mask" in given
        and real.dim() == 3
        and real.shape[1] == given["input_ids"].shape[1]
    ):
        real = real * given["attention_mask"].unsqueeze(2)
    return {"logits": real.detach(), **grads}


def compare(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, expected in first.items():
        error = (second[name] - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("rows", ["padding", "left padding", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_the_same(family, rows, monkeypatch, merges):
    model = adapt(backbone(family).double())
    given = batches(model, rows)
    off = results(model, given, monkeypatch, "off")
    assert not merges
    compare(off, results(model, given, monkeypatch, "reference"))
    assert len(merges) == sum(
        "unipelt_attention" in n.split(".")[-1:] for n, _ in model.named_modules()
    )


NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "t5": {"dropout_rate": 0.0},
    "llama": {},
}


@pytest.mark.parametrize("family", NO_DROPOUT)
def test_recomputed_blocks_and_two_forward_passes_give_the_same(family, monkeypatch, merges):
    model = adapt(backbone(family, **NO_DROPOUT[family])).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    given = batches(model, "padding")
    arguments = {} if family == "bert" else {"use_cache": False}
    off = results(model, given, monkeypatch, "off", steps=2, **arguments)
    compare(off, results(model, given, monkeypatch, "reference", steps=2, **arguments))
    assert merges


@pytest.mark.parametrize("family", ["bart", "t5", "llama", "mistral"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_gives_the_same(family, cache, monkeypatch, merges):
    model = adapt(backbone(family, cls=BartForConditionalGeneration if family == "bart" else None))
    given = {k: v.flip(1) for k, v in inputs(model).items() if k in ("input_ids", "attention_mask")}
    tokens = []
    for mode in ("off", "reference"):
        monkeypatch.setenv("SCALEUP_KERNELS", mode)
        out = model.generate(
            **given,
            max_new_tokens=5,
            do_sample=False,
            cache_implementation=cache if cache == "static" else None,
            disable_compile=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens.append(out)
    assert merges and torch.equal(tokens[0].sequences, tokens[1].sequences)
    for off, reference in zip(tokens[0].logits, tokens[1].logits):
        torch.testing.assert_close(off, reference, rtol=1e-4, atol=1e-4)
