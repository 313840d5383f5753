"""The products of the fast path: values and gradients equal those of plain formulas."""

import pytest
import torch
from torch import nn

from scaleup.unipelt.adapter import OnesColumn
from scaleup.unipelt.kernels import (
    Narrow,
    Plan,
    Site,
    Wide,
    add_product,
    begin,
    bottleneck,
    narrow_site,
)

B, T, D, H, RANK = 3, 5, 16, 4, 3
POOLINGS = {"masked": (True, False), "paper": (False, False), "causal": (True, True)}
MASK = (torch.arange(T) < torch.tensor([5, 2, 4])[:, None]).long()


def pool(g_BTN: torch.Tensor, pooling: str) -> torch.Tensor:
    """Average in the dtype of g."""
    if pooling == "paper":
        return g_BTN.mean(dim=1, keepdim=True)
    real_BT1 = MASK.unsqueeze(2).to(g_BTN.dtype)
    if pooling == "masked":
        return (g_BTN * real_BT1).sum(dim=1, keepdim=True) / real_BT1.sum(dim=1, keepdim=True)
    return (g_BTN * real_BT1).cumsum(dim=1) / real_BT1.cumsum(dim=1)


class Layer(nn.Module):
    """LoRA on two projections and two gates, of which the first is handed out."""

    def __init__(self, pooling: str):
        super().__init__()
        self.pooling = pooling
        self.gate = nn.Linear(D, 2)
        self.query, self.value = nn.Linear(D, RANK, bias=False), nn.Linear(D, RANK, bias=False)
        self.up = nn.Linear(RANK, D, bias=False)

    def sites(self):
        masked, causal = POOLINGS[self.pooling]
        weights = [(self, f"{name}.weight") for name in ("query", "value", "gate")]
        biases = [2 * RANK, (self, "gate.bias")]
        narrow = Narrow(weights, biases, 2 * RANK, (1.0, 2.0), masked, causal, 1, 0)
        return {self: Site(narrow), "up": Site(wide=Wide([(self, "up.weight")], D, RANK))}

    def gates(self, x, scales=(1.0, 2.0)):
        g_BTN = pool(torch.sigmoid(self.gate(x)), self.pooling)
        return (g_BTN * x.new_tensor(scales)).unbind(dim=-1)

    def forward(self, x, result):
        handed_out, selected = self.gates(x)
        low_q, low_v = (a(x) * selected.unsqueeze(2) for a in (self.query, self.value))
        return handed_out.unsqueeze(1).expand(B, H, T), result + self.up(low_q), low_v


class Adapter(nn.Module):
    def __init__(self, pooling: str, activation: str):
        super().__init__()
        self.pooling, self.activation = pooling, activation
        self.gate, self.down, self.up = nn.Linear(D, 1), nn.Linear(D, RANK), nn.Linear(RANK, D)
        self.norm = nn.LayerNorm(D).requires_grad_(False)
        for parameter in self.norm.parameters():
            nn.init.normal_(parameter)

    def sites(self, affine: bool):
        masked, causal = POOLINGS[self.pooling]
        down, up = ([(self, f"{n}.weight"), (self, f"{n}.bias")] for n in ("down", "up"))
        gate = [(self, "gate.weight"), (self, "gate.bias")]
        narrow = Narrow([down[0], gate[0]], [down[1], gate[1]], RANK, (1.0,), masked, causal)
        narrow.activation, narrow.ones_column = self.activation, True
        constants = [(self, "norm.weight"), (self, "norm.bias")] if affine else []
        return {self: Site(narrow, Wide(up, D, 8, OnesColumn()), constants)}

    def forward(self, z, n):
        gate = pool(torch.sigmoid(self.gate(n)), self.pooling)
        act = {"none": lambda x: x}.get(self.activation) or getattr(torch, self.activation)
        return z + gate * self.up(act(self.down(n)))


def wide(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def compare(layer, inputs, fast, plain) -> None:
    """Compare outputs and all gradients."""
    trained = [p for p in layer.parameters() if p.requires_grad]
    outputs = [out if isinstance(out, tuple) else (out,) for out in (fast(), plain())]
    weights = [torch.randn_like(out) for out in outputs[1]]
    for found, expected in zip(*outputs, strict=True):
        assert (found - expected).abs().max() < 1e-12
    grads = [
        torch.autograd.grad(
            sum((o * w).sum() for o, w in zip(out, weights)), [*inputs, *trained], allow_unused=True
        )
        for out in outputs
    ]
    for found, expected in zip(*grads, strict=True):
        assert (found - expected).abs().max() < 1e-12


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gates_and_gated_products_of_an_attention(pooling):
    layer, x, result = Layer(pooling).double(), wide(B, T, D), wide(B, T, D)
    plan = Plan(layer.sites(), torch.float64, False)

    def fast():
        lease, anchor = begin(plan)
        site = lease.sites[layer]
        gate, low_q, low_v = narrow_site(x, anchor, lease, site, MASK, H, [RANK, RANK])
        assert gate.shape == (B, H, T) and gate.stride(1) == 0
        out = result * 1
        updated = add_product(out, low_q, anchor, lease, lease.sites["up"], in_place=True)
        assert updated.data_ptr() == out.data_ptr()
        return gate, updated, low_v.view(B, T, RANK)

    compare(layer, [x, result], fast, lambda: layer(x, result))


def test_an_output_that_is_not_used_has_no_gradient():
    layer, x, result = Layer("causal").double(), wide(B, T, D), wide(B, T, D)
    plan = Plan(layer.sites(), torch.float64, False)

    def fast():
        lease, anchor = begin(plan)
        _, low_q, _ = narrow_site(x, anchor, lease, lease.sites[layer], MASK, H, [RANK, RANK])
        return add_product(result, low_q, anchor, lease, lease.sites["up"], in_place=False)

    def plain():
        return layer(x, result)[1] + 0 * layer(x, result)[2].sum()

    compare(layer, [x, result], fast, plain)


def test_all_gates_are_given_to_a_sink():
    layer, x = Layer("causal").double(), wide(B, T, D)
    lease, anchor = begin(Plan(layer.sites(), torch.float64, False))
    sink = []
    narrow_site(x, anchor, lease, lease.sites[layer], MASK, 0, [RANK, RANK], sink)
    expected = torch.stack(layer.gates(x), dim=2)
    assert (sink[0] - expected).abs().max() < 1e-12
    # A KV cache keeps them, and a later pass may have gradients for them.
    grads = [torch.autograd.grad(gates.square().sum(), x)[0] for gates in (sink[0], expected)]
    assert (grads[0] - grads[1]).abs().max() < 1e-12 < grads[1].abs().max()


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", ["post-LN", "pre-LN", "parallel"])
def test_a_bottleneck_with_the_norms_around_it(kind, pooling):
    layer = Adapter(pooling, "tanh").double()
    z, n = wide(B, T, D), wide(B, T, D)
    plan = Plan(layer.sites(affine=kind == "post-LN"), torch.float64, False)
    norm = {"post-LN": (1e-5, True), "pre-LN": (1e-5, False), "parallel": None}[kind]

    def fast():
        lease, anchor = begin(plan)
        given = n if norm is None else None
        return bottleneck(z, given, anchor, lease, lease.sites[layer], MASK, norm)

    def plain():
        if kind == "parallel":
            return layer(z, n)
        if kind == "pre-LN":
            return layer(z, nn.functional.layer_norm(z, [D]))
        return layer.norm(layer(z, layer.norm(z)))

    compare(layer, [z] if norm else [z, n], fast, plain)


@pytest.mark.parametrize("mixed", ["result", "input"])
def test_under_autocast_other_dtypes_are_kept(mixed):
    """Products are bfloat16; a float32 residual stream stays float32."""
    layer = Adapter("masked", "relu")
    plan = Plan(layer.sites(affine=True), torch.bfloat16, True)
    z = torch.randn(B, T, D, requires_grad=True)
    n = torch.randn(B, T, D, dtype=torch.bfloat16 if mixed == "result" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        lease, anchor = begin(plan)
        out = bottleneck(z, n, anchor, lease, lease.sites[layer], MASK)
    assert out.dtype == torch.float32
    assert (out - layer(z, n.float())).abs().max() < 0.05
    out.sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))
    assert layer.up.weight.grad.dtype == torch.float32


def test_a_gradient_that_needs_no_weights_leaves_nothing_behind():
    layer, x, result = Layer("masked").double(), wide(B, T, D), wide(B, T, D)
    plan = Plan(layer.sites(), torch.float64, False)
    lease, anchor = begin(plan)
    _, low_q, _ = narrow_site(x, anchor, lease, lease.sites[layer], MASK, H, [RANK, RANK])
    out = add_product(result, low_q, anchor, lease, lease.sites["up"], in_place=False).sum()
    (of_x,) = torch.autograd.grad(out, x, retain_graph=True)
    assert not lease.workspace.reached and of_x.abs().max() > 0
    out.backward()
    expected = Layer("masked").double()
    expected.load_state_dict(layer.state_dict())
    expected(x.detach(), result.detach())[1].sum().backward()
    assert torch.allclose(layer.query.weight.grad, expected.query.weight.grad)
    assert torch.allclose(layer.gate.bias.grad, expected.gate.bias.grad)


def test_a_second_backward_pass_through_a_kept_graph_doubles_the_gradients():
    layer, x = Layer("masked").double(), wide(B, T, D)
    lease, anchor = begin(Plan(layer.sites(), torch.float64, False))
    gate, *_ = narrow_site(x, anchor, lease, lease.sites[layer], MASK, H, [RANK, RANK])
    gate.sum().backward(retain_graph=True)
    once = layer.gate.weight.grad.clone()
    gate.sum().backward()
    assert once.abs().max() > 0 and torch.equal(layer.gate.weight.grad, 2 * once)


def test_second_derivatives_are_refused():
    layer, x = Layer("masked").double(), wide(B, T, D)
    lease, anchor = begin(Plan(layer.sites(), torch.float64, False))
    gate, *_ = narrow_site(x, anchor, lease, lease.sites[layer], MASK, H, [RANK, RANK])
    with pytest.raises(RuntimeError, match="leave out create_graph=True"):
        torch.autograd.grad(gate.sum(), x, create_graph=True)
