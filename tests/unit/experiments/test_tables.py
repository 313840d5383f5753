"""Tables from finished runs: every number against one computed here, and what is missing."""

import json
import shutil
import statistics

import pytest
import yaml

from scaleup.errors import ConfigError
from scaleup.experiments import report, tables
from tests.utils.finished_runs import leave_run, read_cells, squeeze

PAPER = yaml.safe_load(report.PAPER_FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("k", [100, 500, 1000])
def test_the_papers_averages_follow_from_its_cells(k):
    rows = PAPER["table1"][k]
    assert list(rows) == ["full", "bitfit", "adapter", "prefix", "lora", "ap", "apl"]
    for row in rows.values():
        assert statistics.fmean(row[task][0] for task in tables.TASKS) == pytest.approx(
            row["average"][0], abs=0.01
        )
    for best, parts in (
        ("max_ap", ["adapter", "prefix"]),
        ("max_apl", ["adapter", "prefix", "lora"]),
    ):
        worked_out = statistics.fmean(
            max(rows[part][task][0] for part in parts) for task in tables.TASKS
        )
        assert worked_out == pytest.approx(PAPER["table2"][k][best], abs=0.01)
    assert all(PAPER["table2"][k][method] == rows[method]["average"][0] for method in ("ap", "apl"))


def test_the_papers_table_3_follows_from_its_cells():
    for row in PAPER["table3"].values():
        assert statistics.fmean(row[task] for task in tables.TASKS) == pytest.approx(
            row["average"], abs=0.01
        )
    assert PAPER["table3"]["ap"]["average"] - PAPER["table3"]["ap_nogate"][
        "average"
    ] == pytest.approx(0.89)  # as its text says


def test_table_1_has_means_and_spreads_over_seeds_marks_and_the_papers_numbers(small, tmp_path):
    screen = report.report("table1", [str(small)], tmp_path / "out")
    found = read_cells(tmp_path / "out" / "table1.csv")
    block = "[K = 100] Test Performance"
    cola = found[block, "adapter", "scaleup", "cola"]
    assert (
        float(cola["mean"]) == 25.0
        and float(cola["std"]) == pytest.approx(7.0711)
        and cola["seeds"] == "2"
    )
    ranks = {
        method: found[block, method, "scaleup", "cola"]["rank"]
        for method in ("full", "adapter", "apl")
    }
    assert ranks == {"full": "", "adapter": "2", "apl": "1"}
    average = found[block, "full", "scaleup", "average"]  # seeds 0: (10 + 80) / 2, 1: (14 + 84) / 2
    assert float(average["mean"]) == 47.0 and float(average["std"]) == pytest.approx(
        statistics.stdev([45, 49]), abs=1e-4
    )
    assert found[block, "apl", "scaleup", "mrpc"]["std"] == ""  # one seed has no spread
    assert (
        found[block, "apl", "paper", "cola"]["mean"] == "23.62"
        and found[block, "apl", "paper", "cola"]["rank"] == "1"
    )
    assert float(found[block, "apl", "paper", "average"]["mean"]) == pytest.approx(
        (23.62 + 81.71) / 2
    )  # of the tasks shown
    text = squeeze((tmp_path / "out" / "table1.md").read_text())
    assert "| Method | MRPC | CoLA | Avg. |" in text
    assert (
        "| Adapter | 71.00<sub>1.41</sub> | <u>25.00</u><sub>7.07</sub> "
        "| <u>48.00</u><sub>4.24</sub> |" in text
    )
    assert "| *paper* | *81.40<sub>0.19</sub>* | *2.02<sub>4.04</sub>* |" in text
    assert any("Adapter" in line and "25.00' ±7.07" in line for line in screen)
    assert not (tmp_path / "out" / "table1.png").exists()


def test_what_is_missing_is_named(small, tmp_path):
    missing = report.report("table1", [str(small)], tmp_path / "out")[-2]
    assert missing.startswith("Missing: task SST-2; task RTE; ") and "K = 500; K = 1000" in missing
    assert "LoRA at K = 100; " in missing and "UniPELT (AP), NoGate at K = 100" in missing
    assert "UniPELT (APL) on MRPC at K = 100, seed 1" in missing and "Adapter on" not in missing
    assert (
        read_cells(tmp_path / "out" / "table1.csv")[
            "[K = 100] Test Performance", "lora", "paper", "cola"
        ]["mean"]
        == "13.31"
    )
    assert "Missing: task SST-2" in (tmp_path / "out" / "table1.md").read_text()


def test_runs_on_other_data_are_compared_with_each_other_only(tmp_path):
    for method, seeds in {"lora": (0, 1), "apl": (0,)}.items():
        for seed in seeds:
            leave_run(tmp_path / "runs", "films", 64, method, seed, 0.5)
    screen = report.report("table1", [str(tmp_path / "runs")], tmp_path / "out")
    assert "Missing: UniPELT (APL) on films at K = 64, seed 1." in screen


def test_a_score_that_is_not_a_number_is_missing_and_a_loss_is_refused(tmp_path):
    leave_run(tmp_path / "runs", "rte", 100, "lora", 0, float("nan"))
    leave_run(tmp_path / "runs", "rte", 100, "full", 0, 0.5)
    screen = report.report("table1", [str(tmp_path / "runs")], tmp_path / "out")
    assert "LoRA at K = 100" in screen[-2]
    out = leave_run(tmp_path / "runs", "rte", 100, "adapter", 0, 1.5)
    (out / "results.json").write_text(
        (out / "results.json").read_text().replace('"accuracy"', '"loss"')
    )
    with pytest.raises(ConfigError, match="was scored by its loss"):
        report.report("table1", [str(tmp_path / "runs")], tmp_path / "out")


def test_table_2_marks_equals_alike_and_names_the_seeds_that_lack(tmp_path):
    for method, scores in {
        "adapter": (0.1, 0.3),
        "prefix": (0.1, 0.1),
        "lora": (0.05, 0.05),
        "ap": (0.2, 0.2),
        "apl": (0.4,),
    }.items():
        for seed, score in enumerate(scores):
            leave_run(tmp_path / "runs", "rte", 100, method, seed, score)
    screen = report.report("table2", [str(tmp_path / "runs")], tmp_path / "out")
    found = read_cells(tmp_path / "out" / "table2.csv")
    assert [
        found["", "100", "scaleup", column]["rank"] for column in ("max_ap", "ap", "max_apl", "apl")
    ] == ["1", "1", "", "1"]
    assert "UniPELT (APL) on RTE at K = 100, seed 1" in screen[-2] and "K = 500" in screen[-2]


def test_the_papers_own_average_is_shown_where_all_its_tasks_are(tmp_path):
    for task in tables.TASKS:
        leave_run(tmp_path / "runs", task, 500, "lora", 0, 0.5)
    report.report("table1", [str(tmp_path / "runs")], tmp_path / "out")
    found = read_cells(tmp_path / "out" / "table1.csv")[
        "[K = 500] Test Performance", "lora", "paper", "average"
    ]
    assert (found["mean"], found["std"]) == ("65.86", "4.1")


def test_equal_scores_share_their_rank_and_one_alone_has_none():
    cells = []
    for row, mean in enumerate((5.001, 5.0, 4.0, 3.0)):
        means = {"first": mean, "second": 1.0 if row == 0 else None}
        cells += tables.row_cells("", str(row), tables.SCALEUP, means)
    frame = tables.to_frame(cells)
    ranks = tables.rank(frame)
    assert list(ranks[frame["column"] == "first"].fillna(0)) == [1, 1, 2, 0]
    assert ranks[frame["column"] == "second"].isna().all()


def test_table_2_takes_the_best_submodule_on_each_task(tmp_path):
    points = {
        "adapter": (0.2, 0.7),
        "prefix": (0.1, 0.8),
        "lora": (0.3, 0.6),
        "ap": (0.26, 0.78),
        "apl": (0.25, 0.75),
    }
    for method, (cola, mrpc) in points.items():
        leave_run(tmp_path / "runs", "cola", 100, method, 0, cola)
        leave_run(tmp_path / "runs", "mrpc", 100, method, 0, mrpc)
        leave_run(tmp_path / "runs", "cola", 500, method, 0, cola)
    screen = report.report("table2", [str(tmp_path / "runs")], tmp_path / "out")
    found = {
        (row, column): line["mean"]
        for (_, row, source, column), line in read_cells(tmp_path / "out" / "table2.csv").items()
        if source == "scaleup"
    }
    assert [
        float(found["100", column]) for column in ("max_ap", "ap", "max_apl", "apl")
    ] == pytest.approx([50.0, 52.0, 55.0, 50.0])
    assert found["500", "max_ap"] == "" and "Adapter on MRPC at K = 500" in screen[-2]


def test_table_3_is_of_runs_on_all_examples_only(small, tmp_path):
    leave_run(small, "cola", "all", "ap", 0, 0.61, dev=0.61)
    report.report("table3", [str(small)], tmp_path / "out")
    found = read_cells(tmp_path / "out" / "table3.csv")
    ours = {
        row: line["mean"]
        for (_, row, source, column), line in found.items()
        if source == "scaleup" and column == "cola"
    }
    assert ours["ap"] == "61.0" and ours["full"] == ""
    assert (
        found["[K = all] Best Performance on GLUE Dev", "ap_nogate", "paper", "cola"]["mean"]
        == "58.63"
    )


def test_table_4_has_parameters_and_the_times_of_a_benchmark_where_there_is_one(
    small, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # where there is no results/bench
    screen = report.report("table4", [str(small)], tmp_path / "out")
    assert "training time of Fine-tuning" in screen[-2] and "parameters of LoRA" in screen[-2]
    (tmp_path / "bench").mkdir()

    def bench(
        name: str, what: str, geometry: str = "bert-base", compiled: bool = False, **ratios: float
    ) -> None:
        asked = {
            "what": what,
            "geometry": geometry,
            "batch": 16,
            "length": 128,
            "device": "cpu",
            "reference": "lower-bound",
            "compile": compiled,
        }
        (tmp_path / "bench" / name).write_text(
            json.dumps(
                {"settings": asked, "rows": {n: {"ratio": ratio} for n, ratio in ratios.items()}}
            )
        )

    bench("training.json", "training", **{"full fine-tuning": 2.0, "lower-bound": 1.0, "APL": 1.0})
    bench("large.json", "training", "bart-large", **{"full fine-tuning": 2.0, "APL": 1.9})
    bench("compiled.json", "training", compiled=True, **{"full fine-tuning": 2.0, "APL": 1.8})
    screen = report.report("table4", [str(small)], tmp_path / "out", [str(tmp_path / "bench")])
    found = read_cells(tmp_path / "out" / "table4.csv")
    assert (
        found["", "apl", "scaleup", "training"]["mean"] == "50.0"
        and found["", "apl", "scaleup", "inference"]["mean"] == ""
    )
    assert (
        found["", "apl", "scaleup", "parameters"]["mean"] == "0.15"
        and float(found["", "apl", "paper", "training"]["mean"]) == 67
    )
    assert (
        "inference time of UniPELT (APL)" in screen[-2]
        and "training time of UniPELT (APL)" not in screen[-2]
    )
    assert "Training times from training.json (bert-base, 16 x 128 tokens, cpu)." in screen
    bench("more.json", "training", **{"full fine-tuning": 2.0, "APL": 1.5})
    with pytest.raises(
        ConfigError,
        match="training.json both have training times; give the one to take with --bench FILE",
    ):
        report.report("table4", [str(small)], tmp_path / "out", [str(tmp_path / "bench")])
    report.report(
        "table1", [str(small)], tmp_path / "out", [str(tmp_path / "bench")]
    )  # which has no times
    report.report("table4", [str(small)], tmp_path / "out", [str(tmp_path / "bench" / "more.json")])
    assert (
        read_cells(tmp_path / "out" / "table4.csv")["", "apl", "scaleup", "training"]["mean"]
        == "75.0"
    )
    with pytest.raises(ConfigError, match="compiled.json is made with --compile"):
        report.report(
            "table4", [str(small)], tmp_path / "out", [str(tmp_path / "bench" / "compiled.json")]
        )
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="none has no training or inference times of bert-base"):
        report.report("table4", [str(small)], tmp_path / "out", [str(tmp_path / "none")])
    bench(
        "more.json", "training", **{"full fine-tuning": 2.0, "APL": 1.5, "APL, prefix MLP": 1.6}
    )  # as the runs train
    report.report("table4", [str(small)], tmp_path / "out", [str(tmp_path / "bench" / "more.json")])
    assert (
        read_cells(tmp_path / "out" / "table4.csv")["", "apl", "scaleup", "training"]["mean"]
        == "80.0"
    )


def test_a_table_without_runs_is_refused(small, tmp_path):
    with pytest.raises(ConfigError, match="no run there belongs in table3"):
        report.report("table3", [str(small)], tmp_path / "out")
    leave_run(tmp_path / "all", "cola", "all", "ap", 0, 0.61)
    for name in ("table1", "table2", "table6"):
        with pytest.raises(ConfigError, match=f"no run there belongs in {name}"):
            report.report(name, [str(tmp_path / "all")], tmp_path / "out")
    leave_run(tmp_path / "all", "cola", "all", "ap_nogate", 0, float("nan"), dev=float("nan"))
    report.report("table3", [str(tmp_path / "all")], tmp_path / "out")


def test_table_6_has_development_and_test(small, tmp_path):
    report.report("table6", [str(small)], tmp_path / "out")
    found = read_cells(tmp_path / "out" / "table6.csv")
    assert (
        float(found["[K = 100] Development Performance", "adapter", "scaleup", "cola"]["mean"])
        == 50.0
    )
    assert float(found["[K = 100] Test Performance", "adapter", "scaleup", "cola"]["mean"]) == 25.0
    assert ("[K = 100] Development Performance", "adapter", "paper", "cola") not in found


def test_averages_are_of_the_seeds_that_all_tasks_have(tmp_path):
    scores = {
        "adapter": ((0.1, 0.9), (0.3,)),
        "prefix": ((0.2, 0.2), (0.2, 0.4)),
        "ap": ((0.2, 0.7), (0.4, 0.5)),
        "lora": ((0.2,), (None, 0.4)),
    }
    for method, by_task in scores.items():
        for task, points in zip(("cola", "mrpc"), by_task):
            for seed, score in enumerate(points):
                if score is not None:
                    leave_run(tmp_path / "runs", task, 100, method, seed, score)
    screen = report.report("table1", [str(tmp_path / "runs")], tmp_path / "out")
    assert (
        "Avg. counts the seeds that have all tasks: 1 of 2 for Adapter, [K = 100] Test "
        "Performance; 0 of 2 for LoRA, [K = 100] Test Performance." in screen
    )
    found = {
        row: line
        for (_, row, source, column), line in read_cells(tmp_path / "out" / "table1.csv").items()
        if (source, column) == ("scaleup", "average")
    }
    assert (found["adapter"]["mean"], found["adapter"]["std"], found["adapter"]["seeds"]) == (
        "20.0",
        "",
        "1",
    )
    assert (found["prefix"]["mean"], found["prefix"]["seeds"]) == ("25.0", "2") and found["lora"][
        "mean"
    ] == ""
    report.report("table2", [str(tmp_path / "runs")], tmp_path / "out")
    pair = {
        column: line["mean"]
        for (_, row, source, column), line in read_cells(tmp_path / "out" / "table2.csv").items()
        if source == "scaleup"
    }
    assert (pair["max_ap"], pair["ap"]) == (
        "25.0",
        "30.0",
    )  # seed 0 alone: max(10, 20), max(30, 20); 20, 40


def test_tables_of_test_scores_leave_out_runs_whose_test_set_is_the_dev_set(small, tmp_path):
    leave_run(small, "cola", "all", "ap", 0, 0.61, dev=0.61)
    for table in ("table1", "table2"):
        screen = report.report(table, [str(small)], tmp_path / "out")
        assert (
            "1 run on all of GLUE's examples left out, whose test set is the dev set: "
            "table 3 has them." in screen
        )
        assert not any("K = all" in line for line in screen)


def test_table_2_takes_one_setting_of_each_method(small, tmp_path):
    shutil.copytree(small / "cola-100-adapter-0", small / "cola-100-adapter_long-0")
    with pytest.raises(
        ConfigError, match="one setting of each method, and there are several of Adapter"
    ):
        report.report("table2", [str(small)], tmp_path / "out")
