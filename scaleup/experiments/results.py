"""Finished runs as a report sees them: what was trained, on what, from which seed, with which score. Read from what runs left.

runs = load([folder])        every results.json below, with the config.yaml and timing.json beside it
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import pydantic
import yaml

from scaleup.errors import ConfigError
from scaleup.settings.loading import flat
from scaleup.settings.rules import ASIDE
from scaleup.settings.schema import GLUE_TASKS
from scaleup.unipelt.config import SUBMODULES

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
UNKNOWN = "unknown (no config.yaml)"
CELL = re.compile(
    r"[\w.]+-[\w.]+-([\w.]+)-[\w.]+"
)  # a sweep's folder of a run: task, k, method, seed
AXES = (
    "data.name",
    "data.k",
    "data.seed",
    "train.seed",
    "train.output_dir",
    "train.resume",
)  # what runs of one table differ in


class _Part(pydantic.BaseModel, strict=True):
    """Of results.json, what reports read."""


class _Moments(_Part):
    mean: float
    std: float


class _Seeds(_Part):
    data: int
    train: int


class _Examples(_Part):
    train: int


class _Method(_Part):
    name: Literal["unipelt", "full", "bitfit"]
    submodules: list[Literal[SUBMODULES]] = []
    gates: str = ""


class _Counts(_Part):
    stored: int
    stored_percent: float


class _Results(_Part):
    task: str
    metric: str
    dev: dict[str, Any] | None
    test: dict[str, Any] | None
    test_is_dev: bool
    seeds: _Seeds
    examples: _Examples
    method: _Method
    parameters: _Counts
    gates: dict[str, dict[Literal[SUBMODULES], _Moments]]

    @pydantic.model_validator(mode="after")
    def _scored(self) -> "_Results":
        for split, scores in (("dev", self.dev), ("test", self.test)):
            score = None if scores is None else scores.get(self.metric)
            if scores is not None and (
                isinstance(score, bool) or not isinstance(score, int | float) or math.isinf(score)
            ):
                raise ValueError(f"{split} has no {self.metric} that is a number")
        if self.method.name == "unipelt" and not (self.method.submodules and self.method.gates):
            raise ValueError("method has no submodules or no gates")
        return self


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run. method: one of NAMES, or put together the same way. k: training examples, or "all". backbone: UNKNOWN where
    the run's config is not there. settings: `section.key` → value, empty without that config. variant: what a sweep calls this setting of
    the method, where it has several. by_training: runs of the same examples are there that differ in the seed of training."""

    folder: pathlib.Path
    results: dict[str, Any]
    settings: dict[str, Any]
    seconds: float | None
    variant: str = ""
    by_training: bool = False

    @property
    def row(self) -> str:
        """What it stands under in a table: the method, and which setting of it if there are several."""
        return f"{self.method}: {self.variant}" if self.variant else self.method

    @property
    def method(self) -> str:
        """What was trained, from what the run says it trained, whatever its folder is called."""
        said = self.results["method"]
        if said["name"] != "unipelt":
            return said["name"]
        parts, learned = said["submodules"], said["gates"] == "learned"
        if len(parts) == 1:
            return parts[0] + "_gated" * learned
        return "".join(part[0] for part in SUBMODULES if part in parts) + "_nogate" * (not learned)

    @property
    def task(self) -> str:
        """A GLUE task; of other data, the folder's first word."""
        return (
            self.results["task"]
            if self.results["task"] in GLUE_TASKS
            else self.folder.name.partition("-")[0]
        )

    @property
    def k(self) -> int | str:
        return self.settings.get(
            "data.k", "all" if self.results["test_is_dev"] else self.results["examples"]["train"]
        )

    @property
    def seed(self) -> int | str:
        """That of the choice of examples; with all of them, that of training. Both, where the first does not tell runs apart."""
        seeds = self.results["seeds"]
        return (
            f"{seeds['data']} (training {seeds['train']})"
            if self.by_training and self.k != "all"
            else seeds["train" if self.k == "all" else "data"]
        )

    @property
    def backbone(self) -> str:
        return self.settings.get("model.name", UNKNOWN)

    def points(self, split: str) -> float:
        """The task's metric on "test" or "dev", times 100. Raises ConfigError where a run was scored by its loss, of which less is better."""
        if self.results["metric"] == "loss":
            raise ConfigError(
                f"--runs: {self.folder} was scored by its loss, and tables and figures show scores; give its task a data.metric"
            )
        return 100 * self.results[split][self.results["metric"]]


def method_of(row: str) -> str:
    """The method of `Run.row`."""
    return row.partition(": ")[0]


def name_of(row: str) -> str:
    """As a table shows it."""
    method, _, variant = row.partition(": ")
    letters, _, rest = method.partition("_")
    name = (
        NAMES.get(method)
        or (NAMES.get(letters) or f"UniPELT ({letters.upper()})")
        + {"": "", "nogate": ", NoGate", "gated": ", gated"}[rest]
    )
    return f"{name}: {variant}" if variant else name


def load(folders: Iterable[str]) -> list[Run]:
    """The finished runs below the folders, in the order of their names; a folder without any may hold results files of any name.
    What a run that was continued under other settings has set aside does not count.

    Raises ConfigError with all problems: no such folder, no results in it, damaged files.
    """
    runs, problems = [], []
    for folder in map(pathlib.Path, folders):
        every = (
            path
            for path in folder.rglob("results.json")
            if not any(ASIDE.fullmatch(part) for part in path.relative_to(folder).parts)
        )
        files = sorted(every) or sorted(folder.glob("*.json"))
        if not files:
            problems.append(
                f"--runs: {folder} has no results.json; it takes the output folder of a sweep or a run"
            )
        for path in files:
            try:
                runs.append(read(path))
            except ConfigError as error:
                problems += error.problems
    if problems:
        raise ConfigError(problems)
    return _told_apart(runs)


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """With several settings of one method on the same examples, as sweeps over learning rates have, their runs go by the sweep's names; and with
    several seeds of training, by those, too."""
    called = [found[1] if (found := CELL.fullmatch(run.folder.name)) else "" for run in runs]
    names: dict[tuple, set[str]] = {}
    trained: dict[tuple, set[int]] = {}
    for run, name in zip(runs, called):
        examples = (run.task, run.k, run.seed, run.method)
        trained.setdefault((*examples, name), set()).add(run.results["seeds"]["train"])
        if name:
            names.setdefault(examples, set()).add(name)
    by_training = any(len(seeds) > 1 for seeds in trained.values())
    several = {examples[-1] for examples, own in names.items() if len(own) > 1}
    return [
        dataclasses.replace(
            run, variant=name if run.method in several else "", by_training=by_training
        )
        for run, name in zip(runs, called)
    ]


def read(path: pathlib.Path) -> Run:
    """The run that left this results file. Raises ConfigError if it is damaged or something else."""
    damaged = path
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in _Results.model_fields if key not in results]
        if missing:
            raise ConfigError(f"{path} is no results file of a run: it has no {missing[0]}")
        _Results.model_validate(results)
        own = (
            path.name == "results.json"
        )  # else what lies beside it belongs to nobody in particular
        config, timing = path.with_name("config.yaml"), path.with_name("timing.json")
        damaged = config
        settings = (
            flat(yaml.safe_load(config.read_text(encoding="utf-8")))
            if own and config.is_file()
            else {}
        )
        if not isinstance(settings.get("data.k", 1), int | str) or not isinstance(
            settings.get("model.name", ""), str
        ):
            raise ValueError("data.k or model.name")
        damaged = timing
        seconds = (
            json.loads(timing.read_text(encoding="utf-8"))["seconds"]
            if own and timing.is_file()
            else None
        )
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{path} is damaged ({where}{': ' * bool(where)}{first['msg'].removeprefix('Value error, ')}); run it again, or leave it out"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{damaged} is damaged ({' '.join(str(error).split())[:100]}); run it again, or leave it out"
        ) from None
    return Run(path.parent if own else path.with_suffix(""), results, settings, seconds)


def one_metric(runs: Sequence[Run]) -> None:
    """Raises ConfigError if a task's runs were scored by several metrics: their numbers cannot be compared."""
    metrics: dict[str, set[str]] = {}
    for run in runs:
        if run.results["metric"] != "loss":  # which is no score at all, see `Run.points`
            metrics.setdefault(run.task, set()).add(run.results["metric"])
    problems = [
        f"--runs: runs of {task} were scored by {' and '.join(sorted(found))}; give those of one metric"
        for task, found in metrics.items()
        if len(found) > 1
    ]
    if problems:
        raise ConfigError(problems)


def one_backbone(runs: Sequence[Run]) -> str:
    """The backbone of all runs. Raises ConfigError if there are several: their scores belong in different tables."""
    names = sorted({run.backbone for run in runs})
    if len(names) > 1:
        raise ConfigError(
            f"--runs: runs of {len(names)} backbones ({', '.join(names)}); give the folders of one"
        )
    return names[0] if names else UNKNOWN


def unique(runs: Sequence[Run], key: Any) -> dict[Any, Run]:
    """key(run) → run. Raises ConfigError if two runs are the same by it."""
    found: dict[Any, Run] = {}
    problems = []
    for run in runs:
        other = found.setdefault(key(run), run)
        if other is not run:
            problems.append(
                f"--runs: {run.folder} and {other.folder} are the same trial ({', '.join(map(str, key(run)))}); leave one out"
            )
    if problems:
        raise ConfigError(problems)
    return found


def differences(runs: Sequence[Run], drawn: Sequence[str] = ()) -> list[str]:
    """What a reader must know of the runs' settings, sentences: those that are not the same in all runs of one method, and so are no part of the
    method: `data.max_length (64, 96)`; and those in which methods differ on the same examples, but for the learning rate and the methods' own.
    drawn: settings that a figure shows."""
    known = [run for run in runs if run.settings]
    keys = sorted(set().union(*(run.settings for run in known)) - {*AXES, *drawn})

    def differ(keys: Iterable[str], group: Callable[[Run], Any]) -> dict[str, set[str]]:
        """key → its values, where runs of one group do not agree."""
        values: dict[str, dict[Any, set[str]]] = {}
        for run in known:
            for key in keys:
                values.setdefault(key, {}).setdefault(group(run), set()).add(
                    str(run.settings.get(key, "not set"))
                )
        return {
            key: set().union(*several)
            for key, found in values.items()
            if (several := [v for v in found.values() if len(v) > 1])
        }

    within = differ(keys, lambda run: run.row)
    shared = [
        key
        for key in keys
        if not key.startswith("method.") and key != "train.learning_rate" and key not in within
    ]
    found = {"Runs of one method": within, "Methods": differ(shared, lambda run: (run.task, run.k))}
    words = {
        who: "; ".join(f"{key} ({', '.join(sorted(own))})" for key, own in several.items())
        for who, several in found.items()
    }
    return [f"{who} differ in {said}." for who, said in words.items() if said]
