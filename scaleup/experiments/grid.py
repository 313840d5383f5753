"""A sweep's file: a base config and named lists of overrides along four axes. Every combination is a trial, one run of launch/train.py.

sweep = load("configs/sweeps/table1.yaml", overrides)       every trial's config is checked, all problems are said together

output: runs/table1                      folder of the runs; each has its own, <task>-<k>-<method>-<seed>
base: ../bert.yaml                       a config file (relative to this one), or its sections written out here
methods: {adapter: ["method.submodules=[adapter]"], full: [method=full]}
tasks: [cola, mrpc]                      short for {cola: [data.name=cola], …}
k: [100, all]                            short for {100: [data.k=100], …}
seeds: [0, 1]                            short for {0: [data.seed=0, train.seed=0], …}; with k all, nothing is sampled
keep: false                              of a finished run: false, its results only; best, its best bundle too; true, everything
threads: 1                               cores of one run
"""

import dataclasses
import fnmatch
import itertools
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import Field, PositiveInt

from scaleup.errors import ConfigError
from scaleup.settings.loading import flat, nearest, override, parse, shown
from scaleup.settings.schema import Section, Settings
from scaleup.settings.schema import load as load_config
from scaleup.training.preflight import CHECKS

AXES = ("task", "k", "method", "seed")
DECIDED = ("train.output_dir", "train.resume")  # by the sweep


def _axis(key: str | None, example: str) -> Any:
    """A list of values becomes name → overrides, with `key` set to the value; a mapping stays, its names as text."""

    def make(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(name): overrides for name, overrides in value.items()}
        if isinstance(value, list) and key is not None:
            if len(set(map(str, value))) < len(value):
                raise ValueError("names a value twice")
            return {str(name): [f"{key}={name}"] for name in value}
        raise ValueError(f"should be {example}")

    return pydantic.BeforeValidator(make)


Axis = dict[str, list[str]]


class SweepFile(Section):
    """What the file says, axes written out."""

    output: str = Field(min_length=1)
    base: str | dict[str, Any] = {}
    methods: Annotated[
        Axis,
        _axis(None, "names with lists of overrides, like {full: [method=full]}"),
        Field(min_length=1),
    ]
    tasks: Annotated[
        Axis,
        _axis("data.name", "a list of GLUE tasks, or names with lists of overrides"),
        Field(min_length=1),
    ]
    k: Annotated[
        Axis,
        _axis("data.k", "a list of numbers, or names with lists of overrides"),
        Field(min_length=1),
    ]
    seeds: Annotated[
        Axis,
        _axis("seed", "a list of numbers, or names with lists of overrides"),
        Field(min_length=1),
    ]
    keep: bool | Literal["best"] = False
    threads: PositiveInt = 1

    @pydantic.field_validator("methods", "tasks", "k", "seeds")
    @classmethod
    def _names(cls, axis: Axis) -> Axis:
        wrong = [name for name in axis if not re.fullmatch(r"[\w.]+", name)]
        if wrong:
            raise ValueError(
                f"{wrong[0]!r} cannot be part of a folder's name; use letters, digits, _ and ."
            )
        return axis


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run. arguments: of launch/train.py."""

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
        """Its results are there, whoever made them."""
        return (self.folder / "results.json").is_file()


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A checked sweep. trials: the first seed's first, so that whole tables come early."""

    output: pathlib.Path
    trials: list[Trial]
    keep: bool | Literal["best"]
    threads: int


def load(path: str, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep that a file describes. overrides: `section.key=value`, for every run and over everything in the file.

    Raises ConfigError with all problems of the file and of all trials; those that many trials have are said once.
    """
    file = _read(path)
    try:
        output = pathlib.Path(file.output).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{path}: output: there is no home of {file.output.partition('/')[0]} here; write the path out"
        ) from None
    first, base = _base(file, pathlib.Path(path).parent)
    problems = [
        f"{item}: the sweep decides {key}; leave it out"
        for item in _all_overrides(file, base, overrides)
        for key in DECIDED
        if item.partition("=")[0] == key
    ]
    if problems:
        raise ConfigError(problems)
    trials, found, known = [], {}, {}
    for seed, k, task, method in itertools.product(file.seeds, file.k, file.tasks, file.methods):
        chosen = {
            "tasks": file.tasks[task],
            "k": file.k[k],
            "methods": file.methods[method],
            "seeds": file.seeds[seed],
        }
        axes = list(itertools.chain.from_iterable(chosen.values()))
        folder = output / f"{task}-{k}-{method}-{seed}"
        said = [
            *base,
            "train.disable_tqdm=true",
            *_seeded(axes),
            *overrides,
            override("train.output_dir", folder),
            "train.resume=auto",
        ]
        for problem in _set_twice(chosen):
            found.setdefault(problem, []).append(folder.name)
        try:
            settings = load_config(first[1] if first else None, said, checks=CHECKS)
            same_run(settings, folder)
            alike = known.setdefault(_wanted(settings), folder)
            if alike != folder:
                found.setdefault(
                    "the same run as another trial: an override makes one of their names untrue; leave it out",
                    [],
                ).append(folder.name)
            trials.append(Trial(task, k, method, seed, folder, (*first, *said), settings))
        except ConfigError as error:
            for problem in error.problems:
                found.setdefault(problem.replace(str(folder), str(output / "…")), []).append(
                    folder.name
                )
    if found:
        total = len(file.seeds) * len(file.k) * len(file.tasks) * len(file.methods)
        raise ConfigError(
            [f"{_named(names, total)}: {problem}" for problem, names in found.items()]
        )
    return Sweep(output, trials, file.keep, file.threads)


def select(
    trials: Sequence[Trial], patterns: Sequence[str] = (), shard: str | None = None
) -> list[Trial]:
    """The trials whose name fits one of the patterns (`cola-100-*`), of those every n-th from the i-th on, for a shard `i/n`.

    Raises ConfigError for a pattern that fits none and for what is no shard.
    """
    problems = [
        f"--only: no trial is called {pattern}{nearest(pattern, [trial.name for trial in trials])}"
        for pattern in patterns
        if not any(fnmatch.fnmatchcase(trial.name, pattern) for trial in trials)
    ]
    part = re.fullmatch(r"(?a)(\d{1,6})/(\d{1,6})", shard) if shard is not None else None
    if shard is not None and (part is None or not 1 <= int(part[1]) <= int(part[2])):
        problems.append(f"--shard: {shard} is no i/n with i from 1 to n, like 1/4")
    if problems:
        raise ConfigError(problems)
    chosen = [
        trial
        for trial in trials
        if not patterns or any(fnmatch.fnmatchcase(trial.name, pattern) for pattern in patterns)
    ]
    return chosen[int(part[1]) - 1 :: int(part[2])] if part else chosen


def _read(path: str) -> SweepFile:
    try:
        raw = parse(pathlib.Path(path).read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror if isinstance(error, OSError) else 'not UTF-8 text'}"
        ) from None
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path}: expected {', '.join(SweepFile.model_fields)}, found {shown(raw)}"
        )
    try:
        return SweepFile.model_validate(raw)
    except pydantic.ValidationError as error:
        problems = []
        for item in error.errors():
            key = ".".join(
                str(part) for part in item["loc"] if part not in ("str", "dict[str,any]")
            )
            unknown = item["type"] == "extra_forbidden"
            message = re.sub(r"^(Value error, |Input )", "", item["msg"])
            given = "" if item["type"] == "missing" else f" (got {shown(item['input'])})"
            problems.append(
                f"{path}: {key}: "
                + (
                    f"unknown setting{nearest(key, SweepFile.model_fields)}"
                    if unknown
                    else message + given
                )
            )
        raise ConfigError(list(dict.fromkeys(problems))) from None


def _base(file: SweepFile, folder: pathlib.Path) -> tuple[tuple[str, ...], list[str]]:
    """The base as words of a command line: `--config FILE`, or overrides."""
    if isinstance(file.base, str):
        return ("--config", str(folder / pathlib.Path(file.base).expanduser())), []
    said = []
    for section, values in file.base.items():
        inner = values if isinstance(values, dict) else {"": values}
        said += [
            override(f"{section}{'.' * bool(key)}{key}", value) for key, value in inner.items()
        ]
    return (), said


def _all_overrides(file: SweepFile, base: list[str], more: Sequence[str]) -> list[str]:
    lists = [
        overrides
        for axis in (file.tasks, file.k, file.methods, file.seeds)
        for overrides in axis.values()
    ]
    return list(dict.fromkeys([*base, *itertools.chain.from_iterable(lists), *more]))


def _seeded(axes: list[str]) -> list[str]:
    """`seed=3`, short for the seed of the choice of examples and that of training. With `k` all nothing is chosen."""
    chosen = "data.k=all" not in axes
    out = []
    for item in axes:
        key, _, value = item.partition("=")
        out += (
            [f"data.seed={value}"] * chosen + [f"train.seed={value}"] if key == "seed" else [item]
        )
    return out


def _set_twice(chosen: dict[str, list[str]]) -> list[str]:
    """Of a trial: what two axes set to different values, of which one would have no effect."""
    axes = {
        name: dict(item.partition("=")[::2] for item in _seeded(overrides))
        for name, overrides in chosen.items()
    }
    pairs = itertools.combinations(axes, 2)
    differ = [
        (one, other, key)
        for one, other in pairs
        for key in sorted(axes[one].keys() & axes[other].keys())
        if axes[one][key] != axes[other][key]
    ]
    return [
        f"{key}: {one} and {other} set it to different values, and one would have no effect; leave it to one of them"
        for one, other, key in differ
    ]


def _named(names: list[str], total: int) -> str:
    if len(names) == total:
        return "every run"
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _wanted(settings: Settings) -> str:
    """What a run is, wherever it is."""
    return json.dumps(
        {key: value for key, value in flat(settings.dump()).items() if key not in DECIDED},
        sort_keys=True,
        default=str,
    )


def same_run(settings: Settings, folder: pathlib.Path) -> None:
    """Raises ConfigError if the folder has a run of other settings, whose results would be counted as this trial's, or damaged results."""
    results, path = folder / "results.json", folder / "config.yaml"
    try:
        if results.is_file() and not isinstance(
            json.loads(results.read_text(encoding="utf-8")), dict
        ):
            raise ValueError
    except (OSError, ValueError):
        raise ConfigError(f"{results} is damaged; remove the folder to run it again") from None
    if not path.is_file():
        return
    try:
        then = flat(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, AttributeError, UnicodeDecodeError):
        raise ConfigError(f"{path} is damaged; remove the folder to run it again") from None
    now = flat(settings.dump())
    free = {*DECIDED, "train.disable_tqdm"}
    if "max_length" not in settings.data.model_fields_set:
        free.add("data.max_length")  # a run cuts what nobody chose to what its model takes
    other = [key for key in now | then if key not in free and now.get(key) != then.get(key)]
    if other:
        raise ConfigError(
            f"{folder} has a run with another {', '.join(sorted(other))}; choose another output, or remove the folder"
        )
