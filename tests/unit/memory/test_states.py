"""Predicted weights, gradients and optimizer states, by ZeRO stage and kind of weights."""

import pytest
import torch
from torch import nn

from scaleup import errors
from scaleup.backbone.method import apply_method
from scaleup.memory import states as memory
from scaleup.settings.presets import deepspeed_file
from scaleup.settings.rules import ZERO_PRESETS
from scaleup.settings.schema import MethodSettings
from tests.utils.planning import adapted
from tests.utils.tiny import backbone


@pytest.mark.parametrize("kind", ["8bit", "nf4"])
def test_quantised_weights_take_what_bitsandbytes_takes(kind):
    bnb = pytest.importorskip("bitsandbytes")
    plain = nn.Sequential(nn.Linear(96, 64, bias=False))
    model = nn.Sequential(nn.Linear(96, 64, bias=False, device="meta")).requires_grad_(False)
    planned = sum(piece.bytes for piece in memory.frozen_pieces(model, kind))
    if kind == "8bit":
        layer = bnb.nn.Linear8bitLt(96, 64, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(
            plain[0].weight.data, requires_grad=False, has_fp16_weights=False
        )
        layer = layer.to("cpu")
        layer(torch.zeros(2, 96))
        tensors = [layer.state.CB, layer.state.SCB]
    else:
        layer = bnb.nn.Linear4bit(96, 64, bias=False, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(
            plain[0].weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False
        )
        layer = layer.to("cpu")
        tensors = [layer.weight.data, layer.weight.quant_state.absmax]
    assert planned == sum(t.numel() * t.element_size() for t in tensors)


def test_a_frozen_head_moves_from_the_trained_to_the_frozen_weights_and_is_not_quantised():
    model = backbone("bert").to("meta")
    head = sum(p.numel() for p in model.classifier.parameters())
    states = {}
    for choice in ("trained", "frozen"):
        method = MethodSettings(submodules=["lora"], head=choice)
        adapted_model = apply_method(backbone("bert").to("meta"), method)
        states[choice] = memory.states(adapted_model, "8bit", memory.Zero(), 1, None)
    assert states["trained"].trained - states["frozen"].trained == 4 * head
    assert states["frozen"].backbone - states["trained"].backbone == 4 * head


def test_automatic_deepspeed_settings_are_those_of_transformers(tmp_path):
    zero = memory.read_zero(deepspeed_file("zero3_offload"), 64)
    assert (zero.stage, zero.bucket, zero.prefetch, zero.persistence) == (3, 4096, 3686, 640)
    assert zero.offload_optimizer and zero.offload_parameters
    for content in ("{", "[1]", '{"zero_optimization": {"stage": "many"}}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(errors.ConfigError, match="is not a DeepSpeed config"):
            memory.read_zero(tmp_path / "bad.json", 64)


def test_zero3_holds_what_it_reads_again_within_the_reuse_distance():
    pieces = [
        memory.Piece(1000, 2),
        memory.Piece(3000, 2),
        memory.Piece(5000, 2, reused=False),
        memory.Piece(10, 2),
    ]
    near = memory.Zero(stage=3, persistence=100)
    assert memory.gathered(pieces, near) == 10_000  # the embedding, while it is read
    assert memory.gathered(pieces[:2], near) == 8000
    assert (
        memory.gathered(pieces[:2], memory.Zero(stage=3, persistence=100, reuse_distance=2000))
        == 6000
    )


def test_zero3_gathers_again_in_the_backward_pass_what_it_reads_and_has_not_kept():
    """Two layers and an embedding, which only the forward pass reads; a small norm stays whole."""
    layer, embedding, norm = memory.Piece(1000, 4), memory.Piece(2500, 4, reused=False), 50
    pieces = [layer, layer, embedding, memory.Piece(norm, 4)]

    def moved(reuse_distance: int) -> int:
        return memory._moved(pieces, memory.Zero(3, persistence=100, reuse_distance=reuse_distance))

    assert moved(4000) == 4 * (1000 + 1000 + 2500)  # kept from the forward pass
    assert moved(2000) == 4 * (1000 + 1000 + 2500 + 1000)  # half is kept
    assert moved(0) == 4 * (1000 + 1000 + 2500 + 1000 + 1000)


def test_states_shrink_from_stage_to_stage(workspace):
    model = adapted(workspace, "bert", "meta")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    zeros = {name: memory.read_zero(deepspeed_file(name), 128) for name in ZERO_PRESETS}
    alone, ddp = (memory.states(model, "none", memory.Zero(), world, None) for world in (1, 8))
    assert (
        alone.trained == trained * 4
        and alone.optimizer == trained * 8
        and alone.buffers == 0
        and ddp.buffers == trained * 4
    )
    one, two, three, hpz, offload = (
        memory.states(model, "none", zeros[name], 8, None) for name in ZERO_PRESETS
    )
    assert (
        one.resident == two.resident > three.resident > offload.resident
        and two.gradients < one.gradients
    )
    assert hpz.backbone == three.backbone  # one process on each host
    shared = memory.states(model, "none", memory.read_zero("zero3_hpz", 128, 4), 8, None)
    assert shared.backbone > three.backbone * 2
    assert three.backbone < two.backbone / 7 and offload.host > offload.resident and three.host == 0
    assert (
        memory.states(model, "nf4", zeros["zero2"], 8, None).backbone
        < memory.states(model, "8bit", zeros["zero2"], 8, None).backbone
        < two.backbone
    )


def test_fsdp_shares_out_frozen_matrices_only(workspace):
    model = adapted(workspace, "bert", "meta")
    frozen = [p for p in model.parameters() if not p.requires_grad]
    vectors = sum(p.nbytes for p in frozen if p.dim() < 2)
    matrices = sum(p.nbytes for p in frozen) - vectors
    buffers = sum(b.nbytes for b in model.buffers())
    heads = sum(p.nbytes for n, p in model.named_parameters() if ".original_module.weight" in n)
    ddp, full = memory.states(model, "none", memory.Zero(), 8, None), None
    for shards in (8, 4):
        full = memory.fsdp_states(model, "none", 8, shards)
        whole = vectors + buffers + heads
        assert full.backbone == pytest.approx(whole + (matrices - heads) / shards, rel=1e-3)
        assert (full.trained, full.optimizer, full.buffers) == (
            *(ddp.trained, ddp.optimizer, ddp.buffers),
        )
    assert memory.fsdp_states(model, "8bit", 8, 4).backbone < full.backbone
