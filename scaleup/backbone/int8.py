"""A frozen int8 linear layer that ZeRO-3 can shard.

    W ≈ diag(s / 127) · Q,   s = max |W| per output row,   Q = round(127 W / s)

These are the numbers of `bitsandbytes.nn.Linear8bitLt`, quantised by bitsandbytes. That layer
cannot be sharded: it keeps a second reference to its weights, so every rank holds all of them. Here
the forward and backward pass read the parameter when they run and keep no reference to it, so that
ZeRO-3 can free the gathered weight between the two.

Shapes: O outputs, I inputs.
"""

import torch
from torch import nn

from scaleup.backbone.quantization import int8_product


class Int8Linear(nn.Linear):
    """y = x Wᵀ + b with frozen int8 W [O, I] and float32 row scales [O].

    The gradient flows to x and, if it requires one, to b.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype):
        """Create the layer on the meta device; `load_sharded` fills it."""
        super().__init__(in_features, out_features, bias, device="meta", dtype=dtype)
        weight = torch.empty(out_features, in_features, dtype=torch.int8, device="meta")
        scale = torch.empty(out_features, dtype=torch.float32, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = _FrozenMatmul.apply(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias.to(x.dtype)


def dequantize(weight_OI: torch.Tensor, scale_O: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight matrix [O, I] that an int8 weight and its row scales represent."""
    return weight_OI.to(dtype).mul_(scale_O.unsqueeze(1).mul(1.0 / 127.0))


class _FrozenMatmul(torch.autograd.Function):
    """Compute x Wᵀ.

    The parameters are kept as objects, not as saved tensors, because ZeRO-3 empties and refills
    their `.data`.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight_OI: nn.Parameter, scale_O: nn.Parameter):
        ctx.parameters = (weight_OI, scale_O)
        if x.device.type == "cuda":
            return int8_product(x, weight_OI.data, scale_O.data)
        return nn.functional.linear(x, dequantize(weight_OI.data, scale_O.data, x.dtype))

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight_OI, scale_O = ctx.parameters
        return grad @ dequantize(weight_OI.data, scale_O.data, grad.dtype), None, None


def replace_linears(model: nn.Module, skip: tuple[str, ...], dtype: torch.dtype) -> int:
    """Make every nn.Linear outside the modules in `skip` an empty `Int8Linear`; count them."""
    count = 0
    for name, module in list(model.named_modules()):
        skipped = any(name == other or name.startswith(f"{other}.") for other in skip)
        if type(module) is not nn.Linear or skipped:
            continue
        parent, _, child = name.rpartition(".")
        layer = Int8Linear(module.in_features, module.out_features, module.bias is not None, dtype)
        setattr(model.get_submodule(parent), child, layer.train(module.training))
        count += 1
    return count
