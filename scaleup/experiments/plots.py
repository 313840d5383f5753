"""Draw PNG files: curves over a setting, differences of methods, and heat maps of gates.

matplotlib is an optional dependency and slow to import, so it is imported where a figure is made.
"""

import dataclasses
import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from scaleup.errors import ConfigError
from scaleup.io import whole_file

DPI = 150
FAINT, SCALEUP, PAPER = "#8a8a8a", "#1f5fa8", "#b3572a"  # colours


@dataclasses.dataclass(frozen=True)
class Curve:
    """A curve with error bars. `points` has the columns mean and std, and x as its index."""

    title: str
    points: pd.DataFrame
    color: str = SCALEUP
    line: bool = True


@dataclasses.dataclass(frozen=True)
class Panel:
    """Curves over a setting, whose values are spaced evenly, and levels to compare with."""

    title: str
    x: str
    y: str
    curves: list[Curve]
    levels: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Forest:
    """Differences with intervals, one line per method.

    `points` has the index levels method and frozen (whether the head was), and the columns mean,
    low, high, t_low and t_high.
    """

    title: str
    points: pd.DataFrame


@dataclasses.dataclass(frozen=True)
class Heat:
    """A map of values, NaN where there is none. `notes`: a second text in each cell."""

    title: str
    values: pd.DataFrame
    notes: pd.DataFrame | None = None


def _new_figure(width: float, height: float) -> Any:
    """Return an empty figure; width and height in inches."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install -r requirements.txt") from None
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: pathlib.Path) -> None:
    """Write a figure atomically; the same figure gives the same bytes."""
    with whole_file(path) as part:
        figure.savefig(part, format="png", facecolor="white", metadata={"Software": None})


def draw_panels(panels: Sequence[Panel], title: str, path: pathlib.Path) -> None:
    """Draw curves with error bars, at most two panels in a row."""
    across = min(len(panels), 2)
    down = -(-len(panels) // across)
    figure = _new_figure(5.2 * across, 3.6 * down + 0.3)
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot(down, across, number)
        places = sorted({x for curve in panel.curves for x in curve.points.index})
        for curve in panel.curves:
            spread = curve.points["std"].fillna(0)
            bars = spread if spread.any() else None
            x = [places.index(place) for place in curve.points.index]
            style = {"linestyle": "-" if curve.line else "none", "color": curve.color}
            style |= {"marker": "o", "label": curve.title}
            axes.errorbar(x, curve.points["mean"], yerr=bars, capsize=3, **style)
        for i, (name, level) in enumerate(panel.levels.items()):
            color, dashes = PAPER if "paper" in name else FAINT, ("--", ":", "-.")[i % 3]
            axes.axhline(level, color=color, linestyle=dashes, linewidth=1, label=name)
        axes.set_xticks(range(len(places)), [f"{x:g}" for x in places])
        axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        axes.legend(fontsize=7, frameon=False)
    figure.suptitle(title)
    _save(figure, path)


def draw_forests(forests: Sequence[Forest], across: int, title: str, path: pathlib.Path) -> None:
    """Draw differences around a line at 0, with `across` panels in a row.

    A method with both kinds of heads has the frozen one just below the trained one.
    """
    names = [name for forest in forests for name, _ in forest.points.index]
    names = list(dict.fromkeys(names))
    down = -(-len(forests) // across)
    figure = _new_figure(2.2 * across + 1.6, down * (0.34 * len(names) + 0.7) + 0.7)
    grid = figure.subplots(down, across, sharey=True, squeeze=False)
    kinds = {False: ("trained head", SCALEUP, SCALEUP), True: ("frozen head", PAPER, "white")}
    for axes, forest in zip(grid.flat, forests):
        points = forest.points
        axes.axvline(0, color=FAINT, linewidth=1)
        for frozen, of_kind in points.groupby(level="frozen"):
            label, color, fill = kinds[frozen]
            y = [
                names.index(name)
                + (0.17 if frozen else -0.17) * ((name, not frozen) in points.index)
                for name, _ in of_kind.index
            ]
            axes.hlines(y, of_kind["t_low"], of_kind["t_high"], color=color, linewidth=0.8)
            axes.hlines(y, of_kind["low"], of_kind["high"], color=color, linewidth=2.6)
            style = {"linestyle": "none", "markerfacecolor": fill, "label": label}
            axes.plot(of_kind["mean"], y, "o", color=color, markersize=5, **style)
        ends = points[["mean", "low", "high"]].to_numpy(dtype=float)
        least, most = np.nanmin(ends, initial=0), np.nanmax(ends, initial=0)
        # Of two seeds, Student's intervals are so wide that they would hide everything else.
        margin = 0.3 * (most - least) or 1
        axes.set_xlim(least - margin, most + margin)
        axes.set_title(forest.title, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", linewidth=0.3)
    grid[0, 0].set_yticks(range(len(names)), names)
    grid[0, 0].invert_yaxis()
    figure.supxlabel(
        "difference in points; thick: 95% bootstrap interval, thin: Student's t", fontsize=8
    )
    labelled = [axes.get_legend_handles_labels() for axes in grid.flat]
    heads = {label: handle for pair in labelled for handle, label in zip(*pair)}
    figure.legend(
        heads.values(), heads.keys(), loc="outside upper right", ncols=2, fontsize=8, frameon=False
    )
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    _save(figure, path)


def _wrap(text: str, inches: float, points: float) -> str:
    """Break lines at a width; a letter is about half as wide as its size in points."""
    width = max(8, int(inches * 72 / (0.56 * points)))
    return "\n".join(textwrap.fill(line, width) for line in text.split("\n"))


def draw_heats(heats: Sequence[Heat], title: str, path: pathlib.Path, signed: bool = False) -> None:
    """Draw heat maps side by side on one scale: 0 to 1, or around 0 if `signed`."""
    wide, high = (0.85, 0.34) if heats[0].notes is not None else (0.42, 0.16)
    longest = max(len(name) for heat in heats for name in heat.values.index)
    widths = [0.085 * longest + 0.4 + wide * len(heat.values.columns) for heat in heats]
    titles = [_wrap(heat.title, width, 9) for heat, width in zip(heats, widths)]
    title = _wrap(title, sum(widths) + 1.0, 10)
    lines = max(text.count("\n") for text in titles) + title.count("\n")
    height = high * max(len(heat.values) for heat in heats) + 1.5 + 0.17 * lines
    figure = _new_figure(sum(widths) + 1.0, height)
    largest = max(float(np.nanmax(np.abs(heat.values.to_numpy()))) for heat in heats)
    limit = max(largest, 1e-9) if signed else 1.0
    scale = {"cmap": "RdBu_r", "vmin": -limit} if signed else {"cmap": "viridis", "vmin": 0}
    grid = figure.subplots(1, len(heats), squeeze=False, width_ratios=widths)[0]
    for axes, heat, axes_title in zip(grid, heats, titles):
        values = heat.values.to_numpy()
        image = axes.imshow(values, aspect="auto", vmax=limit, **scale)
        axes.set_xticks(range(values.shape[1]), heat.values.columns, fontsize=8)
        axes.set_yticks(range(values.shape[0]), heat.values.index, fontsize=7)
        axes.set_title(axes_title, fontsize=9)
        notes: Any = heat.notes
        for i, j in np.argwhere(~np.isnan(values)) if notes is not None else ():
            value, note = values[i, j], notes.iat[i, j]
            bright = abs(value) < 0.6 * limit if signed else value > 0.6
            text = f"{value:+.3f} {note}" if signed else f"{value:.2f} {note}"
            color = "black" if bright else "white"
            axes.text(j, i, text.rstrip(), ha="center", va="center", fontsize=6.5, color=color)
    figure.suptitle(title, fontsize=10)
    figure.colorbar(image, ax=list(grid), fraction=0.04, pad=0.02).ax.tick_params(labelsize=7)
    _save(figure, path)
