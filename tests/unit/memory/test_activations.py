"""Predicted activations compared with those of real steps."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PretrainedConfig

from scaleup.experiments.meter import allocated_peak
from scaleup.memory.activations import Kernels, fake_step, step
from scaleup.memory.trace import trace
from tests.utils.planning import adapted
from tests.utils.tiny import adapt, backbone


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(
    "family, more",
    [("bert", ()), ("bart", ()), ("bert", ("method.lora_targets=all-linear",))],
    ids=["bert", "bart", "bert-all-linear"],
)
def test_activations_are_those_of_a_real_step(workspace, family, more, checkpointing):
    """Hooks count what autograd saves in a real pass, and the CPU allocator records its peak."""
    kernels = Kernels("cpu", None, "plain", checkpointing)
    planned = trace(
        lambda shape: adapted(workspace, family, "meta", shape, more),
        AutoConfig.from_pretrained(workspace / family),
        kernels,
        8,
        64,
    )
    model = adapted(workspace, family, "cpu", more=more).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    ids = torch.randint(5, 1000, (8, 64))
    ids[:, -1] = 3
    mask = torch.ones_like(ids)
    mask[0, 50:] = 0
    own, kept = (
        {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())},
        {},
    )

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = (
            tensor.untyped_storage().nbytes(),
            tensor,
        )  # held: addresses are used again
        return tensor

    if not checkpointing:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(input_ids=ids, attention_mask=mask).logits.sum()
        real = sum(size for address, (size, _) in kept.items() if address not in own)
        assert planned.kept == pytest.approx(real, rel=0.05)
        kept.clear()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    peak = allocated_peak(lambda: model(input_ids=ids, attention_mask=mask).logits.sum().backward())
    print(f"{family}: kept {planned.kept:,}, peak {planned.peak:,} planned, {peak:,} allocated")
    assert planned.peak == pytest.approx(peak, rel=0.1)


def test_operations_are_those_that_torch_counts_in_a_real_step(workspace):
    planned = trace(
        lambda shape: adapted(workspace, "bert", "meta", shape),
        AutoConfig.from_pretrained(workspace / "bert"),
        Kernels("cpu", None, "plain", False),
        8,
        64,
    )
    model = adapted(workspace, "bert", "cpu").train()
    ids = torch.randint(5, 1000, (8, 64))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
    assert planned.operations == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("linear", ["plain", "8bit"])
@pytest.mark.parametrize("family", ["bert", "bart"])
def test_a_deep_model_follows_from_shallow_copies(workspace, family, linear):
    kernels = Kernels("cuda", torch.bfloat16, linear, False)
    shape = AutoConfig.from_pretrained(workspace / family)
    whole = fake_step(adapted(workspace, family, "meta"), kernels, 8, 64)
    shallow = trace(lambda shape: adapted(workspace, family, "meta", shape), shape, kernels, 8, 64)
    assert shallow.kept == pytest.approx(whole.kept, rel=0.02) and shallow.peak == pytest.approx(
        whole.peak, rel=0.02
    )


def test_a_plan_for_a_gpu_knows_nothing_of_a_cpus_attention(workspace, monkeypatch):
    shape, kernels = (
        AutoConfig.from_pretrained(workspace / "bert"),
        Kernels("cuda", None, "plain", False),
    )
    planned = trace(lambda shape: adapted(workspace, "bert", "meta", shape), shape, kernels, 8, 32)
    for limit in ("MOST_KEYS", "MOST_KEYS_PER_QUERY", "MOST_KEYS_WITHOUT_FUSED"):
        monkeypatch.setattr(f"scaleup.unipelt.kernels.short_attention.{limit}", 0)
    assert planned == trace(
        lambda shape: adapted(workspace, "bert", "meta", shape), shape, kernels, 8, 32
    )


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_a_plan_for_a_gpu_has_neither_joined_keys_nor_masks_for_the_prefix(
    workspace, family, monkeypatch
):
    shape = AutoConfig.from_pretrained(workspace / family)
    kernels, steps = Kernels("cuda", torch.bfloat16, "plain", False), {}
    for mode in ("off", "auto"):
        monkeypatch.setenv("SCALEUP_KERNELS", mode)
        steps[mode] = trace(
            lambda shape: adapted(workspace, family, "meta", shape), shape, kernels, 8, 64
        )
    assert steps["auto"].kept < steps["off"].kept and steps["auto"].peak < steps["off"].peak


def test_torchs_functions_are_put_back_after_a_failure():
    before = (nn.functional.linear, nn.functional.layer_norm, nn.functional.dropout, torch.rand)
    with pytest.raises(AttributeError):  # no config, no forward
        step(nn.Module(), Kernels("cuda", torch.bfloat16, "8bit", False), 1, 4)
    assert before == (
        nn.functional.linear,
        nn.functional.layer_norm,
        nn.functional.dropout,
        torch.rand,
    )


PATTERN = ["linear_attention", "full_attention"]


@pytest.mark.parametrize(
    "family, changes",
    [
        ("mixtral", {}),
        ("qwen3_next", {"layer_types": 4 * PATTERN}),
        ("glm4_moe", {"first_k_dense_replace": 3}),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}),
        ("qwen3_moe", {"decoder_sparse_step": 3}),
    ],
)
def test_experts_and_the_repeated_layers_of_a_hybrid_are_planned(family, changes):
    kernels = Kernels("cpu", None, "plain", False)
    real = backbone(family, num_hidden_layers=8, **changes)

    def make(shape: PretrainedConfig) -> nn.Module:
        with torch.device("meta"):
            model = type(real)(shape)
        return adapt(model, randomise=False)

    planned = trace(make, real.config, kernels, 4, 32)
    whole = fake_step(make(real.config), kernels, 4, 32)
    assert dataclasses.astuple(planned) == pytest.approx(dataclasses.astuple(whole), rel=0.02)
    model = adapt(real, randomise=False).train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held: addresses are used again
        return tensor

    ids = torch.randint(5, 90, (4, 32))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    found = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)
    assert loss.requires_grad and planned.kept == pytest.approx(found, rel=0.05)
