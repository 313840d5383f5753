"""Tables in the paper's layout, as data: blocks of rows, each cell a mean with its standard deviation; and as Markdown, CSV and text.

    table = low_resource(runs, paper, "test")        table 1; the others are below
    markdown(table), csv_lines(table), text(table)

Scores are points (100 times the metric). The standard deviation is that over data seeds, with n - 1. The last column is the mean
over the tasks shown, of the seeds that all of them have; its spread is that of each seed's mean. Below a row of ours stands the paper's, where the paper has one.
"""

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from scaleup.experiments.results import (
    NAMES,
    Run,
    differences,
    method_of,
    name_of,
    one_backbone,
    unique,
)
from scaleup.unipelt.config import SUBMODULES

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
SHOWN = tuple(
    method for method in NAMES if method != "apl_nogate"
)  # rows that are missed where they are not there
AVERAGE = "average"


@dataclasses.dataclass
class Entry:
    """A cell. seeds: how many runs it is made of. rank: 1 the best of its column in its block, 2 the second, else 0. form: how to
    write the mean."""

    mean: float
    spread: float | None = None
    seeds: int | None = None
    rank: int = 0
    form: str = "{:.2f}"

    @property
    def shown(self) -> str:
        return self.form.format(self.mean)

    @property
    def shown_spread(self) -> str:
        return "" if self.spread is None else self.form.format(self.spread)


@dataclasses.dataclass
class Row:
    """entries: one for each column, None where there is no result. paper: the numbers are the paper's."""

    key: str
    title: str
    entries: list[Entry | None]
    paper: bool = False


@dataclasses.dataclass
class Block:
    title: str
    rows: list[Row]


@dataclasses.dataclass
class Table:
    """columns: key → title. missing: what a whole table would have besides, one item each. notes: what a reader must know."""

    name: str
    title: str
    first: str
    columns: dict[str, str]
    blocks: list[Block]
    missing: list[str]
    notes: list[str]


def rank(rows: Sequence[Row]) -> None:
    """Marks the best and the second best of each column, by what is shown; nothing where there is no choice."""
    for entries in zip(*(row.entries for row in rows)):
        there = [entry for entry in entries if entry is not None]
        order = sorted({float(entry.shown) for entry in there}, reverse=True)
        for entry in there if len(there) > 1 else ():
            entry.rank = {0: 1, 1: 2}.get(order.index(float(entry.shown)), 0)


def summarise(points: dict[int, float] | None) -> Entry | None:
    """Mean and spread over seeds. points: seed → score."""
    if not points:
        return None
    values = list(points.values())
    return Entry(
        statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)
    )


Scores = dict[tuple[Any, str, str], dict[int, float]]


def scores(runs: Iterable[Run], split: str) -> Scores:
    """(k, row, task) → seed → points. Raises ConfigError for two runs of one cell."""
    out: Scores = {}
    for (k, method, task, seed), run in unique(
        list(runs), lambda run: (run.k, run.row, run.task, run.seed)
    ).items():
        if run.results[split] is not None and not math.isnan(points := run.points(split)):
            out.setdefault((k, method, task), {})[seed] = points
    return out


def _average(by_task: Sequence[dict[int, float] | None]) -> Entry | None:
    """Over the tasks shown, from the seeds that all of them have."""
    return summarise(
        {seed: statistics.fmean(points[seed] for points in by_task) for seed in common(by_task)}
    )


def common(cells: Sequence[dict[int, float] | None]) -> set[int]:
    """The seeds that all of these cells have."""
    return set.intersection(*(set(points or ()) for points in cells)) if cells else set()


def _paper_row(method: str, numbers: dict[str, Any] | None, tasks: Sequence[str]) -> Row | None:
    """The paper's row for these tasks; its average is printed for all tasks and worked out for fewer."""
    if not numbers:
        return None
    pairs = {
        task: value if isinstance(value, list) else [value, None] for task, value in numbers.items()
    }
    entries = [Entry(*pairs[task]) if task in pairs else None for task in tasks]
    if set(tasks) == set(TASKS):
        average = Entry(*pairs[AVERAGE])
    else:
        average = (
            Entry(statistics.fmean(e.mean for e in entries))
            if entries and None not in entries
            else None
        )
    return Row(method, "paper", [*entries, average], paper=True)


def _block(title: str, found: Scores, k: Any, tasks: Sequence[str], paper: dict[str, Any]) -> Block:
    """One K: for each method our row, then the paper's."""
    there = [method for (other, method, _) in found if other == k]
    methods = [*NAMES, *sorted(set(there) - set(NAMES))]
    ours, theirs, rows = [], [], []
    for method in (m for m in methods if m in there or m in paper):
        by_task = [found.get((k, method, task)) for task in tasks]
        row = Row(method, name_of(method), [*map(summarise, by_task), _average(by_task)])
        ours.append(row)
        other = _paper_row(method, paper.get(method), tasks)
        theirs += [other] * (other is not None)
        rows += [row, *([other] if other is not None else [])]
    rank(ours)
    rank(theirs)
    return Block(title, rows)


def _missing(
    found: Scores, ks: Sequence[Any], wanted: Sequence[Any], methods: Sequence[str]
) -> list[str]:
    """What a whole table would have: tasks and K by name where they are missing altogether, then cells, then seeds of cells. Of runs on
    other data than GLUE, what some of their methods have and others have not."""
    tasks = [task for task in _columns(found) if task != AVERAGE]
    if found and not set(tasks) & set(TASKS):
        wanted, methods = ks, [method for method in NAMES if any(method == m for _, m, _ in found)]
    else:
        tasks = [task for task in tasks if task in TASKS]
    out = [f"task {TASKS[task]}" for task in TASKS if task not in tasks and wanted is not ks]
    out += [f"K = {k}" for k in wanted if k not in ks]
    seeds = set().union(*(set(points) for points in found.values()))
    for k in ks:
        there = {(method_of(row), task) for other, row, task in found if other == k}
        absent = [
            method for method in methods if not any((method, task) in there for task in tasks)
        ]
        out += [f"{name_of(method)} at K = {k}" for method in absent]
        for method in (m for m in methods if any((k, m, task) in found for task in tasks)):
            for task in tasks:
                lack = sorted(seeds - set(found.get((k, method, task), {})))
                if lack:
                    some = f", seed {', '.join(map(str, lack))}" if len(lack) < len(seeds) else ""
                    out.append(f"{name_of(method)} on {TASKS.get(task, task)} at K = {k}{some}")
    return out


def _columns(found: Scores) -> dict[str, str]:
    """The tasks that have results, the paper's first, and the average."""
    there = {task for _, _, task in found}
    return (
        {task: title for task, title in TASKS.items() if task in there}
        | {task: task for task in sorted(there - set(TASKS))}
        | {AVERAGE: "Avg."}
    )


def _notes(runs: Sequence[Run], found: Scores, what: str, blocks: Sequence[Block]) -> list[str]:
    seeds = sorted(set().union(*(set(points) for points in found.values())))
    notes = [
        f"Backbone {one_backbone(runs)} in our rows, {what}.",
        f"{len(runs)} runs, seeds {', '.join(map(str, seeds))}.",
    ]
    notes.append(
        "Subscript: standard deviation over seeds (n - 1). Bold: best of our rows, or of the paper's; underlined: second best."
    )
    tasks = [task for task in _columns(found) if task != AVERAGE]
    if set(tasks) != set(TASKS):
        theirs = ", the paper's too (worked out from its cells)" * any(
            row.paper for block in blocks for row in block.rows
        )
        notes.append(f"Avg. is over {len(tasks)} task{'s' * (len(tasks) > 1)}{theirs}.")
    return notes + differences(runs)


def _sorted_k(found: Scores) -> list[Any]:
    return sorted({k for k, _, _ in found}, key=lambda k: (isinstance(k, str), k))


def low_resource(
    name: str,
    title: str,
    runs: Sequence[Run],
    paper: dict[Any, Any],
    what: str,
    splits: Sequence[str] = ("test",),
) -> Table:
    """Tables 1, 5 and 6: a block for each K and split. paper: split → K → method → task → [mean, spread]."""
    runs, others = _with_test_set(runs)
    columns, blocks = _columns(scores(runs, "test")), []
    tasks = [task for task in columns if task != AVERAGE]
    for split in splits:
        found = scores(runs, split)
        for k in _sorted_k(found):
            heading = f"[K = {k}] {'Test' if split == 'test' else 'Development'} Performance"
            blocks.append(_block(heading, found, k, tasks, paper.get(split, {}).get(k, {})))
    found = scores(runs, "test")
    missing = _missing(found, _sorted_k(found), (100, 500, 1000), SHOWN)
    return Table(
        name, title, "Method", columns, blocks, missing, _notes(runs, found, what, blocks) + others
    )


def _with_test_set(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The runs with test examples that nothing was chosen on, and what is to be said of the others."""
    kept = [run for run in runs if not run.results["test_is_dev"]]
    left = len(runs) - len(kept)
    return kept, [
        f"{left} run{'s' * (left > 1)} on all of GLUE's examples left out, whose test set is the dev set: table 3 has them."
    ] * bool(left)


def high_resource(
    name: str, title: str, runs: Sequence[Run], paper: dict[str, Any], what: str
) -> Table:
    """Table 3: all training examples, the best result on the development set."""
    everything = [run for run in runs if run.k == "all"]
    found = scores(everything, "dev")
    columns = _columns(found)
    block = _block(
        "[K = all] Best Performance on GLUE Dev",
        found,
        "all",
        [task for task in columns if task != AVERAGE],
        paper,
    )
    missing = _missing(
        found, _sorted_k(found), ("all",), [method for method in SHOWN if method != "bitfit"]
    )
    return Table(
        name,
        title,
        "Method",
        columns,
        [block],
        missing,
        _notes(everything, found, what, [block]) if everything else [],
    )


def upper_bound(
    name: str, title: str, runs: Sequence[Run], paper: dict[Any, Any], what: str
) -> Table:
    """Table 2: for each K the average over tasks of the best submodule, against UniPELT. From the means of table 1, over the seeds that
    every task and method of a pair has."""
    runs, others = _with_test_set(runs)
    found = scores(runs, "test")
    columns = {
        "max_ap": "max({A, P})",
        "ap": "UniPELT (AP)",
        "max_apl": "max({A, P, L})",
        "apl": "UniPELT (APL)",
    }
    tasks = [task for task in _columns(found) if task != AVERAGE]
    rows = []
    for k in _sorted_k(found):
        # The column of a maximum takes the best submodule on each task, that of UniPELT its own.
        pairs = [
            [[part for part in SUBMODULES if part[0] in letters], [letters]]
            for letters in ("ap", "apl")
        ]
        rows.append(
            Row(
                str(k),
                str(k),
                [entry for pair in pairs for entry in _best_means(found, k, tasks, pair)],
            )
        )
        same = set(tasks) == set(TASKS) and k in paper
        rows += (
            [Row(str(k), "paper", [Entry(paper[k][column]) for column in columns], paper=True)]
            if same
            else []
        )
    for row in rows:
        for left in (0, 2):  # within each pair, the larger is bold
            pair = row.entries[left : left + 2]
            if None not in pair:
                larger = max(float(entry.shown) for entry in pair)
                for entry in pair:
                    entry.rank = int(float(entry.shown) == larger)
    notes = (
        _notes(runs, found, what, [])[:2]
        + others
        + [
            "The best mean of the submodules on each task, averaged over tasks. Bold: the larger of each pair."
        ]
    )
    if set(tasks) != set(TASKS):
        notes.append(
            f"Over {len(tasks)} tasks; the paper's averages are over {len(TASKS)} and not shown."
        )
    missing = _missing(found, _sorted_k(found), (100, 500, 1000), (*SUBMODULES, "ap", "apl"))
    return Table(name, title, "K", columns, [Block("", rows)], missing, notes)


def _best_means(
    found: Scores, k: Any, tasks: Sequence[str], sides: Sequence[Sequence[str]]
) -> list[Entry | None]:
    """For each side the mean over tasks of its best method there, over the seeds that all of its cells have, and where both sides
    have results all of both's; None for a side without such seeds."""
    cells = [
        {(part, task): found.get((k, part, task)) for part in parts for task in tasks}
        for parts in sides
    ]
    seeds = [common(list(side.values())) for side in cells]
    if all(seeds):
        seeds = [set.intersection(*seeds)] * len(seeds)
    entries: list[Entry | None] = []
    for parts, side, shared in zip(sides, cells, seeds):
        best = (
            [
                max(statistics.fmean(side[part, task][seed] for seed in shared) for part in parts)
                for task in tasks
            ]
            if shared
            else []
        )
        entries.append(Entry(statistics.fmean(best), seeds=len(shared)) if best else None)
    return entries


def efficiency(
    name: str,
    title: str,
    runs: Sequence[Run],
    paper: dict[str, Any],
    bench: dict[str, dict[str, float]],
    what: str,
) -> Table:
    """Table 4: parameters that remain after training, and the times of a benchmark, %.

    bench: method → "training" and "inference" time as a share of full fine-tuning's.
    """
    columns = {
        "parameters": "#Param. (K)",
        "percent": "% of model",
        "training": "Time T (%)",
        "inference": "Time I (%)",
    }
    rows, missing = [], []
    for method in (m for m in NAMES if any(run.method == m for run in runs) or m in paper):
        counts = {
            (run.results["parameters"]["stored"], run.results["parameters"]["stored_percent"])
            for run in runs
            if run.method == method
        }
        entries: list[Entry | None] = [None] * 4
        if len(counts) == 1:
            stored, percent = counts.pop()
            entries[:2] = [Entry(stored / 1000, form="{:,.0f}"), Entry(percent)]
        else:
            missing.append(f"parameters of {name_of(method)}")
        for i, kind in enumerate(("training", "inference"), 2):
            if kind in bench.get(method, {}):
                entries[i] = Entry(100 * bench[method][kind], form="{:.0f}")
            else:
                missing.append(f"{kind} time of {name_of(method)}")
        rows.append(Row(method, name_of(method), entries))
        if method in paper:
            forms = ("{:,.0f}", "{:.2f}", "{:.0f}", "{:.0f}")
            rows.append(
                Row(
                    method,
                    "paper",
                    [Entry(paper[method][c], form=f) for c, f in zip(columns, forms)],
                    paper=True,
                )
            )
    notes = [
        f"Backbone {one_backbone(runs)} in our rows, {what}.",
        "Parameters: what is stored after training, without the task's head.",
    ]
    return Table(name, title, "Method", columns, [Block("", rows)], missing, notes)


def _marked(entry: Entry | None, best: str, second: str, spread: str) -> str:
    if entry is None:
        return "–"
    mark = {1: best, 2: second}.get(entry.rank, "{}")
    return mark.format(entry.shown) + (
        spread.format(entry.shown_spread) if entry.spread is not None else ""
    )


def markdown(table: Table) -> str:
    """For GitHub: bold, underlined, subscripts; the paper's rows in italics."""
    lines = [
        f"### {table.title}",
        "",
        "| " + " | ".join([table.first, *table.columns.values()]) + " |",
        "|---|" + "---:|" * len(table.columns),
    ]
    for block in table.blocks:
        if block.title:
            lines.append(f"| **{block.title}** |" + " |" * len(table.columns))
        for row in block.rows:
            cells = [
                row.title,
                *(_marked(entry, "**{}**", "<u>{}</u>", "<sub>{}</sub>") for entry in row.entries),
            ]
            lines.append(
                "| " + " | ".join(f"*{cell}*" if row.paper else cell for cell in cells) + " |"
            )
    return "\n".join([*lines, "", *(f"{note}  " for note in table.notes), missing_line(table), ""])


def missing_line(table: Table) -> str:
    """What is not there, by name."""
    return f"Missing: {'; '.join(table.missing) if table.missing else 'nothing'}."


def text(table: Table) -> list[str]:
    """For a terminal: `*` the best, `'` the second best."""
    head = [table.first, *table.columns.values()]
    lines: list[list[str] | str] = [head]
    for block in table.blocks:
        lines += [block.title] * bool(block.title)
        for row in block.rows:
            lines.append(
                [
                    "  paper" if row.paper else row.title,
                    *(_marked(entry, "{}*", "{}'", " ±{}") for entry in row.entries),
                ]
            )
    widths = [
        max(len(line[i]) for line in lines if not isinstance(line, str)) for i in range(len(head))
    ]
    shown = [
        line
        if isinstance(line, str)
        else "  ".join(
            [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]
        ).rstrip()
        for line in lines
    ]
    ranked = any(
        entry is not None and entry.rank
        for block in table.blocks
        for row in block.rows
        for entry in row.entries
    )
    legend = [
        "* best, ' second best of ours, or of the paper's; ± standard deviation over seeds"
    ] * ranked
    return [table.title, *shown, *legend, *table.notes, missing_line(table)]


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """FusedQKVLayout under a header; None is an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue()


def csv_lines(table: Table) -> str:
    """One line for each cell, also for those without a result."""
    rows = []
    for block in table.blocks:
        for row in block.rows:
            for column, entry in zip(table.columns, row.entries):
                cell = [block.title, row.key, "paper" if row.paper else "ours", column]
                spread = None if entry is None or entry.spread is None else round(entry.spread, 4)
                rows.append(
                    cell
                    + (
                        [None] * 4
                        if entry is None
                        else [round(entry.mean, 4), spread, entry.seeds, entry.rank or None]
                    )
                )
    return csv_text(("block", "row", "source", "column", "mean", "std", "seeds", "rank"), rows)
