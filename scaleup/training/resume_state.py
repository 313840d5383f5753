"""Check the state beside the weights that a run continues from, before the run writes anything.

Hashes reveal every accidental change. These checks are for state that was damaged before it was
hashed, or by a person who made the hashes fit: Trainer would skip a missing file silently, and fail
in the middle of its start at a damaged one. No pickled code is executed.
"""

import pathlib
import random
import re
import warnings
from collections.abc import Callable
from typing import Any, NotRequired

import numpy as np
import pydantic
import torch
from transformers.trainer_pt_utils import safe_globals
from typing_extensions import TypedDict

from scaleup.backbone.sharded import STATE_CLASSES
from scaleup.errors import CheckpointError
from scaleup.io import read_bytes, read_json
from scaleup.training.manifest import ALTERED, Manifest

TRAINER_STATE = "trainer_state.json"
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
LATEST = "latest"  # DeepSpeed's file with the name of the folder that it loads
SCALER = "scaler.pt"
# Trainer would load these in place of the weights that a run saves, which are safetensors.
OTHER_WEIGHTS = ("pytorch_model*", "adapter_model.bin")
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # tensors with the shape of a parameter


class _Attributes(TypedDict):
    early_stopping_patience_counter: NotRequired[int]


class _Callback(TypedDict):
    args: NotRequired[dict[str, Any]]
    attributes: _Attributes


class _LogLine(TypedDict):
    step: int
    loss: NotRequired[float]


class _TrainerState(pydantic.BaseModel, strict=True):
    """The entries of trainer_state.json that a resumed run depends on."""

    global_step: int = pydantic.Field(ge=0)
    max_steps: int
    epoch: float
    best_global_step: int | None
    best_metric: float | None
    log_history: list[_LogLine]
    stateful_callbacks: dict[str, _Callback | list[_Callback]]


def trainer_state(folder: pathlib.Path) -> dict[str, Any]:
    """Return what Trainer stores beside the weights: step, best step, early stopping.

    Raises:
        CheckpointError: the file is missing or damaged, or is of another step.
    """
    path = folder / TRAINER_STATE
    try:
        content = read_json(path)
        state = _TrainerState.model_validate(content)
        if not folder.name.endswith(f"-{state.global_step}"):
            raise ValueError(f"global_step is {state.global_step}")
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise _damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    return content


def check_state(folder: pathlib.Path, manifest: Manifest, fp16: bool = False) -> None:
    """Read the state of optimizer, schedule and random numbers in `checkpoint-N/` once.

    Args:
        fp16: whether the run that loads it scales its loss.

    Raises:
        CheckpointError: a file is missing or damaged, or is none of a run.
    """
    trainer_state(folder)
    for path in (path for pattern in OTHER_WEIGHTS for path in folder.glob(pattern)):
        raise CheckpointError(f"{path}: no run saves weights in such a file; {ALTERED}")
    if (folder / SCALER).exists() and not fp16:
        raise CheckpointError(f"{folder / SCALER} is of a run with train.fp16; set it to true")
    names = ["rng_state.pth"]
    if manifest.run["processes"] > 1:  # a host may have its own files only
        names = sorted(path.name for path in folder.glob("rng_state_*.pth")) or ["rng_state_0.pth"]
    checks: dict[str, Callable[[Any], None]] = dict.fromkeys(names, _try_random_state)
    checks[SCHEDULER] = _try_scheduler
    if manifest.run["zero_stage"] == 0 and not (folder / LATEST).exists():
        checks[OPTIMIZER] = _try_optimizer
    else:
        _check_deepspeed(folder)
        if not (folder / SCHEDULER).exists():
            del checks[SCHEDULER]  # DeepSpeed has saved its own schedule
    for name, check in checks.items():
        _load(folder / name, check)


def _check_deepspeed(folder: pathlib.Path) -> None:
    """Check that DeepSpeed finds its files and executes nothing but its own classes of state."""
    try:
        name = read_bytes(folder / LATEST).decode("utf-8").strip()
    except (OSError, ValueError) as error:
        raise _damaged(folder / LATEST, str(error)) from None
    files = sorted((folder / name).glob("*.pt")) if re.fullmatch(r"global_step\d+", name) else []
    if not files:
        raise _damaged(folder / LATEST, f"it names {name!r:.40}, which has no files")
    for path in files:
        try:
            classes = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except Exception as error:  # a damaged pickle can raise anything
            raise _damaged(path, f"{type(error).__name__}: {error}") from None
        if classes - STATE_CLASSES:
            unknown = min(classes - STATE_CLASSES)
            raise _damaged(path, f"loading it would execute {unknown}, which is not DeepSpeed's")


def check_optimizer(folder: pathlib.Path, groups: list[dict[str, Any]]) -> None:
    """Compare the stored state of the optimizer with the optimizer that will load it.

    Args:
        groups: the optimizer's parameter groups.

    Raises:
        CheckpointError: they have other parameters or hyperparameters.
    """

    def check(state: Any) -> None:
        stored = state["param_groups"]
        sizes = [len(group["params"]) for group in stored]
        if sizes != [len(group["params"]) for group in groups]:
            raise ValueError(f"it has {sizes} parameters in its groups")
        for now, then in zip(groups, stored):
            for key, value in now.items():
                if key != "params" and not _is_like(then[key], value):
                    raise ValueError(f"{key} is {then[key]!r:.40}")
            for index, parameter in zip(then["params"], now["params"]):
                moments = state["state"].get(index, {})
                for name in MOMENTS:
                    if name in moments and moments[name].shape != parameter.shape:
                        shape = list(moments[name].shape)
                        raise ValueError(f"{name} of parameter {index} has the shape {shape}")

    _load(folder / OPTIMIZER, check)


def _is_like(value: object, current: object) -> bool:
    """Return whether a stored hyperparameter has the type of the current one."""
    if isinstance(current, int | float):
        return isinstance(value, int | float | torch.Tensor)
    if isinstance(current, tuple | list):
        if not isinstance(value, tuple | list) or len(value) != len(current):
            return False
        return all(_is_like(*pair) for pair in zip(value, current))
    return value is None or current is None or isinstance(value, type(current))


def _load(path: pathlib.Path, check: Callable[[Any], None]) -> None:
    """Load a file without executing code, and apply a check to its content."""
    try:
        with safe_globals(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the unpickler, about files that are refused anyway
            check(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise _damaged(path, "there is no such file") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise _damaged(path, f"{type(error).__name__}: {error}") from None


def _damaged(path: pathlib.Path, reason: str) -> CheckpointError:
    text = " ".join(reason.split())[:200]
    return CheckpointError(f"{path}: the file is damaged ({text}); {ALTERED}")


def _try_random_state(state: Any) -> None:
    random.Random().setstate(state["python"])
    np.random.RandomState().set_state(state["numpy"])
    torch.Generator().set_state(state["cpu"])


def _try_scheduler(state: Any) -> None:
    if not isinstance(state["last_epoch"], int) or state["last_epoch"] < 0:
        raise ValueError("last_epoch is no number of steps")
    if not all(isinstance(rate, int | float) for rate in state.get("base_lrs", [])):
        raise ValueError("base_lrs are no numbers")


def _try_optimizer(state: Any) -> None:
    groups, states = state["param_groups"], state["state"]
    indices = [index for group in groups for index in group["params"]]
    if not groups or not all(isinstance(entry, dict) for entry in states.values()):
        raise ValueError("it has no states")
    if not states.keys() <= set(indices):
        raise ValueError("it has states of unknown parameters")
