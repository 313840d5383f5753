"""Collect what the gates of a run do, by layer and submodule, by class and by example.

gates = from_results(run, "name")      mean and deviation over the dev set, from results.json
gates = from_pass(run, "name", "dev")  the gates of every example, from the run's best/
"""

import collections
import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scaleup.backbone import loading as backbone
from scaleup.backbone.lengths import fit_length
from scaleup.backbone.method import complete_config, load_run_model
from scaleup.backbone.precision import device_half_dtype
from scaleup.backbone.tokenizer import load_tokenizer
from scaleup.data import classification as data
from scaleup.data import tasks
from scaleup.data.examples import Examples
from scaleup.data.glue import GLUE
from scaleup.errors import CheckpointError, ConfigError
from scaleup.experiments.runs import Run
from scaleup.settings.data import DataSettings
from scaleup.settings.loading import override
from scaleup.settings.schema import Settings
from scaleup.training import checkpoint
from scaleup.training.callbacks import GateStatistics
from scaleup.training.run_settings import load_trained
from scaleup.unipelt.gate import LearnedGate, pool
from scaleup.unipelt.submodules import SUBMODULES

SPLITS = ("train", "dev", "test")
Site = tuple[str, str]  # module and submodule of a gate


@dataclasses.dataclass(frozen=True)
class Gates:
    """The gates of a run.

    Attributes:
        title: names the run and the examples.
        mean: mean over examples, with layers as index and submodules as columns (with the place in
            the layer, if a layer has several of a kind); NaN where there is no such gate.
        std: standard deviation over examples, in the same layout.
        each: values of every example [examples, layers, submodules]; None if they are not known.
        labels: the labels of the examples, texts for classes and numbers in a regression.
        texts: the texts of the examples.
    """

    title: str
    mean: pd.DataFrame
    std: pd.DataFrame
    each: np.ndarray | None = None
    labels: list[str | float] = dataclasses.field(default_factory=list)
    texts: list[str] = dataclasses.field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        """The sorted names of the classes; empty in a regression."""
        return sorted({label for label in self.labels if isinstance(label, str)})

    def of_class(self, label: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return mean and standard deviation over the examples of one class."""
        assert self.each is not None
        return _moments(self.each[[other == label for other in self.labels]], self.mean)


def _moments(values: np.ndarray, layout: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return mean and standard deviation over the first axis, as frames like `layout`."""
    mean = pd.DataFrame(values.mean(0), layout.index, layout.columns)
    return mean, pd.DataFrame(values.std(0), layout.index, layout.columns)


def layout(sites: Sequence[Site]) -> tuple[pd.DataFrame, dict[Site, tuple[int, int]]]:
    """Arrange gates by layer and submodule.

    The layer is the first number in a module's name. What precedes it distinguishes stacks, and
    what follows it distinguishes places in a layer.

    Returns:
        An empty frame of layers and submodules, and the position of each gate in it.
    """
    parsed = {}
    for module, part in sites:
        match = re.fullmatch(r"(?:(.*?)\.)??(\d+)\.(.*)", module)
        parsed[module, part] = match.groups("") if match is not None else (module, "", "")
    stacks = {stack for stack, _, _ in parsed.values()}
    in_layer = collections.Counter(
        (stack, number, part) for (_, part), (stack, number, _) in parsed.items()
    )
    in_several_places = {part for (_, _, part), count in in_layer.items() if count > 1}
    cells = {}
    for (module, part), (stack, number, place) in parsed.items():
        side = next((word for word in ("encoder", "decoder") if word in stack), stack)
        row = f"{side if len(stacks) > 1 else 'layer'} {number}".strip()
        cells[module, part] = (row, f"{part} {place}" if part in in_several_places else part)
    rows = list(dict.fromkeys(row for row, _ in cells.values()))
    order = {part: position for position, part in enumerate(SUBMODULES)}
    columns = sorted(
        dict.fromkeys(column for _, column in cells.values()),
        key=lambda column: order.get(column.partition(" ")[0], len(order)),
    )
    positions = {
        site: (rows.index(row), columns.index(column)) for site, (row, column) in cells.items()
    }
    return pd.DataFrame(np.nan, index=rows, columns=columns), positions


def from_results(run: Run, name: str) -> Gates:
    """Return the statistics that a run wrote about its development set.

    Raises:
        ConfigError: for a run without learned gates.
    """
    gates = _learned(run)
    mean, positions = layout([(module, part) for module, parts in gates.items() for part in parts])
    std = mean.copy()
    for (module, part), (i, j) in positions.items():
        mean.iat[i, j] = gates[module][part]["mean"]
        std.iat[i, j] = gates[module][part]["std"]
    return Gates(_title(run, name), mean, std)


def from_pass(run: Run, name: str, which: str, trusted: bool = False) -> Gates:
    """Load a run's best checkpoint and compute the gates of each example.

    Args:
        run: a run with learned gates whose folder still has best/.
        name: the run's name in the title.
        which: train, dev or test of the run's data, or a file with the same columns.
        trusted: whether code that comes with the backbone may run, if the run's config asks for it.

    Raises:
        PermissionMissing: the run's config asks for it, and `trusted` is False.
        ConfigError: if the checkpoint, the backbone or the data are missing or do not fit, or if
            the task is not classification or regression.
    """
    folder = run.folder
    _learned(run)
    absent = [entry for entry in ("best/", "config.yaml") if not (folder / entry).exists()]
    if absent:
        raise ConfigError(
            f"--run: {folder} has no {' and no '.join(absent)}, which a pass over data needs "
            "(a sweep keeps best/ with keep: best)"
        )
    overrides = [override("train.output_dir", folder)]
    try:
        manifest = checkpoint.verify(folder / "best")
        settings = load_trained(folder / "config.yaml", manifest, overrides, trusted)
    except CheckpointError as error:
        raise ConfigError(f"--run: {error}") from None
    if tasks.of(settings.data).module is not data:
        raise ConfigError(
            f"--run: {folder}: classes and examples are for classification and regression, not "
            f"{settings.data.resolved_task}"
        )
    trained_on, config = manifest.backbone, backbone.load_config(settings.model)
    if backbone.fingerprint(settings.model, config) != trained_on["fingerprint"]:
        raise ConfigError(
            f"--run: {folder}: {settings.model.name} is not the backbone that was trained on "
            f"({trained_on['name']}, {str(trained_on['fingerprint'])[:19]}…); put that one back"
        )
    settings = fit_length(settings, config)
    auto, labels = tasks.of(settings.data).auto, manifest.labels
    tokenizer = load_tokenizer(settings.model, config, auto)
    examples, split = _examples(settings.data, which)
    if which in SPLITS and data.provenance(examples) != manifest.data:
        raise ConfigError(
            f"--run: {folder}: the run's data has changed since; put it back, or name a file with "
            "--data"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    complete_config(settings, config, auto, labels)
    try:
        checkpoint.check_adapter_tensors(folder / "best", manifest, settings, config, auto)
    except CheckpointError as error:
        raise ConfigError(f"--run: {error}") from None
    model = load_run_model(settings, config, auto, labels, device, adapter=folder / "best").eval()
    chosen = getattr(examples, split)
    values = _values(model, settings, tokenizer, examples, split)
    frame, positions = layout(list(values))
    each = np.full((len(chosen), *frame.shape), np.nan)
    for site, (i, j) in positions.items():
        each[:, i, j] = values[site]
    names = examples.labels
    targets = chosen["label"] if names is None else [names[i] for i in chosen["label"]]
    roles = [role for role in ("text", "text_pair") if role in chosen.column_names]
    texts = [" | ".join(row[role] for role in roles) for row in chosen]
    examined = f"{which} set" if which in SPLITS else pathlib.Path(which).name
    title = f"{_title(run, name)}, {examined} ({len(chosen)} examples)"
    return Gates(title, *_moments(each, frame), each, list(targets), texts)


def _learned(run: Run) -> dict[str, dict[str, dict[str, float]]]:
    if not run.results["gates"]:
        raise ConfigError(f"--run: {run.folder} has no learned gates ({run.method})")
    return run.results["gates"]


def _examples(settings: DataSettings, which: str) -> tuple[Examples, str]:
    """Return the examples, and the name of the split to look at."""
    if which in SPLITS:
        examples = data.load(settings)
        if getattr(examples, which) is None:
            raise ConfigError(
                f"--data: the run has no {which} set; it takes {', '.join(SPLITS)} or a file"
            )
        return examples, which
    if not pathlib.Path(which).is_file():
        raise ConfigError(
            f"--data: there is no file {which}; it takes {', '.join(SPLITS)} or a file with the "
            "run's columns"
        )
    elsewhere = ("name", "path", "sources", "test_file", "validation_split", "test_split")
    changes: dict[str, Any] = dict.fromkeys(elsewhere)
    changes |= {"train_file": which, "validation_file": which}
    changes |= {"task": settings.resolved_task, "k": "all"}
    if settings.name:
        task = GLUE[settings.name]
        changes |= {"text_column": task.text, "text_pair_column": task.text_pair}
        changes["label_column"] = "label"
    try:
        return data.load(settings.model_copy(update=changes)), "dev"
    except ConfigError as error:  # a problem is reported for each setting that names the file
        texts = [problem.partition(": ")[2] or problem for problem in error.problems]
        raise ConfigError([f"--data: {text}" for text in dict.fromkeys(texts)]) from None


class _Recorder:
    """Keeps every example's gates, in the place of a gate's statistics."""

    def __init__(self) -> None:
        self.calls: list[torch.Tensor] = []

    def add(self, g_BTN: torch.Tensor, mask_BT: torch.Tensor | None) -> None:
        per_token = mask_BT if g_BTN.shape[1] > 1 else None
        self.calls.append(pool(g_BTN.detach().float(), "masked", per_token)[:, 0].cpu())


def _values(
    model: PreTrainedModel,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    split: str,
) -> dict[Site, np.ndarray]:
    """Return the values of each gate, one per example, in the order of the examples."""
    gates: list[tuple[str, LearnedGate]] = GateStatistics(model).gates
    recorders = {gate: _Recorder() for _, gate in gates}
    for gate, recorder in recorders.items():
        gate.statistics = recorder  # type: ignore[assignment]
    tokens = getattr(data.tokenize(examples, tokenizer, settings.data), split)
    order = np.argsort(tokens["length"], kind="stable").tolist()  # less padding
    loader = DataLoader(
        tokens.select(order),
        batch_size=settings.train.per_device_eval_batch_size,
        collate_fn=data.collator(tokenizer, settings.data),
    )
    sites = [(module, part) for module, gate in gates for part in gate.names]
    values = {site: np.empty(len(order)) for site in sites}
    device, start = model.device, 0
    half = device_half_dtype(settings, device)
    for batch in loader:
        inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        autocast = torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None)
        with torch.no_grad(), autocast:
            model(**inputs)
        end = start + len(batch["input_ids"])
        for module, gate in gates:
            # A layer that is called many times, as in ALBERT, has the mean over its calls.
            mean = torch.stack(recorders[gate].calls).mean(dim=0).numpy()
            recorders[gate].calls.clear()
            for i, part in enumerate(gate.names):
                values[module, part][order[start:end]] = mean[:, i]
        start = end
    return values


def _title(run: Run, name: str) -> str:
    return f"{name}: {run.task}, K = {run.k}, {run.method}"
