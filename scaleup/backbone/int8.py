"""A frozen linear layer in int8 that ZeRO-3 shards, which bitsandbytes' own cannot be: it keeps a second reference to its
weights, so every rank holds them whole.

    W ≈ diag(s / 127) · Q,   s = max |W| per output row,   Q = round(127 W / s)

The same numbers as `bitsandbytes.nn.Linear8bitLt`, quantised by bitsandbytes itself. Forward and backward read the
parameter at the time they run and keep no reference to it: between the two ZeRO-3 frees the gathered weight.

Shapes: O outputs, I inputs.
"""

import torch
from torch import nn

OUTLIER = 6.0  # bitsandbytes' threshold: on a GPU, input columns beyond it are multiplied in half precision


class Int8Linear(nn.Linear):
    """y = x Wᵀ + b with frozen int8 W [O, I] and float32 row scales [O]. The gradient goes through to x and, if it trains, to b."""

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype):
        """Empty: weights come from `quantise`."""
        super().__init__(in_features, out_features, bias, device="meta", dtype=dtype)
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, dtype=torch.int8, device="meta"),
            requires_grad=False,
        )
        self.scale = nn.Parameter(
            torch.empty(out_features, dtype=torch.float32, device="meta"), requires_grad=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = _FrozenMatmul.apply(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias.to(x.dtype)


def quantise(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 weight and float32 row scales of a weight matrix, as bitsandbytes computes them (through float16)."""
    from bitsandbytes.functional import int8_vectorwise_quant  # an optional package

    weight_int8_OI, scale_O, _ = int8_vectorwise_quant(weight_OI.to(torch.float16))
    return weight_int8_OI, scale_O


def dequantise(weight_OI: torch.Tensor, scale_O: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight matrix [O, I] that the int8 one stands for."""
    return weight_OI.to(dtype).mul_(scale_O.unsqueeze(1).mul(1.0 / 127.0))


class _FrozenMatmul(torch.autograd.Function):
    """x Wᵀ. The parameters are kept as objects, not as saved tensors: ZeRO-3 empties and refills their `.data`."""

    @staticmethod
    def forward(
        ctx, x: torch.Tensor, weight_OI: nn.Parameter, scale_O: nn.Parameter
    ) -> torch.Tensor:
        ctx.parameters = (weight_OI, scale_O)
        if x.device.type != "cuda":
            return nn.functional.linear(x, dequantise(weight_OI.data, scale_O.data, x.dtype))
        from bitsandbytes.functional import int8_vectorwise_quant

        flat = x.reshape(-1, x.shape[-1])
        x_int8, x_scale, outliers = int8_vectorwise_quant(flat.to(torch.float16), threshold=OUTLIER)
        out, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
            flat, x_int8, weight_OI.data, x_scale, scale_O.data, outliers, None
        )
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight_OI, scale_O = ctx.parameters
        return grad @ dequantise(weight_OI.data, scale_O.data, grad.dtype), None, None


def replace_linears(model: nn.Module, skip: tuple[str, ...], dtype: torch.dtype) -> int:
    """Puts an empty `Int8Linear` for every nn.Linear outside the modules named in `skip`, as bitsandbytes would. Returns how many."""
    count = 0
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or any(
            name == s or name.startswith(s + ".") for s in skip
        ):
            continue
        parent, _, child = name.rpartition(".")
        new = Int8Linear(module.in_features, module.out_features, module.bias is not None, dtype)
        setattr(model.get_submodule(parent), child, new.train(module.training))
        count += 1
    return count
