"""The optimizer's state by the names of parameters, whatever holds it: the interface of engines.

    state = engine.read()                  after a step: whole tensors, on rank 0
    engine.write(items, state)             into an engine that has made no step yet

A checkpoint stores what `read` returns, so a run continues with another number of processes or
another engine. `PlainEngine` serves one process and DDP, `scaleup.training.zero_state` DeepSpeed.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn

from scaleup.errors import CheckpointError, ConfigError

MASTER = "master"  # the key of float32 values of parameters that are trained in another type
Items = Iterable[tuple[str, str, torch.Tensor]]  # key, name of the parameter, whole tensor


@dataclasses.dataclass
class OptimizerState:
    """What a checkpoint stores of an optimizer.

    Attributes:
        tensors: key/name of the parameter → whole tensor on the CPU; {} on other ranks than 0.
        scalars: the keys with one number per parameter, such as `step`.
        groups: `names` of the parameters in each group, and its hyperparameters that are numbers.
        loss_scale: of float16.
    """

    tensors: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    scalars: list[str] = dataclasses.field(default_factory=list)
    groups: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    loss_scale: dict[str, float] | None = None


class Engine(Protocol):
    """What an engine has to offer. All processes call its methods."""

    has_masters: bool
    """Whether parameters are trained in another type than float32."""

    def read(self) -> OptimizerState:
        """Return the state of every trained parameter."""

    def write(self, items: Items, state: OptimizerState) -> None:
        """Continue from a state, whose tensors every process receives one by one from `items`."""


class PlainEngine:
    """The optimizer steps whole parameters, as in one process and under DDP."""

    has_masters = False

    def __init__(self, model: nn.Module, optimizer: Any, scaler: Any, main: bool):
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.names = {id(p): name for name, p in self.parameters.items()}
        self.optimizer = getattr(optimizer, "optimizer", optimizer)  # without Accelerate's wrapper
        self.scaler, self.main = scaler, main

    def read(self) -> OptimizerState:
        if not self.main:
            return OptimizerState()
        state = OptimizerState(loss_scale=self._loss_scale())
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                if value is None:
                    continue
                if is_number(value, parameter) and key not in state.scalars:
                    state.scalars.append(key)
                state.tensors[f"{key}/{self.names[id(parameter)]}"] = as_tensor(value)
        state.groups = [
            hyperparameters(group, [self.names[id(p)] for p in group["params"]])
            for group in self.optimizer.param_groups
        ]
        return state

    def write(self, items: Items, state: OptimizerState) -> None:
        found: dict[str, dict[str, Any]] = {name: {} for name in self.parameters}
        for key, name, value in items:
            if key == MASTER:
                self.parameters[name].data.copy_(value)
            elif key in state.scalars:
                found[name][key] = scalar(self.optimizer, key, value)
            else:
                found[name][key] = value
        groups = [
            (group, [self.names[id(p)] for p in group["params"]])
            for group in self.optimizer.param_groups
        ]
        order = [name for _, names in groups for name in names]
        content = self.optimizer.state_dict()
        content["state"] = {i: found[name] for i, name in enumerate(order) if found[name]}
        self.optimizer.load_state_dict(content)  # moves tensors to the devices of parameters
        set_hyperparameters(
            [(g, names) for g, (_, names) in zip(self.optimizer.param_groups, groups)], state.groups
        )
        if self.scaler is not None and state.loss_scale is not None:
            now = self.scaler.state_dict()
            kept = {"scale": state.loss_scale["scale"]}
            kept["_growth_tracker"] = int(state.loss_scale["good_steps"])
            self.scaler.load_state_dict(now | kept)

    def _loss_scale(self) -> dict[str, float] | None:
        if self.scaler is None:
            return None
        now = self.scaler.state_dict()
        return {"scale": now["scale"], "good_steps": now["_growth_tracker"]}


def is_number(value: Any, parameter: torch.Tensor) -> bool:
    """Return whether a part of an optimizer's state is one number, not one for each weight."""
    return not torch.is_tensor(value) or (value.dim() == 0 and parameter.dim() > 0)


def as_tensor(value: torch.Tensor | float) -> torch.Tensor:
    """Return a part of an optimizer's state as a tensor on the CPU that tells float from int."""
    if torch.is_tensor(value):
        value = value.detach().cpu().contiguous()
        return value if value.dim() else value.clone()  # files hold no tensor twice
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def scalar(optimizer: Any, key: str, value: torch.Tensor) -> Any:
    """Return a number as an optimizer keeps it: torch's as a tensor, others as Python's."""
    if type(optimizer).__module__.startswith("torch.optim"):
        return value.to(torch.float32)
    if key == "step" or value.dtype == torch.int64:
        return int(value)
    return float(value) if value.dtype == torch.float64 else value


def hyperparameters(group: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Return the numbers among the hyperparameters of a group, and the names of its parameters."""
    found: dict[str, Any] = {"names": names}
    for key, value in group.items():
        if key != "params" and _is_numeric(value):
            found[key] = (
                list(map(float, value)) if isinstance(value, tuple | list) else float(value)
            )
    return found


def _is_numeric(value: Any) -> bool:
    """Return whether a hyperparameter is a fractional number, or several.

    Whole numbers and truth values choose between implementations.
    """
    if isinstance(value, tuple | list):
        return bool(value) and all(_is_numeric(entry) for entry in value)
    return isinstance(value, float) or (torch.is_tensor(value) and value.dim() == 0)


def set_hyperparameters(
    groups: list[tuple[dict[str, Any], list[str]]], stored: list[dict[str, Any]]
) -> None:
    """Set the hyperparameters of groups to those that their parameters had.

    Args:
        groups: the groups of an optimizer, each with the names of its parameters.
    """
    by_name = {name: group for group in stored for name in group["names"]}
    for group, names in groups:
        for key, now in group.items():
            values = [by_name[name][key] for name in names if key in by_name[name]]
            if key == "params" or not _is_numeric(now) or not values:
                continue
            if any(value != values[0] for value in values):
                problem = f"the parameters of one group had several values of {key}"
                raise CheckpointError(f"{problem}; use train.resume=weights_only")
            if torch.is_tensor(now):
                now.fill_(values[0])
            else:
                group[key] = type(now)(values[0])


def state_keys(optimizer: Any, whole: bool) -> set[str]:
    """Return the keys of an optimizer's state, after a step that changes no parameter.

    Args:
        whole: whether every tensor must have one number for each weight, as DeepSpeed's flat
            partitions need it.

    Raises:
        ConfigError: the state has parts that a checkpoint cannot store by name.
    """
    parameters = sorted(
        (p for group in optimizer.param_groups for p in group["params"]), key=lambda p: p.numel()
    )
    smallest = {p.dim(): p for p in reversed(parameters)}.values()
    values = [p.detach().clone() for p in smallest]
    for parameter in smallest:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    keys = set()
    for parameter, value in zip(smallest, values):
        parameter.data.copy_(value)
        parameter.grad = None
        for key, part in optimizer.state[parameter].items():
            if part is None:
                continue
            fits = isinstance(part, int | float) if not torch.is_tensor(part) else True
            if whole and fits and not is_number(part, parameter):
                fits = part.shape == parameter.shape
            if not fits:
                kind = "has another shape than its parameter" if torch.is_tensor(part) else "is "
                kind += "" if torch.is_tensor(part) else f"a {type(part).__name__}"
                raise ConfigError(
                    f"train.optim: {key!r} in the state of {type(optimizer).__name__} {kind}, so"
                    " that no checkpoint could store it by name; choose another, like adamw_torch"
                )
            keys.add(key)
    return keys
