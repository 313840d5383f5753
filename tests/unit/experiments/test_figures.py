"""Figures from finished runs."""

import json

import pandas as pd
import pytest

from scaleup.errors import ConfigError
from scaleup.experiments import plots, report
from tests.utils.finished_runs import leave_run, read_cells


def test_figure_2_is_the_score_over_the_bottleneck(tmp_path):
    for size, scores in {48: (0.02, 0.06), 256: (0.3,)}.items():
        for seed, score in enumerate(scores):
            leave_run(tmp_path / "runs", "cola", 100, "adapter", seed, score, adapter_size=size)
    leave_run(tmp_path / "runs", "cola", 100, "apl", 0, 0.2)
    screen = report.report("figure2", [str(tmp_path / "runs")], tmp_path / "out")
    found = {
        (source, column): (line["mean"], line["std"])
        for (_, _, source, column), line in read_cells(tmp_path / "out" / "figure2.csv").items()
    }
    assert found["scaleup", "48"] == ("4.0", "2.8284") and found["scaleup", "256"] == ("30.0", "")
    assert found["paper", "48"] == ("2.02", "4.04") and found["paper", "256"] == ("", "")
    assert (
        "bottleneck size 256 on cola at K = 100" in screen[-2]
        and "UniPELT (AP) on cola" in screen[-2]
    )
    assert (
        "UniPELT (APL) 20.00" in (tmp_path / "out" / "figure2.md").read_text()
        and (tmp_path / "out" / "figure2.png").stat().st_size > 10_000
    )


def test_figure_3_is_the_score_over_alpha_by_rank(tmp_path):
    for alpha, k in ((8, 100), (16, 100), (8, 500)):
        leave_run(tmp_path / "runs", "rte", k, "lora", 0, alpha / 100, lora_alpha=alpha)
    report.report("figure3", [str(tmp_path / "runs")], tmp_path / "out")
    found = read_cells(tmp_path / "out" / "figure3.csv")
    assert (
        found["RTE, K = 100", "lora", "scaleup", "2.0"]["mean"] == "16.0"
        and found["RTE, K = 500", "lora", "scaleup", "2.0"]["mean"] == ""
    )
    assert found["RTE, K = 100", "lora", "paper", "2.0"]["mean"] == "55.02"
    leave_run(
        tmp_path / "table" / "runs", "cola", 100, "lora", 0, 0.1, lora_alpha=16
    )  # of a sweep of all methods
    screen = report.report(
        "figure3", [str(tmp_path / "runs"), str(tmp_path / "table")], tmp_path / "out"
    )
    assert (
        "Left out, as only the usual 2 is there: CoLA, K = 100." in screen
        and read_cells(tmp_path / "out" / "figure3.csv") == found
    )
    with pytest.raises(ConfigError, match="no run there belongs in figure2"):
        report.report("figure2", [str(tmp_path / "runs")], tmp_path / "out")


def test_a_figure_has_no_point_of_a_run_without_a_test_score(tmp_path):
    leave_run(tmp_path / "runs", "cola", 100, "adapter", 0, float("nan"))
    path = leave_run(tmp_path / "runs", "cola", 100, "adapter", 1, 0.5) / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"test": None}))
    with pytest.raises(ConfigError, match="no run there belongs in figure2"):
        report.report("figure2", [str(tmp_path / "runs")], tmp_path / "out")


def test_no_title_of_a_heat_map_is_wider_than_the_picture(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    name = "quickstart-20261127-063015: quickstart, K = 1000, UniPELT (APL), dev set (500 examples)"
    values = pd.DataFrame(0.5, ["layer 0"], ["adapter", "prefix", "lora"])
    heat = plots.Heat(name, values, values.map(lambda value: "±0.1"))
    for heats in ([heat], [heat, heat]):
        plots.draw_heats(heats, f"{name}\nminus {name}", tmp_path / "heat.png")
        figure = drawn.pop()
        figure.draw_without_rendering()
        titles = [figure._suptitle, *(axes.title for axes in figure.axes)]
        boxes = [title.get_window_extent() for title in titles if title.get_text()]
        assert len(boxes) == 1 + len(heats) and all(
            box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes
        )
