"""Compare methods with LoRA and with the best single method, seed by seed.

A difference is the score of a method minus that of the reference with the same task, data seed and
training seed. Intervals are for the mean difference, on one task or over tasks. There are two:

- The bootstrap resamples the seeds and takes percentiles. For the mean over tasks, it resamples
  within each task, as the tasks have different examples. It is too narrow for few seeds: with five
  and a nominal 95%, it covers the true difference on one task in 84% of cases, and the mean over
  four independent tasks in 90%.
- Student's t takes the mean over tasks of each seed as one observation. It is as wide as it should
  be for few seeds, and it remains valid if the tasks share what a training seed decides, such as
  the initial weights. Then the bootstrap over tasks is narrower still. Student's t assumes that
  the differences of the seeds have a normal distribution.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from scaleup.experiments import tables
from scaleup.experiments.plots import Forest
from scaleup.experiments.runs import FROZEN, PARTS, Run, differences, method_of, name_of, position
from scaleup.experiments.tables import AVERAGE, SCALEUP, TASKS, Table

REFERENCE = "lora"
# Candidates for the best single method: the paper's submodules, alone. The authors' code trains the
# head with an adapter only.
SINGLE = {
    "best single method": PARTS,
    "best with the authors' heads": ("adapter", "prefix_frozen", "lora_frozen"),
}
INTERVALS = ("low", "high", "t_low", "t_high")
RESAMPLES = 10_000
SEED = 0  # of the resampling
TAILS = (0.025, 0.975)


def intervals(values_TS: np.ndarray) -> dict[str, float]:
    """Return 95% intervals for the mean of paired differences over tasks and seeds.

    Args:
        values_TS: differences, one row per task and one column per seed.

    Returns:
        low and high, by the bootstrap; t_low and t_high, by Student's t. NaN for a single seed.
    """
    tasks, seeds = values_TS.shape
    if seeds < 2:
        return dict.fromkeys(INTERVALS, np.nan)
    draws_RTS = np.random.default_rng(SEED).integers(seeds, size=(RESAMPLES, tasks, seeds))
    # Sorted, so that the order of the seeds has no influence.
    resampled_RTS = np.take_along_axis(np.sort(values_TS)[None], draws_RTS, axis=2)
    low, high = np.quantile(resampled_RTS.mean(axis=(1, 2)), TAILS)
    means_S = values_TS.mean(axis=0)
    error = means_S.std(ddof=1) / np.sqrt(seeds)
    t_low, t_high = means_S.mean() + error * stats.t.ppf(TAILS, seeds - 1)
    return dict(zip(INTERVALS, map(float, (low, high, t_low, t_high))))


def compare(points: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """Return the mean difference of two methods on each task and over all tasks.

    Args:
        points: scores of a method, one row per task and one column per seed.
        reference: those of the reference, with the same rows and columns.

    Returns:
        One row per task and one for AVERAGE, with the columns mean, std (of the seeds), seeds (the
        number of pairs; over all tasks, of seeds that have all of them) and INTERVALS.
    """
    paired = points - reference
    parts = {task: paired.loc[[task]] for task in paired.index} | {AVERAGE: paired}
    rows = {}
    for name, part in parts.items():
        values = part.dropna(axis="columns")
        of_seeds = values.mean()
        rows[name] = {
            "mean": of_seeds.mean(),
            "std": of_seeds.std(),
            "seeds": len(of_seeds) or None,
        }
        rows[name] |= intervals(values.to_numpy())
    return pd.DataFrame(rows).T


def _references(by_row: dict[str, pd.DataFrame]) -> tuple[dict[str, str], list[str]]:
    """Return the rows to compare with and what each is, and a note on every choice.

    The best single method has the highest mean over all tasks, of the seeds that have all of them.
    """
    references = {REFERENCE: ""} if REFERENCE in by_row else {}
    notes = []
    compared: set[str] = set()
    for kind, candidates in SINGLE.items():
        rows = [row for row in candidates if row in by_row]
        means = {row: by_row[row].mean(skipna=False).mean() for row in rows}
        means = {row: mean for row, mean in means.items() if pd.notna(mean)}
        if not means.keys() <= compared:
            best = max(means, key=lambda row: means[row])
            references[best] = "; ".join(filter(None, [references.get(best), kind]))
            notes.append(f"{kind}: {name_of(best)}, of {'; '.join(map(name_of, means))}")
        compared |= means.keys()
    return references, notes


def difference_table(runs: Sequence[Run]) -> tuple[Table, list[Forest]]:
    """Build the table of differences, and a panel with those to LoRA for each K and task."""
    runs, left_out = tables.with_test_set(runs)
    # The sweep's name of a setting says nothing new where it is that of the method.
    runs = [
        dataclasses.replace(
            run, by_training=True, variant="" if run.variant == run.method else run.variant
        )
        for run in runs
    ]
    points = tables.scores(runs, "test")
    tasks = tables.tasks_of(points)
    titles = {task: TASKS.get(task, task) for task in tasks} | {AVERAGE: "Avg."}
    cells: list[dict[str, Any]] = []
    panels: list[Forest] = []
    missing: list[str] = []
    choices: list[str] = []
    for k in tables.level(points, "k"):
        rows = sorted({row for other, row, _ in points.index if other == k}, key=position)
        by_row = {row: tables.select(points, k, row, tasks) for row in rows}
        missing += tables.missing_scores(points, k, rows, tasks)
        references, chosen = _references(by_row)
        choices += [f"[K = {k}] {choice}." for choice in chosen]
        for reference, kind in references.items():
            block = f"[K = {k}] Difference to {name_of(reference)}" + f" ({kind})" * bool(kind)
            compared = {row: compare(scores, by_row[reference]) for row, scores in by_row.items()}
            for row, values in compared.items():
                if row != reference:
                    cells += tables.row_cells(block, row, SCALEUP, values)
            if reference == REFERENCE:
                panels += [
                    Forest(f"{title}, K = {k}", _panel(compared, task))
                    for task, title in titles.items()
                ]
        if REFERENCE not in by_row:
            missing.append(f"{name_of(REFERENCE)} at K = {k}")
    notes = [
        f"{len(runs)} runs. Pairs have the same task, data seed and training seed.",
        *left_out,
        "Mean difference in points, [95% interval of the paired bootstrap] and (95% interval of "
        f"Student's t). Avg. is the mean over {', '.join(titles[task] for task in tasks)}, of the "
        "seeds that have all of them.",
        f"The bootstrap takes {RESAMPLES:,} resamples of the seeds of each task, and is too narrow "
        "for few seeds: with 5, it covers the true difference on one task in 84% of cases.",
        *choices,
        "The best has the highest average of these test scores. The intervals do not cover this "
        "choice.",
    ]
    frame = tables.to_frame(cells, INTERVALS)
    return Table("Method", titles, frame, notes + differences(runs), missing), panels


def _panel(compared: dict[str, pd.DataFrame], task: str) -> pd.DataFrame:
    """Return the differences on one task, by method and whether its head is frozen."""
    lines = []
    for row in compared:
        method = method_of(row)
        title = name_of(method.removesuffix(FROZEN) + row.removeprefix(method))
        lines.append((title, method.endswith(FROZEN)))
    index = pd.MultiIndex.from_tuples(lines, names=["method", "frozen"])
    return pd.DataFrame([values.loc[task] for values in compared.values()]).set_index(index)
