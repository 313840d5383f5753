"""What the meters count: attention with shared keys, and live tensors."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from scaleup.experiments import meter


def test_live_bytes_leave_out_fake_tensors_that_a_compilation_left():
    before = meter.live_bytes()
    with FakeTensorMode():
        fake = torch.zeros(1000, 1000)
    real = torch.zeros(1000)
    assert fake.device.type == "cpu"
    assert 4 * 1000 <= meter.live_bytes() - before < 4 * 2000
    assert real.numel() == 1000


def test_attention_with_shared_keys_is_counted_in_both_passes():
    shared = (2, 2, 7, 8)
    assert meter._attention_flops((2, 4, 5, 8), shared, shared) == 2 * 2 * 4 * 5 * 7 * 16
    query, key = torch.randn(1, 4, 512, 64, requires_grad=True), torch.randn(1, 2, 512, 64)

    def attend() -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, key, enable_gqa=True)

    forward = meter.count_operations(lambda: attend().detach())
    both = meter.count_operations(lambda: attend().sum().backward())
    gflop = 4 * 4 * 512 * 512 * 64 / 1e9  # two products in the forward pass, five in the backward
    assert (forward["gflop"], both["gflop"]) == (round(gflop, 2), round(7 / 2 * gflop, 2))
    assert forward["gflop"] > 0
