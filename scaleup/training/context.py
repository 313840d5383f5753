"""What is known about a run before its model is loaded."""

import dataclasses
import pathlib

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase, TrainingArguments

from scaleup.data import tasks
from scaleup.data.examples import Examples
from scaleup.settings.schema import Settings
from scaleup.training.distributed import World
from scaleup.training.manifest import Manifest


@dataclasses.dataclass(frozen=True)
class Run:
    """A run whose data is tokenized and whose arguments are complete."""

    settings: Settings
    world: World
    shared: bool  # whether all hosts see one output folder
    config: PretrainedConfig
    half: torch.dtype | None  # of mixed precision; None for float32
    examples: Examples
    tokenizer: PreTrainedTokenizerBase
    args: TrainingArguments
    manifest: Manifest

    @property
    def out(self) -> pathlib.Path:
        return pathlib.Path(self.settings.train.output_dir)

    @property
    def writes(self) -> bool:
        return self.world.writes(self.shared)

    @property
    def task(self) -> tasks.Task:
        return tasks.of(self.settings.data)

    @property
    def generation(self) -> dict[str, int] | None:
        """The arguments of `generate` in evaluation; None if the metric needs no text."""
        return tasks.generation(self.settings.data, self.examples.metric)
