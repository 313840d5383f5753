"""PNG files: a table as a picture, curves over a setting, heat maps of gates. Draws what it is given and knows nothing of runs.

matplotlib is slow to import and only needed here, so the functions import it. No display is used (backend Agg).
"""

import dataclasses
import os
import pathlib
import textwrap
from collections.abc import Sequence

import numpy as np

from scaleup.errors import ConfigError
from scaleup.experiments.tables import Entry, Table, missing_line

DPI = 150
INK, FAINT, OURS, THEIRS = "#1a1a1a", "#8a8a8a", "#1f5fa8", "#b3572a"


@dataclasses.dataclass(frozen=True)
class Curve:
    """points: x → (mean, spread or None). line: points are joined; else each stands for itself."""

    title: str
    points: dict[float, tuple[float, float | None]]
    color: str = OURS
    line: bool = True


@dataclasses.dataclass(frozen=True)
class Panel:
    """Curves over one setting, and levels to compare with (title → y). x values are spaced evenly, whatever they are."""

    title: str
    x: str
    y: str
    curves: list[Curve]
    levels: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Heat:
    """A map of values [rows, columns], NaN where there is none. notes: a second line in each cell, "" for none."""

    title: str
    rows: list[str]
    columns: list[str]
    values: np.ndarray
    notes: list[list[str]] | None = None


def _figure(width: float, height: float, layout: str | None = "constrained"):
    """An empty figure of that many inches; layout: matplotlib's name of who places its parts."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install -r requirements.txt") from None

    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path: pathlib.Path) -> None:
    """Never half written under its final name; the same picture gives the same bytes."""
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png", facecolor="white", metadata={"Software": None})
    os.replace(part, path)


def draw_table(table: Table, path: pathlib.Path) -> None:
    """The table in the paper's look: rules above and below, bold best, underlined second, spread as subscript, paper's rows in grey."""
    lines = [("head", None)]
    for block in table.blocks:
        lines += [("block", block)] * bool(block.title) + [("row", row) for row in block.rows]
    wide, high = 1.15, 0.23
    first = 0.3 + 0.075 * max(
        len(table.first), 18, *(len(row.title) for block in table.blocks for row in block.rows)
    )
    width = max(first + wide * len(table.columns) + 0.1, 0.3 + 0.1 * len(table.title))
    below = textwrap.wrap(" ".join([*table.notes, missing_line(table)]), int(18.5 * width))
    height = high * (len(lines) + 2) + 0.16 * len(below) + 0.15
    figure = _figure(width, height, layout=None)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(-height, 0))
    axes.axis("off")
    y = -0.25
    axes.text(0.15, y, table.title, weight="bold", size=10, color=INK, va="center")
    y -= high
    rules = [y + high / 2]
    centers = [first + wide * (i + 0.5) for i in range(len(table.columns))]
    for kind, what in lines:
        if kind == "head":
            axes.text(0.15, y, table.first, size=8.5, color=INK, va="center")
            for x, title in zip(centers, table.columns.values()):
                axes.text(x, y, title, size=8.5, color=INK, ha="center", va="center")
            rules.append(y - high / 2)
        elif kind == "block":
            axes.text(0.15, y, what.title, size=8, style="italic", color=INK, va="center")
        else:
            color = FAINT if what.paper else INK
            axes.text(0.35 if what.paper else 0.15, y, what.title, size=8, color=color, va="center")
            for x, entry in zip(centers, what.entries):
                _draw_entry(axes, x, y, entry, color)
        y -= high
    rules.append(y + high / 2)
    for rule in rules:
        axes.plot([0.1, first + wide * len(table.columns)], [rule, rule], color=INK, linewidth=0.8)
    for i, line in enumerate(below):
        axes.text(0.15, y - 0.16 * i, line, size=6.5, color=INK, va="center")
    _save(figure, path)


def _draw_entry(axes, x: float, y: float, entry: Entry | None, color: str) -> None:
    """One cell, its mean at x and the spread behind it, lower and smaller."""
    if entry is None:
        axes.text(x, y, "–", size=8, color=FAINT, ha="center", va="center")
        return
    drawn = axes.text(
        x + 0.12,
        y,
        entry.shown,
        size=8,
        color=color,
        ha="right",
        va="center",
        weight="bold" if entry.rank == 1 else "normal",
    )
    if entry.spread is not None:
        axes.text(
            x + 0.14, y - 0.045, entry.shown_spread, size=6, color=color, ha="left", va="center"
        )
    if entry.rank == 2:
        box = drawn.get_window_extent().transformed(axes.transData.inverted())
        axes.plot([box.x0, box.x1], [box.y0 - 0.01, box.y0 - 0.01], color=color, linewidth=0.7)


def draw_panels(panels: Sequence[Panel], title: str, path: pathlib.Path) -> None:
    """Curves with error bars, at most two panels in a row."""
    across = min(len(panels), 2)
    down = -(-len(panels) // across)
    figure = _figure(5.2 * across, 3.6 * down + 0.3)
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot(down, across, number)
        places = sorted({x for curve in panel.curves for x in curve.points})
        for curve in panel.curves:
            xs = sorted(curve.points)
            means, spreads = [curve.points[x][0] for x in xs], [curve.points[x][1] or 0 for x in xs]
            axes.errorbar(
                [places.index(x) for x in xs],
                means,
                yerr=spreads if any(spreads) else None,
                marker="o",
                capsize=3,
                linestyle="-" if curve.line else "none",
                color=curve.color,
                label=curve.title,
            )
        for i, (name, level) in enumerate(panel.levels.items()):
            axes.axhline(
                level,
                color=THEIRS if "paper" in name else FAINT,
                linestyle=("--", ":", "-.")[i % 3],
                linewidth=1,
                label=name,
            )
        axes.set_xticks(range(len(places)), [f"{x:g}" for x in places])
        axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        axes.legend(fontsize=7, frameon=False)
    figure.suptitle(title)
    _save(figure, path)


def _wrapped(text: str, inches: float, points: float) -> str:
    """In lines that are no wider: a letter is a good half of its size in points wide on average."""
    return "\n".join(
        textwrap.fill(line, max(8, int(inches * 72 / (0.56 * points)))) for line in text.split("\n")
    )


def draw_heats(heats: Sequence[Heat], title: str, path: pathlib.Path, signed: bool = False) -> None:
    """Heat maps side by side on one scale: 0 to 1, or around 0 for differences (`signed`)."""
    most = max(len(heat.rows) for heat in heats)
    names = max(len(name) for heat in heats for name in heat.rows)
    wide, high = (0.85, 0.34) if heats[0].notes is not None else (0.42, 0.16)
    widths = [0.085 * names + 0.4 + wide * len(heat.columns) for heat in heats]
    titles = [_wrapped(heat.title, width, 9) for heat, width in zip(heats, widths)]
    title = _wrapped(title, sum(widths) + 1.0, 10)
    lines = max(text.count("\n") for text in titles) + title.count("\n")
    figure = _figure(sum(widths) + 1.0, high * most + 1.5 + 0.17 * lines)
    shared = np.concatenate([heat.values.ravel() for heat in heats])
    limit = max(float(np.nanmax(np.abs(shared))), 1e-9) if signed else 1.0
    grid = figure.subplots(1, len(heats), squeeze=False, width_ratios=widths)[0]
    for axes, heat, own_title in zip(grid, heats, titles):
        image = axes.imshow(
            heat.values,
            aspect="auto",
            cmap="RdBu_r" if signed else "viridis",
            vmin=-limit if signed else 0,
            vmax=limit,
        )
        axes.set_xticks(range(len(heat.columns)), heat.columns, fontsize=8)
        axes.set_yticks(range(len(heat.rows)), heat.rows, fontsize=7)
        axes.set_title(own_title, fontsize=9)
        for i, j in np.argwhere(~np.isnan(heat.values)) if heat.notes is not None else ():
            value = heat.values[i, j]
            pale = abs(value) < 0.6 * limit if signed else value > 0.6
            words = (
                f"{value:+.3f}" if signed else f"{value:.2f}"
            ) + f" {heat.notes[i][j]}".rstrip()
            axes.text(
                j,
                i,
                words,
                ha="center",
                va="center",
                fontsize=6.5,
                color="black" if pale else "white",
            )
    figure.suptitle(title, fontsize=10)
    figure.colorbar(image, ax=list(grid), fraction=0.04, pad=0.02).ax.tick_params(labelsize=7)
    _save(figure, path)
