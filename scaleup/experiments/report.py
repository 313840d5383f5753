"""The paper's tables and figures from finished runs: as Markdown, CSV, PNG and text for a terminal.

    lines = report("table1", ["runs/table1"], output)        also table2 … table6, figure2, figure3

Every number of ours is worked out from what the runs left; the paper's are in paper.yaml, and where it has none nothing is shown.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from scaleup.errors import ConfigError
from scaleup.experiments import plots as figures
from scaleup.experiments import tables
from scaleup.experiments.plots import THEIRS, Curve, Panel
from scaleup.experiments.results import (
    Run,
    differences,
    load,
    name_of,
    one_backbone,
    one_metric,
    unique,
)
from scaleup.experiments.tables import TASKS, Block, Row, Table
from scaleup.io import write_text
from scaleup.settings.loading import parse

PAPER = pathlib.Path(__file__).with_name("paper.yaml")
THEIRS_ON = "the paper's are BERT-base"
BENCH = "results/bench"  # need not be there
GEOMETRY = "bert-base"  # of the benchmark whose times stand in table 4
# scaleup bench contenders → methods. A model that was fine-tuned as a whole runs as the bare backbone does.
BENCHED = {
    "full fine-tuning": "full",
    "bare": "full",
    "BitFit": "bitfit",
    "adapter": "adapter",
    "prefix": "prefix",
    "lora": "lora",
    "AP": "ap",
    "APL": "apl",
    "NoGate": "apl_nogate",
}
MLP = "APL, prefix MLP"  # training, by default, and in the paper


@dataclasses.dataclass(frozen=True)
class Sources:
    """What tables are made of. bench: see `_bench`."""

    runs: list[Run]
    paper: dict[str, Any]
    bench: dict[str, dict[str, float]]
    bench_note: list[str]


def _table1(s: Sources) -> Table:
    title = "Table 1: GLUE with K training examples, test performance"
    return tables.low_resource("table1", title, s.runs, {"test": s.paper["table1"]}, THEIRS_ON)


def _table2(s: Sources) -> Table:
    title = "Table 2: average test performance of UniPELT and of the best of its submodules on each task"
    if several := sorted({name_of(run.method) for run in s.runs if run.variant}):
        raise ConfigError(
            f"--runs: table 2 compares one setting of each method, and there are several of {', '.join(several)}; give the folders of one"
        )
    return tables.upper_bound("table2", title, s.runs, s.paper["table2"], THEIRS_ON)


def _table3(s: Sources) -> Table:
    return tables.high_resource(
        "table3", "Table 3: GLUE with all training examples", s.runs, s.paper["table3"], THEIRS_ON
    )


def _table4(s: Sources) -> Table:
    title = "Table 4: parameters, and training (T) and inference (I) time relative to fine-tuning"
    table = tables.efficiency("table4", title, s.runs, s.paper["table4"], s.bench, THEIRS_ON)
    return dataclasses.replace(table, notes=table.notes + s.bench_note)


def _table5(s: Sources) -> Table:
    title = "Table 5: GLUE with K training examples, a larger backbone (in the paper BART-large)"
    return tables.low_resource("table5", title, s.runs, {}, "the paper's numbers are not at hand")


def _table6(s: Sources) -> Table:
    title = "Table 6: GLUE with K training examples, development and test performance"
    what = f"{THEIRS_ON}, those on development sets not at hand"
    return tables.low_resource(
        "table6", title, s.runs, {"test": s.paper["table1"]}, what, ("dev", "test")
    )


@dataclasses.dataclass(frozen=True)
class Setting:
    """A figure: the score of one method over one of its settings. usual: where the paper's table 1 stands on that axis. drawn: the keys of that
    setting. beside: methods to compare with."""

    title: str
    method: str
    x: str
    value: Callable[[dict[str, Any]], float]
    usual: float
    drawn: tuple[str, ...]
    beside: tuple[str, ...] = ()


TABLES = {
    "table1": _table1,
    "table2": _table2,
    "table3": _table3,
    "table4": _table4,
    "table5": _table5,
    "table6": _table6,
}
FIGURES = {
    "figure2": Setting(
        "Figure 2: bottleneck size of the adapter",
        "adapter",
        "bottleneck size",
        lambda m: m["adapter_size"],
        48,
        ("method.adapter_size",),
        ("ap", "apl"),
    ),
    "figure3": Setting(
        "Figure 3: scaling factor of LoRA",
        "lora",
        "scaling factor (alpha / r)",
        lambda m: m["lora_alpha"] / m["r"],
        2,
        ("method.lora_alpha", "method.r"),
    ),
}
RUNS = dict.fromkeys(("table1", "table2", "table4", "table6"), "runs/table1") | {
    n: f"runs/{n}" for n in ("table3", "table5", "figure2", "figure3")
}


def report(
    name: str, folders: Sequence[str], output: pathlib.Path, bench: Sequence[str] = (BENCH,)
) -> list[str]:
    """Writes NAME.md, NAME.csv and NAME.png into `output`; what to print. folders: of sweeps or runs. bench: files of scaleup bench, or
    folders of them.

    Raises ConfigError with everything that is wrong with the runs.
    """
    paper = parse(PAPER.read_text(encoding="utf-8"), str(PAPER))
    runs = load(folders)
    one_backbone(runs)
    one_metric(runs)
    if name in FIGURES:
        table, panels = _figure(name, FIGURES[name], runs, paper)
        draw = lambda path: figures.draw_panels(panels, table.title, path)  # noqa: E731
    else:
        table = TABLES[name](
            Sources(runs, paper, *(_bench(bench) if name == "table4" else ({}, [])))
        )
        draw = lambda path: figures.draw_table(table, path)  # noqa: E731
    if not any(
        entry
        for block in table.blocks
        for row in block.rows
        if not row.paper
        for entry in row.entries
    ):
        raise ConfigError(f"--runs: {', '.join(folders)}: no run there belongs in {name}")
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / f"{name}.md", tables.markdown(table))
    write_text(output / f"{name}.csv", tables.csv_lines(table))
    draw(output / f"{name}.png")
    return [*tables.text(table), f"written: {output / name}.md, .csv, .png"]


def _bench(paths: Sequence[str]) -> tuple[dict[str, dict[str, float]], list[str]]:
    """method → "training" and "inference" time relative to full fine-tuning, from files of scaleup bench on the paper's geometry; and
    what is to be said of them. paths: files, or folders of which every such file counts. Raises ConfigError for two files on one kind."""
    absent = [path for path in paths if path != BENCH and not pathlib.Path(path).exists()]
    if absent:
        raise ConfigError([f"--bench: there is no {path}" for path in absent])
    named = [path for path in map(pathlib.Path, paths) if path.exists()]
    files = [
        file
        for path in named
        for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])
    ]
    found: dict[str, dict[str, float]] = {}
    used: dict[str, pathlib.Path] = {}
    notes = []
    for path in files:
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            asked, ratios = (
                said["settings"],
                {name: float(row["ratio"]) for name, row in said["rows"].items()},
            )
            kind, where = (
                asked["what"],
                f"{asked['geometry']}, {asked['batch']} x {asked['length']} tokens, {', '.join(asked[key] for key in ('device', 'dtype') if key in asked)}",
            )
            if not all(0 < ratio < math.inf for ratio in ratios.values()):
                raise ValueError("a time is no time")
        except (ValueError, KeyError, TypeError, AttributeError):
            notes.append(f"{path} is no file of scaleup bench.")
            continue
        names = {method: name for name, method in BENCHED.items() if name in ratios} | (
            {"apl": MLP} if MLP in ratios else {}
        )
        special = [
            option for option in ("ragged", "compile", "profile", "baseline") if asked.get(option)
        ]
        if (
            asked["geometry"] != GEOMETRY
            or "full" not in names
            or special
            or kind not in ("training", "inference")
        ):
            if path in named:
                why = (
                    f"made with --{special[0]}"
                    if special
                    else f"without {GEOMETRY}'s time of full fine-tuning"
                )
                raise ConfigError(
                    f"--bench: {path} is {why}; table 4 takes the training and inference times of all methods"
                )
            continue
        if kind in used:
            raise ConfigError(
                f"--bench: {used[kind]} and {path} both have {kind} times; give the one to take with --bench FILE"
            )
        used[kind] = path
        notes.append(f"{kind.capitalize()} times from {path.name} ({where}).")
        if MLP in ratios:
            notes.append(
                "Training of UniPELT (APL) is with the prefix's MLP; prefix-tuning and UniPELT (AP) were timed without it."
            )
        for method, contender in names.items():
            found.setdefault(method, {})[kind] = ratios[contender] / ratios[names["full"]]
    if not used and list(paths) != [BENCH]:
        raise ConfigError(
            f"--bench: {', '.join(paths)} has no training or inference times of {GEOMETRY} from scaleup bench"
        )
    return found, notes


def _figure(
    name: str, setting: Setting, runs: Sequence[Run], paper: dict[str, Any]
) -> tuple[Table, list[Panel]]:
    """Points and curves for every task and K there; a sweep that was given for its usual setting makes no panel of that one point."""

    def value(run: Run) -> float:
        return setting.value(run.results["method"])

    own = [dataclasses.replace(run, variant="") for run in runs if run.method == setting.method]
    points: dict[tuple, dict[int, float]] = {}
    for key, run in unique(own, lambda run: (run.task, run.k, value(run), run.seed)).items():
        if run.results["test"] is not None and not math.isnan(score := run.points("test")):
            points.setdefault(key[:3], {})[key[3]] = score
    others = tables.scores([run for run in runs if run.method in setting.beside], "test")
    places = sorted({(task, k) for task, k, _ in points}, key=str)
    curved = sorted({(task, k) for task, k, x in points if x != setting.usual}, key=str) or places
    values = sorted({x for *place, x in points if tuple(place) in curved})
    blocks, panels, missing = [], [], []
    seeds = set().union(*(set(found) for found in points.values()))
    for task, k in curved:
        entries = [tables.summarise(points.get((task, k, x))) for x in values]
        missing += [
            f"{setting.x} {x:g} on {task} at K = {k}"
            for x in values
            if set(points.get((task, k, x), {})) != seeds
        ]
        theirs = paper["table1"].get(k, {}).get(setting.method, {}).get(task)
        rows = [Row("ours", name_of(setting.method), entries)]
        curves = [
            Curve("ours", {x: (e.mean, e.spread) for x, e in zip(values, entries) if e is not None})
        ]
        if theirs and setting.usual in values:
            rows.append(
                Row(
                    "paper",
                    "paper",
                    [tables.Entry(*theirs) if x == setting.usual else None for x in values],
                    paper=True,
                )
            )
            curves.append(
                Curve("paper (table 1)", {setting.usual: tuple(theirs)}, THEIRS, line=False)
            )
        levels = {}
        for method in setting.beside:
            ours = tables.summarise(others.get((k, method, task)))
            levels |= {name_of(method): ours.mean} if ours else {}
            there = paper["table1"].get(k, {}).get(method, {}).get(task)
            levels |= {f"{name_of(method)}, paper": there[0]} if there else {}
            missing += [f"{name_of(method)} on {task} at K = {k}"] * (ours is None)
        title = f"{TASKS.get(task, task)}, K = {k}"
        notes = ", ".join(f"{level_name} {level:.2f}" for level_name, level in levels.items())
        blocks.append(Block(title + (f" (beside: {notes})" if notes else ""), rows))
        metric = next(run.results["metric"] for run in own if (run.task, run.k) == (task, k))
        panels.append(Panel(title, setting.x, f"{metric}, points", curves, levels))
    notes = [
        f"Backbone {one_backbone(runs)} in our rows, {THEIRS_ON}.",
        f"{len(own)} runs, {len(seeds)} seeds.",
        "The paper draws its points without numbers; the one shown is its table 1.",
    ]
    if single := [
        f"{TASKS.get(task, task)}, K = {k}" for task, k in places if (task, k) not in curved
    ]:
        notes.append(
            f"Left out, as only the usual {setting.usual:g} is there: {'; '.join(single)}."
        )
    notes += differences([run for run in own if (run.task, run.k) in curved], setting.drawn)
    return Table(
        name, setting.title, setting.x, {str(x): f"{x:g}" for x in values}, blocks, missing, notes
    ), panels
