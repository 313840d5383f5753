"""Report what the gates of runs do: by layer and submodule, by class and by example.

`lines = report(["runs/one", "runs/other"], None, output)`
"""

import pathlib
from collections.abc import Sequence

import numpy as np
import pandas as pd

from scaleup.errors import ConfigError, PermissionMissing
from scaleup.experiments.gate_values import Gates, from_pass, from_results
from scaleup.experiments.plots import Heat, draw_heats
from scaleup.experiments.results import read
from scaleup.experiments.table_output import grid
from scaleup.io import write_text

EXTREMES = 5  # examples to show at each end
PICTURED = 40  # examples in the heat map


def report(
    paths: Sequence[str], which: str | None, output: pathlib.Path, trusted: bool = False
) -> list[str]:
    """Write a report on the gates of runs; return the lines to print.

    The report is gates.md, gates.csv and gates.png. With the gates of examples it also has
    gates_classes.png, gates_examples.csv and gates_examples.png; for two runs it also has
    gates_difference.png.

    Args:
        paths: folders of finished runs, or rows of a table of runs: TABLE.csv/TRIAL.
        which: train, dev, test or a file. None: the development set if the run's best checkpoint,
            backbone and data still exist, else the statistics that the run wrote.
        output: the folder to write into.
        trusted: whether code that comes with a backbone may run, if the run's config asks for it.

    Raises:
        ConfigError: with what is wrong with the runs or the data.
    """
    runs = []
    for path in map(pathlib.Path, paths):
        file = path if path.parent.is_file() else path / "results.json"
        if not path.parent.is_file() and not file.is_file():
            raise ConfigError(
                f"--run: {path} has no results.json; give the folder of a finished run"
            )
        runs.append(read(file))
    ambiguous = len({run.folder.name for run in runs}) < len(runs)
    collected, notes = [], []
    for run in runs:
        name = str(run.folder) if ambiguous else run.folder.name
        try:
            collected.append(from_pass(run, name, which or "dev", trusted))
        except PermissionMissing:
            raise
        except ConfigError as error:
            if which is not None or not run.results["gates"]:
                raise
            collected.append(from_results(run, name))
            notes.append(f"No view by class or example: {error.problems[0]}")
    if len({run.backbone for run in runs}) > 1:
        backbones = ", ".join(f"{run.folder.name} {run.backbone}" for run in runs)
        notes.append(f"The runs have different backbones: {backbones}.")
    difference = _difference(collected)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "gates.md", _markdown(collected, notes, difference))
    write_text(output / "gates.csv", _statistics(collected).round(6).to_csv(index=False))
    written = ["gates.md", "gates.csv", *_draw(collected, difference, output)]
    if any(gates.each is not None for gates in collected):
        write_text(output / "gates_examples.csv", _examples(collected).to_csv(index=False))
        written.append("gates_examples.csv")
    screen = []
    for gates in collected:
        table = grid(_with_index(_cells(gates.mean, gates.std, "{:.3f} ±{:.3f}")), "plain")
        screen += [gates.title, *table.splitlines(), ""]
    return [*screen, *notes, f"written to {output}: {', '.join(written)}"]


def _cells(mean: pd.DataFrame, std: pd.DataFrame | None, form: str) -> pd.DataFrame:
    """Return the text of each cell."""
    frames = [mean] if std is None else [mean, std]
    cells = [
        ["–" if np.isnan(values[0]) else form.format(*values) for values in zip(*rows)]
        for rows in zip(*(frame.to_numpy() for frame in frames))
    ]
    return pd.DataFrame(cells, index=mean.index, columns=mean.columns)


def _with_index(cells: pd.DataFrame) -> pd.DataFrame:
    return cells.rename_axis("").reset_index()


def _markdown(collected: Sequence[Gates], notes: Sequence[str], difference: Heat | None) -> str:
    parts = [
        "# Gates",
        "Mean of each gate over the examples, its standard deviation over them as subscript.",
        *notes,
    ]
    for gates in collected:
        cells = _cells(gates.mean, gates.std, "{:.3f}<sub>{:.3f}</sub>")
        parts += [f"## {gates.title}", grid(_with_index(cells))]
        for label in gates.classes:
            cells = _cells(gates.of_class(label)[0], None, "{:.3f}")
            parts.append(f"### Class {label} ({gates.labels.count(label)} examples)")
            parts.append(grid(_with_index(cells)))
        parts += _extremes(gates)
    if difference is not None:
        parts.append(f"## {collected[1].title} minus {collected[0].title}")
        parts.append(grid(_with_index(_cells(difference.values, None, "{:+.3f}"))))
    return "\n\n".join(parts) + "\n"


def _extremes(gates: Gates) -> list[str]:
    """Show the examples that open a submodule's gates most and least, by the mean over layers."""
    if gates.each is None:
        return []
    parts = ["### Examples"]
    for j, column in enumerate(gates.mean.columns):
        mean = np.nanmean(gates.each[:, :, j], axis=1)
        order = np.argsort(mean, kind="stable")
        lines = []
        for i in dict.fromkeys([*order[:EXTREMES], *order[-EXTREMES:]]):
            text = " ".join(gates.texts[i].split()).replace("|", "\\|")
            text = text if len(text) <= 120 else f"{text[:120]}…"
            lines.append([f"{mean[i]:.3f}", str(gates.labels[i]), text])
        parts.append(f"{column}, mean over layers: the {EXTREMES} lowest and highest")
        frame = pd.DataFrame(lines, columns=["gate", "label", "text"])
        parts.append(grid(frame, align=("right", "left", "left")))
    return parts


def _difference(collected: Sequence[Gates]) -> Heat | None:
    """Return the second of two runs minus the first, for the gates that both have."""
    if len(collected) != 2:
        return None
    one, other = (gates.mean for gates in collected)
    rows = [row for row in one.index if row in other.index]
    columns = [column for column in one.columns if column in other.columns]
    if not rows or not columns:
        raise ConfigError("--run: the two runs have no gate in common")
    return _plain_heat("second minus first", other.loc[rows, columns] - one.loc[rows, columns])


def _plain_heat(title: str, values: pd.DataFrame) -> Heat:
    """Return a heat map that shows its numbers and nothing else."""
    return Heat(title, values, pd.DataFrame("", values.index, values.columns))


def _statistics(collected: Sequence[Gates]) -> pd.DataFrame:
    """Return mean and deviation of each gate, over all examples and over those of each class."""
    frames = []
    for gates in collected:
        groups = {"all": (gates.mean, gates.std)}
        groups |= {label: gates.of_class(label) for label in gates.classes}
        for examples, (mean, std) in groups.items():
            frame = pd.DataFrame({"mean": mean.stack(), "std": std.stack()})
            frame = frame.dropna().rename_axis(["layer", "gate"]).reset_index()
            frame.insert(0, "examples", examples)
            frame.insert(0, "run", gates.title)
            frames.append(frame)
    return pd.concat(frames)


def _by_gate(gates: Gates) -> pd.DataFrame:
    """Return the values of the examples, with a column (gate, layer) for each gate."""
    assert gates.each is not None
    columns = {
        (gates.mean.columns[j], gates.mean.index[i]): gates.each[:, i, j]
        for j, i in np.argwhere(gates.mean.notna().to_numpy().T)
    }
    return pd.DataFrame(columns)


def _examples(collected: Sequence[Gates]) -> pd.DataFrame:
    """Return a line for each example, with a column for each gate of any of the runs."""
    frames = []
    for gates in (gates for gates in collected if gates.each is not None):
        frame = _by_gate(gates).round(6)
        frame.columns = [f"{layer} {gate}" for gate, layer in frame.columns]
        head = pd.DataFrame({"run": gates.title, "example": range(len(frame))})
        head = head.assign(label=gates.labels, text=gates.texts)
        frames.append(pd.concat([head, frame], axis="columns"))
    return pd.concat(frames)


def _draw(collected: Sequence[Gates], difference: Heat | None, output: pathlib.Path) -> list[str]:
    """Draw the heat maps and return their names."""
    examined = [gates for gates in collected if gates.each is not None]
    means = [Heat(g.title, g.mean, _cells(g.std, None, "±{:.2f}")) for g in collected]
    differences = [difference] if difference is not None else []
    by_class = [
        _plain_heat(f"{gates.title}\n{label}", gates.of_class(label)[0] - gates.mean)
        for gates in examined
        for label in gates.classes
    ]
    examples = [_example_heat(gates) for gates in examined]
    both = "\nminus ".join(gates.title for gates in reversed(collected))
    pictures = {
        "gates.png": ("Gates: mean ± standard deviation over examples", means),
        "gates_difference.png": (both, differences),
        "gates_classes.png": ("Gates by class, minus the mean over all examples", by_class),
        "gates_examples.png": ("Gates by example, minus the mean over all examples", examples),
    }
    written = []
    for name, (title, heats) in pictures.items():
        if heats:
            draw_heats(heats, title, output / name, signed=name != "gates.png")
            written.append(name)
    return written


def _example_heat(gates: Gates) -> Heat:
    """Show the first PICTURED examples, sorted by label, minus the mean over all examples."""
    values = _by_gate(gates)
    values = (values - values.mean()).head(PICTURED)
    values.columns = [
        gate.replace(" ", "\n") + "\n" + layer.split()[-1] for gate, layer in values.columns
    ]
    order = sorted(values.index, key=lambda n: (str(type(gates.labels[n])), gates.labels[n]))
    values = values.loc[order].set_axis([f"{n}: {gates.labels[n]}" for n in order])
    return Heat(gates.title, values)
