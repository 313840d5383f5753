"""Differences of methods: intervals against exact ones, pairs, references and the figure."""

import itertools
import json
import pathlib

import numpy as np
import pandas as pd
import pytest

from scaleup.experiments import comparisons, plots, report
from tests.utils.finished_runs import leave_run, read_cells

TO_LORA = "[K = 100] Difference to LoRA"


def exact_bootstrap(values_TS: np.ndarray) -> list[float]:
    """Return the percentiles over all resamples, which are equally likely."""
    resamples = [
        [np.mean(choice) for choice in itertools.product(task, repeat=len(task))]
        for task in values_TS
    ]
    return list(np.quantile([np.mean(c) for c in itertools.product(*resamples)], [0.025, 0.975]))


@pytest.mark.parametrize(
    "values", [[[1.0, 2, 3, 4, 5]], [[-7.0, 0.5, 1, 4, 30]], [[1.0, 2, 4], [-3, 0, 5]]], ids=str
)
def test_the_bootstrap_agrees_with_all_resamples(values):
    values = np.array(values)
    found = comparisons.intervals(values)
    tolerance = 0.03 * np.ptp(values)  # of 10,000 resamples
    assert [found["low"], found["high"]] == pytest.approx(exact_bootstrap(values), abs=tolerance)


def test_intervals_of_known_values():
    found = comparisons.intervals(np.array([[1.0, 2, 3, 4, 5]]))
    half = 2.776445 * np.sqrt(2.5 / 5)  # the 97.5% quantile of t with 4 degrees of freedom
    assert [found["t_low"], found["t_high"]] == pytest.approx([3 - half, 3 + half], abs=1e-5)
    constant = comparisons.intervals(np.full((3, 4), 1.5))
    assert list(constant.values()) == [1.5] * 4
    two = comparisons.intervals(np.array([[1.0, 3.0]]))
    assert (two["low"], two["high"]) == (1, 3)
    assert all(np.isnan(end) for end in comparisons.intervals(np.ones((3, 1))).values())


def test_intervals_over_tasks_take_the_mean_of_each_seed_for_t():
    values = np.random.default_rng(3).normal(size=(4, 5))
    over_tasks = comparisons.intervals(values)
    of_means = comparisons.intervals(values.mean(axis=0, keepdims=True))
    assert over_tasks["t_low"] == of_means["t_low"] and over_tasks["low"] != of_means["low"]


def coverage(tasks: int, shared: float) -> tuple[float, float]:
    """Return how often 95% intervals of five seeds cover 0: the bootstrap's and Student's t.

    `shared` is the part of the variance that all tasks of a seed have in common.
    """
    generator, covered = np.random.default_rng(0), np.zeros(2)
    for _ in range(400):
        alone, common = generator.normal(size=(tasks, 5)), generator.normal(size=5)
        found = comparisons.intervals(alone * (1 - shared) ** 0.5 + common * shared**0.5)
        covered += found["low"] < 0 < found["high"], found["t_low"] < 0 < found["t_high"]
    return tuple(covered / 400)


@pytest.mark.parametrize(
    ("tasks", "shared", "expected"), [(1, 0.0, 0.84), (4, 0.0, 0.90), (4, 0.5, 0.70)]
)
def test_of_five_seeds_the_bootstrap_is_too_narrow_and_t_is_not(tasks, shared, expected):
    bootstrap, student = coverage(tasks, shared)
    assert bootstrap == pytest.approx(expected, abs=0.05)
    assert student == pytest.approx(0.95, abs=0.03)


def test_differences_are_of_pairs_and_the_average_of_seeds_with_all_tasks():
    nan = float("nan")
    tasks = pd.Index(["cola", "mrpc"])
    method = pd.DataFrame([[5.0, 6, nan], [1, nan, 3]], index=tasks)
    reference = pd.DataFrame([[4.0, 4, 4], [2, 2, 2]], index=tasks)
    found = comparisons.compare(method, reference)
    assert list(found["mean"]) == [1.5, 0.0, 0.0] and list(found["seeds"]) == [2, 2, 1]
    assert found.loc["cola", "std"] == pytest.approx(np.sqrt(0.5))
    assert found.loc["average", ["std", *comparisons.INTERVALS]].isna().all()
    method.loc["mrpc"] = nan  # a task is missing
    found = comparisons.compare(method, reference)
    assert found.loc[["mrpc", "average"], ["mean", "seeds"]].isna().all(axis=None)
    assert found.loc["cola", "mean"] == 1.5


def leave_runs(folder: pathlib.Path, scores: dict[str, list[list[float]]]) -> None:
    """Leave runs with K = 100. `scores` is method -> one list of scores per task, one per seed."""
    for method, by_task in scores.items():
        for task, points in zip(("stsb", "mrpc"), by_task):
            for seed, score in enumerate(points):
                leave_run(folder, task, 100, method, seed, score)


def test_the_report_has_differences_to_lora_by_task_and_on_average(tmp_path):
    leave_runs(
        tmp_path / "runs",
        {
            "lora": [[0.50, 0.60, 0.70], [0.80, 0.82, 0.84]],
            "apl": [[0.52, 0.64, 0.76], [0.80, 0.80, 0.80]],
        },
    )
    screen = report.report("differences", [str(tmp_path / "runs")], tmp_path / "out")
    found = read_cells(tmp_path / "out" / "differences.csv")
    block = f"{TO_LORA} (best single method)"
    assert {key[:2] for key in found} == {(block, "apl")}
    stsb, average = (found[block, "apl", "scaleup", column] for column in ("stsb", "average"))
    assert (stsb["mean"], stsb["std"], stsb["seeds"]) == ("4.0", "2.0", "3")
    half = 4.302653 * 2 / np.sqrt(3)
    assert float(stsb["t_low"]) == pytest.approx(4 - half, abs=1e-3)
    assert (float(stsb["low"]), float(stsb["high"])) == (2.0, 6.0)  # one resample in 27 is of one
    assert float(average["mean"]) == pytest.approx(1.0) and float(average["std"]) == 0.0
    assert float(average["t_low"]) == pytest.approx(1) == float(average["t_high"])
    assert any("+4.0 [+2.0, +6.0] (-1.0, +9.0)" in line for line in screen)
    assert "+4.0 [+2.0, +6.0] (-1.0, +9.0)" in (tmp_path / "out" / "differences.md").read_text()
    assert (tmp_path / "out" / "differences.png").stat().st_size > 10_000
    assert screen[-2] == "Missing: nothing." and screen[-1].endswith("differences.md, .csv, .png")


def test_the_order_of_runs_and_seeds_has_no_influence(tmp_path):
    generator = np.random.default_rng(0)
    scores = {method: generator.random((2, 4)).tolist() for method in ("lora", "apl", "full")}
    leave_runs(tmp_path / "one", scores)
    swapped = {m: [points[::-1] for points in scores[m]] for m in ("full", "apl", "lora")}
    leave_runs(tmp_path / "other", swapped)
    for name in ("one", "other"):
        report.report("differences", [str(tmp_path / name)], tmp_path / "out" / name)
    one, other = (tmp_path / "out" / name / "differences.csv" for name in ("one", "other"))
    assert one.read_text() == other.read_text()


def test_trials_with_another_training_seed_are_no_pair(tmp_path):
    leave_runs(tmp_path / "runs", {"lora": [[0.5, 0.6]], "apl": [[0.6, 0.9]]})
    path = tmp_path / "runs" / "stsb-100-apl-1" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seeds": {"data": 1, "train": 42}}))
    screen = report.report("differences", [str(tmp_path / "runs")], tmp_path / "out")
    found = read_cells(tmp_path / "out" / "differences.csv")
    cell = found[f"{TO_LORA} (best single method)", "apl", "scaleup", "stsb"]
    assert (float(cell["mean"]), cell["seeds"], cell["low"]) == (pytest.approx(10), "1", "")
    assert "LoRA on STS-B at K = 100, seed 1 (training 42)" in screen[-2]
    assert "UniPELT (APL) on STS-B at K = 100, seed 1 (training 1)" in screen[-2]


def test_the_best_single_method_has_the_highest_average_and_is_a_submodule(tmp_path):
    leave_runs(
        tmp_path / "runs",
        {
            "bitfit": [[0.9, 0.9], [0.9, 0.9]],  # not a submodule of the paper
            "adapter": [[0.6, 0.6], [0.6, 0.6]],
            "prefix": [[0.7, 0.7], [0.8, 0.8]],
            "lora": [[0.8, 0.8], [0.6, 0.6]],
            "lora_frozen": [[0.9, 0.9], [0.1, 0.1]],
            "prefix_frozen": [[0.95, 0.95], []],  # without an average
        },
    )
    screen = report.report("differences", [str(tmp_path / "runs")], tmp_path / "out")
    found = read_cells(tmp_path / "out" / "differences.csv")
    to_prefix = "[K = 100] Difference to Prefix-tuning (best single method)"
    to_adapter = "[K = 100] Difference to Adapter (best with the authors' heads)"
    assert list(dict.fromkeys(block for block, *_ in found)) == [TO_LORA, to_prefix, to_adapter]
    assert float(found[to_prefix, "lora", "scaleup", "average"]["mean"]) == pytest.approx(-5)
    assert float(found[to_adapter, "lora_frozen", "scaleup", "mrpc"]["mean"]) == pytest.approx(-50)
    assert "[K = 100] best single method: Prefix-tuning, of Adapter; Prefix-tuning; LoRA." in screen
    assert (
        "[K = 100] best with the authors' heads: Adapter, of Adapter; LoRA, frozen head." in screen
    )
    assert "Prefix-tuning, frozen head on MRPC at K = 100" in screen[-2]


def test_without_lora_only_the_best_single_method_is_a_reference(tmp_path):
    leave_runs(tmp_path / "runs", {"adapter": [[0.5]], "apl": [[0.75]]})
    screen = report.report("differences", [str(tmp_path / "runs")], tmp_path / "out")
    found = read_cells(tmp_path / "out" / "differences.csv")
    block = "[K = 100] Difference to Adapter (best single method)"
    assert found[block, "apl", "scaleup", "stsb"]["mean"] == "25.0"
    assert "LoRA at K = 100" in screen[-2] and not (tmp_path / "out" / "differences.png").exists()


def test_a_setting_with_the_name_of_its_method_is_the_reference(tmp_path):
    leave_runs(tmp_path / "runs", {"lora": [[0.5, 0.5]]})
    for seed in (0, 1):
        other = leave_run(tmp_path / "other", "stsb", 100, "lora", seed, 0.6)
        other.rename(tmp_path / "runs" / f"stsb-100-lora_wide-{seed}")
    report.report("differences", [str(tmp_path / "runs")], tmp_path / "out")
    found = read_cells(tmp_path / "out" / "differences.csv")
    cell = found[f"{TO_LORA} (best single method)", "lora: lora_wide", "scaleup", "stsb"]
    assert float(cell["mean"]) == pytest.approx(10)


def test_the_figure_has_trained_and_frozen_heads_side_by_side(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    leave_runs(
        tmp_path / "runs",
        {
            "lora": [[0.5, 0.6], [0.7, 0.7]],
            "lora_frozen": [[0.3, 0.5], [0.7, 0.6]],
            "apl": [[0.6, 0.9], []],
        },
    )
    report.report("differences", [str(tmp_path / "runs")], tmp_path / "out")
    panels = drawn[0].axes
    assert [axes.get_title() for axes in panels] == [
        "MRPC, K = 100",
        "STS-B, K = 100",
        "Avg., K = 100",
    ]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["LoRA", "UniPELT (APL)"]
    lines = {line.get_label(): line for line in panels[1].lines[1:]}  # the first is that at 0
    assert set(lines) == {"trained head", "frozen head"}
    assert list(lines["trained head"].get_xdata()) == pytest.approx([0, 20])
    assert list(lines["frozen head"].get_xdata()) == pytest.approx([-15])
    lora, apl = lines["trained head"].get_ydata()
    (frozen,) = lines["frozen head"].get_ydata()
    assert lora < 0 < frozen < apl == 1
    bootstrap = [bars for bars in panels[1].collections if bars.get_linewidth()[0] > 2]
    ends = np.concatenate([np.array(bars.get_segments())[:, :, 0] for bars in bootstrap])
    assert ends.tolist() == [
        pytest.approx([0, 0]), pytest.approx([10, 30]), pytest.approx([-20, -10])
    ]  # fmt: skip
