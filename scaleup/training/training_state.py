"""What `checkpoint-N/` holds besides weights and log: the state that training continues from.

training_state.safetensors has one tensor for each part of the state, by name:

    exp_avg/NAME             a part of the optimizer's state of the parameter NAME; one number for
                             parts like `step`
    master/NAME              float32 values of a parameter that is trained in another type
    rng/RANK/GENERATOR       the random state of a process

training_state.json has the hyperparameters of the groups of parameters, the schedule, the loss
scale, and how many processes and examples a step had. Nothing depends on the engine or on the
number of processes.
"""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

import pydantic
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from scaleup.backbone.method import saved_parameters
from scaleup.backbone.sharded import whole_shape
from scaleup.backbone.weights import STATE, read_once, tensor_files
from scaleup.errors import CheckpointError
from scaleup.io import read_json, write_json
from scaleup.training import distributed
from scaleup.training.distributed import World
from scaleup.training.engines import MASTER, Engine, Items, OptimizerState
from scaleup.training.manifest import ALTERED
from scaleup.training.random_states import check_random_states, random_states

NUMBERS = "training_state.json"
RANDOM = "rng"
MOMENTS = (MASTER, "exp_avg", "exp_avg_sq", "momentum_buffer")  # have the shape of a parameter


class _Group(pydantic.BaseModel, strict=True, extra="allow"):
    names: list[str]
    lr: pydantic.FiniteFloat
    __pydantic_extra__: dict[str, pydantic.FiniteFloat | list[pydantic.FiniteFloat]]


class _LossScale(pydantic.BaseModel, strict=True):
    scale: float = pydantic.Field(gt=0)
    good_steps: int
    hysteresis: int | None = None


class TrainingState(pydantic.BaseModel, strict=True, extra="forbid"):
    """The content of training_state.json.

    Attributes:
        processes: the number of random states.
        examples: in one step of the optimizer.
        length_group: `batch_size` of the sampler, which the order of examples depends on.
        scalars: parts of the optimizer's state with one number for each parameter.
        schedule: state of the learning rate's schedule.
    """

    version: Literal[1] = 1
    processes: int = pydantic.Field(ge=1)
    examples: int = pydantic.Field(ge=1)
    length_group: int = pydantic.Field(ge=1)
    scalars: list[str]
    groups: list[_Group]
    schedule: dict[str, Any]
    loss_scale: _LossScale | None

    @property
    def optimizer(self) -> OptimizerState:
        """Everything of the optimizer but its tensors."""
        groups = [group.model_dump() for group in self.groups]
        scale = None
        if self.loss_scale is not None:
            scale = self.loss_scale.model_dump(exclude_none=True)
        return OptimizerState({}, self.scalars, groups, scale)


def save(folder: pathlib.Path, world: World, engine: Engine, copies: bool, **content: Any) -> None:
    """Write both files. Every process calls this.

    Args:
        copies: whether each host has a folder of its own, which gets copies.
        content: `examples`, `length_group` and `schedule` of the state.
    """
    state, states = engine.read(), distributed.gather(world, random_states())
    if world.main:
        folder.mkdir(parents=True, exist_ok=True)
        for rank, own in enumerate(states):
            state.tensors |= {f"{RANDOM}/{rank}/{name}": t for name, t in own.items()}
        save_file(state.tensors, folder / STATE)
        numbers = {"scalars": state.scalars, "groups": state.groups, "loss_scale": state.loss_scale}
        checked = TrainingState.model_validate(numbers | content | {"processes": world.size})
        write_json(folder / NUMBERS, checked.model_dump())
    if copies:
        distributed.copy_from_first(world, folder, "training_state.*")


def load(
    folder: pathlib.Path, world: World, engine: Engine, model: nn.Module, state: TrainingState
) -> dict[str, torch.Tensor]:
    """Write the optimizer's state into the engine, whose model has the checkpoint's weights.

    Rank 0 reads the files, and every process calls this.

    Returns:
        The random states that this process had, or {} if the number of processes has changed.
    """
    own_random: dict[str, torch.Tensor] = {}

    def items() -> Items:
        if engine.has_masters:  # the checkpoint may have been trained in float32
            names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
            saved = {n: names[id(p)] for n, p in saved_parameters(model).items() if p.requires_grad}
            for name, value in read_once(tensor_files(folder)):
                if name in saved:
                    yield MASTER, saved[name], value
        for entry, value in read_once([folder / STATE]):
            key, _, name = entry.partition("/")
            if key != RANDOM:
                yield key, name, value
                continue
            rank, _, generator = name.partition("/")
            if int(rank) == world.rank:
                own_random[generator] = value

    engine.write(items(), state.optimizer)
    return own_random if state.processes == world.size else {}


def read_state(folder: pathlib.Path) -> TrainingState:
    """Read training_state.json; raise CheckpointError if it is missing or damaged."""
    with named_damage(folder / NUMBERS) as path:
        return TrainingState.model_validate(read_json(path))


def check_tensors_of_state(folder: pathlib.Path, model: nn.Module, keys: set[str] | None) -> None:
    """Compare the optimizer's state with the model and the optimizer that will load it.

    Args:
        keys: the parts of the state that the optimizer has; None if they are not known.

    Raises:
        CheckpointError: the file is damaged, or is not of this model and optimizer.
    """
    path, state = folder / STATE, read_state(folder)
    shapes = {n: list(whole_shape(p)) for n, p in model.named_parameters() if p.requires_grad}
    try:
        grouped = [name for group in state.groups for name in group.names]
        if sorted(grouped) != sorted(shapes):
            raise damaged(folder / NUMBERS, "its groups have other parameters than the model")
        with safe_open(path, framework="pt") as file:
            found = set()
            for entry in file.keys():  # noqa: SIM118 (it is not a mapping)
                key, _, name = entry.partition("/")
                if key == RANDOM:
                    continue
                found.add(key)
                shape = file.get_slice(entry).get_shape()
                expected = [] if key in state.scalars else shapes.get(name)
                if name not in shapes or (key in (*MOMENTS, *state.scalars) and shape != expected):
                    raise ValueError(f"the model has no place for {entry} of shape {shape}")
            for rank in range(state.processes):
                prefix = f"{RANDOM}/{rank}/"
                names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
                check_random_states({n.removeprefix(prefix): file.get_tensor(n) for n in names})
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise damaged(path, "there is no such file") from None
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, KeyError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from None
    found.discard(MASTER)
    if keys is not None and found and found != keys:
        there, here = ", ".join(sorted(found)), ", ".join(sorted(keys)) or "nothing"
        raise CheckpointError(
            f"{path}: it is of another optimizer: it has {there}, and this one has {here}; resume"
            " with the same optimizer, or use train.resume=weights_only"
        )


def restore_schedule(schedule: Any, stored: dict[str, Any]) -> None:
    """Continue a schedule of learning rates.

    Lists have an entry for each group of parameters. Another engine may form other groups, and what
    these lists say follows from the settings.
    """
    now = schedule.state_dict()
    if now.keys() != stored.keys():
        raise CheckpointError(
            f"the schedule of the checkpoint has {', '.join(sorted(stored))}, and that of this run"
            f" {', '.join(sorted(now))}; use train.resume=weights_only"
        )
    fits = {
        key: value
        for key, value in stored.items()
        if not isinstance(value, list) or len(value) == len(now[key])
    }
    schedule.load_state_dict(now | fits)


def damaged(path: pathlib.Path, reason: str) -> CheckpointError:
    """Return the error about a file that no run has written so."""
    text = " ".join(reason.split())[:200]
    return CheckpointError(f"{path}: the file is damaged ({text}); {ALTERED}")


@contextlib.contextmanager
def named_damage(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Turn what reading and validating a JSON file raises into the error of `damaged`."""
    try:
        yield path
    except OSError as error:
        raise damaged(path, error.strerror or str(error)) from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except ValueError as error:
        raise damaged(path, str(error)) from None
