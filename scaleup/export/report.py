"""Options of an export, its inputs, and the content of its export.json."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from scaleup.data import tasks
from scaleup.errors import ConfigError
from scaleup.export.kinds import KINDS
from scaleup.settings.schema import Settings
from scaleup.training.manifest import Manifest
from scaleup.unipelt.config import UniPeltConfig


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What to export and how. `scaleup export --help` describes each option.

    Attributes:
        kind: one of KINDS.
        examples: number of examples that the export depends on; None: the default of the kind.
        calibrate: "dev", "test" or a file with the columns of the run's data.
        max_shard_bytes: largest size of a weights file.
        metric: what to score instead of the run's metric.
        max_memory_bytes: memory of the device that weights may take while the export is measured;
            None: most of what is free. The rest waits in the memory of the host or in files.
        trust_remote_code: allow code that comes with the backbone, if the run's config asks for it.
        rank: rank of the updates that absorb UniPELT.
        epochs: passes over the training examples for the predictions with these updates.
    """

    checkpoint: pathlib.Path
    kind: str
    output: pathlib.Path
    config: pathlib.Path | None = None
    backbone: str | None = None
    calibrate: str = "dev"
    examples: int | None = None
    prune: float = 0.0
    dtype: str | None = None
    max_shard_bytes: int = 2 * 10**9
    verify: bool = True
    max_metric_drop: float = 1.0
    metric: str | None = None
    max_memory_bytes: int | None = None
    trust_remote_code: bool = False
    rank: int = 32
    epochs: int = 3

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"--kind: {self.kind} is none of {', '.join(KINDS)}")

    @property
    def absorbs(self) -> bool:
        """Return whether the effect of UniPELT is absorbed into low-rank updates."""
        return KINDS[self.kind].absorbs

    @property
    def resolved_examples(self) -> int:
        """Return the number of examples that the export depends on."""
        return self.examples or (1024 if self.absorbs else 256)


@dataclasses.dataclass(frozen=True)
class Export:
    """What an export is made from.

    Attributes:
        settings: settings of the run.
        manifest: manifest of the adapter checkpoint.
        config: config of the backbone, with the run's labels and pad token.
        tokenizer: tokenizer of the checkpoint.
        adapter: config of the adapter, its prefix without the MLP.
        tensors: tensors of the adapter.
        say: prints a line about the progress.
    """

    options: ExportOptions
    settings: Settings
    manifest: Manifest
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    adapter: UniPeltConfig
    tensors: dict[str, torch.Tensor]
    say: Callable[[str], None]

    @property
    def auto(self) -> type:
        """Return transformers' AutoModelFor… class of the task."""
        return tasks.of(self.settings.data).auto

    @property
    def has_constants(self) -> bool:
        """Return whether a folder is written whose gates are constants."""
        no_gates = self.options.kind == "standalone" and self.adapter.gates == "none"
        return self.options.kind == "merged" or no_gates

    @property
    def needs_calibration(self) -> bool:
        """Return whether the export depends on data."""
        learned = self.adapter.gates == "learned"
        return self.options.kind == "merged" and (learned or self.options.prune > 0)

    @property
    def dtype(self) -> torch.dtype:
        """Return the data type of the exported weights, by default the one that the run stored."""
        run_dtype = self.settings.model.dtype
        name = self.options.dtype or self.manifest.backbone.get("dtype")
        if name is None:  # of a checkpoint of an earlier version
            name = "float32" if run_dtype == "auto" else run_dtype
        return getattr(torch, name)


@dataclasses.dataclass(frozen=True)
class GateReport:
    """A gate over the calibration data.

    Attributes:
        mean, spread: mean and standard deviation over examples.
        dropped: whether the submodule is left out at this site.
        effect: norm of the submodule's change, relative to the value that it changes; None if it
            was not measured.
    """

    site: str
    part: str
    mean: float
    spread: float
    dropped: bool
    effect: float | None


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The measurement of gates that are replaced by constants."""

    data: str
    examples: int
    prune: float
    gates: list[GateReport]


@dataclasses.dataclass(frozen=True)
class Absorption:
    """The low-rank updates that stand for UniPELT.

    Attributes:
        examples: number of training examples that they were fitted to.
        unused: how many of them the run did not train on, because data.k left them out.
        unexplained: share of the squared change of each block's output that least squares left.
        losses: mean difference of the predictions in each epoch after that: KL divergence, or the
            squared error of a regression.
    """

    rank: int
    examples: int
    unused: int
    unexplained: dict[str, float]
    losses: list[float]


@dataclasses.dataclass(frozen=True)
class Metric:
    """The metric of the trained model and of the export: in points, or a loss as it is."""

    name: str
    before: float
    after: float

    @property
    def drop(self) -> float:
        """What the export loses, in points. A loss that rises by 0.01 is one point."""
        return 100 * (self.after - self.before) if self.name == "loss" else self.before - self.after

    @property
    def shown(self) -> tuple[str, str]:
        """Both scores as texts."""
        digits = 4 if self.name == "loss" else 2
        return f"{self.before:.{digits}f}", f"{self.after:.{digits}f}"


@dataclasses.dataclass(frozen=True)
class Proof:
    """The comparison of the trained model ("before") with the export ("after").

    Attributes:
        reload_difference: largest difference from the logits that the export must give.
        logit_difference: "max" and "mean" difference from the logits of the trained model.
        agreement: share of examples with the same class or text, None where there are neither.
    """

    data: str
    examples: int
    reload_difference: float
    logit_difference: dict[str, float]
    metric: Metric
    agreement: float | None
    milliseconds_per_batch: dict[str, float]
    peak_memory_mib: dict[str, float]


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What an export is and what was measured of it.

    Attributes:
        gates: "learned"; "frozen" if constants replace them; "absorbed" if updates replace UniPELT.
        remote_code: whether the folder contains modelling code.
        dtype: data type of the backbone's weights, None for an exact export.
        calibration: None if nothing depends on data.
        bytes: size of the "weights" and of the "checkpoint".
        proof: None if the export was not verified.
    """

    kind: str
    checkpoint: str
    backbone: dict[str, str | None]
    gates: str
    remote_code: bool
    dtype: str | None
    calibration: Calibration | None
    bytes: dict[str, int]
    peak_memory_mib: dict[str, float]
    versions: dict[str, str | None]
    proof: Proof | None = None
    absorption: Absorption | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the content of export.json, which leaves out what was not measured."""
        content = dataclasses.asdict(self)
        for name in ("proof", "absorption"):
            if content[name] is None:
                del content[name]
        for gate in content["calibration"]["gates"] if self.calibration else []:
            if gate["effect"] is None:
                del gate["effect"]
        return content
