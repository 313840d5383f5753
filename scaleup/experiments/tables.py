"""Build tables in the layout of the paper from finished runs.

Scores are points (100 times the metric), as mean and standard deviation over seeds (n - 1). The
last column is the mean over the tasks shown, of the seeds that all of them have; its standard
deviation is that of each seed's mean. Below a row stands the paper's, where the paper has one.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd

from scaleup.experiments.runs import (
    FROZEN,
    NAMES,
    PARTS,
    Run,
    differences,
    method_of,
    name_of,
    position,
    unique,
)

TASKS = {
    "sst2": "SST-2",
    "mrpc": "MRPC",
    "cola": "CoLA",
    "rte": "RTE",
    "qnli": "QNLI",
    "stsb": "STS-B",
    "mnli": "MNLI",
    "qqp": "QQP",
}
EXPECTED = tuple(method for method in NAMES if method != "apl_nogate")  # methods of a full table
KS = (100, 500, 1000)
AVERAGE = "average"
SCALEUP, PAPER = "scaleup", "paper"  # the source of a row
CELL = ("block", "row", "source", "column", "mean", "std", "seeds", "rank")


@dataclasses.dataclass
class Table:
    """A table as one row per cell.

    Attributes:
        first: the title of the column with the rows' titles.
        columns: key → title of the other columns.
        cells: the columns of CELL, in the order in which rows are shown. `mean` is missing where
            there is no result; `rank` is 1 for the best of a column in its block, 2 for the second.
        notes: sentences below the table.
        missing: what a full table would have besides.
        formats: column → format of its numbers, if not two decimals.
        title_of: returns the title of a row from its key.
    """

    first: str
    columns: dict[str, str]
    cells: pd.DataFrame
    notes: list[str]
    missing: list[str]
    formats: dict[str, str] = dataclasses.field(default_factory=dict)
    title_of: Callable[[str], str] = name_of

    @property
    def footer(self) -> list[str]:
        """The notes, and a last sentence on what is missing."""
        return [*self.notes, f"Missing: {'; '.join(self.missing) or 'nothing'}."]


def row_cells(
    block: str, row: str, source: str, values: pd.DataFrame | dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the cells of one row, whose source is SCALEUP or PAPER.

    `values` is column → mean, or a frame with the table's columns as index and the columns mean,
    std and seeds, of which the last two may be absent.
    """
    if isinstance(values, dict):
        values = pd.DataFrame({"mean": values})
    head = {"block": block, "row": row, "source": source}
    return [head | {"column": column} | dict(cell) for column, cell in values.iterrows()]


def to_frame(cells: Sequence[dict[str, Any]], more: Sequence[str] = ()) -> pd.DataFrame:
    """Return cells as a frame with the columns of CELL and those named in `more`."""
    frame = pd.DataFrame(cells, columns=[*CELL, *more])
    return frame.astype({"mean": float, "std": float, "seeds": "Int64", "rank": "Int64"})


def rank(cells: pd.DataFrame, groups: Sequence[Any] = ("block", "source", "column")) -> pd.Series:
    """Rank the cells of each group by the number shown: 1 or 2; none where there is one cell."""
    by_group = cells["mean"].round(2).groupby([cells[key] for key in groups])
    ranks = by_group.rank(method="dense", ascending=False)
    return ranks.where((ranks <= 2) & (by_group.transform("count") > 1)).astype("Int64")


def scores(runs: Iterable[Run], split: str) -> pd.DataFrame:
    """Return points with index (k, row, task) and one column per seed.

    Raises:
        ConfigError: for two runs of one trial.
    """
    by_key = unique(list(runs), lambda run: (run.k, run.row, run.task, run.seed))
    points = {key: run.points(split) for key, run in by_key.items()}
    index = pd.MultiIndex.from_tuples(points, names=["k", "row", "task", "seed"])
    series = pd.Series(list(points.values()), index=index, dtype=float).dropna()
    return series.unstack("seed", sort=False)


def summarise(points: pd.DataFrame) -> pd.DataFrame:
    """Return mean, standard deviation and number of the seeds of each row."""
    return pd.DataFrame(
        {
            "mean": points.mean(axis="columns"),
            "std": points.std(axis="columns"),
            "seeds": points.count(axis="columns").replace(0, None),
        }
    )


def select(points: pd.DataFrame, k: Any, row: str, tasks: Sequence[str]) -> pd.DataFrame:
    """Return one row's points, with the tasks as index."""
    index = pd.MultiIndex.from_product([[k], [row], tasks], names=points.index.names)
    return points.reindex(index).set_axis(pd.Index(tasks))


def level(points: pd.DataFrame, name: str) -> list[Any]:
    """Return the values of an index level; numbers first."""
    values = set(points.index.get_level_values(name))
    return sorted(values, key=lambda value: (isinstance(value, str), value))


def tasks_of(points: pd.DataFrame) -> list[str]:
    """Return the tasks with results, in the paper's order."""
    present = level(points, "task")
    return [*(task for task in TASKS if task in present), *(t for t in present if t not in TASKS)]


def _paper_row(numbers: dict[str, Any], tasks: Sequence[str]) -> pd.DataFrame:
    """Return the paper's row; over fewer than all tasks, its average is computed."""
    pairs = {key: value if isinstance(value, list) else [value] for key, value in numbers.items()}
    frame = pd.DataFrame({key: [*value, None][:2] for key, value in pairs.items()}, dtype=float)
    frame = frame.T.set_axis(["mean", "std"], axis="columns").reindex([*tasks, AVERAGE])
    if set(tasks) != set(TASKS):
        frame.loc[AVERAGE] = [frame["mean"].reindex(tasks).mean(skipna=False), None]
    return frame


def _missing(points: pd.DataFrame, expected_k: Sequence[Any], methods: Sequence[str]) -> list[str]:
    """Name what a full table would have: first tasks and K, then rows, then seeds of cells.

    Runs on other data than GLUE are compared with each other only.
    """
    present, ks = tasks_of(points), level(points, "k")
    tasks = [task for task in present if task in TASKS]
    missing = []
    if present and not tasks:
        tasks = present
        methods = [method for method in NAMES if method in level(points, "row")]
    else:
        missing = [f"task {title}" for task, title in TASKS.items() if task not in present]
        missing += [f"K = {k}" for k in expected_k if k not in ks]
    for k in ks:
        present_methods = {
            method_of(row) for other, row, task in points.index if other == k and task in tasks
        }
        absent_methods = [method for method in methods if method not in present_methods]
        missing += [f"{name_of(method)} at K = {k}" for method in absent_methods]
        others = sorted(present_methods - set(methods), key=position)
        missing += missing_scores(points, k, [*methods, *others], tasks)
    return missing


def missing_scores(
    points: pd.DataFrame, k: Any, rows: Sequence[str], tasks: Sequence[str]
) -> list[str]:
    """Name the tasks and seeds that rows with some results lack."""
    missing = []
    # With K all, seeds are those of training only, and have other names than seeds of sampling.
    kind = (points.index.get_level_values("k") == "all") == (k == "all")
    points = points[kind].dropna(axis="columns", how="all")
    for row in rows:
        if not any((k, row, task) in points.index for task in tasks):
            continue
        for task, seeds in select(points, k, row, tasks).iterrows():
            absent = _listed(seeds[seeds.isna()].index)
            if absent:
                some = f", seed {absent}" if seeds.notna().any() else ""
                missing.append(f"{name_of(row)} on {TASKS.get(task, task)} at K = {k}{some}")
    return missing


def _listed(seeds: Iterable[int | str]) -> str:
    """Name seeds in order, numbers first."""
    return ", ".join(map(str, sorted(seeds, key=lambda seed: (isinstance(seed, str), seed))))


def _count_note(runs: Sequence[Run], points: pd.DataFrame) -> str:
    return f"{len(runs)} runs, seeds {_listed(points.columns)}."


def low_resource(runs: Sequence[Run], paper: dict[str, Any], splits: Sequence[str]) -> Table:
    """Build tables 1, 5 and 6, with a block for each split ("dev" or "test") and K.

    `paper` is split → K → method → task → [mean, standard deviation].
    """
    runs, left_out = with_test_set(runs)
    points = {split: scores(runs, split) for split in {*splits, "test"}}
    blocks = []
    for split in splits:
        for k in level(points[split], "k"):
            heading = f"[K = {k}] {'Test' if split == 'test' else 'Development'} Performance"
            blocks.append((heading, k, points[split], paper.get(split, {}).get(k, {})))
    table = _by_task(runs, points["test"], blocks)
    table.missing = _missing(points["test"], KS, EXPECTED)
    table.notes += left_out
    return table


def with_test_set(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Return the runs whose test set is not the development set, and a note on the others."""
    kept = [run for run in runs if not run.results["test_is_dev"]]
    count = len(runs) - len(kept)
    note = (
        f"{count} run{'s' * (count > 1)} on all of GLUE's examples left out, whose test set is the "
        "dev set: table 3 has them."
    )
    return kept, [note] if count else []


def high_resource(runs: Sequence[Run], paper: dict[str, Any]) -> Table:
    """Build table 3: all training examples, best result on the development set."""
    runs = [run for run in runs if run.k == "all"]
    points = scores(runs, "dev")
    blocks = [("[K = all] Best Performance on GLUE Dev", "all", points, paper)]
    table = _by_task(runs, points, blocks)
    table.missing = _missing(points, ("all",), [name for name in EXPECTED if name != "bitfit"])
    return table


def _by_task(runs: Sequence[Run], points: pd.DataFrame, blocks: Sequence[tuple]) -> Table:
    """Build a table with a column for each task of `points`, and a row for each method.

    `blocks` holds title, K, points and the paper's numbers of each block.
    """
    tasks = tasks_of(points)
    cells, incomplete = [], []
    for heading, k, of_block, paper in blocks:
        present = {row for other, row, _ in of_block.index if other == k}
        for row in sorted(present | set(paper), key=position):
            chosen = select(of_block, k, row, tasks)
            seeds = chosen.notna().any().sum()
            chosen.loc[AVERAGE] = chosen.mean(skipna=False)
            complete = chosen.loc[AVERAGE].count()
            if complete < seeds:
                incomplete.append(f"{complete} of {seeds} for {name_of(row)}, {heading}")
            cells += row_cells(heading, row, SCALEUP, summarise(chosen))
            if row in paper:
                cells += row_cells(heading, row, PAPER, _paper_row(paper[row], tasks))
    frame = to_frame(cells)
    frame["rank"] = rank(frame)
    notes = [
        _count_note(runs, points),
        "Subscript: standard deviation over seeds (n - 1). Bold: best of scaleup's rows, or of the "
        "paper's; underlined: second best.",
    ]
    if set(tasks) != set(TASKS):
        average = f"Avg. is over {len(tasks)} task{'s' * (len(tasks) > 1)}"
        in_paper = ", also in the paper's rows (computed from their cells)"
        notes.append(average + in_paper * (PAPER in set(frame["source"])) + ".")
    if any(method_of(row).endswith(FROZEN) for row in frame["row"]):
        notes.append("The authors' code freezes the head of BitFit, prefix-tuning and LoRA alone.")
    if incomplete:
        notes.append(f"Avg. counts the seeds that have all tasks: {'; '.join(incomplete)}.")
    columns = {task: TASKS.get(task, task) for task in tasks} | {AVERAGE: "Avg."}
    return Table("Method", columns, frame, notes + differences(runs), [])


def upper_bound(runs: Sequence[Run], paper: dict[Any, Any]) -> Table:
    """Build table 2: UniPELT against the best submodule on each task, averaged over tasks.

    Both columns of a pair use the seeds that all their methods have on all tasks.
    """
    runs, left_out = with_test_set(runs)
    points = scores(runs, "test")
    tasks = tasks_of(points)
    columns = {"max_ap": "max({A, P})", "ap": "UniPELT (AP)"}
    columns |= {"max_apl": "max({A, P, L})", "apl": "UniPELT (APL)"}
    cells = []
    for k in level(points, "k"):
        values = []
        for letters in ("ap", "apl"):
            parts = [part for part in PARTS if part[0] in letters]
            values += _best_means(points, k, tasks, (parts, [letters]))
        cells += row_cells("", str(k), SCALEUP, pd.DataFrame(values, index=pd.Index(columns)))
        if set(tasks) == set(TASKS) and k in paper:
            cells += row_cells("", str(k), PAPER, {column: paper[k][column] for column in columns})
    frame = to_frame(cells)
    pair = frame["column"].str.removeprefix("max_").rename("pair")
    ranks = rank(frame.assign(pair=pair), ("row", "source", "pair"))
    frame["rank"] = ranks.where(ranks == 1)
    notes = [
        _count_note(runs, points),
        *left_out,
        "The best mean of the submodules on each task, averaged over tasks. "
        "Bold: the larger of each pair.",
    ]
    if set(tasks) != set(TASKS):
        averages = f"the paper's averages are over {len(TASKS)} and not shown"
        notes.append(f"Over {len(tasks)} tasks; {averages}.")
    missing = _missing(points, KS, (*PARTS, "ap", "apl"))
    return Table("K", columns, frame, notes, missing, title_of=str)


def _best_means(
    points: pd.DataFrame, k: Any, tasks: Sequence[str], sides: Sequence[Sequence[str]]
) -> list[dict[str, float | None]]:
    """Return for each side the mean over tasks of its best method there.

    A side has no mean without seeds that all its methods have on all tasks. If both sides have
    such seeds, those that they share count.
    """
    of_sides = [
        pd.concat({part: select(points, k, part, tasks) for part in parts}).dropna(axis="columns")
        for parts in sides
    ]
    if all(len(side.columns) for side in of_sides):
        shared = of_sides[0].columns.intersection(of_sides[1].columns)
        of_sides = [side[shared] for side in of_sides]
    return [
        {
            "mean": side.mean(axis="columns").groupby(level=1).max().mean(skipna=False),
            "seeds": len(side.columns) or None,
        }
        for side in of_sides
    ]


def efficiency(
    runs: Sequence[Run], paper: dict[str, Any], times: dict[str, dict[str, float]]
) -> Table:
    """Build table 4: parameters that are stored after training, and measured times.

    `paper` is method → column → number. `times` is method → "training" and "inference" time as a
    share of full fine-tuning's.
    """
    columns = {"parameters": "#Param. (K)", "percent": "% of model"}
    columns |= {"training": "Time T (%)", "inference": "Time I (%)"}
    cells, missing = [], []
    for method in (m for m in NAMES if any(run.method == m for run in runs) or m in paper):
        counted = [run.results["parameters"] for run in runs if run.method == method]
        pairs = {(counts["stored"] / 1000, counts["stored_percent"]) for counts in counted}
        values = dict(zip(columns, pairs.pop())) if len(pairs) == 1 else {}
        values |= {kind: 100 * share for kind, share in times.get(method, {}).items()}
        for key in ("parameters", "training", "inference"):
            if key not in values:
                noun = key if key == "parameters" else f"{key} time"
                missing.append(f"{noun} of {name_of(method)}")
        cells += row_cells("", method, SCALEUP, {key: values.get(key) for key in columns})
        if method in paper:
            cells += row_cells("", method, PAPER, {key: paper[method][key] for key in columns})
    notes = ["Parameters: what is stored after training, without the task's head."]
    formats = {"parameters": "{:,.0f}", "training": "{:.0f}", "inference": "{:.0f}"}
    return Table("Method", columns, to_frame(cells), notes, missing, formats)
