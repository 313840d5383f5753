"""Low-rank updates of the linear layers of a backbone, and the least squares of one.

    y = W x + B A x                                        A: [rank, in], B: [out, rank]

Shapes: N tokens, I inputs, O outputs, R rank.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, Self

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from scaleup.unipelt.peft_names import BaseTunerLayer

# Added to the diagonal of a covariance, relative to its mean, because inputs are correlated.
RIDGE = 1e-3
DOWN, UP = ".A", ".B"  # endings of the names in the file of updates


class LowRank(nn.Module):
    """One update. It starts as LoRA does, with B at zero."""

    def __init__(self, inputs: int, outputs: int, rank: int, device: torch.device):
        super().__init__()
        self.A_RI = nn.Parameter(torch.empty(rank, inputs, device=device))
        self.B_OR = nn.Parameter(torch.zeros(outputs, rank, device=device))
        nn.init.kaiming_uniform_(self.A_RI, a=5**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low_rank = nn.functional.linear(x.to(self.A_RI.dtype), self.A_RI)
        return nn.functional.linear(low_rank, self.B_OR)

    def set(self, A_RI: torch.Tensor, B_OR: torch.Tensor) -> None:
        """Set the product B A, with both factors scaled to the same size for further training."""
        sizes_R = A_RI.norm(dim=1), B_OR.norm(dim=0)
        if not (sizes_R[0] * sizes_R[1]).sum() > 0:
            return  # nothing to add
        balance_R = (sizes_R[1] / sizes_R[0].clamp_min(1e-12)).sqrt().clamp_min(1e-12)
        with torch.no_grad():
            self.A_RI.copy_(A_RI * balance_R[:, None])
            self.B_OR.copy_(B_OR / balance_R)


@dataclasses.dataclass
class Regression:
    """Sums over tokens for the least squares of one linear layer.

    Attributes:
        xx_II: sum of x xᵀ.
        xy_IO: sum of x yᵀ, where y is what the update should add.
    """

    xx_II: torch.Tensor
    xy_IO: torch.Tensor

    @classmethod
    def zeros(cls, inputs: int, outputs: int, device: torch.device) -> Self:
        shapes = (inputs, inputs), (inputs, outputs)
        return cls(*(torch.zeros(*shape, device=device) for shape in shapes))

    def add(self, x_NI: torch.Tensor, y_NO: torch.Tensor) -> None:
        """Add tokens."""
        x_NI = x_NI.float()
        self.xx_II.addmm_(x_NI.t(), x_NI)
        self.xy_IO.addmm_(x_NI.t(), y_NO.float())

    def solve(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A [R, I] and B [O, R] with the least squared error among updates of that rank.

        Reduced-rank regression (Izenman 1975): the unrestricted solution M [I, O], projected onto
        the leading eigenvectors V of the covariance Mᵀ XᵀX M of its values, so BA = V Vᵀ Mᵀ.
        """
        xx_II = self.xx_II.double()
        xx_II.diagonal().add_(RIDGE * xx_II.diagonal().mean().clamp_min(1e-12))
        m_IO = torch.linalg.solve(xx_II, self.xy_IO.double())
        eigenvectors_OO = torch.linalg.eigh(m_IO.t() @ xx_II @ m_IO).eigenvectors
        v_OR = eigenvectors_OO[:, -min(rank, len(xx_II)) :]
        return (m_IO @ v_OR).t().float(), v_OR.float()


def sizes(module: Any) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a linear layer."""
    module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return module.in_features, module.out_features


class Student:
    """The bare backbone of a trained model, with an update of each of its linear layers.

    It lives in the modules of the trained model and shares their weights and head.

    Args:
        model: the trained model.
        updates: the updates, by the paths of the layers in the backbone.
    """

    def __init__(self, model: PeftModel, updates: dict[str, LowRank]):
        self.model, self.updates, self.on = model, updates, False
        base = model.get_base_model()
        for name, update in updates.items():
            base.get_submodule(name).register_forward_hook(self._hook(update))

    @classmethod
    def untrained(
        cls, model: PeftModel, names: Iterable[str], rank: int, device: torch.device
    ) -> Self:
        """Return a student whose updates are zero."""
        base, updates = model.get_base_model(), {}
        for name in names:
            inputs, outputs = sizes(base.get_submodule(name))
            updates[name] = LowRank(inputs, outputs, min(rank, inputs, outputs), device)
        return cls(model, updates)

    @classmethod
    def load(cls, model: PeftModel, path: pathlib.Path, device: torch.device) -> Self:
        """Return the student whose updates are in a file."""
        updates = {}
        for name, (A_RI, B_OR) in read_updates(path).items():
            update = LowRank(A_RI.shape[1], B_OR.shape[0], len(A_RI), device)
            with torch.no_grad():
                update.A_RI.copy_(A_RI)
                update.B_OR.copy_(B_OR)
            updates[name] = update
        return cls(model, updates)

    def save(self, path: pathlib.Path) -> None:
        """Write the updates to a file."""
        tensors = {name + DOWN: update.A_RI.detach() for name, update in self.updates.items()}
        tensors |= {name + UP: update.B_OR.detach() for name, update in self.updates.items()}
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, str(path))

    def _hook(self, update: LowRank) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> Any:
            return output + update(args[0]).to(output.dtype) if self.on else None

        return add

    @contextlib.contextmanager
    def active(self) -> Iterator[PeftModel]:
        """Make the model compute what the student does, inside the block."""
        # PEFT's disable_adapter() would put the untrained head in place as well.
        layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        self.on = True
        try:
            yield self.model
        finally:
            self.on = False
            for layer in layers:
                layer.enable_adapters(True)


def read_updates(path: pathlib.Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return A [R, I] and B [O, R] of each linear layer from a file of updates."""
    tensors = load_file(str(path))
    names = [name.removesuffix(DOWN) for name in tensors if name.endswith(DOWN)]
    return {name: (tensors[name + DOWN], tensors[name + UP]) for name in names}
