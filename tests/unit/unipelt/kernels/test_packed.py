"""Packed weights: where they lie, to whom a workspace belongs, and how gradients come back."""

import copy
import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from scaleup.unipelt.adapter import OnesColumn
from scaleup.unipelt.fused_qkv import FusedBlocks, FusedUpdate
from scaleup.unipelt.kernels import Narrow, PlainPath, Plan, Site, Wide, begin, collect_sites
from scaleup.unipelt.site_types import FusedQKVLayout

D, RANK = 16, 3


class Toy(nn.Module):
    """A bottleneck with a gate, and a LoRA projection."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.down, self.gate = nn.Linear(D, RANK), nn.Linear(D, 1)
        self.up, self.lora = nn.Linear(RANK, D), nn.Linear(4, D, bias=False)
        self.norm = nn.LayerNorm(D).requires_grad_(False)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def declare(self):
        def entries(*names):
            return [(self, name) for name in names]

        narrow = Narrow(
            weights=entries("down.weight", "gate.weight"),
            biases=entries("down.bias", "gate.bias"),
            rank=RANK,
            scales=(2.0,),
            masked=True,
            causal=False,
            activation="relu",
            ones_column=True,
        )
        wide = Wide(entries("up.weight", "up.bias"), D, 8, OnesColumn())
        site = Site(narrow, wide, entries("norm.weight", "norm.bias"))
        return {self: site, "lora": Site(wide=Wide(entries("lora.weight"), D, 4))}


def plan_of(*layers: Toy, dtype: torch.dtype = torch.bfloat16) -> Plan:
    sites: dict = {}
    for i, layer in enumerate(layers):
        declared = layer.declare()
        sites |= {layer: declared[layer], f"lora {i}": declared["lora"]}
    return Plan(sites, dtype, autocast=dtype == torch.bfloat16)


def test_weights_are_cast_and_lie_in_one_matrix_per_side():
    layers = Toy(), Toy()
    with torch.no_grad():
        lease, anchor = begin(plan_of(*layers))
    assert anchor is None
    for i, layer in enumerate(layers):
        site = lease.sites[layer]
        rows = torch.cat([layer.down.weight, layer.gate.weight, torch.zeros(4, D)])
        assert torch.equal(site.weight_in, rows.bfloat16())
        columns = torch.cat([layer.up.weight, layer.up.bias[:, None], torch.zeros(D, 4)], dim=1)
        assert torch.equal(site.weight_out, columns.bfloat16())
        assert torch.equal(site.bias, torch.cat([layer.down.bias, layer.gate.bias]))
        assert torch.equal(lease.sites[f"lora {i}"].weight_out, layer.lora.weight.bfloat16())
        assert site.scales.tolist() == [2.0] and site.bias.dtype == torch.float32
        assert torch.equal(site.constants[0], layer.norm.weight)
        assert site.weight_in.data_ptr() % 16 == site.weight_out.data_ptr() % 16 == 0


@pytest.mark.parametrize("order, kv_heads", [("parts", 2), ("heads", 4)])
def test_b_of_a_fused_projection_is_one_matrix_with_blocks_of_zeros(order, kv_heads):
    update = FusedUpdate(3, FusedQKVLayout(order, 4, kv_heads, 8), keys=False)
    nn.init.normal_(update.weight)
    wide = Wide([(update, "weight")], update.rows, 6, FusedBlocks(update.layout, update.keys))
    gate = nn.Linear(D, 1)
    narrow = Narrow([(gate, "weight")], [(gate, "bias")], 0, (1.0,), True, False)
    plan = Plan({"gate": Site(narrow), "b": Site(wide=wide)}, torch.float32, False)
    low_rank = torch.randn(5, 6)
    lease, anchor = begin(plan)
    found = low_rank @ lease.sites["b"].weight_out.t()
    assert torch.allclose(found, update(low_rank), atol=1e-6)
    # The gradient of each block reaches the rows of the weight that it was copied from.
    grad = torch.randn_like(found)
    lease.workspace.reached.add(lease.sites["b"])
    lease.sites["b"].grad_out.addmm_(grad.t(), low_rank)
    anchor.backward()
    (expected,) = torch.autograd.grad(update(low_rank), update.weight, grad)
    assert torch.allclose(update.weight.grad, expected, atol=1e-5)


def fill(lease, value: float = 1.0) -> None:
    """Write to the buffers as the backward passes of sites do."""
    workspace = lease.workspace
    workspace.reached.update(lease.sites.values())
    for site in workspace.sites.values():
        for name in ("grad_in", "grad_out"):
            if hasattr(site, name):
                getattr(site, name).add_(value)
        if hasattr(site, "number"):
            workspace.bias_grad(site, 2).add_(value)


def gradients(*layers: Toy) -> set[float]:
    names = [p for layer in layers for p in layer.parameters() if p.grad is not None]
    return {value for p in names for value in p.grad.flatten().tolist()}


def test_gradients_are_handed_out_once_and_summed_over_examples():
    layers = Toy(), Toy()
    lease, anchor = begin(plan_of(*layers))
    fill(lease)
    anchor.backward(retain_graph=True)
    for layer in layers:
        trained = [p for n, p in layer.named_parameters() if not n.startswith("norm")]
        for p in trained:
            expected = 2.0 if p is layer.down.bias or p is layer.gate.bias else 1.0
            assert p.grad.shape == p.shape and p.grad.dtype == torch.float32
            assert (p.grad == expected).all()
        assert layer.norm.weight.grad is None
    assert not lease.workspace.reached
    anchor.backward(retain_graph=True)  # nothing has been added since
    assert gradients(*layers) == {1.0, 2.0}
    fill(lease)  # with a larger batch, the buffer of the biases grows
    site = lease.sites[layers[0]]
    lease.workspace.bias_grad(site, 5).add_(1.0)
    anchor.backward()
    assert (layers[0].up.weight.grad == 2.0).all() and (layers[0].down.bias.grad == 9.0).all()


def test_frozen_parameters_get_no_gradient():
    layer = Toy()
    layer.up.requires_grad_(False)
    lease, anchor = begin(plan_of(layer))
    fill(lease)
    anchor.backward()
    assert layer.up.weight.grad is None and layer.down.weight.grad is not None
    layer.requires_grad_(False)
    assert not begin(plan_of(layer))[1].requires_grad


def test_a_workspace_belongs_to_one_pass_until_its_graph_is_gone():
    layer = Toy()
    plan = plan_of(layer)
    first, anchor = begin(plan)
    second, _ = begin(plan)
    workspace = first.workspace
    assert second.workspace is not workspace
    del first
    gc.collect()
    assert begin(plan)[0].workspace is not workspace  # the node of the anchor still holds it
    del anchor
    third, _ = begin(plan)
    assert third.workspace is workspace


def test_gradients_that_were_never_handed_out_do_not_reach_the_next_pass():
    layer = Toy()
    plan = plan_of(layer)
    lease, anchor = begin(plan)
    fill(lease, 100.0)
    workspace = lease.workspace
    del lease, anchor
    lease, anchor = begin(plan)
    assert lease.workspace is workspace
    fill(lease)
    anchor.backward()
    assert gradients(layer) == {1.0, 2.0}


@pytest.mark.parametrize("kind", ["inference", "fake"])
def test_a_workspace_of_a_special_mode_is_not_kept(kind):
    if kind == "inference":
        plan = plan_of(Toy())
        with torch.inference_mode():
            begin(plan)
    else:
        with FakeTensorMode():
            plan = plan_of(Toy())
            begin(plan)
    assert plan.pools == {0: []}


def test_a_plan_notices_other_parameters():
    layer = Toy()
    plan = plan_of(layer)
    assert plan.is_current()
    layer.up.weight.data = layer.up.weight.data + 1  # the same parameter with other values
    assert plan.is_current()
    layer.up.weight = nn.Parameter(layer.up.weight.detach())
    assert not plan.is_current()
    plan = plan_of(layer)
    layer.down = copy.deepcopy(layer.down)
    assert not plan.is_current()
    plan = plan_of(layer)
    layer.double()
    assert not plan.is_current()


def test_second_derivatives_are_refused():
    layer = Toy()
    lease, anchor = begin(plan_of(layer))
    fill(lease)
    with pytest.raises(RuntimeError, match="leave out create_graph=True"):
        torch.autograd.grad(anchor, layer.up.weight, create_graph=True)


def other_dtype(layer: Toy) -> None:
    layer.up.half()


def subclass(layer: Toy) -> None:
    class Sharded(nn.Parameter):
        pass

    layer.up.weight = Sharded(layer.up.weight.detach())


def sharded(layer: Toy) -> None:
    layer.up.weight.ds_id = 0


def transposed(layer: Toy) -> None:
    layer.up.weight.data = torch.randn(RANK, D).t()


@pytest.mark.parametrize(
    "change, reason",
    [
        (other_dtype, "data type"),
        (subclass, "Sharded"),
        (sharded, "ZeRO-3"),
        (transposed, "contiguous"),
    ],
)
def test_weights_that_cannot_be_packed_leave_their_layer_on_the_plain_path(change, reason):
    good, bad = Toy(), Toy()
    change(bad)
    sites, reasons = collect_sites([good, bad])
    assert good in sites and bad not in sites
    assert len(reasons) == 1 and reason in reasons[0]


@pytest.mark.parametrize("rank", [512, 513])
def test_more_columns_than_a_kernel_takes_stay_on_the_plain_path(rank):
    linear = nn.Linear(8, rank + 1, bias=False)
    narrow = Narrow([(linear, "weight")], [rank + 1], rank, (1.0,), masked=False, causal=False)
    layer = SimpleNamespace(declare=lambda: {linear: Site(narrow)})
    sites, reasons = collect_sites([layer])
    assert (linear in sites) == (rank == 512)
    assert reasons == ([] if sites else ["narrow maps of one input have more than 512 columns"])


def test_equal_reasons_are_given_once():
    def declare():
        raise PlainPath("a reason")

    layer = SimpleNamespace(declare=declare)
    assert collect_sites([layer, layer]) == ({}, ["a reason"])
