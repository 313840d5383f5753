"""Read finished runs, from the folders that they left or from a table with one row per run.

    runs = load(["runs/minilm"])         every results.json below the folder
    runs = load(["results/minilm.csv"])  the same runs from a table
    write_csv(runs, path)

The first columns of a table summarise a run (SUMMARY). The others hold the contents of its files:
`results.parameters.stored`, `config.train.seed`, `timing.seconds`, `environment.commit`, ...
Text stands as it is and every other value as JSON. An empty cell means that there is no value.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal, NotRequired

import pandas as pd
import pydantic
from typing_extensions import TypedDict

from scaleup.errors import ConfigError
from scaleup.experiments.runs import Run, name_variants
from scaleup.io import read_bytes, write_text
from scaleup.settings.loading import flat, parse
from scaleup.training.output_folder import SET_ASIDE

SUMMARY = ("trial", "task", "k", "method", "data_seed", "train_seed", "metric", "dev", "test")


class _Moments(TypedDict):
    mean: float
    std: float


class _Seeds(TypedDict):
    data: int
    train: int


class _Examples(TypedDict):
    train: int | None  # None: a stream


class _Counts(TypedDict):
    stored: Annotated[int, pydantic.Field(ge=0, le=10**15)]
    stored_percent: float


class _Method(TypedDict):
    name: Literal["unipelt", "full", "bitfit"]
    submodules: NotRequired[list[str]]
    gates: NotRequired[str]
    head: NotRequired[str]


class _Results(pydantic.BaseModel, strict=True):
    """The parts of results.json that reports read."""

    task: str
    metric: str
    dev: dict[str, Any] | None
    test: dict[str, Any] | None
    test_is_dev: bool
    seeds: _Seeds
    examples: _Examples
    method: _Method
    parameters: _Counts
    gates: dict[str, dict[str, _Moments]]

    @pydantic.model_validator(mode="after")
    def _check(self) -> "_Results":
        for split, scores in (("dev", self.dev), ("test", self.test)):
            score = None if scores is None else scores.get(self.metric)
            if scores is not None and (
                isinstance(score, bool) or not isinstance(score, int | float) or math.isinf(score)
            ):
                raise ValueError(f"{split} has no {self.metric} that is a number")
        parts = self.method.get("submodules", [])
        if self.method["name"] == "unipelt" and not (parts and self.method.get("gates")):
            raise ValueError("method has no submodules or no gates")
        if not set().union(*self.gates.values()) <= set(parts):
            raise ValueError("gates of submodules that the method does not have")
        return self


def load(paths: Iterable[str]) -> list[Run]:
    """Read finished runs from tables, and from folders of sweeps and runs.

    In a folder every results.json counts, but not those that a run set aside when it continued with
    other settings. A folder without any may have results files of any name.

    Raises:
        ConfigError: with all problems, such as missing or damaged files.
    """
    runs: list[Run] = []
    problems: list[str] = []
    for path in map(pathlib.Path, paths):
        try:
            for read_run in _rows(path) if path.is_file() else _files(path):
                try:
                    runs.append(read_run())
                except ConfigError as error:
                    problems += error.problems
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return name_variants(runs)


def read(path: pathlib.Path) -> Run:
    """Read the run that left this results.json, or one row of a table: TABLE.csv/TRIAL.

    Raises:
        ConfigError: if the file is damaged or is something else.
    """
    if path.parent.is_file():
        runs = [run for run in load([str(path.parent)]) if run.folder == path]
        if not runs:
            raise ConfigError(f"--run: {path.parent} has no trial {path.name}")
        return dataclasses.replace(runs[0], variant="")
    results = _parsed(path, json.loads)
    beside = path.parent if path.name == "results.json" else None
    settings: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    if beside is not None:
        if (beside / "config.yaml").is_file():
            settings = _parsed(beside / "config.yaml", _settings_of)
        for name in ("timing", "environment"):
            if (beside / f"{name}.json").is_file():
                facts |= _flatten(_parsed(beside / f"{name}.json", json.loads), name)
    return _check(Run(beside or path.with_suffix(""), results, settings, facts), str(path))


def write_csv(runs: Sequence[Run], path: pathlib.Path) -> None:
    """Write a table with one row per run."""
    rows = []
    for run in runs:
        results, metric = dict(run.results), run.results["metric"]
        if isinstance(results.get("sources"), list):
            results["sources"] = _by_split(results["sources"])
        scores = [(results[split] or {}).get(metric) for split in ("dev", "test")]
        seeds = (results["seeds"]["data"], results["seeds"]["train"])
        summary = (run.folder.name, run.task, run.k, run.method, *seeds, metric, *scores)
        cells = dict(zip(SUMMARY, summary)) | _flatten(results, "results")
        cells |= {f"config.{key}": value for key, value in run.settings.items()} | run.facts
        rows.append({column: _encode(value) for column, value in cells.items()})
    write_text(path, pd.DataFrame(rows).to_csv(index=False))


def _by_split(sources: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what is known about each source: train, train_2, train_3, …, validation, test."""
    found: dict[str, dict[str, Any]] = {}
    counts: Counter[str] = Counter()
    for source in sources:
        split = source["split"]
        counts[split] += 1
        name = f"{split}_{counts[split]}" if counts[split] > 1 else split
        found[name] = {key: value for key, value in source.items() if key != "split"}
    return found


def _files(folder: pathlib.Path) -> list[Callable[[], Run]]:
    files = [
        path
        for path in sorted(folder.rglob("results.json"))
        if not any(SET_ASIDE.fullmatch(part) for part in path.relative_to(folder).parts)
    ] or sorted(folder.glob("*.json"))
    if not files:
        raise ConfigError(
            f"--runs: {folder} has no results.json; give the output folder of a sweep or a "
            "run, or a table of runs"
        )
    return [functools.partial(read, path) for path in files]


def _rows(path: pathlib.Path) -> list[Callable[[], Run]]:
    try:
        records = pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
    except (OSError, ValueError) as error:
        raise ConfigError(_damage(path, error)) from None
    if not records or not {"trial", "results.task"} <= records[0].keys():
        raise ConfigError(f"--runs: {path} is not a table of runs, as a sweep's results.csv is")
    return [functools.partial(_from_row, path, record) for record in records]


def _from_row(path: pathlib.Path, record: dict[str, str]) -> Run:
    results: dict[str, Any] = {"gates": {}}
    settings: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    for column, text in record.items():
        file, _, key = column.partition(".")
        if text == "" or column in SUMMARY:
            continue
        if file == "results":
            # The name of a module contains dots.
            parts = ["gates", *key[6:].rsplit(".", 2)] if key[:6] == "gates." else key.split(".")
            target = results
            for part in parts[:-1]:
                target = target.setdefault(part, {})
                if not isinstance(target, dict):
                    reason = f"{column} and a column above it exclude each other"
                    raise ConfigError(_damage(path, reason))
            target[parts[-1]] = _decode(text)
        elif file == "config":
            settings[key] = _decode(text)
        else:
            facts[column] = _decode(text)
    trial = record["trial"]
    return _check(Run(path / trial, results, settings, facts), f"{path}, row {trial},")


def _check(run: Run, name: str) -> Run:
    """Validate what was read. `name` says in messages where it was read from."""
    results, settings = run.results, run.settings
    missing = [key for key in _Results.model_fields if key not in results]
    if missing:
        raise ConfigError(f"{name} is not the results.json of a run: it has no {missing[0]}")
    try:
        _Results.model_validate(results)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        text = f"{where}{': ' * bool(where)}{first['msg'].removeprefix('Value error, ')}"
        raise ConfigError(_damage(name, text)) from None
    for key, types in (("data.k", int | str), ("model.name", str)):
        if key in settings and not isinstance(settings[key], types):
            raise ConfigError(_damage(run.folder / "config.yaml", key))
    return run


def _parsed(path: pathlib.Path, decode: Callable[[str], Any]) -> dict[str, Any]:
    try:
        content = decode(read_bytes(path).decode("utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a mapping")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(_damage(path, error)) from None
    return content


def _settings_of(text: str) -> dict[str, Any]:
    """Return the settings in a config.yaml, `section.key` → value."""
    return flat(parse(text, "YAML"))


def _damage(name: object, reason: object) -> str:
    text = " ".join(str(reason).split())[:100]
    return f"{name} is damaged ({text}); run it again, or leave it out"


def _flatten(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return the leaves of nested mappings under dotted names."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}.{key}"
        leaves |= _flatten(value, name) if isinstance(value, dict) else {name: value}
    return leaves


def _encode(value: Any) -> str:
    """Return the text of a table's cell; `_decode` is the inverse."""
    if not isinstance(value, str):
        return json.dumps(value)
    return value if value and _decode(value) == value else json.dumps(value)


def _decode(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
