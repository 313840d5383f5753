"""Finished runs as reports see them: what was trained, on what data, with which score."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from scaleup.errors import ConfigError
from scaleup.settings.data import GLUE_TASKS

NAMES = {
    "full": "Fine-tuning",
    "bitfit": "BitFit",
    "adapter": "Adapter",
    "prefix": "Prefix-tuning",
    "lora": "LoRA",
    "ap": "UniPELT (AP)",
    "ap_nogate": "UniPELT (AP), NoGate",
    "apl": "UniPELT (APL)",
    "apl_nogate": "UniPELT (APL), NoGate",
}
PARTS = ("adapter", "prefix", "lora")  # the submodules of the paper
FROZEN = "_frozen"  # the last part of a method's name if its head is not trained
UNKNOWN = "unknown (no config.yaml)"
TRIAL = re.compile(r"[\w.]+-[\w.]+-([\w.]+)-[\w.]+")  # task, k, method and seed of a sweep's trial
# Settings in which the runs of one table may differ.
AXES = (
    *("data.name", "data.k", "data.seed", "train.seed", "train.output_dir", "train.resume"),
    *("data.cache_dir", "data.workers"),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        folder: where the run was read from. For a row of a table it is TABLE.csv/TRIAL.
        results: the contents of results.json.
        settings: `section.key` → value; empty if the run has no config.yaml.
        facts: `timing.*` and `environment.*`, as far as they are known.
        variant: the sweep's name for this setting of the method, if it has several.
        by_training: whether some runs differ in the seed of training only.
    """

    folder: pathlib.Path
    results: dict[str, Any]
    settings: dict[str, Any]
    facts: dict[str, Any]
    variant: str = ""
    by_training: bool = False

    @property
    def row(self) -> str:
        """The row of a table: the method, and its setting if there are several."""
        return f"{self.method}: {self.variant}" if self.variant else self.method

    @property
    def method(self) -> str:
        """A key of NAMES, or a name built the same way, from what results.json says.

        It ends in FROZEN if the head was not trained.
        """
        method = self.results["method"]
        frozen = FROZEN * (method.get("head") == "frozen")
        if method["name"] != "unipelt":
            return method["name"] + frozen
        parts, learned = method["submodules"], method["gates"] == "learned"
        if len(parts) == 1:
            return parts[0] + "_gated" * learned + frozen
        letters = "".join(part[0] for part in PARTS if part in parts)
        names = [letters] * bool(letters) + [part for part in parts if part not in PARTS]
        return "+".join(names) + "_nogate" * (not learned) + frozen

    @property
    def task(self) -> str:
        """A GLUE task, or the first word of the folder's name for other data."""
        task = self.results["task"]
        return task if task in GLUE_TASKS else self.folder.name.partition("-")[0]

    @property
    def k(self) -> int | str:
        """The number of training examples, or "all"."""
        rows = self.results["examples"]["train"]  # None: a stream
        default = "all" if self.results["test_is_dev"] or rows is None else rows
        return self.settings.get("data.k", default)

    @property
    def seed(self) -> int | str:
        """The seed of sampling; that of training if nothing is sampled; both if both differ."""
        seeds = self.results["seeds"]
        if self.k == "all":
            return seeds["train"]
        return f"{seeds['data']} (training {seeds['train']})" if self.by_training else seeds["data"]

    @property
    def backbone(self) -> str:
        return self.settings.get("model.name", UNKNOWN)

    def points(self, split: str) -> float:
        """Return the task's metric on "test" or "dev" times 100; NaN if there is none.

        Raises:
            ConfigError: for a run that was scored by its loss, which tables do not show.
        """
        if self.results["metric"] == "loss":
            raise ConfigError(
                f"--runs: {self.folder} was scored by its loss, and tables and figures show "
                "scores; give its task a data.metric"
            )
        scores = self.results[split]
        return 100 * scores[self.results["metric"]] if scores is not None else math.nan


def method_of(row: str) -> str:
    """Return the method of a table's row."""
    return row.partition(": ")[0]


def name_of(row: str) -> str:
    """Return the title of a table's row."""
    method, _, variant = row.partition(": ")
    name = NAMES.get(method)
    if method.endswith(FROZEN):
        name = f"{name_of(method.removesuffix(FROZEN))}, frozen head"
    elif name is None:
        base = method.removesuffix("_nogate").removesuffix("_gated")
        letters, *others = base.split("+")
        if base in NAMES:
            name = NAMES[base]
        elif others or set(letters) <= set("apl"):
            name = f"UniPELT ({'+'.join([letters.upper(), *others])})"
        else:
            name = base.replace("_", " ").capitalize()
        name += {"_nogate": ", NoGate", "_gated": ", gated"}.get(method.removeprefix(base), "")
    return f"{name}: {variant}" if variant else name


def position(row: str) -> tuple[int, str]:
    """Return the key that sorts rows: as in NAMES, each frozen head below the trained one.

    Other methods, and settings of a method, follow in alphabetical order.
    """
    names = list(NAMES)
    base = row.removesuffix(FROZEN)
    return names.index(base) if base in names else len(names), row


def check_one_metric(runs: Sequence[Run]) -> None:
    """Raise ConfigError if the runs of a task were scored by several metrics."""
    metrics: dict[str, set[str]] = {}
    for run in runs:
        if run.results["metric"] != "loss":  # `Run.points` refuses it
            metrics.setdefault(run.task, set()).add(run.results["metric"])
    problems = [
        f"--runs: runs of {task} were scored by {' and '.join(sorted(names))}; "
        "give those of one metric"
        for task, names in metrics.items()
        if len(names) > 1
    ]
    if problems:
        raise ConfigError(problems)


def one_backbone(runs: Sequence[Run]) -> str:
    """Return the backbone of all runs. Raise ConfigError if there are several."""
    names = sorted({run.backbone for run in runs})
    if len(names) > 1:
        raise ConfigError(
            f"--runs: runs of {len(names)} backbones ({', '.join(names)}); give the folders of one"
        )
    return names[0] if names else UNKNOWN


def unique(runs: Sequence[Run], key: Callable[[Run], tuple[Any, ...]]) -> dict[Any, Run]:
    """Return key(run) → run. Raise ConfigError if two runs have the same key."""
    by_key: dict[Any, Run] = {}
    problems = []
    for run in runs:
        other = by_key.setdefault(key(run), run)
        if other is not run:
            problems.append(
                f"--runs: {run.folder} and {other.folder} are the same trial "
                f"({', '.join(map(str, key(run)))}); leave one out"
            )
    if problems:
        raise ConfigError(problems)
    return by_key


def differences(runs: Sequence[Run], shown: Sequence[str] = ()) -> list[str]:
    """Describe settings that differ between runs, other than those in `shown`.

    Returns:
        At most two sentences: one on settings in which runs of one method differ, and one on
        settings in which methods differ on the same examples, apart from the learning rate and the
        settings of `method`.
    """
    known = [run for run in runs if run.settings]
    table = pd.DataFrame(
        [{k: str(v) for k, v in run.settings.items() if v is not None} for run in known],
        dtype=object,
    ).fillna("not set")
    table = table.drop(columns=[*AXES, *shown], errors="ignore").sort_index(axis="columns")

    def differing(keys: Iterable[str], groups: Sequence[Any]) -> dict[str, list[str]]:
        values = {}
        for key in keys:
            counts = table[key].groupby(np.array(groups, dtype=str)).transform("nunique")
            values[key] = sorted(set(table[key][counts > 1]))
        return {key: several for key, several in values.items() if several}

    within = differing(table, [run.row for run in known])
    shared = [
        key
        for key in table
        if not key.startswith("method.") and key != "train.learning_rate" and key not in within
    ]
    between = differing(shared, [f"{run.task} {run.k}" for run in known])
    return [
        f"{subject} differ in "
        + "; ".join(f"{key} ({', '.join(values)})" for key, values in several.items())
        + "."
        for subject, several in (("Runs of one method", within), ("Methods", between))
        if several
    ]


def name_variants(runs: Sequence[Run]) -> list[Run]:
    """Set `variant` and `by_training` of runs that would be the same trial without them.

    Several settings of one method on the same examples, as in a sweep over learning rates, get
    the sweep's names.
    """
    matches = [TRIAL.fullmatch(run.folder.name) for run in runs]
    names = [match[1] if match else "" for match in matches]
    variants: dict[tuple[Any, ...], set[str]] = {}
    seeds: dict[tuple[Any, ...], set[int]] = {}
    for run, name in zip(runs, names):
        examples = (run.task, run.k, run.seed, run.method)
        seeds.setdefault((*examples, name), set()).add(run.results["seeds"]["train"])
        if name:
            variants.setdefault(examples, set()).add(name)
    by_training = any(len(numbers) > 1 for numbers in seeds.values())
    several = {examples[-1] for examples, used in variants.items() if len(used) > 1}
    variant_of = [name if run.method in several else "" for run, name in zip(runs, names)]
    return [
        dataclasses.replace(run, variant=variant, by_training=by_training)
        for run, variant in zip(runs, variant_of)
    ]
