"""The state of DeepSpeed's ZeRO optimizers by the names of parameters.

ZeRO lays the parameters of a group one after another into a flat float32 tensor, shares it out to
the processes, and lets the optimizer step the share. A share holds a piece of each of some
parameters. Nothing else than these pieces moves, and only to rank 0.

This is the only file that uses private names of ZeRO's optimizers.
"""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from scaleup.backbone.sharded import set_values, whole_shape
from scaleup.backbone.weights import communication_device, from_first, is_alone
from scaleup.errors import CheckpointError, ConfigError
from scaleup.training.engines import (
    MASTER,
    Items,
    OptimizerState,
    as_tensor,
    hyperparameters,
    scalar,
    set_hyperparameters,
)

BATCH = 1 << 24  # weights whose pieces are collected at once


@dataclasses.dataclass
class Place:
    """Where a piece of a parameter is: `count` numbers of a flat tensor from `offset` on.

    The piece begins at the number `start` of the parameter.
    """

    group: int
    flat: torch.Tensor
    offset: int
    start: int
    count: int


class ZeroEngine:
    """ZeRO-1, 2 and 3, with and without offload to the CPU."""

    def __init__(self, engine: Any, model: nn.Module):
        self.zero, self.inner = engine.optimizer, engine.optimizer.optimizer
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.has_masters = any(p.dtype != torch.float32 for p in self.parameters.values())
        self.places = {name: self._place(p) for name, p in self.parameters.items()}
        self.world = 1 if is_alone() else dist.get_world_size()
        self.main = self.world == 1 or dist.get_rank() == 0
        numbers = {name: number for number, name in enumerate(self.parameters)}
        own = [
            (numbers[name], place.group, place.start, place.count)
            for name, place in self.places.items()
            if place is not None
        ]
        # For each rank, its pieces of each parameter, on rank 0.
        all_pieces: list[Any] = [own]
        if self.world > 1:
            all_pieces = [None] * self.world
            dist.gather_object(own, all_pieces if self.main else None, 0)
        self.pieces: list[dict[int, tuple[int, int]]] = []
        groups: dict[int, int] = {}
        if self.main:
            self.pieces = [
                {number: (start, count) for number, _, start, count in pieces}
                for pieces in all_pieces
            ]
            groups = {number: group for pieces in all_pieces for number, group, *_ in pieces}
        groups = from_first(groups)
        self.groups = {name: groups[number] for name, number in numbers.items()}
        self.batches = self._batches()
        self.longest = self._longest()

    def _place(self, parameter: Any) -> Place | None:
        """Return where this process has its piece of a parameter, if it has one."""
        if hasattr(parameter, "ds_id"):
            zero = self.zero
            part, offset, count = zero.grad_position[zero.get_param_id(parameter)]
            start = zero._get_param_partition_rank(parameter) * count
            count = max(0, min(count, parameter.ds_numel - start))  # without padding
            flat = zero.fp32_partitioned_groups_flat[part]
            return Place(zero.sub_group_to_group_id[part], flat, offset, start, count)
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        (flat,) = self.inner.param_groups[mapping.param_group_index]["params"]
        flat_address, address = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Place(
            mapping.param_group_index, flat, flat_address.start, address.start, address.numel
        )

    def _batches(self) -> list[list[str]]:
        """Return the names of parameters in batches of about `BATCH` weights."""
        batches: list[list[str]] = [[]]
        size = 0
        for name, parameter in self.parameters.items():
            if size >= BATCH:
                batches.append([])
                size = 0
            batches[-1].append(name)
            size += whole_shape(parameter).numel()
        return batches

    def _longest(self) -> list[int]:
        """Return the largest number of weights that a process has of each batch."""
        own = [sum(place.count for place in self._own(names)) for names in self.batches]
        if self.world == 1:
            return own
        lengths = torch.tensor(own, device=communication_device())
        dist.all_reduce(lengths, dist.ReduceOp.MAX)
        return lengths.tolist()

    def _own(self, names: list[str]) -> list[Place]:
        places = (self.places[name] for name in names)
        return [place for place in places if place is not None]

    def read(self) -> OptimizerState:
        state = OptimizerState(loss_scale=self._loss_scale())
        flats = [place.flat for place in self._own(list(self.parameters))]
        kept = self.inner.state.get(flats[0], {}) if flats else {}
        keys = [k for k, v in kept.items() if torch.is_tensor(v) and v.shape == flats[0].shape]
        keys = from_first([*[MASTER] * self.has_masters, *keys])
        for key in keys:
            for names, longest in zip(self.batches, self.longest):
                state.tensors |= self._collect(key, names, longest)
        if not self.main:
            return OptimizerState()
        for name, group in self.groups.items():
            place = self.places[name]
            flat = place.flat if place else self.inner.param_groups[group]["params"][0]
            for key, value in self.inner.state.get(flat, {}).items():
                if value is not None and key not in keys:
                    state.tensors[f"{key}/{name}"] = as_tensor(value)
                    state.scalars = sorted({*state.scalars, key})
        state.groups = [hyperparameters(group, names) for group, names in self._named_groups()]
        return state

    def _named_groups(self) -> list[tuple[dict[str, Any], list[str]]]:
        return [
            (group, [name for name, own in self.groups.items() if own == number])
            for number, group in enumerate(self.inner.param_groups)
        ]

    def _collect(self, key: str, names: list[str], longest: int) -> dict[str, torch.Tensor]:
        """Return whole tensors by key/name on rank 0, from the pieces of all processes."""
        pieces = []
        for place in self._own(names):
            source = place.flat if key == MASTER else self.inner.state[place.flat][key]
            pieces.append(source.detach().narrow(0, place.offset, place.count))
        device = torch.device("cpu") if self.world == 1 else communication_device()
        dtype = pieces[0].dtype if pieces else torch.float32
        sent = torch.zeros(longest, dtype=dtype, device=device)
        if pieces:
            joined = torch.cat(pieces)
            sent[: len(joined)].copy_(joined)
        received = [sent]
        if self.world > 1:
            received = [torch.empty_like(sent) for _ in range(self.world)] if self.main else []
            dist.gather(sent, received or None, 0)
        if not self.main:
            return {}
        numbers = {name: number for number, name in enumerate(self.parameters)}
        whole = {
            name: torch.zeros(whole_shape(self.parameters[name]), dtype=dtype) for name in names
        }
        for values, own in zip(received, self.pieces):
            values, read = values.cpu(), 0
            for name in names:
                if numbers[name] in own:
                    start, count = own[numbers[name]]
                    target = whole[name].view(-1)[start : start + count]
                    target.copy_(values[read : read + count])
                    read += count
        return {f"{key}/{name}": tensor for name, tensor in whole.items()}

    def write(self, items: Items, state: OptimizerState) -> None:
        for key, name, value in items:
            place = self.places[name]
            if key == MASTER:
                set_values(self.parameters[name], value)
            if place is None:
                continue
            kept = self.inner.state[place.flat]
            if key in state.scalars:
                number = scalar(self.inner, key, value)
                if key in kept and kept[key] != number:
                    problem = f"parameters that DeepSpeed steps as one have another {key!r} each"
                    raise CheckpointError(f"{problem}; resume without train.deepspeed")
                kept[key] = number
                continue
            target = place.flat.data
            if key != MASTER:
                target = kept.setdefault(key, torch.zeros_like(place.flat.data))
            piece = value.flatten()[place.start : place.start + place.count]
            target.narrow(0, place.offset, place.count).copy_(piece)
        self._place_numbers()
        set_hyperparameters(self._named_groups(), state.groups)
        self._set_loss_scale(state.loss_scale)

    def _place_numbers(self) -> None:
        """Move numbers to the GPU where torch's fused optimizers keep them."""
        for place in self._own(list(self.parameters)):
            group = self.inner.param_groups[place.group]
            if group.get("fused") or group.get("capturable"):
                kept = self.inner.state[place.flat]
                for key, value in kept.items():
                    if torch.is_tensor(value) and value.dim() == 0:
                        kept[key] = value.to(place.flat.device)

    def _set_loss_scale(self, stored: dict[str, float] | None) -> None:
        scaler: Any = getattr(self.zero, "loss_scaler", None)
        if getattr(scaler, "dynamic", False) and stored is not None:
            scaler.cur_scale, scaler.last_overflow_iter = stored["scale"], -1
            scaler.cur_iter = int(stored["good_steps"])
            scaler.cur_hysteresis = int(stored.get("hysteresis", scaler.delayed_shift))

    def _loss_scale(self) -> dict[str, float] | None:
        scaler: Any = getattr(self.zero, "loss_scaler", None)
        if not getattr(scaler, "dynamic", False):
            return None
        good_steps = scaler.cur_iter - scaler.last_overflow_iter - 1
        scale = {"scale": float(scaler.cur_scale), "good_steps": good_steps}
        return scale | {"hysteresis": scaler.cur_hysteresis}


def is_plain(engine: Any) -> bool:
    """Return whether a DeepSpeed engine steps whole parameters, as at ZeRO stage 0 in float32.

    Raises:
        ConfigError: DeepSpeed keeps the state in a way that has no names.
    """
    if engine.optimizer is engine.basic_optimizer:
        return True
    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    if not all(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in parameters):
        kind = type(engine.optimizer).__name__
        raise ConfigError(
            f"train.deepspeed: no checkpoint could store the state of DeepSpeed's {kind} by name;"
            " use ZeRO stage 1, 2 or 3"
        )
    return False
