"""Expand a sweep file into trials: every combination of task, K, method and seed.

`load("configs/sweeps/table1.yaml", overrides)` checks the config of every trial and reports all
problems together. The keys of a sweep file are:

    output: runs/table1              folder of the trials, each in <task>-<k>-<method>-<seed>
    base: ../bert.yaml               config file relative to this file, or its sections inline
    methods: {full: [method=full]}   names with lists of overrides
    tasks: [cola, mrpc]              short for {cola: [data.name=cola], ...}
    k: [100, all]                    short for {100: [data.k=100], ...}
    seeds: [0, 1]                    short for {0: [data.seed=0, train.seed=0], ...}
    keep: false                      what remains of a finished trial besides its results:
                                     false: nothing; best: the best checkpoint; true: everything
    threads: 1                       CPU threads of one trial

With `k` all, no examples are sampled, and a seed sets `train.seed` only.
"""

import dataclasses
import fnmatch
import itertools
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, PositiveInt

from scaleup.errors import ConfigError
from scaleup.io import expand_home, read_json
from scaleup.settings.data import Path
from scaleup.settings.derived import Section
from scaleup.settings.loading import flat, nearest, override, parse_file, shown, validation_problem
from scaleup.settings.schema import Settings, stored
from scaleup.settings.schema import load as load_config
from scaleup.training.finished import changed_files
from scaleup.training.preflight import CHECKS
from scaleup.training.run_settings import check_permission

MOST_TRIALS = 10_000
SET_BY_SWEEP = ("train.output_dir", "train.resume")


def _axis(key: str | None, example: str) -> pydantic.BeforeValidator:
    """Validate an axis and write it out as names with overrides.

    `key` is the setting that a plain list of values stands for, None if lists are not allowed;
    `example` is what the error message asks for.
    """

    def expand(value: Any) -> Any:
        if isinstance(value, list) and key is not None:
            if len(set(map(str, value))) < len(value):
                raise ValueError("names a value twice")
            value = {str(name): [f"{key}={name}"] for name in value}
        if not isinstance(value, dict) or not value:
            raise ValueError(f"should be {example}")
        for name in map(str, value):
            if not re.fullmatch(r"[\w.]+", name):
                raise ValueError(
                    f"{name!r} cannot be part of a folder's name; use letters, digits, _ and ."
                )
        return {str(name): overrides for name, overrides in value.items()}

    return pydantic.BeforeValidator(expand)


Axis = dict[str, list[str]]
AXES = ("tasks", "k", "methods", "seeds")
NAMES = "names with lists of overrides"


class SweepFile(Section):
    """The contents of a sweep file, with all axes written out."""

    output: Path = Field(min_length=1)
    base: Annotated[str | dict[str, Any], pydantic.BeforeValidator(expand_home)] = {}
    methods: Annotated[Axis, _axis(None, f"{NAMES}, like {{full: [method=full]}}")]
    tasks: Annotated[Axis, _axis("data.name", f"a list of GLUE tasks, or {NAMES}")]
    k: Annotated[Axis, _axis("data.k", f"a list of numbers, or {NAMES}")]
    seeds: Annotated[Axis, _axis("seed", f"a list of numbers, or {NAMES}")]
    keep: bool | Literal["best"] = False
    threads: PositiveInt = 1


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep. `arguments` are those of the training command."""

    task: str
    k: str
    method: str
    seed: str
    folder: pathlib.Path
    arguments: tuple[str, ...]
    settings: Settings

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def finished(self) -> bool:
        return (self.folder / "results.json").is_file()


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A checked sweep. The trials of the first seed come first, so that full tables come early."""

    output: pathlib.Path
    trials: list[Trial]
    keep: bool | Literal["best"]
    threads: int


def load(path: str, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file and check the config of every trial.

    Args:
        path: the sweep file.
        overrides: `section.key=value` for every trial. They win over everything in the file.

    Raises:
        ConfigError: with all problems of the file and of all trials. A problem that many trials
            share is listed once.
    """
    file = _read(path)
    output = pathlib.Path(file.output)
    config, base = _base(file, pathlib.Path(path).parent)
    in_file = itertools.chain(*(items for axis in AXES for items in getattr(file, axis).values()))
    reserved = [
        f"{item}: the sweep sets {key}; leave it out"
        for item in dict.fromkeys([*base, *in_file, *overrides])
        if (key := item.partition("=")[0]) in SET_BY_SWEEP
    ]
    if reserved:
        raise ConfigError(reserved)
    trials: list[Trial] = []
    affected: dict[str, list[str]] = {}  # problem → names of trials
    folders: dict[str, pathlib.Path] = {}  # what a trial runs → its folder
    count = math.prod(len(getattr(file, axis)) for axis in AXES)
    if count > MOST_TRIALS:
        raise ConfigError(f"{path}: describes {count:,} runs; it takes at most {MOST_TRIALS:,}")
    combinations = list(itertools.product(file.seeds, file.k, file.tasks, file.methods))
    for seed, k, task, method in combinations:
        names = zip(AXES, (task, k, method, seed))
        chosen = _expand_seeds({axis: getattr(file, axis)[name] for axis, name in names})
        folder = output / f"{task}-{k}-{method}-{seed}"
        words = [*base, "train.disable_tqdm=true", *itertools.chain(*chosen.values())]
        words += [*overrides, override("train.output_dir", folder), "train.resume=auto"]
        problems = list(_conflicts(chosen))
        try:
            check_permission(config[1] if config else None, words)
            settings = load_config(config[1] if config else None, words, checks=CHECKS)
            check_same_run(settings, folder)
            if folders.setdefault(_identity(settings), folder) != folder:
                problems.append(
                    "the same run as another trial: an override makes one of their names untrue; "
                    "leave it out"
                )
            trials.append(Trial(task, k, method, seed, folder, (*config, *words), settings))
        except ConfigError as error:
            problems += [text.replace(str(folder), str(output / "…")) for text in error.problems]
        for problem in problems:
            affected.setdefault(problem, []).append(folder.name)
    if affected:
        total = len(combinations)
        raise ConfigError([f"{_name_trials(of, total)}: {text}" for text, of in affected.items()])
    return Sweep(output, trials, file.keep, file.threads)


def select(
    trials: Sequence[Trial], patterns: Sequence[str] = (), shard: str | None = None
) -> list[Trial]:
    """Choose trials by name patterns such as `cola-100-*`, and of those the shard `i/n`.

    Raises:
        ConfigError: for a pattern that matches nothing, and for a malformed shard.
    """
    names = [trial.name for trial in trials]
    matches = {p: {name for name in names if fnmatch.fnmatchcase(name, p)} for p in patterns}
    problems = [
        f"--only: no trial is called {pattern}{nearest(pattern, names)}"
        for pattern, matching in matches.items()
        if not matching
    ]
    part = re.fullmatch(r"(?a)(\d{1,6})/(\d{1,6})", shard or "1/1")
    if part is None or not 1 <= int(part[1]) <= int(part[2]):
        problems.append(f"--shard: {shard} is not i/n with i from 1 to n, like 1/4")
    if part is None or problems:
        raise ConfigError(problems)
    selected = set().union(*matches.values()) if patterns else set(names)
    chosen = [trial for trial in trials if trial.name in selected]
    return chosen[int(part[1]) - 1 :: int(part[2])]


def check_same_run(settings: Settings, folder: pathlib.Path) -> None:
    """Raise ConfigError if a folder has a run with other settings or data, or damaged files."""
    results, path = folder / "results.json", folder / "config.yaml"
    if results.is_file():
        for file in changed_files(_read_file(results, read_json)):
            raise ConfigError(
                f"{folder} has a finished run, and {file} has changed since; "
                "choose another output, or remove the folder"
            )
    if not path.is_file():
        return
    other = different(settings, flat(_read_file(path, lambda path: stored(str(path)))))
    if other:
        raise ConfigError(
            f"{folder} has a run with another {', '.join(other)}; "
            "choose another output, or remove the folder"
        )


def different(settings: Settings, then: dict[str, Any]) -> list[str]:
    """Return the settings in which a run differs from that of `then`, which is `section.key` →
    value."""
    now = flat(settings.dump())
    free = {*SET_BY_SWEEP, "train.disable_tqdm"}
    if "max_length" not in settings.data.model_fields_set:
        free.add("data.max_length")  # a run lowers the default to what its model takes
    return sorted(k for k in now | then if k not in free and now.get(k) != then.get(k))


def _read_file(path: pathlib.Path, read: Callable[[pathlib.Path], Any]) -> dict[str, Any]:
    """Return a mapping that a run left in a file; raise ConfigError if the file is damaged."""
    try:
        content = read(path)
    except (OSError, ValueError, RecursionError):  # a ConfigError is a ValueError
        content = None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is damaged; remove the folder to run it again")
    return content


def _read(path: str) -> SweepFile:
    raw = parse_file(path)
    if not isinstance(raw, dict):
        keys = ", ".join(SweepFile.model_fields)
        raise ConfigError(f"{path}: expected {keys}, found {shown(raw)}")
    try:
        return SweepFile.model_validate(raw)
    except pydantic.ValidationError as error:
        problems = []
        for item in error.errors():
            parts = [part for part in item["loc"] if part not in ("str", "dict[str,any]")]
            key = ".".join(map(str, parts))
            message = validation_problem(dict(item), SweepFile.model_fields)
            problems.append(f"{path}: {key}: {message}")
        raise ConfigError(list(dict.fromkeys(problems))) from None


def _base(file: SweepFile, folder: pathlib.Path) -> tuple[tuple[str, ...], list[str]]:
    """Return the base config as `--config FILE`, or as overrides if it is written inline."""
    if isinstance(file.base, str):
        return ("--config", str(folder / file.base)), []
    words = []
    for section, values in file.base.items():
        if isinstance(values, dict):
            words += [override(f"{section}.{key}", value) for key, value in values.items()]
        else:
            words.append(override(section, values))
    return (), words


def _expand_seeds(chosen: dict[str, list[str]]) -> dict[str, list[str]]:
    """Replace `seed=3` by the seed of training and, if examples are sampled, that of sampling."""
    sampled = "data.k=all" not in itertools.chain(*chosen.values())
    keys = ["data.seed", "train.seed"] if sampled else ["train.seed"]

    def expand(item: str) -> list[str]:
        key, _, value = item.partition("=")
        return [f"{name}={value}" for name in keys] if key == "seed" else [item]

    return {axis: [*itertools.chain(*map(expand, items))] for axis, items in chosen.items()}


def _conflicts(chosen: dict[str, list[str]]) -> Iterator[str]:
    """Name the settings to which two axes give different values."""
    values = {axis: dict(i.partition("=")[::2] for i in items) for axis, items in chosen.items()}
    for one, other in itertools.combinations(chosen, 2):
        for key in sorted(values[one].keys() & values[other].keys()):
            if values[one][key] != values[other][key]:
                yield (
                    f"{key}: {one} and {other} set it to different values, and one would have no "
                    "effect; leave it to one of them"
                )


def _name_trials(names: list[str], total: int) -> str:
    if len(names) == total:
        return "every run"
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _identity(settings: Settings) -> str:
    """Describe what a trial runs, whatever its folder."""
    values = {k: v for k, v in flat(settings.dump()).items() if k not in SET_BY_SWEEP}
    return json.dumps(values, sort_keys=True, default=str)
