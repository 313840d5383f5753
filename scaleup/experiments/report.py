"""Write the paper's tables and figures from finished runs, as Markdown, CSV and PNG.

`lines = report("table1", ["runs/table1"], output)` also makes table2 to table6, figure2, figure3
and differences. The paper's numbers stand in paper.yaml; where it has none, none are shown.
"""

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from scaleup.errors import ConfigError
from scaleup.experiments import plots, table_output, tables
from scaleup.experiments.comparisons import difference_table
from scaleup.experiments.plots import Curve, Forest, Panel
from scaleup.experiments.results import load
from scaleup.experiments.runs import (
    Run,
    check_one_metric,
    differences,
    name_of,
    one_backbone,
    unique,
)
from scaleup.experiments.tables import PAPER, SCALEUP, TASKS, Table
from scaleup.io import read_bytes, write_text
from scaleup.settings.loading import parse

PAPER_FILE = pathlib.Path(__file__).with_name("paper.yaml")
PAPER_NOTES = {  # what to say of the paper's numbers, if not that they are BERT-base's
    "table5": "the paper's numbers are not available",
    "table6": "the paper's are BERT-base, without those on development sets",
    "differences": "the paper has no scores of single seeds",
}
BENCH = "results/bench"  # the default of --bench, which need not exist
GEOMETRY = "bert-base"  # the benchmark's geometry whose times table 4 shows
# Methods by the names of the benchmark's variants. A fully fine-tuned model runs as a bare one.
VARIANTS = {
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
MLP = "APL, prefix MLP"  # how runs train by default, and the paper's way
TITLES = {
    "table1": "Table 1: GLUE with K training examples, test performance",
    "table2": "Table 2: average test performance of UniPELT and of the best of its submodules on "
    "each task",
    "table3": "Table 3: GLUE with all training examples",
    "table4": "Table 4: parameters, and training (T) and inference (I) time relative to "
    "fine-tuning",
    "table5": "Table 5: GLUE with K training examples, a larger backbone (in the paper BART-large)",
    "table6": "Table 6: GLUE with K training examples, development and test performance",
    "figure2": "Figure 2: bottleneck size of the adapter",
    "figure3": "Figure 3: scaling factor of LoRA",
    "differences": "Differences to LoRA and to the best single method, test performance",
}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure: the score of a method over one of its settings.

    Args:
        method: the method that the figure is about.
        x: the title of the axis.
        value: computes the setting's value from the `method` section of results.json.
        usual: the value with which the paper's table 1 was made.
        shown: the keys of the setting.
        beside: methods to compare with.
    """

    method: str
    x: str
    value: Callable[[dict[str, Any]], float]
    usual: float
    shown: tuple[str, ...]
    beside: tuple[str, ...] = ()


def _divisor(method: dict[str, Any]) -> float:
    """Return what LoRA's alpha is divided by. Earlier runs have no use_rslora in their results."""
    return method["r"] ** 0.5 if method.get("use_rslora") else method["r"]


FIGURES = {
    "figure2": Figure(
        method="adapter",
        x="bottleneck size",
        value=lambda method: method["adapter_size"],
        usual=48,
        shown=("method.adapter_size",),
        beside=("ap", "apl"),
    ),
    "figure3": Figure(
        method="lora",
        x="scaling factor (alpha / r)",
        value=lambda method: method["lora_alpha"] / _divisor(method),
        usual=2,
        shown=("method.lora_alpha", "method.r"),
    ),
}
RUNS = dict.fromkeys(TITLES, "runs/table1") | {
    name: f"runs/{name}" for name in ("table3", "table5", "figure2", "figure3")
}


def default_output(path: str) -> pathlib.Path:
    """Return report/ in the folder of the runs, or beside a table of runs: TABLE/report/."""
    parts = pathlib.Path(path).parts
    return pathlib.Path(*(part.removesuffix(".csv") for part in parts), "report")


def report(
    name: str, paths: Sequence[str], output: pathlib.Path, bench: Sequence[str] = (BENCH,)
) -> list[str]:
    """Write NAME.md and NAME.csv, and NAME.png for figures; return the lines to print.

    Args:
        name: a key of TITLES.
        paths: folders of sweeps or runs, and tables of runs.
        output: the folder to write into.
        bench: files of the benchmark, or folders of them, for table 4.

    Raises:
        ConfigError: with everything that is wrong with the runs.
    """
    paper = parse(PAPER_FILE.read_text(encoding="utf-8"), str(PAPER_FILE))
    runs = load(paths)
    backbone = one_backbone(runs)
    check_one_metric(runs)
    panels: list[Panel] = []
    forests: list[Forest] = []
    if name in FIGURES:
        table, panels = _figure(name, runs, paper["table1"])
    elif name == "differences":
        table, forests = difference_table(runs)
    else:
        table = _table(name, runs, paper, bench)
    if not table.cells.loc[table.cells["source"] == SCALEUP, "mean"].notna().any():
        raise ConfigError(f"--runs: {', '.join(paths)}: no run there belongs in {name}")
    note = PAPER_NOTES.get(name, "the paper's are BERT-base")
    table.notes.insert(0, f"Backbone {backbone} in the rows of scaleup, {note}.")
    output.mkdir(parents=True, exist_ok=True)
    title = TITLES[name]
    write_text(output / f"{name}.md", table_output.markdown(title, table))
    write_text(output / f"{name}.csv", table_output.csv_text(table))
    if panels:
        plots.draw_panels(panels, title, output / f"{name}.png")
    if forests:
        to_lora = "Difference to LoRA with a trained head, test performance"
        plots.draw_forests(forests, len(table.columns), to_lora, output / f"{name}.png")
    written = f"written: {output / name}.md, .csv{', .png' if panels or forests else ''}"
    return [*table_output.text(title, table), written]


def _table(name: str, runs: list[Run], paper: dict[str, Any], bench: Sequence[str]) -> Table:
    numbers = paper.get(name, {})
    if name == "table2":
        if several := sorted({name_of(run.method) for run in runs if run.variant}):
            raise ConfigError(
                "--runs: table 2 compares one setting of each method, and there are several of "
                f"{', '.join(several)}; give the folders of one"
            )
        return tables.upper_bound(runs, numbers)
    if name == "table3":
        return tables.high_resource(runs, numbers)
    if name == "table4":
        times, notes = _bench(bench)
        table = tables.efficiency(runs, numbers, times)
        table.notes += notes
        return table
    numbers = {} if name == "table5" else {"test": paper["table1"]}
    return tables.low_resource(runs, numbers, ["dev", "test"] if name == "table6" else ["test"])


def _bench(paths: Sequence[str]) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Read the times of the benchmark on the paper's geometry.

    Args:
        paths: files, and folders of which every suitable file counts.

    Returns:
        method → "training" and "inference" time relative to full fine-tuning, and notes.

    Raises:
        ConfigError: for two files on one kind of time, and for named files that do not fit.
    """
    absent = [path for path in paths if path != BENCH and not pathlib.Path(path).exists()]
    if absent:
        raise ConfigError([f"--bench: there is no {path}" for path in absent])
    named = [path for path in map(pathlib.Path, paths) if path.exists()]
    times: dict[str, dict[str, float]] = {}
    used: dict[str, pathlib.Path] = {}
    notes = []
    files = [[path] if path.is_file() else sorted(path.glob("*.json")) for path in named]
    for path in itertools.chain(*files):
        try:
            content = json.loads(read_bytes(path).decode("utf-8"))
            settings = content["settings"]
            ratios = {variant: float(row["ratio"]) for variant, row in content["rows"].items()}
            kind, geometry = settings["what"], settings["geometry"]
            where = [f"{geometry}, {settings['batch']} x {settings['length']} tokens"]
            where += [str(settings[key]) for key in ("device", "dtype") if key in settings]
            if not all(0 < ratio < math.inf for ratio in ratios.values()):
                raise ValueError("a time is not positive")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            notes.append(f"{path} is not a file of the benchmark.")
            continue
        options = ("ragged", "compile", "profile", "baseline")
        special = [option for option in options if settings.get(option)]
        variants = {method: name for name, method in VARIANTS.items() if name in ratios}
        if MLP in ratios:
            variants["apl"] = MLP
        complete = geometry == GEOMETRY and "full" in variants
        if special or not complete or kind not in ("training", "inference"):
            if path not in named:
                continue
            reason = f"without {GEOMETRY}'s time of full fine-tuning"
            raise ConfigError(
                f"--bench: {path} is {f'made with --{special[0]}' if special else reason}; "
                "table 4 takes the training and inference times of all methods"
            )
        if kind in used:
            raise ConfigError(
                f"--bench: {used[kind]} and {path} both have {kind} times; "
                "give the one to take with --bench FILE"
            )
        used[kind] = path
        notes.append(f"{kind.capitalize()} times from {path.name} ({', '.join(where)}).")
        if MLP in ratios:
            notes.append(
                "Training of UniPELT (APL) is with the prefix's MLP; prefix-tuning and UniPELT "
                "(AP) were timed without it."
            )
        for method, variant in variants.items():
            times.setdefault(method, {})[kind] = ratios[variant] / ratios[variants["full"]]
    if not used and list(paths) != [BENCH]:
        raise ConfigError(
            f"--bench: {', '.join(paths)} has no training or inference times of {GEOMETRY}"
        )
    return times, notes


def _figure(name: str, runs: Sequence[Run], paper: dict[Any, Any]) -> tuple[Table, list[Panel]]:
    """Build a figure's panels, one for each task and K, and its numbers as a table.

    Tasks and K with the usual value only make no panel, unless there is nothing else.
    """
    figure = FIGURES[name]
    of_method = [
        dataclasses.replace(run, variant="") for run in runs if run.method == figure.method
    ]
    by_key = unique(
        of_method, lambda run: (run.task, run.k, figure.value(run.results["method"]), run.seed)
    )
    points = pd.Series({key: run.points("test") for key, run in by_key.items()}, dtype=float)
    if points.dropna().empty:
        raise ConfigError(f"--runs: no run there belongs in {name}")
    frame = points.dropna().unstack(sort=False)
    beside = [run for run in runs if run.method in figure.beside]
    others = tables.summarise(tables.scores(beside, "test"))
    places = sorted({(task, k) for task, k, _ in frame.index}, key=str)
    drawn = sorted({(task, k) for task, k, x in frame.index if x != figure.usual}, key=str)
    drawn = drawn or places
    values = sorted({x for task, k, x in frame.index if (task, k) in drawn})
    cells, panels, missing = [], [], []
    for task, k in drawn:
        index = pd.MultiIndex.from_product([[task], [k], values])
        curve = frame.reindex(index).set_axis(pd.Index(values))
        summary = tables.summarise(curve)
        missing += [
            f"{figure.x} {x:g} on {task} at K = {k}" for x in curve.index[curve.isna().any(axis=1)]
        ]
        curves = [Curve(SCALEUP, summary.dropna(subset="mean"))]
        published = paper.get(k, {})
        point = published.get(figure.method, {}).get(task)
        if point and figure.usual in values:
            usual = pd.DataFrame([point], index=[figure.usual], columns=["mean", "std"])
            curves.append(Curve("paper (table 1)", usual, plots.PAPER, line=False))
        levels = {}
        for method in figure.beside:
            if (k, method, task) in others.index:
                levels[name_of(method)] = others.loc[(k, method, task), "mean"]
            else:
                missing.append(f"{name_of(method)} on {task} at K = {k}")
            if task in published.get(method, {}):
                levels[f"{name_of(method)}, paper"] = published[method][task][0]
        title = f"{TASKS.get(task, task)}, K = {k}"
        numbers = ", ".join(f"{level} {value:.2f}" for level, value in levels.items())
        block = f"{title} (beside: {numbers})" if numbers else title
        cells += tables.row_cells(block, figure.method, SCALEUP, summary)
        if len(curves) > 1:
            cells += tables.row_cells(block, figure.method, PAPER, usual.reindex(values))
        metric = next(run for run in of_method if (run.task, run.k) == (task, k)).results["metric"]
        panels.append(Panel(title, figure.x, f"{metric}, points", curves, levels))
    notes = [
        f"{len(of_method)} runs, {len(frame.columns)} seeds.",
        "The paper draws its points without numbers; the one shown is its table 1.",
    ]
    if single := [f"{TASKS.get(t, t)}, K = {k}" for t, k in places if (t, k) not in drawn]:
        notes.append(f"Left out, as only the usual {figure.usual:g} is there: {'; '.join(single)}.")
    notes += differences([run for run in of_method if (run.task, run.k) in drawn], figure.shown)
    columns = {str(x): f"{x:g}" for x in values}
    frame = tables.to_frame(cells)
    frame["column"] = frame["column"].map(str)
    return Table(figure.x, columns, frame, notes, missing), panels
