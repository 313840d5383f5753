"""Check trainer_state.json, before the run that continues from it writes anything.

Hashes reveal every accidental change. These checks are for state that was damaged before it was
hashed, or by a person who made the hashes fit.
"""

import pathlib
from typing import Any, NotRequired

import pydantic
from typing_extensions import TypedDict

from scaleup.io import read_json
from scaleup.training.training_state import named_damage

TRAINER_STATE = "trainer_state.json"


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
    with named_damage(folder / TRAINER_STATE) as path:
        content: dict[str, Any] = read_json(path)
        state = _TrainerState.model_validate(content)
        if not folder.name.endswith(f"-{state.global_step}"):
            raise ValueError(f"global_step is {state.global_step}")
        return content
