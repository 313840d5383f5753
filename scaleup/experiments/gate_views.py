"""What a run's gates do: layer × submodule, by class and by example. From the statistics in results.json, or a pass over data.

    view = from_results(run, "name")          mean and spread over the dev set, as the run wrote them
    view = from_pass(run, "name", "dev")      the gates of every example: the best bundle, loaded as a user loads it

A gate stands in a row (its layer) and a column (its submodule, and its place where a layer has several of a kind).
"""

import collections
import dataclasses
import pathlib
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from scaleup import errors
from scaleup.backbone import loading as backbone
from scaleup.backbone.method import load_run_model
from scaleup.backbone.precision import device_half_dtype
from scaleup.data import classification as data
from scaleup.data import tasks
from scaleup.data.files import Examples
from scaleup.errors import ConfigError
from scaleup.experiments.results import Run
from scaleup.settings.loading import override
from scaleup.settings.schema import DataSettings, Settings
from scaleup.settings.schema import load as load_config
from scaleup.training import checkpoint
from scaleup.training.console import GateStatistics
from scaleup.unipelt.config import SUBMODULES
from scaleup.unipelt.gate import LearnedGate, pool

SPLITS = ("train", "dev", "test")


@dataclasses.dataclass(frozen=True)
class View:
    """Gates of a run. mean, spread: [rows, columns], NaN where there is no such gate. each: [examples, rows, columns], None where
    only the run's own statistics are there; labels and texts are those of the examples."""

    title: str
    rows: list[str]
    columns: list[str]
    mean: np.ndarray
    spread: np.ndarray
    each: np.ndarray | None = None
    labels: list[str | float] = dataclasses.field(default_factory=list)
    texts: list[str] = dataclasses.field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        """In the order of their names; none in a regression."""
        return sorted({label for label in self.labels if isinstance(label, str)})

    def of_class(self, label: str) -> np.ndarray:
        """Means [rows, columns] over the examples of one class."""
        return self.each[[other == label for other in self.labels]].mean(axis=0)


def places(
    sites: Sequence[tuple[str, str]],
) -> tuple[list[str], list[str], dict[tuple[str, str], tuple[int, int]]]:
    """FusedQKVLayout, columns, and where each gate stands. sites: (module, submodule), in the model's order.

    The layer is the first number in a module's name; what stands before it tells stacks apart, what follows places in a layer.
    """
    parsed = {}
    for site, part in sites:
        found = re.search(r"(?:^|\.)(\d+)\.", site)
        parsed[site, part] = (
            (site[: found.start()], found[1], part, site[found.end() :])
            if found
            else (site, "", part, "")
        )
    stacks = list(dict.fromkeys(stack for stack, *_ in parsed.values()))
    in_layer = collections.Counter(
        (stack, number, part) for stack, number, part, _ in parsed.values()
    )
    crowded = {part for (_, _, part), count in in_layer.items() if count > 1}

    def row(stack: str, number: str) -> str:
        kind = (
            next((word for word in ("encoder", "decoder") if word in stack), stack)
            if len(stacks) > 1
            else "layer"
        )
        return f"{kind} {number}".strip()

    rows = list(dict.fromkeys(row(stack, number) for stack, number, *_ in parsed.values()))
    named = {
        key: (row(stack, number), f"{part} {place}" if part in crowded else part)
        for key, (stack, number, part, place) in parsed.items()
    }
    order = {part: i for i, part in enumerate(SUBMODULES)}
    columns = sorted(
        dict.fromkeys(column for _, column in named.values()),
        key=lambda column: order[column.partition(" ")[0]],
    )
    return rows, columns, {key: (rows.index(r), columns.index(c)) for key, (r, c) in named.items()}


def from_results(run: Run, name: str) -> View:
    """name: of the run, in the title. Raises ConfigError for a run without learned gates."""
    gates = run.results["gates"]
    if not gates:
        raise ConfigError(f"--run: {run.folder} has no learned gates ({run.method})")
    rows, columns, where = places([(site, part) for site, parts in gates.items() for part in parts])
    mean, spread = (np.full((len(rows), len(columns)), np.nan) for _ in range(2))
    for (site, part), (i, j) in where.items():
        mean[i, j], spread[i, j] = gates[site][part]["mean"], gates[site][part]["std"]
    return View(_title(run, name), rows, columns, mean, spread)


class _Values:
    """In the place of GateMoments: keeps every example's value instead of their sum."""

    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []

    def add(self, g_BTN: torch.Tensor, mask_BT: torch.Tensor | None) -> None:
        per_token = mask_BT if g_BTN.shape[1] > 1 else None
        self.found.append(pool(g_BTN.detach().float(), "masked", per_token)[:, 0].cpu())


def from_pass(run: Run, name: str, which: str) -> View:
    """name: of the run, in the title. which: train, dev or test of the run's own data, or a file with the same columns.

    Raises ConfigError where the run has no best bundle, the file does not fit, or the task has nothing to classify.
    """
    folder = run.folder
    if not run.results["gates"]:
        raise ConfigError(f"--run: {folder} has no learned gates ({run.method})")
    lacks = [name for name in ("best/", "config.yaml") if not (folder / name).exists()]
    if lacks:
        raise ConfigError(
            f"--run: {folder} has no {' and no '.join(lacks)}, which a pass over data needs (a sweep keeps best/ with keep: best)"
        )
    settings = load_config(
        str(folder / "config.yaml"), ["train.resume=auto", override("train.output_dir", folder)]
    )
    if tasks.of(settings.data).writes:
        raise ConfigError(
            f"--run: {folder}: classes and examples are for classification and regression, not {tasks.name_of(settings.data)}"
        )
    try:
        manifest = checkpoint.verify(folder / "best")
    except errors.CheckpointError as error:
        raise ConfigError(f"--run: {error}") from None
    labels, then, config = (
        manifest["labels"],
        manifest["backbone"],
        backbone.load_config(settings.model),
    )
    if backbone.fingerprint(settings.model, config) != then["fingerprint"]:
        raise ConfigError(
            f"--run: {folder}: {settings.model.name} is not the backbone that was trained on ({then['name']}, {then['fingerprint'][:19]}…); put that one back"
        )
    settings = backbone.fit_length(settings, config)
    tokenizer = backbone.load_tokenizer(settings.model, config)
    examples, split = _examples(settings.data, which)
    if which in SPLITS and data.provenance(examples) != manifest["data"]:
        raise ConfigError(
            f"--run: {folder}: the run's data has changed since; put it back, or name a file with --data"
        )
    chosen = getattr(examples, split)
    said = (
        chosen["label"]
        if examples.labels is None
        else [examples.labels[i] for i in chosen["label"]]
    )
    texts = [
        " | ".join(chosen[role][i] for role in ("text", "text_pair") if role in chosen.column_names)
        for i in range(len(chosen))
    ]
    values, order = _pass(settings, config, labels, folder / "best", tokenizer, examples, split)
    rows, columns, where = places(list(values))
    each = np.full((len(chosen), len(rows), len(columns)), np.nan)
    for key, (i, j) in where.items():
        each[order, i, j] = values[key]
    of = f"{which} set" if which in SPLITS else pathlib.Path(which).name
    return View(
        f"{_title(run, name)}, {of} ({len(chosen)} examples)",
        rows,
        columns,
        each.mean(axis=0),
        each.std(axis=0),
        each,
        said,
        texts,
    )


def _examples(settings: DataSettings, which: str) -> tuple[Examples, str]:
    """The examples to look at, and their name among the splits."""
    if which in SPLITS:
        examples = data.load(settings)
        if getattr(examples, which) is None:
            raise ConfigError(
                f"--data: the run has no {which} set; it takes {', '.join(SPLITS)} or a file"
            )
        return examples, which
    if not pathlib.Path(which).is_file():
        raise ConfigError(
            f"--data: there is no file {which}; it takes {', '.join(SPLITS)} or a file with the run's columns"
        )
    columns = (
        dict(zip(("text_column", "text_pair_column"), data.GLUE[settings.name]))
        | {"label_column": "label"}
        if settings.name
        else {}
    )
    own = {
        "name": None,
        "path": None,
        "task": tasks.name_of(settings),
        "train_file": which,
        "validation_file": which,
        "test_file": None,
        "k": "all",
    }
    try:
        return data.load(settings.model_copy(update=columns | own)), "dev"
    except (
        ConfigError
    ) as error:  # each said twice, of the two settings that the file stands for here
        raise ConfigError(
            list(
                dict.fromkeys(
                    f"--data: {problem.partition(': ')[2] or problem}" for problem in error.problems
                )
            )
        ) from None


def _pass(
    settings: Settings,
    config,
    labels: list[str] | None,
    bundle: pathlib.Path,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    split: str,
) -> tuple[dict[tuple[str, str], np.ndarray], list[int]]:
    """(module, submodule) → the gate of each example [examples], and which example each is; short ones go together."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = device_half_dtype(settings, device)
    auto = tasks.of(settings.data).auto
    model = load_run_model(settings, config, auto, labels, device, adapter=bundle).eval()
    gates: dict[str, LearnedGate] = GateStatistics(model).gates
    for gate in gates.values():
        gate.statistics = _Values()
    tokens = getattr(data.tokenize(examples, tokenizer, settings.data), split)
    order = np.argsort(tokens["length"], kind="stable").tolist()
    collate = data.collator(tokenizer, settings.data)
    loader = DataLoader(
        tokens.select(order),
        batch_size=settings.train.per_device_eval_batch_size,
        collate_fn=collate,
    )
    found: dict[str, list[torch.Tensor]] = {site: [] for site in gates}
    with (
        torch.no_grad(),
        torch.autocast(device.type, dtype=half or torch.bfloat16, enabled=half is not None),
    ):
        for batch in loader:
            model(**{name: value.to(device) for name, value in batch.items() if name != "labels"})
            for (
                site,
                gate,
            ) in gates.items():  # ALBERT's one layer is called many times: the mean over its calls
                found[site].append(torch.stack(gate.statistics.found).mean(dim=0))
                gate.statistics.found.clear()
    values = {site: torch.cat(parts).numpy() for site, parts in found.items()}
    return {
        (site, part): values[site][:, i]
        for site, gate in gates.items()
        for i, part in enumerate(gate.names)
    }, order


def _title(run: Run, name: str) -> str:
    return f"{name}: {run.task}, K = {run.k}, {run.method}"
