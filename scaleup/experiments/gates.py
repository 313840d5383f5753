"""A report on what runs' gates do: layer × submodule, by class and by example; of several runs, side by side.

lines = report(["runs/one", "runs/other"], None, output)
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from scaleup.errors import ConfigError
from scaleup.experiments import gate_views as gateviews
from scaleup.experiments import plots as figures
from scaleup.experiments import tables
from scaleup.experiments.plots import Heat
from scaleup.experiments.results import read
from scaleup.io import write_text

EXTREMES = 5  # examples shown at each end
PICTURED = 40  # examples in the picture


def report(folders: Sequence[str], which: str | None, output: pathlib.Path) -> list[str]:
    """Writes gates.md, gates.csv, gates.png, where examples were looked at also gates_classes.png, gates_examples.csv and .png, and
    of two runs gates_difference.png; what to print. which: train, dev, test or a file; None: the development set if the run's best
    bundle, backbone and data are still there, else only what the run itself wrote.

    Raises ConfigError with what is wrong with the runs or the data.
    """
    found, views, notes = [], [], []
    for folder in folders:
        path = pathlib.Path(folder) / "results.json"
        if not path.is_file():
            raise ConfigError(
                f"--run: {folder} has no results.json; it takes the folder of a finished run"
            )
        found.append(read(path))
    alike = len({run.folder.name for run in found}) < len(found)
    for run in found:
        name = str(run.folder) if alike else run.folder.name
        try:
            views.append(gateviews.from_pass(run, name, which or "dev"))
        except ConfigError as error:
            if which is not None or not run.results["gates"]:
                raise
            views.append(gateviews.from_results(run, name))
            notes.append(f"No view by class or example: {error.problems[0]}")
    if len({run.backbone for run in found}) > 1:
        notes.append(
            f"The runs have different backbones: {', '.join(f'{run.folder.name} {run.backbone}' for run in found)}."
        )
    lines = [
        "# Gates",
        "",
        "Mean of each gate over the examples, its standard deviation over them as subscript.",
        *(f"\n{note}" for note in notes),
    ]
    printed = []
    for view in views:
        lines += ["", f"## {view.title}", "", *_grid(view.columns, view.rows, _pairs(view))]
        printed += [view.title, *_plain(view), ""]
        for label in view.classes:
            lines += [
                "",
                f"### Class {label} ({view.labels.count(label)} examples)",
                "",
                *_grid(view.columns, view.rows, view.of_class(label)),
            ]
        lines += _extremes(view) if view.each is not None else []
    difference = _difference(views)
    if difference is not None:
        lines += [
            "",
            f"## {views[1].title} minus {views[0].title}",
            "",
            *_grid(difference.columns, difference.rows, difference.values, "{:+.3f}"),
        ]
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "gates.md", "\n".join(lines) + "\n")
    write_text(output / "gates.csv", _gates_csv(views))
    written = ["gates.md", "gates.csv", *_draw_gates(views, difference, output)]
    if any(view.each is not None for view in views):
        write_text(output / "gates_examples.csv", _examples_csv(views))
        written.append("gates_examples.csv")
    return [*printed, *notes, f"written to {output}: {', '.join(written)}"]


def _pairs(view: gateviews.View) -> list[list[str]]:
    return [
        ["–" if np.isnan(m) else f"{m:.3f}<sub>{s:.3f}</sub>" for m, s in zip(*both)]
        for both in zip(view.mean, view.spread)
    ]


def _grid(
    columns: Sequence[str], rows: Sequence[str], values: Any, form: str = "{:.3f}"
) -> list[str]:
    """A Markdown table; values: text, or numbers with NaN for none."""
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, row in zip(rows, values):
        lines.append(
            f"| {name} | "
            + " | ".join(
                v if isinstance(v, str) else "–" if np.isnan(v) else form.format(v) for v in row
            )
            + " |"
        )
    return lines


def _plain(view: gateviews.View) -> list[str]:
    """For a terminal."""
    width = max(map(len, view.rows))
    lines = [" " * width + "".join(f"{column:>16}" for column in view.columns)]
    for name, means, spreads in zip(view.rows, view.mean, view.spread):
        lines.append(
            name.ljust(width)
            + "".join(
                f"{'–' if np.isnan(m) else f'{m:.3f} ±{s:.3f}':>16}" for m, s in zip(means, spreads)
            )
        )
    return lines


def _extremes(view: gateviews.View) -> list[str]:
    """For each submodule the examples that open its gates most and least, by the mean over layers."""
    lines = ["", "### Examples", ""]
    for j, column in enumerate(view.columns):
        mean = np.nanmean(view.each[:, :, j], axis=1)
        order = np.argsort(mean, kind="stable")
        lines += [
            "",
            f"{column}, mean over layers: the {EXTREMES} lowest and highest",
            "",
            "| gate | label | text |",
            "|---:|---|---|",
        ]
        for i in dict.fromkeys([*order[:EXTREMES], *order[-EXTREMES:]]):
            words = " ".join(view.texts[i].split()).replace("|", "\\|")
            lines.append(
                f"| {mean[i]:.3f} | {view.labels[i]} | {words[:120]}{'…' * (len(words) > 120)} |"
            )
    return lines


def _difference(views: Sequence[gateviews.View]) -> Heat | None:
    """The second of two runs minus the first, where both have a gate; None for one run or more than two."""
    if len(views) != 2:
        return None
    rows, columns = (
        [name for name in getattr(views[0], axis) if name in getattr(views[1], axis)]
        for axis in ("rows", "columns")
    )
    one, two = (
        [[view.mean[view.rows.index(r), view.columns.index(c)] for c in columns] for r in rows]
        for view in views
    )
    if not rows or not columns:
        raise ConfigError("--run: the two runs have no gate in common")
    return Heat(
        "second minus first",
        rows,
        columns,
        np.array(two) - np.array(one),
        [[""] * len(columns)] * len(rows),
    )


def _gates_csv(views: Sequence[gateviews.View]) -> str:
    rows = []
    for view in views:
        kinds = [("all", view.mean, view.spread)]
        for label in view.classes:
            chosen = view.each[[other == label for other in view.labels]]
            kinds.append((label, chosen.mean(axis=0), chosen.std(axis=0)))
        for kind, mean, spread in kinds:
            rows += [
                [
                    view.title,
                    kind,
                    view.rows[i],
                    view.columns[j],
                    round(float(mean[i, j]), 6),
                    round(float(spread[i, j]), 6),
                ]
                for i, j in np.argwhere(~np.isnan(mean))
            ]
    return tables.csv_text(("run", "examples", "layer", "gate", "mean", "std"), rows)


def _examples_csv(views: Sequence[gateviews.View]) -> str:
    """One line for each example, one column for each gate of any of the runs."""
    rows, gates = [], {}
    for view in (view for view in views if view.each is not None):
        named = {
            f"{view.rows[i]} {view.columns[j]}": (i, j)
            for i, j in np.argwhere(~np.isnan(view.mean))
        }
        gates |= dict.fromkeys(named)
        for n, (label, text) in enumerate(zip(view.labels, view.texts)):
            rows.append(
                (
                    view.title,
                    n,
                    label,
                    text,
                    {name: round(float(view.each[n, i, j]), 6) for name, (i, j) in named.items()},
                )
            )
    return tables.csv_text(
        ("run", "example", "label", "text", *gates),
        [[*line, *(values.get(name) for name in gates)] for *line, values in rows],
    )


def _draw_gates(
    views: Sequence[gateviews.View], difference: Heat | None, output: pathlib.Path
) -> list[str]:
    """The pictures; their names."""
    names = ["gates.png"]
    notes = [
        [["" if np.isnan(s) else f"±{s:.2f}" for s in row] for row in view.spread] for view in views
    ]
    heats = [
        Heat(view.title, view.rows, view.columns, view.mean, note)
        for view, note in zip(views, notes)
    ]
    figures.draw_heats(heats, "Gates: mean ± standard deviation over examples", output / names[0])
    if difference is not None:
        names.append("gates_difference.png")
        figures.draw_heats(
            [difference],
            f"{views[1].title}\nminus {views[0].title}",
            output / names[-1],
            signed=True,
        )
    looked = [view for view in views if view.each is not None]
    by_class = [
        Heat(
            f"{v.title}\n{label}",
            v.rows,
            v.columns,
            v.of_class(label) - v.mean,
            [[""] * len(v.columns)] * len(v.rows),
        )
        for v in looked
        for label in v.classes
    ]
    if by_class:
        names.append("gates_classes.png")
        figures.draw_heats(
            by_class,
            "Gates by class, minus the mean over all examples",
            output / names[-1],
            signed=True,
        )
    if looked:
        names.append("gates_examples.png")
        title = "Gates by example, minus the mean over all examples"
        figures.draw_heats(
            [_example_heat(view) for view in looked], title, output / names[-1], signed=True
        )
    return names


def _example_heat(view: gateviews.View) -> Heat:
    """The first PICTURED examples as rows, sorted by label; every gate as a column, as it differs from its mean."""
    chosen = sorted(
        range(min(PICTURED, len(view.labels))),
        key=lambda n: (str(type(view.labels[n])), view.labels[n]),
    )
    kept = [tuple(place) for place in np.argwhere(~np.isnan(view.mean)).tolist()]
    kept.sort(key=lambda place: (place[1], place[0]))
    columns = [
        f"{view.columns[j].replace(' ', chr(10))}\n{view.rows[i].split()[-1]}" for i, j in kept
    ]
    values = view.each - view.mean
    return Heat(
        view.title,
        [f"{n}: {view.labels[n]}" for n in chosen],
        columns,
        np.array([[values[n, i, j] for i, j in kept] for n in chosen]),
    )
