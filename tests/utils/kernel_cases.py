"""Inputs of the Triton kernels, and comparisons with the formulas that they implement."""

import dataclasses
from typing import Any

import torch

from scaleup.unipelt.kernels import reference

# Largest error of a result, relative to the largest element of the expected one.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclasses.dataclass(frozen=True)
class Merge:
    """Sizes and features of one call of the merge kernels, in the legend of reference.py."""

    batch: int
    heads: int
    groups: int
    queries: int
    size: int
    length: int
    gate: str = "none"  # or "example", "token", "head"
    dropout: float = 0.0

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
        """Return the arguments of both kernels.

        Queries and gradients are transposed views, as in a model. The log-sum-exp has more columns
        than queries. One query has no keys, marked by +inf and NaN, and another one by -inf.
        """
        torch.manual_seed(0)
        shape = self.batch, self.queries, self.heads, self.size

        def wide(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, device=device).to(dtype)

        gate = {
            "none": None,
            "example": torch.rand(self.batch, 1, 1, device=device),
            "token": torch.rand(self.batch, 1, self.queries, device=device),
            "head": torch.rand(self.batch, self.heads, self.queries, device=device),
        }[self.gate]
        keep = None
        if self.dropout:
            keep = torch.rand(*shape[:1], *shape[2:0:-1], self.length, device=device) > self.dropout
        lse = torch.randn(self.batch, self.heads, self.queries + 3, device=device)
        out = wide(self.batch, self.heads, self.queries, self.size)
        lse[0, 0, 0], out[0, 0, 0] = torch.inf, torch.nan
        lse[-1, -1, self.queries - 1] = -torch.inf
        return dict(
            query=wide(*shape).transpose(1, 2),
            out=out,
            lse=lse,
            prefix=wide(2, self.groups, self.length, self.size),
            gate=gate if gate is None else gate.expand(self.batch, self.heads, self.queries),
            grad_out=wide(*shape).transpose(1, 2),
            grad_query=wide(*shape).transpose(1, 2),
            scale=self.size**-0.5,
            keep=keep,
            dropout=self.dropout,
        )


@dataclasses.dataclass(frozen=True)
class Narrow:
    """Sizes and features of one call of the narrow kernels, in the legend of reference.py."""

    batch: int
    tokens: int
    rank: int
    gates: int
    width: int  # of z
    v_width: int
    mask: torch.dtype | None = None
    causal: bool = False
    activation: str = "none"
    ones_column: bool = False
    selected: int = 0
    handed_out: int = 0
    grads: tuple[int, ...] = ()  # columns of each gradient of v
    heads: int = 0  # of the gradient of a gate; 0 if there is none

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
        """Return the arguments of both kernels; a mask leaves out the first two tokens."""
        torch.manual_seed(0)
        columns, mask = self.rank + self.gates, None
        if self.mask is not None:
            mask = torch.rand(self.batch, self.tokens, device=device) > 0.3
            mask[0, :2] = False
            mask = mask.to(self.mask)
        grad_gate = None
        if self.heads:
            grad_gate = torch.randn(self.batch, self.tokens, self.heads, device=device)
            grad_gate = grad_gate.transpose(1, 2)
        return dict(
            z=torch.randn(self.batch, self.tokens, self.width, device=device).to(dtype),
            bias=torch.randn(columns, device=device),
            scales=torch.rand(self.gates, device=device) + 0.5,
            mask=mask,
            grads_v=[
                torch.randn(self.batch * self.tokens, n, device=device).to(dtype)
                for n in self.grads
            ],
            grad_gate=grad_gate,
            grad_bias=torch.randn(self.batch, columns + 5, device=device)[:, :columns],
        )

    @property
    def options(self) -> tuple[Any, ...]:
        return self.causal, self.activation, self.ones_column


# The sites of the four sizes of DESIGN: BERT-base with 256 and 16 examples, BART-large, Llama 8B.
MERGE_SIZES = {
    "bert-256": Merge(256, 12, 12, 128, 64, 10, "example"),
    "bert-16": Merge(16, 12, 12, 128, 64, 10, "example", dropout=0.1),
    "bart": Merge(32, 16, 16, 128, 64, 10, "token", dropout=0.1),
    "llama": Merge(1, 32, 8, 2048, 128, 10, "token"),
}
_ATTENTION: dict[str, Any] = dict(selected=1, handed_out=0, grads=(8, 8))
_BLOCK: dict[str, Any] = dict(ones_column=True, grads=(56,))
NARROW_SIZES = {
    "bert-256": Narrow(256, 128, 16, 2, 24, 16, torch.int64, heads=12, **_ATTENTION),
    "bert-256-block": Narrow(256, 128, 48, 1, 56, 56, torch.int64, activation="relu", **_BLOCK),
    "bert-16": Narrow(16, 128, 16, 2, 24, 16, torch.int64, heads=12, **_ATTENTION),
    "bart": Narrow(32, 128, 16, 2, 24, 16, torch.bool, causal=True, heads=16, **_ATTENTION),
    "llama": Narrow(1, 2048, 16, 2, 24, 16, causal=True, heads=32, **_ATTENTION),
    "llama-block": Narrow(1, 2048, 48, 1, 56, 56, causal=True, activation="relu", **_BLOCK),
}


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, name: str
) -> None:
    """Compare, relative to the largest element of the expected tensor."""
    assert actual.shape == expected.shape, name
    if expected.numel():
        scale = expected.abs().max().clamp(min=1e-3)
        error = ((actual.float() - expected.float()).abs().max() / scale).item()
        assert error < TOLERANCES[dtype], f"{name}: {error:.1e}"  # false for NaN


def widened(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return copies of the inputs with float32 in place of shorter types."""

    def copy(value: Any) -> Any:
        if isinstance(value, list):
            return [copy(item) for item in value]
        if not isinstance(value, torch.Tensor):
            return value
        return value.float().clone() if value.is_floating_point() else value

    return {name: copy(value) for name, value in inputs.items()}


def compare_merge(kernels: Any, inputs: dict[str, Any], dtype: torch.dtype) -> None:
    """Assert that `kernels.merge_forward` and `kernels.merge_backward` equal the formulas."""
    expected = widened(inputs)

    def forward(functions: Any, x: dict[str, Any]) -> None:
        functions.merge_forward(
            *(x[name] for name in ("query", "out", "lse", "prefix", "gate", "scale")),
            *(x["keep"], x["dropout"]),
        )

    def backward(functions: Any, x: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        parts, grad_gate = functions.merge_backward(
            *(x[name] for name in ("query", "out", "lse", "prefix", "gate", "grad_out")),
            *(x["grad_query"], x["scale"], x["keep"], x["dropout"]),
        )
        return parts.sum(dim=0), grad_gate

    forward(kernels, inputs)
    forward(reference, expected)
    for name in ("out", "lse"):
        assert_close(inputs[name], expected[name], dtype, name)
    # Both backward passes get the same output of the forward pass.
    expected["out"], expected["lse"] = inputs["out"].float(), inputs["lse"]
    results, expected_results = backward(kernels, inputs), backward(reference, expected)
    assert results[0].dtype == torch.float32
    for name, result, other in zip(("parts", "grad_gate"), results, expected_results):
        assert_close(result, other, dtype, name)
    assert_close(inputs["grad_query"], expected["grad_query"], dtype, "grad_query")


def compare_narrow(kernels: Any, case: Narrow, inputs: dict[str, Any], dtype: torch.dtype) -> None:
    """Assert that `kernels.narrow_forward` and `kernels.narrow_backward` equal the formulas."""
    expected = widened(inputs)

    def forward(functions: Any, x: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return functions.narrow_forward(
            *(x["z"], x["bias"], x["scales"], x["mask"], case.selected),
            *(*case.options, case.v_width),
        )

    def backward(functions: Any, x: dict[str, Any], gates: torch.Tensor) -> torch.Tensor:
        return functions.narrow_backward(
            *(x["z"], x["bias"], x["scales"], x["mask"], gates, x["grads_v"], x["grad_gate"]),
            *(x["grad_bias"], case.selected, case.handed_out, *case.options),
        )

    v, gates = forward(kernels, inputs)
    expected_v, expected_gates = forward(reference, expected)
    assert v.dtype == dtype and gates.dtype == torch.float32
    assert_close(v, expected_v, dtype, "v")
    assert_close(gates, expected_gates, torch.float32, "gates")
    grad_z = backward(kernels, inputs, gates)
    expected_grad_z = backward(reference, expected, expected_gates)
    assert grad_z.dtype == dtype
    assert_close(grad_z, expected_grad_z, dtype, "grad_z")
    assert_close(inputs["grad_bias"], expected["grad_bias"], torch.float32, "grad_bias")
