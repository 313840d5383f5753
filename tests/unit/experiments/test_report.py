"""Tables, figures and gates from finished runs: every number against one worked out here, what is missing, what is refused."""

import csv
import json
import pathlib
import shutil
import statistics

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AlbertConfig, AlbertForSequenceClassification

from scaleup.backbone import loading as backbone
from scaleup.backbone import sharded as weights
from scaleup.backbone.method import apply_method
from scaleup.cli import main
from scaleup.data import classification as data
from scaleup.data import tasks
from scaleup.errors import ConfigError
from scaleup.experiments import gate_views as gateviews
from scaleup.experiments import gates as gatereport
from scaleup.experiments import plots as figures
from scaleup.experiments import report, tables
from scaleup.experiments import results as runs
from scaleup.settings import schema as config
from scaleup.training import checkpoint
from scaleup.unipelt.gate import GateMoments, LearnedGate
from tests.utils.workspace import make_workspace

PAPER = yaml.safe_load(report.PAPER.read_text(encoding="utf-8"))
METHODS = {
    "full": {"name": "full"},
    "adapter": {"name": "unipelt", "submodules": ["adapter"], "gates": "none", "adapter_size": 48},
    "prefix": {"name": "unipelt", "submodules": ["prefix"], "gates": "none"},
    "lora": {"name": "unipelt", "submodules": ["lora"], "gates": "none", "lora_alpha": 16, "r": 8},
    "ap": {"name": "unipelt", "submodules": ["adapter", "prefix"], "gates": "learned"},
    "apl": {"name": "unipelt", "submodules": ["adapter", "prefix", "lora"], "gates": "learned"},
    "ap_nogate": {"name": "unipelt", "submodules": ["adapter", "prefix"], "gates": "none"},
}
METRICS = {"cola": "matthews", "mrpc": "f1"}


def leave(
    folder: pathlib.Path,
    task: str,
    k,
    method: str,
    seed: int,
    test: float,
    dev: float = 0.5,
    model: str = "tiny",
    **changes,
) -> pathlib.Path:
    """What a finished run would have left, as far as a report reads it."""
    said, metric = METHODS[method] | changes, METRICS.get(task, "accuracy")
    out = folder / f"{task}-{k}-{'-'.join([method, *map(str, changes.values())])}-{seed}"
    out.mkdir(parents=True)
    stored = 2000 if method == "full" else 150
    results = {
        "task": task,
        "metric": metric,
        "test": {metric: test},
        "dev": {metric: dev},
        "test_is_dev": k == "all",
        "method": said,
        "gates": {},
        "seeds": {"data": seed, "train": seed},
        "examples": {"train": k if k != "all" else 3000},
        "parameters": {"stored": stored, "stored_percent": stored / 20},
    }
    (out / "results.json").write_text(json.dumps(results))
    settings = {
        "model": {"name": model},
        "data": {"name": task, "k": k, "seed": seed, "max_length": 64},
        "train": {"seed": seed},
    }
    (out / "config.yaml").write_text(yaml.safe_dump(settings))
    (out / "timing.json").write_text('{"seconds": 3.0, "peak_memory_mib": 10}')
    return out


def trials(path: pathlib.Path) -> dict[tuple[str, str, str, str], dict[str, str]]:
    """(block, row, source, column) → the line of a table's CSV."""
    return {
        (line["block"], line["row"], line["source"], line["column"]): line
        for line in csv.DictReader(path.open())
    }


@pytest.fixture
def small(tmp_path) -> pathlib.Path:
    """Two tasks, K = 100, two seeds of three methods; UniPELT lacks a seed on MRPC."""
    scores = {
        "full": (0.10, 0.14, 0.80, 0.84),
        "adapter": (0.20, 0.30, 0.70, 0.72),
        "apl": (0.30, 0.32, 0.84, None),
    }
    for method, (cola0, cola1, mrpc0, mrpc1) in scores.items():
        leave(tmp_path / "runs", "cola", 100, method, 0, cola0, 0.4)
        leave(tmp_path / "runs", "cola", 100, method, 1, cola1, 0.6)
        leave(tmp_path / "runs", "mrpc", 100, method, 0, mrpc0)
        if mrpc1 is not None:
            leave(tmp_path / "runs", "mrpc", 100, method, 1, mrpc1)
    return tmp_path / "runs"


# The paper's numbers


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


# Tables


def test_table_1_has_means_and_spreads_over_seeds_marks_and_the_papers_numbers(small, tmp_path):
    screen = report.report("table1", [str(small)], tmp_path / "out")
    found = trials(tmp_path / "out" / "table1.csv")
    block = "[K = 100] Test Performance"
    cola = found[block, "adapter", "ours", "cola"]
    assert (
        float(cola["mean"]) == 25.0
        and float(cola["std"]) == pytest.approx(7.0711)
        and cola["seeds"] == "2"
    )
    ranks = {
        method: found[block, method, "ours", "cola"]["rank"]
        for method in ("full", "adapter", "apl")
    }
    assert ranks == {"full": "", "adapter": "2", "apl": "1"}
    average = found[block, "full", "ours", "average"]  # seeds 0: (10 + 80) / 2, 1: (14 + 84) / 2
    assert float(average["mean"]) == 47.0 and float(average["std"]) == pytest.approx(
        statistics.stdev([45, 49]), abs=1e-4
    )
    assert found[block, "apl", "ours", "mrpc"]["std"] == ""  # one seed has no spread
    assert (
        found[block, "apl", "paper", "cola"]["mean"] == "23.62"
        and found[block, "apl", "paper", "cola"]["rank"] == "1"
    )
    assert float(found[block, "apl", "paper", "average"]["mean"]) == pytest.approx(
        (23.62 + 81.71) / 2
    )  # of the tasks shown
    text = (tmp_path / "out" / "table1.md").read_text()
    assert "| Method | MRPC | CoLA | Avg. |" in text
    assert (
        "| Adapter | 71.00<sub>1.41</sub> | <u>25.00</u><sub>7.07</sub> | <u>48.00</u><sub>4.24</sub> |"
        in text
    )
    assert "| *paper* | *81.40<sub>0.19</sub>* | *2.02<sub>4.04</sub>* |" in text
    assert any("Adapter" in line and "25.00' ±7.07" in line for line in screen)
    assert (tmp_path / "out" / "table1.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_missing_is_named(small, tmp_path):
    missing = report.report("table1", [str(small)], tmp_path / "out")[-2]
    assert missing.startswith("Missing: task SST-2; task RTE; ") and "K = 500; K = 1000" in missing
    assert "LoRA at K = 100; " in missing and "UniPELT (AP), NoGate at K = 100" in missing
    assert "UniPELT (APL) on MRPC at K = 100, seed 1" in missing and "Adapter on" not in missing
    assert (
        trials(tmp_path / "out" / "table1.csv")[
            "[K = 100] Test Performance", "lora", "paper", "cola"
        ]["mean"]
        == "13.31"
    )
    assert "Missing: task SST-2" in (tmp_path / "out" / "table1.md").read_text()


def test_what_own_data_lack_is_a_matter_of_their_own_methods_and_seeds(tmp_path):
    for method, seeds in {"lora": (0, 1), "apl": (0,)}.items():
        for seed in seeds:
            leave(tmp_path / "runs", "films", 64, method, seed, 0.5)
    screen = report.report("table1", [str(tmp_path / "runs")], tmp_path / "out")
    assert "Missing: UniPELT (APL) on films at K = 64, seed 1." in screen


def test_a_score_that_is_no_number_is_missing_and_a_loss_is_no_score(tmp_path):
    leave(tmp_path / "runs", "rte", 100, "lora", 0, float("nan"))
    leave(tmp_path / "runs", "rte", 100, "full", 0, 0.5)
    screen = report.report("table1", [str(tmp_path / "runs")], tmp_path / "out")
    assert "LoRA at K = 100" in screen[-2]
    out = leave(tmp_path / "runs", "rte", 100, "adapter", 0, 1.5)
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
            leave(tmp_path / "runs", "rte", 100, method, seed, score)
    screen = report.report("table2", [str(tmp_path / "runs")], tmp_path / "out")
    found = trials(tmp_path / "out" / "table2.csv")
    assert [
        found["", "100", "ours", column]["rank"] for column in ("max_ap", "ap", "max_apl", "apl")
    ] == ["1", "1", "", "1"]
    assert "UniPELT (APL) on RTE at K = 100, seed 1" in screen[-2] and "K = 500" in screen[-2]


def test_the_papers_own_average_is_shown_where_all_its_tasks_are(tmp_path):
    for task in tables.TASKS:
        leave(tmp_path / "runs", task, 500, "lora", 0, 0.5)
    report.report("table1", [str(tmp_path / "runs")], tmp_path / "out")
    found = trials(tmp_path / "out" / "table1.csv")[
        "[K = 500] Test Performance", "lora", "paper", "average"
    ]
    assert (found["mean"], found["std"]) == ("65.86", "4.1")


def test_equal_scores_share_their_rank_and_one_alone_has_none():
    rows = [
        tables.Row(str(i), "", [tables.Entry(mean), tables.Entry(1.0) if i == 0 else None])
        for i, mean in enumerate((5.001, 5.0, 4.0, 3.0))
    ]
    tables.rank(rows)
    assert [row.entries[0].rank for row in rows] == [1, 1, 2, 0] and rows[0].entries[1].rank == 0


def test_table_2_takes_the_best_submodule_on_each_task(tmp_path):
    points = {
        "adapter": (0.2, 0.7),
        "prefix": (0.1, 0.8),
        "lora": (0.3, 0.6),
        "ap": (0.26, 0.78),
        "apl": (0.25, 0.75),
    }
    for method, (cola, mrpc) in points.items():
        leave(tmp_path / "runs", "cola", 100, method, 0, cola)
        leave(tmp_path / "runs", "mrpc", 100, method, 0, mrpc)
        leave(tmp_path / "runs", "cola", 500, method, 0, cola)
    screen = report.report("table2", [str(tmp_path / "runs")], tmp_path / "out")
    found = {
        (row, column): line["mean"]
        for (_, row, source, column), line in trials(tmp_path / "out" / "table2.csv").items()
        if source == "ours"
    }
    assert [
        float(found["100", column]) for column in ("max_ap", "ap", "max_apl", "apl")
    ] == pytest.approx([50.0, 52.0, 55.0, 50.0])
    assert found["500", "max_ap"] == "" and "Adapter on MRPC at K = 500" in screen[-2]


def test_table_3_is_of_runs_on_all_examples_only(small, tmp_path):
    leave(small, "cola", "all", "ap", 0, 0.61, dev=0.61)
    report.report("table3", [str(small)], tmp_path / "out")
    found = trials(tmp_path / "out" / "table3.csv")
    ours = {
        row: line["mean"]
        for (_, row, source, column), line in found.items()
        if source == "ours" and column == "cola"
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
            "reference": "floor",
            "compile": compiled,
        }
        (tmp_path / "bench" / name).write_text(
            json.dumps(
                {"settings": asked, "rows": {n: {"ratio": ratio} for n, ratio in ratios.items()}}
            )
        )

    bench("training.json", "training", **{"full fine-tuning": 2.0, "floor": 1.0, "APL": 1.0})
    bench("large.json", "training", "bart-large", **{"full fine-tuning": 2.0, "APL": 1.9})
    bench("compiled.json", "training", compiled=True, **{"full fine-tuning": 2.0, "APL": 1.8})
    screen = report.report("table4", [str(small)], tmp_path / "out", [str(tmp_path / "bench")])
    found = trials(tmp_path / "out" / "table4.csv")
    assert (
        found["", "apl", "ours", "training"]["mean"] == "50.0"
        and found["", "apl", "ours", "inference"]["mean"] == ""
    )
    assert (
        found["", "apl", "ours", "parameters"]["mean"] == "0.15"
        and found["", "apl", "paper", "training"]["mean"] == "67"
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
    assert trials(tmp_path / "out" / "table4.csv")["", "apl", "ours", "training"]["mean"] == "75.0"
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
    assert trials(tmp_path / "out" / "table4.csv")["", "apl", "ours", "training"]["mean"] == "80.0"


def test_table_6_has_development_and_test(small, tmp_path):
    report.report("table6", [str(small)], tmp_path / "out")
    found = trials(tmp_path / "out" / "table6.csv")
    assert (
        float(found["[K = 100] Development Performance", "adapter", "ours", "cola"]["mean"]) == 50.0
    )
    assert float(found["[K = 100] Test Performance", "adapter", "ours", "cola"]["mean"]) == 25.0
    assert ("[K = 100] Development Performance", "adapter", "paper", "cola") not in found


def test_runs_that_differ_beyond_the_table_are_noted(small, tmp_path):
    path = small / "cola-100-full-1" / "config.yaml"
    path.write_text(path.read_text().replace("max_length: 64", "max_length: 96"))
    assert "Runs of one method differ in data.max_length (64, 96)." in report.report(
        "table1", [str(small)], tmp_path / "out"
    )


def test_a_setting_that_only_some_runs_of_a_method_have_is_noted(small, tmp_path):
    path = small / "cola-100-full-1" / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    path.write_text(
        yaml.safe_dump(settings | {"train": settings["train"] | {"lr_scheduler_type": "constant"}})
    )
    assert (
        "Runs of one method differ in train.lr_scheduler_type (constant, not set)."
        in report.report("table1", [str(small)], tmp_path / "out")
    )


def test_several_settings_of_one_method_stand_under_the_sweeps_names(tmp_path):
    for name, score in {"lora_slow": 0.3, "lora_fast": 0.6}.items():
        leave(tmp_path / "runs", "cola", 100, "lora", 0, score).rename(
            tmp_path / "runs" / f"cola-100-{name}-0"
        )
    leave(tmp_path / "runs", "cola", 100, "full", 0, 0.5)
    screen = report.report("table1", [str(tmp_path / "runs")], tmp_path / "out")
    found = {
        row: line["mean"]
        for (_, row, source, column), line in trials(tmp_path / "out" / "table1.csv").items()
        if (source, column) == ("ours", "cola")
    }
    assert (found["lora: lora_slow"], found["lora: lora_fast"], found["full"], found["lora"]) == (
        "30.0",
        "60.0",
        "50.0",
        "",
    )
    assert (
        any(line.startswith("LoRA: lora_fast") for line in screen)
        and "LoRA at K = 100" not in screen[-2]
        and "Adapter at K = 100" in screen[-2]
    )


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
                    leave(tmp_path / "runs", task, 100, method, seed, score)
    report.report("table1", [str(tmp_path / "runs")], tmp_path / "out")
    found = {
        row: line
        for (_, row, source, column), line in trials(tmp_path / "out" / "table1.csv").items()
        if (source, column) == ("ours", "average")
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
        for (_, row, source, column), line in trials(tmp_path / "out" / "table2.csv").items()
        if source == "ours"
    }
    assert (pair["max_ap"], pair["ap"]) == (
        "25.0",
        "30.0",
    )  # seed 0 alone: max(10, 20), max(30, 20); 20, 40


def test_results_that_a_run_has_set_aside_do_not_count(small, tmp_path):
    shutil.copytree(small / "cola-100-full-0", small / "cola-100-full-0" / "before-1")
    assert len(runs.load([str(small)])) == 11
    assert len(runs.load([str(small / "cola-100-full-0" / "before-1")])) == 1  # asked for by name


def test_tables_of_test_scores_leave_out_runs_whose_test_set_is_the_dev_set(small, tmp_path):
    leave(small, "cola", "all", "ap", 0, 0.61, dev=0.61)
    for table in ("table1", "table2"):
        screen = report.report(table, [str(small)], tmp_path / "out")
        assert (
            "1 run on all of GLUE's examples left out, whose test set is the dev set: table 3 has them."
            in screen
        )
        assert not any("K = all" in line for line in screen)


def test_runs_that_do_not_belong_together_are_refused(small, tmp_path):
    leave(tmp_path / "more", "cola", 100, "full", 0, 0.5)
    with pytest.raises(ConfigError, match=r"are the same trial \(100, full, cola, 0\)"):
        report.report("table1", [str(small), str(tmp_path / "more")], tmp_path / "out")
    leave(tmp_path / "large", "cola", 500, "full", 0, 0.5, model="larger")
    with pytest.raises(ConfigError, match=r"runs of 2 backbones \(larger, tiny\)"):
        report.report("table1", [str(small), str(tmp_path / "large")], tmp_path / "out")
    (small / "cola-100-full-0" / "results.json").write_text("{")
    (small / "cola-100-full-1" / "results.json").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        report.report("table1", [str(small), str(tmp_path / "none")], tmp_path / "out")
    said = "\n".join(caught.value.problems)
    (small / "cola-100-full-0" / "results.json").write_text(
        (tmp_path / "large" / "cola-500-full-0" / "results.json").read_text()
    )
    (small / "cola-100-full-0" / "config.yaml").write_text("[]")
    with pytest.raises(ConfigError, match=r"cola-100-full-0/config.yaml is damaged"):
        runs.read(small / "cola-100-full-0" / "results.json")
    assert (
        "results.json is damaged" in said
        and "is no results file of a run: it has no task" in said
        and "none has no results.json" in said
    )
    assert not (tmp_path / "out").exists()


def test_results_without_a_config_are_read_too(tmp_path):
    made = leave(tmp_path / "runs", "cola", 500, "lora", 0, 0.25)
    (tmp_path / "flat").mkdir()
    (made / "results.json").rename(tmp_path / "flat" / "cola-lora-0.json")
    run = runs.load([str(tmp_path / "flat")])[0]
    assert (run.method, run.task, run.k, run.seed, run.backbone) == (
        "lora",
        "cola",
        500,
        0,
        runs.UNKNOWN,
    )
    assert "25.00" in "".join(report.report("table1", [str(tmp_path / "flat")], tmp_path / "out"))


def test_every_subset_of_submodules_has_a_name():
    named = {
        "al": "UniPELT (AL)",
        "pl_nogate": "UniPELT (PL), NoGate",
        "lora_gated": "LoRA, gated",
        "apl": "UniPELT (APL)",
    }
    assert {method: runs.name_of(method) for method in named} == named


def test_runs_that_differ_in_the_seed_of_training_all_count(tmp_path):
    for seed, score in {43: 0.1, 44: 0.3}.items():
        path = leave(tmp_path / "runs", "cola", 100, "apl", f"s0_{seed}", score) / "results.json"
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"seeds": {"data": 0, "train": seed}})
        )
    screen = report.report("table1", [str(tmp_path / "runs")], tmp_path / "out")
    assert (
        trials(tmp_path / "out" / "table1.csv")[
            "[K = 100] Test Performance", "apl", "ours", "cola"
        ]["mean"]
        == "20.0"
    )
    assert any("2 runs, seeds 0 (training 43), 0 (training 44)." in line for line in screen)
    leave(tmp_path / "other", "cola", 100, "apl", 0, 0.9).rename(
        tmp_path / "other" / "cola-100-apl_slow-0"
    )  # another setting, another seed: not in that mean
    report.report("table1", [str(tmp_path / "runs"), str(tmp_path / "other")], tmp_path / "out")
    found = trials(tmp_path / "out" / "table1.csv")
    assert [
        found["[K = 100] Test Performance", row, "ours", "cola"]["mean"]
        for row in ("apl: apl", "apl: apl_slow")
    ] == ["20.0", "90.0"]


def test_what_methods_differ_in_beside_themselves_is_said(small, tmp_path):
    path = small / "cola-100-apl-0" / "config.yaml"
    path.write_text(
        yaml.safe_dump(
            yaml.safe_load(path.read_text())
            | {"train": {"seed": 0, "learning_rate": 0.1, "num_train_epochs": 12}}
        )
    )
    screen = report.report("table1", [str(small)], tmp_path / "out")
    assert any(
        "Runs of one method differ in train.learning_rate (0.1, not set); train.num_train_epochs (12, not set)."
        in line
        for line in screen
    )
    other = small / "cola-100-apl-1" / "config.yaml"
    other.write_text(
        yaml.safe_dump(
            yaml.safe_load(path.read_text()) | {"data": yaml.safe_load(other.read_text())["data"]}
        )
    )
    shutil.rmtree(small / "mrpc-100-apl-0")
    screen = report.report("table1", [str(small)], tmp_path / "out")
    assert any(
        "Methods differ in train.num_train_epochs (12, not set)." in line for line in screen
    ) and not any("Runs of one" in line for line in screen)


def test_scores_of_two_metrics_are_not_compared(small, tmp_path):
    path = small / "cola-100-apl-0" / "results.json"
    path.write_text(path.read_text().replace("matthews", "accuracy"))
    with pytest.raises(
        ConfigError,
        match="runs of cola were scored by accuracy and matthews; give those of one metric",
    ):
        report.report("table1", [str(small)], tmp_path / "out")


def test_table_2_takes_one_setting_of_each_method(small, tmp_path):
    shutil.copytree(small / "cola-100-adapter-0", small / "cola-100-adapter_long-0")
    with pytest.raises(
        ConfigError, match="one setting of each method, and there are several of Adapter"
    ):
        report.report("table2", [str(small)], tmp_path / "out")


@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": {"train": 0}},
        {"seeds": {"data": "0", "train": 0}},
        {"examples": {}},
        {"parameters": {}},
        {"method": {"name": "unipelt"}},
        {"method": {"name": "magic"}},
        {"test": {"accuracy": 0.5}},
        {"test": {"matthews": None}},
        {"test": {"matthews": "high"}},
        {"dev": {"matthews": float("inf")}},
        {"test": 3},
        {"gates": {"layer": {"lora": {"mean": 0.5}}}},
        {"gates": {"layer": {"magic": {"mean": 0.5, "std": 0.1}}}},
    ],
    ids=str,
)
def test_damaged_results_are_named_and_nothing_is_made_of_them(small, tmp_path, changes):
    path = small / "cola-100-apl-0" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=f"{path} is damaged .*; run it again, or leave it out"):
        report.report("table1", [str(small)], tmp_path / "out")


# Figures


def test_figure_2_is_the_score_over_the_bottleneck(tmp_path):
    for size, scores in {48: (0.02, 0.06), 256: (0.3,)}.items():
        for seed, score in enumerate(scores):
            leave(tmp_path / "runs", "cola", 100, "adapter", seed, score, adapter_size=size)
    leave(tmp_path / "runs", "cola", 100, "apl", 0, 0.2)
    screen = report.report("figure2", [str(tmp_path / "runs")], tmp_path / "out")
    found = {
        (row, column): (line["mean"], line["std"])
        for (_, row, _, column), line in trials(tmp_path / "out" / "figure2.csv").items()
    }
    assert found["ours", "48"] == ("4.0", "2.8284") and found["ours", "256"] == ("30.0", "")
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
        leave(tmp_path / "runs", "rte", k, "lora", 0, alpha / 100, lora_alpha=alpha)
    report.report("figure3", [str(tmp_path / "runs")], tmp_path / "out")
    found = trials(tmp_path / "out" / "figure3.csv")
    assert (
        found["RTE, K = 100", "ours", "ours", "2.0"]["mean"] == "16.0"
        and found["RTE, K = 500", "ours", "ours", "2.0"]["mean"] == ""
    )
    assert found["RTE, K = 100", "paper", "paper", "2.0"]["mean"] == "55.02"
    leave(
        tmp_path / "table" / "runs", "cola", 100, "lora", 0, 0.1, lora_alpha=16
    )  # of a sweep of all methods
    screen = report.report(
        "figure3", [str(tmp_path / "runs"), str(tmp_path / "table")], tmp_path / "out"
    )
    assert (
        "Left out, as only the usual 2 is there: CoLA, K = 100." in screen
        and trials(tmp_path / "out" / "figure3.csv") == found
    )
    with pytest.raises(ConfigError, match="no run there belongs in figure2"):
        report.report("figure2", [str(tmp_path / "runs")], tmp_path / "out")


def test_a_figure_has_no_point_of_a_run_without_a_test_score(tmp_path):
    leave(tmp_path / "runs", "cola", 100, "adapter", 0, float("nan"))
    path = leave(tmp_path / "runs", "cola", 100, "adapter", 1, 0.5) / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"test": None}))
    with pytest.raises(ConfigError, match="no run there belongs in figure2"):
        report.report("figure2", [str(tmp_path / "runs")], tmp_path / "out")


# Gates


@pytest.fixture(scope="module")
def gated(tmp_path_factory) -> pathlib.Path:
    """Folders as gated runs leave them, without the training: random gates, and statistics by GateMoments over the dev set. `albert`
    calls its one layer three times."""
    folder = tmp_path_factory.mktemp("gated")
    workspace = make_workspace(folder)
    albert = AlbertConfig(
        vocab_size=1000,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
    )
    shutil.copytree(workspace / "bert", workspace / "albert")
    AlbertForSequenceClassification(albert).save_pretrained(workspace / "albert")
    for name in ("one", "other", "albert"):
        out = folder / name / "run" if name == "albert" else folder / name
        model_name = "albert" if name == "albert" else "bert"
        said = [
            f"model.name={workspace / model_name}",
            f"data.train_file={workspace / 'train.csv'}",
            f"data.test_file={workspace / 'test.csv'}",
        ]
        said += [
            "data.k=64",
            "data.dev_size=32",
            "method.prefix_hidden_size=16",
            f"train.output_dir={out}",
        ]
        settings = config.load(None, said)
        found = backbone.load_config(settings.model)
        settings = backbone.fit_length(settings, found)
        examples = data.load(settings.data)
        tokenizer = backbone.load_tokenizer(settings.model, found)
        backbone.set_labels(found, examples.labels)
        model, fresh = backbone.load_model(
            settings.model, found, tasks.of(settings.data).auto, torch.float32, torch.device("cpu")
        )
        model = apply_method(model, settings.method, fresh).eval()
        torch.manual_seed(len(name))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.3)
        gates = {
            key.removeprefix("base_model.model.").split(".unipelt_")[0]: m
            for key, m in model.named_modules()
            if isinstance(m, LearnedGate)
        }
        for gate in gates.values():
            gate.statistics = GateMoments(len(gate.names), gate.bias.device)
        encoded = data.tokenize(examples, tokenizer, settings.data).dev
        with torch.no_grad():
            for row in encoded:  # one by one
                model(
                    input_ids=torch.tensor([row["input_ids"]]),
                    attention_mask=torch.tensor([row["attention_mask"]]),
                )
        drained = {
            site: {
                part: {"mean": m, "std": s}
                for part, (m, s) in zip(gate.names, gate.statistics.drain())
            }
            for site, gate in gates.items()
        }
        draft = checkpoint.create_staging_folder(out / "best")
        model.save_pretrained(draft)
        checkpoint.commit_checkpoint(
            draft,
            out / "best",
            checkpoint.expected_tensors(model),
            {
                "labels": examples.labels,
                "data": data.provenance(examples),
                "backbone": {
                    "name": settings.model.name,
                    "fingerprint": weights.fingerprint(settings.model.name, None),
                },
            },
        )
        (out / "config.yaml").write_text(config.to_yaml(settings))
        results = {
            "task": "sequence_classification",
            "metric": "accuracy",
            "test": {"accuracy": 0.5},
            "dev": {"accuracy": 0.5},
            "test_is_dev": False,
            "method": settings.dump()["method"],
            "gates": drained,
            "seeds": {"data": 0, "train": 42},
            "examples": {"train": 64},
            "parameters": {"stored": 1, "stored_percent": 1.0},
        }
        (out / "results.json").write_text(json.dumps(results))
    return folder


def test_a_pass_over_the_dev_set_gives_the_runs_own_statistics(gated):
    run = runs.read(gated / "one" / "results.json")
    own, passed = gateviews.from_results(run, "one"), gateviews.from_pass(run, "one", "dev")
    assert own.rows == passed.rows == [
        "layer 0",
        "layer 1",
        "layer 2",
    ] and own.columns == passed.columns == ["adapter", "prefix", "lora"]
    assert np.allclose(own.mean, passed.mean, atol=1e-5) and np.allclose(
        own.spread, passed.spread, atol=1e-4
    )
    assert passed.each.shape == (32, 3, 3) and passed.spread.min() > 1e-4
    gates = run.results["gates"]
    assert own.mean[1, 2] == gates["bert.encoder.layer.1.attention.self"]["lora"]["mean"]
    assert own.spread[2, 0] == gates["bert.encoder.layer.2.output.LayerNorm"]["adapter"]["std"]


def test_gates_are_not_looked_at_in_another_backbone_or_on_other_data(gated, tmp_path):
    workspace = shutil.copytree(gated / "one", tmp_path / "one") and tmp_path
    for name in ("bert", "train.csv", "test.csv"):
        source = next(path for path in (gated, *gated.iterdir()) if (path / name).exists()) / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, workspace / name)
    config = workspace / "one" / "config.yaml"
    was = yaml.safe_load(config.read_text())
    moved = {
        "model": {"name": str(workspace / "bert")},
        "data": {
            key: str(workspace / f"{key.partition('_')[0]}.csv")
            for key in ("train_file", "test_file")
        },
    }
    config.write_text(
        yaml.safe_dump({name: values | moved.get(name, {}) for name, values in was.items()})
    )
    run = runs.read(workspace / "one" / "results.json")
    gateviews.from_pass(run, "one", "dev")  # the same under another path
    rows = (workspace / "train.csv").read_text().splitlines(keepends=True)
    (workspace / "train.csv").write_text("".join(rows[:-1]))
    with pytest.raises(ConfigError, match="the run's data has changed since"):
        gateviews.from_pass(run, "one", "dev")
    shape = workspace / "bert" / "config.json"
    shape.write_text(json.dumps(json.loads(shape.read_text()) | {"layer_norm_eps": 0.5}))
    with pytest.raises(ConfigError, match="is not the backbone that was trained on"):
        gateviews.from_pass(run, "one", "dev")


def test_gates_by_class_and_example_are_those_of_the_right_examples(gated):
    view = gateviews.from_pass(runs.read(gated / "one" / "results.json"), "one", "dev")
    good = [
        any(word in text.split() for word in ("fine", "great", "warm", "bright"))
        for text in view.texts
    ]
    assert [label == "good" for label in view.labels] == good and view.classes == ["bad", "good"]
    by_hand = sum(view.each[i] for i in range(32) if good[i]) / sum(good)
    assert np.allclose(view.of_class("good"), by_hand) and not np.allclose(
        view.of_class("bad"), by_hand, atol=1e-4
    )
    longest, shortest = (
        choose(range(32), key=lambda i: len(view.texts[i].split())) for choose in (max, min)
    )
    alone = gateviews.from_pass(runs.read(gated / "one" / "results.json"), "one", "train")
    assert alone.each.shape[0] == 64 and not np.allclose(
        view.each[longest], view.each[shortest], atol=1e-4
    )


def test_a_layer_that_is_called_many_times_has_the_mean_over_its_calls(gated):
    run = runs.read(gated / "albert" / "run" / "results.json")
    own, passed = gateviews.from_results(run, "albert"), gateviews.from_pass(run, "albert", "dev")
    assert passed.each.shape[0] == 32 and np.allclose(own.mean, passed.mean, atol=1e-5)


def test_no_title_of_a_heat_map_is_wider_than_the_picture(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    name = "quickstart-20261127-063015: quickstart, K = 1000, UniPELT (APL), dev set (500 examples)"
    heat = figures.Heat(
        name, ["layer 0"], ["adapter", "prefix", "lora"], np.full((1, 3), 0.5), [["±0.1"] * 3]
    )
    for heats in ([heat], [heat, heat]):
        figures.draw_heats(heats, f"{name}\nminus {name}", tmp_path / "heat.png")
        figure = drawn.pop()
        figure.draw_without_rendering()
        titles = [figure._suptitle, *(axes.title for axes in figure.axes)]
        boxes = [title.get_window_extent() for title in titles if title.get_text()]
        assert len(boxes) == 1 + len(heats) and all(
            box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes
        )


def test_runs_of_different_backbones_are_said_to_be(gated, tmp_path):
    for other, said in ((gated / "other", 0), (gated / "albert" / "run", 1)):
        screen = gatereport.report([str(gated / "one"), str(other)], None, tmp_path / "out")
        assert (
            sum(line.startswith("The runs have different backbones: one ") for line in screen)
            == said
        )


def test_runs_of_one_name_are_told_apart_by_their_folders(gated, tmp_path):
    shutil.copytree(gated / "one", tmp_path / "one", ignore=shutil.ignore_patterns("best"))
    screen = gatereport.report([str(gated / "one"), str(tmp_path / "one")], None, tmp_path / "out")
    text = (tmp_path / "out" / "gates.md").read_text()
    assert (
        f"## {tmp_path / 'one'}: " in text
        and f" minus {gated / 'one'}: " in text
        and "No view by class or example: --run: " in screen[-2]
    )


def test_a_run_that_writes_text_shows_its_own_statistics(gated, tmp_path):
    shutil.copytree(gated / "one", tmp_path / "one")
    said = yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())
    said["data"] |= {"task": "causal_lm", "target_column": "label", "label_column": None}
    (tmp_path / "one" / "config.yaml").write_text(yaml.safe_dump(said))
    screen = gatereport.report([str(tmp_path / "one")], None, tmp_path / "out")
    assert (tmp_path / "out" / "gates.png").is_file() and "No view by class or example" in screen[
        -2
    ]


def test_a_file_of_the_users_can_be_looked_at(gated, tmp_path):
    run = runs.read(gated / "one" / "results.json")
    view = gateviews.from_pass(run, "one", "dev")
    with (tmp_path / "mine.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ["text", "label"],
                [view.texts[3], "good"],
                [view.texts[9], "bad"],
                [view.texts[3], "bad"],
            ]
        )
    mine = gateviews.from_pass(run, "one", str(tmp_path / "mine.csv"))
    assert np.allclose(mine.each, view.each[[3, 9, 3]], atol=1e-5) and mine.labels == [
        "good",
        "bad",
        "bad",
    ]
    with pytest.raises(
        ConfigError, match="--data: there is no file none.csv; it takes train, dev, test or a file"
    ):
        gateviews.from_pass(run, "one", "none.csv")
    (tmp_path / "other.csv").write_text("words,label\nfine,good\n")
    with pytest.raises(ConfigError, match="--data: .*other.csv has no column 'text'") as caught:
        gateviews.from_pass(run, "one", str(tmp_path / "other.csv"))
    assert len(caught.value.problems) == 1


def test_the_gate_report_has_every_view_and_compares_two_runs(gated, tmp_path):
    screen = gatereport.report([str(gated / "one"), str(gated / "other")], None, tmp_path)
    names = {
        "gates.md",
        "gates.csv",
        "gates.png",
        "gates_classes.png",
        "gates_examples.csv",
        "gates_examples.png",
        "gates_difference.png",
    }
    assert {path.name for path in tmp_path.iterdir()} == names and all(
        name in screen[-1] for name in names
    )
    one, other = (
        gateviews.from_results(runs.read(gated / name / "results.json"), name)
        for name in ("one", "other")
    )
    text = (tmp_path / "gates.md").read_text()
    last = text[text.index(" minus ") :]
    assert f"| layer 0 | {other.mean[0, 0] - one.mean[0, 0]:+.3f} |" in last
    assert "### Class good" in text and "prefix, mean over layers: the 5 lowest and highest" in text
    lines = list(csv.DictReader((tmp_path / "gates_examples.csv").open()))
    assert (
        len(lines) == 2 * 32
        and len(lines[0]) == 4 + 9
        and {line["label"] for line in lines} == {"good", "bad"}
    )
    for name in ("one", "other"):
        mine = [float(line["layer 1 lora"]) for line in lines if line["run"].startswith(name)]
        assert statistics.fmean(mine) == pytest.approx(
            gateviews.from_results(runs.read(gated / name / "results.json"), name).mean[1, 2],
            abs=1e-4,
        )
    kinds = {line["examples"] for line in csv.DictReader((tmp_path / "gates.csv").open())}
    assert kinds == {"all", "good", "bad"}


def test_without_the_bundle_there_are_the_runs_own_statistics_and_a_word_about_it(gated, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("results.json", "config.yaml"):
        (tmp_path / "run" / name).write_text((gated / "one" / name).read_text())
    screen = gatereport.report([str(tmp_path / "run")], None, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "gates.md",
        "gates.csv",
        "gates.png",
    } and "has no best/" in screen[-2]
    with pytest.raises(ConfigError, match="has no best/, which a pass over data needs"):
        gatereport.report([str(tmp_path / "run")], "dev", tmp_path / "out")


def test_a_changed_bundle_and_a_run_without_gates_are_refused(gated, tmp_path):
    leave(tmp_path, "cola", 100, "ap_nogate", 0, 0.1)
    with pytest.raises(ConfigError, match=r"has no learned gates \(ap_nogate\)"):
        gatereport.report([str(tmp_path / "cola-100-ap_nogate-0")], None, tmp_path / "out")
    weights = gated / "other" / "best" / "adapter_model.safetensors"
    assert load_file(weights)
    kept = weights.read_bytes()
    try:
        weights.write_bytes(kept[:-4] + b"\0\0\0\0")
        with pytest.raises(ConfigError, match="the bundle was altered"):
            gateviews.from_pass(runs.read(gated / "other" / "results.json"), "other", "dev")
    finally:
        weights.write_bytes(kept)


def test_gates_of_two_stacks_stand_apart():
    sites = [
        ("model.encoder.layers.0.self_attn", "prefix"),
        ("model.encoder.layers.0.final_layer_norm", "adapter"),
        ("model.decoder.layers.0.self_attn", "prefix"),
        ("model.decoder.layers.0.encoder_attn", "prefix"),
        ("model.decoder.layers.0.final_layer_norm", "adapter"),
    ]
    rows, columns, where = gateviews.places(sites)
    assert rows == ["encoder 0", "decoder 0"] and columns == [
        "adapter",
        "prefix self_attn",
        "prefix encoder_attn",
    ]
    assert [where[site] for site in sites] == [(0, 1), (0, 0), (1, 1), (1, 2), (1, 0)]


# The script


def test_the_script_reports_and_refuses(small, tmp_path, monkeypatch, capsys):
    def script(*arguments: str) -> int:
        return main(["report", *arguments])

    assert script("table1", "--runs", str(small)) == 0 and "Table 1" in capsys.readouterr().out
    assert (small / "report" / "table1.png").is_file()
    assert (
        script("table1", "--runs", str(small), "--data", "dev") == 2
        and "--data: has no effect on table1" in capsys.readouterr().err
    )
    assert (
        script("table4", "--runs", str(small), "--bench", "none.json") == 2
        and "--bench: there is no none.json" in capsys.readouterr().err
    )
    assert script("gates") == 2 and "--run: which run?" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert (
        script("figure2") == 2
        and "--runs: runs/figure2 has no results.json" in capsys.readouterr().err
    )
